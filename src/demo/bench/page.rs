//! A table of words and figures, as text.
//!
//! The columns are as wide as their widest cell. It knows nothing of what the figures mean.

use std::fmt::Write as _;

use crate::demo::backstage::moot;

/// A table of words and figures.
#[derive(Default)]
pub(super) struct Page {
    pub(super) text: String,
}

impl Page {
    pub(super) fn head(&mut self, title: &str, columns: [&str; 3]) {
        self.line("");
        self.row(title, columns.map(str::to_owned));
    }

    pub(super) fn row(&mut self, name: &str, cells: impl IntoIterator<Item = String>) {
        let mut line = format!("  {name:<30}");
        for cell in cells {
            // A String takes all that is written to it.
            moot(write!(line, "{cell:>14}"));
        }
        self.line(line.trim_end());
    }

    pub(super) fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }
}

pub(super) fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

pub(super) fn mib(kib: u64) -> String {
    format!("{:.1}", kib as f64 / 1_024.0)
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}
