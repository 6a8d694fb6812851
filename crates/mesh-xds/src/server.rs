//! The server's end: what the control plane runs for its node proxies and waypoints.

mod body;
mod catalog;
mod encode;
mod intake;
mod machine;
mod response;
mod service;
mod status;
mod stream;

pub use catalog::{Catalog, Entry, Snapshot};
pub use machine::{Limits, Machine, Violation};
pub use response::Response;
pub use service::{Client, Options, Sent, Service, transport};
pub use status::{ClientStatus, Nack, TypeStatus};
