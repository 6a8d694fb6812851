//! Names, connections and output, as all applications use them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::dns::{self, Code};

/// How long a look-up may take.
const LOOK_UP: Duration = Duration::from_secs(3);

/// Prints one line of JSON. A reader that went away is no reason to fail.
#[expect(clippy::print_stdout, reason = "the applications report on standard output")]
pub fn emit(value: &impl Serialize) {
    if let Ok(line) = serde_json::to_string(value) {
        println!("{line}");
    }
}

/// A short name of an I/O error: `refused`, `reset`, `timeout`, `unreachable`, `eof`, `broken-pipe`, `not-found`;
/// anything else `other`.
pub fn kind(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "refused",
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => "reset",
        io::ErrorKind::TimedOut => "timeout",
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "unreachable",
        io::ErrorKind::UnexpectedEof => "eof",
        io::ErrorKind::BrokenPipe => "broken-pipe",
        io::ErrorKind::NotFound => "not-found",
        _ => "other",
    }
}

/// The string that the applications put into what they send; empty if none is set.
pub fn marker() -> String {
    std::env::var("CULVERT_MARKER").unwrap_or_default()
}

/// Runs `work` within `bound`.
///
/// # Errors
/// Its own, or [`io::ErrorKind::TimedOut`].
pub async fn within<T>(bound: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(bound, work).await.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
}

/// Addresses of `host:port`; the host is an address or a name that the cluster's resolver knows.
///
/// # Errors
/// Not `host:port`, no resolver, no answer, or no such name.
pub async fn resolve(target: &str) -> io::Result<Vec<SocketAddr>> {
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{target}: {why}"));
    let (host, port) = target.rsplit_once(':').ok_or_else(|| bad("not host:port"))?;
    let port: u16 = port.parse().map_err(|_| bad("no port"))?;
    if let Ok(address) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let addresses = look_up(host).await?;
    Ok(addresses.into_iter().map(|a| SocketAddr::from((a, port))).collect())
}

/// One address of `host:port`, at random if there are several.
///
/// # Errors
/// As [`resolve`].
pub async fn resolve_one(target: &str) -> io::Result<SocketAddr> {
    let addresses = resolve(target).await?;
    // The clock's low bits are random enough to spread load.
    let turn = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.subsec_nanos() as usize / 1000);
    addresses.get(turn % addresses.len().max(1)).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Addresses of a name: those of the resolver's own family, as a pod of that family would use.
async fn look_up(name: &str) -> io::Result<Vec<IpAddr>> {
    let no_resolver = || io::Error::new(io::ErrorKind::NotFound, "CULVERT_RESOLVER names no resolver");
    let server: SocketAddr =
        std::env::var("CULVERT_RESOLVER").ok().and_then(|r| r.parse().ok()).ok_or_else(no_resolver)?;
    let id = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |t| (t.subsec_nanos() & 0xffff) as u16);
    let kind = if server.is_ipv4() { dns::A } else { dns::AAAA };
    let question = dns::ask(id, name, kind).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a name"))?;
    let socket = UdpSocket::bind(any_like(server)).await?;
    socket.connect(server).await?;
    let mut buffer = [0; dns::MAX];
    let start = Instant::now();
    while start.elapsed() < LOOK_UP {
        socket.send(&question).await?;
        // A lost datagram is asked for again.
        let Ok(got) = timeout(Duration::from_millis(500), socket.recv(&mut buffer)).await else { continue };
        match dns::read_answer(&buffer[..got?]) {
            Some(answer) if answer.id == id && answer.code == Code::NoError && !answer.addresses.is_empty() => {
                return Ok(answer.addresses);
            }
            Some(answer) if answer.id == id => {
                return Err(io::Error::new(io::ErrorKind::NotFound, format!("{name}: {:?}, no address", answer.code)));
            }
            _ => {}
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer of the resolver for {name}")))
}

/// The unspecified address of the same family.
pub(super) fn any_like(address: SocketAddr) -> SocketAddr {
    if address.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() }
}

/// Connects, without delay of small segments.
///
/// # Errors
/// As connect, or [`io::ErrorKind::TimedOut`] after `bound`.
pub async fn connect(to: SocketAddr, bound: Duration) -> io::Result<TcpStream> {
    let stream = within(bound, TcpStream::connect(to)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Listens with a long queue.
///
/// # Errors
/// As bind and listen.
pub fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(4096)
}

/// `culvert-app resolve`.
#[derive(Debug, Args)]
pub struct ResolveOptions {
    /// The name.
    name: String,
}

/// Prints the addresses of a name.
///
/// # Errors
/// As [`resolve`].
pub async fn resolve_command(options: ResolveOptions) -> io::Result<bool> {
    let addresses = look_up(&options.name).await?;
    emit(&serde_json::json!({"ok": true, "name": options.name, "addresses": addresses}));
    Ok(true)
}
