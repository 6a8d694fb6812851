//! What a pod's applications open: decided by [`plan`](super::plan), then carried through a pooled tunnel or in plain.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_hbone::copy::{relay, splice};
use mesh_hbone::pool::PoolError;
use mesh_hbone::{Connect, Stream, Tunnel};
use mesh_identity::{HandshakeError, handshake};

use super::connect;
use super::dial::{self, Unanswered};
use super::error::ConnectionError;
use super::plan::{OriginalDst, Plan, Planned, plan};
use super::pods::Pod;
use super::record::{Direction, Facts, Record};
use super::tunnels::Negotiated;
use super::worker::{Accepted, TunnelKey, Worker};

/// Longest that the far side may take to connect to its application and answer.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);

/// Longest that a connection waits for discovery to tell of the pod that it goes to.
const DISCOVERY_WAIT: Duration = Duration::from_secs(1);

/// Tunnels tried when they are lost before the far side has looked at the connection.
const TUNNELS: usize = 3;

/// Carries one connection, from its acceptance to its record.
pub async fn serve(worker: &Arc<Worker>, pod: &Arc<Pod>, accepted: Accepted) {
    // The accepted socket's own address is what the application connected to.
    let Accepted { stream, peer: client, local: original } = accepted;
    // Until it is carried, whatever happens the application must see a reset, never an orderly end.
    let app = Unanswered::new(stream);
    let metrics = &worker.shared.metrics;
    let way = match decide_soon(worker, pod, client, original).await {
        Ok(way) => way,
        Err((facts, error)) => return Record::refused(metrics, *facts, &error),
    };
    let Way { facts, hop } = way;
    let Ok(record) = Record::open(metrics, &pod.live, facts) else { return };
    let result = tokio::select! {
        biased;
        reason = record.told_to_close() => Err(reason.into()),
        result = carry(worker, pod, hop, app, &record) => result,
    };
    record.finish(result);
}

/// Decides, and waits a little where discovery is behind the agent: a pod that has just started is told of soon.
async fn decide_soon(
    worker: &Worker,
    pod: &Pod,
    client: SocketAddr,
    original: SocketAddr,
) -> Result<Way, (Box<Facts>, ConnectionError)> {
    // What discovery brings of this node's pods counts as a change of rules.
    let mut changes = worker.shared.state.rules();
    let deadline = tokio::time::Instant::now() + DISCOVERY_WAIT;
    loop {
        let decided = decide(worker, pod, client, original);
        let is_early = matches!(&decided, Err((_, ConnectionError::Refused(refusal))) if refusal.is_early());
        if !is_early || !matches!(tokio::time::timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
            return decided;
        }
    }
}

/// What was decided: what is known of the connection, and how it is carried.
struct Way {
    facts: Facts,
    hop: Hop,
}

enum Hop {
    Tunnel { key: TunnelKey, connect: Connect },
    Plain(SocketAddr),
}

fn decide(
    worker: &Worker,
    pod: &Pod,
    client: SocketAddr,
    original: SocketAddr,
) -> Result<Way, (Box<Facts>, ConnectionError)> {
    let shared = &worker.shared;
    let snapshot = shared.state.snapshot();
    let local = shared.local(pod);
    let mut facts = Facts::new(Direction::Outbound, client, original);
    let source = local.workload(&snapshot);
    facts.src.workload = source.cloned();
    facts.src.identity = Some(pod.identity.clone());
    let is_local = |ip| shared.addresses.contains(ip);
    let planned = plan(&snapshot, &local, OriginalDst(original), &is_local, &mut fastrand::Rng::new());
    let describe = |facts: &mut Facts, destination: Planned| {
        facts.dst.workload = destination.workload;
        facts.service = destination.service;
    };
    match planned {
        Ok(Plan::Tunnel { next_hop, authority, expected, destination, kind: _ }) => {
            facts.dst.addr = next_hop.0;
            let authority = authority.authority();
            facts.hbone_addr = Some(authority.clone());
            facts.mtls = true;
            facts.dst.identity = expected.first().cloned();
            describe(&mut facts, destination);
            let host = facts.service.as_ref().map(|service| service.hostname.as_ref());
            let connect = connect::request(authority, source.map(AsRef::as_ref), client, host);
            let source_ip = pod.ip();
            let key = TunnelKey { source: pod.identity.clone(), source_ip, next_hop: next_hop.0, expected };
            Ok(Way { facts, hop: Hop::Tunnel { key, connect } })
        }
        Ok(Plan::Plain { next_hop, destination } | Plan::PassThrough { next_hop, destination }) => {
            facts.dst.addr = next_hop.0;
            describe(&mut facts, destination);
            Ok(Way { facts, hop: Hop::Plain(next_hop.0) })
        }
        Err(refusal) => {
            describe(&mut facts, refusal.destination.clone());
            Err((Box::new(facts), refusal.into()))
        }
    }
}

