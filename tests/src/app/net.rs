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
    let names = match Resolver::of_process()? {
        Resolver::Given(_) => vec![name.to_owned()],
        Resolver::File(file) => file.names(name),
    };
    let mut last = Code::NxDomain;
    for name in &names {
        let answer = ask(name, None, None, false).await?;
        if answer.code == Code::NoError && !answer.addresses.is_empty() {
            return Ok(answer.addresses);
        }
        last = answer.code;
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("{name}: {last:?}, no address")))
}

/// Whom to ask for names.
enum Resolver {
    /// `CULVERT_RESOLVER`, for whole names.
    Given(SocketAddr),
    /// What the kubelet wrote.
    File(ResolvConf),
}

impl Resolver {
    fn of_process() -> io::Result<Self> {
        if let Some(given) = std::env::var("CULVERT_RESOLVER").ok().and_then(|given| given.parse().ok()) {
            return Ok(Self::Given(given));
        }
        let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let none = || {
            io::Error::new(io::ErrorKind::NotFound, "neither CULVERT_RESOLVER nor /etc/resolv.conf names a resolver")
        };
        ResolvConf::parse(&text).map(Self::File).ok_or_else(none)
    }

    fn server(&self) -> SocketAddr {
        match self {
            Self::Given(server) => *server,
            Self::File(file) => (file.server, 53).into(),
        }
    }
}

/// What of resolv.conf(5) matters here.
#[derive(Debug, PartialEq)]
struct ResolvConf {
    server: IpAddr,
    search: Vec<String>,
    ndots: usize,
}

impl ResolvConf {
    /// None if it names no server.
    fn parse(text: &str) -> Option<Self> {
        let (mut server, mut search, mut ndots) = (None, Vec::new(), 1);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => server = server.or_else(|| words.next()?.parse().ok()),
                Some("search") => search = words.map(str::to_owned).collect(),
                Some("options") => {
                    ndots = words.find_map(|word| word.strip_prefix("ndots:")?.parse().ok()).unwrap_or(ndots);
                }
                _ => {}
            }
        }
        Some(Self { server: server?, search, ndots })
    }

    /// The whole names to ask for, in order.
    fn names(&self, name: &str) -> Vec<String> {
        if let Some(whole) = name.strip_suffix('.') {
            return vec![whole.to_owned()];
        }
        let mut names: Vec<String> = self.search.iter().map(|domain| format!("{name}.{domain}")).collect();
        let many_dots = name.matches('.').count() >= self.ndots;
        names.insert(if many_dots { 0 } else { names.len() }, name.to_owned());
        names
    }
}

async fn ask(name: &str, server: Option<SocketAddr>, kind: Option<u16>, tcp: bool) -> io::Result<Answer> {
    let server = server.map_or_else(|| Ok(Resolver::of_process()?.server()), io::Result::Ok)?;
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
    /// Asks this server (`address:port`) instead of the pod's own.
    #[arg(long)]
    server: Option<SocketAddr>,
    /// Record type: 1 A, 28 AAAA, 33 SRV; by default that of the server's family.
    #[arg(long)]
    kind: Option<u16>,
    /// Asks over TCP.
    #[arg(long)]
    tcp: bool,
}

/// Prints the addresses of a name, or where a service is.
///
/// # Errors
/// As [`resolve`].
pub async fn resolve_command(options: ResolveOptions) -> io::Result<bool> {
    let answer = ask(&options.name, options.server, options.kind, options.tcp).await?;
    let code = format!("{:?}", answer.code);
    let ok = answer.code == Code::NoError && !(answer.addresses.is_empty() && answer.targets.is_empty());
    emit(&serde_json::json!({
        "ok": ok, "name": options.name, "code": code, "truncated": answer.truncated, "addresses": answer.addresses,
        "targets": answer.targets,
    }));
    Ok(ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_the_kubelet_says() {
        let text = "search shop.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n";
        let file = ResolvConf::parse(text).expect("a server");
        assert_eq!(file.server, IpAddr::from([10, 96, 0, 10]));
        assert_eq!(file.names("web"), ["web.shop.svc.cluster.local", "web.svc.cluster.local", "web"]);
        assert_eq!(file.names("a.b.c.d.e.f")[0], "a.b.c.d.e.f");
        assert_eq!(file.names("web."), ["web"]);
        assert_eq!(ResolvConf::parse("search a\n"), None);
    }
}
