//! Entries as objects of a cluster: their kinds may come later, in whichever version.

use serde_json::{Value, json};
use tests::interop::xds_client::WORKLOAD_TYPE;

use super::scene::{DEFINITIONS, Scene, pod, pod_status};
use super::workload;

fn place(version: &str, plural: &str) -> String {
    format!("/apis/networking.istio.io/{version}/namespaces/shop/{plural}")
}

fn entry(version: &str, kind: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": format!("networking.istio.io/{version}"), "kind": kind, "metadata": {"name": name}, "spec": spec,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_come_with_their_kinds_and_go_with_them() {
    let scene = Scene::new();
    scene.allow();
    scene.namespace("shop", &json!({}));
    let ztunnel = scene.pod(&pod("culvert-system", "ztunnel-1", "ztunnel", "node-1"), &pod_status("10.244.0.2"));
    let culvertd = scene.ready_culvertd();
    let token = scene.token("culvert-system", "ztunnel", Some(&ztunnel));
    let mut session = culvertd.session(&scene.root(), &token).await.unwrap();
    session.subscribe_wildcard(WORKLOAD_TYPE, &[]).await.unwrap();

    scene.define("networking.istio.io.yaml");
    let vm = entry(
        "v1",
        "WorkloadEntry",
        "vm",
        &json!({"address": "192.0.2.7", "labels": {"app": "vm"}, "ports": {"sql": 6432}}),
    );
    scene.create(&place("v1", "workloadentries"), &vm);
    let db = json!({
        "hosts": ["db.example.com"], "resolution": "STATIC", "ports": [{"number": 5432, "name": "sql", "protocol": "TCP"}],
        "workloadSelector": {"labels": {"app": "vm"}},
    });
    scene.create(&place("v1alpha3", "serviceentries"), &entry("v1alpha3", "ServiceEntry", "db", &db));
    let list = json!({
        "hosts": ["list.example.com"], "resolution": "STATIC", "ports": [{"number": 80, "name": "http"}],
        "endpoints": [{"address": "192.0.2.8"}],
    });
    scene.create(&place("v1beta1", "serviceentries"), &entry("v1beta1", "ServiceEntry", "list", &list));

    culvertd.status_until("the kinds", |status| {
        ["ServiceEntry", "WorkloadEntry"].iter().all(|kind| status["watches"][kind]["state"] == "synced")
    });
    let uid = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm";
    let inline = "Kubernetes/networking.istio.io/ServiceEntry/shop/list/192.0.2.8";
    let all = [uid, inline, "shop/db.example.com", "shop/list.example.com"];
    let found = session
        .collect_until(WORKLOAD_TYPE, |found| {
            let ports = workload(found, uid).and_then(|vm| vm.services.get("shop/db.example.com").cloned());
            all.iter().all(|name| found.resources.contains_key(*name))
                && ports.is_some_and(|list| list.ports.iter().any(|port| port.target_port == 6432))
        })
        .await
        .unwrap();
    assert!(found.removed.is_empty(), "{:?}", found.removed);

    scene.delete(&format!("{DEFINITIONS}/serviceentries.networking.istio.io"));
    culvertd.status_until("the end of the kind", |status| status["watches"]["ServiceEntry"]["state"] == "absent");
    let found = session
        .collect_until(WORKLOAD_TYPE, |found| all[1..].iter().all(|name| found.removed.contains(*name)))
        .await
        .unwrap();
    assert!(
        workload(&found, uid).is_some_and(|vm| vm.services.is_empty()),
        "the workload stays, and stands behind nothing"
    );
}
