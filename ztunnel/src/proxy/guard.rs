//! Authorization holds for the life of a connection: when policies change, every live inbound connection is judged again
//! by the rules that let it in, and closed with its reason if it would not be let in now.

use std::sync::Arc;
use std::time::Duration;

use mesh_model::Snapshot;

use super::admit::{Connect, Connection, Denial, DenialReason, admit, admit_plaintext};
use super::live::CloseReason;
use super::pods::{Pod, Pods};
use super::record::{Direction, Facts};
use super::worker::Shared;

/// Shortest time between two judgements, so that a burst of changes costs one.
const PAUSE: Duration = Duration::from_millis(100);

/// Judges for ever.
pub async fn run(shared: Arc<Shared>, pods: Arc<Pods>) {
    let mut rules = shared.state.rules();
    while rules.changed().await.is_ok() {
        judge_all(&shared, &pods);
        tokio::time::sleep(PAUSE).await;
    }
}

/// Judges a connection that was let in under rules of the version `seen` and is listed now: what changed in between has
/// not found it in the list.
pub fn catch_up(shared: &Shared, pod: &Pod, connection: &super::live::Connection<Facts>, seen: u64) {
    if shared.state.rules_version() != seen
        && let Some(reason) = judge(shared, &shared.state.snapshot(), pod, &connection.facts)
    {
        connection.close(reason);
    }
}

/// Closes every live connection that policy does not allow any more.
fn judge_all(shared: &Shared, pods: &Pods) {
    let snapshot = shared.state.snapshot();
    for pod in pods.pods() {
        for connection in pod.live.connections() {
            if let Some(reason) = judge(shared, &snapshot, &pod, &connection.facts) {
                connection.close(reason);
            }
        }
    }
}

/// Why a connection must be closed. What else may have changed about it since, such as that discovery does not know its
/// pod any more, is no reason.
fn judge(shared: &Shared, snapshot: &Snapshot, pod: &Pod, facts: &Facts) -> Option<CloseReason> {
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
        Err(Denial { why: DenialReason::Policy(denied), .. }) => {
            Some(CloseReason::Denied(Some(Arc::clone(denied.policy()))))
        }
        Ok(_) | Err(_) => None,
    }
}
