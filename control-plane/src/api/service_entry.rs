//! ServiceEntry: hosts that are no services of Kubernetes, and what stands behind them.

mod stand_in;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::check;
use super::labels::{Labels, WaypointBinding};
use super::name::{Kind, Name};
use super::problem::{Problem, Problems};
use super::service::{AppProtocol, ServicePort, TargetPort};
use super::workload_entry::{self, EntryAddress, EntryEndpoint};

pub(super) use stand_in::{keep, stand_in};

/// Hosts that are no services of Kubernetes.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceEntry {
    /// Its name.
    pub name: Name,
    /// The host names, in lower case, each once; `*.` begins one that stands for all below it.
    pub hosts: Vec<Arc<str>>,
    /// The addresses at which clients ask for the hosts, each with the length of its prefix. None: they are to be chosen,
    /// where the resolution needs any.
    pub addresses: Vec<(IpAddr, u8)>,
    /// The TCP ports; the mesh carries no others.
    pub ports: Vec<ServicePort>,
    /// Where connections go.
    pub resolution: Resolution,
    /// What stands behind the hosts.
    pub endpoints: Vec<EntryEndpoint>,
    /// The labels of the pods and WorkloadEntries that stand behind them; empty where `endpoints` says it.
    pub selector: Labels,
    /// Further identities that endpoints may present.
    pub subject_alt_names: Vec<String>,
    /// Only clients of its own namespace see it.
    pub is_private: bool,
    /// The waypoint of its own label.
    pub waypoint: WaypointBinding,
    /// When it was created: of two for the same host the older one counts. None when the object does not say.
    pub created: Option<SystemTime>,
    /// Where a newer version, which is not valid, says that the hosts are: they count as being there as well.
    pub also_at: Vec<(IpAddr, u8)>,
    /// It stands for one that is not valid: nothing is known of it but hosts and addresses, and nobody reaches them.
    pub is_stand_in: bool,
}

/// Where connections to a host go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// To the address that the client asked for.
    None,
    /// To the endpoints.
    Static,
    /// To the addresses of the endpoints' names, or of the host's own.
    Dns,
}

impl ServiceEntry {
    /// Whether nothing stands behind its hosts but names, which have to be looked up.
    pub fn is_only_names(&self) -> bool {
        let has_address = |endpoint: &EntryEndpoint| matches!(endpoint.address, EntryAddress::Ip(_));
        self.resolution == Resolution::Dns && self.selector.is_empty() && !self.endpoints.iter().any(has_address)
    }
}

/// The spec as it is written.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    hosts: Option<Vec<String>>,
    addresses: Option<Vec<String>>,
    ports: Option<Vec<Port>>,
    location: Option<String>,
    resolution: Option<String>,
    endpoints: Option<Vec<workload_entry::Spec>>,
    workload_selector: Option<Selector>,
    export_to: Option<Vec<String>>,
    subject_alt_names: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Port {
    number: Option<i32>,
    protocol: Option<String>,
    name: Option<String>,
    target_port: Option<i32>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Selector {
    labels: Option<Labels>,
}

/// Hosts of one entry.
const MAX_HOSTS: usize = 256;
/// Endpoints of one entry.
const MAX_ENDPOINTS: usize = 1000;

/// Validates a ServiceEntry.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(meta: &ObjectMeta, spec: &Spec) -> Result<ServiceEntry, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, labels) = check::namespaced(Kind::ServiceEntry, meta, &mut problems);
    match spec.location.as_deref() {
        // How a connection is carried is said by each endpoint.
        None | Some("" | "MESH_EXTERNAL" | "MESH_INTERNAL") => {}
        Some(other) => {
            problems.add("spec.location", format!("{other:?} is not a location"), "use MESH_EXTERNAL or MESH_INTERNAL");
        }
    }
    let resolution = resolution(spec.resolution.as_deref(), &mut problems);
    let entry = ServiceEntry {
        hosts: hosts(spec.hosts.as_deref().unwrap_or_default(), &mut problems),
        addresses: addresses(spec.addresses.as_deref().unwrap_or_default(), &mut problems),
        ports: ports(spec.ports.as_deref().unwrap_or_default(), &mut problems),
        resolution,
        endpoints: endpoints(spec, resolution, &mut problems),
        selector: selector(spec, resolution, &mut problems),
        subject_alt_names: spec.subject_alt_names.clone().unwrap_or_default(),
        is_private: is_private(&name, spec.export_to.as_deref().unwrap_or_default(), &mut problems),
        waypoint: WaypointBinding::read(&labels),
        created: meta.creation_timestamp.as_ref().and_then(|time| check::system_time(&time.0)),
        also_at: Vec::new(),
        is_stand_in: false,
        name,
    };
    problems.finish(entry)
}

