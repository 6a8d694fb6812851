//! WorkloadEntry: a workload that is no pod, such as a virtual machine; and the endpoints that a ServiceEntry lists, which
//! are written alike.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::check::{self, Addresses};
use super::labels::{Labels, WaypointBinding};
use super::name::{Kind, Name};
use super::node::Locality;
use super::pod::{REDIRECTION, TUNNEL};
use super::problem::{Problem, Problems};

/// A workload that is no pod.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkloadEntry {
    /// Its name.
    pub name: Name,
    /// What it is. Its labels are the object's, and those of the spec that the object does not have.
    pub endpoint: EntryEndpoint,
    /// The waypoint of its own label.
    pub waypoint: WaypointBinding,
    /// What checks it has found it well, or nothing checks it.
    pub healthy: bool,
    /// Where a newer version, which is not valid, says that it is: it counts as being there as well.
    pub also_at: Option<IpAddr>,
    /// It stands for one that is not valid: nothing is known of it but its address, and nobody reaches it.
    pub is_stand_in: bool,
}

/// A workload that is no pod, as an entry describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct EntryEndpoint {
    /// Where it is.
    pub address: EntryAddress,
    /// Its own numbers for ports of services, by the name of the port.
    pub ports: BTreeMap<String, u16>,
    /// Its labels.
    pub labels: Labels,
    /// Where it stands.
    pub locality: Locality,
    /// Its share of connections; none when not said.
    pub weight: Option<u32>,
    /// The service account of its identity; empty for `default`.
    pub service_account: String,
    /// It speaks HBONE itself (`networking.istio.io/tunnel: http`).
    pub native_tunnel: bool,
    /// Its traffic is captured (`ambient.istio.io/redirection: enabled`).
    pub captured: bool,
}

/// Where an entry's workload is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryAddress {
    /// At this address.
    Ip(IpAddr),
    /// At whatever address this DNS name has.
    Host(String),
}

/// The spec of a WorkloadEntry, and an endpoint of a ServiceEntry, as it is written.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    address: Option<String>,
    ports: Option<BTreeMap<String, i64>>,
    labels: Option<Labels>,
    network: Option<String>,
    locality: Option<String>,
    weight: Option<i64>,
    service_account: Option<String>,
}

/// Validates a WorkloadEntry, apart from its status.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(meta: &ObjectMeta, spec: &Spec) -> Result<WorkloadEntry, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, labels) = check::namespaced(Kind::WorkloadEntry, meta, &mut problems);
    let waypoint = WaypointBinding::read(&labels);
    let endpoint = endpoint("spec", spec, labels, &mut problems);
    let annotation = |key| meta.annotations.as_ref().and_then(|all| all.get(key)).map(String::as_str);
    let captured = annotation(REDIRECTION) == Some("enabled");
    match endpoint {
        Some(endpoint) => {
            let endpoint = EntryEndpoint { captured, ..endpoint };
            let entry = WorkloadEntry { name, endpoint, waypoint, healthy: true, also_at: None, is_stand_in: false };
            problems.finish(entry)
        }
        None => Err(problems.into_list()),
    }
}

impl WorkloadEntry {
    /// The same as its status says it is: the condition `Healthy` of `object`, where what checks it keeps one.
    pub(super) fn with_status(self, object: &Value) -> Self {
        let is_checked = object.pointer("/metadata/annotations/proxy.istio.io~1health-checks-enabled");
        let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
        let says = conditions.into_iter().flatten().find(|condition| condition["type"] == "Healthy");
        let healthy = match says {
            Some(condition) => condition["status"] == "True",
            None => is_checked.is_none_or(|value| value != "true"),
        };
        Self { healthy, ..self }
    }
}

/// The safest reading of a WorkloadEntry that is not valid: at its address, and nobody reaches it. None: it has no address that
/// can be read.
pub(super) fn stand_in(name: Name, value: &Value) -> Option<WorkloadEntry> {
    let mut found = Addresses::default();
    found.add_unread(value.pointer("/spec/address")?.as_str()?);
    Some(WorkloadEntry {
        name,
        endpoint: EntryEndpoint::unread(found.into_vec().first().copied()?),
        waypoint: WaypointBinding::Off,
        healthy: false,
        also_at: None,
        is_stand_in: true,
    })
}

