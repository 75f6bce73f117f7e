//! What is written is right, and nothing is written over.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use tempfile::tempdir;

use crate::init::{write_agent, write_env};
use crate::setup::agent::Agent;
use crate::testing::settings;

#[test]
fn the_agent_that_is_written_has_no_mistake_and_is_short() {
    let scratch = tempdir().unwrap();
    assert!(write_agent(scratch.path()).unwrap());
    let directory = scratch.path().join("my-agent");
    let path = directory.to_str().unwrap();
    let config = settings(&[("AGENT_DIR", path)]).ok().unwrap();
    let agent = Agent::load(&config);
    assert_eq!(agent.as_ref().err(), None);
    assert_eq!(agent.ok().unwrap().stages.len(), 1);
    let lines = fs::read_to_string(directory.join("agent.json")).unwrap().lines().count();
    assert!(lines < 25, "{lines} lines");
    fs::write(directory.join("shop.md"), "Mine.").unwrap();
    assert!(!write_agent(scratch.path()).unwrap());
    assert_eq!(fs::read_to_string(directory.join("shop.md")).unwrap(), "Mine.");
}

#[test]
fn the_settings_that_are_written_are_the_example_with_three_filled_in() {
    let scratch = tempdir().unwrap();
    let path = scratch.path().join(".env");
    assert!(write_env(scratch.path(), "key-1").unwrap());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let text = fs::read_to_string(&path).unwrap();
    let set: Vec<&str> =
        text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    assert_eq!(set.len(), 3, "{set:?}");
    assert_eq!(set[0], "ULTRAVOX_API_KEY=key-1");
    let token = set[1].strip_prefix("API_TOKEN=").unwrap();
    assert_eq!(token.len(), 32, "{token}");
    assert_eq!(set[2], "AGENT_DIR=my-agent");
    assert!(!text.contains("Copy this file"), "{text}");

    assert!(!write_env(scratch.path(), "key-2").unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), text, "it is left as it is");
    let other = tempdir().unwrap();
    assert!(write_env(other.path(), "").unwrap());
    assert!(!fs::read_to_string(other.path().join(".env")).unwrap().contains(token));
}
