//! The mesh is taken off the cluster by deleting its manifests. Pods go on without it, also those that start afterwards,
//! and the nodes are as they were before.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use tests::families::Families;
use tests::netns::NetNs;
use tests::picture::{self, Picture, differences, files};
use tests::wait;

use crate::mesh::{BOUND, Mesh, lasting, manifests, text};

/// Folders of a node that the mesh writes into.
const FOLDERS: [&str; 4] = ["/etc/cni/net.d", "/opt/cni/bin", "/run/culvert", "/sys/fs/bpf/culvert"];

#[test]
fn deleting_the_manifests_releases_every_pod_and_leaves_nothing_on_the_nodes() {
    let mesh = Mesh::without(&[], Families::V4);
    let shop = include_str!("shop.yaml").replace("NAMESPACE", "shop").replace("SERVER", "echo");
    mesh.cluster.apply("shop.yaml", &shop).unwrap();
    mesh.until_pods("shop", false);
    let networks = mesh.networks("shop");
    let before = lasting(|| picture(&mesh, &networks));

    mesh.put_in_place();
    mesh.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"]).unwrap();
    mesh.until_pods("shop", true);
    assert_eq!(exchange(&mesh, "server"), Ok(()));
    let during = differences(&before, &picture(&mesh, &networks));
    let places: BTreeSet<_> = during.iter().filter_map(|line| line.split(':').next()).collect();
    assert!(places.len() > 6, "a mesh that leaves no trace while it is there shows nothing here: {during:#?}");

    for path in manifests("culvert") {
        let file = path.to_str().unwrap();
        mesh.kubectl(&["delete", "--filename", file, "--ignore-not-found", "--wait=false"]).unwrap();
    }
    let mut left = Vec::new();
    wait::until("the nodes as they were before the mesh", BOUND, || {
        left = differences(&before, &picture(&mesh, &networks));
        left.is_empty().then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}, but for {left:#?}\n{}", mesh.state()));
    assert_eq!(exchange(&mesh, "server"), Ok(()), "the pods go on without the mesh");
    // The namespace still has its label; nobody is there who would read it.
    mesh.kubectl(&["rollout", "restart", "deployment/server", "--namespace", "shop"]).unwrap();
    mesh.kubectl(&["rollout", "status", "deployment/server", "--namespace", "shop", "--timeout=60s"]).unwrap();
    wait::until("the pod that started afterwards answers", BOUND, || exchange(&mesh, "server").ok()).unwrap();
    mesh.kubectl(&["wait", "namespace/culvert-system", "--for=delete", "--timeout=60s"]).unwrap();

    // It can be installed anew; the pods that run are captured again.
    mesh.put_in_place();
    mesh.until_pods("shop", true);
    assert_eq!(exchange(&mesh, "server"), Ok(()));
}

/// One exchange from the client's pod with that of another `app`.
fn exchange(mesh: &Mesh, app: &str) -> Result<(), String> {
    let to = format!("{}:7000", text(&mesh.pod_of("shop", app), "/status/podIP"));
    let seen = mesh.run("shop", "client", &["connect", "--to", &to, "--send", "hello", "--read", "5"]);
    if seen["ok"] == true { Ok(()) } else { Err(seen.to_string()) }
}

/// What the mesh touches on the nodes and in these networks.
fn picture(mesh: &Mesh, networks: &[(String, NetNs)]) -> Picture {
    let mut all = Picture::new();
    for node in mesh.cluster.nodes() {
        let look = || FOLDERS.map(|folder| (folder, read(Path::new(folder))));
        for (folder, found) in node.mounts().run(look).unwrap() {
            all.insert(format!("{folder} of {}", node.name), found);
        }
        let rules = picture::of_network(&node.name, node.network()).unwrap();
        // The node's own connections come and go, as do the links and routes of other pods.
        all.extend(rules.into_iter().filter(|(place, _)| place.starts_with("sysctls")));
    }
    for (name, network) in networks {
        all.extend(picture::of_network(name, network).unwrap());
    }
    all
}

/// Files by their names, the small ones with what is in them.
fn read(folder: &Path) -> Vec<String> {
    const SMALL: u64 = 64 * 1024;
    let with_content = |name: String| {
        let small = fs::metadata(&name).is_ok_and(|found| found.is_file() && found.len() < SMALL);
        let content = if small { fs::read_to_string(&name).unwrap_or_default() } else { String::new() };
        format!("{name} {content}")
    };
    files(folder).into_iter().map(with_content).collect()
}