/// What of the last good version stays in force beside the newest one, which is not valid and stood in for by `newest`: all of
/// it, and at the addresses of both.
pub(super) fn keep(last: &WorkloadEntry, newest: &WorkloadEntry) -> WorkloadEntry {
    let also_at = match (&last.endpoint.address, &newest.endpoint.address) {
        (EntryAddress::Ip(before), EntryAddress::Ip(now)) if before != now => Some(*now),
        (_, EntryAddress::Ip(_) | EntryAddress::Host(_)) => None,
    };
    WorkloadEntry { also_at, ..last.clone() }
}

impl EntryEndpoint {
    /// What is known of one whose object is not valid.
    pub(super) fn unread(address: IpAddr) -> Self {
        Self {
            address: EntryAddress::Ip(address),
            ports: BTreeMap::new(),
            labels: Labels::new(),
            locality: Locality::default(),
            weight: None,
            service_account: String::new(),
            native_tunnel: false,
            captured: false,
        }
    }
}

/// Reads the endpoint at `field`. `labels` go before its own of the same key. None: it has no address that can be read.
pub(super) fn endpoint(field: &str, spec: &Spec, labels: Labels, problems: &mut Problems) -> Option<EntryEndpoint> {
    let own = spec.labels.clone().unwrap_or_default();
    check::labels(&format!("{field}.labels"), &own, problems);
    let mut all = own;
    all.extend(labels);
    if spec.network.as_deref().is_some_and(|network| !network.is_empty()) {
        problems.add(
            format!("{field}.network"),
            "is another network, and several are not supported",
            "remove it if the address can be reached from the cluster; otherwise do not rely on the entry",
        );
    }
    let service_account = spec.service_account.clone().unwrap_or_default();
    if !service_account.is_empty() && !check::is_dns_subdomain(&service_account) {
        problems.add(
            format!("{field}.serviceAccount"),
            format!("{service_account:?} is not a service account name"),
            check::DNS_SUBDOMAIN_FIX,
        );
    }
    let weight = spec.weight.map(u32::try_from);
    if matches!(weight, Some(Err(_))) {
        problems.add(format!("{field}.weight"), "is not a weight", "use 0 to 4294967295");
    }
    Some(EntryEndpoint {
        ports: ports(&format!("{field}.ports"), spec, problems),
        address: address(&format!("{field}.address"), spec.address.as_deref().unwrap_or_default(), problems)?,
        native_tunnel: all.get(TUNNEL).is_some_and(|value| value == "http"),
        captured: false,
        labels: all,
        locality: locality(spec.locality.as_deref().unwrap_or_default()),
        // As elsewhere 0 is the same as not said.
        weight: weight.and_then(Result::ok).filter(|weight| *weight > 0),
        service_account,
    })
}

fn ports(field: &str, spec: &Spec, problems: &mut Problems) -> BTreeMap<String, u16> {
    let mut ports = BTreeMap::new();
    for (name, number) in spec.ports.iter().flatten() {
        match u16::try_from(*number).ok().filter(|port| *port > 0) {
            Some(port) => drop(ports.insert(name.clone(), port)),
            None => problems.add(format!("{field}[{name}]"), format!("{number} is not a port"), "use 1 to 65535"),
        }
    }
    ports
}

fn address(field: &str, text: &str, problems: &mut Problems) -> Option<EntryAddress> {
    if text.is_empty() {
        problems.add(field, "is missing", "give the workload's IP address");
        return None;
    }
    if text.starts_with("unix:") {
        problems.add(field, "is a Unix socket, which is not supported", "give the workload's IP address");
        return None;
    }
    let looks_like_a_name = text.parse::<IpAddr>().is_err() && check::is_dns_subdomain(text);
    // No name of a host ends in digits alone; a mistyped address does.
    if looks_like_a_name && !text.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit())) {
        return Some(EntryAddress::Host(text.to_owned()));
    }
    check::address(field, text, problems).map(EntryAddress::Ip)
}

/// `region/zone/subzone`, of which the later ones may be missing.
fn locality(text: &str) -> Locality {
    let mut parts = text.splitn(3, '/').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    Locality { region: next(), zone: next(), subzone: next() }
}
