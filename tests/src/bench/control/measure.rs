//! One run: load, sync, changes.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::api::Api;
use super::board::{Board, Mark};
use super::client::{self, Common};
use super::population::Population;
use super::server::{Server, Used};
use crate::bench::progress;

/// Bounds: of loading, of all clients' first state, of one change.
const LOAD: Duration = Duration::from_secs(300);
const SYNC: Duration = Duration::from_secs(1_800);
const CHANGE: Duration = Duration::from_secs(60);
/// For memory to come to rest.
const REST: Duration = Duration::from_secs(5);
/// Between two changes: more than what they are gathered for.
const PAUSE: Duration = Duration::from_millis(30);
/// Goals: most memory, in bytes; the 99th percentile of changes, in milliseconds; and how much more processor time a change may take
/// with ten times the pods.
const MEMORY: u64 = 1 << 30;
const SOON_MS: f64 = 100.0;
const RATIO: f64 = 1.5;
/// Changes before those that are measured.
const WARM_UP: usize = 5;

/// The figures of one run.
#[derive(Debug, Serialize)]
pub struct Run {
    pods: usize,
    services: usize,
    nodes: usize,
    clients: usize,
    changes: usize,
    loaded: Loaded,
    synced: Synced,
    changed: Changed,
}

#[derive(Debug, Serialize)]
struct Loaded {
    seconds: f64,
    resident: u64,
}

#[derive(Debug, Serialize)]
struct Synced {
    seconds: f64,
    cpu_seconds: f64,
    bytes: u64,
    resident: u64,
    peak: u64,
    reconnects: u64,
}

#[derive(Debug, Serialize)]
struct Changed {
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    cpu_ms: f64,
    resident: u64,
}

/// Measures a culvertd.
///
/// # Errors
/// Something did not come about; the text says what.
pub async fn run(program: &Path, population: Population, clients: usize, changes: usize) -> Result<Run, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let folder = tempfile::tempdir().map_err(|e| text(&e))?;
    let (api, address) = Api::serve(population).await.map_err(|e| text(&e))?;
    let begun = Instant::now();
    let server = {
        let (program, folder) = (program.to_owned(), folder.path().to_owned());
        let started = tokio::task::spawn_blocking(move || Server::start(&program, address, &folder));
        started.await.map_err(|e| text(&e))?.map_err(|e| text(&e))?
    };
    until_ready(server.ready, LOAD).await.map_err(|error| format!("{error}; {}", server.log_tail()))?;
    let loaded = Loaded { seconds: begun.elapsed().as_secs_f64(), resident: used(&server)?.resident };
    progress(&format!("  loaded: {:.1} s, {}", loaded.seconds, mebibytes(loaded.resident)));

    let roots = until_published(&api).await?;
    let common = Arc::new(Common {
        address: server.xds,
        tls: connector(&roots)?,
        resources: population.pods + population.services,
        board: Board::default(),
    });
    let board = &common.board;
    let mut tasks = JoinSet::new();
    let (begun, before) = (Instant::now(), used(&server)?);
    for number in 0..clients {
        tasks.spawn(client::run(number, common.clone()));
    }
    let with_log = |error: String| format!("{error}; culvertd's log ends:\n{}", server.log_tail());
    board.all_synced(clients, SYNC).await.map_err(with_log)?;
    let (seconds, after) = (begun.elapsed().as_secs_f64(), used(&server)?);
    tokio::time::sleep(REST).await;
    let rested = used(&server)?;
    let synced = Synced {
        seconds,
        cpu_seconds: after.cpu - before.cpu,
        bytes: board.bytes.load(Ordering::Relaxed),
        resident: rested.resident,
        peak: rested.peak,
        reconnects: board.again.load(Ordering::Relaxed),
    };
    progress(&format!("  synced: {seconds:.1} s, {}", mebibytes(synced.resident)));
    if let Some(trouble) = board.last_trouble() {
        progress(&format!("  {} streams were opened again; the last one: {trouble}", synced.reconnects));
    }
    if board.wrong.load(Ordering::SeqCst) > 0 {
        return Err(board.all_synced(usize::MAX, Duration::ZERO).await.err().unwrap_or_default());
    }
    let changed = measure_changes(&server, &api, board, population.pods, clients, changes).await.map_err(with_log)?;
    tasks.shutdown().await;
    tokio::task::spawn_blocking(move || server.stop()).await.map_err(|e| text(&e))?.map_err(|e| text(&e))?;
    let Population { pods, services, nodes } = population;
    Ok(Run { pods, services, nodes, clients, changes, loaded, synced, changed })
}

