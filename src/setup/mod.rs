//! What the owner has set, and who answers the phone.

pub(crate) mod agent;
pub(crate) mod agent_files;
pub(crate) mod settings;
pub(crate) mod start_lines;
pub(crate) mod values;
