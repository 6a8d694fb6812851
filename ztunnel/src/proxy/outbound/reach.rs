//! Reaching the far side of an outbound connection: an endpoint that fails before any byte of the application was sent is
//! no reason to fail, as long as there is another one, or its tunnel was only lost.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use mesh_hbone::pool::{Place, Pool, PoolError};
use mesh_hbone::{Connect, Stream};
use mesh_model::SpiffeId;
use tokio::time::{Instant, sleep, timeout};

use super::tunnel::dial_tunnel;
use super::{Asked, Hop, Way, alternative};
use crate::proxy::dial;
use crate::proxy::error::{ConnectionError, Retry};
use crate::proxy::open::PodStream;
use crate::proxy::pods::Pod;
use crate::proxy::record::{Reached, Record, Side};
use crate::proxy::worker::{TunnelKey, Worker};

/// Tunnels by who may share one, each with who is at its far end.
pub type TunnelPool = Pool<TunnelKey, SpiffeId, ConnectionError>;

/// Longest that the far side may take to connect to its application and answer.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);

/// Time after which no attempt is begun any more, counted from the first.
const RETRY_WITHIN: Duration = Duration::from_secs(10);

/// How long an endpoint may take while there is another one.
const PATIENCE: Duration = Duration::from_secs(3);

/// Pause before the same endpoint is tried once more; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// Times that the same endpoint is tried once more: with the pauses, five seconds.
const REPEATS: u32 = 9;

/// The far side.
pub enum Upstream {
    /// Through a tunnel.
    Tunnel(Stream),
    /// In plain.
    Plain(PodStream),
}

/// Reaches where `way` leads, or another endpoint of the same service. The record is told which it was, or which was tried
/// last.
///
/// # Errors
/// Why the last attempt failed.
pub async fn reach(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    asked: Asked,
    mut way: Way,
    record: &Record,
) -> Result<Upstream, ConnectionError> {
    let begun = Instant::now();
    let (mut tried, mut repeats) = (Vec::new(), 0);
    let result = loop {
        let may_retry = || begun.elapsed() < RETRY_WITHIN;
        let other = |tried: &mut Vec<Arc<str>>, now: &Way| {
            // Without a workload it goes where it was addressed: there is no other.
            let uid = now.to.dst.workload.as_ref().map(|workload| &workload.uid)?;
            if !tried.contains(uid) {
                tried.push(Arc::clone(uid));
            }
            may_retry().then(|| alternative(worker, pod, asked, tried))?
        };
        let now = way.hop.address();
        let patient = {
            let mut attempt = pin!(attempt(worker, pod, &way.hop));
            match timeout(PATIENCE, &mut attempt).await {
                Ok(result) => Ok(result),
                Err(_) => match other(&mut tried, &way) {
                    Some(next) => Err(next),
                    None => Ok(attempt.await),
                },
            }
        };
        let result = match patient {
            Ok(result) => result,
            Err(next) => {
                tracing::debug!(from = %now, to = %next.hop.address(), "endpoint is slow, the next one is tried");
                way = next;
                continue;
            }
        };
        let error = match result {
            Ok(reached) => break Ok(reached),
            Err(error) => error,
        };
        let retry = error.retry();
        if retry != Retry::Never
            && let Some(next) = other(&mut tried, &way)
        {
            tracing::debug!(%error, from = %now, to = %next.hop.address(), "the next endpoint is tried");
            (way, repeats) = (next, 0);
        } else if retry == Retry::Again && repeats < REPEATS && may_retry() {
            tracing::debug!(%error, to = %now, "tried once more");
            sleep(FIRST_PAUSE * 2_u32.pow(repeats)).await;
            repeats += 1;
        } else {
            break Err(error);
        }
    };
    let Way { to, .. } = way;
    match result {
        Ok((upstream, peer)) => {
            record.reached(Reached { dst: Side { identity: peer, ..to.dst }, ..to });
            Ok(upstream)
        }
        Err(error) => {
            record.reached(to);
            Err(error)
        }
    }
}

/// One attempt; who the far side has proven to be.
async fn attempt(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    hop: &Hop,
) -> Result<(Upstream, Option<SpiffeId>), ConnectionError> {
    match hop {
        Hop::Tunnel { key, connect } => {
            let (stream, peer) = open(worker, pod, key, connect.clone()).await?;
            Ok((Upstream::Tunnel(stream), Some(peer)))
        }
        Hop::Plain(to) => Ok((Upstream::Plain(dial::upstream(pod, *to).await?), None)),
    }
}

/// Opens a stream on a tunnel of the pool, which is made if there is none with room.
async fn open(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    key: &TunnelKey,
    connect: Connect,
) -> Result<(Stream, SpiffeId), ConnectionError> {
    // A task of its own, and the pod's all the same.
    let dial = || worker.turns.of(&pod.uid).run(dial_tunnel(Arc::clone(worker), Arc::clone(pod), key.clone()));
    let Place { slot, about: peer } = match worker.pool.get(key, dial).await {
        Ok(place) => place,
        Err(PoolError::Dial(error)) => return Err(ConnectionError::Dial(error)),
        Err(PoolError::Unusable) => return Err(ConnectionError::NoTunnel),
    };
    match slot.open(connect, OPEN_TIMEOUT).await {
        Ok((_, stream)) => {
            worker.refusals.forget(key);
            Ok((stream, peer))
        }
        Err(error) if error.is_retryable() => Err(match worker.refusals.take(key) {
            Some(refusal) => ConnectionError::Dial(refusal),
            None => ConnectionError::Open { error },
        }),
        Err(error) => Err(ConnectionError::Open { error }),
    }
}