async fn measure_changes(
    server: &Server,
    api: &Api,
    board: &Board,
    pods: usize,
    clients: usize,
    changes: usize,
) -> Result<Changed, String> {
    let mut took = Vec::with_capacity(changes);
    let mut before = used(server)?;
    for number in 0..WARM_UP + changes {
        if number == WARM_UP {
            before = used(server)?;
        }
        // Spread over all of them: a prime that no usual number of pods is a multiple of.
        let pod = number * 7_919 % pods;
        let mark = Mark { number: number as u64 + 1, text: format!("change-{number:08}") };
        let time = board.change(mark, clients, CHANGE, |version| api.change_pod(pod, version)).await?;
        if number >= WARM_UP {
            took.push(time.as_secs_f64() * 1_000.0);
        }
        tokio::time::sleep(PAUSE).await;
    }
    let after = used(server)?;
    took.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "a few thousand changes")]
    let cpu_ms = (after.cpu - before.cpu) * 1_000.0 / changes as f64;
    Ok(Changed {
        p50_ms: rank(&took, 50),
        p99_ms: rank(&took, 99),
        max_ms: rank(&took, 100),
        cpu_ms,
        resident: after.resident,
    })
}

/// The smallest of the sorted values that `percent` of them do not exceed; NaN if there is none.
fn rank(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

fn used(server: &Server) -> Result<Used, String> {
    server.used().map_err(|error| format!("{error}; {}", server.log_tail()))
}

async fn until_ready(address: SocketAddr, bound: Duration) -> Result<(), String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let ask = async || -> std::io::Result<bool> {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(answer.starts_with(b"HTTP/1.1 200"))
    };
    let wait = async {
        while !ask().await.is_ok_and(|ready| ready) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(bound, wait).await.map_err(|_| format!("culvertd is not ready after {bound:?}"))
}

async fn until_published(api: &Api) -> Result<String, String> {
    let wait = async {
        loop {
            if let Some(roots) = api.roots() {
                return roots;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(CHANGE, wait).await.map_err(|_| "culvertd publishes no root certificate".to_owned())
}

fn connector(roots_pem: &str) -> Result<TlsConnector, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(roots_pem.as_bytes()) {
        let certificate = certificate.map_err(|e| format!("the published roots: {e}"))?;
        roots.add(certificate).map_err(|e| format!("the published roots: {e}"))?;
    }
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A node connects once.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// The goals that were missed, each as a sentence.
pub fn missed(runs: &[Run]) -> Vec<String> {
    let mut missed = Vec::new();
    for run in runs {
        let most = run.synced.peak.max(run.changed.resident);
        if most > MEMORY {
            missed.push(format!("{} pods: {} of memory, more than {}", run.pods, mebibytes(most), mebibytes(MEMORY)));
        }
        // A figure that is none is not good.
        if !run.changed.p99_ms.is_finite() || run.changed.p99_ms > SOON_MS {
            let took = run.changed.p99_ms;
            missed.push(format!("{} pods: 99th percentile of changes {took:.1} ms, more than {SOON_MS} ms", run.pods));
        }
    }
    if let Some(ratio) = cost_ratio(runs).filter(|ratio| *ratio > RATIO) {
        missed.push(format!("a change costs {ratio:.2} times as much with ten times the pods, more than {RATIO}"));
    }
    missed
}

/// What a change costs in the last of two runs, as a multiple of the first.
fn cost_ratio(runs: &[Run]) -> Option<f64> {
    match runs {
        [few, many] if few.changed.cpu_ms > 0.0 => Some(many.changed.cpu_ms / few.changed.cpu_ms),
        _ => None,
    }
}

/// The figures for people.
pub fn table(runs: &[Run]) -> String {
    let mut lines = Vec::new();
    let mut row = |name: &str, cell: &dyn Fn(&Run) -> String| {
        let cells: String = runs.iter().map(|run| format!("{:>14}", cell(run))).collect();
        lines.push(format!("{name:<42}{cells}\n"));
    };
    row("pods", &|run| run.pods.to_string());
    row("services", &|run| run.services.to_string());
    row("clients", &|run| run.clients.to_string());
    row("loaded in", &|run| format!("{:.1} s", run.loaded.seconds));
    row("memory, loaded", &|run| mebibytes(run.loaded.resident));
    row("all clients synced in", &|run| format!("{:.1} s", run.synced.seconds));
    row("  processor time of culvertd", &|run| format!("{:.1} s", run.synced.cpu_seconds));
    row("  bytes to all clients", &|run| format!("{} MB", run.synced.bytes / 1_000_000));
    row("  streams opened again", &|run| run.synced.reconnects.to_string());
    row("memory, synced", &|run| mebibytes(run.synced.resident));
    row("memory, at most", &|run| mebibytes(run.synced.peak));
    row("one change to all clients, median", &|run| format!("{:.1} ms", run.changed.p50_ms));
    row("  99th percentile", &|run| format!("{:.1} ms", run.changed.p99_ms));
    row("  largest", &|run| format!("{:.1} ms", run.changed.max_ms));
    row("  processor time of culvertd", &|run| format!("{:.2} ms", run.changed.cpu_ms));
    row("memory, after the changes", &|run| mebibytes(run.changed.resident));
    if let Some(ratio) = cost_ratio(runs) {
        lines.push(format!("A change costs {ratio:.2} times as much with ten times the pods.\n"));
    }
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(peak: u64, p99_ms: f64, cpu_ms: f64) -> Run {
        Run {
            pods: 10,
            services: 1,
            nodes: 1,
            clients: 1,
            changes: 1,
            loaded: Loaded { seconds: 1.0, resident: 1 },
            synced: Synced { seconds: 1.0, cpu_seconds: 1.0, bytes: 1, resident: 1, peak, reconnects: 0 },
            changed: Changed { p50_ms: 1.0, p99_ms, max_ms: p99_ms, cpu_ms, resident: 1 },
        }
    }

    #[test]
    fn goals_that_are_missed_are_named() {
        assert_eq!(missed(&[run(1 << 30, 100.0, 2.0), run(1, 1.0, 3.0)]), Vec::<String>::new());
        let [memory] = missed(&[run((1 << 30) + 1, 1.0, 1.0)]).try_into().unwrap();
        assert!(memory.contains("of memory"), "{memory}");
        for late in [100.1, f64::NAN] {
            let [late] = missed(&[run(1, late, 1.0)]).try_into().unwrap();
            assert!(late.contains("99th percentile"), "{late}");
        }
        let [cost] = missed(&[run(1, 1.0, 1.0), run(1, 1.0, 1.6)]).try_into().unwrap();
        assert!(cost.contains("1.60 times"), "{cost}");
    }

    #[test]
    fn ranks() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!((rank(&values, 50), rank(&values, 99), rank(&values, 100)), (100.0, 198.0, 200.0));
        assert_eq!((rank(&[7.0], 50), rank(&[7.0], 99)), (7.0, 7.0));
        assert!(rank(&[], 50).is_nan());
    }
}
