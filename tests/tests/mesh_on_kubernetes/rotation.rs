//! The mesh's root is replaced by another one, in the three edits that its Secret is made for.

use std::collections::BTreeSet;
use std::fs;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tests::kubernetes::pki::Pki;
use tests::wait;

use crate::cli;
use crate::mesh::{BOUND, Mesh, SYSTEM, text};

const SECRET: &str = "/api/v1/namespaces/culvert-system/secrets/culvert-ca-root";
const PUBLISHED: &str = "/api/v1/namespaces/culvert-system/configmaps/culvert-ca-root-cert";

/// Both roots are trusted, then the new one signs, then the old one is forgotten. After each step every proxy, as it runs, gets new
/// certificates once its kubelet has brought it the roots.
pub fn rotate(mesh: &Mesh) {
    let stored = mesh.cluster.api().get(SECRET).unwrap().expect("the root's Secret");
    let old = String::from_utf8(BASE64.decode(text(&stored, "/data/root-cert.pem")).unwrap()).unwrap();
    let next = Pki::create(&mesh.cluster.folder().join("next-root")).unwrap();
    let (new, key) = (next.root(), fs::read_to_string(next.path("ca.key")).unwrap());
    let both = format!("{old}{new}");
    let turned = format!("{new}{old}");
    let proxies = running(mesh);

    let [before] = published(mesh).try_into().expect("one root");
    step(mesh, &json!({"root-cert.pem": both}), &both);
    let two = published(mesh);
    assert!(two.len() == 2 && two.contains(&before), "{two:?}");
    // The one that signs is told of first.
    step(mesh, &json!({"ca-cert.pem": new, "ca-key.pem": key}), &turned);
    step(mesh, &json!({"root-cert.pem": new}), new);
    let after = published(mesh);
    assert!(after.len() == 1 && after[0] != before, "{after:?}");
    assert_eq!(running(mesh), proxies, "no proxy was replaced or restarted");
}

/// The proxies that run, by the ids of their containers.
fn running(mesh: &Mesh) -> BTreeSet<String> {
    let is_proxy = |pod: &&Value| pod["metadata"]["labels"]["app.kubernetes.io/name"] == "ztunnel";
    mesh.pods(SYSTEM).iter().filter(is_proxy).map(|pod| text(pod, "/status/containerStatuses/0/containerID")).collect()
}

/// One edit, followed by new certificates for everybody, under the roots that are to be trusted then.
fn step(mesh: &Mesh, edit: &Value, roots: &str) {
    let is_culvertd = |pod: &Value| pod["metadata"]["labels"]["app.kubernetes.io/name"] == "culvertd";
    let replicas: Vec<String> =
        mesh.pods(SYSTEM).iter().filter(|pod| is_culvertd(pod)).map(|pod| text(pod, "/metadata/name")).collect();
    let changes = |replica: &String| {
        let log = mesh.kubectl(&["logs", replica, "--namespace", SYSTEM]).unwrap_or_default();
        log.matches("the authority was replaced").count()
    };
    let before: Vec<usize> = replicas.iter().map(changes).collect();
    let patch = Some(("application/merge-patch+json", &json!({"stringData": edit})));
    let answer = mesh.cluster.api().request("PATCH", SECRET, patch).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    wait::until("every replica of culvertd follows", BOUND, || {
        let follows = replicas.iter().zip(&before).all(|(replica, before)| changes(replica) > *before);
        let told = mesh.cluster.api().get(PUBLISHED).unwrap().expect("the roots");
        (follows && told["data"]["root-cert.pem"] == *roots).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));

    // In this order: the first is the one that their certificates lead to.
    let wanted = published(mesh);
    let mut last = Value::Null;
    wait::until("certificates of all proxies under these roots", BOUND, || {
        last = cli::json(mesh, &["ztunnel", "certificates"]);
        let proxies = last["proxies"].as_array().expect("proxies");
        let under = |one: &Value| {
            let roots = one["roots"].as_array().into_iter().flatten().filter_map(Value::as_str);
            one["state"] == "Valid" && roots.map(str::to_owned).collect::<Vec<_>>() == wanted
        };
        let certificates: Vec<&Value> = proxies.iter().filter_map(|one| one["items"].as_array()).flatten().collect();
        (proxies.len() == 2 && certificates.len() >= 2 && certificates.into_iter().all(under)).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}: {wanted:?}: {last:#}\n{}", mesh.state()));
}

/// Fingerprints of the roots that the cluster tells of.
fn published(mesh: &Mesh) -> Vec<String> {
    let status = cli::json(mesh, &["status"]);
    let roots = status["certificates"]["roots"].as_array().expect("roots");
    roots.iter().map(|root| text(root, "/fingerprint")).collect()
}
