//! Connecting sockets of a pod's namespace: to the next hop, and to the pod's own application with the client's address.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::error::ConnectionError;
use super::pods::Pod;
use super::sockets::SocketKind;

/// Longest that a TCP connect may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Source ports of deliveries: below the range from which kernels choose for clients, so that a delivery cannot have the
/// addresses and ports of a connection that the proxy itself has accepted from the same client.
const DELIVERY_PORTS: std::ops::Range<u32> = 10_000..32_768;

/// Ports tried on one socket before the next socket is taken.
const BINDS: usize = 16;

/// Sockets tried for one delivery.
const DELIVERIES: usize = 8;

/// The source port that is tried next. Ports are given out in turn, because looking for a free one costs milliseconds
/// once many of them are in TIME_WAIT.
#[derive(Debug)]
pub struct DeliveryPorts(AtomicU32);

impl Default for DeliveryPorts {
    fn default() -> Self {
        Self(AtomicU32::new(fastrand::u32(..)))
    }
}

impl DeliveryPorts {
    /// The next port that is not `taken`, which is the client's own.
    fn next(&self, taken: u16) -> u16 {
        loop {
            let turn = self.0.fetch_add(1, Ordering::Relaxed);
            let port = DELIVERY_PORTS.start + turn % (DELIVERY_PORTS.end - DELIVERY_PORTS.start);
            // Every port of the range fits.
            if let Ok(port) = u16::try_from(port)
                && port != taken
            {
                return port;
            }
        }
    }
}

/// Connects from the pod's address to the next hop.
///
/// # Errors
/// When there is no socket, or the destination cannot be reached in [`CONNECT_TIMEOUT`].
pub async fn upstream(pod: &Pod, to: SocketAddr) -> Result<TcpStream, ConnectionError> {
    let Some(from) = pod.addresses.iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).copied() else {
        return Err(ConnectionError::Family(to));
    };
    let socket = take(pod, SocketKind::Upstream, to).await?;
    let failed = |source| ConnectionError::Connect { to, source };
    socket.bind(SocketAddr::new(from, 0)).map_err(failed)?;
    finish(timeout(CONNECT_TIMEOUT, socket.connect(to)).await, to)
}

/// Connects from the client's address, and a port of our own choice, to the pod's application.
///
/// # Errors
/// When there is no socket, or the application does not accept in [`CONNECT_TIMEOUT`].
pub async fn deliver(pod: &Pod, client: SocketAddr, to: SocketAddr) -> Result<TcpStream, ConnectionError> {
    if client.is_ipv4() != to.is_ipv4() {
        return Err(ConnectionError::Family(client));
    }
    if pod.addresses.contains(&client.ip()) {
        // The pod talks to itself. Its own address needs no forging, and replies to it go by the kernel's local table,
        // as from eth0, where a socket that is bound to lo would not be found.
        return upstream(pod, to).await;
    }
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for _ in 0..DELIVERIES {
        let socket = take(pod, SocketKind::Delivery, to).await?;
        if let Err(error) = bind_to_client(&socket, pod, client) {
            last = error;
            continue;
        }
        match timeout(CONNECT_TIMEOUT, socket.connect(to)).await {
            Ok(Err(error)) if error.kind() == io::ErrorKind::AddrNotAvailable => last = error,
            outcome => return finish(outcome, to),
        }
    }
    Err(ConnectionError::Connect { to, source: last })
}

fn bind_to_client(socket: &TcpSocket, pod: &Pod, client: SocketAddr) -> io::Result<()> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..BINDS {
        let port = pod.delivery_ports.next(client.port());
        match socket.bind(SocketAddr::new(client.ip(), port)) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

async fn take(pod: &Pod, kind: SocketKind, to: SocketAddr) -> Result<TcpSocket, ConnectionError> {
    if to.is_ipv6() {
        return Err(ConnectionError::Family(to));
    }
    let socket: OwnedFd = pod.sockets.take(kind).await?;
    Ok(TcpSocket::from_std_stream(std::net::TcpStream::from(socket)))
}

fn finish(
    outcome: Result<io::Result<TcpStream>, tokio::time::error::Elapsed>,
    to: SocketAddr,
) -> Result<TcpStream, ConnectionError> {
    match outcome {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(ConnectionError::Connect { to, source }),
        Err(_) => Err(ConnectionError::ConnectTimeout(to)),
    }
}

/// Makes the connection end with a reset: what an application must see when its connection was never carried.
pub fn reset(stream: TcpStream) {
    drop(Unanswered::new(stream));
}

/// A connection whose other half is not there yet. Dropped like that, it is reset.
#[derive(Debug)]
pub struct Unanswered(Option<TcpStream>);

impl Unanswered {
    /// A connection just accepted or made.
    pub fn new(stream: TcpStream) -> Self {
        Self(Some(stream))
    }

    /// The other half is there: who takes the connection now says how it ends.
    ///
    /// # Errors
    /// Never: the connection is there until this is called, which is once.
    pub fn answered(mut self) -> Result<TcpStream, ConnectionError> {
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
    use super::*;

    #[test]
    fn delivery_ports_stay_in_their_range_and_off_the_clients_own() {
        let ports = DeliveryPorts(AtomicU32::new(u32::MAX - 5));
        let mut seen = std::collections::HashSet::new();
        for _ in 0..30_000 {
            let port = ports.next(20_000);
            assert!(DELIVERY_PORTS.contains(&u32::from(port)) && port != 20_000);
            seen.insert(port);
        }
        assert_eq!(seen.len(), DELIVERY_PORTS.len() - 1);
    }
}
