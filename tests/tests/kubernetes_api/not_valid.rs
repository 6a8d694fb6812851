//! What the API server stores and culvertd does not take, from the first version on: it is no stranger to the mesh.

use mesh_proto::workload::TunnelProtocol;
use serde_json::json;
use tests::interop::xds_client::WORKLOAD_TYPE;

use super::scene::{Scene, pod, pod_status};
use super::status::until_event;
use super::{WEB, workload};

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_label_means_nothing_is_not_told_to_take_plaintext() {
    let scene = Scene::new();
    scene.allow();
    scene.namespace("shop", &json!({}));
    let ztunnel = scene.pod(&pod("culvert-system", "ztunnel-1", "ztunnel", "node-1"), &pod_status("10.244.0.2"));
    let mut odd = pod("shop", "web-1", "web", "node-1");
    odd["metadata"]["labels"]["istio.io/dataplane-mode"] = json!("sideways");
    scene.pod(&odd, &pod_status("10.244.0.5"));
    // A name as the API server takes it from 1.36 on.
    scene.service("shop", "1web", &json!({"selector": {"app": "web"}, "ports": [{"port": 80}]}));
    let culvertd = scene.ready_culvertd();
    let token = scene.token("culvert-system", "ztunnel", Some(&ztunnel));
    let mut session = culvertd.session(&scene.root(), &token).await.unwrap();
    session.subscribe_wildcard(WORKLOAD_TYPE, &[]).await.unwrap();
    let service = "shop/1web.shop.svc.cluster.local";
    let found = session.collect_until(WORKLOAD_TYPE, |found| workload(found, WEB).is_some()).await.unwrap();
    let web = workload(&found, WEB).unwrap();
    assert_eq!((web.tunnel_protocol(), web.service_account.as_str()), (TunnelProtocol::Hbone, "web"));
    assert!(found.resources.contains_key(service) && web.services.contains_key(service), "{web:?}");
    let refused = culvertd.status()["source"]["refused"][0].take();
    assert_eq!((&refused["object"], &refused["keeps_last_good"]), (&json!("Pod shop/web-1"), &json!(false)));
    until_event(&scene, "shop", "web-1", "counts as enrolled");

    scene.label("shop", "web-1", &json!({"istio.io/dataplane-mode": "none"}));
    let is_mended = |web: mesh_proto::workload::Workload| web.tunnel_protocol() == TunnelProtocol::None;
    session.collect_until(WORKLOAD_TYPE, |found| workload(found, WEB).is_some_and(is_mended)).await.unwrap();
    assert_eq!(culvertd.status()["source"]["refused"], json!([]));
}
