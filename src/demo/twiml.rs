//! TwiML as pretend Twilio reads it: strictly.
//!
//! [`Twiml::read`] takes the XML of an answer apart and keeps what the server may say with it.
//! What Twilio would report with its error numbers 12100 (not well-formed) and 12200 (misused)
//! is an error here as well, so that a test notices what would otherwise be noticed by a
//! caller.

use roxmltree::{Document, Node};

/// TwiML as far as this server uses it, read as strictly as Twilio reads it.
#[derive(Clone, Debug, Default)]
pub struct Twiml {
    pub xml: String,
    /// `<Stream url>`
    pub stream_url: Option<String>,
    /// `<Connect action>`
    pub action: Option<String>,
    /// The text of each `<Say>`.
    pub said: Vec<String>,
    /// The number in `<Dial>`.
    pub dial: Option<String>,
    /// `<Dial action>`
    pub dial_action: Option<String>,
    /// `<Dial answerOnBridge>`
    #[cfg(test)]
    pub answer_on_bridge: bool,
    /// `<Number url>`
    #[cfg(test)]
    pub whisper: Option<String>,
    /// `<Gather action>`
    #[cfg(test)]
    pub gather: Option<String>,
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
        let document = Document::parse(xml).map_err(|error| error.to_string())?;
        if !document.root_element().has_tag_name("Response") {
            return Err("the root is not <Response>".to_owned());
        }
        for element in document.descendants().filter(Node::is_element) {
            let attribute = |name: &str| element.attribute(name).map(str::to_owned);
            let text: String =
                element.children().filter(Node::is_text).filter_map(|node| node.text()).collect();
            let text = text.trim().to_owned();
            let name = element.tag_name().name();
            if name == "Dial" {
                twiml.dial_action = attribute("action");
            }
            #[cfg(test)]
            match name {
                "Dial" => {
                    twiml.answer_on_bridge =
                        attribute("answerOnBridge").is_some_and(|value| value == "true");
                }
                "Number" => twiml.whisper = attribute("url"),
                "Gather" => twiml.gather = attribute("action"),
                _ => {}
            }
            match name {
                "Connect" => twiml.action = attribute("action"),
                "Stream" => twiml.stream_url = attribute("url"),
                "Say" => twiml.said.push(text),
                "Dial" | "Number" if !text.is_empty() => twiml.dial = Some(text),
                "Hangup" => twiml.hangs_up = true,
                _ => {}
            }
            twiml.elements.push(name.to_owned());
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
    /// Where the stream opens, behind the proxy.
    pub fn stream_path(&self) -> String {
        let token = self.stream_url.as_deref().and_then(|url| url.split_once("/media-stream/"));
        format!("/media-stream/{}", token.map(|(_, token)| token).unwrap_or_default())
    }
}
