//! Bookinfo, applied as it is shipped; what the wire between the nodes shows; labels that come and go while pods run.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use serde_json::Value;
use tests::capture::Report;
use tests::kubernetes::image::Recipe;
use tests::netns::NetNs;
use tests::picture::{self, Picture, differences};
use tests::{cluster::bin_dir, http, wait};

use crate::mesh::{BOUND, Mesh, SYSTEM, lasting, manifests, text};

const MARKER: &str = "marker-on-kubernetes";
const OPEN: &str = "marker-in-the-open";

fn shop(namespace: &str, server: &str) -> String {
    include_str!("shop.yaml").replace("NAMESPACE", namespace).replace("SERVER", server)
}

/// One exchange between the nodes with this marker in it.
fn exchange(mesh: &Mesh, namespace: &str, marker: &str) -> Value {
    let send = format!("{marker} {}", "and more ".repeat(300));
    let length = send.len().to_string();
    let to = format!("{}:7000", text(&mesh.pod_of(namespace, "server"), "/status/podIP"));
    mesh.run(namespace, "client", &["connect", "--to", &to, "--send", &send, "--read", &length])
}

/// Everything that agents have pinned, by node.
fn pins(mesh: &Mesh) -> Vec<BTreeSet<String>> {
    let below = |folder: &Path| -> BTreeSet<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        entries.map(|name| name.to_string_lossy().into_owned()).collect()
    };
    let look = || {
        let layouts = below(Path::new("/sys/fs/bpf/culvert"));
        layouts.iter().flat_map(|layout| below(&Path::new("/sys/fs/bpf/culvert").join(layout).join("pods"))).collect()
    };
    mesh.cluster.nodes().iter().map(|node| node.mounts().run(look).unwrap()).collect()
}

