//! Workloads, services and policies as discovery sends them, and every decision over what they become.

use std::net::IpAddr;

use mesh_model::{Change, ConnectionFacts, Snapshot};

use crate::cursor::Cursor;

/// Reads the input as resources, each a byte for its kind (0 address, 1 authorization, 2 removal), a name and a body (both
/// with a length of two bytes), applies them, and asks the snapshot everything.
pub fn run(input: &[u8]) {
    let mut cursor = Cursor::new(input);
    let mut snapshot = Snapshot::new();
    while !cursor.is_empty() {
        let (kind, name, body) = (cursor.byte(), cursor.text(), cursor.bytes());
        let (change, invalid) = match kind % 3 {
            0 => Change::address(&name, body),
            1 => Change::authorization(&name, body),
            _ => {
                snapshot.apply(Change::RemoveAddress(name.clone()));
                (Change::RemoveAuthorization(name), None)
            }
        };
        if let Some(invalid) = invalid {
            assert!(!invalid.to_string().is_empty());
        }
        snapshot.apply(change);
    }
    ask(&snapshot);
}

fn ask(snapshot: &Snapshot) {
    for service in snapshot.services() {
        assert!(snapshot.service_by_name(service.key()).is_some());
        let _ = service.choose_waypoint(&mut fastrand::Rng::with_seed(1));
        for workload in snapshot.workloads() {
            let _ = service.expected_identities(workload);
            for port in &service.ports {
                let _ = workload.target_port(service, port.service_port);
            }
        }
    }
    let source: IpAddr = [10, 0, 0, 1].into();
    for workload in snapshot.workloads() {
        assert!(snapshot.workload_by_uid(&workload.uid).is_some());
        for ip in &workload.addresses {
            let _ = snapshot.workload_destination(&workload.location.network, *ip);
            let facts = |identity| ConnectionFacts {
                destination: workload,
                identity,
                source_ip: source,
                destination_ip: *ip,
                destination_port: 80,
            };
            let _ = snapshot.authorize(&facts(None));
            let _ = snapshot.authorize(&facts(Some(workload.spiffe_id())));
        }
    }
    for unusable in snapshot.all_unusable() {
        assert!(snapshot.unusable(&unusable.name).is_some());
    }
}
