//! Many connections at once.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Barrier;

use super::{bound, millis};
use crate::app::net;

/// `culvert-app parallel`, against `echo`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// `host:port`.
    #[arg(long)]
    to: String,
    /// Connections, all open at the same time.
    #[arg(long, default_value_t = 500)]
    connections: usize,
    /// Bytes sent and received on each.
    #[arg(long, default_value_t = 1024)]
    bytes: usize,
    /// Bound of each step in milliseconds.
    #[arg(long, default_value_t = 20_000)]
    timeout: u64,
    /// After the exchange, keeps all connections open for this many milliseconds (an `"event":"open"` line says when).
    #[arg(long, default_value_t = 0)]
    hold: u64,
}

/// Opens all, waits until every one is open or has failed, exchanges bytes on each.
///
/// # Errors
/// The name cannot be resolved.
pub async fn run(options: Options) -> io::Result<bool> {
    let start = Instant::now();
    let target = net::resolve_one(&options.to).await?;
    let all_open = Arc::new(Barrier::new(options.connections));
    let all_done = Arc::new(Barrier::new(options.connections));
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..options.connections {
        let (options, all_open, all_done) = (options.clone(), Arc::clone(&all_open), Arc::clone(&all_done));
        tasks.spawn(async move { one(number, target, &options, &all_open, &all_done).await });
    }
    let mut failures: BTreeMap<String, usize> = BTreeMap::new();
    while let Some(done) = tasks.join_next().await {
        if let Err(error) = done.map_err(io::Error::other).and_then(|done| done) {
            *failures.entry(net::kind(&error).to_owned()).or_default() += 1;
        }
    }
    let ok = failures.is_empty();
    let failed: usize = failures.values().sum();
    net::emit(&json!({
        "ok": ok, "connections": options.connections, "succeeded": options.connections - failed, "failures": failures,
        "ms": millis(start.elapsed()),
    }));
    Ok(ok)
}

async fn one(
    number: usize,
    to: SocketAddr,
    options: &Options,
    all_open: &Barrier,
    all_done: &Barrier,
) -> io::Result<()> {
    let time = bound(options.timeout);
    let connected = net::connect(to, time).await;
    all_open.wait().await;
    let exchanged = match connected {
        Ok(mut stream) => {
            let sent: Vec<u8> = (0..options.bytes).map(|i| u8::try_from((i + number) % 251).unwrap_or(0)).collect();
            let mut got = vec![0; sent.len()];
            let exchanged = net::within(time, async {
                stream.write_all(&sent).await?;
                stream.read_exact(&mut got).await
            });
            let exchanged = exchanged.await.map(|_| stream);
            if got == sent { exchanged } else { exchanged.and(Err(io::Error::other("something else came back"))) }
        }
        Err(error) => Err(error),
    };
    let first = all_done.wait().await.is_leader();
    if options.hold > 0 {
        if first {
            net::emit(&json!({"event": "open", "connections": options.connections}));
        }
        tokio::time::sleep(bound(options.hold)).await;
    }
    exchanged.map(drop)
}
