//! Half-close, in both directions.

use std::io;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::bound;
use crate::app::net;

/// `culvert-app half-close`.
#[derive(Debug, Args)]
pub struct Options {
    /// `host:port` of `echo --mode sink`: the client closes first, then the answer must still come.
    #[arg(long)]
    sink: Option<String>,
    /// `host:port` of `echo --mode close-first`: the server closes first, then the client must still be heard. What
    /// the server got is in its own report.
    #[arg(long)]
    close_first: Option<String>,
    /// Bytes sent.
    #[arg(long, default_value_t = 100_000)]
    bytes: usize,
    /// Milliseconds between the close of one side and the use of the other.
    #[arg(long, default_value_t = 200)]
    pause: u64,
    /// Bound of everything in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    timeout: u64,
}

/// Tries what was given.
///
/// # Errors
/// A connection fails, or takes too long.
pub async fn run(options: Options) -> io::Result<bool> {
    let time = bound(options.timeout);
    let mut ok = true;
    if let Some(target) = &options.sink {
        let answer = net::within(time, sink(target, &options)).await?;
        let whole = answer["bytes"] == options.bytes;
        net::emit(&json!({"ok": whole, "direction": "client-first", "answer": answer}));
        ok &= whole;
    }
    if let Some(target) = &options.close_first {
        let banner = net::within(time, close_first(target, &options)).await?;
        net::emit(&json!({"ok": true, "direction": "server-first", "banner": banner, "sent": options.bytes}));
    }
    Ok(ok)
}

async fn sink(target: &str, options: &Options) -> io::Result<serde_json::Value> {
    let mut stream = net::connect(net::resolve_one(target).await?, bound(options.timeout)).await?;
    stream.write_all(&vec![b'h'; options.bytes]).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.take(1 << 20).read_to_string(&mut answer).await?;
    Ok(serde_json::from_str(&answer)?)
}

async fn close_first(target: &str, options: &Options) -> io::Result<serde_json::Value> {
    let mut stream = net::connect(net::resolve_one(target).await?, bound(options.timeout)).await?;
    let mut banner = String::new();
    (&mut stream).take(1 << 20).read_to_string(&mut banner).await?;
    // The server's end has been read; the other direction must have stayed open.
    for part in vec![b'h'; options.bytes].chunks((options.bytes / 4).max(1)) {
        tokio::time::sleep(Duration::from_millis(options.pause / 4)).await;
        stream.write_all(part).await?;
    }
    stream.shutdown().await?;
    Ok(serde_json::from_str(&banner)?)
}
