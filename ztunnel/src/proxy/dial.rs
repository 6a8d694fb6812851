//! Connecting sockets of a pod's namespace: to the next hop, and to the pod's own application with the client's address.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tokio::time::{Instant, timeout};

use super::error::ConnectionError;
use super::live::Full;
use super::open::{Open, PodStream};
use super::pods::Pod;
use super::sockets::{Family, SocketKind};

/// Longest that a TCP connect may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a delivery waits before it tries another port: a SYN that meets an older connection is never answered. As long
/// as the kernel would wait before it sent the same SYN again, so that nothing is lost when only the application is slow.
const FIRST_ATTEMPT: Duration = Duration::from_secs(1);

/// Source ports of deliveries. A delivery and a connection that the client makes itself share both addresses and the
/// application's port, so their source ports must differ:
///
/// - The client's connection came first: its port is known and not used ([`DeliveryPorts::note`]). One that still waits to be
///   accepted is not known; the SYN gets no answer and another port is tried after [`FIRST_ATTEMPT`].
/// - The delivery came first: nothing can be done. The client's SYN meets the application's connection, which is reset for
///   it, and the client's kernel tries again a second later. Hence ports that clients do not use: kernels choose from 32768
///   up, often widened down to 10000 or so. Only clients whose range begins at 1024, and address translation that cannot
///   keep a port, come here. Ports below 1024 may be bound by privileged processes alone.
const DELIVERY_PORTS: Range<u16> = 1024..10_000;

/// Used when the delivery's first port was not free: very many deliveries for one client.
const MORE_PORTS: Range<u16> = 10_000..32_768;

/// Ports tried on one socket before the next socket is taken.
const BINDS: usize = 16;

/// Ports looked at for one delivery: nobody may make the search long by using very many.
const NEXT: usize = 64;

/// Sockets tried for one delivery.
const DELIVERIES: usize = 8;

/// The source ports of deliveries. Ports are given out in turn, because looking for a free one costs milliseconds once many
/// of them are in TIME_WAIT.
#[derive(Debug)]
pub struct DeliveryPorts {
    turn: AtomicU32,
    /// Addresses of clients whose own connections the proxy has accepted, and how many there are of each.
    taken: Mutex<HashMap<SocketAddr, usize>>,
}

impl Default for DeliveryPorts {
    fn default() -> Self {
        Self { turn: AtomicU32::new(fastrand::u32(..)), taken: Mutex::default() }
    }
}

