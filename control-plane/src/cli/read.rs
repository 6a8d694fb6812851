//! The API server's objects to facts. Pure.

#![expect(
    clippy::result_large_err,
    reason = "a pod that is no part of the mesh is no error, but what most of them are"
)]

use k8s_openapi::api::core::v1 as k8s;
use k8s_openapi::api::events::v1::Event;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::facts::{Component, MODE, Node, PART, Part, Pod, REDIRECTION, Root};

/// Annotation of a static pod's object: the UID that the kubelet knows it by.
const STATIC_UID: &str = "kubernetes.io/config.hash";
/// How the agent begins its complaints.
const COMPLAINT: &str = "not captured by the mesh: ";

/// How the runtime names the plugin whose complaint it passes on.
const PLUGIN: &str = "plugin type=\"ztunnel\"";

/// A node.
pub fn node(node: k8s::Node) -> Node {
    let status = node.status.unwrap_or_default();
    let info = status.node_info.unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    Node {
        name: node.metadata.name.unwrap_or_default(),
        kernel: info.kernel_version,
        ready: conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True"),
        linux: info.operating_system == "linux",
    }
}

/// A namespace, and its label.
pub fn namespace(namespace: k8s::Namespace) -> (String, Option<String>) {
    let label = namespace.metadata.labels.and_then(|mut labels| labels.remove(MODE));
    (namespace.metadata.name.unwrap_or_default(), label)
}

/// A pod: one of the mesh's own if it is in the system namespace and says which part it is.
pub fn pod(pod: k8s::Pod, system_namespace: &str) -> Result<Part, Pod> {
    let metadata = pod.metadata;
    let (spec, status) = (pod.spec.unwrap_or_default(), pod.status.unwrap_or_default());
    let mut labels = metadata.labels.unwrap_or_default();
    let annotations = metadata.annotations.unwrap_or_default();
    let (namespace, name) = (metadata.namespace.unwrap_or_default(), metadata.name.unwrap_or_default());
    let node = spec.node_name.unwrap_or_default();
    let ends = metadata.deletion_timestamp.is_some();
    let phase = status.phase.unwrap_or_default();
    let is_part = |component: &Component| labels.get(PART).is_some_and(|label| label == component.workload());
    if let Some(component) = Component::ALL.into_iter().find(|one| namespace == system_namespace && is_part(one)) {
        let conditions = status.conditions.unwrap_or_default();
        let containers = status.container_statuses.unwrap_or_default();
        return Ok(Part {
            component,
            pod: name,
            node,
            image: spec.containers.into_iter().next().and_then(|container| container.image).unwrap_or_default(),
            ready: conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True"),
            not_running: not_running(&phase, containers.first()),
            // One that was evicted stays until somebody deletes it; another has taken its place.
            ends: ends || matches!(phase.as_str(), "Succeeded" | "Failed"),
        });
    }
    Err(Pod {
        namespace,
        name,
        uids: metadata.uid.into_iter().chain(annotations.get(STATIC_UID).cloned()).collect(),
        node,
        phase,
        has_address: status.pod_ip.is_some_and(|ip| !ip.is_empty()),
        host_network: spec.host_network.unwrap_or(false),
        ends,
        mode: labels.remove(MODE),
        annotated: annotations.get(REDIRECTION).is_some_and(|value| value == "enabled"),
        runtime_class: spec.runtime_class_name,
    })
}

fn not_running(phase: &str, container: Option<&k8s::ContainerStatus>) -> Option<String> {
    let state = container.and_then(|container| container.state.as_ref());
    if state.is_some_and(|state| state.running.is_some()) {
        return None;
    }
    let waits = state.and_then(|state| state.waiting.as_ref());
    let ended = state.and_then(|state| state.terminated.as_ref());
    let (reason, message) = match (waits, ended) {
        (Some(waits), _) => (waits.reason.clone(), waits.message.clone()),
        (None, Some(ended)) => (ended.reason.clone(), ended.message.clone()),
        (None, None) => (Some(format!("its phase is {phase:?}")), None),
    };
    let parts: Vec<_> = [reason, message].into_iter().flatten().filter(|text| !text.is_empty()).collect();
    Some(parts.join(": "))
}

/// What an agent complains of: the pod's UID, when it was said last, and why.
pub fn complaint(event: Event) -> Option<(String, String, String)> {
    said(event, |note| Some(note.strip_prefix(COMPLAINT).unwrap_or(note).to_owned()))
}

/// That a pod was not started because the mesh's CNI plugin refused to make its network, as the kubelet tells: the pod's UID,
/// when it was said last, and why.
pub fn refused_start(event: Event) -> Option<(String, String, String)> {
    said(event, |note| {
        let (_, plugin) = note.split_once(PLUGIN)?;
        let why = plugin.strip_prefix(" failed (add): ").unwrap_or(plugin);
        Some(why.trim().to_owned())
    })
}

fn said(event: Event, read: impl Fn(&str) -> Option<String>) -> Option<(String, String, String)> {
    let regarding = event.regarding?;
    if regarding.kind.as_deref() != Some("Pod") {
        return None;
    }
    let reason = read(&event.note?)?;
    // In whichever way its author counts.
    let series = event.series.map(|series| series.last_observed_time.0.to_string());
    let counted = || event.deprecated_last_timestamp.map(|time| time.0.to_string());
    let once = || event.event_time.map(|time| time.0.to_string());
    let at = series.or_else(counted).or_else(once).unwrap_or_default();
    Some((regarding.uid?, at, reason))
}

