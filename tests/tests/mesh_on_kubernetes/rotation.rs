//! The mesh's root is replaced by another one, in the three edits that its Secret is made for.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tests::kubernetes::pki::Pki;
use tests::wait;

use crate::cli;
use crate::mesh::{BOUND, Mesh, REDIRECTION, SYSTEM, is_ready, text};

const SECRET: &str = "/api/v1/namespaces/culvert-system/secrets/culvert-ca-root";
const PUBLISHED: &str = "/api/v1/namespaces/culvert-system/configmaps/culvert-ca-root-cert";

/// Both roots are trusted, then the new one signs, then the old one is forgotten. After each step every proxy, as it runs, gets new
/// certificates once its kubelet has brought it the roots.
/// Throughout, identities that are new make tunnels that are new to `target`.
pub fn rotate(mesh: &Mesh, target: &str) {
    let stored = mesh.cluster.api().get(SECRET).unwrap().expect("the root's Secret");
    let old = String::from_utf8(BASE64.decode(text(&stored, "/data/root-cert.pem")).unwrap()).unwrap();
    let next = Pki::create(&mesh.cluster.folder().join("next-root")).unwrap();
    let (new, key) = (next.root(), fs::read_to_string(next.path("ca.key")).unwrap());
    let both = format!("{old}{new}");
    let turned = format!("{new}{old}");
    let proxies = running(mesh);

    let [before] = published(mesh).try_into().expect("one root");
    let step = |edit: &Value, roots: &str| {
        replace(mesh, edit);
        stranger(mesh, target);
        followed(mesh, roots);
        stranger(mesh, target);
    };
    step(&json!({"root-cert.pem": both}), &both);
    let two = published(mesh);
    assert!(two.len() == 2 && two.contains(&before), "{two:?}");
    // The one that signs is told of first.
    step(&json!({"ca-cert.pem": new, "ca-key.pem": key}), &turned);
    step(&json!({"root-cert.pem": new}), new);
    let after = published(mesh);
    assert!(after.len() == 1 && after[0] != before, "{after:?}");
    assert_eq!(running(mesh), proxies, "no proxy was replaced or restarted");

    // The webhooks are registered under the new root alone, and believed; one that the API server does not believe is passed over.
    for registration in ["culvertd", "culvertd-custom-kinds"] {
        let path = format!("/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/{registration}");
        let wanted = BASE64.encode(new);
        let is_new = |found: &Value| {
            let hooks = found["webhooks"].as_array().expect("webhooks");
            hooks.iter().all(|hook| hook["clientConfig"]["caBundle"] == *wanted).then_some(())
        };
        mesh.cluster.api().until("webhooks under the new root", &path, BOUND, is_new).unwrap();
    }
    let label =
        ["label", "namespace", "kube-public", "istio.io/dataplane-mode=perhaps", "--overwrite", "--dry-run=server"];
    let mut last = String::new();
    wait::until("a label that means nothing is refused under the new root", BOUND, || {
        last = mesh.kubectl(&label).err()?.to_string();
        last.contains("istio.io/dataplane-mode").then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}: {last}\n{}", mesh.state()));
}

/// The proxies that run, by the ids of their containers.
fn running(mesh: &Mesh) -> BTreeSet<String> {
    let is_proxy = |pod: &&Value| pod["metadata"]["labels"]["app.kubernetes.io/name"] == "ztunnel";
    mesh.pods(SYSTEM).iter().filter(is_proxy).map(|pod| text(pod, "/status/containerStatuses/0/containerID")).collect()
}

/// A pod under an account that nobody had before: nothing that is open already carries what it sends, and both ends prove to each
/// other who they are, whatever each has of the new roots.
fn stranger(mesh: &Mesh, target: &str) {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let name = format!("stranger-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let account =
        format!("{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {name}, namespace: shop}}}}\n---\n");
    let pod = include_str!("newcomer.yaml").replace("newcomer", &name);
    let pod = pod.replace("spec:\n", &format!("spec:\n  serviceAccountName: {name}\n"));
    mesh.cluster.apply("stranger.yaml", &(account + &pod)).unwrap();
    wait::until("a stranger that is captured", BOUND, || {
        let pods = mesh.pods("shop");
        let pod = pods.iter().find(|pod| pod["metadata"]["name"] == *name)?;
        (is_ready(pod) && pod.pointer(REDIRECTION).is_some_and(|value| value == "enabled")).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    let before = mesh.unproven("shop");
    let seen = mesh.run("shop", &name, &["connect", "--to", target]);
    assert_eq!(seen["ok"], true, "{name}: {seen}\n{}", mesh.state());
    assert_eq!(mesh.unproven("shop"), before, "it proved who it is");
}

/// One edit, which every replica takes over.
fn replace(mesh: &Mesh, edit: &Value) {
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
        replicas.iter().zip(&before).all(|(replica, before)| changes(replica) > *before).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
}

/// Waits for these roots to be told of, and for new certificates for everybody, under them.
fn followed(mesh: &Mesh, roots: &str) {
    wait::until("the roots are told of", BOUND, || {
        let told = mesh.cluster.api().get(PUBLISHED).unwrap().expect("the roots");
        (told["data"]["root-cert.pem"] == *roots).then_some(())
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
