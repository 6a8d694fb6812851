//! A pod, or an endpoint that is none, as the data plane knows it.

use std::net::IpAddr;

use mesh_model::draining::{EXTENSION, PAYLOAD_TYPE};
use mesh_proto::extension;
use mesh_proto::workload as wire;
use prost::Message as _;

use super::services::{not_valid, port_on_wire};
use super::waypoint::{self, Addressed};
use super::{Index, Options, names};
use crate::api::{
    EntryEndpoint, GATEWAY_NAME, Labels, Locality, Name, Owner, Pod, ServicePort, TargetPort, WaypointBinding,
};

/// The trust domain that an empty field stands for.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// The labels that name a workload in metrics, the first that is there.
const CANONICAL_NAME: [&str; 3] = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
const CANONICAL_REVISION: [&str; 3] = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
const POD_TEMPLATE_HASH: &str = "pod-template-hash";

/// What a workload takes from other objects than its pod.
pub(super) struct Surroundings {
    pub(super) uid: String,
    pub(super) waypoint: Option<wire::GatewayAddress>,
    pub(super) locality: Option<wire::Locality>,
    /// The policies that name the pod.
    pub(super) policies: Vec<String>,
    /// Nobody has confirmed yet that it is captured.
    pub(super) is_waiting: bool,
    /// Nobody has confirmed it, but it was captured before it had an address.
    pub(super) is_from_start: bool,
    /// It is not known whether it is enrolled: so it is reached by a tunnel or not at all.
    pub(super) is_in_doubt: bool,
    /// Its object is not valid, and nobody reaches it.
    pub(super) is_refused: bool,
}

impl Index {
    pub(super) fn pod_waypoint(&self, pod: &Pod) -> Option<wire::GatewayAddress> {
        if pod.waypoint == WaypointBinding::Unset && pod.labels.contains_key(GATEWAY_NAME) {
            return None;
        }
        self.waypoint(&pod.name.namespace, &pod.waypoint, Addressed::Workload)
    }
}

/// The workload of a pod, except for the services it belongs to.
pub(super) fn of_pod(options: &Options, pod: &Pod, around: Surroundings) -> wire::Workload {
    // Who is enrolled while it runs is reached as before until its capture is confirmed. Who was seen to be enrolled from the
    // start is never reached in plaintext, as by its own address it might be before it is healthy.
    let is_hbone =
        !pod.host_network && (pod.captured || pod.native_tunnel || around.is_in_doubt || around.is_from_start);
    // By tunnel or not at all: so not before the tunnel is there.
    let is_closed = pod.is_stand_in && around.is_in_doubt && !pod.captured && !pod.native_tunnel;
    let health = Health::of(pod.ready && !around.is_waiting && !is_closed, pod.terminating);
    let is_nobody = around.is_in_doubt && &*pod.service_account == Pod::NOBODY;
    let (workload_type, workload_name) = controller(pod);
    wire::Workload {
        uid: around.uid,
        name: pod.name.name.to_string(),
        namespace: pod.name.namespace.to_string(),
        addresses: pod.addresses.iter().copied().map(names::address_bytes).collect(),
        tunnel_protocol: if is_hbone { wire::TunnelProtocol::Hbone } else { wire::TunnelProtocol::None }.into(),
        trust_domain: trust_domain(options),
        service_account: pod.service_account.to_string(),
        waypoint: around.waypoint,
        node: pod.node.to_string(),
        canonical_name: first_label(&pod.labels, CANONICAL_NAME, &workload_name),
        canonical_revision: first_label(&pod.labels, CANONICAL_REVISION, "latest"),
        workload_type: workload_type.into(),
        workload_name,
        native_tunnel: is_hbone && pod.native_tunnel,
        status: health.status().into(),
        extensions: health.extension().into_iter().chain(is_nobody.then(not_valid)).collect(),
        cluster_id: options.cluster_id.clone(),
        locality: around.locality,
        authorization_policies: around.policies,
        network_mode: if pod.host_network { wire::NetworkMode::HostNetwork } else { wire::NetworkMode::Standard }
            .into(),
        ..Default::default()
    }
}

/// The workload of an endpoint that an entry describes, except for the services it belongs to. `owner` is the entry.
pub(super) fn of_endpoint(
    options: &Options,
    owner: &Name,
    endpoint: &EntryEndpoint,
    addresses: &[IpAddr],
    healthy: bool,
    around: Surroundings,
) -> wire::Workload {
    let is_hbone = endpoint.captured || endpoint.native_tunnel;
    let Locality { region, zone, subzone } = endpoint.locality.clone();
    let locality = wire::Locality { region, zone, subzone };
    wire::Workload {
        uid: around.uid,
        name: owner.name.to_string(),
        namespace: owner.namespace.to_string(),
        addresses: addresses.iter().copied().map(names::address_bytes).collect(),
        tunnel_protocol: if is_hbone { wire::TunnelProtocol::Hbone } else { wire::TunnelProtocol::None }.into(),
        trust_domain: trust_domain(options),
        service_account: endpoint.service_account.clone(),
        // Whoever does not know the extension does not get through it either.
        waypoint: if around.is_refused { Some(waypoint::nowhere(owner)) } else { around.waypoint },
        canonical_name: first_label(&endpoint.labels, CANONICAL_NAME, &owner.name),
        canonical_revision: first_label(&endpoint.labels, CANONICAL_REVISION, "latest"),
        workload_type: wire::WorkloadType::Pod.into(),
        workload_name: owner.name.to_string(),
        native_tunnel: endpoint.native_tunnel,
        status: Health::of(healthy && !around.is_refused, false).status().into(),
        extensions: around.is_refused.then(not_valid).into_iter().collect(),
        cluster_id: options.cluster_id.clone(),
        locality: (locality != wire::Locality::default()).then_some(locality),
        authorization_policies: around.policies,
        capacity: endpoint.weight,
        ..Default::default()
    }
}

