//! A client that does not read, while everything changes many times. Alone in its program: it looks at the memory of all
//! of it.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_xds::server::{self, Catalog, Client, Service};
use mesh_xds::{Resource, WORKLOAD_TYPE};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::Streaming;

const BOUND: Duration = Duration::from_secs(60);
const NAMES: usize = 1_000;
const BODY: usize = 4 << 10;
const CHANGES: usize = 100_000;
/// Kept for each change it would be 400 MiB.
const MAX_GROWTH: usize = 64 << 20;

struct Peer {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Peer {
    /// With the client library's windows, which are smaller than the state.
    async fn open(address: SocketAddr) -> Self {
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(channel.connect().await.unwrap());
        client = client.max_decoding_message_size(usize::MAX);
        let (requests, outgoing) = mpsc::channel(4);
        requests.send(request("")).await.unwrap();
        let responses = client.delta_aggregated_resources(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
        Self { requests, responses }
    }

    /// The next response, acknowledged.
    async fn next(&mut self) -> DeltaDiscoveryResponse {
        let next = tokio::time::timeout(BOUND, self.responses.message()).await.expect("a response");
        let response = next.unwrap().expect("the stream goes on");
        self.requests.send(request(&response.nonce)).await.unwrap();
        response
    }
}

fn request(nonce: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: WORKLOAD_TYPE.into(),
        response_nonce: nonce.into(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn thing(number: usize, version: usize) -> Resource {
    let mut body = vec![0; BODY];
    body[..8].copy_from_slice(&(version as u64).to_be_bytes());
    Resource {
        name: format!("thing-{number}").into(),
        aliases: Vec::new(),
        version: version.to_string().into(),
        body: Bytes::from(body),
    }
}

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_costs_little_and_is_told_each_name_once() {
    let catalog = Arc::new(Catalog::new());
    let none: [&str; 0] = [];
    catalog.update(WORKLOAD_TYPE, (0..NAMES).map(|number| thing(number, 0)), none);
    let anybody = |_: &tonic::metadata::MetadataMap, _| async { Ok(Client { name: "anybody".into() }) };
    // It is not ended meanwhile, however slow the machine is.
    let options = server::Options { patience: Duration::from_secs(3600), ..server::Options::default() };
    let service = Service::new(Arc::clone(&catalog), anybody, options);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = server::transport().add_service(service.clone());
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));

    let mut deaf = Peer::open(address).await;
    let mut other = Peer::open(address).await;
    assert_eq!(other.next().await.resources.len(), NAMES);
    let before = resident();
    for change in 1..=CHANGES {
        let number = change % NAMES;
        catalog.update(WORKLOAD_TYPE, [thing(number, change)], none);
        if change % 100 == 0 {
            tokio::task::yield_now().await;
        }
    }
    // The other one gets everything.
    let last = CHANGES.to_string();
    while !other.next().await.resources.iter().any(|resource| resource.version == last) {}
    let grown = resident().saturating_sub(before);
    assert!(grown < MAX_GROWTH, "{} MiB more", grown >> 20);
    let version = catalog.snapshot().version(WORKLOAD_TYPE);
    let behind = |client: &server::ClientStatus| client.types.iter().any(|of| of.in_flight && of.considered < version);
    assert_eq!(service.clients().iter().filter(|client| behind(client)).count(), 1, "{:?}", service.clients());

    // It reads now: the first state as it was, and then each name once.
    assert_eq!(deaf.next().await.resources.len(), NAMES);
    let mut told = HashSet::new();
    while told.len() < NAMES {
        for resource in deaf.next().await.resources {
            let current = catalog.snapshot().lookup(WORKLOAD_TYPE, &resource.name)[0].version.clone();
            assert_eq!(resource.version, *current);
            assert!(told.insert(resource.name), "told once");
        }
    }
}
