//! Service: its addresses, its ports, and which pods stand behind it.

mod stand_in;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::api::core::v1 as k8s;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::check;
use super::labels::{GATEWAY_NAME, Labels, WaypointBinding};
use super::name::{Kind, Name};
use super::problem::{Problem, Problems};

pub(super) use stand_in::{keep, stand_in};

/// A service.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Its name.
    pub name: Name,
    /// How it is reached.
    pub addresses: ServiceAddresses,
    /// Addresses of its load balancers that reach it from inside as well.
    pub ingress: Vec<IpAddr>,
    /// Its TCP ports; the mesh carries no others.
    pub ports: Vec<ServicePort>,
    /// The labels its pods have; empty when its endpoints come from EndpointSlices alone.
    pub selector: Labels,
    /// Pods that are not ready get traffic too (`publishNotReadyAddresses`).
    pub publish_not_ready: bool,
    /// The address families it asks for.
    pub families: Families,
    /// Which endpoints are preferred.
    pub topology: Topology,
    /// The waypoint of its own label.
    pub waypoint: WaypointBinding,
    /// What only a host of a ServiceEntry has; none for a Service. The host is then the whole name.
    pub entry: Option<EntryPart>,
    /// It stands for one that is not valid: nothing is known of it but its addresses, and nobody reaches it.
    pub is_stand_in: bool,
}

/// What a host of a ServiceEntry has beside what a Service has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryPart {
    /// The entry's name.
    pub name: Arc<str>,
    /// It is no host of the entry, but stands for the addresses of one that is not valid.
    pub is_made_up: bool,
    /// The addresses that the entry gives, each with the length of its prefix. They need not be its own alone.
    pub blocks: Vec<(IpAddr, u8)>,
    /// Connections go to the address that the client asked for.
    pub is_passthrough: bool,
    /// Further identities that endpoints may present.
    pub subject_alt_names: Vec<String>,
    /// Only clients of its own namespace see it.
    pub is_private: bool,
    /// When the entry was created: of two that want the same address the older one has it.
    pub created: Option<SystemTime>,
}

/// How a service is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceAddresses {
    /// At these virtual addresses.
    Given(Vec<IpAddr>),
    /// At a virtual address that is yet to be chosen, because no API server did.
    Allocate,
    /// Headless: at its pods' own addresses.
    Headless,
    /// `ExternalName`: a DNS alias that the mesh does not know.
    External,
}

/// The address families that a service asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Families {
    /// Not said.
    #[default]
    Automatic,
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// Both.
    Dual,
}

/// Which endpoints a client prefers, by where they stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Topology {
    /// Any.
    #[default]
    Anywhere,
    /// Those on the client's node, and no others (`internalTrafficPolicy: Local`).
    OnlyNode,
    /// Near ones first (`trafficDistribution: PreferClose`).
    PreferClose,
    /// Those of the zone first (`PreferSameZone`).
    PreferZone,
    /// Those on the node first (`PreferSameNode`).
    PreferNode,
}

/// A TCP port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty when it has none.
    pub name: String,
    /// The port that clients use.
    pub port: u16,
    /// The port of the pod.
    pub target: TargetPort,
    /// What is spoken on it, as far as said.
    pub app_protocol: AppProtocol,
}

/// The pod's side of a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// This number on every pod.
    Number(u16),
    /// The container port of this name, which each pod numbers itself.
    Named(String),
}

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AppProtocol {
    /// Not said.
    #[default]
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC.
    Grpc,
    /// Plain TCP.
    Tcp,
    /// TLS.
    Tls,
}

impl AppProtocol {
    /// From `appProtocol`, else from the port's name up to its first dash.
    fn read(port: &k8s::ServicePort) -> Self {
        let said = port.app_protocol.as_deref();
        let word = said.or_else(|| port.name.as_deref().and_then(|name| name.split('-').next())).unwrap_or_default();
        match word.to_ascii_lowercase().as_str() {
            "http" | "kubernetes.io/ws" => Self::Http11,
            "http2" | "kubernetes.io/h2c" => Self::Http2,
            "grpc" => Self::Grpc,
            "tcp" | "mongo" | "mysql" | "redis" => Self::Tcp,
            "https" | "tls" | "kubernetes.io/wss" => Self::Tls,
            _ => Self::Unknown,
        }
    }
}

