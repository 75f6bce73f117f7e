// The rooms that `feed` needs, mounted where they stand in the bridge itself, so that `crate::…`
// means the same here as there. What is drawn above the dashed line in src/main.rs is not here.

#[path = "../../../src/demo/mod.rs"]
mod demo;
#[path = "../../../src/diagram.rs"]
mod diagram;
#[path = "../../../src/door/mod.rs"]
mod door;
#[path = "../feed.rs"]
mod feed;
#[path = "../../../src/parties/mod.rs"]
mod parties;
#[path = "../../../src/records/mod.rs"]
mod records;
#[path = "../../../src/setup/mod.rs"]
mod setup;
#[path = "../../../src/testing.rs"]
mod testing;
#[path = "../../../src/toolbox/mod.rs"]
mod toolbox;
#[path = "../../../src/usage.rs"]
mod usage;
#[path = "../../../src/workflow.rs"]
mod workflow;
