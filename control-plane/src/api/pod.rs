//! Pod: address, identity, node, readiness, and what the mesh's own labels and annotations say.

mod stand_in;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::api::core::v1 as k8s;

use super::check;
use super::labels::{DataplaneMode, Labels, WaypointBinding};
use super::name::{Kind, Name};
use super::problem::{Problem, Problems};

pub(super) use stand_in::{keep, stand_in};

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Pod {
    /// Its name.
    pub name: Name,
    /// Kubernetes' unique id of this very pod; empty when the object has none.
    pub uid: Arc<str>,
    /// Its labels.
    pub labels: Labels,
    /// What its own label asks for.
    pub mode: DataplaneMode,
    /// The waypoint of its own label.
    pub waypoint: WaypointBinding,
    /// The node's agent has confirmed that the pod's traffic is captured (`ambient.istio.io/redirection: enabled`).
    pub captured: bool,
    /// The application speaks HBONE itself (`networking.istio.io/tunnel: http`).
    pub native_tunnel: bool,
    /// Its addresses; empty until it has any.
    pub addresses: Vec<IpAddr>,
    /// The node it runs on; empty until it is scheduled.
    pub node: Arc<str>,
    /// It shares the node's network and is never enrolled.
    pub host_network: bool,
    /// The service account it runs as.
    pub service_account: Arc<str>,
    /// How far its life has come.
    pub phase: Phase,
    /// Its condition `Ready` holds.
    pub ready: bool,
    /// It is being deleted.
    pub terminating: bool,
    /// The ports its containers name, first come first.
    pub ports: Vec<ContainerPort>,
    /// What manages it.
    pub owner: Option<Owner>,
    /// When it was created; none when the object does not say.
    pub created: Option<SystemTime>,
    /// It stands for one that is not valid: what could be read of it.
    pub is_stand_in: bool,
}

impl Pod {
    /// The account of a pod of which it cannot be read as whom it runs. No account has the name, so nobody can be it.
    pub const NOBODY: &str = "_";
}

/// `status.phase` of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Accepted, not all containers have started.
    Pending,
    /// Bound to a node, containers started.
    Running,
    /// All containers ended well.
    Succeeded,
    /// All containers ended, at least one badly.
    Failed,
    /// The node does not answer.
    Unknown,
}

impl Phase {
    /// The pod has ended: it gets no traffic and no certificate.
    pub fn is_over(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed => true,
            Self::Pending | Self::Running | Self::Unknown => false,
        }
    }
}

/// A TCP port that a container declares by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Its name.
    pub name: String,
    /// Its number.
    pub port: u16,
}

/// The controller of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its kind, such as `ReplicaSet`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// Annotation of a pod whose traffic is captured.
pub(super) const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Label of what speaks HBONE itself.
pub(super) const TUNNEL: &str = "networking.istio.io/tunnel";

/// Validates a Pod.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(object: &k8s::Pod) -> Result<Pod, Vec<Problem>> {
    let mut problems = Problems::default();
    let meta = &object.metadata;
    let (name, labels) = check::namespaced(Kind::Pod, meta, &mut problems);
    let Some(spec) = &object.spec else {
        problems.add("spec", "is missing", "add the pod's spec");
        return Err(problems.into_list());
    };
    let status = object.status.clone().unwrap_or_default();
    let node = spec.node_name.clone().unwrap_or_default();
    if !node.is_empty() && !check::is_dns_subdomain(&node) {
        problems.add("spec.nodeName", format!("{node:?} is not a node name"), check::DNS_SUBDOMAIN_FIX);
    }
    let annotations = meta.annotations.as_ref();
    let pod = Pod {
        uid: meta.uid.clone().unwrap_or_default().into(),
        mode: DataplaneMode::read(&labels, &mut problems),
        waypoint: WaypointBinding::read(&labels),
        captured: annotations.is_some_and(|all| all.get(REDIRECTION).is_some_and(|value| value == "enabled")),
        native_tunnel: labels.get(TUNNEL).is_some_and(|value| value == "http"),
        addresses: addresses(&status, &mut problems),
        node: node.into(),
        host_network: spec.host_network.unwrap_or(false),
        service_account: service_account("spec", spec, &mut problems).into(),
        phase: phase(&status, &mut problems),
        ready: is_ready(&status),
        terminating: meta.deletion_timestamp.is_some(),
        ports: container_ports("spec", spec, &mut problems),
        owner: owner(meta),
        created: meta.creation_timestamp.as_ref().and_then(|time| check::system_time(&time.0)),
        name,
        labels,
        is_stand_in: false,
    };
    problems.finish(pod)
}

