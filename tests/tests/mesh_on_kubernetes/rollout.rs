//! Every part of the mesh is replaced by its controller, and then its root by another one, while connections are made and
//! streams are open: none fails.

use std::time::Instant;
use std::{fs, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tests::app::storm::Report;
use tests::wait;

use crate::cli;
use crate::mesh::{BOUND, Mesh, SYSTEM, text};
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
    mesh.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"]).unwrap();
    mesh.until_pods("shop", true);
    let server = text(&mesh.pod_of("shop", "server"), "/status/podIP");
    let target = format!("{server}:7000");
    let ready = mesh.run("shop", "client", &["connect", "--to", &target]);
    assert_eq!(ready["ok"], true, "{ready}");

    let load = ["storm", "--to", &target, "--rate", RATE, "--streams", "20", "--seconds", SECONDS];
    let report: Report = thread::scope(|scope| {
        let storm = scope.spawn(|| mesh.run("shop", "client", &load));
        for part in ["daemonset/culvert-node", "daemonset/ztunnel", "deployment/culvertd"] {
            mesh.kubectl(&["rollout", "restart", part, "--namespace", SYSTEM]).unwrap();
            mesh.rolled_out();
        }
        // One replica of the control plane goes without a word.
        let replica = text(&mesh.pods(SYSTEM).into_iter().find(is_culvertd).expect("a replica"), "/metadata/name");
        mesh.kubectl(&["delete", "pod", &replica, "--namespace", SYSTEM, "--grace-period=0", "--force"]).unwrap();
        mesh.rolled_out();
        without_control_plane(&mesh, &target);
        let begun = Instant::now();
        rotate(&mesh);
        eprintln!("another root after {:.1?}", begun.elapsed());
        kill(storm_to(&target).expect("the load runs"), Signal::SIGTERM).unwrap();
        serde_json::from_value(storm.join().expect("no panic")).unwrap()
    });
    eprintln!("rolled out under load: {report:?}");
    assert!(report.ok, "{report:#?}\n{}", mesh.state());
    assert!(report.attempts > 500 && report.ended_streams > 20, "too little load to show anything: {report:?}");
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
