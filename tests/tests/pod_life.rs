//! The life of a pod, from its first instruction to the reuse of its address, through the CNI plugin, while agents die
//! and labels change. `CULVERT_STARTS=200` for the long run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "the figures of a run")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{connect, echo_any, until_connected};
use tests::Error;
use tests::cluster::Cluster;
use tests::families::Families;
use tests::kube::DATAPLANE_MODE;
use tests::metrics;
use tests::pod::Pod;

const MARKER: &str = "marker-of-pods-that-kept-their-label";
const CHANGED: &str = "marker-of-pods-whose-label-changed";
const BOUND: Duration = Duration::from_secs(20);

fn starts() -> usize {
    std::env::var("CULVERT_STARTS").ok().and_then(|r| r.parse().ok()).unwrap_or(30)
}

/// Connections to the pod `open` that the proxies carried, as they report them.
fn carried_to_open(cluster: &Cluster) -> f64 {
    let one = |node| {
        let text = cluster.node(node).unwrap().metrics().unwrap();
        let labels = [("reporter", "source"), ("destination_workload", "open")];
        metrics::sum(&text, "istio_tcp_connections_opened_total", &labels)
    };
    one(1) + one(2)
}

#[test]
fn the_first_instruction_of_a_pod_is_captured() -> Result<(), Error> {
    let cluster = Cluster::builder().cni().families(Families::Dual).capture(MARKER).also_look_for(CHANGED).start()?;
    let server = echo_any(&cluster, "server", 2).enrolled(true).start();
    let server = server.inspect_err(|_| eprintln!("{}", cluster.logs(30)))?;
    let open = echo_any(&cluster, "open", 1).enrolled(false).start()?;
    let probe = cluster.pod("probe").node(1).enrolled(true).start()?;
    until_connected(&probe, &server.at(7000).to_string());
    let (next, done, refused) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicUsize::new(0));
    let accepted = || open.application().log_tail(100_000).matches("\"event\":\"accepted\"").count();
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| kill_agents(&cluster, &done));
        let starters = [(); 3].map(|()| {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= starts() {
                        return;
                    }
                    if let Err(error) = start_one(&cluster, number, &server, &open) {
                        eprintln!("start {number}: {error}");
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        });
        for starter in starters {
            starter.join().expect("no panic");
        }
        done.store(true, Ordering::Relaxed);
        killer.join().expect("no panic").expect("agents come back");
    });
    eprintln!("{} starts, {} refused for want of an agent", starts(), refused.load(Ordering::Relaxed));
    assert!(refused.load(Ordering::Relaxed) * 5 < starts(), "most pods do start");
    let marked = |number: usize| number % 3 != 2;
    assert!((0..starts()).any(marked));
    // Whoever came round the mesh to a target outside it would have been accepted there without having been carried.
    tests::wait::until("every connection to the target outside is in the proxies' reports", BOUND, || {
        (carried_to_open(&cluster) >= accepted() as f64).then_some(())
    })?;
    assert!(accepted() > starts() / 2, "the target outside was reached, {}", accepted());
    let report = cluster.finish_capture()?;
    let leaked: Vec<_> = report.marked(MARKER).collect();
    assert!(leaked.is_empty(), "in clear: {leaked:#?}");
    Ok(())
}

/// Every third pod's label is changed while it starts, and back; what such a pod sends is not looked at.
fn start_one(cluster: &Cluster, number: usize, server: &Pod, open: &Pod) -> Result<(), Error> {
    let name = format!("restless-{number}");
    let changes = number % 3 == 2;
    let text = if changes { CHANGED } else { MARKER };
    let targets = [server.at(7000).to_string(), server.at_v6(7000)?.to_string()];
    let mut args = vec!["restless", "--text", text, "--for", "300", "--to", &targets[0], "--to", &targets[1]];
    let outside = open.at(7000).to_string();
    if !changes {
        args = [&["restless", "--text", "nothing", "--for", "50", "--to", &outside][..], &[]].concat();
        if number.is_multiple_of(2) {
            args = vec!["restless", "--text", text, "--for", "300", "--to", &targets[0], "--to", &targets[1]];
        }
    }
    let pod = cluster.pod(&name).node(number % 2 + 1).enrolled(true).unsettled().command(args);
    let started = std::thread::scope(|scope| {
        let changer = changes.then(|| {
            scope.spawn(|| {
                for mode in ["none", "ambient"] {
                    std::thread::sleep(Duration::from_millis(60));
                    for mut record in cluster.directory().pods().into_iter().filter(|record| record.name == name) {
                        record.labels.insert(DATAPLANE_MODE.to_owned(), mode.to_owned());
                        // It may be gone by now.
                        let _ = cluster.directory().put_pod(&record);
                    }
                }
            })
        });
        let started = pod.start();
        if let Some(changer) = changer {
            changer.join().expect("no panic");
        }
        started
    });
    let pod = started?;
    tests::wait::until("the pod has done its work", BOUND, || pod.application().pid().is_none().then_some(()))?;
    cluster.delete(&pod)
}

/// Kills an agent at a moment that nobody chose, again and again.
fn kill_agents(cluster: &Cluster, done: &AtomicBool) -> Result<(), Error> {
    let mut turn = 0;
    while !done.load(Ordering::Relaxed) {
        let noise = u64::from(std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.subsec_micros()));
        std::thread::sleep(Duration::from_millis(150 + noise % 700));
        let agent = cluster.node(turn % 2 + 1)?.agent()?;
        turn += 1;
        agent.kill()?;
        std::thread::sleep(Duration::from_millis(noise % 300));
        agent.start()?;
    }
    Ok(())
}

