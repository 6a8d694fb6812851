//! What a pod's applications ask, and what resolvers answer.

use std::net::IpAddr;
use std::sync::LazyLock;
use std::time::Duration;

use mesh_model::port_names::{EXTENSION, PAYLOAD_TYPE};
use mesh_model::{Snapshot, SpiffeId};
use mesh_proto::{extension, workload as wire};
use prost::Message as _;
use tokio::time::Instant;
use ztunnel::proxy::dns::answer::{Decision, Transport, decide};
use ztunnel::proxy::dns::cache::{Cache, Key};
use ztunnel::proxy::dns::message;
use ztunnel::proxy::local::LocalPod;

use crate::cursor::Cursor;

/// Longest answer over UDP, and without EDNS.
const LARGEST: usize = 4096;
const PLAIN: usize = 512;

/// Reads the input as a byte for the transport, a query with a length of two bytes, and what a resolver answers to it.
pub fn run(input: &[u8]) {
    let mut cursor = Cursor::new(input);
    let (transport, query) = (cursor.pick(&[Transport::Udp, Transport::Tcp]), cursor.bytes());
    let answer = cursor.rest();
    decided(transport, query);
    forwarded(query, answer);
}

fn decided(transport: Transport, query: &[u8]) {
    static IDENTITY: LazyLock<SpiffeId> = LazyLock::new(|| SpiffeId::new("cluster.local", "shop", "client").unwrap());
    let pod = LocalPod {
        name: "client",
        namespace: "shop",
        identity: &IDENTITY,
        addresses: &[IpAddr::from([10, 0, 0, 1])],
        network: "",
        node: "node-1",
        cluster_id: "Kubernetes",
    };
    static MESH: LazyLock<Snapshot> = LazyLock::new(mesh);
    let random = &mut fastrand::Rng::with_seed(1);
    match decide(Some(&MESH), &pod, "cluster.local", query, transport, random) {
        Decision::Drop => assert!(!message::is_query(query)),
        Decision::Forward => assert!(message::is_query(query)),
        Decision::Answer(answer, _) => {
            assert!(message::answers(query, &answer));
            let question = message::question(query).unwrap();
            assert_eq!(answer[question.clone()], query[question], "the very question, with its letters");
            assert!(transport == Transport::Tcp || answer.len() <= LARGEST);
            // No additional record, so no EDNS.
            assert!(transport == Transport::Tcp || query[10..12] != [0, 0] || answer.len() <= PLAIN);
        }
    }
}

/// Services of every kind: with addresses, headless with a few endpoints and with many, of the outside.
fn mesh() -> Snapshot {
    let names = extension::PortNames { ports: vec![extension::PortName { service_port: 80, name: "http".into() }] };
    let names = prost_types::Any { type_url: PAYLOAD_TYPE.into(), value: names.encode_to_vec() };
    let service = |hostname: &str, address: Option<[u8; 4]>| wire::Service {
        name: hostname.split('.').next().unwrap_or_default().into(),
        namespace: "shop".into(),
        hostname: hostname.into(),
        addresses: address
            .map(|ip| wire::NetworkAddress { address: ip.to_vec().into(), ..Default::default() })
            .into_iter()
            .collect(),
        ports: vec![wire::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        extensions: vec![wire::Extension { name: EXTENSION.into(), config: Some(names.clone()) }],
        ..Default::default()
    };
    let pod = |number: u8| wire::Workload {
        uid: format!("Kubernetes//Pod/shop/web-{number}"),
        name: format!("web-{number}"),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 1, number].into()],
        services: [("shop/web.shop.svc.cluster.local".to_owned(), wire::PortList::default())].into(),
        ..Default::default()
    };
    let mut snapshot = Snapshot::new();
    let services = [
        service("a.shop.svc.cluster.local", Some([10, 96, 0, 1])),
        service("web.shop.svc.cluster.local", None),
        service("b.example.com", Some([240, 0, 0, 1])),
        service("*.c.example.com", Some([240, 0, 0, 2])),
    ];
    services.iter().for_each(|service| snapshot.upsert_service(service.try_into().unwrap()));
    (0..=200).for_each(|number| snapshot.upsert_workload((&pod(number)).try_into().unwrap()));
    snapshot
}

fn forwarded(query: &[u8], answer: &[u8]) {
    for bytes in [query, answer] {
        if let Some(failure) = message::failure(bytes) {
            assert!(!message::is_query(&failure));
        }
        if let Some(cut) = message::truncate(bytes) {
            assert!(message::is_truncated(&cut));
        }
        let _ = message::skip_name(bytes, message::HEADER);
    }
    let Some(key) = Key::of([10, 96, 0, 10].into(), query) else { return };
    if !message::answers(query, answer) {
        return;
    }
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.put(key.clone(), answer, now);
    for later in [0, 1, 29, 299] {
        if let Some(kept) = cache.get(&key, query, now + Duration::from_secs(later)) {
            assert!(message::answers(query, &kept) && kept.len() == answer.len());
        }
    }
    assert_eq!(cache.get(&key, query, now + Duration::from_secs(301)), None, "nothing is kept for longer");
}
