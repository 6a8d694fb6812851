//! What pods of a real cluster do beside talking to each other, each a case on the same cluster: the kubelet's probes,
//! plaintext of those who are no part of the mesh, and policies. And what the command line says of all that.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::families::Families;
use tests::netns::NetNs;
use tests::wait;

use crate::mesh::{BOUND, Mesh, SYSTEM, text};
use crate::{cli, drain, ipv6, kinds};

/// Enrolled pods, by the way in which the kubelet asks them.
const PROBED: [&str; 4] = ["by-http", "by-tcp", "by-grpc", "by-exec"];
/// Where a node lets in what is for the pod `by-tcp`.
const NODE_PORT: u16 = 30700;

#[test]
fn pods_of_every_kind_live_in_the_mesh_as_they_do_without() {
    let mesh = Mesh::without(&[], Families::Dual);
    case("the command line before the mesh", || cli::before(&mesh));
    mesh.put_in_place();
    mesh.cluster.apply("probes.yaml", include_str!("probes.yaml")).unwrap();
    case("probes of the kubelet", || probes(&mesh));
    case("plaintext from outside of the mesh", || outsiders(&mesh));
    case("what is not valid", || invalid(&mesh));
    case("policies", || policies(&mesh));
    case("both families of addresses", || ipv6::both(&mesh));
    case("the node's CNI writes its configuration anew", || chained_again(&mesh));
    case("the command line", || cli::after(&mesh));
    case("kinds of pods", || kinds::kinds(&mesh));
    case("a node is drained", || drain::drain(&mesh));
}

fn case(name: &str, work: impl FnOnce()) {
    let begun = Instant::now();
    work();
    eprintln!("{name}: {:.1?}", begun.elapsed());
}

/// Pods are well by the kubelet's own word, and no probe of its passes the mesh.
fn probes(mesh: &Mesh) {
    mesh.until_pods("cases", true);
    for app in PROBED {
        let pod = mesh.pod_of("cases", app);
        assert_eq!(pod.pointer("/status/containerStatuses/0/restartCount"), Some(&Value::from(0)), "{pod}");
        let passed = inbound(mesh, &pod);
        assert!(passed.is_empty(), "probes of {app} count as from outside: {passed:#?}");
    }
}

/// Who is not the kubelet is outside of the mesh, from whatever address of a node it comes.
fn outsiders(mesh: &Mesh) {
    let pod = mesh.pod_of("cases", "by-tcp");
    let target = SocketAddr::new(address(&pod), 7000);
    let [here, there] = mesh.cluster.nodes() else { panic!("two nodes") };
    let doors = [here, there].map(|node| SocketAddr::from((node.address, NODE_PORT)));
    let on_host = || {
        mesh.run("cases-host", "on-host", &["connect", "--to", &target.to_string(), "--read-line"])["received"].clone()
    };
    let ways: [(&str, &dyn Fn() -> Option<SocketAddr>); 5] = [
        ("a process of the pod's node", &|| peer_of(here.network(), target)),
        ("a process of another node", &|| peer_of(there.network(), target)),
        ("a pod on the node's network", &|| peer_in(on_host().as_str()?)),
        ("a client of a port of the pod's node", &|| peer_of(mesh.cluster.fabric(), doors[0])),
        ("a client of another node's port", &|| peer_of(mesh.cluster.fabric(), doors[1])),
    ];
    for (who, reach) in ways {
        let before = inbound(mesh, &pod).len();
        let peer = reach().unwrap_or_else(|| panic!("{who} does not reach the pod\n{}", mesh.state()));
        // Delivered with the client's address; its port may be another one.
        let from = format!("src.addr={}:", peer.ip());
        let record = wait::until(&format!("the record of {who}, {peer}"), BOUND, || {
            inbound(mesh, &pod).into_iter().skip(before).find(|line| line.contains(&from))
        });
        let record = record.unwrap_or_else(|error| panic!("{error}: {:#?}", inbound(mesh, &pod)));
        assert!(!record.contains("src.identity="), "{who}: {record}");
    }
    assert!(!mesh.unproven("cases").is_empty(), "the metrics have them too");
}