#[test]
fn a_label_encrypts_a_namespace_and_its_removal_leaves_nothing() {
    let mesh = Mesh::install(&[MARKER, OPEN]);
    let nothing = vec![BTreeSet::new(); 2];
    assert_eq!(pins(&mesh), nothing);
    bookinfo(&mesh);

    // Pods that run when the label comes: one server on a node, its client on the other.
    mesh.cluster.apply("shop.yaml", &shop("shop", "echo")).unwrap();
    mesh.until_pods("shop", false);
    let seen = exchange(&mesh, "shop", OPEN);
    assert!(seen["ok"] == true && seen["received"].as_str().unwrap().contains(OPEN), "{seen}");
    let networks = mesh.networks("shop");
    let bare = lasting(|| inside_of(&networks));
    let before = names(&mesh, "shop");
    mesh.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"]).unwrap();
    mesh.until_pods("shop", true);
    assert_eq!(names(&mesh, "shop"), before, "no pod was restarted");
    let inside = |app: &str| text(&mesh.pod_of("shop", app), "/status/podIP").parse::<IpAddr>().unwrap();
    let pods = [inside("server"), inside("client")];
    // Discovery hears of the pods' capture a moment later.
    let tunnels = || mesh.wire.report().between(&pods, &pods).filter(|(_, flow)| flow.is_tls()).count();
    wait::until("the pods talk through a tunnel", BOUND, || {
        let seen = exchange(&mesh, "shop", "before");
        (seen["ok"] == true && tunnels() > 0).then_some(())
    })
    .unwrap();
    let seen = exchange(&mesh, "shop", MARKER);
    assert!(seen["ok"] == true && seen["received"].as_str().unwrap().contains(MARKER), "{seen}");

    let changed = differences(&bare, &inside_of(&networks));
    let places: BTreeSet<_> = changed.iter().filter_map(|line| line.split(':').next()).collect();
    assert!(places.len() >= 4, "rules and sockets of both pods differ while they are enrolled: {changed:#?}");

    // Everything that the agents say is in force was asked of the kernel.
    for node in ["node1", "node2"] {
        let enrolled = mesh.enrolled_on(node).unwrap();
        assert!(enrolled.len() >= 3 && enrolled.iter().all(|pod| pod["enrolled"] == true), "{enrolled:?}");
    }
    let report = mesh.wire.report();
    report.complete().unwrap();
    assert!(report.marked(OPEN).count() > 0, "the capture sees what is in clear");
    assert_eq!(report.marked(MARKER).count(), 0, "in clear between the nodes");
    hbone_alone(&report, &mesh);

    // One pod opts out, then all do.
    let client = text(&mesh.pod_of("shop", "client"), "/metadata/name");
    mesh.kubectl(&["label", "pod", &client, "--namespace", "shop", "istio.io/dataplane-mode=none"]).unwrap();
    let gone = || mesh.enrolled_on("node1").is_some_and(|all| all.iter().all(|pod| pod["name"] != *client));
    wait::until("the pod that opted out is released", BOUND, || gone().then_some(())).unwrap();
    mesh.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode-"]).unwrap();
    mesh.until_pods("shop", false);
    mesh.kubectl(&["delete", "namespace", "bookinfo", "--wait"]).unwrap();
    wait::until("nothing of the pods is left", BOUND, || (pins(&mesh) == nothing).then_some(())).unwrap();
    let mut left = Vec::new();
    wait::until("the pods' networks as they were before", BOUND, || {
        left = differences(&bare, &inside_of(&networks));
        left.is_empty().then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}, but for {left:#?}\n{}", mesh.state()));
    let seen = exchange(&mesh, "shop", OPEN);
    assert!(seen["ok"] == true, "the pods go on without the mesh: {seen}");
}

/// Rules, routes, disciplines, sysctls and sockets in the networks of pods.
fn inside_of(networks: &[(String, NetNs)]) -> Picture {
    networks.iter().flat_map(|(name, network)| picture::of_network(name, network).unwrap()).collect()
}

/// All that went between two pods of the application on the wire was TLS to or from the tunnel's port.
fn hbone_alone(report: &Report, mesh: &Mesh) {
    let pods = mesh.pods("bookinfo");
    let addresses: Vec<IpAddr> = pods.iter().map(|pod| text(pod, "/status/podIP").parse().unwrap()).collect();
    let mut carried = 0;
    for (link, flow) in report.between(&addresses, &addresses) {
        let ports = [flow.source.port(), flow.destination.port()];
        assert!(flow.protocol == 6 && ports.contains(&15008), "on {link:?}, not HBONE: {flow:?}");
        assert!(flow.payload == 0 || flow.is_tls(), "on {link:?}, not TLS: {flow:?}");
        carried += flow.payload;
    }
    assert!(carried > 0, "the application's pods are on both nodes, and talk across: {pods:#?}");
}

fn names(mesh: &Mesh, namespace: &str) -> BTreeSet<String> {
    mesh.pods(namespace).iter().map(|pod| text(pod, "/metadata/uid")).collect()
}

/// The sample, with images that are built here; its page is asked from outside of the mesh.
fn bookinfo(mesh: &Mesh) {
    let mut sample = String::new();
    let mut recipes = BTreeSet::new();
    for path in manifests("samples/bookinfo") {
        let text = fs::read_to_string(path).unwrap();
        recipes.extend(text.lines().filter_map(|line| Some(line.trim().strip_prefix("image: ")?.to_owned())));
        sample += &text;
        sample += "\n---\n";
    }
    let app = Recipe::program("app", bin_dir().unwrap().join("culvert-app"));
    let recipes: Vec<_> = recipes.into_iter().map(|name| Recipe { name, ..app.clone() }).collect();
    mesh.cluster.load_images(&recipes).unwrap();
    mesh.cluster.apply("bookinfo.yaml", &sample).unwrap();
    mesh.until_pods("bookinfo", true);
    let page = text(&mesh.pod_of("bookinfo", "productpage"), "/status/podIP").parse::<IpAddr>().unwrap();
    let mut versions = BTreeSet::new();
    wait::until("pages with every version of the reviews", BOUND, || {
        let answer = http::get(mesh.cluster.fabric(), (page, 9080).into(), "/productpage").ok()?;
        let known = ["v1", "v2", "v3"].into_iter().filter(|v| answer.body.contains(&format!("reviews {v} ")));
        versions.extend(known.filter(|_| answer.status == 200));
        (versions.len() == 3).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}, of versions {versions:?}\n{}", mesh.state()));
    // Each hop was between two proven identities.
    let pods = mesh.pods("bookinfo");
    let node =
        text(pods.iter().find(|pod| pod["metadata"]["labels"]["app"] == "productpage").unwrap(), "/spec/nodeName");
    let proxy = mesh.part_on("ztunnel", &node);
    let log = mesh.kubectl(&["logs", &proxy, "--namespace", SYSTEM]).unwrap();
    let identity = "dst.identity=\"spiffe://cluster.local/ns/bookinfo/sa/bookinfo-reviews\"";
    assert!(log.contains(identity), "{log}");
    // What came in plaintext was the page's readers alone: the kubelet's probes do not pass the mesh.
    let gateway = |line: &&str| line.contains("direction=\"inbound\"") && line.contains("src.addr=10.244.");
    let strangers: Vec<_> = log.lines().filter(gateway).filter(|line| !line.contains("src.identity=")).collect();
    assert!(strangers.is_empty(), "{strangers:#?}");
}
