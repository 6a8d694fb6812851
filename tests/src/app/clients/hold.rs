//! A connection that is kept and used.

use std::io;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{bound, millis};
use crate::app::net;

/// `culvert-app hold`, against `echo`.
#[derive(Debug, Args)]
pub struct Options {
    /// `host:port`.
    #[arg(long)]
    to: String,
    /// Ends after this many milliseconds.
    #[arg(long = "for", default_value_t = 600_000)]
    time: u64,
    /// Milliseconds between exchanges.
    #[arg(long, default_value_t = 50)]
    interval: u64,
    /// Bound of one exchange in milliseconds.
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
    /// Sends the marker with each number.
    #[arg(long)]
    marked: bool,
    /// Connections to hold at once.
    #[arg(long, default_value_t = 1)]
    connections: usize,
}

/// Prints a line when all are open (`"event":"open"`), one every ten exchanges, and one at the end.
///
/// # Errors
/// A connection cannot be opened.
pub async fn run(options: Options) -> io::Result<bool> {
    let start = Instant::now();
    let target = net::resolve_one(&options.to).await?;
    let mut streams = Vec::with_capacity(options.connections);
    for _ in 0..options.connections {
        streams.push(net::connect(target, bound(options.timeout)).await?);
    }
    let local = streams.first().and_then(|s| s.local_addr().ok());
    net::emit(&json!({"event": "open", "connections": streams.len(), "local": local, "ms": millis(start.elapsed())}));
    let marker = if options.marked { net::marker() } else { String::new() };
    let mut exchanges = 0_u64;
    let mut done = Ok(());
    while done.is_ok() && start.elapsed() < bound(options.time) {
        for stream in &mut streams {
            done = net::within(bound(options.timeout), exchange(stream, &marker, exchanges)).await;
            if done.is_err() {
                break;
            }
            exchanges += 1;
            if exchanges.is_multiple_of(10) {
                net::emit(&json!({"event": "alive", "exchanges": exchanges}));
            }
        }
        tokio::time::sleep(Duration::from_millis(options.interval)).await;
    }
    let error = done.as_ref().err().map(net::kind);
    net::emit(
        &json!({"event": "end", "ok": done.is_ok(), "exchanges": exchanges, "error": error, "ms": millis(start.elapsed())}),
    );
    Ok(done.is_ok())
}

async fn exchange(stream: &mut TcpStream, marker: &str, number: u64) -> io::Result<()> {
    let sent = [marker.as_bytes(), &number.to_be_bytes()].concat();
    stream.write_all(&sent).await?;
    let mut got = vec![0; sent.len()];
    stream.read_exact(&mut got).await?;
    if got == sent { Ok(()) } else { Err(io::Error::other("something else came back")) }
}
