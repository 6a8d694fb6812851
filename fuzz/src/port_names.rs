//! The names of a service's ports, as an extension of a discovery resource.

use mesh_model::port_names::{EXTENSION, PAYLOAD_TYPE};
use mesh_model::service::InvalidService;
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
    match Service::try_from(&wire) {
        Ok(service) => {
            for port in message.iter().filter(|_| known).flat_map(|message| &message.ports) {
                assert_eq!(service.port_names.port(&port.name).map(u32::from), Some(port.service_port));
                assert!(ports.contains(&port.service_port) && (1..=63).contains(&port.name.len()));
            }
            assert!(!known || message.is_ok());
        }
        Err(InvalidService::PortNames(why)) => assert!(known && !why.to_string().is_empty()),
        Err(other) => panic!("{other}: there is nothing else to be refused"),
    }
    refused_is_known(wire);
}

/// What is refused for its names is still there, as what cannot be taken.
fn refused_is_known(service: wire::Service) {
    let (mut snapshot, name) = (Snapshot::new(), format!("{}/{}", service.namespace, service.hostname));
    let body = wire::Address { r#type: Some(wire::address::Type::Service(service)) }.encode_to_vec();
    let (change, invalid) = Change::address(&name, &body);
    snapshot.apply(change);
    assert_eq!(snapshot.unusable(&name).is_some(), invalid.is_some());
    assert_eq!(snapshot.service_by_name(&name).is_some(), invalid.is_none());
}
