//! The server's end: what the control plane runs for its node proxies and waypoints.

mod catalog;
mod machine;
mod service;
mod status;

pub use catalog::{Catalog, Entry, Snapshot};
pub use machine::{Limits, Machine, Violation};
pub use service::{Client, Options, Service, transport};
pub use status::{ClientStatus, Nack, TypeStatus};
