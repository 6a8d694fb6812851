//! One connection.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{bound, millis};
use crate::app::net;

/// `culvert-app connect`.
#[derive(Debug, Args)]
pub struct Options {
    /// `host:port`.
    #[arg(long)]
    to: String,
    /// Text to send; `MARKER` stands for the marker. By default nothing is sent.
    #[arg(long)]
    send: Option<String>,
    /// Reads until this many bytes came (0: nothing is read).
    #[arg(long, default_value_t = 0)]
    read: usize,
    /// Reads until a line came.
    #[arg(long)]
    read_line: bool,
    /// Reads until the far end closes.
    #[arg(long)]
    read_to_end: bool,
    /// Bound for each step in milliseconds.
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

/// What `culvert-app connect` prints.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// True if every step went as asked.
    pub ok: bool,
    /// The address that was connected to.
    pub target: Option<SocketAddr>,
    /// getsockname.
    pub local: Option<SocketAddr>,
    /// getpeername.
    pub peer: Option<SocketAddr>,
    /// Time until connected, or until connecting failed.
    pub connect_ms: f64,
    /// Time until the end of everything.
    pub total_ms: f64,
    /// What was read.
    pub received: String,
    /// The step that failed: `resolve`, `connect`, `send` or `read`.
    pub failed: Option<String>,
    /// Kind of failure, as [`net::kind`] names it.
    pub error: Option<String>,
    /// The system's words.
    pub message: Option<String>,
}

/// Connects, sends and reads as asked.
///
/// # Errors
/// None: failures are part of the report.
pub async fn run(options: Options) -> io::Result<bool> {
    let mut report = Report::default();
    let start = Instant::now();
    if let Err((step, error)) = steps(&options, &mut report, start).await {
        report.failed = Some(step.to_owned());
        report.error = Some(net::kind(&error).to_owned());
        report.message = Some(error.to_string());
    }
    report.ok = report.failed.is_none();
    report.total_ms = millis(start.elapsed());
    net::emit(&report);
    Ok(report.ok)
}

async fn steps(options: &Options, report: &mut Report, start: Instant) -> Result<(), (&'static str, io::Error)> {
    let bound = bound(options.timeout);
    let target = net::resolve_one(&options.to).await.map_err(|e| ("resolve", e))?;
    report.target = Some(target);
    let connected = net::connect(target, bound).await;
    report.connect_ms = millis(start.elapsed());
    let mut stream = connected.map_err(|e| ("connect", e))?;
    report.local = stream.local_addr().ok();
    report.peer = stream.peer_addr().ok();
    if let Some(text) = &options.send {
        let text = text.replace("MARKER", &net::marker());
        net::within(bound, stream.write_all(text.as_bytes())).await.map_err(|e| ("send", e))?;
    }
    let mut received = Vec::new();
    let read = net::within(bound, read(options, &mut stream, &mut received)).await;
    report.received = String::from_utf8_lossy(&received).into_owned();
    read.map_err(|e| ("read", e))
}

async fn read(options: &Options, stream: &mut TcpStream, received: &mut Vec<u8>) -> io::Result<()> {
    let enough = |received: &[u8]| {
        !options.read_to_end && received.len() >= options.read && (!options.read_line || received.contains(&b'\n'))
    };
    while !enough(received) {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer).await? {
            0 if options.read_to_end => return Ok(()),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            got => received.extend_from_slice(&buffer[..got]),
        }
        if received.len() > 1 << 20 {
            return Err(io::Error::other("more than 1 MiB came"));
        }
    }
    Ok(())
}
