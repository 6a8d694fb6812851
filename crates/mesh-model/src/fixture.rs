//! Resources for the tests, as the wire carries them.

use std::net::IpAddr;

use mesh_proto::{security, workload as wire};

use crate::snapshot::Snapshot;

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn bytes(address: &str) -> bytes::Bytes {
    match ip(address) {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

/// A pod of namespace `shop` whose service account has its name.
pub(crate) fn pod(name: &str, addresses: &[&str]) -> wire::Workload {
    wire::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        service_account: name.into(),
        addresses: addresses.iter().map(|address| bytes(address)).collect(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        ..Default::default()
    }
}

/// A service of namespace `shop` with ports `(service port, target port)`.
pub(crate) fn service(name: &str, vips: &[&str], ports: &[(u32, u32)]) -> wire::Service {
    wire::Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: name.into(),
        addresses: vips.iter().map(|vip| network_address(vip)).collect(),
        ports: self::ports(ports),
        ..Default::default()
    }
}

pub(crate) fn network_address(address: &str) -> wire::NetworkAddress {
    wire::NetworkAddress { address: bytes(address), ..Default::default() }
}

pub(crate) fn ports(ports: &[(u32, u32)]) -> Vec<wire::Port> {
    let port = |(service_port, target_port): &(u32, u32)| wire::Port {
        service_port: *service_port,
        target_port: *target_port,
        app_protocol: 0,
    };
    ports.iter().map(port).collect()
}

/// Makes a workload an endpoint of a service of namespace `shop`.
pub(crate) fn in_service(mut workload: wire::Workload, name: &str, ports: &[(u32, u32)]) -> wire::Workload {
    workload.services.insert(format!("shop/{name}"), wire::PortList { ports: self::ports(ports) });
    workload
}

pub(crate) fn snapshot(workloads: &[wire::Workload], services: &[wire::Service]) -> Snapshot {
    let mut snapshot = Snapshot::new();
    workloads.iter().for_each(|workload| snapshot.upsert_workload(workload.try_into().unwrap()));
    services.iter().for_each(|service| snapshot.upsert_service(service.try_into().unwrap()));
    snapshot
}

/// A policy of namespace `shop` with these rules.
pub(crate) fn policy(name: &str, action: security::Action, rules: Vec<security::Rule>) -> security::Authorization {
    security::Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        action: action.into(),
        rules,
        ..Default::default()
    }
}

/// A rule of one clause of one match.
pub(crate) fn rule(one: security::Match) -> security::Rule {
    security::Rule { clauses: vec![security::Clause { matches: vec![one] }] }
}

pub(crate) fn exact(text: &str) -> security::StringMatch {
    security::StringMatch { match_type: Some(security::string_match::MatchType::Exact(text.into())) }
}

pub(crate) fn block(base: &str, length: u32) -> security::Address {
    security::Address { address: bytes(base), length }
}
