//! `culvert` as a user runs it, before the mesh is there and after: what it finds well, what it finds wrong, and what it
//! says to those who may not ask everything.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use futures_util::TryStreamExt as _;
use serde_json::Value;
use tests::cluster::bin_dir;
use tests::netns::NetNs;
use tests::{Error, wait};

use crate::mesh::{BOUND, Mesh, text};

/// What a command said.
#[derive(Debug)]
struct Said {
    code: i32,
    text: String,
    error: String,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Ended with that code, and said all of that.
    fn expect(self, code: i32, parts: &[&str]) -> Self {
        let all = format!("{}{}", self.text, self.error);
        let missing: Vec<_> = parts.iter().filter(|part| !all.contains(**part)).collect();
        assert!(self.code == code && missing.is_empty(), "not {code}, or without {missing:?}: {self:#?}");
        self
    }
}

fn culvert(mesh: &Mesh, args: &[&str]) -> Said {
    run(mesh, mesh.cluster.kubeconfig().to_owned(), args)
}

fn run(mesh: &Mesh, kubeconfig: PathBuf, args: &[&str]) -> Said {
    let mut command = Command::new(bin_dir().unwrap().join("culvert"));
    command.args(args).stdin(Stdio::null()).env_remove("CULVERT_SYSTEM_NAMESPACE");
    // A machine that does much else is slow to answer.
    command.args(["--timeout", "60s"]).env("KUBECONFIG", kubeconfig).env("HOME", mesh.cluster.folder());
    let done = command.output().unwrap();
    let read = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Said { code: done.status.code().unwrap_or(-1), text: read(done.stdout), error: read(done.stderr) }
}

/// What a command says to programs, whether all is well or not.
pub fn json(mesh: &Mesh, args: &[&str]) -> Value {
    culvert(mesh, &[args, &["--output", "json"]].concat()).json()
}

/// A command as somebody else.
fn as_user(mesh: &Mesh, user: &str, args: &[&str]) -> Said {
    let url = format!("https://{}", mesh.cluster.address());
    run(mesh, mesh.cluster.server().pki().kubeconfig(user, &url, user, None).unwrap(), args)
}

/// On a cluster without the mesh: whether it is fit, and that nothing is there.
pub fn before(mesh: &Mesh) {
    let check = culvert(mesh, &["check", "--pre"]).expect(0, &["Kubernetes v1.36", "no other mesh", "may install"]);
    assert!(check.text.ends_with("The mesh can be installed.\n"), "{check:?}");
    assert_eq!(culvert(mesh, &["check"]).text, check.text, "what is not installed is not checked");
    let json = culvert(mesh, &["check", "--pre", "-o", "json"]).expect(0, &[]).json();
    assert_eq!((&json["stage"], &json["healthy"]), (&Value::from("before"), &Value::from(true)), "{json}");
    as_user(mesh, "nobody", &["check", "--pre"]).expect(2, &["not allowed to list", "culvert --help"]);

    let missing = ["culvertd: is not installed", "culvert-node: is not installed", "ztunnel: is not installed"];
    culvert(mesh, &["status"]).expect(1, &missing).expect(1, &["kubectl apply"]);
    culvert(mesh, &["ztunnel", "workloads"]).expect(2, &["no proxy runs in the namespace culvert-system"]);
    culvert(mesh, &["proxy-status"]).expect(1, &["no replica of culvertd"]);
    culvert(mesh, &["version"]).expect(0, &["client", "v1.36", "no part of the mesh"]);

    culvert(mesh, &["status", "--context", "elsewhere"]).expect(2, &["elsewhere", "--context"]);
    run(mesh, "/nowhere".into(), &["status"]).expect(2, &["/nowhere", "--kubeconfig"]);
    culvert(mesh, &["statos"]).expect(2, &["statos"]);
    for shell in ["bash", "zsh", "fish"] {
        culvert(mesh, &["completion", shell]).expect(0, &["proxy-status", "ztunnel"]);
    }
    let script = culvert(mesh, &["completion", "bash"]).text;
    let file = mesh.cluster.folder().join("completion");
    fs::write(&file, format!("set -eu\n{script}\ncomplete -p culvert\n")).unwrap();
    let complete = Command::new("bash").arg(&file).output().unwrap();
    assert!(complete.status.success() && !complete.stdout.is_empty(), "{complete:?}");
}

/// On a cluster where all is well, then where something is not.
pub fn after(mesh: &Mesh) {
    mesh.cluster.apply("cli.yaml", include_str!("cli.yaml")).unwrap();
    mesh.until_pods("told", true);
    well(mesh);
    proxies(mesh);
    asked_by_others(mesh);
    broken(mesh);
}

