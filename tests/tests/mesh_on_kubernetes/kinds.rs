//! Kinds of pods, each as it is used: that end, that begin in steps, that keep their names, that are let in later, that
//! take a port of their node, that take their time to end. All were in the mesh by the word of whoever they came to.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde_json::Value;
use tests::wait;

use crate::cases::{inbound, peer_of};
use crate::mesh::{BOUND, Mesh, text};

/// Port of its node that the pod `on-port` takes.
const HOST_PORT: u16 = 30800;

pub fn kinds(mesh: &Mesh) {
    let kinds = include_str!("kinds.yaml");
    mesh.cluster.apply("kinds.yaml", kinds).unwrap();
    let ready = ["server", "client", "on-port", "lingering", "stable-0", "stable-1"].map(|pod| format!("pod/{pod}"));
    for pod in &ready {
        until_there(mesh, pod);
    }
    let wait = ["wait", "--for=condition=Ready", "--namespace", "kinds", "--timeout=120s"];
    let ready: Vec<&str> = ready.iter().map(String::as_str).collect();
    mesh.kubectl(&[&wait[..], &ready].concat()).unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    let lingering = text(&mesh.pod_of("kinds", "lingering"), "/status/podIP");
    let clients = include_str!("clients.yaml").replace("LINGERING", &lingering);
    mesh.cluster.apply("clients.yaml", &clients).unwrap();

    of_names(mesh);
    let_in_later(mesh);
    on_a_port_of_its_node(mesh);
    in_their_time(mesh, &lingering);
    that_came_to_the_server(mesh);
}

/// The controller that makes it has the time that it takes.
fn until_there(mesh: &Mesh, pod: &str) {
    let there = || mesh.kubectl(&["get", pod, "--namespace", "kinds"]).ok().map(drop);
    wait::until(pod, BOUND, there).unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
}

/// What the client's pod reads first, or none.
fn banner(mesh: &Mesh, to: &str) -> Option<Value> {
    let seen = mesh.run("kinds", "client", &["connect", "--to", to, "--read-line", "--timeout", "3000"]);
    serde_json::from_str(seen["received"].as_str()?).ok()
}