/// The plugin's configuration is that of the node's CNI, with the plugin: it is put back, and follows what the CNI writes,
/// whose own file nobody touches.
fn chained_again(mesh: &Mesh) {
    let [own, cni] = ["00-culvert", "10-ptp"].map(|name| PathBuf::from(format!("/etc/cni/net.d/{name}.conflist")));
    let node = &mesh.cluster.nodes()[0];
    let read = |path: &Path| -> Option<Value> {
        let text = node.mounts().run(|| fs::read_to_string(path)).unwrap().ok()?;
        Some(serde_json::from_str(&text).expect("it is written whole or not at all"))
    };
    let write = |text: String| node.mounts().run(|| fs::write(&cni, text)).unwrap().unwrap();
    let types = |list: &Value| -> Vec<String> {
        let plugins = list["plugins"].as_array().expect("a list of plugins");
        plugins.iter().map(|plugin| text(plugin, "/type")).collect()
    };
    let until = |what: &str, wanted: &Value| {
        let so = wait::until(what, BOUND, || read(&own).filter(|list| list == wanted));
        so.unwrap_or_else(|error| panic!("{error}: {:#?}\n{}", read(&own), mesh.state()));
    };
    let (before, of_cni) = (read(&own).unwrap(), read(&cni).unwrap());
    let mut wanted = types(&of_cni);
    assert!(!wanted.contains(&"ztunnel".to_owned()), "{of_cni:#}");
    wanted.push("ztunnel".into());
    assert_eq!(types(&before), wanted);
    node.mounts().run(|| fs::remove_file(&own)).unwrap().unwrap();
    until("the plugin in its place again", &before);
    let mut other = of_cni.clone();
    other["disableCheck"] = true.into();
    write(other.to_string());
    let mut with = before.clone();
    with["disableCheck"] = true.into();
    until("what the CNI wrote", &with);
    write(of_cni.to_string());
    until("what it wrote before", &before);
}

/// What is not valid is refused before it is stored, by the webhooks as they are installed, with field and fix.
fn invalid(mesh: &Mesh) {
    let until_refused = |what: &str, attempt: &dyn Fn() -> Result<String, tests::Error>, field: &str| {
        let mut last = String::new();
        let refused = wait::until(what, BOUND, || {
            last = attempt().err()?.to_string();
            last.contains(field).then_some(())
        });
        refused.unwrap_or_else(|error| panic!("{error}: {last}\n{}", mesh.state()));
    };
    let policy = "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: moody, namespace: cases}, \
                  spec: {rules: [{from: [{source: {moods: [good]}}]}]}}";
    let attempt = || mesh.cluster.apply("moody.yaml", policy);
    until_refused("a policy with an unknown field", &attempt, "spec.rules[0].from[0].source.moods");
    let label = ["label", "namespace", "cases", "istio.io/dataplane-mode=perhaps", "--overwrite"];
    until_refused("a label that means nothing", &|| mesh.kubectl(&label), "istio.io/dataplane-mode");
    let left = mesh.cluster.api().list("/apis/security.istio.io/v1/namespaces/cases/authorizationpolicies").unwrap();
    // Until the webhooks' roots had been written both were stored.
    for policy in &left {
        let name = text(policy, "/metadata/name");
        mesh.kubectl(&["delete", "authorizationpolicy", &name, "--namespace", "cases"]).unwrap();
    }
    mesh.kubectl(&["label", "namespace", "cases", "istio.io/dataplane-mode=ambient", "--overwrite"]).unwrap();
    mesh.until_pods("cases", true);
}

