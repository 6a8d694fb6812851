//! What an agent may write: the annotation of the pods of its own node, by the admission policy that is shipped.

use serde_json::{Value, json};
use tests::kubernetes::api::Api;
use tests::wait;

use super::LONG;
use super::scene::{self, Scene, pod, pod_status};

/// Asks for a change of a pod's status. Returns the code of the answer, and what it says.
fn patch(agent: &Api, name: &str, patch: &Value) -> (u16, String) {
    let path = format!("/api/v1/namespaces/shop/pods/{name}/status");
    let answer = agent.request("PATCH", &path, Some(("application/merge-patch+json", patch))).unwrap();
    (answer.status, answer.body)
}

#[test]
fn an_agent_writes_one_annotation_of_its_own_pods() {
    let scene = Scene::new();
    scene.namespace("shop", &json!({}));
    for name in ["node-1", "node-2"] {
        scene.node(name);
    }
    for object in scene::all("culvert/10-rbac.yaml").iter().chain(&scene::all("culvert/15-node-policy.yaml")) {
        if object["metadata"]["name"] == "culvert-node" {
            scene.install(object);
        }
    }
    let mut near = pod("shop", "near", "web", "node-1");
    near["metadata"]["annotations"] = json!({"theirs": "kept"});
    scene.pod(&near, &pod_status("10.244.0.5"));
    scene.pod(&pod("shop", "far", "web", "node-2"), &pod_status("10.244.1.5"));
    let own = scene.pod(&pod("culvert-system", "agent-1", "culvert-node", "node-1"), &pod_status("10.244.0.2"));
    let server = scene.server().api();
    let of =
        |pod| server.with_token(&scene.token_for("culvert-system", "culvert-node", pod, &[scene::ISSUER])).unwrap();
    let (agent, unbound) = (of(Some(&own)), of(None));

    let annotation = |value: Value| json!({"metadata": {"annotations": {"ambient.istio.io/redirection": value}}});
    // A policy is in force a moment after it is there.
    wait::until("the policy", LONG, || (patch(&agent, "far", &annotation(json!("enabled"))).0 == 403).then_some(()))
        .unwrap();
    let refused = patch(&agent, "far", &annotation(json!("enabled"))).1;
    assert!(refused.contains("of its own node alone"), "{refused}");
    assert_eq!(patch(&unbound, "near", &annotation(json!("enabled"))).0, 403, "a token of no node");
    for value in [json!("enabled"), Value::Null] {
        let (code, said) = patch(&agent, "near", &annotation(value.clone()));
        assert_eq!(code, 200, "{said}");
        let pod = scene.get("/api/v1/namespaces/shop/pods/near");
        assert_eq!(pod["metadata"]["annotations"]["ambient.istio.io/redirection"], value);
    }
    for more in [
        json!({"metadata": {"annotations": {"another": "x"}}}),
        json!({"metadata": {"annotations": {"theirs": "changed"}}}),
        json!({"metadata": {"annotations": {"theirs": null}}}),
        json!({"metadata": {"labels": {"app": "another"}}}),
        json!({"metadata": {"finalizers": ["example.com/held"]}}),
        json!({"status": {"phase": "Failed"}}),
        json!({"status": {"podIP": "10.244.1.5", "podIPs": [{"ip": "10.244.1.5"}]}}),
    ] {
        let (code, said) = patch(&agent, "near", &more);
        assert!(code == 403 && said.contains("an agent writes"), "{more}: {code} {said}");
    }
    // Others are not held to it.
    scene.patch("/api/v1/namespaces/shop/pods/far/status", &json!({"status": {"phase": "Failed"}}));
}
