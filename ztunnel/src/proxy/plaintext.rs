//! What comes to a pod in plain from outside the mesh: decided by [`admit_plaintext`](super::admit::admit_plaintext), then
//! delivered with the client's address, as if no proxy were there.

use std::sync::Arc;

use mesh_hbone::copy::relay;

use super::admit::{Admission, Connection, admit_plaintext};
use super::dial::{self, Unanswered};
use super::error::ConnectionError;
use super::guard;
use super::inbound::note;
use super::pods::Pod;
use super::record::{Direction, Facts, Record};
use super::worker::{Accepted, Worker};

/// Carries one connection, from its acceptance to its record.
pub async fn serve(worker: &Arc<Worker>, pod: &Arc<Pod>, accepted: Accepted) {
    let Accepted { stream, peer, local } = accepted;
    // The accepted socket's own address is what the client connected to.
    let client = Unanswered::new(stream);
    let _taken = pod.delivery_ports.note(peer);
    let shared = &worker.shared;
    let mut facts = Facts::new(Direction::Inbound, peer, local);
    facts.counters = pod.counters();
    // Without an answer the pod stays unknown, and nothing is let in.
    let _ = shared.lookup.inbound(&shared.state, &shared.local(pod), &pod.lookups).await;
    let rules = shared.state.rules_version();
    let admission = match decide(worker, pod, &mut facts, Connection { local, peer }) {
        Ok(admission) => admission,
        Err(error) => return Record::refused(&shared.metrics, &facts, &error),
    };
    let Ok(record) = Record::open(&shared.metrics, &pod.live, facts) else { return };
    guard::catch_up(shared, pod, &record, rules);
    let result = tokio::select! {
        biased;
        reason = record.told_to_close() => Err(reason.into()),
        result = carry(pod, &admission, client, &record) => result,
    };
    record.finish(result);
}

fn decide(worker: &Worker, pod: &Pod, facts: &mut Facts, connection: Connection) -> Result<Admission, ConnectionError> {
    let snapshot = worker.shared.state.snapshot();
    note(facts, &snapshot, None, admit_plaintext(&snapshot, &worker.shared.local(pod), connection))
}

async fn carry(pod: &Pod, admission: &Admission, client: Unanswered, record: &Record) -> Result<(), ConnectionError> {
    // Boxed: what is needed only until the application has accepted must not be kept by the open connection.
    let app = Box::pin(dial::deliver(pod, admission.source_ip, admission.target.0)).await?;
    Ok(relay(client.answered()?, app, &record.facts.counters).await?)
}
