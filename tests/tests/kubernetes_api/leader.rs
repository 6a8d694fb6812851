//! One replica leads, and takes the startup taint from nodes.

use serde_json::{Value, json};
use tests::process::Signal;
use tests::wait;

use super::LONG;
use super::scene::{Culvertd, Scene, pod, pod_status};

const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/culvert-system/leases/culvertd-leader";
const TAINT: &str = "culvert.dev/agent-not-ready";

/// Which of the replicas leads, once all agree on it, and it is another than `before`.
fn leader(replicas: &[&Culvertd], before: &str) -> (usize, String) {
    wait::until("a leader that all know", LONG, || {
        let known: Vec<Value> = replicas.iter().map(|replica| replica.status()["leader"].take()).collect();
        let leads: Vec<usize> = (0..known.len()).filter(|at| known[*at]["leads"] == true).collect();
        assert!(leads.len() <= 1, "{known:?}");
        let &[leads] = &leads[..] else { return None };
        let holder = known[leads]["me"].as_str().unwrap().to_owned();
        (holder != before && known.iter().all(|one| one["holder"] == *holder)).then_some((leads, holder))
    })
    .unwrap()
}

fn metric(replica: &Culvertd) -> String {
    let metrics = replica.metrics();
    metrics.lines().find(|line| line.starts_with("culvertd_leader ")).unwrap_or_else(|| panic!("{metrics}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_replica_leads_and_another_follows_it() {
    let scene = Scene::new();
    scene.allow();
    let mut replicas: Vec<Culvertd> = (0..3).map(|_| scene.culvertd()).collect();
    let (first, holder) = leader(&replicas.iter().collect::<Vec<_>>(), "");
    assert_eq!(scene.get(LEASE)["spec"]["holderIdentity"], *holder);
    for (at, replica) in replicas.iter().enumerate() {
        assert_eq!(metric(replica), format!("culvertd_leader {}", u8::from(at == first)));
    }

    // Killed: when its term is over another takes the lease.
    drop(replicas.remove(first));
    let (second, holder) = leader(&replicas.iter().collect::<Vec<_>>(), &holder);
    let transitions = scene.get(LEASE)["spec"]["leaseTransitions"].as_u64().unwrap();
    assert_eq!(transitions, 1);

    // One that stands still while another takes over knows at once that it does not lead any more.
    let sleeper = replicas.remove(second);
    sleeper.process.signal(Signal::SIGSTOP).unwrap();
    let _ = leader(&replicas.iter().collect::<Vec<_>>(), &holder);
    sleeper.process.signal(Signal::SIGCONT).unwrap();
    assert_eq!(sleeper.status()["leader"]["leads"], false);
    replicas.push(sleeper);

    // Without the API server nobody leads, and afterwards somebody does.
    let server = scene.server();
    server.component.kill().unwrap();
    for replica in &replicas {
        replica.status_until("nobody to lead", |status| status["leader"]["leads"] == false);
    }
    server.component.restart().unwrap();
    let _ = leader(&replicas.iter().collect::<Vec<_>>(), "");

    // One that ends in order gives the lease back: the next one does not wait for the term.
    let (fourth, holder) = leader(&replicas.iter().collect::<Vec<_>>(), "");
    let ends = replicas.remove(fourth);
    ends.process.terminate(LONG).unwrap();
    assert!(ends.process.log_tail(20).contains("the lease is given back"), "{}", ends.process.log_tail(20));
    let (_, last) = leader(&replicas.iter().collect::<Vec<_>>(), &holder);
    assert_eq!(scene.get(LEASE)["spec"]["holderIdentity"], *last);
}

fn tainted_node(scene: &Scene, name: &str) {
    let taints = json!([
        {"key": TAINT, "effect": "NoSchedule"},
        {"key": "example.com/other", "value": "kept", "effect": "NoSchedule"},
        {"key": TAINT, "effect": "NoExecute"},
    ]);
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"taints": taints}});
    scene.create("/api/v1/nodes", &object);
}

fn taints(scene: &Scene, node: &str) -> Vec<String> {
    let node = scene.get(&format!("/api/v1/nodes/{node}"));
    let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    let keys = taints.iter().map(|taint| taint["key"].as_str().unwrap().to_owned());
    // Kubernetes' own come and go.
    keys.filter(|key| !key.starts_with("node.kubernetes.io/")).collect()
}

fn agent(scene: &Scene, namespace: &str, name: &str, account: &str, node: &str, is_ready: bool) {
    let mut object = pod(namespace, name, account, node);
    object["metadata"]["labels"]["app.kubernetes.io/name"] = json!("culvert-node");
    let mut status = pod_status("10.244.0.2");
    if !is_ready {
        status["conditions"][0]["status"] = json!("False");
    }
    scene.pod(&object, &status);
}

fn until_free(scene: &Scene, node: &str) {
    wait::until("the node without the taint", LONG, || (taints(scene, node) == ["example.com/other"]).then_some(()))
        .unwrap_or_else(|error| panic!("{error}: {:?}", taints(scene, node)));
}

#[tokio::test(flavor = "multi_thread")]
async fn startup_taint_goes_when_the_agent_is_ready() {
    let scene = Scene::new();
    scene.allow();
    scene.namespace("shop", &json!({}));
    for name in ["node-1", "node-2", "node-3"] {
        tainted_node(&scene, name);
    }
    let _culvertd = scene.ready_culvertd();
    let still = [TAINT, "example.com/other", TAINT];
    // Pods that look like the agent's, and one that is it but not ready.
    agent(&scene, "shop", "looks-like", "culvert-node", "node-1", true);
    agent(&scene, "culvert-system", "another", "another", "node-1", true);
    agent(&scene, "culvert-system", "agent-3", "culvert-node", "node-3", false);
    // What comes later is done: so all that was before was looked at.
    agent(&scene, "culvert-system", "agent-2", "culvert-node", "node-2", true);
    until_free(&scene, "node-2");
    assert_eq!(
        (taints(&scene, "node-1"), taints(&scene, "node-3")),
        (still.map(str::to_owned).into(), still.map(str::to_owned).into())
    );

    let pod_3 = "/api/v1/namespaces/culvert-system/pods/agent-3";
    scene.patch(&format!("{pod_3}/status"), &json!({"status": pod_status("10.244.0.3")}));
    until_free(&scene, "node-3");

    // The node leaves and joins again, and its pods with it.
    scene.delete("/api/v1/nodes/node-3");
    scene.delete(pod_3);
    tainted_node(&scene, "node-3");
    agent(&scene, "culvert-system", "agent-3b", "culvert-node", "node-3", true);
    until_free(&scene, "node-3");
    assert_eq!(taints(&scene, "node-1"), still);
}
