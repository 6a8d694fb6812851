//! A real Kubernetes: an API server alone, a whole cluster, and the command that holds one. What they leave is compared
//! with what was there.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::{Value, json};
use tests::app::clients::connect::Report;
use tests::cluster::bin_dir;
use tests::kubernetes::{ApiServer, Kubernetes};
use tests::wait;

const BOUND: Duration = Duration::from_secs(90);
const WORKLOAD: &str = include_str!("kubernetes/workload.yaml");

/// Everything of clusters whose name has `mark` in it: groups, folders, processes, mounts.
fn left(mark: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut note = |kind: &str, text: &str| found.insert(format!("{kind} {text}"));
    for folder in ["/run/culvert-test", "/var/lib/culvert-test", "/run/culvert-cluster"] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            note("folder", &entry.path().to_string_lossy());
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    for line in mounts.lines() {
        note("mount", line);
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next().unwrap(), words.next().unwrap());
        for entry in fs::read_dir(at).into_iter().flatten().flatten().filter(|_| kind.starts_with("cgroup")) {
            note("group", &entry.path().to_string_lossy());
        }
    }
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        // Dead ones that the machine's first process has yet to take note of are not the cluster's.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['Z', 'X'])) {
            continue;
        }
        let group = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        note("process", &format!("{} {} {group}", entry.path().display(), String::from_utf8_lossy(&line)));
    }
    found.into_iter().filter(|text| text.contains(mark)).collect()
}

/// Settings of the whole machine that a kubelet would change.
fn settings() -> Vec<String> {
    let names =
        ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys"];
    names
        .iter()
        .map(|name| format!("{name} {:?}", fs::read_to_string(Path::new("/proc/sys").join(name)).ok()))
        .collect()
}

#[test]
fn an_api_server_alone() {
    let server = ApiServer::start().unwrap();
    let folder = server.kubeconfig().ancestors().nth(2).unwrap().to_owned();
    let api = server.api();
    api.create("/api/v1/namespaces", &json!({"metadata": {"name": "shop"}})).unwrap();
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "prices", "namespace": "shop"}, "data": {"a": "1"},
    });
    let path = "/api/v1/namespaces/shop/configmaps/prices";
    assert_eq!(api.apply(path, &map).unwrap()["data"]["a"], "1");

    let nobody = server.kubeconfig_for("nobody", "nobody", None).unwrap();
    let ask = |kubeconfig: &Path| {
        let mut kubectl = Command::new(Path::new(&std::env::var_os("KUBERNETES_BIN_DIR").unwrap()).join("kubectl"));
        kubectl.args(["get", "configmap", "prices", "--namespace", "shop", "--output", "json"]);
        kubectl.env("KUBECONFIG", kubeconfig).env("HOME", &folder).output().unwrap()
    };
    let seen: Value = serde_json::from_slice(&ask(server.kubeconfig()).stdout).unwrap();
    assert_eq!(seen["data"]["a"], "1");
    let refused = ask(&nobody);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Forbidden"), "{refused:?}");

    // What is stored outlives the API server.
    server.component.restart().unwrap();
    assert_eq!(api.get(path).unwrap().unwrap()["data"]["a"], "1");
    assert_eq!(api.get("/api/v1/namespaces/shop/configmaps/none").unwrap(), None);
    let mark = folder.file_name().unwrap().to_string_lossy().into_owned();
    drop(server);
    assert_eq!(left(&mark), BTreeSet::new());
}

/// Runs `culvert-app connect` in a pod and gives what it read, a line of JSON; the error is what was said instead.
fn banner(cluster: &Kubernetes, pod: &str, to: &str) -> Result<(Report, Value), String> {
    let args = ["exec", pod, "--", "culvert-app", "connect", "--to", to, "--read-line"];
    let said = cluster.kubectl(args).map_err(|error| error.to_string())?;
    let report: Report = serde_json::from_str(&said).map_err(|error| format!("{error}: {said}"))?;
    let read = serde_json::from_str(&report.received).map_err(|error| format!("{error}: {report:?}"))?;
    Ok((report, read))
}

