//! The one task that asks the authority.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;
use tokio::task::{Id, JoinError, JoinSet};

use super::{AttemptError, Failure, Published, Shared, Slot};
use crate::clock::Clock;
use crate::credential::Credential;
use crate::issuer::Issuer;
use crate::key::PrivateKey;

/// Longest sleep: the wall clock may jump, and the timer does not see it.
const MAX_SLEEP: Duration = Duration::from_secs(60);

type Attempt = Result<Credential, AttemptError>;

/// What to do next.
struct Round {
    /// Identities to ask for, with their generation.
    start: Vec<(SpiffeId, u64)>,
    /// How long nothing more is due.
    sleep: Duration,
}

pub(super) async fn run(shared: Arc<Shared>, issuer: Arc<dyn Issuer>) {
    let mut attempts: JoinSet<Attempt> = JoinSet::new();
    let mut running: HashMap<Id, (SpiffeId, u64)> = HashMap::new();
    loop {
        let free = shared.options.max_concurrent.max(1).saturating_sub(running.len());
        let round = plan(&shared, free);
        for (id, generation) in round.start {
            let attempt = attempt(issuer.clone(), id.clone(), shared.clone());
            running.insert(attempts.spawn(attempt).id(), (id, generation));
        }
        tokio::select! {
            Some(done) = attempts.join_next_with_id() => {
                let (task, result) = unpack(done);
                if let Some((id, generation)) = running.remove(&task) {
                    settle(&shared, &id, generation, result);
                }
            }
            () = shared.changed.notified() => {}
            () = tokio::time::sleep(round.sleep) => {}
        }
    }
}

/// Drops what nobody holds, and picks up to `free` identities that are due: those without a certificate first.
fn plan(shared: &Shared, free: usize) -> Round {
    let now = shared.options.clock.now();
    let linger = shared.options.linger;
    let mut table = shared.table();
    table.slots.retain(|_, slot| slot.idle_since.is_none_or(|since| now < since + linger));

    let waiting = table.slots.iter().filter(|(_, slot)| !slot.in_flight);
    let mut due: Vec<(bool, SystemTime, SpiffeId)> = waiting
        .filter(|(_, slot)| slot.due <= now)
        .map(|(id, slot)| (slot.published.borrow().credential.is_some(), slot.due, id.clone()))
        .collect();
    due.sort_unstable();
    due.truncate(free);
    let mut start = Vec::with_capacity(due.len());
    for (_, _, id) in due {
        if let Some(slot) = table.slots.get_mut(&id) {
            slot.in_flight = true;
            start.push((id, slot.generation));
        }
    }

    let next = table.slots.values().filter_map(|slot| next_event(slot, now, linger)).min();
    let sleep = next.map_or(MAX_SLEEP, |at| at.duration_since(now).unwrap_or(Duration::ZERO).min(MAX_SLEEP));
    Round { start, sleep }
}

/// When `slot` needs attention: later than `now`, for what is due already waits for a free place, not for time.
fn next_event(slot: &Slot, now: SystemTime, linger: Duration) -> Option<SystemTime> {
    let issue = (!slot.in_flight).then_some(slot.due);
    let drop = slot.idle_since.map(|since| since + linger);
    [issue, drop].into_iter().flatten().filter(|at| *at > now).min()
}

/// One attempt: key, request, answer, check.
async fn attempt(issuer: Arc<dyn Issuer>, id: SpiffeId, shared: Arc<Shared>) -> Attempt {
    let key = PrivateKey::generate()?;
    let csr = key.csr_pem(&id)?;
    let limit = shared.options.issue_timeout;
    let issued =
        tokio::time::timeout(limit, issuer.issue(&id, csr)).await.map_err(|_| AttemptError::Timeout(limit))??;
    Ok(Credential::new(&id, key, issued, &shared.options.clock)?)
}

fn unpack(done: Result<(Id, Attempt), JoinError>) -> (Id, Attempt) {
    match done {
        Ok(done) => done,
        Err(error) => (error.id(), Err(AttemptError::Aborted)),
    }
}

/// Publishes what an attempt brought and says when the next is due.
fn settle(shared: &Shared, id: &SpiffeId, generation: u64, result: Attempt) {
    let options = &shared.options;
    let now = options.clock.now();
    let mut table = shared.table();
    let Some(slot) = table.slots.get_mut(id).filter(|slot| slot.generation == generation) else {
        tracing::debug!(%id, "certificate arrived for an identity that nobody holds any more");
        return;
    };
    slot.in_flight = false;
    match result {
        Ok(credential) => {
            let not_after = credential.not_after();
            slot.due = renewal(&options.clock, not_after).max(now + options.backoff_min);
            tracing::info!(%id, serial = credential.serial(), "certificate issued");
            let published = Published { credential: Some(Arc::new(credential)), failure: None };
            slot.published.send_replace(published);
        }
        Err(error) => {
            let Published { credential, failure } = slot.published.borrow().clone();
            let attempts = failure.map_or(0, |failure| failure.attempts).saturating_add(1);
            let end = credential.as_ref().map(|credential| credential.not_after()).filter(|end| *end > now);
            let has_valid = end.is_some();
            slot.due = match end {
                // From its end on the pauses are the shorter ones.
                Some(end) => end.min(now + backoff(attempts, options.backoff_min, options.backoff_max)),
                None => now + backoff(attempts, options.backoff_min, options.backoff_max_without),
            };
            tracing::warn!(%id, %error, attempts, has_valid, "no certificate issued");
            let failure = Failure { at: now, is_refusal: error.is_refusal(), error: error.to_string(), attempts };
            slot.published.send_replace(Published { credential, failure: Some(failure) });
        }
    }
}

/// Half of the life that is left, give or take a tenth of it.
fn renewal(clock: &Clock, not_after: SystemTime) -> SystemTime {
    let now = clock.now();
    let life = not_after.duration_since(now).unwrap_or(Duration::ZERO);
    now + life.mul_f64(0.4 + 0.2 * fastrand::f64())
}

/// Doubles from `min` to `max`, of which a random half to whole is waited.
fn backoff(attempts: u32, min: Duration, max: Duration) -> Duration {
    let full = min.saturating_mul(1_u32.checked_shl(attempts.saturating_sub(1)).unwrap_or(u32::MAX)).min(max);
    full.mul_f64(0.5 + 0.5 * fastrand::f64())
}