/// The node comes back with nothing; pods are started before its agent, and the control plane comes last.
#[test]
fn after_a_reboot_nobody_runs_uncaptured_and_nobody_waits_who_need_not() -> Result<(), Error> {
    let cluster = Cluster::builder().cni().capture(MARKER).start()?;
    let server = echo_any(&cluster, "server", 2).enrolled(true).start()?;
    let before = cluster.pod("client").node(1).enrolled(true).start()?;
    let to = server.at(7000).to_string();
    until_connected(&before, &to);
    cluster.power_off(1)?;
    drop(before);
    cluster.control()?.component.kill()?;

    let (node, start) = (cluster.node(1)?, Instant::now());
    let begin = |name: &str, namespace: &str| {
        let pod = cluster.pod(name).namespace(namespace).node(1).unsettled();
        let pod = if namespace == "default" { pod.enrolled(true) } else { pod };
        let args = ["restless", "--text", MARKER, "--for", "3000", "--to", &to];
        pod.command(args).start().map(|pod| (pod, start.elapsed()))
    };
    let late = Duration::from_secs(3);
    std::thread::scope(|scope| -> Result<(), Error> {
        let client = scope.spawn(|| begin("client", "default"));
        let second = scope.spawn(|| begin("second", "default"));
        for (name, namespace) in [("dns", "kube-system"), ("culvert-node", "culvert-system")] {
            let pod = cluster.pod(name).namespace(namespace).node(1).unsettled().start()?;
            assert!(start.elapsed() < late, "{namespace} waited for the agent");
            assert!(!pod.captured());
        }
        std::thread::sleep(late.saturating_sub(start.elapsed()));
        node.agent()?.start()?;
        for pod in [client, second] {
            let (pod, when) = pod.join().expect("no panic")?;
            assert!(when >= late, "{} started without an agent", pod.name());
            assert!(cluster.agent(1)?.knows(&pod.uid())?, "{} is not enrolled", pod.name());
        }
        Ok(())
    })?;
    cluster.control()?.component.start()?;
    node.proxy()?.start()?;
    let client = cluster.pods().into_iter().find(|pod| pod.name() == "client").expect("the client");
    client.wait_known()?;
    until_connected(&client, &to);
    let report = cluster.finish_capture()?;
    let leaked: Vec<_> = report.marked(MARKER).collect();
    assert!(leaked.is_empty(), "in clear: {leaked:#?}");
    Ok(())
}

/// Lines of a proxy's log about connections from that address, without the first `skip` lines of the log.
fn reported(cluster: &Cluster, node: usize, from: &Pod, skip: usize) -> Vec<String> {
    let log = cluster.node(node).unwrap().proxy().unwrap().log_tail(100_000);
    let from = format!("src.addr={}:", from.ip());
    log.lines().skip(skip).filter(|line| line.contains(&from) && line.contains("inbound")).map(str::to_owned).collect()
}

#[test]
fn a_pod_with_the_address_of_another_has_its_own_identity() -> Result<(), Error> {
    let cluster = Cluster::builder().capture(MARKER).start()?;
    let server = echo_any(&cluster, "server", 2).enrolled(true).start()?;
    let one = cluster.pod("one").node(1).service_account("one").enrolled(true).start()?;
    let to = server.at(7000).to_string();
    until_connected(&one, &to);
    let held = one.spawn(["hold", "--to", &to, "--interval", "5", "--connections", "20"])?;
    held.wait_for("\"event\":\"alive\"", BOUND)?;
    let addresses = one.ips();
    // Deleted while its connections run.
    cluster.delete(&one)?;
    drop((held, one));
    let skip = cluster.node(2)?.proxy()?.log_tail(100_000).lines().count();
    let two = cluster.pod("two").node(1).service_account("two").addresses(&addresses).enrolled(true).start()?;
    for _ in 0..20 {
        let seen = connect(&two, &to, &["--send", "MARKER", "--read", "5"]);
        assert!(seen.ok, "{seen:?}");
    }
    let lines = tests::wait::until("the connections are reported", BOUND, || {
        let lines = reported(&cluster, 2, &two, skip);
        (lines.iter().filter(|line| line.contains("sa/two\"")).count() >= 20).then_some(lines)
    })?;
    let new: Vec<_> = lines.iter().filter(|line| !line.contains("sa/two\"") && !line.contains("error")).collect();
    assert!(new.iter().all(|line| line.contains("duration=\"") && line.contains("sa/one")), "{new:#?}");

    // The reverse: the one that is called is another.
    let addresses = server.ips();
    let held = two.spawn(["hold", "--to", &to, "--interval", "5", "--connections", "20"])?;
    held.wait_for("\"event\":\"alive\"", BOUND)?;
    cluster.delete(&server)?;
    drop(server);
    let ended = held.finish(BOUND)?;
    assert!(!ended.status.success(), "its connections end with it");
    let other: Arc<Pod> = echo_any(&cluster, "other", 2).enrolled(true).addresses(&addresses).start()?;
    let skip = cluster.node(1)?.proxy()?.log_tail(100_000).lines().count();
    for _ in 0..20 {
        let seen = connect(&two, &to, &["--send", "MARKER", "--read", "5"]);
        assert!(seen.ok, "{seen:?}");
    }
    let log = cluster.node(1)?.proxy()?.log_tail(100_000);
    let to_other: Vec<&str> = log.lines().skip(skip).filter(|l| l.contains("direction=\"outbound\"")).collect();
    assert!(to_other.len() >= 19 && to_other.iter().all(|line| line.contains("sa/other\"")), "{to_other:#?}");
    assert_eq!(other.ips(), addresses);
    let report = cluster.finish_capture()?;
    assert_eq!(report.marked(MARKER).count(), 0, "in clear");
    Ok(())
}