#[test]
fn pods_on_two_nodes_reach_each_other_and_nothing_is_left() {
    let before = settings();
    let cluster = Kubernetes::builder().start().unwrap();
    let api = cluster.api();
    for node in cluster.nodes() {
        let object = api.get(&format!("/api/v1/nodes/{}", node.name)).unwrap().unwrap();
        assert_eq!(object["status"]["nodeInfo"]["kubeletVersion"], "v1.36.2");
        assert_eq!(object["spec"]["podCIDR"], node.pod_network());
    }
    cluster.apply("workload.yaml", WORKLOAD).unwrap();
    let apps = "/apis/apps/v1/namespaces/default";
    let available = |object: &Value| (object["status"]["availableReplicas"] == 2).then_some(());
    api.until("web is available", &format!("{apps}/deployments/web"), BOUND, available).unwrap();

    let pods = api.list("/api/v1/namespaces/default/pods?labelSelector=app%3Dweb").unwrap();
    let text = |pod: &Value, at: &str| pod.pointer(at).and_then(Value::as_str).unwrap().to_owned();
    let nodes: BTreeSet<String> = pods.iter().map(|pod| text(pod, "/spec/nodeName")).collect();
    assert_eq!(nodes, BTreeSet::from(["node1".to_owned(), "node2".to_owned()]));
    let names: Vec<String> = pods.iter().map(|pod| text(pod, "/metadata/name")).collect();
    let ips: Vec<String> = pods.iter().map(|pod| text(pod, "/status/podIP")).collect();

    // From pod to pod the client's address is its own.
    let (_, banner_of_other) = banner(&cluster, &names[0], &format!("{}:7000", ips[1])).unwrap();
    assert_eq!(banner_of_other["pod"], *names[1]);
    let peer = banner_of_other["peer"].as_str().unwrap();
    assert!(peer.starts_with(&format!("{}:", ips[0])), "{peer}");

    // By the service's name: DNS, and the ClusterIP, behind which both answer sooner or later.
    let mut answered = BTreeSet::new();
    let mut last = Ok(());
    let both = wait::until("both pods answer for the service", BOUND, || {
        match banner(&cluster, &names[0], "web:80") {
            Ok((report, banner)) => {
                assert!(report.target.unwrap().to_string().starts_with("10.96."), "{report:?}");
                answered.insert(banner["pod"].as_str().unwrap().to_owned());
            }
            // The rules of a new service come a moment after it.
            Err(why) => last = Err(why),
        }
        (answered.len() == 2).then_some(())
    });
    both.unwrap_or_else(|error| panic!("{error}: {answered:?}, {last:?}"));

    // A new generation rolls out onto every node; what a pod finds under a host path is its own node's.
    let everywhere = format!("{apps}/daemonsets/every-node");
    let rolled = |object: &Value| {
        let status = &object["status"];
        let all = [&status["updatedNumberScheduled"], &status["numberAvailable"]].iter().all(|count| **count == 2);
        (all && status["observedGeneration"] == object["metadata"]["generation"]).then_some(())
    };
    api.until("every-node runs", &everywhere, BOUND, rolled).unwrap();
    cluster.apply("rolled.yaml", &WORKLOAD.replace(r#"GENERATION, value: "1""#, r#"GENERATION, value: "2""#)).unwrap();
    api.until("every-node is rolled out", &everywhere, BOUND, rolled).unwrap();
    for node in cluster.nodes() {
        assert!(node.mounts().run(|| Path::new("/run/every-node").is_dir()).unwrap(), "{}", node.name);
    }
    assert!(!Path::new("/run/every-node").exists(), "on the machine itself");

    let mark = cluster.folder().file_name().unwrap().to_string_lossy().into_owned();
    assert!(left(&mark).len() > 20, "{:?}", left(&mark));
    drop(cluster);
    assert_eq!(left(&mark), BTreeSet::new());
    assert_eq!(settings(), before);
}

fn command(name: &str, args: &[&str]) -> Output {
    let bins = bin_dir().unwrap();
    let mut command = Command::new(bins.join("culvert-cluster"));
    command.args(args).args(["--name", name]).arg("--bin-dir").arg(bins).output().unwrap()
}

#[test]
fn the_command_holds_a_cluster_and_removes_one_whose_holder_was_killed() {
    let name = format!("test-{}", std::process::id());
    let up = command(&name, &["up", "--nodes", "1"]);
    let said = String::from_utf8_lossy(&up.stdout).into_owned();
    assert!(up.status.success(), "{up:?}");
    assert!(said.contains(&format!("export KUBECONFIG=/run/culvert-cluster/{name}/kubeconfig")), "{said}");

    let loaded = command(&name, &["load-images"]);
    assert!(loaded.status.success(), "{loaded:?}");
    let archive = std::env::temp_dir().join(format!("{name}.tar"));
    let written = command(&name, &["images", "--output", archive.to_str().unwrap()]);
    let size = fs::metadata(&archive).map(|file| file.len());
    fs::remove_file(&archive).unwrap();
    let said = String::from_utf8_lossy(&written.stdout).into_owned();
    assert!(written.status.success() && said.contains("culvert/ztunnel:dev\nculvert/culvertd:dev\n"), "{written:?}");
    assert!(size.unwrap() > 1 << 20);
    let status = command(&name, &["status"]);
    let said = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.status.success() && said.contains("node1/kubelet") && said.contains(" Ready "), "{status:?}");

    let state = fs::read(format!("/run/culvert-cluster/{name}/state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    let mark = Path::new(state["logs"].as_str().unwrap()).parent().unwrap().file_name().unwrap();
    let mark = mark.to_string_lossy().into_owned();
    let holder = nix::unistd::Pid::from_raw(i32::try_from(state["pid"].as_i64().unwrap()).unwrap());
    nix::sys::signal::kill(holder, nix::sys::signal::Signal::SIGKILL).unwrap();
    let gone = || !command(&name, &["status"]).status.success();
    wait::until("the holder is gone", BOUND, || gone().then_some(())).unwrap();

    let down = command(&name, &["down"]);
    assert!(down.status.success(), "{down:?}");
    assert_eq!(left(&mark), BTreeSet::new());
    assert_eq!(
        left(&name).into_iter().filter(|line| !line.starts_with("process")).collect::<Vec<_>>(),
        Vec::<String>::new()
    );
}
