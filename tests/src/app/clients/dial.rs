//! One connection, made in one of the ways in which applications make them.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::connect::Report;
use super::{bound, millis};
use crate::app::net;

/// `culvert-app dial`, against `echo`. Prints a [`Report`].
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// `address:port`; the next is tried when one cannot be connected to.
    #[arg(long, required = true)]
    to: Vec<SocketAddr>,
    /// Connects to an IPv4 address with an IPv6 socket, as Java does.
    #[arg(long)]
    mapped: bool,
    /// Binds to this address and port first.
    #[arg(long)]
    bind: Option<SocketAddr>,
    /// Sets SO_REUSEADDR before that.
    #[arg(long)]
    reuse: bool,
    /// Connects without blocking and waits with poll.
    #[arg(long)]
    nonblocking: bool,
    /// A socket of Multipath TCP.
    #[arg(long)]
    mptcp: bool,
    /// Uses TCP Fast Open.
    #[arg(long, value_enum)]
    fast_open: Option<FastOpen>,
    /// Sets SO_MARK before connecting.
    #[arg(long)]
    mark: Option<u32>,
    /// Binds to this device before connecting.
    #[arg(long)]
    device: Option<String>,
    /// After the first exchange, sets SO_MARK and tries a second one; then binds to `--then-device` if given.
    #[arg(long)]
    then_mark: Option<u32>,
    /// After the first exchange, binds to this device and tries a second one.
    #[arg(long)]
    then_device: Option<String>,
    /// Makes the socket, says `"event":"made"`, and connects only when this file is there.
    #[arg(long)]
    wait_for: Option<PathBuf>,
    /// What is sent; `MARKER` stands for the marker.
    #[arg(long, default_value = "hello")]
    send: String,
    /// Bound of each step in milliseconds.
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

/// How the first bytes go with the SYN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FastOpen {
    /// TCP_FASTOPEN_CONNECT and connect.
    Connect,
    /// sendto with MSG_FASTOPEN, without connect.
    Sendto,
}

type Step<T> = Result<T, (&'static str, io::Error)>;

/// Connects, sends, reads as much back, and does so again if asked.
///
/// # Errors
/// None: failures are part of the report.
pub fn run(options: &Options) -> io::Result<bool> {
    let mut report = Report::default();
    let start = Instant::now();
    if let Err((step, error)) = steps(options, &mut report, start) {
        report.failed = Some(step.to_owned());
        report.error = Some(net::kind(&error).to_owned());
        report.message = Some(error.to_string());
    }
    report.ok = report.failed.is_none();
    report.total_ms = millis(start.elapsed());
    net::emit(&report);
    Ok(report.ok)
}

fn steps(options: &Options, report: &mut Report, start: Instant) -> Step<()> {
    let text = options.send.replace("MARKER", &net::marker());
    let mut last = Err(("connect", io::ErrorKind::NotFound.into()));
    for target in &options.to {
        report.target = Some(*target);
        last = open(options, *target, text.as_bytes());
        if last.is_ok() {
            break;
        }
    }
    report.connect_ms = millis(start.elapsed());
    let (mut socket, sent) = last?;
    let done = exchange(&mut socket, text.as_bytes(), sent, report);
    // Only now: with Fast Open the first send connects.
    report.local = socket.local_addr().ok().and_then(|a| a.as_socket());
    report.peer = socket.peer_addr().ok().and_then(|a| a.as_socket());
    done?;
    if options.then_mark.is_some() || options.then_device.is_some() {
        if let Some(mark) = options.then_mark {
            socket.set_mark(mark).map_err(|e| ("mark", e))?;
        }
        if let Some(device) = &options.then_device {
            socket.bind_device(Some(device.as_bytes())).map_err(|e| ("device", e))?;
        }
        exchange(&mut socket, text.as_bytes(), 0, report).map_err(|(_, e)| ("again", e))?;
    }
    Ok(())
}

/// The connected socket, and how many bytes went with the SYN.
fn open(options: &Options, target: SocketAddr, text: &[u8]) -> Step<(Socket, usize)> {
    let target = match target {
        SocketAddr::V4(v4) if options.mapped => {
            SocketAddr::V6(SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0))
        }
        other => other,
    };
    let protocol = if options.mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let made = Socket::new(Domain::for_address(target), Type::STREAM.cloexec(), Some(protocol));
    let socket = made.map_err(|e| ("socket", e))?;
    prepare(options, &socket, target).map_err(|e| ("prepare", e))?;
    if let Some(file) = &options.wait_for {
        net::emit(&serde_json::json!({"event": "made"}));
        while !file.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let time = bound(options.timeout);
    let connected = match options.fast_open {
        Some(FastOpen::Sendto) => {
            let to = storage(target);
            let flags = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
            return match sendto(socket.as_raw_fd(), text, &to, flags) {
                Ok(sent) => Ok((socket, sent)),
                Err(error) => Err(("connect", error.into())),
            };
        }
        Some(FastOpen::Connect) => setsockopt(&socket, sockopt::TcpFastOpenConnect, &true)
            .map_err(io::Error::from)
            .and_then(|()| socket.connect(&target.into())),
        None if options.nonblocking => without_blocking(&socket, target, time),
        None => socket.connect_timeout(&target.into(), time),
    };
    connected.map_err(|e| ("connect", e))?;
    Ok((socket, 0))
}

fn prepare(options: &Options, socket: &Socket, target: SocketAddr) -> io::Result<()> {
    socket.set_read_timeout(Some(bound(options.timeout)))?;
    socket.set_write_timeout(Some(bound(options.timeout)))?;
    if options.reuse {
        socket.set_reuse_address(true)?;
    }
    if let Some(at) = options.bind {
        let at = match at.ip() {
            IpAddr::V4(ip) if target.is_ipv6() => SocketAddr::new(ip.to_ipv6_mapped().into(), at.port()),
            _ => at,
        };
        socket.bind(&SockAddr::from(at))?;
    }
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    options.device.as_ref().map_or(Ok(()), |device| socket.bind_device(Some(device.as_bytes())))
}

fn without_blocking(socket: &Socket, target: SocketAddr, time: Duration) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        other => return other,
    }
    let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    if poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(socket), PollFlags::POLLOUT)], timeout)? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    socket.set_nonblocking(false)
}

fn exchange(socket: &mut Socket, text: &[u8], sent: usize, report: &mut Report) -> Step<()> {
    socket.write_all(text.get(sent..).unwrap_or_default()).map_err(|e| ("send", e))?;
    let mut got = vec![0; text.len()];
    let read = socket.read_exact(&mut got);
    report.received.push_str(&String::from_utf8_lossy(&got));
    // A receive timeout is EAGAIN.
    let read = read.map_err(|e| if e.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { e });
    read.map_err(|e| ("read", e))
}

fn storage(address: SocketAddr) -> SockaddrStorage {
    address.into()
}