/// Every line of every report is good.
fn well(mesh: &Mesh) {
    let mut last = None;
    let good = wait::until("all is well", BOUND, || {
        let check = last.insert(culvert(mesh, &["check"]));
        (check.code == 0 && check.text.ends_with("All is well.\n")).then_some(())
    });
    good.unwrap_or_else(|error| panic!("{error}: {last:#?}\n{}", mesh.state()));
    let json = culvert(mesh, &["check", "-o", "json"]).expect(0, &[]).json();
    assert_eq!(json["stage"], "after");
    let lines = json["lines"].as_array().unwrap();
    assert!(lines.len() > 10 && lines.iter().all(|line| line["verdict"] == "good"), "{json:#}");

    culvert(mesh, &["status"]).expect(0, &["nothing is wrong", "told", "node1", "node2", "Certificates"]);
    let status = culvert(mesh, &["status", "-o", "json"]).expect(0, &[]).json();
    assert_eq!((&status["problems"], &status["notes"]), (&Value::Array(vec![]), &Value::Array(vec![])), "{status:#}");
    let nodes = status["nodes"].as_array().unwrap();
    let ready = |node: &Value| node["agent"] == "ready" && node["proxy"] == "ready" && node["captured"] != 0;
    assert!(nodes.len() == 2 && nodes.iter().all(ready), "{nodes:#?}");
    let pods = names(&status["pods"], "name");
    assert!(["by-http", "by-tcp", "by-grpc", "by-exec", "called", "caller"].iter().all(|pod| pods.contains(*pod)));
    assert!(!pods.contains("on-host") && !pods.contains("squatter"), "{pods:?}");
    assert!(
        status["pods"].as_array().unwrap().iter().all(|pod| pod["state"] == "captured" && pod["annotated"] == true)
    );
    assert!(status["certificates"]["count"].as_u64() >= Some(2), "{status:#}");
    assert_eq!(status["certificates"]["roots"].as_array().unwrap().len(), 1);

    let versions = culvert(mesh, &["version", "-o", "json"]).expect(0, &[]).json();
    let components = versions["components"].as_array().unwrap();
    assert_eq!(components.len(), 6, "{versions:#}");
    assert!(components.iter().all(|one| one["version"] == versions["client"]), "{versions:#}");

    culvert(mesh, &["proxy-status"]).expect(0, &["2 of 2 proxies follow"]);
    let followers = culvert(mesh, &["proxy-status", "-o", "json"]).expect(0, &[]).json();
    let proxies = followers["proxies"].as_array().unwrap();
    let follows = |one: &Value| one["replica"].as_str().is_some_and(|name| name.starts_with("culvertd-"));
    let has_address = |one: &Value| names(&one["types"], "type").iter().any(|kind| kind.ends_with(".Address"));
    assert!(proxies.len() == 2 && proxies.iter().all(|one| follows(one) && has_address(one)), "{followers:#}");
    assert_eq!(followers["others"], Value::Array(vec![]), "{followers:#}");
}

fn names(list: &Value, field: &str) -> BTreeSet<String> {
    list.as_array().unwrap().iter().filter_map(|one| one[field].as_str().map(str::to_owned)).collect()
}

/// What the proxies know and carry.
fn proxies(mesh: &Mesh) {
    let of = |args: &[&str]| {
        let said = culvert(mesh, &[&["ztunnel"], args, &["-o", "json"]].concat()).expect(0, &[]).json();
        said["proxies"].as_array().unwrap().clone()
    };
    for (section, field, known) in
        [("workloads", "name", "called"), ("services", "hostname", "door.cases.svc.cluster.local")]
    {
        let proxies = of(&[section]);
        let both = proxies.len() == 2 && proxies.iter().all(|one| names(&one["items"], field).contains(known));
        assert!(both, "{section}: {proxies:#?}");
        culvert(mesh, &["ztunnel", section]).expect(0, &["node node1", "node node2", known]);
    }
    culvert(mesh, &["ztunnel", "policies"]).expect(0, &["node node1", "node node2", "policies"]);
    let one = of(&["workloads", "--node", "node2"]);
    assert!(one.len() == 1 && one[0]["node"] == "node2", "{one:#?}");

    let [caller, called] = ["caller", "called"].map(|name| format!("spiffe://cluster.local/ns/told/sa/{name}"));
    let certificates = of(&["certificates", "--pod", "told/caller"]);
    assert!(certificates.len() == 1 && certificates[0]["node"] == "node1", "{certificates:#?}");
    assert_eq!(names(&certificates[0]["items"], "identity"), BTreeSet::from([caller.clone()]));
    assert_eq!(names(&certificates[0]["items"], "state"), BTreeSet::from(["Valid".to_owned()]));

    for (pod, direction) in [("told/caller", "outbound"), ("told/called", "inbound")] {
        let proxies = of(&["connections", "--pod", pod]);
        let [Value::Object(proxy)] = proxies.as_slice() else { panic!("{proxies:#?}") };
        let [connection] = proxy["items"].as_array().unwrap().as_slice() else { panic!("{proxies:#?}") };
        assert_eq!((&connection["pod"], &connection["direction"]), (&pod.into(), &direction.into()), "{connection:#}");
        assert_eq!(connection["source"]["identity"], *caller, "{connection:#}");
        assert_eq!(connection["destination"]["identity"], *called, "{connection:#}");
    }
    culvert(mesh, &["ztunnel", "connections"]).expect(0, &[&caller, &called, "told/caller", "outbound", "inbound"]);

    culvert(mesh, &["ztunnel", "workloads", "--node", "node9"]).expect(2, &["no proxy runs on node node9"]);
    culvert(mesh, &["ztunnel", "connections", "--pod", "told/nobody"]).expect(2, &["there is no pod told/nobody"]);
    culvert(mesh, &["ztunnel", "connections", "--pod", "nobody"]).expect(2, &["namespace/name"]);
    let elsewhere = ["ztunnel", "workloads", "--namespace", "elsewhere"];
    culvert(mesh, &elsewhere).expect(2, &["no proxy runs in the namespace elsewhere"]);
}