/// The pod's addresses, `podIP` first.
fn addresses(status: &k8s::PodStatus, problems: &mut Problems) -> Vec<IpAddr> {
    let mut found = check::Addresses::default();
    if let Some(address) = status.pod_ip.as_deref().filter(|text| !text.is_empty()) {
        found.add("status.podIP", address, problems);
    }
    for (index, entry) in status.pod_ips.iter().flatten().enumerate() {
        if !entry.ip.is_empty() {
            found.add(&format!("status.podIPs[{index}].ip"), &entry.ip, problems);
        }
    }
    found.into_vec()
}

fn phase(status: &k8s::PodStatus, problems: &mut Problems) -> Phase {
    match status.phase.as_deref() {
        None | Some("" | "Pending") => Phase::Pending,
        Some("Running") => Phase::Running,
        Some("Succeeded") => Phase::Succeeded,
        Some("Failed") => Phase::Failed,
        Some("Unknown") => Phase::Unknown,
        Some(other) => {
            problems.add(
                "status.phase",
                format!("{other:?} is not a phase"),
                "use Pending, Running, Succeeded, Failed or Unknown",
            );
            Phase::Unknown
        }
    }
}

fn is_ready(status: &k8s::PodStatus) -> bool {
    status.conditions.iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn owner(meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Option<Owner> {
    let references = meta.owner_references.as_deref().unwrap_or_default();
    references
        .iter()
        .find(|reference| reference.controller == Some(true))
        .map(|reference| Owner { kind: reference.kind.clone(), name: reference.name.clone() })
}

/// The ports that the containers of a pod spec name; also checks the containers themselves.
pub(super) fn container_ports(field: &str, spec: &k8s::PodSpec, problems: &mut Problems) -> Vec<ContainerPort> {
    if spec.containers.is_empty() {
        problems.add(format!("{field}.containers"), "is empty", "add at least one container");
    }
    // A native sidecar is an init container, and its ports are targets like any other's.
    let containers = spec.containers.iter().map(|container| ("containers", container));
    let init = spec.init_containers.iter().flatten().map(|container| ("initContainers", container));
    let mut ports = Vec::new();
    for (list, container) in containers.chain(init) {
        if !check::is_dns_label(&container.name) {
            problems.add(
                format!("{field}.{list}[].name"),
                format!("{:?} is not a container name", container.name),
                check::DNS_LABEL_FIX,
            );
        }
        for (index, declared) in container.ports.iter().flatten().enumerate() {
            let path = format!("{field}.{list}[{}].ports[{index}]", container.name);
            let port = check::port(&format!("{path}.containerPort"), declared.container_port, problems);
            let Some(name) = declared.name.clone().filter(|name| !name.is_empty()) else { continue };
            if !check::is_port_name(&name) {
                problems.add(
                    format!("{path}.name"),
                    format!("{name:?} is not a port name"),
                    "use at most 15 of a-z, 0-9 and '-', at least one of them a letter",
                );
            }
            if let (Some(port), "TCP") = (port, declared.protocol.as_deref().unwrap_or("TCP")) {
                ports.push(ContainerPort { name, port });
            }
        }
    }
    ports
}

/// The service account that a pod spec names, `default` if none.
pub(super) fn service_account(field: &str, spec: &k8s::PodSpec, problems: &mut Problems) -> String {
    let named = [&spec.service_account_name, &spec.service_account];
    let Some(name) = named.into_iter().flatten().find(|name| !name.is_empty()) else {
        return "default".to_owned();
    };
    if !check::is_dns_subdomain(name) {
        problems.add(
            format!("{field}.serviceAccountName"),
            format!("{name:?} is not a service account name"),
            check::DNS_SUBDOMAIN_FIX,
        );
    }
    name.clone()
}