/// What kubectl applies refuses those that it is to refuse, and nobody else, and says so; with it gone they are let in again.
fn policies(mesh: &Mesh) {
    mesh.cluster.apply("policies.yaml", include_str!("policies.yaml")).unwrap();
    mesh.until_pods("cases", true);
    let target = SocketAddr::new(address(&mesh.pod_of("cases", "by-tcp")), 7000);
    let [_, there] = mesh.cluster.nodes() else { panic!("two nodes") };
    let ask = ["connect", "--to", &target.to_string(), "--read-line", "--timeout", "5000"];
    let who = || {
        let by = |app: &str| mesh.run("cases", app, &ask)["ok"] == true;
        [by("friend"), by("stranger"), peer_of(there.network(), target).is_some()]
    };
    let until = |what: &str, expected: [bool; 3]| {
        let mut seen = [false; 3];
        wait::until(what, BOUND, || {
            seen = who();
            (seen == expected).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error}: {seen:?} and not {expected:?}\n{}", mesh.state()));
    };
    let accepted = |object: &str| {
        let wait = ["wait", object, "--namespace", "cases", "--for=condition=ZtunnelAccepted", "--timeout=60s"];
        mesh.kubectl(&wait).unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    };
    let policy = |kind: &str, spec: &str| {
        let metadata = "{name: test, namespace: cases}";
        format!("{{apiVersion: security.istio.io/v1, kind: {kind}, metadata: {metadata}, spec: {spec}}}")
    };
    until("friend, stranger and outsider without a policy", [true; 3]);
    mesh.cluster.apply("strict.yaml", &policy("PeerAuthentication", "{mtls: {mode: STRICT}}")).unwrap();
    until("an outsider refused", [true, true, false]);
    accepted("peerauthentication/test");
    let allow = "{selector: {matchLabels: {app: by-tcp}}, rules: [{from: [{source: {serviceAccounts: [friend]}}]}]}";
    mesh.cluster.apply("allow.yaml", &policy("AuthorizationPolicy", allow)).unwrap();
    until("a stranger refused", [true, false, false]);
    accepted("authorizationpolicy/test");
    // The kubelet is no outsider.
    mesh.until_pods("cases", true);
    for pod in PROBED.map(|app| mesh.pod_of("cases", app)) {
        assert_eq!(pod.pointer("/status/containerStatuses/0/restartCount"), Some(&Value::from(0)), "{pod}");
    }
    let both = ["delete", "peerauthentication/test", "authorizationpolicy/test", "--namespace", "cases"];
    mesh.kubectl(&both).unwrap();
    until("all let in again", [true; 3]);
}

/// What the server of the pod `by-tcp` says of whom it talks to.
pub fn peer_of(from: &NetNs, to: SocketAddr) -> Option<SocketAddr> {
    let stream = from.connect(to, Duration::from_secs(10)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).ok()?;
    peer_in(&line)
}

fn peer_in(banner: &str) -> Option<SocketAddr> {
    serde_json::from_str::<Value>(banner).ok()?["peer"].as_str()?.parse().ok()
}

/// Connections that the mesh has let in to a pod, as the access log of its node's proxy has them.
pub fn inbound(mesh: &Mesh, pod: &Value) -> Vec<String> {
    inbound_at(mesh, pod, address(pod))
}

/// As [`inbound`], to one of the pod's addresses.
pub fn inbound_at(mesh: &Mesh, pod: &Value, address: IpAddr) -> Vec<String> {
    let proxy = mesh.part_on("ztunnel", &text(pod, "/spec/nodeName"));
    let log = mesh.kubectl(&["logs", &proxy, "--namespace", SYSTEM]).unwrap();
    let to = match address {
        IpAddr::V4(address) => format!("dst.addr={address}:"),
        IpAddr::V6(address) => format!("dst.addr=[{address}]:"),
    };
    let of_pod = |line: &&str| line.contains("direction=\"inbound\"") && line.contains(&to);
    log.lines().filter(of_pod).map(str::to_owned).collect()
}

fn address(pod: &Value) -> IpAddr {
    text(pod, "/status/podIP").parse().unwrap()
}
