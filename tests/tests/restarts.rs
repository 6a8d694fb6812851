//! Replacing any part of a node's mesh costs no connection that can be saved: 200 new connections per second and 50
//! numbered streams, on one node and across nodes, counted at both ends, while agents and proxies are killed and
//! replaced. `CULVERT_ROUNDS=10` for the long run; by default each case happens twice.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "the figures of a run")]

mod common;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::storm::{Storm, settled};
use tests::Error;
use tests::app::storm::{Failure, Report, now};
use tests::cluster::Cluster;
use tests::families::Families;
use tests::pod::Pod;

/// Longer than the streams live, shorter than the proxy's own limit.
const DRAINED: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(1200);

/// One at a time: each wants the machine for itself.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rounds() -> usize {
    std::env::var("CULVERT_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(2)
}

/// A cluster with a client on node 1 and a server on either node.
struct Stage {
    cluster: Cluster,
    servers: Vec<Arc<Pod>>,
    client: Arc<Pod>,
}

impl Stage {
    fn start() -> Result<Self, Error> {
        let cluster = Cluster::builder().families(Families::Dual).start()?;
        let server = |name: &str, node| {
            let pod = cluster.pod(name).node(node).service_account(name).enrolled(true);
            pod.command(["numbered", "--listen", "[::]:7000"]).start()
        };
        let servers = vec![server("near", 1)?, server("far", 2)?];
        let client = cluster.pod("client").node(1).service_account("client").enrolled(true).start()?;
        Ok(Self { cluster, servers, client })
    }

    /// Runs `event` once per round under load, the nodes taking turns; gives what the client counted, with the times at
    /// which each event began, when both ends agree.
    fn under_load(
        &self,
        what: &str,
        event: impl Fn(&Cluster, usize) -> Result<(), Error>,
    ) -> Result<(Report, Vec<u64>), Error> {
        let storm = Storm::start(&self.client, &self.servers)?;
        let mut begun = Vec::new();
        settled(PAUSE);
        for round in 0..rounds() {
            begun.push(now());
            event(&self.cluster, round % 2 + 1).inspect_err(|_| eprintln!("{}", self.cluster.logs(15)))?;
            settled(PAUSE);
        }
        let (report, counts) = storm.finish()?;
        eprintln!("{what}: {} rounds, {report:?}; at the servers {counts:?}", rounds());
        if !report.failures.is_empty() {
            eprintln!("{}", self.cluster.logs(40));
        }
        assert_eq!((report.gaps, counts.gaps, counts.duplicates), (0, 0, 0), "{what}");
        let lost: u64 = report.failures.values().sum();
        assert_eq!(report.attempts, report.succeeded + lost, "{what}");
        assert!((report.succeeded..=report.succeeded + lost).contains(&counts.requests), "{what}: the ends disagree");
        assert!(counts.messages <= report.sent && counts.messages >= report.returned, "{what}: the ends disagree");
        if report.broken_streams.is_empty() {
            assert_eq!((counts.messages, counts.messages), (report.sent, report.returned), "{what}");
            assert_eq!((counts.streams, counts.ended_streams), (report.streams, report.ended_streams), "{what}");
        }
        eprintln!("{what}: {:.0} new connections per second", report.attempts as f64 / report.seconds);
        assert!(report.attempts > 100 * rounds() as u64, "{what}: too little load to show anything");
        assert!(report.missed <= report.attempts / 10, "{what}: the machine is too busy for this load");
        Ok((report, begun))
    }
}

fn nothing_failed(what: &str, report: &Report) {
    assert!(report.ok, "{what}: {:?} {:?} {:#?}", report.failures, report.broken_streams, report.failed);
}

fn proxy_in_order(cluster: &Cluster, node: usize) -> Result<(), Error> {
    let old = cluster.replace_proxy(node)?;
    assert!(old.wait(DRAINED)?.success(), "the old proxy ends well before its limit");
    Ok(())
}

fn agent_in_order(cluster: &Cluster, node: usize) -> Result<(), Error> {
    assert!(cluster.node(node)?.agent()?.supersede(Duration::from_secs(10))?.success());
    Ok(())
}

#[test]
fn orderly_replacement_of_the_proxy_fails_nothing() -> Result<(), Error> {
    let _turn = alone();
    let (report, _) = Stage::start()?.under_load("proxy replaced", proxy_in_order)?;
    nothing_failed("proxy replaced", &report);
    Ok(())
}

#[test]
fn orderly_replacement_of_the_agent_and_of_both_fails_nothing() -> Result<(), Error> {
    let _turn = alone();
    let stage = Stage::start()?;
    let (report, _) = stage.under_load("agent replaced", agent_in_order)?;
    nothing_failed("agent replaced", &report);
    let both = |cluster: &Cluster, node: usize| {
        std::thread::scope(|scope| {
            let agent = scope.spawn(|| agent_in_order(cluster, node));
            proxy_in_order(cluster, node)?;
            agent.join().expect("no panic")
        })
    };
    let (report, _) = stage.under_load("both replaced", both)?;
    nothing_failed("both replaced", &report);
    Ok(())
}

#[test]
fn killing_the_agent_fails_nothing() -> Result<(), Error> {
    let _turn = alone();
    let kill = |cluster: &Cluster, node: usize| {
        let agent = cluster.node(node)?.agent()?;
        agent.kill()?;
        settled(Duration::from_millis(300));
        agent.start()
    };
    let (report, _) = Stage::start()?.under_load("agent killed", kill)?;
    nothing_failed("agent killed", &report);
    Ok(())
}

/// What the dying proxy carried breaks; whoever connects afterwards is served by the next.
#[test]
fn killing_the_proxy_fails_no_new_connection() -> Result<(), Error> {
    let _turn = alone();
    let kill = |cluster: &Cluster, node: usize| {
        let proxy = cluster.node(node)?.proxy()?;
        proxy.kill()?;
        proxy.start()
    };
    let (report, begun) = Stage::start()?.under_load("proxy killed", kill)?;
    // A connection that was established when a proxy was killed, within the time that the kill took, and failed after it.
    let broken_by = |kill: &u64, one: &Failure| one.connected <= kill + 50_000 && one.ended >= *kill;
    let was_open = |one: &Failure| one.connected > 0 && begun.iter().any(|kill| broken_by(kill, one));
    let new: Vec<_> = report.failed.iter().filter(|one| !was_open(one)).collect();
    assert!(new.is_empty(), "{new:#?}");
    let refused = report.failures.keys().any(|kind| kind.starts_with("connect"));
    assert!(!refused, "{:?}", report.failures);
    Ok(())
}
