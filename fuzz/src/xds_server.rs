//! The server's end of delta discovery: what a client may send in a stream.

use std::sync::Arc;

use bytes::Bytes;
use mesh_proto::discovery::DeltaDiscoveryRequest;
use mesh_xds::server::{Catalog, Limits, Machine};
use mesh_xds::{AUTHORIZATION_TYPE, Resource, WORKLOAD_TYPE};
use prost::Message as _;

use crate::cursor::Cursor;

/// Types of one stream.
const MAX_TYPES: usize = 4;

/// Reads the input as requests, each with a length of two bytes; a zero byte before one gives it the last response's nonce.
pub fn run(input: &[u8]) {
    let catalog = Catalog::new();
    let resource = |name: &str| Resource {
        name: name.into(),
        aliases: vec![format!("/{name}").into()],
        version: "1".into(),
        body: Bytes::from_static(b"body"),
    };
    for kind in [WORKLOAD_TYPE, AUTHORIZATION_TYPE] {
        catalog.update(kind, ["a", "b", "ns/host"].map(resource), [""; 0]);
    }
    let snapshot = catalog.snapshot();
    let limits = Limits { max_types: MAX_TYPES, max_names: 5, max_known: 10, max_response: 64, ..Limits::default() };
    let mut machine = Machine::new(Arc::new(limits));
    let mut cursor = Cursor::new(input);
    let mut nonce = String::new();
    while !cursor.is_empty() {
        let answering = cursor.byte() == 0;
        let Ok(mut request) = DeltaDiscoveryRequest::decode(cursor.bytes()) else { continue };
        if answering {
            request.response_nonce.clone_from(&nonce);
        }
        if machine.request(&snapshot, request, std::time::UNIX_EPOCH).is_err() {
            return;
        }
        for _ in 0..8 {
            match machine.respond(&snapshot) {
                Ok(Some(response)) => nonce = response.nonce,
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(machine.status().len() <= MAX_TYPES, "types are bounded");
    }
}
