//! Asking the resolver that an application asked, from the pod's own namespace.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_proto::op::Message;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

use super::message;
use super::metrics::DnsMetrics;
use crate::proxy::live::Full;
use crate::proxy::open::{Open, OpenSockets};
use crate::proxy::sockets::{Family, SocketKind, SocketSource, TakeError};

/// Longest that a resolver may take: as long as those who ask wait.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Largest answer that is taken over UDP; one more byte tells a longer one.
const MAX_ANSWER: usize = 4096;

/// Queries that one socket, and so one port, is used for.
const USES: u32 = 32;

/// How long a socket is used.
const LIFE: Duration = Duration::from_secs(5);

/// Sockets of one pod that wait for their next query.
const IDLE: usize = 8;

/// Datagrams that are looked at for one answer: who sends more is no resolver.
const STRANGERS: usize = 64;

/// Why a resolver's answer did not come.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// There is no socket to ask from.
    #[error(transparent)]
    NoSocket(#[from] TakeError),
    /// The pod has too many sockets.
    #[error("the pod has as many sockets as the proxy has descriptors left")]
    TooManySockets,
    /// The kernel does not take the query, or the resolver's host refuses it.
    #[error("asking {resolver}: {source}")]
    Refused {
        /// The resolver.
        resolver: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// The resolver does not answer.
    #[error("{0} does not answer")]
    Timeout(SocketAddr),
}

/// The sockets by which one pod's queries are forwarded. One is used for one query at a time, with an id and a port that
/// nobody can guess.
pub struct Upstreams {
    sockets: Arc<dyn SocketSource>,
    open: Arc<OpenSockets>,
    idle: Mutex<Vec<Idle>>,
}

/// A socket that is connected to a resolver.
struct Idle {
    resolver: SocketAddr,
    socket: Open<UdpSocket>,
    made: Instant,
    uses: u32,
}

impl Upstreams {
    /// None yet; more come from `sockets`, and are listed in `open`.
    pub fn new(sockets: Arc<dyn SocketSource>, open: Arc<OpenSockets>) -> Self {
        Self { sockets, open, idle: Mutex::default() }
    }

    /// Asks `resolver`; what comes back has the id of `query`.
    ///
    /// # Errors
    /// When there is no answer in [`TIMEOUT`].
    pub async fn ask(&self, resolver: SocketAddr, query: &[u8], metrics: &DnsMetrics) -> Result<Vec<u8>, ForwardError> {
        let begun = Instant::now();
        let answer = self.exchange(resolver, query, begun + TIMEOUT).await;
        metrics.upstream(answer.is_ok().then(|| begun.elapsed().as_secs_f64()));
        answer
    }

    async fn exchange(&self, to: SocketAddr, query: &[u8], deadline: Instant) -> Result<Vec<u8>, ForwardError> {
        let mut idle = self.take(to).await?;
        let refused = |source| ForwardError::Refused { resolver: to, source };
        // Of a generator that is made for it: the id is half of what keeps forgers out.
        let id = Message::query().metadata.id;
        let mut asked = query.to_vec();
        message::set_id(&mut asked, id);
        idle.socket.send(&asked).await.map_err(refused)?;
        let answer = timeout_at(deadline, receive(&idle.socket, &asked)).await;
        let mut answer = answer.map_err(|_| ForwardError::Timeout(to))?.map_err(refused)?;
        message::set_id(&mut answer, message::id(query).unwrap_or_default());
        idle.uses += 1;
        self.put_back(idle);
        Ok(answer)
    }

    async fn take(&self, resolver: SocketAddr) -> Result<Idle, ForwardError> {
        {
            let mut idle = self.idle();
            idle.retain(|one| one.made.elapsed() < LIFE);
            if let Some(at) = idle.iter().position(|one| one.resolver == resolver) {
                return Ok(idle.swap_remove(at));
            }
        }
        let socket = self.sockets.take(SocketKind::DnsUpstream(Family::of(resolver.ip()))).await?;
        let socket = self.open.enter(socket).map_err(|(full, _)| match full {
            Full::TooMany => ForwardError::TooManySockets,
            Full::PodGone => TakeError::PodGone.into(),
        })?;
        // Connected: only the resolver is heard, and it is told of when it does not listen.
        let connected = socket.connect_datagrams(resolver);
        let socket = connected.map_err(|source| ForwardError::Refused { resolver, source })?;
        Ok(Idle { resolver, socket, made: Instant::now(), uses: 0 })
    }

    fn put_back(&self, socket: Idle) {
        let mut idle = self.idle();
        if socket.uses < USES && socket.made.elapsed() < LIFE && idle.len() < IDLE {
            idle.push(socket);
        }
    }

    /// Closes sockets that have been used long enough.
    pub fn sweep(&self) {
        self.idle().retain(|one| one.made.elapsed() < LIFE);
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        // A list of sockets is never half done.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The answer to `asked`; anything else that comes is none.
async fn receive(socket: &UdpSocket, asked: &[u8]) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; MAX_ANSWER + 1];
    for _ in 0..STRANGERS {
        let length = socket.recv(&mut buffer).await?;
        let Some(answer) = buffer.get(..length).filter(|answer| message::answers(asked, answer)) else { continue };
        if length > MAX_ANSWER {
            // Larger than anybody asks for; TCP carries it.
            return message::truncate(answer).ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
        return Ok(answer.to_vec());
    }
    Err(io::ErrorKind::InvalidData.into())
}