/// Validates a Service.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(object: &k8s::Service) -> Result<Service, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, labels) = check::namespaced(Kind::Service, &object.metadata, &mut problems);
    let Some(spec) = &object.spec else {
        problems.add("spec", "is missing", "add the service's spec");
        return Err(problems.into_list());
    };
    let selector = spec.selector.clone().unwrap_or_default();
    check::labels("spec.selector", &selector, &mut problems);
    let addresses = addresses(spec, &mut problems);
    let ingress = match addresses {
        ServiceAddresses::Given(_) => ingress(object, &mut problems),
        ServiceAddresses::Allocate | ServiceAddresses::Headless | ServiceAddresses::External => Vec::new(),
    };
    let ports = ports(spec, &mut problems);
    if spec.ports.iter().flatten().next().is_none()
        && matches!(addresses, ServiceAddresses::Given(_) | ServiceAddresses::Allocate)
    {
        problems.add("spec.ports", "is empty", "add at least one port, or make the service headless (clusterIP: None)");
    }
    let service = Service {
        name,
        addresses,
        ingress,
        ports,
        selector,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        families: families(spec, &mut problems),
        topology: topology(spec, &mut problems),
        waypoint: waypoint(&labels),
        entry: None,
        is_stand_in: false,
    };
    problems.finish(service)
}

/// The service of a waypoint is not reached through itself because its namespace is.
fn waypoint(labels: &Labels) -> WaypointBinding {
    match WaypointBinding::read(labels) {
        WaypointBinding::Unset if labels.contains_key(GATEWAY_NAME) => WaypointBinding::Off,
        binding => binding,
    }
}

fn addresses(spec: &k8s::ServiceSpec, problems: &mut Problems) -> ServiceAddresses {
    match spec.type_.as_deref().unwrap_or("ClusterIP") {
        "ClusterIP" | "NodePort" | "LoadBalancer" => {}
        "ExternalName" => {
            if spec.external_name.as_deref().is_none_or(|name| !check::is_dns_subdomain(name)) {
                problems.add("spec.externalName", "is not a DNS name", "name the host that the service stands for");
            }
            return ServiceAddresses::External;
        }
        other => problems.add(
            "spec.type",
            format!("{other:?} is not a service type"),
            "use ClusterIP, NodePort, LoadBalancer or ExternalName",
        ),
    }
    let first = spec.cluster_ip.as_deref().unwrap_or_default();
    let all: Vec<&str> = spec.cluster_ips.iter().flatten().map(String::as_str).collect();
    if first == "None" || all.first() == Some(&"None") {
        if (first != "None" && !first.is_empty()) || all.iter().any(|address| *address != "None") {
            problems.add("spec.clusterIPs", "mixes None with addresses", "use None alone, or addresses alone");
        }
        return ServiceAddresses::Headless;
    }
    if let (Some(listed), false) = (all.first(), first.is_empty())
        && *listed != first
    {
        problems.add("spec.clusterIPs[0]", format!("differs from clusterIP {first:?}"), "make the two equal");
    }
    let mut found = check::Addresses::default();
    if !first.is_empty() {
        found.add("spec.clusterIP", first, problems);
    }
    let skip = usize::from(!first.is_empty());
    for (index, text) in all.iter().enumerate().skip(skip) {
        found.add(&format!("spec.clusterIPs[{index}]"), text, problems);
    }
    if found.is_empty() {
        return ServiceAddresses::Allocate;
    }
    ServiceAddresses::Given(found.into_vec())
}

fn ingress(object: &k8s::Service, problems: &mut Problems) -> Vec<IpAddr> {
    let mut found = check::Addresses::default();
    // A load balancer's address reaches the service from inside as well, unless it must be passed through (`Proxy`). One that
    // no other node reaches is nothing that the service's author can mend, and nothing that the mesh could carry.
    let ingress = object.status.as_ref().and_then(|status| status.load_balancer.as_ref()?.ingress.as_deref());
    for (index, entry) in ingress.unwrap_or_default().iter().enumerate() {
        let is_passed_through = entry.ip_mode.as_deref() == Some("Proxy");
        if let Some(text) = entry.ip.as_deref().filter(|text| !is_passed_through && !check::is_near(text)) {
            found.add(&format!("status.loadBalancer.ingress[{index}].ip"), text, problems);
        }
    }
    found.into_vec()
}

