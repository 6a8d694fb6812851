//! The names of a service's ports, as an extension of a discovery resource.

use mesh_model::port_names::{EXTENSION, PAYLOAD_TYPE};
use mesh_model::{Change, Service, Snapshot};
use mesh_proto::{extension, workload as wire};
use prost::Message as _;

use crate::cursor::Cursor;

/// Reads the input as a byte for the type of the payload, a count of ports, the ports with two bytes each, and the payload.
pub fn run(input: &[u8]) {
    let mut cursor = Cursor::new(input);
    let type_url = cursor.pick(&[PAYLOAD_TYPE, "type.googleapis.com/culvert.discovery.v9.PortNames", ""]);
    let count = cursor.byte() % 8;
    let ports: Vec<u32> = (0..count).map(|_| u32::from_be_bytes([0, 0, cursor.byte(), cursor.byte()]).max(1)).collect();
    let payload = cursor.rest();
    let config = prost_types::Any { type_url: type_url.to_owned(), value: payload.to_vec() };
    let wire = wire::Service {
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        ports: ports.iter().map(|port| wire::Port { service_port: *port, ..Default::default() }).collect(),
        extensions: vec![wire::Extension { name: EXTENSION.into(), config: Some(config) }],
        ..Default::default()
    };
    let known = type_url == PAYLOAD_TYPE;
    let message = extension::PortNames::decode(payload);
    let service =
        Service::try_from(&wire).unwrap_or_else(|error| panic!("{error}: names are no reason to refuse a service"));
    let said = message.iter().filter(|_| known).flat_map(|message| &message.ports);
    let found: Vec<_> = said.map(|said| (said, service.port_names.port(&said.name))).collect();
    // All of them or none.
    let is_taken = found.iter().any(|(_, port)| port.is_some());
    for (said, port) in found {
        assert_eq!(port.map(u32::from), is_taken.then_some(said.service_port));
        assert!(!is_taken || (ports.contains(&said.service_port) && (1..=63).contains(&said.name.len())));
    }
    let name = format!("{}/{}", wire.namespace, wire.hostname);
    let body = wire::Address { r#type: Some(wire::address::Type::Service(wire)) }.encode_to_vec();
    let (change, invalid) = Change::address(&name, &body);
    let mut snapshot = Snapshot::new();
    snapshot.apply(change);
    assert!(invalid.is_none() && snapshot.service_by_name(&name).is_some());
}
