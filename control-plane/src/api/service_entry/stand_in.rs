//! ServiceEntries that are not valid: their hosts and addresses, so that what is sent there does not leave the mesh.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use serde_json::Value;

use super::{EntryEndpoint, Resolution, ServiceEntry, host, is_kept, is_no_host, is_private, masked};
use crate::api::check::{self, Addresses};
use crate::api::labels::{Labels, WaypointBinding};
use crate::api::name::Name;
use crate::api::problem::Problems;
use crate::api::service::{AppProtocol, ServicePort, TargetPort};

/// The safest reading of a ServiceEntry that is not valid: its hosts, at the addresses that can be read, with nobody behind
/// them whom connections would go to. None: nothing can be read that connections are made to.
pub(in crate::api) fn stand_in(name: Name, value: &Value) -> Option<ServiceEntry> {
    let spec = |field: &str| value.pointer("/spec").and_then(|spec| spec.get(field)).filter(|value| !value.is_null());
    let (mut hosts, mut seen) = (Vec::<Arc<str>>::new(), HashSet::new());
    for text in spec("hosts").into_iter().flat_map(texts) {
        hosts.extend(host(text).filter(|host| seen.insert(host.clone())));
    }
    let (mut addresses, mut seen) = (Vec::new(), HashSet::new());
    for text in spec("addresses").into_iter().flat_map(texts) {
        addresses.extend(block(text).filter(|block| seen.insert(*block)));
    }
    let listed = spec("endpoints").and_then(Value::as_array).into_iter().flatten();
    let mut found = Addresses::default();
    listed.filter_map(|endpoint| endpoint.get("address")?.as_str()).for_each(|text| found.add_unread(text));
    if hosts.is_empty() && addresses.is_empty() && found.is_empty() {
        return None;
    }
    let export_to: Vec<String> = spec("exportTo").into_iter().flat_map(texts).map(str::to_owned).collect();
    let created = value.pointer("/metadata/creationTimestamp");
    let created = created.and_then(|time| serde_json::from_value(time.clone()).ok());
    Some(ServiceEntry {
        hosts,
        addresses,
        ports: ports(spec("ports")),
        // Where nothing is said connections go where they are addressed, and hosts have no addresses of their own. What
        // cannot be read may be any other.
        resolution: match spec("resolution").map(Value::as_str) {
            None | Some(Some("" | "NONE")) => Resolution::None,
            Some(_) => Resolution::Static,
        },
        endpoints: found.into_vec().into_iter().map(EntryEndpoint::unread).collect(),
        selector: Labels::new(),
        subject_alt_names: Vec::new(),
        // What cannot be read is for everybody.
        is_private: is_private(&name, &export_to, &mut Problems::default()),
        // It is refused before it is asked for one.
        waypoint: WaypointBinding::Off,
        created: created
            .and_then(|time: k8s_openapi::apimachinery::pkg::apis::meta::v1::Time| check::system_time(&time.0)),
        also_at: Vec::new(),
        is_stand_in: true,
        name,
    })
}

/// What of the last good version stays in force beside the newest one, which is not valid and stood in for by `newest`: all of
/// it, and at the addresses of both.
pub(in crate::api) fn keep(last: &ServiceEntry, newest: &ServiceEntry) -> ServiceEntry {
    let is_new = |block: &&(IpAddr, u8)| !last.addresses.contains(block);
    ServiceEntry { also_at: newest.addresses.iter().filter(is_new).copied().collect(), ..last.clone() }
}

/// The texts of a list, or of what should have been one.
fn texts(value: &Value) -> impl Iterator<Item = &str> {
    let listed = value.as_array().into_iter().flatten().filter_map(Value::as_str);
    value.as_str().into_iter().chain(listed)
}

/// A block in whatever form. None also for all addresses, which would be everybody's, and for those that are given to hosts
/// without any.
fn block(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) =
        text.split_once('/').map_or((text, None), |(address, length)| (address, length.parse().ok()));
    let written = address.trim().parse::<IpAddr>().ok()?;
    let address = written.to_canonical();
    let bits = if address.is_ipv4() { 32 } else { 128 };
    // The length of a block of mapped addresses counts what is in front of them.
    let front = if written.is_ipv6() && address.is_ipv4() { 96 } else { 0 };
    let length =
        length.and_then(|length: u8| length.checked_sub(front)).filter(|length| *length <= bits).unwrap_or(bits);
    let address = masked(address, length);
    (length > 0 && !is_no_host(address) && !is_kept(address, length)).then_some((address, length))
}

/// The ports whose numbers can be read: connections to them are refused for what they are, and not for asking another port.
fn ports(given: Option<&Value>) -> Vec<ServicePort> {
    let mut ports: Vec<ServicePort> = Vec::new();
    let listed = given.and_then(Value::as_array).into_iter().flatten();
    for number in listed.filter_map(|port| port.get("number")?.as_u64()) {
        let Some(port) = u16::try_from(number).ok().filter(|port| *port > 0) else { continue };
        if !ports.iter().any(|known| known.port == port) {
            let target = TargetPort::Number(port);
            ports.push(ServicePort { name: String::new(), port, target, app_protocol: AppProtocol::Unknown });
        }
    }
    ports
}
