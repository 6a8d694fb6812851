//! EndpointSlice: endpoints of a service, also those that no selector finds.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1 as k8s;

use super::check;
use super::name::{Kind, Name};
use super::problem::{Problem, Problems};

/// A slice of a service's endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointSlice {
    /// Its name.
    pub name: Name,
    /// The service it belongs to, in the same namespace (label `kubernetes.io/service-name`).
    pub service: Option<Name>,
    /// Kubernetes made it from the service's selector: it says nothing that the pods do not.
    pub is_derived: bool,
    /// Its endpoints; none when the slice holds DNS names.
    pub endpoints: Vec<Endpoint>,
    /// Its TCP ports.
    pub ports: Vec<SlicePort>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// Its addresses, which are alternatives for the same thing.
    pub addresses: Vec<IpAddr>,
    /// It takes traffic.
    pub ready: bool,
    /// It is not ready only because it terminates, and serves until then: it takes traffic where nobody else does.
    pub serving: bool,
    /// The pod it is.
    pub pod: Option<PodReference>,
    /// The node it is on; empty when not said.
    pub node: Arc<str>,
    /// The zone it is in; empty when not said.
    pub zone: String,
}

/// A pod that an endpoint refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodReference {
    /// Its name.
    pub name: Name,
}

/// A TCP port of the endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name of the service's port it belongs to; empty for a service with one unnamed port.
    pub name: String,
    /// Its number.
    pub port: u16,
}

const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Who keeps a slice, and its value for those that Kubernetes keeps for selectors.
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const CONTROLLER: &str = "endpointslice-controller.k8s.io";
/// The API server's own limit.
const MAX_ENDPOINTS: usize = 1000;

/// Validates an EndpointSlice.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(object: &k8s::EndpointSlice) -> Result<EndpointSlice, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, labels) = check::namespaced(Kind::EndpointSlice, &object.metadata, &mut problems);
    let service = labels.get(SERVICE_NAME).map(|service| {
        if !check::is_dns_label(service) {
            problems.add(
                format!("metadata.labels[{SERVICE_NAME}]"),
                format!("{service:?} is not a service name"),
                "name the service that the endpoints belong to",
            );
        }
        Name::new(name.namespace.clone(), service.as_str())
    });
    let is_derived = labels.get(MANAGED_BY).is_some_and(|manager| manager == CONTROLLER);
    let listed = object.endpoints.as_deref().unwrap_or_default();
    if listed.len() > MAX_ENDPOINTS {
        problems.add(
            "endpoints",
            format!("has {} entries, more than {MAX_ENDPOINTS}", listed.len()),
            "spread them over several slices",
        );
    }
    let wants_v6 = match object.address_type.as_str() {
        "IPv4" => Some(false),
        "IPv6" => Some(true),
        "FQDN" => None,
        other => {
            problems.add("addressType", format!("{other:?} is not an address type"), "use IPv4, IPv6 or FQDN");
            None
        }
    };
    let endpoints = match wants_v6 {
        Some(wants_v6) => (listed.iter().take(MAX_ENDPOINTS).enumerate())
            .map(|(index, endpoint)| self::endpoint(index, endpoint, wants_v6, &name, &mut problems))
            .collect(),
        None => Vec::new(),
    };
    let mut ports = Vec::new();
    for (index, port) in object.ports.iter().flatten().enumerate() {
        // A port without a number means "all ports", which the mesh cannot express.
        let Some(number) = port.port else { continue };
        let number = check::port(&format!("ports[{index}].port"), number, &mut problems);
        if let (Some(port_number), "TCP") = (number, port.protocol.as_deref().unwrap_or("TCP")) {
            ports.push(SlicePort { name: port.name.clone().unwrap_or_default(), port: port_number });
        }
    }
    problems.finish(EndpointSlice { name, service, is_derived, endpoints, ports })
}

fn endpoint(index: usize, endpoint: &k8s::Endpoint, wants_v6: bool, slice: &Name, problems: &mut Problems) -> Endpoint {
    let mut addresses = Vec::new();
    for (position, text) in endpoint.addresses.iter().enumerate() {
        let field = format!("endpoints[{index}].addresses[{position}]");
        let Some(address) = check::address(&field, text, problems) else { continue };
        if address.is_ipv6() == wants_v6 {
            addresses.push(address);
        } else {
            problems.add(field, format!("{address} is not of the slice's addressType"), "put it into another slice");
        }
    }
    if endpoint.addresses.is_empty() {
        problems.add(format!("endpoints[{index}].addresses"), "is empty", "give the endpoint an address");
    }
    // Kubernetes: readiness that is not said is readiness; an endpoint that terminates is not ready.
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let serving = !ready && conditions.serving == Some(true) && conditions.terminating == Some(true);
    let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod")).and_then(|target| {
        let namespace = target.namespace.as_deref().unwrap_or(&slice.namespace);
        Some(PodReference { name: Name::new(namespace, target.name.as_deref()?) })
    });
    Endpoint {
        addresses,
        ready,
        serving,
        pod,
        node: endpoint.node_name.clone().unwrap_or_default().into(),
        zone: endpoint.zone.clone().unwrap_or_default(),
    }
}
