//! What a pod's applications open: decided by [`plan`](super::plan), then carried through a pooled tunnel or in plain.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_hbone::Connect;
use mesh_hbone::copy::{relay, splice};
use mesh_model::Workload;

use super::connect;
use super::dial::Unanswered;
use super::error::ConnectionError;
use super::plan::{OriginalDst, Plan, Planned, plan, plan_other};
use super::pods::Pod;
use super::record::{Direction, Facts, Reached, Record, Side};
use super::worker::{Accepted, Shared, TunnelKey, Worker};

mod reach;
mod refusals;
mod tunnel;

pub use reach::TunnelPool;
use reach::Upstream;
pub use refusals::Refusals;

/// Longest that a connection waits for discovery to tell of the pod that it goes to.
const DISCOVERY_WAIT: Duration = Duration::from_secs(1);

/// Carries one connection, from its acceptance to its record.
pub fn serve(worker: &Arc<Worker>, pod: &Arc<Pod>, accepted: Accepted) -> impl Future<Output = ()> {
    // The accepted socket's own address is what the application connected to.
    let Accepted { stream, peer: client, local: original } = accepted;
    // Until it is carried, whatever happens the application must see a reset, never an orderly end. Taken apart here, so that the
    // future does not keep the whole beside its parts.
    attend(worker, pod, Asked { client, original }, Unanswered::new(stream))
}

async fn attend(worker: &Arc<Worker>, pod: &Arc<Pod>, asked: Asked, app: Unanswered) {
    let Asked { client, original } = asked;
    let metrics = &worker.shared.metrics;
    let mut facts = Facts::new(Direction::Outbound, client, original);
    facts.src.workload = worker.shared.local(pod).workload(&worker.shared.state.snapshot()).cloned();
    facts.src.identity = Some(pod.identity.clone());
    facts.counters = pod.counters();
    let way = match decide_soon(worker, pod, asked).await {
        Ok(way) => way,
        Err((to, error)) => {
            facts.set_destination(*to);
            return Record::refused(metrics, &facts, &error);
        }
    };
    facts.set_destination(way.to.clone());
    let Ok(record) = Record::begin(metrics, &pod.live, facts) else { return };
    let result = tokio::select! {
        biased;
        reason = record.told_to_close() => Err(reason.into()),
        result = carry(worker, pod, &asked, way, app, &record) => result,
    };
    record.finish(result);
}

/// What an application asked for.
#[derive(Clone, Copy)]
struct Asked {
    client: SocketAddr,
    original: SocketAddr,
}

/// Decides, and waits a little where discovery is behind the agent: a pod that has just started is told of soon.
async fn decide_soon(worker: &Worker, pod: &Pod, asked: Asked) -> Result<Way, (Box<Reached>, ConnectionError)> {
    let Shared { lookup, state, .. } = &*worker.shared;
    let looked_up = lookup.outbound(state, &worker.shared.local(pod), asked.original.ip(), &pod.lookups).await;
    looked_up.map_err(|error| (Box::new(reached(asked.original, Planned::default())), error.into()))?;
    // What discovery brings of this node's pods counts as a change of rules.
    let mut changes = state.rules();
    let deadline = tokio::time::Instant::now() + DISCOVERY_WAIT;
    loop {
        let decided = decide(worker, pod, asked);
        let is_early = matches!(&decided, Err((_, ConnectionError::Refused(refusal))) if refusal.is_early());
        if !is_early || !matches!(tokio::time::timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
            return decided;
        }
    }
}

/// What was decided: where the connection goes, and how it is carried.
struct Way {
    to: Reached,
    hop: Hop,
}

enum Hop {
    Tunnel { key: TunnelKey, connect: Connect },
    Plain(SocketAddr),
}

impl Hop {
    fn address(&self) -> SocketAddr {
        match self {
            Self::Tunnel { key, .. } => key.next_hop,
            Self::Plain(to) => *to,
        }
    }
}

fn decide(worker: &Worker, pod: &Pod, asked: Asked) -> Result<Way, (Box<Reached>, ConnectionError)> {
    let shared = &worker.shared;
    let snapshot = shared.state.snapshot();
    let local = shared.local(pod);
    let is_local = |ip| shared.addresses.contains(ip);
    match plan(&snapshot, &local, OriginalDst(asked.original), &is_local, &mut fastrand::Rng::new()) {
        Ok(plan) => Ok(way(plan, pod, asked, local.workload(&snapshot).map(AsRef::as_ref))),
        Err(refusal) => {
            let to = reached(asked.original, refusal.destination.clone());
            Err((Box::new(to), refusal.into()))
        }
    }
}

/// Another way to the same service, to none of these workloads.
fn alternative(worker: &Worker, pod: &Pod, asked: Asked, tried: &[Arc<str>]) -> Option<Way> {
    let shared = &worker.shared;
    let snapshot = shared.state.snapshot();
    let local = shared.local(pod);
    let is_local = |ip| shared.addresses.contains(ip);
    let dst = OriginalDst(asked.original);
    let plan = plan_other(&snapshot, &local, dst, &is_local, &mut fastrand::Rng::new(), tried)?;
    Some(way(plan, pod, asked, local.workload(&snapshot).map(AsRef::as_ref)))
}

fn way(plan: Plan, pod: &Pod, asked: Asked, source: Option<&Workload>) -> Way {
    match plan {
        Plan::Tunnel { next_hop, authority, expected, destination, kind: _ } => {
            let authority = authority.authority();
            let mut to = reached(next_hop.0, destination);
            to.hbone_addr = Some(authority.clone());
            to.mtls = true;
            let host = to.service.as_ref().map(|service| service.hostname.as_ref());
            let connect = connect::request(authority, source, asked.client, host);
            let family = pod.addresses.iter().find(|ip| ip.is_ipv4() == next_hop.0.is_ipv4());
            let source_ip = family.copied().unwrap_or_else(|| pod.ip());
            let key = TunnelKey { source: pod.identity.clone(), source_ip, next_hop: next_hop.0, expected };
            Way { to, hop: Hop::Tunnel { key, connect } }
        }
        Plan::Plain { next_hop, destination } | Plan::PassThrough { next_hop, destination } => {
            Way { to: reached(next_hop.0, destination), hop: Hop::Plain(next_hop.0) }
        }
    }
}

/// In plain, to nobody who has proven who he is.
fn reached(addr: SocketAddr, destination: Planned) -> Reached {
    let dst = Side { addr, workload: destination.workload, identity: None };
    Reached { dst, hbone_addr: None, service: destination.service, mtls: false }
}

async fn carry(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    asked: &Asked,
    way: Way,
    app: Unanswered,
    record: &Record,
) -> Result<(), ConnectionError> {
    let counters = &record.facts.counters;
    // Boxed: what is needed only until there is a stream must not be kept by the open connection.
    match Box::pin(reach::reach(worker, pod, *asked, way, record)).await? {
        Upstream::Tunnel(stream) => Ok(splice(stream, app.answered()?, counters).await?),
        Upstream::Plain(upstream) => Ok(relay(upstream, app.answered()?, counters).await?),
    }
}