/// The ports of a ServiceEntry on an endpoint, which may have numbers of its own for their names.
pub(super) fn entry_ports(endpoint: &EntryEndpoint, ports: &[ServicePort]) -> Vec<wire::Port> {
    let on_wire = |port: &ServicePort| {
        let own = endpoint.ports.get(&port.name).map(|own| u32::from(*own));
        let whole = port_on_wire(port);
        wire::Port { target_port: own.unwrap_or(whole.target_port), ..whole }
    };
    ports.iter().map(on_wire).collect()
}

/// The ports of a Service on an endpoint: a target port with a name is looked up among the endpoint's own, and one without
/// it does not serve the port.
pub(super) fn service_ports(endpoint: &EntryEndpoint, ports: &[ServicePort]) -> Vec<wire::Port> {
    let on_wire = |port: &ServicePort| {
        let target_port = match &port.target {
            TargetPort::Number(number) => *number,
            TargetPort::Named(name) => *endpoint.ports.get(name)?,
        };
        Some(wire::Port { target_port: target_port.into(), ..port_on_wire(port) })
    };
    ports.iter().filter_map(on_wire).collect()
}

/// Whether a workload takes traffic of services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It does.
    Healthy,
    /// It ends, but serves until then: it takes traffic where nobody else does. A proxy that does not know the extension
    /// which says so takes it for unhealthy.
    Draining,
    /// It does not.
    Unhealthy,
}

impl Health {
    pub(super) fn of(serves: bool, ends: bool) -> Self {
        match (serves, ends) {
            (true, false) => Self::Healthy,
            (true, true) => Self::Draining,
            (false, _) => Self::Unhealthy,
        }
    }

    pub(super) fn status(self) -> wire::WorkloadStatus {
        match self {
            Self::Healthy => wire::WorkloadStatus::Healthy,
            Self::Draining | Self::Unhealthy => wire::WorkloadStatus::Unhealthy,
        }
    }

    pub(super) fn extension(self) -> Option<wire::Extension> {
        let payload = extension::Draining {}.encode_to_vec();
        let config = prost_types::Any { type_url: PAYLOAD_TYPE.to_owned(), value: payload };
        (self == Self::Draining).then(|| wire::Extension { name: EXTENSION.to_owned(), config: Some(config) })
    }
}

/// The trust domain as it goes on the wire: only where it is not the default.
pub(super) fn trust_domain(options: &Options) -> String {
    if options.trust_domain == DEFAULT_TRUST_DOMAIN { String::new() } else { options.trust_domain.clone() }
}

fn first_label(labels: &Labels, keys: [&str; 3], otherwise: &str) -> String {
    let found = keys.into_iter().find_map(|key| labels.get(key).filter(|value| !value.is_empty()));
    found.map_or_else(|| otherwise.to_owned(), Clone::clone)
}

/// What made the pod. A Deployment makes pods through a ReplicaSet, a CronJob through a Job, whose names tell.
fn controller(pod: &Pod) -> (wire::WorkloadType, String) {
    let Some(Owner { kind, name }) = &pod.owner else {
        return (wire::WorkloadType::Pod, pod.name.name.to_string());
    };
    match kind.as_str() {
        "ReplicaSet" => {
            let hash = pod.labels.get(POD_TEMPLATE_HASH);
            let deployment = hash.and_then(|hash| name.strip_suffix(hash.as_str())?.strip_suffix('-'));
            (wire::WorkloadType::Deployment, deployment.unwrap_or(name).to_owned())
        }
        "Deployment" => (wire::WorkloadType::Deployment, name.clone()),
        "Job" => match cron_job(name) {
            Some(cron_job) => (wire::WorkloadType::Cronjob, cron_job.to_owned()),
            None => (wire::WorkloadType::Job, name.clone()),
        },
        _ => (wire::WorkloadType::Pod, name.clone()),
    }
}

/// The CronJob in the name of a Job it made: `<name>-<time>`, where the time has 8 to 10 digits.
fn cron_job(job: &str) -> Option<&str> {
    let (name, time) = job.rsplit_once('-')?;
    ((8..=10).contains(&time.len()) && time.bytes().all(|b| b.is_ascii_digit())).then_some(name)
}
