//! The client's end: what a node proxy runs against the control plane.

mod demand;
mod driver;
mod machine;
mod status;

pub use demand::{Demand, DemandError};
pub use driver::{Connect, ConnectError, Connection, Driver, Handle, Options, endpoint, metadata};
pub use machine::{Answer, Machine, Received, SubscribeError, Subscribed};
pub use status::{Nack, Status, TypeStatus};

use crate::{Rejection, Update};

/// Where updates go.
pub trait Sink: Send {
    /// Takes one response's worth of changes, at once, and says which resources it refuses. Called in the order of the
    /// responses. A refused resource that was known before keeps its last good content.
    fn apply(&mut self, update: Update) -> Vec<Rejection>;
}

impl<F: FnMut(Update) -> Vec<Rejection> + Send> Sink for F {
    fn apply(&mut self, update: Update) -> Vec<Rejection> {
        self(update)
    }
}

/// What is asked for of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Everything.
    Wildcard,
    /// What is subscribed to by name, and what the server adds.
    OnDemand,
}
