//! A node is drained under load, and the control plane's last replica is not evicted.

use std::thread;

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use tests::app::storm::Report;
use tests::wait;

use crate::mesh::{BOUND, Mesh, SYSTEM, text};
use crate::rollout::storm_to;

/// Workloads move to the other node, and no connection fails that the end of its server does not cut.
pub fn drain(mesh: &Mesh) {
    mesh.cluster.apply("drain.yaml", include_str!("drain.yaml")).unwrap();
    let available = ["rollout", "status", "deployment/web", "--namespace", "moved", "--timeout=120s"];
    mesh.kubectl(&available).unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    mesh.until_pods("moved", true);
    let nodes = |namespace: &str, app: &str| -> Vec<String> {
        let of_app = |pod: &Value| {
            let labels = &pod["metadata"]["labels"];
            let is_it = labels["app"] == *app || labels["app.kubernetes.io/name"] == *app;
            is_it && pod.pointer("/metadata/deletionTimestamp").is_none()
        };
        mesh.pods(namespace).iter().filter(|pod| of_app(pod)).map(|pod| text(pod, "/spec/nodeName")).collect()
    };
    assert!(nodes("moved", "web").contains(&"node2".to_owned()), "nothing to be moved");
    let service = mesh.cluster.api().get("/api/v1/namespaces/moved/services/web").unwrap().expect("the service");
    let target = format!("{}:7000", text(&service, "/spec/clusterIP"));
    wait::until("the service is reached", BOUND, || {
        (mesh.run("moved", "client", &["connect", "--to", &target])["ok"] == true).then_some(())
    })
    .unwrap();

    let load = ["storm", "--to", &target, "--rate", "50", "--streams", "10", "--seconds", "300"];
    let report: Report = thread::scope(|scope| {
        let storm = scope.spawn(|| mesh.run("moved", "client", &load));
        let process = wait::until("the load runs", BOUND, || storm_to(&target)).unwrap();
        let drain = ["drain", "node2", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=180s"];
        let drained = mesh.kubectl(&drain);
        let moved = drained.and_then(|_| mesh.kubectl(&available));
        kill(process, Signal::SIGTERM).unwrap();
        moved.unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
        serde_json::from_value(storm.join().expect("no panic")).unwrap()
    });
    eprintln!("drained under load: {report:?}");
    assert!(report.ok, "{report:#?}\n{}", mesh.state());
    assert!(report.attempts > 200 && report.ended_streams > 10, "too little load to show anything: {report:?}");
    assert_eq!(nodes("moved", "web"), ["node1", "node1"]);
    mesh.rolled_out();
    assert_eq!(nodes(SYSTEM, "culvertd"), ["node1", "node1"]);
    assert_eq!(nodes(SYSTEM, "ztunnel").len(), 2, "the node's own parts stay");

    last_replica(mesh);
    mesh.kubectl(&["uncordon", "node1", "node2"]).unwrap();
    mesh.rolled_out();
}

/// One of two replicas may be evicted while nothing can start in its place; the other may not then.
fn last_replica(mesh: &Mesh) {
    mesh.kubectl(&["cordon", "node1", "node2"]).unwrap();
    let replicas = format!("/api/v1/namespaces/{SYSTEM}/pods?labelSelector=app.kubernetes.io%2Fname%3Dculvertd");
    let replicas: Vec<String> =
        mesh.cluster.api().list(&replicas).unwrap().iter().map(|pod| text(pod, "/metadata/name")).collect();
    let [first, second] = replicas.as_slice() else { panic!("{replicas:?}") };
    let evict = |name: &str| {
        let metadata = json!({"name": name, "namespace": SYSTEM});
        let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata});
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{name}/eviction");
        mesh.cluster.api().request("POST", &path, Some(("application/json", &eviction))).unwrap()
    };
    // The budget's controller counts them a moment after they are ready.
    let evicted = wait::until("an eviction that is allowed", BOUND, || {
        let answer = evict(first);
        (answer.status == 201).then_some(())
    });
    evicted.unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    let refused = evict(second);
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.body.contains("disruption budget"), "{}", refused.body);
}
