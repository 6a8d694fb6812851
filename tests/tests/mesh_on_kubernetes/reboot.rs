//! Both nodes lose their power and come back, with the API server before them, after them, with the agents held back, and with
//! culvertd. Each time everything comes up, and no enrolled pod is seen in clear, between the nodes or on one of them.

use std::collections::BTreeSet;
use std::fs;
use std::time::Instant;

use serde_json::Value;
use tests::metrics::Sample;
use tests::wait;

use crate::mesh::{BOUND, Mesh, SYSTEM, is_ready, text};

const MARKER: &str = "marker-of-a-pod-that-starts-again";
const OPEN: &str = "marker-of-a-pod-in-the-open";
/// What must come up again.
const NAMESPACES: [&str; 4] = ["kube-system", SYSTEM, "busy", "open"];

#[test]
fn nodes_that_are_rebooted_bring_up_everything_and_no_pod_uncaptured() {
    let mesh = Mesh::install(&[MARKER, OPEN]);
    let shop = include_str!("shop.yaml").replace("NAMESPACE", "busy").replace("SERVER", "echo");
    mesh.cluster.apply("shop.yaml", &shop).unwrap();
    mesh.kubectl(&["label", "namespace", "busy", "istio.io/dataplane-mode=ambient"]).unwrap();
    mesh.until_pods("busy", true);
    let service = mesh.cluster.api().get("/api/v1/namespaces/busy/services/server").unwrap().expect("the service");
    let address = text(&service, "/spec/clusterIP");
    let pods = include_str!("reboot.yaml").replace("SERVER", &address);
    mesh.cluster.apply("reboot.yaml", &pods.replace("MARKER", MARKER).replace("IN-CLEAR", OPEN)).unwrap();
    let none = BTreeSet::new();
    up_again(&mesh, &none, "at first");

    let server = mesh.cluster.server();
    let nodes = mesh.cluster.nodes();
    let off = || {
        let before = containers(&mesh);
        nodes.iter().try_for_each(tests::kubernetes::Node::power_off).unwrap();
        before
    };
    // The CNI writes its configuration anew before anything else runs, as many do; whoever had changed that file starts over.
    let on = || {
        nodes.iter().for_each(rewrite_cni);
        nodes.iter().try_for_each(tests::kubernetes::Node::power_on).unwrap();
    };

    let before = off();
    server.component.restart().unwrap();
    on();
    up_again(&mesh, &before, "with the API server before the nodes");

    let before = off();
    server.component.kill().unwrap();
    on();
    for node in nodes {
        node.kubelet.wait_ready().unwrap();
    }
    server.component.start().unwrap();
    up_again(&mesh, &before, "with the API server after the nodes");

    // Kubernetes takes the agents away while the nodes are off, and gives them back when all others have had their time.
    let before = off();
    mesh.place("culvert-node", Some("nowhere"));
    let path = format!("/apis/apps/v1/namespaces/{SYSTEM}/daemonsets/culvert-node");
    let none_wanted = |set: &Value| (set["status"]["desiredNumberScheduled"] == 0).then_some(());
    mesh.cluster.api().until("no agent is wanted", &path, BOUND, none_wanted).unwrap();
    on();
    let started = |namespace: &str| fresh(&mesh, namespace, &before).len();
    wait::until("pods of the system start without an agent", BOUND, || {
        nodes.iter().try_for_each(tests::kubernetes::Node::keep_up).unwrap();
        (started("kube-system") == 2 && fresh_of(&mesh, "culvertd", &before) == 2).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    assert_eq!(started("busy"), 0, "enrolled pods wait for the agent\n{}", mesh.state());
    mesh.place("culvert-node", None);
    up_again(&mesh, &before, "with the agents after everybody");

    // Without the control plane pods start captured all the same, and have nobody's word that they may talk until it is back.
    let before = off();
    replicas(&mesh, 0);
    on();
    wait::until("enrolled pods start captured without culvertd", BOUND * 2, || {
        nodes.iter().try_for_each(tests::kubernetes::Node::keep_up).unwrap();
        let (all, fresh) = (mesh.pods("busy"), fresh(&mesh, "busy", &before));
        let are_there = fresh_of(&mesh, "culvert-node", &before) == 2 && all.len() == fresh.len();
        let is_alone =
            mesh.pods(SYSTEM).iter().all(|pod| pod["metadata"]["labels"]["app.kubernetes.io/name"] != "culvertd");
        (are_there && is_alone && not_captured(&mesh).is_empty()).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    replicas(&mesh, 2);
    up_again(&mesh, &before, "with culvertd after everybody");
}

/// Has so many replicas of culvertd from now on.
fn replicas(mesh: &Mesh, count: usize) {
    let count = format!("--replicas={count}");
    mesh.kubectl(&["scale", "deployment/culvertd", "--namespace", SYSTEM, &count]).unwrap();
}

/// Names of enrolled pods that the kernels do not say are captured.
fn not_captured(mesh: &Mesh) -> Vec<String> {
    let enrolled: Vec<Value> = ["node1", "node2"].iter().filter_map(|node| mesh.enrolled_on(node)).flatten().collect();
    let captured =
        |pod: &Value| enrolled.iter().any(|one| one["uid"] == pod["metadata"]["uid"] && one["enrolled"] == true);
    mesh.pods("busy").iter().filter(|pod| !captured(pod)).map(|pod| text(pod, "/metadata/name")).collect()
}

/// What the proxies let in to pods of `busy`, since they run, that came from a pod of this namespace and proved no identity: in
/// clear, also on a node of its own, where no wire is.
fn unproven_from(mesh: &Mesh, namespace: &str) -> Vec<Sample> {
    let samples = mesh.unproven("busy").into_iter();
    samples.filter(|sample| sample.label("source_workload_namespace") == Some(namespace)).collect()
}

/// Writes the CNI's own configuration, with the plugins that it wants and no other, in another form than before.
fn rewrite_cni(node: &tests::kubernetes::Node) {
    const FILE: &str = "/etc/cni/net.d/10-ptp.conflist";
    node.mounts()
        .run(|| {
            let mut list: Value = serde_json::from_slice(&fs::read(FILE).unwrap()).unwrap();
            let turned = list["disableCheck"] != true;
            list["disableCheck"] = turned.into();
            let plugins = list["plugins"].as_array_mut().unwrap();
            plugins.retain(|plugin| plugin["type"] != "ztunnel");
            fs::write(FILE, list.to_string()).unwrap();
        })
        .unwrap();
}

/// Ids of all containers that there are.
fn containers(mesh: &Mesh) -> BTreeSet<String> {
    NAMESPACES.iter().flat_map(|namespace| mesh.pods(namespace)).filter_map(|pod| container(&pod)).collect()
}

fn container(pod: &Value) -> Option<String> {
    pod.pointer("/status/containerStatuses/0/containerID")?.as_str().map(str::to_owned)
}

/// Pods that are ready in containers that are not among those.
fn fresh(mesh: &Mesh, namespace: &str, before: &BTreeSet<String>) -> Vec<Value> {
    let is_fresh = |pod: &Value| container(pod).is_some_and(|id| !before.contains(&id));
    mesh.pods(namespace).into_iter().filter(|pod| is_ready(pod) && is_fresh(pod)).collect()
}

/// How many pods of a part of the mesh are.
fn fresh_of(mesh: &Mesh, part: &str, before: &BTreeSet<String>) -> usize {
    let is_it = |pod: &&Value| pod["metadata"]["labels"]["app.kubernetes.io/name"] == *part;
    fresh(mesh, SYSTEM, before).iter().filter(is_it).count()
}

/// Waits until every pod is ready in a container that was not there before and those of `busy` are captured by the word
/// of the kernels; then nothing of theirs may have been in clear.
fn up_again(mesh: &Mesh, before: &BTreeSet<String>, how: &str) {
    let begun = Instant::now();
    let in_the_open = mesh.wire.report().marked(OPEN).count();
    let mut waits_for = String::new();
    wait::until(&format!("everything is up {how}"), BOUND * 2, || {
        mesh.cluster.nodes().iter().try_for_each(tests::kubernetes::Node::keep_up).unwrap();
        for namespace in NAMESPACES {
            let (all, fresh) = (mesh.pods(namespace), fresh(mesh, namespace, before));
            if all.is_empty() || all.len() != fresh.len() {
                waits_for = format!("{} of {} pods of {namespace} are up", fresh.len(), all.len());
                return None;
            }
        }
        let missing = not_captured(mesh);
        waits_for = format!("not captured: {missing:?}");
        missing.is_empty().then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}: {waits_for}\n{}", mesh.state()));
    let took = begun.elapsed();
    mesh.rolled_out();
    mesh.until_pods("busy", true);

    // They reach each other through the mesh, and who is not in it is seen: the way that all of them take is the same.
    let address = text(&mesh.pod_of("busy", "server"), "/status/podIP");
    let client = text(&mesh.pod_of("busy", "client"), "/status/podIP");
    let pods = [address, client].map(|ip| ip.parse().unwrap());
    wait::until("client and server talk through a tunnel", BOUND, || {
        let send = ["connect", "--to", "server:7000", "--send", MARKER, "--read", "8"];
        let seen = mesh.run("busy", "client", &send);
        let report = mesh.wire.report();
        let tunnels = report.between(&pods, &pods).filter(|(_, flow)| flow.is_tls() && flow.payload > 0).count();
        (seen["ok"] == true && tunnels > 0).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error} {how}\n{}", mesh.state()));
    wait::until("the pod in the open is seen", BOUND, || {
        (mesh.wire.report().marked(OPEN).count() > in_the_open).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error} {how}\n{}", mesh.state()));
    let report = mesh.wire.report();
    report.complete().unwrap();
    assert_eq!(report.marked(MARKER).count(), 0, "in clear between the nodes {how}");
    // Who comes in clear is told by its address, as that pod is.
    wait::until("the pod in the open is counted", BOUND, || (!unproven_from(mesh, "open").is_empty()).then_some(()))
        .unwrap_or_else(|error| panic!("{error} {how}\n{}", mesh.state()));
    let found = unproven_from(mesh, "busy");
    assert!(found.is_empty(), "in clear on a node {how}: {found:#?}");
    eprintln!("up {how}: after {took:.1?}");
}
