//! Load that notices everything: new connections at a steady pace and long-lived streams, against
//! [`super::numbered`]. Each request and each number is counted at both ends.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::net;
use super::numbered::{REQUEST, STREAM};

/// A connect that takes longer counts as a failure.
pub const SLOW: Duration = Duration::from_secs(1);
/// A machine that stood still for longer than this does not make up for it: a burst would be another load.
const STALL: Duration = Duration::from_millis(250);
/// Failures that are described one by one; all are counted.
const DESCRIBED: usize = 200;

/// `culvert-app storm`. Ends at SIGTERM or after its time, prints a [`Report`], and succeeds if nothing failed.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// `host:port` of `culvert-app numbered`; several are used in turn.
    #[arg(long, required = true)]
    to: Vec<String>,
    /// New connections per second.
    #[arg(long, default_value_t = 200)]
    rate: u32,
    /// Streams held at once.
    #[arg(long, default_value_t = 50)]
    streams: usize,
    /// Milliseconds between the numbers of a stream.
    #[arg(long, default_value_t = 50)]
    interval: u64,
    /// Milliseconds after which a stream is ended and another opened.
    #[arg(long, default_value_t = 3000)]
    life: u64,
    /// Bound of an answer in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    timeout: u64,
    /// Seconds until it ends by itself.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
}

/// What `culvert-app storm` prints.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// True if nothing failed.
    pub ok: bool,
    /// How long new connections were made, in seconds.
    pub seconds: f64,
    /// Connections tried, those of streams not among them.
    pub attempts: u64,
    /// Those that were due while the machine stood still, and were not tried.
    pub missed: u64,
    /// Those that were answered rightly.
    pub succeeded: u64,
    /// The others, as `<step>-<kind>`: step `connect` or `answer`; kinds as [`net::kind`], `slow` and `wrong`.
    pub failures: BTreeMap<String, u64>,
    /// Longest connect that succeeded, in milliseconds.
    pub slowest_connect_ms: u64,
    /// Longest time from connected to answered, in milliseconds.
    pub slowest_answer_ms: u64,
    /// Streams opened.
    pub streams: u64,
    /// Streams that ended as they should: everything sent came back.
    pub ended_streams: u64,
    /// Streams that did not, as `<step>-<kind>`.
    pub broken_streams: BTreeMap<String, u64>,
    /// Numbers sent on streams.
    pub sent: u64,
    /// Numbers that came back.
    pub returned: u64,
    /// Numbers that were not the next one.
    pub gaps: u64,
    /// The first failures of both sorts.
    pub failed: Vec<Failure>,
}

/// One failure. Times are microseconds since 1970.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// A stream, not a request.
    pub stream: bool,
    /// `connect` or `answer`.
    pub step: String,
    /// As in [`Report::failures`].
    pub kind: String,
    /// Where to.
    pub target: SocketAddr,
    /// When it was begun.
    pub began: u64,
    /// When it was connected; 0 if it never was.
    pub connected: u64,
    /// When it failed.
    pub ended: u64,
}

type Shared = Arc<Mutex<Report>>;

/// Microseconds since 1970, as in [`Failure`].
pub fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX))
}

/// Runs the load.
///
/// # Errors
/// A name cannot be resolved, or SIGTERM not be listened to.
pub async fn run(options: Options) -> io::Result<bool> {
    let mut targets = Vec::new();
    for to in &options.to {
        targets.push(net::resolve_one(to).await?);
    }
    let (stop, stopped) = watch::channel(false);
    let report = Shared::default();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..options.streams {
        let target = targets[number % targets.len()];
        tasks.spawn(streams(number, target, options.clone(), Arc::clone(&report), stopped.clone()));
    }
    let mut term = signal(SignalKind::terminate())?;
    let end = tokio::time::sleep(Duration::from_secs(options.seconds));
    tokio::pin!(end);
    let begun = Instant::now();
    let mut pace = Pace { next: begun, period: Duration::from_secs(1) / options.rate.max(1) };
    net::emit(&serde_json::json!({"event": "started"}));
    let base = now() << 20;
    for number in 0_u64.. {
        tokio::select! {
            _ = term.recv() => break,
            () = &mut end => break,
            () = tokio::time::sleep_until(pace.next.into()) => {}
        }
        let missed = pace.step(Instant::now());
        with(&report, |report| report.missed += missed);
        let target = targets[usize::try_from(number).unwrap_or(0) % targets.len()];
        let (report, bound) = (Arc::clone(&report), Duration::from_millis(options.timeout));
        tasks.spawn(async move { request(base | (number & 0xf_ffff), target, bound, &report).await });
    }
    with(&report, |report| report.seconds = begun.elapsed().as_secs_f64());
    stop.send_replace(true);
    while tasks.join_next().await.is_some() {}
    let mut report = report.lock().unwrap_or_else(PoisonError::into_inner).clone();
    report.ok = report.failures.is_empty() && report.broken_streams.is_empty() && report.gaps == 0;
    net::emit(&report);
    Ok(report.ok)
}

/// When connections are due: at a fixed rate from the beginning, so that a timer that is late delays none of those after.
struct Pace {
    next: Instant,
    period: Duration,
}

impl Pace {
    /// The next one, after one that was due has been begun `now`; how many are passed over because of a [`STALL`].
    fn step(&mut self, now: Instant) -> u64 {
        self.next += self.period;
        let late = now.saturating_duration_since(self.next);
        if late <= STALL {
            return 0;
        }
        let passed = u32::try_from(late.as_nanos() / self.period.as_nanos().max(1)).unwrap_or(u32::MAX);
        self.next += self.period * passed;
        passed.into()
    }
}

