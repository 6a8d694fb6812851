//! Load with percentiles, for the bench.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Args, ValueEnum};
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::net;

/// Latencies kept per client; what is beyond is counted only.
const KEPT: usize = 1 << 20;

/// `culvert-app load`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// `host:port`; several are used in turn, so that new connections do not run out of ports.
    #[arg(long, required = true)]
    to: Vec<String>,
    /// What to measure.
    #[arg(long, value_enum, default_value_t = Kind::Keepalive)]
    kind: Kind,
    /// Clients at once, each with one connection at a time.
    #[arg(long, default_value_t = 1)]
    clients: usize,
    /// Ends after this many seconds.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Ends after this many operations in all, if sooner.
    #[arg(long)]
    operations: Option<u64>,
    /// Seconds at the beginning that are not counted.
    #[arg(long, default_value_t = 0.0)]
    warm_up: f64,
    /// Bound of one operation in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    timeout: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// HTTP requests on connections that are kept, against `culvert-app http`.
    Keepalive,
    /// An HTTP request on a new connection each time, against `culvert-app http`.
    Short,
    /// A new connection each time, one byte there and back, against `culvert-app echo --mode answer --quiet`.
    Connections,
}

/// What `culvert-app load` prints.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// True if nothing failed.
    pub ok: bool,
    /// Operations that succeeded.
    pub operations: u64,
    /// Operations that failed, by kind of error.
    pub failures: BTreeMap<String, u64>,
    /// Measured time.
    pub seconds: f64,
    /// Operations per second.
    pub per_second: f64,
    /// Median latency in microseconds.
    pub p50_us: u32,
    /// 90th percentile in microseconds.
    pub p90_us: u32,
    /// 99th percentile in microseconds.
    pub p99_us: u32,
    /// Longest in microseconds.
    pub max_us: u32,
}

/// Runs the load and prints the report.
///
/// # Errors
/// A name cannot be resolved.
pub async fn run(options: Options) -> io::Result<bool> {
    let mut targets = Vec::new();
    for to in &options.to {
        targets.push(net::resolve_one(to).await?);
    }
    let counted_from = Instant::now() + Duration::from_secs_f64(options.warm_up);
    let until = counted_from + Duration::from_secs_f64(options.seconds);
    let share = options.operations.map(|o| o.div_ceil(options.clients.max(1) as u64));
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..options.clients {
        let turn = targets.iter().copied().cycle().skip(number % targets.len().max(1));
        let turn: Vec<SocketAddr> = turn.take(targets.len()).collect();
        clients.spawn(client(turn, options.kind, Duration::from_millis(options.timeout), counted_from, until, share));
    }
    let (mut all, mut report) = (Vec::new(), Report::default());
    while let Some(done) = clients.join_next().await {
        let done = done.map_err(io::Error::other)?;
        report.operations += done.operations;
        all.extend(done.latencies);
        for (kind, count) in done.failures {
            *report.failures.entry(kind.to_owned()).or_default() += count;
        }
    }
    report.seconds = (Instant::now() - counted_from).as_secs_f64();
    all.sort_unstable();
    let at =
        |percent: usize| all.get((all.len() * percent / 100).min(all.len().saturating_sub(1))).copied().unwrap_or(0);
    (report.p50_us, report.p90_us, report.p99_us) = (at(50), at(90), at(99));
    report.max_us = all.last().copied().unwrap_or(0);
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let rate = report.operations as f64 / report.seconds;
    report.per_second = rate;
    report.ok = report.failures.is_empty() && report.operations > 0;
    net::emit(&report);
    Ok(report.ok)
}

#[derive(Debug, Default)]
struct Done {
    operations: u64,
    latencies: Vec<u32>,
    failures: BTreeMap<&'static str, u64>,
}

async fn client(
    targets: Vec<SocketAddr>,
    kind: Kind,
    bound: Duration,
    counted_from: Instant,
    until: Instant,
    share: Option<u64>,
) -> Done {
    let (mut done, mut kept, mut turn) = (Done::default(), None, 0);
    while Instant::now() < until && share.is_none_or(|s| done.operations < s) {
        let at = targets[turn % targets.len()];
        turn += 1;
        let start = Instant::now();
        let result = net::within(bound, operation(kind, at, &mut kept, bound)).await;
        if start < counted_from {
            continue;
        }
        match result {
            Ok(()) => {
                done.operations += 1;
                if done.latencies.len() < KEPT {
                    done.latencies.push(u32::try_from(start.elapsed().as_micros()).unwrap_or(u32::MAX));
                }
            }
            Err(error) => {
                kept = None;
                *done.failures.entry(net::kind(&error)).or_default() += 1;
                // A refused connection costs nothing: without a pause it would be all that is measured.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }
    done
}

type Http = SendRequest<Empty<Bytes>>;

async fn operation(kind: Kind, at: SocketAddr, kept: &mut Option<Http>, bound: Duration) -> io::Result<()> {
    match kind {
        Kind::Keepalive => {
            let mut sender = match kept.take().filter(|s| !s.is_closed()) {
                Some(sender) => sender,
                None => open(at, bound).await?,
            };
            request(&mut sender, at).await?;
            *kept = Some(sender);
            Ok(())
        }
        Kind::Short => request(&mut open(at, bound).await?, at).await,
        Kind::Connections => {
            let mut stream = net::connect(at, bound).await?;
            stream.write_all(b"c").await?;
            let mut answer = [0];
            stream.read_exact(&mut answer).await?;
            // The far end closes first: TIME_WAIT on this side would use up its ports.
            match stream.read(&mut answer).await? {
                0 => Ok(()),
                _ => Err(io::Error::other("more than one byte came back")),
            }
        }
    }
}

async fn open(at: SocketAddr, bound: Duration) -> io::Result<Http> {
    let stream = net::connect(at, bound).await?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn request(sender: &mut Http, at: SocketAddr) -> io::Result<()> {
    sender.ready().await.map_err(io::Error::other)?;
    let request = Request::get("/").header("host", at.to_string()).body(Empty::new()).map_err(io::Error::other)?;
    let answer = sender.send_request(request).await.map_err(io::Error::other)?;
    if !answer.status().is_success() {
        return Err(io::Error::other(format!("status {}", answer.status())));
    }
    answer.into_body().collect().await.map_err(io::Error::other)?;
    Ok(())
}
