//! A small mesh for the tests of the decisions.

use std::net::{IpAddr, SocketAddr};

use mesh_model::port_names::{EXTENSION, PAYLOAD_TYPE};
use mesh_model::{Snapshot, SpiffeId};
use mesh_proto::{extension, workload as wire};
use prost::Message as _;

use super::LocalPod;

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub fn id(namespace: &str, service_account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", namespace, service_account).unwrap()
}

fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// An HBONE pod of namespace `shop` whose service account has its name.
pub fn pod(name: &str, addresses: &[&str]) -> wire::Workload {
    wire::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        service_account: name.into(),
        addresses: addresses.iter().map(|ip| bytes(ip).into()).collect(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        ..Default::default()
    }
}

/// A service of namespace `shop` at `vip` with ports `(service port, target port)`.
pub fn service(name: &str, vip: &str, ports: &[(u32, u32)]) -> wire::Service {
    wire::Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local"),
        addresses: vec![network_address(vip)],
        ports: wire_ports(ports),
        ..Default::default()
    }
}

/// Names a service's ports, as culvertd does.
pub fn with_port_names(mut service: wire::Service, names: &[(&str, u32)]) -> wire::Service {
    let port = |(name, port): &(&str, u32)| extension::PortName { service_port: *port, name: (*name).into() };
    let message = extension::PortNames { ports: names.iter().map(port).collect() };
    let config = prost_types::Any { type_url: PAYLOAD_TYPE.into(), value: message.encode_to_vec() };
    service.extensions.push(wire::Extension { name: EXTENSION.into(), config: Some(config) });
    service
}

pub fn network_address(ip: &str) -> wire::NetworkAddress {
    wire::NetworkAddress { address: bytes(ip).into(), ..Default::default() }
}

pub fn wire_ports(ports: &[(u32, u32)]) -> Vec<wire::Port> {
    let port = |(service_port, target_port): &(u32, u32)| wire::Port {
        service_port: *service_port,
        target_port: *target_port,
        app_protocol: 0,
    };
    ports.iter().map(port).collect()
}

/// Makes a workload an endpoint of a service of namespace `shop`.
pub fn in_service(mut workload: wire::Workload, service: &str, ports: &[(u32, u32)]) -> wire::Workload {
    let key = format!("shop/{service}.shop.svc.cluster.local");
    workload.services.insert(key, wire::PortList { ports: wire_ports(ports) });
    workload
}

/// The waypoint that is the service of that name in namespace `shop`.
pub fn waypoint(service: &str) -> wire::GatewayAddress {
    wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Hostname(wire::NamespacedHostname {
            namespace: "shop".into(),
            hostname: format!("{service}.shop.svc.cluster.local"),
        })),
        hbone_mtls_port: 0,
    }
}

pub fn mesh(workloads: &[wire::Workload], services: &[wire::Service]) -> Snapshot {
    let mut snapshot = Snapshot::new();
    workloads.iter().for_each(|workload| snapshot.upsert_workload(workload.try_into().unwrap()));
    services.iter().for_each(|service| snapshot.upsert_service(service.try_into().unwrap()));
    snapshot
}

/// The pod that [`pod`] describes, as the agent announces it.
pub fn local<'a>(name: &'a str, identity: &'a SpiffeId, addresses: &'a [IpAddr]) -> LocalPod<'a> {
    LocalPod { name, namespace: "shop", identity, addresses, network: "", node: "node-1", cluster_id: "Kubernetes" }
}