/// A step that failed.
struct Broken(&'static str, &'static str);

fn at(step: &'static str) -> impl Fn(io::Error) -> Broken {
    move |error| Broken(step, net::kind(&error))
}

async fn request(number: u64, target: SocketAddr, bound: Duration, report: &Shared) {
    let began = now();
    let mut connected = 0;
    with(report, |report| report.attempts += 1);
    let done = exchange(number, target, bound, &mut connected, report).await;
    match done {
        Ok(()) => with(report, |report| report.succeeded += 1),
        Err(Broken(step, kind)) => with(report, |report| {
            *report.failures.entry(format!("{step}-{kind}")).or_default() += 1;
            note(report, Failure { began, connected, ..failure(false, step, kind, target) });
        }),
    }
}

async fn exchange(
    number: u64,
    target: SocketAddr,
    bound: Duration,
    connected: &mut u64,
    report: &Shared,
) -> Result<(), Broken> {
    let mut stream = open(target, bound, connected, report).await?;
    let begun = Instant::now();
    let answer = net::within(bound, async {
        let mut message = vec![REQUEST];
        message.extend(number.to_be_bytes());
        stream.write_all(&message).await?;
        stream.read_u64().await
    });
    let answer = answer.await.map_err(at("answer"))?;
    if answer != number {
        return Err(Broken("answer", "wrong"));
    }
    let took = millis(begun);
    with(report, |report| report.slowest_answer_ms = report.slowest_answer_ms.max(took));
    Ok(())
}

async fn open(target: SocketAddr, bound: Duration, connected: &mut u64, report: &Shared) -> Result<TcpStream, Broken> {
    let begun = Instant::now();
    let stream = net::connect(target, bound).await.map_err(at("connect"))?;
    *connected = now();
    if begun.elapsed() > SLOW {
        return Err(Broken("connect", "slow"));
    }
    let took = millis(begun);
    with(report, |report| report.slowest_connect_ms = report.slowest_connect_ms.max(took));
    Ok(stream)
}

/// One stream after the other.
async fn streams(number: usize, target: SocketAddr, options: Options, report: Shared, stop: watch::Receiver<bool>) {
    // The first ones end one after the other, so that they do not all reconnect at once.
    let mut life = options.life * (number as u64 + 1) / options.streams.max(1) as u64;
    while !*stop.borrow() {
        let began = now();
        let mut connected = 0;
        with(&report, |report| report.streams += 1);
        let done = stream(target, &options, Duration::from_millis(life), &mut connected, &report, stop.clone()).await;
        match done {
            Ok(()) => with(&report, |report| report.ended_streams += 1),
            Err(Broken(step, kind)) => {
                with(&report, |report| {
                    *report.broken_streams.entry(format!("{step}-{kind}")).or_default() += 1;
                    note(report, Failure { began, connected, ..failure(true, step, kind, target) });
                });
                tokio::time::sleep(Duration::from_millis(options.interval)).await;
            }
        }
        life = options.life;
    }
}

async fn stream(
    target: SocketAddr,
    options: &Options,
    life: Duration,
    connected: &mut u64,
    report: &Shared,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Broken> {
    let bound = Duration::from_millis(options.timeout);
    let (mut reader, mut writer) = open(target, bound, connected, report).await?.into_split();
    let write = async {
        writer.write_all(&[STREAM]).await?;
        let end = tokio::time::Instant::now() + life;
        let mut sent = 0_u64;
        while tokio::time::Instant::now() < end && !*stop.borrow() {
            writer.write_all(&sent.to_be_bytes()).await?;
            sent += 1;
            with(report, |report| report.sent += 1);
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(options.interval)) => {}
                _ = stop.changed() => {}
            }
        }
        writer.shutdown().await?;
        Ok(sent)
    };
    let read = async {
        let (mut expected, mut buffer) = (0_u64, [0; 8]);
        loop {
            match net::within(bound, reader.read_exact(&mut buffer)).await {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(expected),
                Err(error) => return Err(error),
            }
            let number = u64::from_be_bytes(buffer);
            with(report, |report| {
                report.returned += 1;
                report.gaps += u64::from(number != expected);
            });
            expected = number.wrapping_add(1);
        }
    };
    let (sent, returned) = tokio::try_join!(write, read).map_err(at("answer"))?;
    if sent == returned { Ok(()) } else { Err(Broken("answer", "eof")) }
}

fn failure(stream: bool, step: &str, kind: &str, target: SocketAddr) -> Failure {
    Failure { stream, step: step.to_owned(), kind: kind.to_owned(), target, began: 0, connected: 0, ended: now() }
}

fn note(report: &mut Report, failure: Failure) {
    if report.failed.len() < DESCRIBED {
        report.failed.push(failure);
    }
}

fn with<T>(report: &Shared, work: impl FnOnce(&mut Report) -> T) -> T {
    work(&mut report.lock().unwrap_or_else(PoisonError::into_inner))
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_when_timers_are_late_and_a_stall_is_no_burst() {
        let begun = Instant::now();
        let period = Duration::from_millis(5);
        let mut pace = Pace { next: begun, period };
        for number in 1..=200 {
            let late = Duration::from_micros(1100 * (number % 7));
            assert_eq!(pace.step(pace.next + late), 0);
        }
        assert_eq!(pace.next, begun + period * 200, "two hundred in a second, however late each was");
        assert_eq!(pace.step(begun + Duration::from_secs(3)), 399, "two seconds were lost");
        assert_eq!(pace.next, begun + Duration::from_secs(3));
    }
}