/// The roots of a PEM text.
///
/// # Errors
/// It is none.
pub fn roots(pem: &str) -> Result<Vec<Root>, String> {
    let certificates = mesh_identity::issuer::certificates_from_pem(pem).map_err(|error| error.to_string())?;
    certificates.iter().map(|der| root(der)).collect()
}

fn root(der: &[u8]) -> Result<Root, String> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
    let expires = OffsetDateTime::from_unix_timestamp(certificate.validity().not_after.timestamp());
    Ok(Root {
        fingerprint: Sha256::digest(der).iter().map(|byte| format!("{byte:02x}")).collect(),
        subject: certificate.subject().to_string(),
        expires: expires.ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(object: Value) -> Result<Part, Pod> {
        pod(serde_json::from_value(object).unwrap(), "mesh")
    }

    #[test]
    fn a_pod_of_the_mesh_is_known_by_its_label_and_namespace() {
        let object = |namespace: &str, state: Value| {
            json!({
                "metadata": {"namespace": namespace, "name": "p", "labels": {PART: "ztunnel"}},
                "spec": {"nodeName": "n", "containers": [{"name": "proxy", "image": "i:1"}]},
                "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
                           "containerStatuses": [{"name": "proxy", "image": "", "imageID": "", "ready": true,
                                                  "restartCount": 0, "state": state}]},
            })
        };
        let part = read(object("mesh", json!({"running": {}}))).unwrap();
        assert_eq!((part.component, part.ready, part.image.as_str()), (Component::Proxy, true, "i:1"));
        assert_eq!(part.not_running, None);
        let waits = json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}});
        let part = read(object("mesh", waits)).unwrap();
        assert_eq!(part.not_running.as_deref(), Some("ImagePullBackOff: no such image"));
        let part = read(json!({"metadata": {"namespace": "mesh", "name": "p", "labels": {PART: "culvertd"}}})).unwrap();
        assert_eq!(part.not_running.as_deref(), Some("its phase is \"\""));
        // Anybody may label a pod like that elsewhere.
        assert!(read(object("shop", json!({"running": {}}))).is_err());
    }

    #[test]
    fn a_pod_says_what_decides() {
        let pod = read(json!({
            "metadata": {"namespace": "shop", "name": "p", "uid": "u", "labels": {MODE: "ambient"},
                         "annotations": {REDIRECTION: "enabled", STATIC_UID: "s"}, "deletionTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"containers": [], "nodeName": "n", "hostNetwork": true, "runtimeClassName": "gvisor"},
            "status": {"phase": "Running", "podIP": "10.0.0.1"},
        }))
        .unwrap_err();
        assert_eq!(pod.uids, ["u", "s"]);
        assert!(pod.annotated && pod.ends && pod.host_network && pod.has_address);
        assert_eq!((pod.mode.as_deref(), pod.runtime_class.as_deref()), (Some("ambient"), Some("gvisor")));
        assert_eq!(read(json!({"metadata": {}})).unwrap_err(), Pod::default(), "what is missing is the default");
    }

    #[test]
    fn complaints_are_those_on_pods() {
        let event = |kind: &str| {
            let event = json!({
                "eventTime": "2026-01-01T00:00:00.000000Z", "note": "not captured by the mesh: no rule",
                "regarding": {"kind": kind, "uid": "u"}, "metadata": {},
            });
            complaint(serde_json::from_value(event).unwrap())
        };
        let (uid, _, why) = event("Pod").unwrap();
        assert_eq!((uid.as_str(), why.as_str()), ("u", "no rule"));
        assert_eq!(event("ReplicaSet"), None);
    }

    #[test]
    fn a_start_that_the_plugin_refused_is_told_from_others() {
        let event = |note: &str| {
            let event = json!({
                "eventTime": null, "deprecatedLastTimestamp": "2026-01-01T00:00:00Z", "note": note,
                "regarding": {"kind": "Pod", "uid": "u"}, "metadata": {},
            });
            refused_start(serde_json::from_value(event).unwrap())
        };
        let failed =
            "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox";
        let by = |plugin: &str| {
            format!("{failed} \"ab\": plugin type=\"{plugin}\" failed (add): its class has a kernel of its own")
        };
        let (uid, at, why) = event(&by("ztunnel")).unwrap();
        assert_eq!((uid.as_str(), why.as_str()), ("u", "its class has a kernel of its own"));
        assert!(at.starts_with("2026-01-01"), "{at}");
        assert_eq!(event(&by("bridge")), None);
    }

    #[test]
    fn roots_have_a_fingerprint_and_an_end() {
        let authority = mesh_identity::authority::Authority::generate("a.b", std::time::SystemTime::now()).unwrap();
        let found = roots(&authority.roots_pem()).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].fingerprint.len() == 64 && found[0].expires.ends_with('Z'), "{found:?}");
        assert_eq!(roots("").unwrap(), []);
        assert!(roots("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").is_err());
    }
}
