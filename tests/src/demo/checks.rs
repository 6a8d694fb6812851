//! `--once`: requests, and what must be true of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::talkers::{self, Talk};
use super::{MARKER, Sample};
use crate::capture::{LinkKind, Report};
use crate::{Error, metrics, wait};

/// What `--once` found.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    pub ok: bool,
    pub url: String,
    pub requests: u32,
    /// Seconds that the requests took.
    pub seconds: f64,
    /// Answers by status; failed requests as 0.
    pub statuses: BTreeMap<u16, u32>,
    pub checks: Vec<Check>,
    pub talks: Vec<Talk>,
}

/// One thing that must be true.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub what: &'static str,
    pub ok: bool,
    pub detail: String,
}

impl Check {
    fn new(what: &'static str, ok: bool, detail: impl Into<String>) -> Self {
        Self { what, ok, detail: detail.into() }
    }
}

/// What the page requests gave.
#[derive(Debug, Default)]
struct Pages {
    statuses: BTreeMap<u16, u32>,
    versions: BTreeSet<&'static str>,
    first_problem: Option<String>,
}

/// Requests the page, then looks at what the proxies and the capture say.
pub(super) fn check(sample: &Sample, requests: u32, interrupted: &AtomicBool) -> Result<Summary, Error> {
    let before = carried(sample)?;
    let start = Instant::now();
    let pages = request(sample, requests, interrupted);
    let seconds = start.elapsed().as_secs_f64();
    // Connections are counted when they end, which may be a moment after the last page.
    let talked = wait::until("the identities", Duration::from_secs(5), || {
        talkers::all(&sample.cluster).ok().filter(|talks| missing_talk(talks).is_none())
    });
    let talks = talked.or_else(|_late| talkers::all(&sample.cluster))?;
    let after = carried(sample)?;
    let report = sample.cluster.recorder()?.finish();
    let mut checks = vec![
        answered(&pages, requests),
        Check::new("all three versions of reviews were seen", pages.versions.len() == 3, join(&pages.versions)),
        identities(&talks),
        Check::new("the tunnels carried the load", after > before, format!("{before} bytes before, {after} after")),
    ];
    checks.extend(wire(sample, &report));
    Ok(Summary {
        ok: checks.iter().all(|check| check.ok),
        url: sample.url(),
        requests: pages.statuses.values().sum(),
        seconds,
        statuses: pages.statuses,
        checks,
        talks,
    })
}

fn request(sample: &Sample, requests: u32, interrupted: &AtomicBool) -> Pages {
    let mut pages = Pages::default();
    for _ in 0..requests {
        if interrupted.load(Ordering::Relaxed) {
            pages.first_problem = Some("interrupted".to_owned());
            break;
        }
        let (status, problem) = match sample.request() {
            Ok(answer) => {
                let versions = ["v1", "v2", "v3"].into_iter();
                pages.versions.extend(versions.filter(|v| answer.body.contains(&format!("reviews {v} "))));
                (answer.status, (answer.status != 200).then_some(answer.body))
            }
            Err(error) => (0, Some(error.to_string())),
        };
        *pages.statuses.entry(status).or_default() += 1;
        if pages.first_problem.is_none() {
            pages.first_problem = problem;
        }
    }
    pages
}

fn answered(pages: &Pages, requests: u32) -> Check {
    let good = pages.statuses.get(&200).copied().unwrap_or(0);
    let mut detail = format!("{good} of {requests}");
    if let Some(problem) = &pages.first_problem {
        detail += &format!("; the first that was not: {}", problem.chars().take(300).collect::<String>());
    }
    Check::new("every page was answered with 200", good == requests && requests > 0, detail)
}

/// Workloads that must have talked, as beginnings of their names.
const EXPECTED: [(&str, &str); 4] =
    [("productpage", "details"), ("productpage", "reviews"), ("reviews-v2", "ratings"), ("reviews-v3", "ratings")];

fn missing_talk(talks: &[Talk]) -> Option<(&'static str, &'static str)> {
    EXPECTED.into_iter().find(|(from, to)| {
        !talks.iter().any(|t| {
            // The sample's service accounts are called bookinfo-<service>.
            let account = |workload: &str| format!("/sa/bookinfo-{}", workload.split('-').next().unwrap_or(workload));
            t.mutual_tls
                && t.source.starts_with(from)
                && t.destination.starts_with(to)
                && t.source_identity.ends_with(&account(from))
                && t.destination_identity.ends_with(&account(to))
        })
    })
}

fn identities(talks: &[Talk]) -> Check {
    let what = "every service was called by mutual TLS under the right identities";
    match missing_talk(talks) {
        None => Check::new(what, true, EXPECTED.map(|(from, to)| format!("{from} → {to}")).join(", ")),
        Some((from, to)) => Check::new(what, false, format!("no such connection from {from} to {to}")),
    }
}

