//! Why the program ends without having done what it was asked for.
//!
//! Every command gives back a [`Stop`] in that case, and `usage` makes an exit status of it: it is
//! the only one that prints it. What was set or written wrongly is named all at once:
//!
//! ```text
//! callbridge: 2 settings need attention
//!   ULTRAVOX_API_KEY  is missing (get one at app.ultravox.ai, Settings, API keys)
//!   PUBLIC_URL  is "http://pbx.example": must be https, or Twilio cannot open the audio socket
//! ```

use std::io;
use std::path::Path;

use crate::setup::settings::Config;

pub(crate) enum Stop {
    /// Exit status 2: a wrong command line, settings or agent file. Fix it and start again.
    Misused(String),
    /// Exit status 1: something outside did not work.
    Failed(String),
}

pub(crate) fn needs_attention(what: &str, complaints: &[String]) -> Stop {
    let (count, plural) =
        (complaints.len(), if complaints.len() == 1 { " needs" } else { "s need" });
    let mut text = format!("callbridge: {count} {what}{plural} attention");
    for complaint in complaints {
        text.push_str("\n  ");
        text.push_str(complaint);
    }
    Stop::Misused(text)
}

/// The commonest reason that a start fails: the port is in use already.
pub(crate) fn cannot_listen(config: &Config, error: &io::Error) -> Stop {
    let (bind, port) = (config.bind, config.port);
    let cure = match error.kind() {
        io::ErrorKind::AddrInUse => {
            " (another program has the port, perhaps an older callbridge: end it, or set PORT)"
        }
        io::ErrorKind::PermissionDenied => {
            " (ports below 1024 are reserved for root: set PORT=8000)"
        }
        _ => "",
    };
    Stop::Failed(format!("callbridge: cannot listen on {bind}:{port}: {error}{cure}"))
}

/// `DATA_DIR`, for the commands that read what a server has left there.
pub(crate) fn existing(data_dir: &Path) -> Result<&Path, Stop> {
    if data_dir.is_dir() {
        return Ok(data_dir);
    }
    let directory = std::path::absolute(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    let what = "callbridge: there is no directory";
    let advice = "it is made with the first call; set DATA_DIR as the server has it, or go \
                  where the server runs";
    Err(Stop::Failed(format!("{what} {} ({advice})", directory.display())))
}

#[cfg(test)]
mod tests;
