//! TwiML as pretend Twilio reads it: strictly.
//!
//! [`Twiml::read`] takes the XML of an answer apart and keeps what the server may say with it.
//! What Twilio would report with its error numbers 12100 (not well-formed) and 12200 (misused)
//! is an error here as well, so that a test notices what would otherwise be noticed by a
//! caller.

/// TwiML as far as this server uses it, read as strictly as Twilio reads it.
#[derive(Clone, Debug, Default)]
pub struct Twiml {
    pub xml: String,
    /// `<Stream url>`
    pub stream_url: Option<String>,
    /// `<Parameter name value>` in order.
    pub parameters: Vec<(String, String)>,
    /// `<Connect action>`
    pub action: Option<String>,
    /// The text of each `<Say>`.
    pub said: Vec<String>,
    /// The number in `<Dial>`.
    pub dial: Option<String>,
    /// `<Dial action>`
    pub dial_action: Option<String>,
    /// Whether there is a `<Hangup/>`.
    pub hangs_up: bool,
    /// The names of all elements in order, `Response` first.
    pub elements: Vec<String>,
}

impl Twiml {
    /// Twilio's error numbers 12100 (not well-formed) and 12200 (misused) are
    /// errors here as well.
    pub fn read(xml: &str) -> Result<Twiml, String> {
        let mut twiml = Twiml { xml: xml.to_owned(), ..Twiml::default() };
        for element in read_xml(xml)? {
            let text = element.text.trim().to_owned();
            if element.name == "Dial" {
                twiml.dial_action = element.attribute("action");
            }
            match element.name.as_str() {
                "Connect" => twiml.action = element.attribute("action"),
                "Stream" => twiml.stream_url = element.attribute("url"),
                "Parameter" => {
                    let name = element.attribute("name").ok_or("a <Parameter> without a name")?;
                    let value =
                        element.attribute("value").ok_or("a <Parameter> without a value")?;
                    if name.chars().count() + value.chars().count() >= 500 {
                        return Err(format!("<Parameter> {name} is longer than 500 characters"));
                    }
                    twiml.parameters.push((name, value));
                }
                "Say" => twiml.said.push(text),
                "Dial" | "Number" if !text.is_empty() => twiml.dial = Some(text),
                "Hangup" => twiml.hangs_up = true,
                _ => {}
            }
            twiml.elements.push(element.name);
        }
        match &twiml.stream_url {
            Some(url) if !url.starts_with("wss://") => {
                Err(format!("the stream's url is {url}, not wss"))
            }
            Some(url) if url.contains('?') => Err(format!("the stream's url has a query: {url}")),
            _ => Ok(twiml),
        }
    }
}

#[cfg(test)]
impl Twiml {
    /// The value of a `<Parameter>`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(present, _)| present == name).map(|(_, value)| value.as_str())
    }
}

struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    text: String,
}

impl Element {
    fn attribute(&self, name: &str) -> Option<String> {
        self.attributes.iter().find(|(present, _)| present == name).map(|(_, value)| value.clone())
    }
}

/// All elements in order of their start tags. Small, but it forgives nothing:
/// every start tag is ended, every attribute quoted, every `&` an entity.
fn read_xml(xml: &str) -> Result<Vec<Element>, String> {
    let mut rest = match xml.strip_prefix("<?xml") {
        Some(declared) => declared.split_once("?>").ok_or("the XML declaration does not end")?.1,
        None => xml,
    };
    let mut elements: Vec<Element> = Vec::new();
    let mut open: Vec<usize> = Vec::new();
    while let Some((text, tail)) = rest.split_once('<') {
        match open.last().and_then(|index| elements.get_mut(*index)) {
            Some(element) => element.text.push_str(&unescape(text)?),
            None if text.trim().is_empty() => {}
            None => return Err(format!("text outside of <Response>: {text:?}")),
        }
        let (tag, tail) = cut_tag(tail)?;
        rest = tail;
        if tag.starts_with("!--") {
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            let started = open.pop().and_then(|index| elements.get(index));
            if started.is_none_or(|element| element.name != name.trim()) {
                return Err(format!("</{name}> ends what was not begun"));
            }
            continue;
        }
        let empty = tag.strip_suffix('/');
        elements.push(read_tag(empty.unwrap_or(tag))?);
        if empty.is_none() {
            open.push(elements.len() - 1);
        }
    }
    if !open.is_empty() || !rest.trim().is_empty() {
        return Err("the document ends too early, or text follows it".to_owned());
    }
    match elements.first() {
        Some(root) if root.name == "Response" => Ok(elements),
        _ => Err("the root is not <Response>".to_owned()),
    }
}

/// Splits behind the `>` that ends the tag; one inside quotes does not.
fn cut_tag(text: &str) -> Result<(&str, &str), String> {
    let mut quoted = false;
    for (at, character) in text.char_indices() {
        match character {
            '"' => quoted = !quoted,
            '>' if !quoted => {
                let (tag, tail) = text.split_at(at);
                return Ok((tag, tail.strip_prefix('>').unwrap_or(tail)));
            }
            _ => {}
        }
    }
    Err(format!("a tag does not end: <{text}"))
}

fn read_tag(tag: &str) -> Result<Element, String> {
    let (name, mut rest) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
    let mut attributes = Vec::new();
    while !rest.trim().is_empty() {
        let (name, tail) =
            rest.split_once("=\"").ok_or(format!("an attribute without quotes: <{tag}>"))?;
        let (value, tail) = tail.split_once('"').ok_or(format!("quotes do not end: <{tag}>"))?;
        if value.contains('<') {
            return Err(format!("a raw < in an attribute: <{tag}>"));
        }
        attributes.push((name.trim().to_owned(), unescape(value)?));
        rest = tail;
    }
    Ok(Element { name: name.to_owned(), attributes, text: String::new() })
}

fn unescape(text: &str) -> Result<String, String> {
    let mut parts = text.split('&');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (entity, tail) = part.split_once(';').ok_or(format!("a raw & in {text:?}"))?;
        let character = match entity {
            "amp" => '&',
            "lt" => '<',
            "gt" => '>',
            "quot" => '"',
            "apos" => '\'',
            _ => {
                let number = entity.strip_prefix("#x").map(|hex| u32::from_str_radix(hex, 16));
                let number = number.or_else(|| entity.strip_prefix('#').map(str::parse));
                let character = number.and_then(Result::ok).and_then(char::from_u32);
                character.ok_or(format!("unknown entity &{entity};"))?
            }
        };
        plain.push(character);
        plain.push_str(tail);
    }
    Ok(plain)
}
