//! Asks what only `culvert check` wants to know.

use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::authorization::v1::ResourceAttributes;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::check::{DAEMONSETS, DEPLOYMENTS, OWN_NAMESPACE, OWN_WEBHOOK, Surroundings, WEBHOOKS};
use super::cluster::{Cluster, all};

/// Label that says how far pods of a namespace may go.
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";
/// The mesh's own webhook.
const WEBHOOK: &str = "culvertd";
/// Requests at a time.
const AT_ONCE: usize = 8;

/// What installing takes: group and resource; all in the system namespace or the whole cluster.
const NEEDED: [(&str, &str); 8] = [
    ("", "namespaces"),
    ("", "serviceaccounts"),
    ("", "services"),
    ("apps", "daemonsets"),
    ("apps", "deployments"),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("rbac.authorization.k8s.io", "clusterrolebindings"),
    ("admissionregistration.k8s.io", "validatingwebhookconfigurations"),
];

/// Finds out. What may not be asked is among it.
pub async fn find(cluster: &Cluster, namespace: &str) -> Surroundings {
    let name = |metadata: ObjectMeta| {
        let (namespace, name) = (metadata.namespace.unwrap_or_default(), metadata.name.unwrap_or_default());
        format!("{namespace}/{name}")
    };
    let (daemons, deployments, hooks, own, level, rights) = tokio::join!(
        cluster.list("daemonsets", all, "", "", |set: DaemonSet| name(set.metadata)),
        cluster.list("deployments", all, "", "", |deployment: Deployment| name(deployment.metadata)),
        cluster.list("webhooks", all, "", "", |hook: MutatingWebhookConfiguration| hook.metadata.name),
        cluster.get_global::<ValidatingWebhookConfiguration>(WEBHOOK),
        cluster.get_global::<Namespace>(namespace),
        rights(cluster, namespace),
    );
    let mut around = Surroundings { rights: rights.into_iter().collect(), ..Surroundings::default() };
    for (what, found) in [(DAEMONSETS, daemons), (DEPLOYMENTS, deployments)] {
        match found {
            Ok(found) => around.workloads.extend(found),
            Err(error) => drop(around.unknown.insert(what, error.to_string())),
        }
    }
    match hooks {
        Ok(hooks) => {
            let of_a_mesh = |name: &String| ["istio", "linkerd"].iter().any(|mesh| name.starts_with(mesh));
            around.webhooks = hooks.into_iter().flatten().filter(of_a_mesh).collect();
        }
        Err(error) => drop(around.unknown.insert(WEBHOOKS, error.to_string())),
    }
    match own {
        Ok(own) => around.webhook_has_roots = own.map(|own| has_roots(&own)),
        Err(error) => drop(around.unknown.insert(OWN_WEBHOOK, error)),
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

async fn rights(cluster: &Cluster, namespace: &str) -> Vec<(String, Result<bool, String>)> {
    let asked = stream::iter(NEEDED).map(|(group, resource)| async move {
        let attributes = ResourceAttributes {
            group: Some(group.to_owned()),
            resource: Some(resource.to_owned()),
            namespace: Some(namespace.to_owned()),
            verb: Some("create".to_owned()),
            ..ResourceAttributes::default()
        };
        (format!("create {resource}"), cluster.may(attributes).await)
    });
    asked.buffered(AT_ONCE).collect().await
}