/// The rights that are named are enough, and those that are missing are named.
fn asked_by_others(mesh: &Mesh) {
    let reader = |args: &[&str]| as_user(mesh, "reader", args);
    reader(&["status"]).expect(0, &["nothing is wrong"]);
    reader(&["proxy-status"]).expect(0, &["2 of 2"]);
    reader(&["version"]).expect(0, &["culvertd", "agent", "proxy"]);
    reader(&["ztunnel", "certificates", "--node", "node1"]).expect(0, &["Valid"]);
    // What only `check` asks is doubtful then, not wrong.
    reader(&["check"]).expect(0, &["daemonsets could not be asked for", "0 failed"]);
    let half = as_user(mesh, "half-reader", &["status"]);
    half.expect(1, &["agent of node node1: not allowed", "pods/exec", "agents ready on 0 and proxies on 2 of 2 nodes"]);
    as_user(mesh, "nobody", &["status"]).expect(2, &["not allowed to list"]);
}

/// A pod that cannot be captured, one whose network is taken away by hand, and a proxy that does not run.
fn broken(mesh: &Mesh) {
    let until = |what: &str, args: &[&str], code: i32, parts: &[&str]| {
        let mut last = None;
        let done = wait::until(what, BOUND, || {
            let said = last.insert(culvert(mesh, args));
            (said.code == code && parts.iter().all(|part| said.text.contains(part))).then_some(())
        });
        done.unwrap_or_else(|error| panic!("{error}: {last:#?}\n{}", mesh.state()));
    };
    mesh.kubectl(&["label", "namespace", "taken", "istio.io/dataplane-mode=ambient"]).unwrap();
    let why = ["pod taken/squatter-", ": not captured", "port 15001 is in use in the pod"];
    until("the pod with a port of the mesh's is named", &["check"], 1, &why);
    until("its state has it too", &["status"], 1, &why);
    complained_of(mesh, "taken", "port 15001 is in use in the pod");
    mesh.kubectl(&["delete", "namespace", "taken", "--wait"]).unwrap();
    until("all is well again", &["check"], 0, &["All is well."]);

    let caller = mesh.pod_of("told", "caller");
    let process = process_of(&text(&caller, "/metadata/uid"));
    NetNs::of_process(process, "caller").and_then(|network| remove(&network, "eth0")).unwrap();
    let why = ["pod told/caller: not captured, although its annotation says so", "interface"];
    until("the pod without its interface is named", &["check"], 1, &why);
    mesh.kubectl(&["delete", "pod", "caller", "--namespace", "told", "--wait"]).unwrap();

    // Kubernetes takes the proxies away, and brings them back.
    mesh.place("ztunnel", Some("node2"));
    let why = ["proxy of node node1: no pod", "kubectl -n culvert-system describe daemonset ztunnel"];
    until("the node without a proxy is named", &["status"], 1, &why);
    mesh.place("ztunnel", None);
    mesh.rolled_out();
    mesh.one_proxy_on_each_node();
    until("all is well in the end", &["check"], 0, &["All is well."]);
}

/// There is an event about the pod, and one about its owner, that says why it is not captured.
fn complained_of(mesh: &Mesh, namespace: &str, why: &str) {
    let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
    let mut last = Vec::new();
    let seen = wait::until("events about the pod and its owner", BOUND, || {
        last = mesh.cluster.api().list(&path).ok()?;
        let about = |kind: &str| {
            last.iter().any(|event| {
                let note = event["note"].as_str().unwrap_or_default();
                event["reason"] == "NotEnrolled" && event["regarding"]["kind"] == kind && note.contains(why)
            })
        };
        (about("Pod") && about("ReplicaSet")).then_some(())
    });
    seen.unwrap_or_else(|error| panic!("{error}: {last:#?}"));
}

/// A process in a container of a pod, whose cgroups have the pod's UID in their name.
fn process_of(uid: &str) -> u32 {
    let of_pod = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|groups| groups.contains(uid));
    let mut all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    all.find(of_pod).unwrap_or_else(|| panic!("no process of pod {uid}"))
}

fn remove(network: &NetNs, link: &str) -> Result<(), Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Absent(error.to_string());
    network.netlink(|handle| async move {
        let found = handle.link().get().match_name(link.to_owned()).execute().try_next().await;
        let found = found.map_err(|error| failed(&error))?.ok_or_else(|| failed(&"no such link"))?;
        handle.link().del(found.header.index).execute().await.map_err(|error| failed(&error))
    })
}
