//! Authorization holds for the life of a connection: when policies change, every live inbound connection is judged again
//! by the rules that let it in, and closed with its reason if it would not be let in now.
//!
//! A policy that its pod names and that is not there denies new connections at once, but live ones only when it stays away:
//! a policy and the pods that name it are different resources, and come and go one after the other.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::{Denied, DenyReason, Snapshot};
use tokio::time::Instant;

use super::admit::{Connect, Connection, Denial, DenialReason, admit, admit_plaintext};
use super::live::CloseReason;
use super::pods::{Pod, Pods};
use super::record::{Direction, Facts};
use super::worker::Shared;

/// Shortest time between two judgements, so that a burst of changes costs one.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a policy may be away before that closes live connections.
const GRACE: Duration = Duration::from_secs(5);

/// Policies that are away, each with the uid of a pod that names it and has live connections, and since when.
type Absences = HashMap<(Arc<str>, Arc<str>), Instant>;

/// Judges for ever.
pub async fn run(shared: Arc<Shared>, pods: Arc<Pods>) {
    let mut rules = shared.state.rules();
    let mut absences = Absences::new();
    loop {
        let first = absences.values().min().copied();
        let over = async {
            match first {
                Some(since) => tokio::time::sleep_until(since + GRACE).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = rules.changed() => if changed.is_err() { return },
            () = over => {}
        }
        absences = judge_all(&shared, &pods, &absences);
        tokio::time::sleep(PAUSE).await;
    }
}

/// Judges a connection that was let in under rules of the version `seen` and is listed now: what changed in between has
/// not found it in the list.
pub fn catch_up(shared: &Shared, pod: &Pod, connection: &super::live::Connection<Facts>, seen: u64) {
    if shared.state.rules_version() != seen
        && let Some(denied) = judge(shared, &shared.state.snapshot(), pod, &connection.facts)
    {
        connection.close(close_reason(&denied));
    }
}

/// Closes every live connection that policy does not allow any more. Returns what is away and was away for less than
/// [`GRACE`], of which `before` holds what was away the last time.
fn judge_all(shared: &Shared, pods: &Pods, before: &Absences) -> Absences {
    let snapshot = shared.state.snapshot();
    let now = Instant::now();
    let mut absences = Absences::new();
    for pod in pods.pods() {
        for connection in pod.live.connections() {
            let Some(denied) = judge(shared, &snapshot, &pod, &connection.facts) else { continue };
            if let DenyReason::NotReceived { policy } = &denied.reason {
                let key = (Arc::clone(&pod.uid), Arc::clone(policy));
                let since = before.get(&key).copied().unwrap_or(now);
                if now.duration_since(since) < GRACE {
                    absences.insert(key, since);
                    continue;
                }
            }
            connection.close(close_reason(&denied));
        }
    }
    absences
}

fn close_reason(denied: &Denied) -> CloseReason {
    CloseReason::Denied(Some(Arc::clone(denied.policy())))
}

/// Why a connection would not be let in any more. What else may have changed about it since, such as that discovery does not know its
/// pod any more, is no reason.
fn judge(shared: &Shared, snapshot: &Snapshot, pod: &Pod, facts: &Facts) -> Option<Denied> {
    if facts.direction == Direction::Outbound {
        return None;
    }
    let local = shared.local(pod);
    let connection = Connection { local: facts.dst.addr, peer: facts.src.addr };
    let admission = match (&facts.src.identity, &facts.hbone_addr) {
        (Some(peer), Some(authority)) => admit(snapshot, &local, peer, connection, &Connect { authority }),
        (None, _) | (_, None) => admit_plaintext(snapshot, &local, connection),
    };
    match admission {
        Err(Denial { why: DenialReason::Policy(denied), .. }) => Some(denied),
        Ok(_) | Err(_) => None,
    }
}
