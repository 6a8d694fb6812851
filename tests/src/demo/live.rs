//! The demo without `--once`: URL, identities, live connections, commands to try, until Ctrl-C.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use super::{Sample, print, talkers};
use crate::Error;
use crate::error::Context;

/// Time between requests that the demo makes by itself, so that something is seen to happen.
const REQUESTS: Duration = Duration::from_secs(5);

/// A flag that Ctrl-C, SIGTERM and SIGHUP set. A second one ends the program at once; the next run cleans up.
pub(crate) fn interrupts() -> Result<Arc<AtomicBool>, Error> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    let what = || "waiting for signals".to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().during(what)?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
                let [Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)] = kinds.map(signal) else { return };
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                        _ = hangup.recv() => {}
                    }
                    if set.swap(true, Ordering::Relaxed) {
                        std::process::exit(130);
                    }
                }
            });
        })
        .during(what)?;
    Ok(flag)
}

/// Shows what happens until interrupted.
pub(super) fn watch(sample: &Sample, interrupted: &AtomicBool) -> Result<(), Error> {
    for _ in 0..6 {
        sample.request()?;
    }
    print::line(&format!("\n  {}\n", sample.url()));
    print::line("Who talks to whom");
    print::talks(&talkers::all(&sample.cluster)?);
    print::line("\nTo try (as root)");
    for line in commands(sample)? {
        print::line(&format!("  {line}"));
    }
    print::line("\nConnections as they end, until Ctrl-C:");
    let mut logs = Vec::new();
    for node in sample.cluster.nodes() {
        logs.push(Tail::open(&node.name, &node.proxy()?.spec().log)?);
    }
    let mut last = Instant::now();
    while !interrupted.load(Ordering::Relaxed) {
        for log in &mut logs {
            log.show();
        }
        if last.elapsed() > REQUESTS {
            if let Err(error) = sample.request() {
                print::line(&format!("  the page request failed: {error}"));
            }
            last = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn commands(sample: &Sample) -> Result<Vec<String>, Error> {
    let mut lines = vec![format!("curl -s {} | grep reviews", sample.url())];
    for node in sample.cluster.nodes() {
        let pid = node.proxy()?.pid().unwrap_or_default();
        lines.push(format!(
            "nsenter -t {pid} -n curl -s localhost:15000/config_dump   # what {}'s proxy knows",
            node.name
        ));
    }
    let node = sample.cluster.node(1)?;
    let pid = node.proxy()?.pid().unwrap_or_default();
    lines.push(format!("nsenter -t {pid} -n curl -s localhost:15020/metrics | grep istio_tcp"));
    lines.push(format!(
        "nsenter --net={} tcpdump -nni eth0 tcp            # what passes between the nodes",
        node.network().path().display()
    ));
    lines.push(format!(
        "nsenter --net={} ss -tnp                          # the product page's own view",
        sample.page.network().path().display()
    ));
    lines.push(format!("grep -E 'Cap|NoNewPrivs|Seccomp' /proc/{pid}/status           # what the proxy may do"));
    let folder = sample.cluster.folder();
    lines.push(format!("ls {}                     # the YAML that culvertd reads", folder.join("source").display()));
    lines.push(format!("ls {}                       # all logs", folder.join("logs").display()));
    Ok(lines)
}

/// The end of a proxy's log, followed.
struct Tail {
    node: String,
    reader: BufReader<File>,
    partial: String,
}

impl Tail {
    fn open(node: &str, path: &Path) -> Result<Self, Error> {
        let file = File::open(path).during(|| format!("opening {}", path.display()))?;
        let mut tail = Self { node: node.to_owned(), reader: BufReader::new(file), partial: String::new() };
        // What was said before is over.
        while tail.next().is_some() {}
        Ok(tail)
    }

    /// A whole line, if there is one.
    fn next(&mut self) -> Option<String> {
        match self.reader.read_line(&mut self.partial) {
            Ok(1..) if self.partial.ends_with('\n') => Some(std::mem::take(&mut self.partial)),
            _ => None,
        }
    }

    fn show(&mut self) {
        while let Some(line) = self.next() {
            if let Some(short) = shorten(&line) {
                print::line(&format!("  {}  {short}", self.node));
            }
        }
    }
}

/// The access log's line for people; None for other lines.
fn shorten(line: &str) -> Option<String> {
    let (_, text) = line.split_once("connection complete")?;
    let fields: BTreeMap<String, String> = split_fields(text)
        .filter_map(|field| field.split_once('=').map(|(n, v)| (n.to_owned(), v.trim_matches('"').to_owned())))
        .collect();
    let of = |name: &str| fields.get(name).map(String::as_str);
    let end = |side: &str| of(&format!("{side}.workload")).or(of(&format!("{side}.addr"))).unwrap_or("?").to_owned();
    let secured = if of("src.identity").is_some() && of("dst.identity").is_some() { "mutual TLS" } else { "plaintext" };
    let mut short = format!("{:<8}  {} → {}", of("direction").unwrap_or("?"), end("src"), end("dst"));
    if let Some(service) = of("dst.service") {
        short += &format!(" ({})", service.split('.').next().unwrap_or(service));
    }
    let bytes = |name: &str| of(name).unwrap_or("?").to_owned();
    let duration = of("duration").unwrap_or("?");
    short += &format!("  {secured}  {} B sent, {} B received, {duration}", bytes("bytes_sent"), bytes("bytes_recv"));
    if let Some(error) = of("error") {
        short += &format!("  FAILED: {error}");
    }
    Some(short)
}

/// Fields `name=value`, where a value in quotes may hold spaces.
fn split_fields(text: &str) -> impl Iterator<Item = String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    for character in text.trim().chars() {
        if character == ' ' && !quoted {
            fields.push(std::mem::take(&mut field));
            continue;
        }
        quoted ^= character == '"';
        field.push(character);
    }
    fields.push(field);
    fields.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_access_log_in_short() {
        let line = "2026-11-20T10:00:00Z info access connection complete src.addr=10.244.1.10:1 src.workload=\"a\" \
                    dst.addr=10.244.2.10:15008 dst.service=\"b.c\" direction=\"outbound\" bytes_sent=1 bytes_recv=2 \
                    duration=\"3ms\" policy=\"x y\" error=\"it is gone\"\n";
        let short = "outbound  a → 10.244.2.10:15008 (b)  plaintext  1 B sent, 2 B received, 3ms  FAILED: it is gone";
        assert_eq!(shorten(line).as_deref(), Some(short));
        assert_eq!(shorten("2026 INFO ready"), None);
    }
}
