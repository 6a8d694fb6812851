//! Fifty pods come and go while agents are killed (SIGKILL). Each connects from its first instruction on, with a marker that is
//! never seen between the nodes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;
use tests::wait;

use crate::mesh::{BOUND, Mesh, SYSTEM, text};

const MARKER: &str = "marker-of-a-restless-pod";
/// Ten pods each.
const GENERATIONS: usize = 5;

#[test]
fn no_pod_starts_uncaptured_however_often_agents_are_killed() {
    let mesh = Mesh::install(&[MARKER]);
    let objects = include_str!("shop.yaml").replace("NAMESPACE", "busy").replace("SERVER", "echo");
    mesh.cluster.apply("shop.yaml", &objects).unwrap();
    mesh.kubectl(&["label", "namespace", "busy", "istio.io/dataplane-mode=ambient"]).unwrap();
    mesh.until_pods("busy", true);
    let server = text(&mesh.pod_of("busy", "server"), "/status/podIP");
    let restless = include_str!("restless.yaml").replace("SERVER", &server).replace("MARKER", MARKER);
    mesh.cluster.apply("restless.yaml", &restless).unwrap();

    let mut seen = BTreeSet::new();
    let mut addresses = BTreeSet::new();
    for generation in 0..GENERATIONS {
        let restart = ["rollout", "restart", "deployment/restless", "--namespace", "busy"];
        if generation > 0 {
            mesh.kubectl(&restart).unwrap();
        }
        for node in [["node1", "node2"], ["node2", "node1"]][generation % 2] {
            let agent = mesh.part_on("culvert-node", node);
            mesh.kill(&agent);
            mesh.rolled_out();
        }
        let wait = ["rollout", "status", "deployment/restless", "--namespace", "busy", "--timeout=120s"];
        mesh.kubectl(&wait).unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
        for pod in mesh.pods("busy").iter().filter(|pod| pod["metadata"]["labels"]["app"] == "restless") {
            seen.insert(text(pod, "/metadata/uid"));
            addresses.extend(pod.pointer("/status/podIP").and_then(|ip| ip.as_str()?.parse::<IpAddr>().ok()));
        }
    }
    // The former generation ends.
    mesh.kubectl(&["wait", "pod", "--all", "--for=condition=Ready", "--namespace", "busy", "--timeout=60s"]).unwrap();
    mesh.until_pods("busy", true);
    // Those whose end no agent was told of are found to be gone.
    let pods = names(&mesh.pods("busy"), "/metadata/uid");
    wait::until("every pod is in force, and none that is gone", BOUND, || {
        let enrolled = [mesh.enrolled_on("node1")?, mesh.enrolled_on("node2")?].concat();
        (names(&enrolled, "/uid") == pods && enrolled.iter().all(|pod| pod["enrolled"] == true)).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));

    let report = mesh.wire.report();
    report.complete().unwrap();
    assert_eq!(report.marked(MARKER).count(), 0, "in clear between the nodes");
    // Those that are on the server's own node are not seen on the wire, but by its proxy.
    let unproven = mesh.unproven("busy");
    assert!(
        unproven.is_empty(),
        "taken in without an identity: {unproven:#?}\n{:#?}\n{}",
        strangers(&mesh),
        mesh.state()
    );
    let addresses: Vec<IpAddr> = addresses.into_iter().collect();
    let server = [server.parse().unwrap()];
    let tunnels = report.between(&addresses, &server).filter(|(_, flow)| flow.is_tls() && flow.payload > 0).count();
    eprintln!("{} pods seen, {tunnels} tunnels of theirs between the nodes", seen.len());
    assert!(seen.len() >= 10 * GENERATIONS && tunnels >= GENERATIONS, "too little to show anything");
}

/// What the proxies' logs have of connections that came in without an identity.
fn strangers(mesh: &Mesh) -> Vec<String> {
    let of_node = |node: &str| {
        let log = mesh.kubectl(&["logs", &mesh.part_on("ztunnel", node), "--namespace", SYSTEM]).unwrap_or_default();
        let unproven = |line: &&str| line.contains("direction=\"inbound\"") && !line.contains("src.identity=");
        log.lines().filter(unproven).map(str::to_owned).collect::<Vec<_>>()
    };
    [of_node("node1"), of_node("node2")].concat()
}

fn names(objects: &[Value], at: &str) -> BTreeSet<String> {
    objects.iter().map(|object| text(object, at)).collect()
}
