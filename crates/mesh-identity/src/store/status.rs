//! What a store shows of itself in a config dump.

use std::sync::Arc;
use std::time::SystemTime;

use mesh_model::SpiffeId;

use super::{Failure, Published, Slot};
use crate::credential::Credential;

/// What state a certificate is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// None yet.
    Pending,
    /// One that is valid.
    Valid,
    /// One whose time is over.
    Expired,
}

/// One identity of a [`Store`], without its key.
#[derive(Debug, Clone)]
pub struct IdentityStatus {
    /// Whose.
    pub id: SpiffeId,
    /// In what state.
    pub state: State,
    /// How many hold it.
    pub holders: usize,
    /// The certificate at hand.
    pub credential: Option<Arc<Credential>>,
    /// When the authority is asked next.
    pub next_attempt: SystemTime,
    /// Whether it is being asked now.
    pub in_flight: bool,
    /// The last failure, if no success followed it.
    pub last_error: Option<LastError>,
}

/// A failure to get a certificate.
#[derive(Debug, Clone)]
pub struct LastError {
    /// When.
    pub at: SystemTime,
    /// Why.
    pub error: String,
    /// Failures in a row.
    pub attempts: u32,
}

impl IdentityStatus {
    pub(super) fn of(id: &SpiffeId, slot: &Slot, now: SystemTime) -> Self {
        let Published { credential, failure } = slot.published.borrow().clone();
        let state = match &credential {
            None => State::Pending,
            Some(credential) if credential.not_after() > now => State::Valid,
            Some(_) => State::Expired,
        };
        let last_error = failure.map(|Failure { at, error, attempts, .. }| LastError { at, error, attempts });
        Self {
            id: id.clone(),
            state,
            holders: slot.holders,
            credential,
            next_attempt: slot.due,
            in_flight: slot.in_flight,
            last_error,
        }
    }
}