/// Bytes that the proxies carried by mutual TLS.
fn carried(sample: &Sample) -> Result<f64, Error> {
    let mut bytes = 0.0;
    for node in sample.cluster.nodes() {
        let text = node.metrics()?;
        for name in ["istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total"] {
            bytes += metrics::sum(&text, name, &[("connection_security_policy", "mutual_tls")]);
        }
    }
    Ok(bytes)
}

/// What the capture says.
fn wire(sample: &Sample, report: &Report) -> Vec<Check> {
    let pods: Vec<IpAddr> = sample.pods.iter().map(|pod| pod.ip()).collect();
    let page = sample.page.ip();
    let packets: u64 = report.links.iter().map(|link| link.packets).sum();
    let complete = report.complete();
    let complete = Check::new(
        "the capture missed nothing",
        complete.is_ok() && packets > 0,
        complete.err().map_or_else(|| format!("{packets} packets on {} links", report.links.len()), |e| e.to_string()),
    );
    let inside =
        |flow: &crate::capture::Flow| pods.contains(&flow.source.ip()) && pods.contains(&flow.destination.ip());
    let leaks: Vec<_> = report.marked(MARKER).filter(|(_, flow)| inside(flow)).map(|(_, f)| f).collect();
    let clear = Check::new(
        "nothing between the services was seen in clear",
        leaks.is_empty(),
        leaks.first().map_or_else(|| "no marker found".to_owned(), |f| format!("{} → {}", f.source, f.destination)),
    );
    // The positive control: the browser is outside the mesh, so the page itself must be found in clear on its way.
    let from_page = report.marked(MARKER).filter(|(link, flow)| {
        flow.source.ip() == page && !inside(flow) && matches!(link.kind, LinkKind::Host { .. } | LinkKind::Node { .. })
    });
    let control = from_page.count();
    let control = Check::new(
        "the page on its way out of the mesh was (positive control)",
        control > 0,
        format!("{control} flows with the marker"),
    );
    let between: Vec<_> = report.between(&pods, &pods).map(|(_, flow)| flow).collect();
    let other = between.iter().find(|f| f.protocol != 6 || ![f.source.port(), f.destination.port()].contains(&15008));
    let plain = between.iter().find(|f| f.payload > 0 && !f.is_tls());
    let tunnels = Check::new(
        "between the services: port 15008 and TLS 1.3 records, nothing else",
        other.is_none() && plain.is_none() && !between.is_empty(),
        match other.or(plain) {
            Some(flow) => format!("{} → {}, protocol {}", flow.source, flow.destination, flow.protocol),
            None => format!("{} flows", between.len()),
        },
    );
    vec![complete, clear, control, tunnels]
}

fn join(versions: &BTreeSet<&'static str>) -> String {
    versions.iter().copied().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(source: &str, destination: &str, accounts: (&str, &str)) -> Talk {
        let identity = |account: &str| format!("spiffe://cluster.local/ns/bookinfo/sa/bookinfo-{account}");
        Talk {
            source: source.to_owned(),
            source_identity: identity(accounts.0),
            destination: destination.to_owned(),
            destination_identity: identity(accounts.1),
            mutual_tls: true,
            connections: 1.0,
            bytes: 1.0,
        }
    }

    #[test]
    fn a_wrong_identity_or_none_is_noticed() {
        let mut talks = vec![
            talk("productpage-v1", "details-v1", ("productpage", "details")),
            talk("productpage-v1", "reviews-v1", ("productpage", "reviews")),
            talk("reviews-v2", "ratings-v1", ("reviews", "ratings")),
            talk("reviews-v3", "ratings-v1", ("reviews", "ratings")),
        ];
        assert!(identities(&talks).ok);
        talks[3].source_identity = "unknown".to_owned();
        assert!(!identities(&talks).ok);
        talks[3] = talk("reviews-v3", "ratings-v1", ("reviews", "details"));
        assert!(!identities(&talks).ok);
        talks[3] = Talk { mutual_tls: false, ..talk("reviews-v3", "ratings-v1", ("reviews", "ratings")) };
        assert_eq!(missing_talk(&talks), Some(("reviews-v3", "ratings")));
    }

    #[test]
    fn one_bad_page_fails_the_check() {
        let mut pages = Pages { statuses: [(200, 10)].into(), ..Pages::default() };
        assert!(answered(&pages, 10).ok);
        assert!(!answered(&pages, 11).ok, "one was never sent");
        pages.statuses.insert(502, 1);
        assert!(!answered(&pages, 11).ok);
        assert!(!answered(&Pages::default(), 0).ok, "nothing asked is nothing shown");
    }
}
