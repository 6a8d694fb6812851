//! Services that are not valid: their addresses, so that what is sent there does not leave the mesh.

use std::net::IpAddr;

use serde_json::Value;

use super::{Families, Service, ServiceAddresses, Topology};
use crate::api::check::Addresses;
use crate::api::labels::{Labels, WaypointBinding};
use crate::api::name::Name;

/// The safest reading of a service that is not valid: at the addresses that can be read, and without anything behind it.
pub(in crate::api) fn stand_in(name: Name, value: &Value) -> Service {
    let addresses = addresses(value);
    Service {
        name,
        ingress: match addresses {
            ServiceAddresses::Given(_) => ingress(value),
            ServiceAddresses::Allocate | ServiceAddresses::Headless | ServiceAddresses::External => Vec::new(),
        },
        addresses,
        ports: Vec::new(),
        selector: Labels::new(),
        publish_not_ready: false,
        families: Families::Automatic,
        topology: Topology::Anywhere,
        // It is refused before it is asked for one.
        waypoint: WaypointBinding::Off,
        entry: None,
        is_stand_in: true,
    }
}

/// What of the last good version stays in force beside the newest one, which is not valid and stood in for by `newest`: all of
/// it, and at the addresses of both.
pub(in crate::api) fn keep(last: &Service, newest: &Service) -> Service {
    let ServiceAddresses::Given(now) = &newest.addresses else { return last.clone() };
    let mut all = match &last.addresses {
        ServiceAddresses::Given(before) => before.clone(),
        ServiceAddresses::Allocate | ServiceAddresses::Headless | ServiceAddresses::External => Vec::new(),
    };
    all.extend(now.iter().filter(|address| !all.contains(address)).copied().collect::<Vec<_>>());
    if all.is_empty() {
        return last.clone();
    }
    let mut ingress = last.ingress.clone();
    ingress.extend(newest.ingress.iter().filter(|address| !last.ingress.contains(address)));
    Service { addresses: ServiceAddresses::Given(all), ingress, ..last.clone() }
}

fn addresses(value: &Value) -> ServiceAddresses {
    let is_empty = |value: &Value| value.is_null() || value == "";
    let spec = |field: &str| value.pointer("/spec").and_then(|spec| spec.get(field)).filter(|value| !is_empty(value));
    if spec("type").is_some_and(|kind| kind == "ExternalName") {
        return ServiceAddresses::External;
    }
    let listed =
        spec("clusterIPs").and_then(Value::as_array).into_iter().flatten().filter(|address| !is_empty(address));
    let given: Vec<&Value> = spec("clusterIP").into_iter().chain(listed).collect();
    let is_unreadable = spec("clusterIPs").is_some_and(|list| !list.is_array());
    if given.is_empty() && !is_unreadable {
        // It is where it will be once it is mended.
        return ServiceAddresses::Allocate;
    }
    if given.iter().all(|address| *address == "None") && !is_unreadable {
        return ServiceAddresses::Headless;
    }
    ServiceAddresses::Given(readable(given))
}

fn ingress(value: &Value) -> Vec<IpAddr> {
    let ingress = value.pointer("/status/loadBalancer/ingress").and_then(Value::as_array).into_iter().flatten();
    let ingress = ingress.filter(|entry| entry.get("ipMode").is_none_or(|mode| mode != "Proxy"));
    readable(ingress.filter_map(|entry| entry.get("ip")))
}

fn readable<'a>(all: impl IntoIterator<Item = &'a Value>) -> Vec<IpAddr> {
    let mut found = Addresses::default();
    all.into_iter().filter_map(Value::as_str).for_each(|text| found.add_unread(text));
    found.into_vec()
}