async fn carry(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    hop: Hop,
    app: Unanswered,
    record: &Record,
) -> Result<(), ConnectionError> {
    let counters = &record.facts.counters;
    match hop {
        Hop::Tunnel { key, connect } => {
            // Boxed, as is the other: what is needed only until there is a stream must not be kept by the open connection.
            let stream = Box::pin(open(worker, pod, &key, connect)).await?;
            Ok(splice(stream, app.answered()?, counters).await?)
        }
        Hop::Plain(to) => {
            let upstream = Box::pin(dial::upstream(pod, to)).await?;
            Ok(relay(upstream, app.answered()?, counters).await?)
        }
    }
}

/// Opens a stream on a tunnel of the pool, which is made if there is none with room.
async fn open(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    key: &TunnelKey,
    connect: Connect,
) -> Result<Stream, ConnectionError> {
    for _ in 0..TUNNELS {
        let dial = || dial_tunnel(Arc::clone(worker), Arc::clone(pod), key.clone());
        let slot = match worker.pool.get(key, dial).await {
            Ok(slot) => slot,
            Err(PoolError::Dial(error)) => return Err(ConnectionError::Dial(error)),
            Err(PoolError::Unusable) => continue,
        };
        match slot.open(connect.clone(), OPEN_TIMEOUT).await {
            Ok((_, stream)) => return Ok(stream),
            Err(error) if error.is_retryable() => {
                if let Some(refusal) = worker.take_refusal(key) {
                    return Err(ConnectionError::Dial(refusal));
                }
                tracing::debug!(%error, peer = %key.next_hop, "tunnel lost before the connection was looked at");
            }
            Err(error) => return Err(ConnectionError::Open { error }),
        }
    }
    Err(ConnectionError::NoTunnel)
}

/// Makes a tunnel. Each of its steps bounds its own time; the pod's end cuts all of them short.
async fn dial_tunnel(worker: Arc<Worker>, pod: Arc<Pod>, key: TunnelKey) -> Result<Tunnel, ConnectionError> {
    let token = pod.live.token();
    let shared = &worker.shared;
    let handshakes = async {
        // First what may take seconds, so that no socket waits for it.
        let credential = shared.certificates.certificate(&key.source).await?;
        let tcp = dial::upstream(&pod, key.next_hop).await?;
        let io = shared.tunnels.list(Direction::Outbound, &pod, key.next_hop, tcp);
        let (tls, peer) = handshake::connect(io, &credential, key.next_hop.ip(), &key.expected).await?;
        let (io, connection) = tls.get_ref();
        // Set once, here.
        let _ = io.facts().negotiated.set(Negotiated::of(peer, connection));
        mesh_hbone::client::handshake(tls, &shared.hbone).await.map_err(ConnectionError::Http2)
    };
    let (tunnel, driver) = tokio::select! {
        made = handshakes => made?,
        () = pod.live.closed() => return Err(ConnectionError::PodGone),
    };
    let worker = Arc::clone(&worker);
    tokio::spawn(async move {
        let _token = token;
        let ended = tokio::select! {
            ended = driver => ended,
            () = pod.live.closed() => Ok(()),
        };
        let Err(error) = ended else { return };
        tracing::debug!(%error, peer = %key.next_hop, "tunnel ended");
        if let mesh_hbone::ConnectionError::Io(error) = error
            && let error @ (HandshakeError::RefusedByPeer(_) | HandshakeError::Refused(_)) = HandshakeError::from(error)
        {
            worker.note_refusal(key, error.into());
        }
    });
    Ok(tunnel)
}
