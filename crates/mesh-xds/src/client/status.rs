//! What the client shows of itself: for the config dump, the metrics and readiness.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

/// Rejections kept for display, per type.
const MAX_REJECTED: usize = 1000;

/// The client's state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Since when there is a stream; absent while there is none.
    pub connected_since: Option<SystemTime>,
    /// Since when there is none; absent while there is one.
    pub disconnected_since: Option<SystemTime>,
    /// Streams opened so far.
    pub connections: u64,
    /// Why the last stream ended or could not be opened.
    pub last_error: Option<String>,
    /// Streams that ended, and attempts that failed, by reason: `ConnectionError`, `Error`, `Complete`, `Reconnect`.
    pub terminations: BTreeMap<&'static str, u64>,
    /// Whether every type has had its first complete answer. Stays true while disconnected.
    pub synced: bool,
    /// The types.
    pub types: BTreeMap<Arc<str>, TypeStatus>,
}

/// The state of one type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TypeStatus {
    /// Whether it has had its first complete answer.
    pub answered: bool,
    /// Resources known.
    pub resources: usize,
    /// Names subscribed to.
    pub names: usize,
    /// Responses received.
    pub responses: u64,
    /// Bytes of the responses received.
    pub bytes: u64,
    /// Resources refused, ever.
    pub nacks: u64,
    /// Resources whose last content was refused, by name.
    pub rejected: BTreeMap<String, Nack>,
}

impl TypeStatus {
    pub(super) fn nack(&mut self, name: &str, nack: Nack) {
        self.nacks += 1;
        if self.rejected.len() < MAX_REJECTED || self.rejected.contains_key(name) {
            self.rejected.insert(name.to_owned(), nack);
        }
    }
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nack {
    /// Why.
    pub reason: String,
    /// When.
    pub at: SystemTime,
}
