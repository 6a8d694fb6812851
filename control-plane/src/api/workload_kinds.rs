//! Kinds that are checked, counted and shown, but carry no traffic themselves: Deployment and ServiceAccount.

use k8s_openapi::api::apps::v1 as apps;
use k8s_openapi::api::core::v1 as k8s;

use super::check;
use super::labels::DataplaneMode;
use super::name::{Kind, Name};
use super::pod;
use super::problem::{Problem, Problems};

/// A service account.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceAccount {
    /// Its name.
    pub name: Name,
}

/// A deployment.
#[derive(Clone, Debug, PartialEq)]
pub struct Deployment {
    /// Its name.
    pub name: Name,
    /// How many pods it asks for.
    pub replicas: u32,
    /// The service account of its pods.
    pub service_account: String,
}

/// Validates a ServiceAccount.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate_service_account(object: &k8s::ServiceAccount) -> Result<ServiceAccount, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, _) = check::namespaced(Kind::ServiceAccount, &object.metadata, &mut problems);
    problems.finish(ServiceAccount { name })
}

/// Validates a Deployment: its selector must match its own pods, and those must be valid.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate_deployment(object: &apps::Deployment) -> Result<Deployment, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, _) = check::namespaced(Kind::Deployment, &object.metadata, &mut problems);
    let mut deployment = Deployment { name, replicas: 1, service_account: "default".to_owned() };
    let spec = &object.spec;
    match u32::try_from(spec.replicas.unwrap_or(1)) {
        Ok(replicas) => deployment.replicas = replicas,
        Err(_) => problems.add("spec.replicas", "is negative", "use 0 or more"),
    }
    let template_labels = spec.template.metadata.as_ref().and_then(|meta| meta.labels.clone()).unwrap_or_default();
    check::labels("spec.template.metadata.labels", &template_labels, &mut problems);
    let wanted = spec.selector.match_labels.clone().unwrap_or_default();
    check::labels("spec.selector.matchLabels", &wanted, &mut problems);
    if wanted.is_empty() && spec.selector.match_expressions.as_ref().is_none_or(Vec::is_empty) {
        problems.add("spec.selector", "selects nothing", "add matchLabels that the template's labels satisfy");
    }
    for (key, value) in &wanted {
        if template_labels.get(key) != Some(value) {
            problems.add(
                format!("spec.selector.matchLabels[{key}]"),
                format!("{value:?} is not among the labels of the template"),
                format!("add the label {key}: {value} to spec.template.metadata.labels, or change the selector"),
            );
        }
    }
    DataplaneMode::read(&template_labels, &mut problems);
    match &spec.template.spec {
        Some(pod_spec) => {
            pod::container_ports("spec.template.spec", pod_spec, &mut problems);
            deployment.service_account = pod::service_account("spec.template.spec", pod_spec, &mut problems);
        }
        None => problems.add("spec.template.spec", "is missing", "add the pods' spec"),
    }
    problems.finish(deployment)
}
