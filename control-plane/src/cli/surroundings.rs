//! Asks what only `culvert check` wants to know.

use std::collections::BTreeMap;

use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::authorization::v1::ResourceAttributes;
use k8s_openapi::api::core::v1::{Namespace, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::check::{DAEMONSETS, DEPLOYMENTS, OWN_NAMESPACE, OWN_WEBHOOK, REGISTRATIONS, Surroundings, WEBHOOKS};
use super::cluster::{Cluster, all};

/// Label that says how far pods of a namespace may go.
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";
/// Where programs are pinned.
const BPFFS: &str = "/sys/fs/bpf";
/// How the webhooks of other meshes are called, to begin with.
const MESHES: [&str; 4] = ["istio", "linkerd", "consul-connect", "kuma"];
/// Requests at a time.
const AT_ONCE: usize = 8;

/// What installing makes: group and resource, and whether it is in the system namespace. Each is created, and when it is
/// installed again, patched.
const NEEDED: [(&str, &str, bool); 15] = [
    ("", "namespaces", false),
    ("", "resourcequotas", true),
    ("", "serviceaccounts", true),
    ("", "services", true),
    (ADMISSION, "validatingadmissionpolicies", false),
    (ADMISSION, "validatingadmissionpolicybindings", false),
    (ADMISSION, "validatingwebhookconfigurations", false),
    ("apiextensions.k8s.io", "customresourcedefinitions", false),
    ("apps", "daemonsets", true),
    ("apps", "deployments", true),
    (RBAC, "clusterrolebindings", false),
    (RBAC, "clusterroles", false),
    (RBAC, "rolebindings", true),
    (RBAC, "roles", true),
    ("policy", "poddisruptionbudgets", true),
];
/// What is done to them.
const VERBS: [&str; 2] = ["create", "patch"];
/// What it takes to give rights that one does not have: verb, resource, and whether it is in the system namespace.
const GRANTS: [(&str, &str, bool); 4] = [
    ("bind", "clusterroles", false),
    ("bind", "roles", true),
    ("escalate", "clusterroles", false),
    ("escalate", "roles", true),
];
const ADMISSION: &str = "admissionregistration.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";

/// Finds out. What may not be asked is among it.
pub async fn find(cluster: &Cluster, namespace: &str) -> Surroundings {
    let name = |metadata: ObjectMeta| {
        let (namespace, name) = (metadata.namespace.unwrap_or_default(), metadata.name.unwrap_or_default());
        format!("{namespace}/{name}")
    };
    let daemon = |set: DaemonSet| {
        let is_own = set.metadata.namespace.as_deref() == Some(namespace);
        let pod = set.spec.template.spec;
        (name(set.metadata), !is_own && pod.is_some_and(|pod| loads_programs(&pod)))
    };
    let [first, second] = REGISTRATIONS.map(|(name, ..)| cluster.get_global::<ValidatingWebhookConfiguration>(name));
    let (daemons, deployments, hooks, first, second, level, rights, grants) = tokio::join!(
        cluster.list("daemonsets", all, "", "", daemon),
        cluster.list("deployments", all, "", "", |deployment: Deployment| name(deployment.metadata)),
        cluster.list("webhooks", all, "", "", |hook: MutatingWebhookConfiguration| hook.metadata.name),
        first,
        second,
        cluster.get_global::<Namespace>(namespace),
        rights(cluster, namespace, needed()),
        rights(cluster, namespace, GRANTS.map(|(verb, resource, own)| (verb, RBAC, resource, own)).into()),
    );
    let mut around = Surroundings { rights, grants, ..Surroundings::default() };
    match daemons {
        Ok(found) => {
            around.programs = found.iter().filter(|(_, loads)| *loads).map(|(name, _)| name.clone()).collect();
            around.workloads.extend(found.into_iter().map(|(name, _)| name));
        }
        Err(error) => drop(around.unknown.insert(DAEMONSETS, error.to_string())),
    }
    match deployments {
        Ok(found) => around.workloads.extend(found),
        Err(error) => drop(around.unknown.insert(DEPLOYMENTS, error.to_string())),
    }
    match hooks {
        Ok(hooks) => {
            let of_a_mesh = |name: &String| MESHES.iter().any(|mesh| name.starts_with(mesh));
            around.webhooks = hooks.into_iter().flatten().filter(of_a_mesh).collect();
        }
        Err(error) => drop(around.unknown.insert(WEBHOOKS, error.to_string())),
    }
    for ((name, ..), own) in REGISTRATIONS.into_iter().zip([first, second]) {
        match own {
            Ok(own) => around.own_webhooks.extend(own.map(|own| (name, has_roots(&own)))),
            Err(error) => drop(around.unknown.insert(OWN_WEBHOOK, error)),
        }
    }
    match level {
        Ok(found) => {
            let label = |found: Namespace| found.metadata.labels.and_then(|mut labels| labels.remove(POD_SECURITY));
            around.pod_security = found.map(label);
        }
        Err(error) => drop(around.unknown.insert(OWN_NAMESPACE, error)),
    }
    around
}

fn has_roots(own: &ValidatingWebhookConfiguration) -> bool {
    own.webhooks.iter().flatten().all(|hook| hook.client_config.ca_bundle.as_ref().is_some_and(|pem| !pem.0.is_empty()))
}

/// Whether a pod loads eBPF programs, by the look of it: it has the folder in which they are pinned, or the capability.
fn loads_programs(pod: &PodSpec) -> bool {
    let mut paths = pod.volumes.iter().flatten().filter_map(|volume| volume.host_path.as_ref());
    let pins = |path: &str| path == BPFFS || path.strip_prefix(BPFFS).is_some_and(|rest| rest.starts_with('/'));
    let contexts = pod.containers.iter().filter_map(|container| container.security_context.as_ref());
    let mut added = contexts.filter_map(|context| context.capabilities.as_ref()?.add.as_ref()).flatten();
    paths.any(|host| pins(&host.path)) || added.any(|name| name.trim_start_matches("CAP_") == "BPF")
}

/// A verb, a group, a resource, and whether it is asked for in the system namespace.
type Asked = (&'static str, &'static str, &'static str, bool);

fn needed() -> Vec<Asked> {
    let each = |(group, resource, own)| VERBS.map(|verb| (verb, group, resource, own));
    NEEDED.into_iter().flat_map(each).collect()
}

async fn rights(cluster: &Cluster, namespace: &str, asked: Vec<Asked>) -> BTreeMap<String, Result<bool, String>> {
    let asked = stream::iter(asked).map(|(verb, group, resource, own)| async move {
        let attributes = ResourceAttributes {
            group: Some(group.to_owned()),
            resource: Some(resource.to_owned()),
            namespace: own.then(|| namespace.to_owned()),
            verb: Some(verb.to_owned()),
            ..ResourceAttributes::default()
        };
        (format!("{verb} {resource}"), cluster.may(attributes).await)
    });
    asked.buffered(AT_ONCE).collect().await
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    /// Group, resource and namespace of every object that is installed.
    fn installed() -> BTreeSet<(String, String, bool)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
        let files = ["crds", "culvert"].into_iter().flat_map(|name| std::fs::read_dir(folder.join(name)).unwrap());
        let mut found = BTreeSet::new();
        for file in files {
            let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
            for object in text.split("\n---\n").map(|text| serde_saphyr::from_str::<Value>(text).unwrap()) {
                let version = object["apiVersion"].as_str().unwrap();
                let group = version.rsplit_once('/').map_or("", |(group, _)| group).to_owned();
                let resource = format!("{}s", object["kind"].as_str().unwrap().to_ascii_lowercase());
                let resource = resource.replace("policys", "policies");
                found.insert((group, resource, object["metadata"]["namespace"].is_string()));
            }
        }
        found
    }

    #[test]
    fn what_installing_takes_is_what_is_installed() {
        let needed = NEEDED.map(|(group, resource, own)| (group.to_owned(), resource.to_owned(), own));
        assert_eq!(installed(), needed.into());
    }

    #[test]
    fn programs_of_others_are_known_by_what_a_pod_has() {
        let pod = |volume: &str, capability: &str| {
            let object = json!({
                "volumes": [{"name": "v", "hostPath": {"path": volume}}],
                "containers": [{"name": "c", "securityContext": {"capabilities": {"add": [capability]}}}],
            });
            serde_json::from_value::<PodSpec>(object).unwrap()
        };
        for (volume, capability, loads) in [
            ("/sys/fs/bpf", "NET_ADMIN", true),
            ("/sys/fs/bpf/other", "NET_ADMIN", true),
            ("/sys/fs/bpfx", "NET_ADMIN", false),
            ("/sys", "NET_ADMIN", false),
            ("/run", "BPF", true),
            ("/run", "CAP_BPF", true),
        ] {
            assert_eq!(loads_programs(&pod(volume, capability)), loads, "{volume} {capability}");
        }
        assert!(!loads_programs(&PodSpec::default()));
    }
}