fn hosts(given: &[String], problems: &mut Problems) -> Vec<Arc<str>> {
    if given.is_empty() {
        problems.add("spec.hosts", "is empty", "name at least one host");
    }
    if given.len() > MAX_HOSTS {
        problems.add("spec.hosts", format!("has more than {MAX_HOSTS} entries"), "spread them over several entries");
    }
    let mut hosts: Vec<Arc<str>> = Vec::new();
    for (index, text) in given.iter().take(MAX_HOSTS).enumerate() {
        let field = format!("spec.hosts[{index}]");
        match host(text) {
            None => problems.add(
                field,
                format!("{text:?} is not the full name of a host"),
                "write it with its domain, like db.example.com, or *.example.com for all below it",
            ),
            Some(host) if hosts.contains(&host) => {
                problems.add(field, format!("{text:?} is there twice"), "keep one of the two");
            }
            Some(host) => hosts.push(host),
        }
    }
    hosts
}

/// The full name of a host in lower case, or of all below it.
fn host(text: &str) -> Option<Arc<str>> {
    let host = text.to_ascii_lowercase();
    let rest = host.strip_prefix("*.").unwrap_or(&host);
    let is_wildcard = rest.len() < host.len();
    let is_name = host.parse::<IpAddr>().is_err() && check::is_dns_subdomain(rest);
    (is_name && (is_wildcard || rest.contains('.'))).then(|| host.as_str().into())
}

fn addresses(given: &[String], problems: &mut Problems) -> Vec<(IpAddr, u8)> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for (index, text) in given.iter().enumerate() {
        match block(text) {
            Some(block) if seen.insert(block) => found.push(block),
            Some(_) => {}
            None => problems.add(
                format!("spec.addresses[{index}]"),
                format!("{text:?} is not an address or a block of addresses"),
                "write it like 192.0.2.1 or 192.0.2.0/24: unicast, not loopback, not everything, not of 240.240.0.0/16",
            ),
        }
    }
    found
}

/// A block other than that of all addresses. Bits behind its length say nothing, as in Istio.
fn block(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address.parse::<IpAddr>().ok()?, Some(length)),
        None => (text.parse::<IpAddr>().ok()?, None),
    };
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let length = match length {
        None => bits,
        Some(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok()?,
        Some(_) => return None,
    };
    let is_mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    if is_mapped || !(1..=bits).contains(&length) {
        return None;
    }
    let address = masked(address, length);
    (!is_no_host(address) && !is_kept(address, length)).then_some((address, length))
}

fn is_no_host(address: IpAddr) -> bool {
    address.is_unspecified() || address.is_loopback() || address.is_multicast()
}

/// Whether it is of those that are given to hosts without addresses: they are nobody's to take.
fn is_kept(address: IpAddr, length: u8) -> bool {
    matches!(address, IpAddr::V4(v4) if v4.octets().starts_with(&[240, 240]) && length >= 16)
}

/// The address without the bits behind the first `length`.
fn masked(address: IpAddr, length: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let behind = u32::MAX.checked_shr(length.into()).unwrap_or(0);
            IpAddr::V4((v4.to_bits() & !behind).into())
        }
        IpAddr::V6(v6) => {
            let behind = u128::MAX.checked_shr(length.into()).unwrap_or(0);
            IpAddr::V6((v6.to_bits() & !behind).into())
        }
    }
}

fn ports(given: &[Port], problems: &mut Problems) -> Vec<ServicePort> {
    if given.is_empty() {
        problems.add("spec.ports", "is empty", "add at least one port");
    }
    let (mut names, mut numbers, mut ports) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for (index, port) in given.iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let name = port.name.clone().unwrap_or_default();
        if !name.is_empty() && !check::is_dns_label(&name) {
            problems.add(format!("{path}.name"), format!("{name:?} is not a port name"), check::DNS_LABEL_FIX);
        } else if name.is_empty() && given.len() > 1 {
            problems.add(format!("{path}.name"), "is missing", "name every port of an entry that has several");
        } else if !names.insert(name.clone()) {
            problems.add(format!("{path}.name"), format!("{name:?} is used twice"), "give each port its own name");
        }
        let protocol = protocol(&path, port.protocol.as_deref().unwrap_or_default(), problems);
        let number = check::port(&format!("{path}.number"), port.number.unwrap_or(0), problems);
        let target = match port.target_port {
            None | Some(0) => number,
            Some(target) => check::port(&format!("{path}.targetPort"), target, problems),
        };
        let (Some(number), Some(target), Some(app_protocol)) = (number, target, protocol) else { continue };
        if numbers.insert(number) {
            ports.push(ServicePort { name, port: number, target: TargetPort::Number(target), app_protocol });
        } else {
            problems.add(format!("{path}.number"), format!("{number} is there twice"), "keep one of the two");
        }
    }
    ports
}

