//! Pods that are not valid: what is read of them all the same, so that nobody takes them for strangers to the mesh.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as k8s;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

use super::{Phase, Pod, REDIRECTION, TUNNEL, container_ports, owner};
use crate::api::check::{self, Addresses};
use crate::api::labels::{self, DataplaneMode, Labels, WaypointBinding};
use crate::api::name::Name;
use crate::api::problem::Problems;

/// The safest reading of a pod that is not valid: enrolled unless it says that it is not, behind the waypoint that it names,
/// at the addresses that can be read, and as whom it says it runs, or nobody.
pub(in crate::api) fn stand_in(name: Name, value: &Value) -> Pod {
    let text = |path: &str| value.pointer(path).and_then(Value::as_str);
    let labels = labels::unread(value);
    let meta = value.get("metadata").and_then(|meta| serde_json::from_value::<ObjectMeta>(meta.clone()).ok());
    let spec = value.get("spec").and_then(|spec| serde_json::from_value::<k8s::PodSpec>(spec.clone()).ok());
    let mut ignored = Problems::default();
    Pod {
        name,
        uid: text("/metadata/uid").unwrap_or_default().into(),
        mode: DataplaneMode::read_safely(labels.as_ref()),
        waypoint: WaypointBinding::read_safely(labels.as_ref()),
        captured: value.pointer("/metadata/annotations").and_then(|all| all.get(REDIRECTION)?.as_str())
            == Some("enabled"),
        native_tunnel: labels.as_ref().is_some_and(|labels| labels.get(TUNNEL).is_some_and(|value| value == "http")),
        addresses: addresses(value),
        node: text("/spec/nodeName").filter(|node| check::is_dns_subdomain(node)).unwrap_or_default().into(),
        host_network: value.pointer("/spec/hostNetwork").and_then(Value::as_bool).unwrap_or(false),
        service_account: service_account(value, labels.as_ref()),
        phase: phase(text("/status/phase")),
        ready: is_ready(value),
        terminating: text("/metadata/deletionTimestamp").is_some(),
        ports: spec.map(|spec| container_ports("spec", &spec, &mut ignored)).unwrap_or_default(),
        owner: meta.as_ref().and_then(owner),
        created: meta.and_then(|meta| check::system_time(&meta.creation_timestamp?.0)),
        labels: labels.unwrap_or_default(),
        is_stand_in: true,
    }
}

/// What of the last good version stays in force beside the newest one, which is not valid and stood in for by `newest`. None:
/// nothing does, since it is another pod, or has ended.
pub(in crate::api) fn keep(last: &Pod, newest: &Pod) -> Option<Pod> {
    if newest.uid != last.uid || newest.phase.is_over() {
        return None;
    }
    // A pod has no addresses and no node at first. What is told of it as it starts, runs and ends is told by the cluster.
    let is_there = !newest.addresses.is_empty();
    Some(Pod {
        terminating: newest.terminating,
        captured: newest.captured,
        ready: last.ready && (!newest.terminating || newest.ready),
        addresses: if is_there { newest.addresses.clone() } else { last.addresses.clone() },
        node: if newest.node.is_empty() { last.node.clone() } else { newest.node.clone() },
        ..last.clone()
    })
}

fn addresses(value: &Value) -> Vec<IpAddr> {
    let mut found = Addresses::default();
    let listed = value.pointer("/status/podIPs").and_then(Value::as_array).into_iter().flatten();
    let all = value.pointer("/status/podIP").into_iter().chain(listed.filter_map(|entry| entry.get("ip")));
    all.filter_map(Value::as_str).for_each(|text| found.add_unread(text));
    found.into_vec()
}

/// As whom it runs. Nobody also where its labels cannot be read, which choose the policies that are for it: one that is not
/// applied would let in whom it was to keep out.
fn service_account(value: &Value, labels: Option<&Labels>) -> Arc<str> {
    let Some(spec) = value.get("spec").and_then(Value::as_object).filter(|_| labels.is_some()) else {
        return Pod::NOBODY.into();
    };
    let mut named = ["serviceAccountName", "serviceAccount"].into_iter().filter_map(|field| spec.get(field));
    match named.find(|named| !named.is_null() && named.as_str() != Some("")) {
        None => "default".into(),
        Some(named) => named.as_str().filter(|name| check::is_dns_subdomain(name)).unwrap_or(Pod::NOBODY).into(),
    }
}

fn phase(text: Option<&str>) -> Phase {
    match text {
        Some("Pending") => Phase::Pending,
        Some("Running") => Phase::Running,
        Some("Succeeded") => Phase::Succeeded,
        Some("Failed") => Phase::Failed,
        Some(_) | None => Phase::Unknown,
    }
}

/// Whether it says of itself that it is ready.
fn is_ready(value: &Value) -> bool {
    let conditions = value.pointer("/status/conditions").and_then(Value::as_array);
    let is_ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    conditions.into_iter().flatten().any(is_ready)
}
