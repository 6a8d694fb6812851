//! What the status of ServiceEntries and WorkloadEntries is to say.

use std::sync::Arc;

use super::binding::{binding, waypoint};
use super::{ACCEPTED, All, Nacks, Said, WAYPOINT_BOUND, ZTUNNEL_ACCEPTED, refusal};
use crate::api::{EntryAddress, Kind, Name, ServiceEntry, WorkloadEntry};

/// Begins the keys of workloads and services among what proxies refuse: behind those of policies, which they do not crowd out
/// where there is room for some only.
const ADDRESS: &str = "~/";
/// In the name of a workload that an entry becomes, before its kind and name; the cluster is before it.
const ENTRY: &str = "/networking.istio.io/";

/// The key of a workload or service that is refused; none of one that is no entry's.
pub(super) fn key(resource: &str) -> Option<String> {
    if let Some((_, entry)) = resource.split_once(ENTRY) {
        return Some(format!("{ADDRESS}{ENTRY}{entry}"));
    }
    // Of services; other workloads have more parts.
    let (namespace, host) = resource.split_once('/')?;
    (!namespace.is_empty() && !host.contains('/')).then(|| format!("{ADDRESS}{resource}"))
}

/// Of a ServiceEntry, with the notes on it; none where that cannot be told.
pub(super) fn of_service_entry(entry: &ServiceEntry, all: &All, nacks: &Nacks, notes: &[String]) -> Option<Vec<Said>> {
    let namespace = &entry.name.namespace;
    let bound = waypoint(namespace, &entry.waypoint, all)?;
    let (holds, reason, message) = match refused(nacks, Kind::ServiceEntry, &entry.name, &entry.hosts) {
        Some(message) => (false, "RefusedByProxy", message),
        None if notes.is_empty() => (true, "Accepted", ACCEPTED.to_owned()),
        // Nobody looks names up, but for a waypoint.
        None if entry.is_only_names() && bound.is_none() => (false, "UnsupportedValue", notes.join("\n")),
        None => (true, "PartiallyInvalid", notes.join("\n")),
    };
    let mut said = vec![(ZTUNNEL_ACCEPTED, holds, reason, message)];
    if let Some(bound) = bound {
        let (holds, reason, message) = binding(namespace, &bound, all)?;
        said.push((WAYPOINT_BOUND, holds, reason, message));
    }
    Some(said)
}

/// Of a WorkloadEntry, with the notes on it.
pub(super) fn of_workload_entry(entry: &WorkloadEntry, nacks: &Nacks, notes: &[String]) -> Said {
    let is_name = matches!(entry.endpoint.address, EntryAddress::Host(_));
    match refused(nacks, Kind::WorkloadEntry, &entry.name, &[]) {
        Some(message) => (ZTUNNEL_ACCEPTED, false, "RefusedByProxy", message),
        None if is_name => (ZTUNNEL_ACCEPTED, false, "UnsupportedValue", notes.join("\n")),
        None => (ZTUNNEL_ACCEPTED, true, "Accepted", ACCEPTED.to_owned()),
    }
}

/// Who refused anything that the entry becomes, if anybody did.
fn refused(nacks: &Nacks, kind: Kind, entry: &Name, hosts: &[Arc<str>]) -> Option<String> {
    let Name { namespace, name } = entry;
    let of_host = hosts.iter().find_map(|host| refusal(nacks, &format!("{ADDRESS}{namespace}/{host}")));
    // Its own workload, or those of its endpoints.
    let own = format!("{ADDRESS}{ENTRY}{kind}/{namespace}/{name}");
    let behind = format!("{own}/");
    let endpoint = || nacks.range(behind.clone()..).map(|(key, _)| key).next().filter(|key| key.starts_with(&behind));
    of_host.or_else(|| refusal(nacks, &own)).or_else(|| refusal(nacks, endpoint()?))
}
