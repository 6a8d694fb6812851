//! The client's end of delta discovery: any sequence of events.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use mesh_proto::core::Node;
use mesh_proto::discovery::{DeltaDiscoveryResponse, Resource};
use mesh_xds::client::{Machine, Mode, Subscribed};
use mesh_xds::{AUTHORIZATION_TYPE, Rejection, Update, WORKLOAD_TYPE};
use prost::Message as _;

use crate::cursor::Cursor;

const TYPES: [&str; 3] = [WORKLOAD_TYPE, AUTHORIZATION_TYPE, "another"];
const NAMES: [&str; 8] = ["", "*", "a", "b", "/10.0.0.1", "/10.0.0.2", "ns/host", "ns/other"];
const MAX_NAMES: usize = 3;

/// Reads the input as events, a byte each with what belongs to it.
pub fn run(input: &[u8]) {
    let mut cursor = Cursor::new(input);
    let modes = [Mode::OnDemand, Mode::Wildcard];
    let types = [(Arc::from(WORKLOAD_TYPE), cursor.pick(&modes)), (Arc::from(AUTHORIZATION_TYPE), cursor.pick(&modes))];
    let mut machine = Machine::new(Node::default(), types, MAX_NAMES);
    while !cursor.is_empty() {
        match cursor.byte() % 7 {
            0 => machine.connected(),
            1 => machine.disconnected(),
            2 => {
                let (kind, name) = (cursor.pick(&TYPES), cursor.pick(&NAMES));
                if let Ok(subscribed) = machine.subscribe(kind, name) {
                    assert!(!matches!(name, "" | "*"));
                    assert_eq!(machine.subscribe(kind, name), Ok(subscribed), "asked for twice");
                    assert!(subscribed != Subscribed::Pending || machine.pending() > 0);
                }
            }
            3 => while machine.request().is_some() {},
            4 => {
                if let Ok(response) = DeltaDiscoveryResponse::decode(cursor.bytes()) {
                    respond(&mut machine, response, false);
                }
            }
            _ => {
                let refuse = cursor.byte().is_multiple_of(4);
                let response = response(&mut cursor);
                respond(&mut machine, response, refuse);
            }
        }
        assert!(machine.pending() <= MAX_NAMES * 2, "names are bounded");
        assert!(machine.status().count() == 2);
    }
}

fn respond(machine: &mut Machine, response: DeltaDiscoveryResponse, refuse: bool) {
    while machine.request().is_some() {}
    let (nonce, kind) = (response.nonce.clone(), response.type_url.clone());
    let mut sink = |update: Update| {
        let mut names: Vec<_> = update.set.iter().map(|resource| resource.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), update.set.len(), "no name twice");
        assert!(update.removed.iter().all(|removed| !names.iter().any(|name| **name == **removed)));
        let refused = names.iter().filter(|_| refuse);
        refused.map(|name| Rejection { name: name.to_string(), reason: "refused".to_owned() }).collect()
    };
    let received = machine.received(response, UNIX_EPOCH, &mut sink);
    let answer = machine.request().expect("every response is answered");
    assert_eq!((answer.response_nonce, &answer.type_url), (nonce, &kind));
    assert_eq!(answer.error_detail.is_some(), !received.rejections.is_empty());
}

fn response(cursor: &mut Cursor<'_>) -> DeltaDiscoveryResponse {
    let mut response = DeltaDiscoveryResponse {
        type_url: cursor.pick(&TYPES).to_owned(),
        nonce: cursor.byte().to_string(),
        system_version_info: cursor.pick(&["", "1", "1+more"]).to_owned(),
        ..DeltaDiscoveryResponse::default()
    };
    for _ in 0..cursor.byte() % 5 {
        let mut resource = Resource {
            name: cursor.pick(&NAMES).to_owned(),
            aliases: (0..cursor.byte() % 3).map(|_| cursor.pick(&NAMES).to_owned()).collect(),
            version: cursor.byte().to_string(),
            ..Resource::default()
        };
        if !cursor.byte().is_multiple_of(4) {
            let value = cursor.bytes().to_vec();
            resource.resource = Some(prost_types::Any { type_url: cursor.pick(&TYPES).to_owned(), value });
        }
        response.resources.push(resource);
    }
    response.removed_resources = (0..cursor.byte() % 4).map(|_| cursor.pick(&NAMES).to_owned()).collect();
    response
}