/// Jobs, init containers and the containers beside a sidecar have come to the server with their identities, and ended.
fn that_came_to_the_server(mesh: &Mesh) {
    for job in ["once", "with-sidecar"] {
        let complete = ["wait", "--for=condition=Complete", "job", job, "--namespace", "kinds", "--timeout=120s"];
        mesh.kubectl(&complete).unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    }
    let started = ["wait", "--for=condition=Ready", "pod/after-init", "--namespace", "kinds", "--timeout=120s"];
    mesh.kubectl(&started).unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    let server = mesh.pod_of("kinds", "server");
    let accounts = ["of-job", "of-init", "of-sidecar"];
    let wanted = accounts.map(|account| format!("src.identity=\"spiffe://cluster.local/ns/kinds/sa/{account}\""));
    let mut seen = Vec::new();
    wait::until("records of all who came", BOUND, || {
        seen = inbound(mesh, &server);
        wanted.iter().all(|who| seen.iter().any(|record| record.contains(who))).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}: {seen:#?}\n{}", mesh.state()));
    let strangers: Vec<_> = seen.iter().filter(|record| !record.contains("src.identity=")).collect();
    assert!(strangers.is_empty(), "{strangers:#?}");
    assert!(seen.iter().filter(|record| record.contains(&wanted[0])).count() >= 2, "each of the job's pods: {seen:#?}");
}

/// Each pod of a StatefulSet is reached by its name, also the one that takes its place.
fn of_names(mesh: &Mesh) {
    let at = |index: usize| format!("stable-{index}.stable.kinds.svc.cluster.local:7000");
    let reached = |index: usize, uid: &str| {
        let pod = format!("stable-{index}");
        let mut last = None;
        let done = wait::until(&format!("{pod} by its name"), BOUND, || {
            let object = mesh.cluster.api().get(&format!("/api/v1/namespaces/kinds/pods/{pod}")).unwrap()?;
            let local = format!("{}:7000", object.pointer("/status/podIP")?.as_str()?);
            let banner = last.insert(banner(mesh, &at(index))).as_ref()?;
            let is_it = object["metadata"]["uid"] != *uid && banner["pod"] == *pod && banner["local"] == *local;
            is_it.then_some(object)
        });
        let pod = done.unwrap_or_else(|error| panic!("{error}: {last:?}\n{}", mesh.state()));
        proves_who_comes(mesh, &pod);
        text(&pod, "/metadata/uid")
    };
    let uids: BTreeSet<String> = (0..2).map(|index| reached(index, "")).collect();
    assert_eq!(uids.len(), 2);
    let pod = mesh.cluster.api().get("/api/v1/namespaces/kinds/pods/stable-0").unwrap().expect("stable-0");
    mesh.kubectl(&["delete", "pod", "stable-0", "--namespace", "kinds", "--wait"]).unwrap();
    reached(0, &text(&pod, "/metadata/uid"));
}

/// The pod is captured, and everybody who was let in to it was the client, by its certificate.
fn proves_who_comes(mesh: &Mesh, pod: &Value) {
    let path = format!("/api/v1/namespaces/kinds/pods/{}", text(pod, "/metadata/name"));
    let enabled =
        |pod: &Value| pod.pointer(crate::mesh::REDIRECTION).is_some_and(|value| value == "enabled").then_some(());
    mesh.cluster.api().until("it is captured", &path, BOUND, enabled).unwrap();
    let client = "src.identity=\"spiffe://cluster.local/ns/kinds/sa/of-client\"";
    let mut seen = Vec::new();
    wait::until("a record of the client", BOUND, || {
        seen = inbound(mesh, pod);
        (!seen.is_empty()).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    assert!(seen.iter().all(|record| record.contains(client)), "{seen:#?}");
}

/// A service sends nobody to a pod whose gate is closed.
fn let_in_later(mesh: &Mesh) {
    let reachable = || banner(mesh, "gated:7000").is_some();
    let set = |open: bool| {
        let status = if open { "True" } else { "False" };
        let patch = format!(r#"{{"status":{{"conditions":[{{"type":"example.org/let-in","status":"{status}"}}]}}}}"#);
        let patch = ["patch", "pod", "gated", "--namespace", "kinds", "--subresource=status", "--patch", &patch];
        mesh.kubectl(&patch).unwrap();
    };
    let captured = || mesh.pod_of("kinds", "gated").pointer(crate::mesh::REDIRECTION).is_some();
    wait::until("the pod behind a gate is captured", BOUND, || captured().then_some(())).unwrap();
    assert!(!reachable(), "its gate has never been open");
    for open in [true, false] {
        set(open);
        wait::until(&format!("the gate's pod is reached: {open}"), BOUND, || (reachable() == open).then_some(()))
            .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    }
    assert!(captured(), "who writes a condition leaves the annotation as it is");
}

/// Who comes through a port of the node is outside of the mesh, and is let in as its own self.
fn on_a_port_of_its_node(mesh: &Mesh) {
    let pod = mesh.pod_of("kinds", "on-port");
    let [here, there] = mesh.cluster.nodes() else { panic!("two nodes") };
    let door = SocketAddr::from((here.address, HOST_PORT));
    for from in [mesh.cluster.fabric(), there.network()] {
        let before = inbound(mesh, &pod).len();
        let peer = peer_of(from, door).unwrap_or_else(|| panic!("no way through {door}\n{}", mesh.state()));
        let source = format!("src.addr={}:", peer.ip());
        let record = wait::until("its record", BOUND, || {
            inbound(mesh, &pod).into_iter().skip(before).find(|line| line.contains(&source))
        });
        let record = record.unwrap_or_else(|error| panic!("{error}: {:#?}", inbound(mesh, &pod)));
        assert!(!record.contains("src.identity="), "{record}");
    }
}

/// A pod that ends serves who is connected to it, and who comes to its address or that of its service, until it is gone.
fn in_their_time(mesh: &Mesh, lingering: &str) {
    let exchanges = || {
        let log = mesh.kubectl(&["logs", "holder", "--namespace", "kinds"]).unwrap_or_default();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let (mut count, mut ended) = (0, None);
        for line in lines {
            count = line["exchanges"].as_u64().unwrap_or(count);
            ended = (line["event"] == "end").then_some(line).or(ended);
        }
        (count, ended)
    };
    let grows = |what: &str, from: u64| {
        let grown = wait::until(what, BOUND, || {
            let (count, ended) = exchanges();
            assert!(ended.is_none(), "{what}: {ended:?}\n{}", mesh.state());
            (count >= from + 20).then_some(count)
        });
        grown.unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()))
    };
    let before = grows("exchanges before the pod ends", 0);
    mesh.kubectl(&["delete", "pod", "lingering", "--namespace", "kinds", "--wait=false"]).unwrap();
    let path = "/api/v1/namespaces/kinds/pods/lingering";
    let ends = |pod: &Value| pod.pointer("/metadata/deletionTimestamp").is_some();
    assert!(mesh.cluster.api().get(path).unwrap().is_some_and(|pod| ends(&pod)), "it ends");
    let count = grows("exchanges while the pod ends", before);
    let service = mesh.cluster.api().get("/api/v1/namespaces/kinds/services/lingering").unwrap().expect("its service");
    let to = [lingering, &text(&service, "/spec/clusterIP")].map(|address| format!("{address}:7000"));
    let fresh = to.map(|to| mesh.run("kinds", "client", &["connect", "--to", &to, "--send", "hello", "--read", "5"]));
    let still = mesh.cluster.api().get(path).unwrap().is_some_and(|pod| ends(&pod));
    assert!(still, "the pod was gone before anything could be shown");
    assert!(fresh.iter().all(|seen| seen["ok"] == true), "{fresh:#?}");
    let gone = || mesh.cluster.api().get(path).unwrap().is_none();
    wait::until("the pod is gone", BOUND, || gone().then_some(())).unwrap();
    let (all, ended) = wait::until("the connection ends with it", BOUND, || {
        let (all, ended) = exchanges();
        ended.map(|ended| (all, ended))
    })
    .unwrap();
    assert!(all >= count && ended["ok"] == false, "{all} exchanges, {count} before: {ended}");
}