impl DeliveryPorts {
    /// No delivery gets this client's port while what is returned lives.
    pub fn note(&self, client: SocketAddr) -> Taken<'_> {
        *self.taken().entry(client).or_default() += 1;
        Taken { ports: self, client }
    }

    /// The next port of `range` that `client` itself does not use.
    fn next(&self, range: &Range<u16>, client: IpAddr) -> u16 {
        let taken = self.taken();
        for _ in 0..NEXT {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % u32::from(range.end - range.start);
            // Every port of the range fits.
            if let Ok(port) = u16::try_from(u32::from(range.start) + turn)
                && !taken.contains_key(&SocketAddr::new(client, port))
            {
                return port;
            }
        }
        // A client that uses so many has only itself to blame if they meet; another range is tried then.
        range.start
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<SocketAddr, usize>> {
        // Counting leaves nothing half done.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a client's port from deliveries.
#[derive(Debug)]
pub struct Taken<'a> {
    ports: &'a DeliveryPorts,
    client: SocketAddr,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.ports.taken().entry(self.client) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// Connects from the pod's address to the next hop.
///
/// # Errors
/// When there is no socket, or the destination cannot be reached in [`CONNECT_TIMEOUT`].
pub async fn upstream(pod: &Pod, to: SocketAddr) -> Result<PodStream, ConnectionError> {
    let Some(from) = pod.addresses.iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).copied() else {
        return Err(ConnectionError::Family(to));
    };
    let socket = take(pod, SocketKind::Upstream(Family::of(to.ip()))).await?;
    let failed = |source| ConnectionError::Connect { to, source };
    bind(&socket, SocketAddr::new(from, 0)).map_err(failed)?;
    finish(timeout(CONNECT_TIMEOUT, socket.connect(to)).await, to)
}

/// Connects from the client's address, and a port of our own choice, to the pod's application.
///
/// # Errors
/// When there is no socket, or the application does not accept in [`CONNECT_TIMEOUT`].
pub async fn deliver(pod: &Pod, client: IpAddr, to: SocketAddr) -> Result<PodStream, ConnectionError> {
    if client.is_ipv4() != to.is_ipv4() {
        return Err(ConnectionError::Family(SocketAddr::new(client, 0)));
    }
    if pod.addresses.contains(&client) {
        // The pod talks to itself. Its own address needs no forging, and replies to it go by the kernel's local table,
        // as from eth0, where a socket that is bound to lo would not be found.
        return upstream(pod, to).await;
    }
    let begun = Instant::now();
    let (mut range, mut bound) = (&DELIVERY_PORTS, FIRST_ATTEMPT);
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for _ in 0..DELIVERIES {
        let socket = take(pod, SocketKind::Delivery(Family::of(to.ip()))).await?;
        if let Err(error) = bind_to_client(&socket, pod, range, client) {
            (last, range) = (error, &MORE_PORTS);
            continue;
        }
        match timeout(bound, socket.connect(to)).await {
            Ok(Err(error)) if error.kind() == io::ErrorKind::AddrNotAvailable => (last, range) = (error, &MORE_PORTS),
            // Once: an application that answers nobody is not met by another port.
            Err(_) if bound == FIRST_ATTEMPT => bound = CONNECT_TIMEOUT.saturating_sub(begun.elapsed()),
            outcome => return finish(outcome, to),
        }
    }
    Err(ConnectionError::Connect { to, source: last })
}

fn bind_to_client(socket: &OwnedFd, pod: &Pod, range: &Range<u16>, client: IpAddr) -> io::Result<()> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..BINDS {
        let port = pod.delivery_ports.next(range, client);
        match bind(socket, SocketAddr::new(client, port)) {
            Ok(()) => return Ok(()),
            // A server of the pod has it on all addresses.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

fn bind(socket: &OwnedFd, address: SocketAddr) -> io::Result<()> {
    SockRef::from(socket).bind(&address.into())
}

async fn take(pod: &Pod, kind: SocketKind) -> Result<Open<OwnedFd>, ConnectionError> {
    let socket = pod.sockets.take(kind).await?;
    pod.open.enter(socket).map_err(|(full, _)| match full {
        Full::TooMany => ConnectionError::TooManySockets,
        Full::PodGone => ConnectionError::PodGone,
    })
}

fn finish(
    outcome: Result<io::Result<PodStream>, tokio::time::error::Elapsed>,
    to: SocketAddr,
) -> Result<PodStream, ConnectionError> {
    match outcome {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(ConnectionError::Connect { to, source }),
        Err(_) => Err(ConnectionError::ConnectTimeout(to)),
    }
}

/// Makes the connection end with a reset: what an application must see when its connection was never carried.
pub fn reset(stream: PodStream) {
    drop(Unanswered::new(stream));
}

/// A connection whose other half is not there yet. Dropped like that, it is reset.
#[derive(Debug)]
pub struct Unanswered(Option<PodStream>);

impl Unanswered {
    /// A connection just accepted or made.
    pub fn new(stream: PodStream) -> Self {
        Self(Some(stream))
    }

    /// The other half is there: who takes the connection now says how it ends.
    ///
    /// # Errors
    /// Never: the connection is there until this is called, which is once.
    pub fn answered(mut self) -> Result<PodStream, ConnectionError> {
        self.0.take().ok_or(ConnectionError::Dropped)
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(stream) = self.0.take() {
            // Fails only on what is no TCP socket.
            let _ = stream.set_zero_linger();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn all(ports: &DeliveryPorts, client: IpAddr) -> HashSet<u16> {
        (0..DELIVERY_PORTS.len()).map(|_| ports.next(&DELIVERY_PORTS, client)).collect()
    }

    #[test]
    fn delivery_ports_stay_in_their_range_and_off_the_clients_own() {
        let ports = DeliveryPorts { turn: AtomicU32::new(u32::MAX - 5), ..DeliveryPorts::default() };
        let client: SocketAddr = "10.0.0.1:2000".parse().unwrap();
        let first = ports.note(client);
        let second = ports.note(client);
        let given: HashSet<u16> = (0..30_000).map(|_| ports.next(&DELIVERY_PORTS, client.ip())).collect();
        assert_eq!(given.len(), DELIVERY_PORTS.len() - 1);
        assert!(given.iter().all(|port| DELIVERY_PORTS.contains(port) && *port != 2000));
        assert!(all(&ports, "10.0.0.2".parse().unwrap()).contains(&2000), "another client's port");
        drop(first);
        assert!(!all(&ports, client.ip()).contains(&2000), "it has another connection from there");
        drop(second);
        assert!(all(&ports, client.ip()).contains(&2000));
        assert!(ports.taken().is_empty());
    }

    #[test]
    fn a_client_that_uses_every_port_holds_nobody_up() {
        let ports = DeliveryPorts::default();
        let client: IpAddr = "10.0.0.1".parse().unwrap();
        let _all: Vec<_> = DELIVERY_PORTS.map(|port| ports.note((client, port).into())).collect();
        assert!(DELIVERY_PORTS.contains(&ports.next(&DELIVERY_PORTS, client)));
    }
}
