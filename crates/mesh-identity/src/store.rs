//! Certificates kept fresh: one key per identity, fetched before first use, renewed at about half of life.
//!
//! One task owns all issuing. Everybody else counts holders under a lock and reads what the task published. An identity
//! that nobody holds is dropped, its key with it. While the authority is away the certificate at hand stays in use until
//! it expires; attempts back off exponentially, with jitter, for each identity on its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::clock::Clock;
use crate::credential::{Credential, CredentialError};
use crate::issuer::{IssueError, Issuer};
use crate::key::KeyError;

mod status;
mod task;

pub use status::{IdentityStatus, LastError, State};

/// So many refusals in a row end a caller's wait. The first ones (about half a second of them) may only mean that the
/// authority has not yet heard of the pod that this node has just started.
const REFUSALS_BELIEVED: u32 = 4;

/// How a store behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// Longest that a caller waits for a first certificate.
    pub first_wait: Duration,
    /// Most requests to the authority at one time.
    pub max_concurrent: usize,
    /// Longest that one request may take.
    pub issue_timeout: Duration,
    /// First pause after a failure; doubles with each one.
    pub backoff_min: Duration,
    /// Longest pause while there is a valid certificate.
    pub backoff_max: Duration,
    /// Longest pause while there is none: connections are waiting.
    pub backoff_max_without: Duration,
    /// How long an identity that nobody holds any more is kept, so that look-ups in a row need one request only.
    pub linger: Duration,
    /// By what the certificates' times are read.
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            first_wait: Duration::from_secs(5),
            max_concurrent: 8,
            issue_timeout: Duration::from_secs(15),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(60),
            backoff_max_without: Duration::from_secs(5),
            linger: Duration::from_secs(10),
            clock: Clock::system(),
        }
    }
}

/// Why there is no certificate to use.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CertificateError {
    /// None came within [`Options::first_wait`].
    #[error("no certificate for {id} within {waited:?}{}", because(last_error.as_deref()))]
    Unavailable {
        /// Whose.
        id: SpiffeId,
        /// How long the caller waited.
        waited: Duration,
        /// What the last attempt failed with, if one did.
        last_error: Option<String>,
    },
    /// The authority refuses to issue one, and has said so several times.
    #[error("no certificate for {id}: {reason}")]
    Refused {
        /// Whose.
        id: SpiffeId,
        /// What the authority said.
        reason: String,
    },
    /// The one at hand has expired and no other came within [`Options::first_wait`].
    #[error("the certificate of {id} has expired{}", because(last_error.as_deref()))]
    Expired {
        /// Whose.
        id: SpiffeId,
        /// What the last attempt failed with, if one did.
        last_error: Option<String>,
    },
    /// The store is gone: the process is ending.
    #[error("no certificate for {id}: the store is closed")]
    Closed {
        /// Whose.
        id: SpiffeId,
    },
}

fn because(last_error: Option<&str>) -> String {
    last_error.map_or_else(String::new, |error| format!(": {error}"))
}

/// Why one attempt brought no certificate.
#[derive(Debug, Error)]
enum AttemptError {
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error(transparent)]
    Credential(#[from] CredentialError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("the attempt was aborted")]
    Aborted,
}

impl AttemptError {
    fn is_refusal(&self) -> bool {
        match self {
            Self::Issue(error) => error.is_refusal(),
            Self::Credential(_) | Self::Key(_) | Self::Timeout(_) | Self::Aborted => false,
        }
    }
}

/// What the task publishes for one identity.
#[derive(Debug, Clone, Default)]
struct Published {
    credential: Option<Arc<Credential>>,
    failure: Option<Failure>,
}

/// The last attempt, if it failed.
#[derive(Debug, Clone)]
struct Failure {
    at: SystemTime,
    error: String,
    is_refusal: bool,
    /// Failures in a row.
    attempts: u32,
}

/// One identity in the table.
#[derive(Debug)]
struct Slot {
    published: watch::Sender<Published>,
    holders: usize,
    /// Since when nobody holds it.
    idle_since: Option<SystemTime>,
    /// When to ask the authority next.
    due: SystemTime,
    in_flight: bool,
    /// Tells this slot from an earlier one of the same identity whose answer is still under way.
    generation: u64,
}

#[derive(Debug)]
struct Shared {
    options: Options,
    table: Mutex<Table>,
    /// Something in the table may be due.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    slots: HashMap<SpiffeId, Slot>,
    generation: u64,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more holder and says where its certificate is published.
    fn hold(&self, id: &SpiffeId) -> watch::Receiver<Published> {
        let now = self.options.clock.now();
        let mut table = self.table();
        if let Some(slot) = table.slots.get_mut(id) {
            slot.holders += 1;
            slot.idle_since = None;
            return slot.published.subscribe();
        }
        table.generation += 1;
        let (published, receiver) = watch::channel(Published::default());
        let generation = table.generation;
        let slot = Slot { published, holders: 1, idle_since: None, due: now, in_flight: false, generation };
        table.slots.insert(id.clone(), slot);
        drop(table);
        self.changed.notify_one();
        receiver
    }

    fn release(&self, id: &SpiffeId) {
        let now = self.options.clock.now();
        let mut table = self.table();
        if let Some(slot) = table.slots.get_mut(id) {
            slot.holders = slot.holders.saturating_sub(1);
            if slot.holders == 0 {
                slot.idle_since = Some(now);
                drop(table);
                self.changed.notify_one();
            }
        }
    }
}

