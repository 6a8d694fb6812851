//! What is served, as JSON for people and tools.

use std::net::IpAddr;

use mesh_proto::workload as wire;
use mesh_xds::server::Snapshot;
use mesh_xds::{AUTHORIZATION_TYPE, Resource, WORKLOAD_TYPE};
use prost::Message;
use serde_json::{Value, json};

/// Everything in the catalog.
pub(super) fn dump(snapshot: &Snapshot) -> Value {
    let (mut workloads, mut services) = (Vec::new(), Vec::new());
    for resource in snapshot.resources(WORKLOAD_TYPE) {
        match wire::Address::decode(resource.body.clone()).ok().and_then(|address| address.r#type) {
            Some(wire::address::Type::Workload(body)) => workloads.push(workload(resource, &body)),
            Some(wire::address::Type::Service(body)) => services.push(service(resource, &body)),
            None => {}
        }
    }
    let authorizations: Vec<&str> = snapshot.resources(AUTHORIZATION_TYPE).map(|resource| &*resource.name).collect();
    json!({ "workloads": workloads, "services": services, "authorizations": authorizations })
}

fn workload(resource: &Resource, workload: &wire::Workload) -> Value {
    let services: serde_json::Map<String, Value> =
        workload.services.iter().map(|(name, list)| (name.clone(), ports(&list.ports))).collect();
    json!({
        "uid": workload.uid,
        "name": workload.name,
        "namespace": workload.namespace,
        "addresses": workload.addresses.iter().map(|bytes| address(bytes)).collect::<Vec<_>>(),
        "protocol": workload.tunnel_protocol().as_str_name(),
        "status": workload.status().as_str_name(),
        "trust_domain": workload.trust_domain,
        "service_account": workload.service_account,
        "node": workload.node,
        "network_mode": workload.network_mode().as_str_name(),
        "native_tunnel": workload.native_tunnel,
        "canonical_name": workload.canonical_name,
        "canonical_revision": workload.canonical_revision,
        "workload_type": workload.workload_type().as_str_name(),
        "workload_name": workload.workload_name,
        "cluster_id": workload.cluster_id,
        "locality": workload.locality.as_ref().map(|locality| {
            json!({ "region": locality.region, "zone": locality.zone, "subzone": locality.subzone })
        }),
        "services": services,
        "waypoint": workload.waypoint.as_ref().map(gateway),
        "version": &*resource.version,
    })
}

fn service(resource: &Resource, service: &wire::Service) -> Value {
    let balancing = service.load_balancing.as_ref().map(|balancing| {
        json!({
            "mode": balancing.mode().as_str_name(),
            "health_policy": balancing.health_policy().as_str_name(),
            "routing_preference": balancing.routing_preference().map(|scope| scope.as_str_name()).collect::<Vec<_>>(),
        })
    });
    json!({
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        "addresses": service.addresses.iter().map(|found| address(&found.address)).collect::<Vec<_>>(),
        "ports": ports(&service.ports),
        "ip_families": service.ip_families().as_str_name(),
        "load_balancing": balancing,
        "waypoint": service.waypoint.as_ref().map(gateway),
        "version": &*resource.version,
    })
}

fn ports(ports: &[wire::Port]) -> Value {
    let port = |port: &wire::Port| {
        json!({
            "service_port": port.service_port,
            "target_port": port.target_port,
            "app_protocol": port.app_protocol().as_str_name(),
        })
    };
    ports.iter().map(port).collect()
}

fn gateway(gateway: &wire::GatewayAddress) -> Value {
    match &gateway.destination {
        Some(wire::gateway_address::Destination::Hostname(found)) => {
            json!(format!("{}/{}:{}", found.namespace, found.hostname, gateway.hbone_mtls_port))
        }
        Some(wire::gateway_address::Destination::Address(found)) => {
            json!(format!("{}:{}", address(&found.address), gateway.hbone_mtls_port))
        }
        None => Value::Null,
    }
}

fn address(bytes: &[u8]) -> String {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        IpAddr::from(v4).to_string()
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        IpAddr::from(v6).to_string()
    } else {
        format!("{} bytes", bytes.len())
    }
}