/// None: not carried by TCP, or unknown.
fn protocol(path: &str, text: &str, problems: &mut Problems) -> Option<AppProtocol> {
    match text.to_ascii_uppercase().as_str() {
        "" => Some(AppProtocol::Unknown),
        "HTTP" | "HTTP_PROXY" => Some(AppProtocol::Http11),
        "HTTP2" => Some(AppProtocol::Http2),
        "GRPC" | "GRPC-WEB" => Some(AppProtocol::Grpc),
        "TCP" | "MONGO" | "MYSQL" | "REDIS" => Some(AppProtocol::Tcp),
        "TLS" | "HTTPS" => Some(AppProtocol::Tls),
        "UDP" => None,
        _ => {
            problems.add(
                format!("{path}.protocol"),
                format!("{text:?} is not a protocol"),
                "use HTTP, HTTP2, GRPC, HTTPS, TLS, TCP, MONGO, MYSQL, REDIS or UDP",
            );
            None
        }
    }
}

fn resolution(text: Option<&str>, problems: &mut Problems) -> Resolution {
    match text {
        None | Some("" | "NONE") => Resolution::None,
        Some("STATIC") => Resolution::Static,
        Some("DNS" | "DNS_ROUND_ROBIN" | "DYNAMIC_DNS") => Resolution::Dns,
        Some(other) => {
            problems.add(
                "spec.resolution",
                format!("{other:?} is not a resolution"),
                "use NONE, STATIC, DNS, DNS_ROUND_ROBIN or DYNAMIC_DNS",
            );
            Resolution::None
        }
    }
}

fn endpoints(spec: &Spec, resolution: Resolution, problems: &mut Problems) -> Vec<EntryEndpoint> {
    let given = spec.endpoints.as_deref().unwrap_or_default();
    if given.len() > MAX_ENDPOINTS {
        let message = format!("has more than {MAX_ENDPOINTS} entries");
        problems.add("spec.endpoints", message, "use WorkloadEntries and a workloadSelector");
    }
    if !given.is_empty() && resolution == Resolution::None {
        let message = "is not for resolution NONE, whose connections go where they are addressed";
        problems.add("spec.endpoints", message, "use resolution: STATIC, or remove the endpoints");
    }
    let (mut known, mut endpoints) = (BTreeMap::new(), Vec::<EntryEndpoint>::new());
    for (index, spec) in given.iter().take(MAX_ENDPOINTS).enumerate() {
        let field = format!("spec.endpoints[{index}]");
        let Some(endpoint) = workload_entry::endpoint(&field, spec, Labels::new(), problems) else { continue };
        if matches!((&endpoint.address, resolution), (EntryAddress::Host(_), Resolution::Static)) {
            let message = "is not an IP address, as resolution STATIC asks for";
            problems.add(format!("{field}.address"), message, "write it like 192.0.2.1, or use resolution: DNS");
        }
        match known.get(&endpoint.address).and_then(|at: &usize| endpoints.get(*at)) {
            None => {
                known.insert(endpoint.address.clone(), endpoints.len());
                endpoints.push(endpoint);
            }
            // Said twice, as Istio takes it.
            Some(same) if *same == endpoint => {}
            Some(_) => {
                let message = "is there twice, and not the same of it both times";
                problems.add(format!("{field}.address"), message, "keep one of the two, or use two entries");
            }
        }
    }
    endpoints
}

fn selector(spec: &Spec, resolution: Resolution, problems: &mut Problems) -> Labels {
    let Some(selector) = &spec.workload_selector else {
        if resolution == Resolution::Static && spec.endpoints.as_ref().is_none_or(Vec::is_empty) {
            problems.add(
                "spec.endpoints",
                "is empty",
                "add endpoints or a workloadSelector, or use another resolution",
            );
        }
        return Labels::new();
    };
    let labels = selector.labels.clone().unwrap_or_default();
    check::labels("spec.workloadSelector.labels", &labels, problems);
    if labels.is_empty() {
        problems.add("spec.workloadSelector.labels", "is empty and selects nothing", "name at least one label");
    }
    if spec.endpoints.as_ref().is_some_and(|endpoints| !endpoints.is_empty()) {
        problems.add("spec.workloadSelector", "is there beside endpoints", "keep one of the two");
    }
    if resolution == Resolution::None {
        let message = "is not for resolution NONE, whose connections go where they are addressed";
        problems.add("spec.workloadSelector", message, "use resolution: STATIC, or remove the selector");
    }
    labels
}

fn is_private(name: &Name, export_to: &[String], problems: &mut Problems) -> bool {
    match export_to {
        [] => false,
        [all] if all == "*" => false,
        [own] if own == "." || **own == *name.namespace => true,
        _ => {
            problems.add(
                "spec.exportTo",
                "is a choice of namespaces, which is not supported",
                "use [\"*\"] for all, or [\".\"] for the entry's own namespace alone",
            );
            false
        }
    }
}