/// Gives out certificates. Clones are the same store; it ends when the last clone and the last [`Retained`] are dropped.
#[derive(Debug, Clone)]
pub struct Store(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Store {
    /// Starts the task that asks `issuer`. Must be called within a tokio runtime.
    pub fn new(issuer: Arc<dyn Issuer>, options: Options) -> Self {
        let shared = Arc::new(Shared { options, table: Mutex::default(), changed: Notify::new() });
        let task = tokio::spawn(task::run(shared.clone(), issuer)).abort_handle();
        Self(Arc::new(Handle { shared, task }))
    }

    /// The certificate of `id`. Waits up to [`Options::first_wait`] if there is none yet. Without a [`Retained`] it is
    /// dropped a while after use.
    ///
    /// # Errors
    /// When none came in time, the authority refuses, or the one at hand has expired.
    pub async fn certificate(&self, id: &SpiffeId) -> Result<Arc<Credential>, CertificateError> {
        if let Some(credential) = self.current(id) {
            return Ok(credential);
        }
        self.retain(id).certificate().await
    }

    /// The certificate of `id` if there is one that is valid now.
    pub fn current(&self, id: &SpiffeId) -> Option<Arc<Credential>> {
        let table = self.0.shared.table();
        let credential = table.slots.get(id)?.published.borrow().credential.clone()?;
        drop(table);
        (credential.not_after() > self.0.shared.options.clock.now()).then_some(credential)
    }

    /// Fetches the certificate of `id` now and keeps it fresh until the guard is dropped.
    pub fn retain(&self, id: &SpiffeId) -> Retained {
        Retained { id: id.clone(), published: self.0.shared.hold(id), handle: self.0.clone() }
    }

    /// Renews the certificates that are `outdated`, each at a moment of its own in this time. What is at hand stays in use until
    /// then. How many there are.
    pub fn renew(&self, within: Duration, outdated: impl Fn(&Credential) -> bool) -> usize {
        let now = self.0.shared.options.clock.now();
        let mut count = 0;
        for slot in self.0.shared.table().slots.values_mut() {
            if slot.published.borrow().credential.as_deref().is_some_and(&outdated) {
                slot.due = slot.due.min(now + within.mul_f64(fastrand::f64()));
                count += 1;
            }
        }
        self.0.shared.changed.notify_one();
        count
    }

    /// Every identity at hand, for a config dump, in the order of their names. No keys.
    pub fn status(&self) -> Vec<IdentityStatus> {
        let now = self.0.shared.options.clock.now();
        let table = self.0.shared.table();
        let mut list: Vec<_> = table.slots.iter().map(|(id, slot)| IdentityStatus::of(id, slot, now)).collect();
        drop(table);
        list.sort_by(|a, b| a.id.cmp(&b.id));
        list
    }
}

/// Keeps one identity's certificate fresh as long as it lives.
#[derive(Debug)]
pub struct Retained {
    id: SpiffeId,
    published: watch::Receiver<Published>,
    handle: Arc<Handle>,
}

impl Retained {
    /// Whose.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The certificate if there is one that is valid now.
    pub fn current(&self) -> Option<Arc<Credential>> {
        let credential = self.published.borrow().credential.clone()?;
        (credential.not_after() > self.handle.shared.options.clock.now()).then_some(credential)
    }

    /// The certificate. Waits up to [`Options::first_wait`] if there is none.
    ///
    /// # Errors
    /// As [`Store::certificate`].
    pub async fn certificate(&self) -> Result<Arc<Credential>, CertificateError> {
        let mut published = self.published.clone();
        let options = &self.handle.shared.options;
        let valid = |credential: &Arc<Credential>| credential.not_after() > options.clock.now();
        let decided = published.wait_for(|state| match (&state.credential, &state.failure) {
            (Some(credential), _) if valid(credential) => true,
            (_, Some(failure)) => failure.is_refusal && failure.attempts >= REFUSALS_BELIEVED,
            (_, None) => false,
        });
        let outcome = tokio::time::timeout(options.first_wait, decided).await;
        let Published { credential, failure } = match outcome {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) => return Err(CertificateError::Closed { id: self.id.clone() }),
            Err(_) => self.published.borrow().clone(),
        };
        match (credential, failure) {
            (Some(credential), _) if valid(&credential) => Ok(credential),
            (_, Some(Failure { error, is_refusal: true, .. })) => {
                Err(CertificateError::Refused { id: self.id.clone(), reason: error })
            }
            (Some(_), failure) => {
                Err(CertificateError::Expired { id: self.id.clone(), last_error: failure.map(|f| f.error) })
            }
            (None, failure) => Err(CertificateError::Unavailable {
                id: self.id.clone(),
                waited: options.first_wait,
                last_error: failure.map(|f| f.error),
            }),
        }
    }
}

impl Clone for Retained {
    fn clone(&self) -> Self {
        Self { id: self.id.clone(), published: self.handle.shared.hold(&self.id), handle: self.handle.clone() }
    }
}

impl Drop for Retained {
    fn drop(&mut self) {
        self.handle.shared.release(&self.id);
    }
}

#[cfg(test)]
mod tests;
