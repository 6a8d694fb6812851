//! Every part of the mesh is replaced by its controller, and then its root by another one, while connections are made and
//! streams are open: none fails.

use std::time::Instant;
use std::{fs, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tests::app::numbered::Counts;
use tests::app::storm::Report;
use tests::wait;

use crate::cli;
use crate::mesh::{BOUND, Mesh, REDIRECTION, SYSTEM, is_ready, text};
use crate::rotation::rotate;

/// New connections per second; on the same two cores run Kubernetes and everything that is replaced.
const RATE: &str = "100";
/// Longer than all that is done meanwhile takes.
const SECONDS: &str = "300";

#[test]
fn every_part_and_the_root_are_replaced_under_load_and_no_connection_fails() {
    let mesh = Mesh::install(&[]);
    let objects = include_str!("shop.yaml").replace("NAMESPACE", "shop").replace("SERVER", "numbered");
    mesh.cluster.apply("shop.yaml", &objects).unwrap();
    mesh.cluster.apply("near.yaml", include_str!("near.yaml")).unwrap();
    mesh.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"]).unwrap();
    mesh.until_pods("shop", true);
    let server = text(&mesh.pod_of("shop", "server"), "/status/podIP");
    let target = format!("{server}:7000");
    let service = mesh.cluster.api().get("/api/v1/namespaces/shop/services/near").unwrap().expect("the service");
    let near = format!("{}:7000", text(&service, "/spec/clusterIP"));
    let targets = [target.as_str(), near.as_str()];
    for to in targets {
        wait::until("the server is reached", BOUND, || {
            (mesh.run("shop", "client", &["connect", "--to", to])["ok"] == true).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    }
    let before = counts(&mesh, &targets);

    let load = ["storm", "--to", &target, "--to", &near, "--rate", RATE, "--streams", "20", "--seconds", SECONDS];
    let report: Report = thread::scope(|scope| {
        let storm = scope.spawn(|| mesh.run("shop", "client", &load));
        for part in ["daemonset/culvert-node", "daemonset/ztunnel", "deployment/culvertd"] {
            mesh.kubectl(&["rollout", "restart", part, "--namespace", SYSTEM]).unwrap();
            mesh.rolled_out();
        }
        for node in ["node1", "node2"] {
            mesh.crash(&mesh.part_on("culvert-node", node));
        }
        // One replica of the control plane goes without a word.
        let replica = text(&mesh.pods(SYSTEM).into_iter().find(is_culvertd).expect("a replica"), "/metadata/name");
        mesh.kill(&replica);
        newcomer(&mesh, &target);
        mesh.rolled_out();
        hung_control_plane(&mesh, &target);
        without_control_plane(&mesh, &target);
        let begun = Instant::now();
        rotate(&mesh, &target);
        eprintln!("another root after {:.1?}", begun.elapsed());
        kill(storm_to(&target).expect("the load runs"), Signal::SIGTERM).unwrap();
        serde_json::from_value(storm.join().expect("no panic")).unwrap()
    });
    eprintln!("rolled out under load: {report:?}");
    assert!(report.ok, "{report:#?}\n{}", mesh.state());
    // Both ends saw the same.
    let after = counts(&mesh, &targets);
    assert_eq!(after.requests - before.requests, report.succeeded, "{after:?}");
    assert_eq!(after.streams - before.streams, report.streams, "{after:?}");
    assert_eq!(after.messages - before.messages, report.sent, "{after:?}");
    assert_eq!((report.gaps, after.gaps, after.duplicates), (0, 0, 0), "{after:?}");
    assert!(report.attempts > 5_000 && report.ended_streams > 20, "too little load to show anything: {report:?}");
}

/// What the servers counted, together.
fn counts(mesh: &Mesh, targets: &[&str]) -> Counts {
    let mut all = Counts::default();
    for to in targets {
        let said = mesh.run("shop", "client", &["connect", "--to", to, "--send", "q", "--read-line"]);
        let counts: Counts = serde_json::from_str(said["received"].as_str().unwrap_or_default())
            .unwrap_or_else(|error| panic!("{error}: {said}"));
        all.requests += counts.requests;
        all.duplicates += counts.duplicates;
        all.streams += counts.streams;
        all.messages += counts.messages;
        all.gaps += counts.gaps;
    }
    all
}

/// A pod that starts while a replica is gone is captured, gets its certificate from the others, and is heard of.
fn newcomer(mesh: &Mesh, target: &str) {
    let pod = include_str!("newcomer.yaml");
    mesh.cluster.apply("newcomer.yaml", pod).unwrap();
    wait::until("a new pod that is captured", BOUND, || {
        let pods = mesh.pods("shop");
        let pod = pods.iter().find(|pod| pod["metadata"]["labels"]["app"] == "newcomer")?;
        (is_ready(pod) && pod.pointer(REDIRECTION).is_some_and(|value| value == "enabled")).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    let before = mesh.unproven("shop");
    let seen = mesh.run("shop", "newcomer", &["connect", "--to", target]);
    assert_eq!(seen["ok"], true, "{seen}");
    assert_eq!(mesh.unproven("shop"), before, "it proved who it is");
}

/// Replicas that take connections and say nothing: neither does the webhook stand in anybody's way, nor do connections fail.
fn hung_control_plane(mesh: &Mesh, target: &str) {
    let replicas: Vec<Value> = mesh.pods(SYSTEM).into_iter().filter(is_culvertd).collect();
    let all = |signal| replicas.iter().for_each(|replica| mesh.signal(replica, signal));
    all(Signal::SIGSTOP);
    let labelled = mesh.kubectl(&["label", "namespace", "kube-public", "istio.io/dataplane-mode=none"]);
    let seen = mesh.run("shop", "client", &["connect", "--to", target]);
    // Else they would stay as they are after a failure.
    all(Signal::SIGCONT);
    labelled.unwrap();
    assert_eq!(seen["ok"], true, "{seen}");
    mesh.rolled_out();
}

/// With no replica of the control plane proxies go on with what they know, and `culvert` says so.
fn without_control_plane(mesh: &Mesh, target: &str) {
    let scale = |to: &str| {
        mesh.kubectl(&["scale", "deployment/culvertd", to, "--namespace", SYSTEM]).unwrap();
    };
    scale("--replicas=0");
    let away =
        || !mesh.pods(SYSTEM).iter().any(|pod| pod["metadata"]["labels"]["app.kubernetes.io/name"] == "culvertd");
    wait::until("no replica of culvertd", BOUND, || away().then_some(())).unwrap();
    let status = cli::json(mesh, &["status"]);
    let said = status["problems"].to_string();
    assert!(status["healthy"] == false && said.contains("has no replica; the proxies go on"), "{status:#}");
    let seen = mesh.run("shop", "client", &["connect", "--to", target]);
    assert_eq!(seen["ok"], true, "{seen}");
    // Its webhook does not stand in anybody's way.
    mesh.kubectl(&["label", "namespace", "default", "istio.io/dataplane-mode=none"]).unwrap();
    scale("--replicas=2");
    mesh.rolled_out();
}

/// The load's process, as the machine sees it; none if it does not run.
pub fn storm_to(target: &str) -> Option<Pid> {
    let mut processes =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let runs = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let [program, command, _, to, ..] = words.as_slice() else { return false };
        program.ends_with("culvert-app") && command == "storm" && to == target
    };
    processes.find(runs).map(Pid::from_raw)
}

/// A replica that stays: not one of those that the roll-out has replaced.
fn is_culvertd(pod: &Value) -> bool {
    let metadata = &pod["metadata"];
    metadata["labels"]["app.kubernetes.io/name"] == "culvertd" && metadata["deletionTimestamp"].is_null()
}
