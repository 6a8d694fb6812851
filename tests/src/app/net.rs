//! Names, connections and output, as all applications use them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::dns::{self, Answer, Code};

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
    let answer = ask(name, None, None, false).await?;
    if answer.code == Code::NoError && !answer.addresses.is_empty() {
        return Ok(answer.addresses);
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("{name}: {:?}, no address", answer.code)))
}

async fn ask(name: &str, server: Option<SocketAddr>, kind: Option<u16>, tcp: bool) -> io::Result<Answer> {
    let no_resolver = || io::Error::new(io::ErrorKind::NotFound, "CULVERT_RESOLVER names no resolver");
    let named = || std::env::var("CULVERT_RESOLVER").ok().and_then(|r| r.parse().ok());
    let server: SocketAddr = server.or_else(named).ok_or_else(no_resolver)?;
    let id = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |t| (t.subsec_nanos() & 0xffff) as u16);
    let kind = kind.unwrap_or(if server.is_ipv4() { dns::A } else { dns::AAAA });
    let question = dns::ask(id, name, kind).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a name"))?;
    let no_answer = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer of the resolver for {name}"));
    if tcp {
        let answer = within(LOOK_UP, ask_tcp(server, &question)).await?;
        return dns::read_answer(&answer).filter(|answer| answer.id == id).ok_or_else(no_answer);
    }
    let socket = UdpSocket::bind(any_like(server)).await?;
    socket.connect(server).await?;
    let mut buffer = [0; dns::MAX];
    let start = Instant::now();
    while start.elapsed() < LOOK_UP {
        socket.send(&question).await?;
        // A lost datagram is asked for again.
        let Ok(got) = timeout(Duration::from_millis(500), socket.recv(&mut buffer)).await else { continue };
        if let Some(answer) = dns::read_answer(&buffer[..got?]).filter(|answer| answer.id == id) {
            return Ok(answer);
        }
    }
    Err(no_answer())
}

async fn ask_tcp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).unwrap_or(0).to_be_bytes();
    stream.write_all(&[&length, question].concat()).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
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
    /// Asks this server (`address:port`) instead of the one that CULVERT_RESOLVER names.
    #[arg(long)]
    server: Option<SocketAddr>,
    /// Record type: 1 A, 28 AAAA; by default that of the server's family.
    #[arg(long)]
    kind: Option<u16>,
    /// Asks over TCP.
    #[arg(long)]
    tcp: bool,
}

/// Prints the addresses of a name.
///
/// # Errors
/// As [`resolve`].
pub async fn resolve_command(options: ResolveOptions) -> io::Result<bool> {
    let answer = ask(&options.name, options.server, options.kind, options.tcp).await?;
    let code = format!("{:?}", answer.code);
    let ok = answer.code == Code::NoError && !answer.addresses.is_empty();
    emit(&serde_json::json!({
        "ok": ok, "name": options.name, "code": code, "truncated": answer.truncated, "addresses": answer.addresses,
    }));
    Ok(ok)
}