fn ports(spec: &k8s::ServiceSpec, problems: &mut Problems) -> Vec<ServicePort> {
    let declared = spec.ports.as_deref().unwrap_or_default();
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut ports = Vec::new();
    for (index, port) in declared.iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let name = port.name.clone().unwrap_or_default();
        if name.is_empty() {
            if declared.len() > 1 {
                problems.add(format!("{path}.name"), "is missing", "name every port of a service that has several");
            }
        } else if !check::is_dns_label(&name) {
            problems.add(format!("{path}.name"), format!("{name:?} is not a port name"), check::DNS_LABEL_FIX);
        } else if !names.insert(name.clone()) {
            problems.add(format!("{path}.name"), format!("{name:?} is used twice"), "give each port its own name");
        }
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            problems.add(
                format!("{path}.protocol"),
                format!("{protocol:?} is not a protocol"),
                "use TCP, UDP or SCTP, in capitals",
            );
        }
        let number = check::port(&format!("{path}.port"), port.port, problems);
        let target = target(&format!("{path}.targetPort"), port, problems);
        let (Some(number), Some(target)) = (number, target) else { continue };
        if !numbers.insert((protocol, number)) {
            problems.add(
                format!("{path}.port"),
                format!("{protocol} port {number} is there twice"),
                "keep one of the two entries",
            );
        } else if protocol == "TCP" {
            ports.push(ServicePort { name, port: number, target, app_protocol: AppProtocol::read(port) });
        }
    }
    ports
}

fn target(field: &str, port: &k8s::ServicePort, problems: &mut Problems) -> Option<TargetPort> {
    match &port.target_port {
        None => u16::try_from(port.port).ok().map(TargetPort::Number),
        // Zero is how Kubernetes itself says "the same as the port".
        Some(IntOrString::Int(0)) => u16::try_from(port.port).ok().map(TargetPort::Number),
        Some(IntOrString::Int(number)) => check::port(field, *number, problems).map(TargetPort::Number),
        Some(IntOrString::String(name)) if check::is_port_name(name) => Some(TargetPort::Named(name.clone())),
        Some(IntOrString::String(name)) => {
            let fix = if name.parse::<u16>().is_ok() {
                "write a number without quotes"
            } else {
                "use a number, or the name of a container port: at most 15 of a-z, 0-9 and '-'"
            };
            problems.add(field, format!("{name:?} is neither a port number nor a port name"), fix);
            None
        }
    }
}

fn families(spec: &k8s::ServiceSpec, problems: &mut Problems) -> Families {
    let listed: Vec<&str> = spec.ip_families.iter().flatten().map(String::as_str).collect();
    match listed.as_slice() {
        [] => Families::Automatic,
        ["IPv4"] => Families::Ipv4,
        ["IPv6"] => Families::Ipv6,
        ["IPv4", "IPv6"] | ["IPv6", "IPv4"] => Families::Dual,
        _ => {
            problems.add("spec.ipFamilies", format!("{listed:?} is not valid"), "list IPv4, IPv6, or one of each");
            Families::Automatic
        }
    }
}

fn topology(spec: &k8s::ServiceSpec, problems: &mut Problems) -> Topology {
    match spec.internal_traffic_policy.as_deref() {
        None | Some("Cluster") => {}
        Some("Local") => return Topology::OnlyNode,
        Some(other) => {
            problems.add("spec.internalTrafficPolicy", format!("{other:?} is not valid"), "use Cluster or Local");
        }
    }
    match spec.traffic_distribution.as_deref() {
        None => Topology::Anywhere,
        Some("PreferClose") => Topology::PreferClose,
        Some("PreferSameZone") => Topology::PreferZone,
        Some("PreferSameNode") => Topology::PreferNode,
        Some(other) => {
            problems.add(
                "spec.trafficDistribution",
                format!("{other:?} is not valid"),
                "use PreferClose, PreferSameZone or PreferSameNode",
            );
            Topology::Anywhere
        }
    }
}
