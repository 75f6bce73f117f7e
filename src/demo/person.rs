//! The person whose phone rings when a caller is put through, with Twilio's part of it.
//!
//! Twilio rings the number of a `<Dial>`. When somebody picks up, it runs the TwiML of the
//! `<Number>`'s `url` at their end, and connects them with the caller if that ends without a
//! `<Hangup>`. How it went it tells the `action` of the `<Dial>`: a leg that was picked up is
//! `completed`, whoever picked up, and only `DialBridged` says whether it was connected.
//!
//! Only the tests need it.

use crate::demo::backstage::random_hex;
use crate::demo::trouble::Trouble;
use crate::demo::twilio::{Ringing, incoming_call_form};
use crate::demo::twiml::Twiml;
use crate::demo::world::World;

/// Somebody, or something, that has picked up.
pub struct Person<'a> {
    world: &'a World,
    dial: &'a Ringing,
    call_sid: String,
    twiml: Twiml,
}

impl Ringing {
    /// The phone that a `<Dial>` rings is picked up.
    #[track_caller]
    pub fn person_picks_up<'a>(&'a self, world: &'a World) -> Result<Person<'a>, Trouble> {
        let whisper = self.twiml.whisper.clone().unwrap_or_default();
        let mut person = Person {
            world,
            dial: self,
            call_sid: format!("CA{}", random_hex(16)),
            twiml: Twiml::default(),
        };
        person.twiml = person.ask(&whisper, None)?;
        Ok(person)
    }

    /// The `<Dial>` is over without anybody having picked up: `busy`, `no-answer`, `failed`.
    #[track_caller]
    pub fn nobody_picks_up(&self, world: &World, status: &str) -> Result<Ringing, Trouble> {
        self.next(world, &[("DialCallStatus", status), ("DialBridged", "false")])
    }
}

impl Person<'_> {
    /// What is said to them.
    pub fn hears(&self) -> String {
        self.twiml.said.join(" ")
    }

    /// The answer that they are listening to, or have listened to.
    pub fn twiml(&self) -> &Twiml {
        &self.twiml
    }

    /// Within the time for it, and while they are asked for a key.
    #[track_caller]
    pub fn presses(&mut self, key: &str) -> Result<(), Trouble> {
        let action = self.twiml.gather.clone().unwrap_or_default();
        self.twiml = self.ask(&action, Some(key))?;
        Ok(())
    }

    /// All of their TwiML has run, and none of it hung up.
    pub fn is_connected(&self) -> bool {
        !self.twiml.hangs_up && self.twiml.gather.is_none()
    }

    /// They hang up, or are hung up on; the caller is still there.
    #[track_caller]
    pub fn leaves(self) -> Result<Ringing, Trouble> {
        self.end("in-progress")
    }

    /// The caller hangs up, whatever the person is doing.
    #[track_caller]
    pub fn caller_leaves(self) -> Result<Ringing, Trouble> {
        self.end("completed")
    }

    #[track_caller]
    fn end(&self, call_status: &str) -> Result<Ringing, Trouble> {
        let bridged = if self.is_connected() { "true" } else { "false" };
        let outcome = [
            ("CallStatus", call_status),
            ("DialCallStatus", "completed"),
            ("DialCallSid", &self.call_sid),
            ("DialCallDuration", "9"),
            ("DialBridged", bridged),
        ];
        self.dial.next(self.world, &outcome)
    }

    #[track_caller]
    fn ask(&self, url: &str, digits: Option<&str>) -> Result<Twiml, Trouble> {
        let path = url.strip_prefix(&self.world.public_url).unwrap_or(url);
        let mut form = incoming_call_form(&self.dial.from);
        for (name, value) in &mut form {
            match name.as_str() {
                "CallSid" => self.call_sid.clone_into(value),
                "To" | "Called" => *value = self.dial.twiml.dial.clone().unwrap_or_default(),
                "Direction" => "outbound-dial".clone_into(value),
                "CallStatus" => "in-progress".clone_into(value),
                _ => {}
            }
        }
        form.push(("ParentCallSid".to_owned(), self.dial.call_sid.clone()));
        form.extend(digits.map(|digits| ("Digits".to_owned(), digits.to_owned())));
        Ok(self.world.ask_for_twiml(path, &self.dial.from, &form)?.twiml)
    }
}
