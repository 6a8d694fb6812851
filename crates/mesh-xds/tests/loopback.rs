//! The driver and the service over real gRPC on the loopback interface.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mesh_proto::core::Node;
use mesh_proto::discovery::DeltaDiscoveryRequest;
use mesh_xds::client::{self, Answer, Connection, Driver, Handle, Mode};
use mesh_xds::server::{self, Catalog, Client, Service};
use mesh_xds::{AUTHORIZATION_TYPE, Rejection, Resource, Update, WORKLOAD_TYPE};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Status;

const BOUND: Duration = Duration::from_secs(20);
const NOTHING: [&str; 0] = [];
const TOKEN: &str = "secret";
const OTHER_TOKEN: &str = "other";

type Store = BTreeMap<String, Resource>;

struct Control {
    address: SocketAddr,
    service: Service,
    server: JoinHandle<()>,
}

async fn control(catalog: Arc<Catalog>, address: &str, options: server::Options) -> Control {
    let authenticate = |metadata: &tonic::metadata::MetadataMap, _peer: Option<SocketAddr>| {
        let is = |key: &str, value: &str| metadata.get(key).is_some_and(|found| found == value);
        let names = [("Bearer secret", "ns/sa"), ("Bearer other", "ns/other")];
        let name = names.into_iter().find(|(token, _)| is("authorization", token) && is("clusterid", "Kubernetes"));
        async move {
            // An answer that takes a turn of the runtime.
            tokio::task::yield_now().await;
            name.map(|(_, name)| Client { name: name.into() }).ok_or_else(|| Status::unauthenticated("no"))
        }
    };
    let service = Service::new(catalog, authenticate, options);
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = server::transport().add_service(service.clone());
    let incoming = TcpListenerStream::new(listener);
    let server = tokio::spawn(async move {
        router.serve_with_incoming(incoming).await.unwrap();
    });
    Control { address, service, server }
}

struct Node1 {
    handle: Handle,
    store: watch::Receiver<Store>,
    applied: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

fn node(address: SocketAddr, mode: Mode, token: &'static str) -> Node1 {
    let options = client::Options {
        min_backoff: Duration::from_millis(5),
        max_backoff: Duration::from_millis(50),
        ..client::Options::default()
    };
    let types = [(AUTHORIZATION_TYPE.into(), Mode::Wildcard), (WORKLOAD_TYPE.into(), mode)];
    let (driver, handle) = Driver::new(Node { id: "ztunnel~node1".into(), ..Node::default() }, types, options);
    let (seen, store) = watch::channel(Store::new());
    let applied = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&applied);
    let sink = move |update: Update| {
        let mut rejections = Vec::new();
        count.fetch_add(update.set.len(), Ordering::SeqCst);
        seen.send_modify(|store| {
            for name in &update.removed {
                store.remove(name);
            }
            for resource in update.set {
                if resource.body == "bad" {
                    rejections.push(Rejection { name: resource.name.to_string(), reason: "it is bad".into() });
                } else {
                    store.insert(resource.name.to_string(), resource);
                }
            }
        });
        rejections
    };
    let connect = move || async move {
        let endpoint = client::endpoint(&format!("http://{address}"))?;
        let channel = endpoint.connect().await.map_err(client::ConnectError::new)?;
        Ok(Connection { channel, metadata: client::metadata(token, "Kubernetes")? })
    };
    let task = tokio::spawn(driver.run(connect, sink));
    Node1 { handle, store, applied, task }
}

fn thing(name: &str, aliases: &[&str], body: &str) -> Resource {
    Resource {
        name: name.into(),
        aliases: aliases.iter().map(|alias| Arc::from(*alias)).collect(),
        version: format!("{body}{aliases:?}").into(),
        body: Bytes::copy_from_slice(body.as_bytes()),
    }
}

fn set(catalog: &Catalog, things: &[Resource]) {
    catalog.update(WORKLOAD_TYPE, things.to_vec(), NOTHING);
}

async fn until<T>(what: &str, receiver: &mut watch::Receiver<T>, condition: impl FnMut(&T) -> bool) {
    tokio::time::timeout(BOUND, receiver.wait_for(condition)).await.expect(what).unwrap();
}

/// Waits for something that nothing announces.
async fn poll(what: &str, mut condition: impl FnMut() -> bool) {
    tokio::time::timeout(BOUND, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .expect(what);
}

#[tokio::test]
async fn sync_update_removal_and_refusal() {
    let catalog = Arc::new(Catalog::new());
    set(&catalog, &[thing("a", &[], "1"), thing("b", &[], "bad")]);
    catalog.update(AUTHORIZATION_TYPE, [thing("policy", &[], "1")], NOTHING);
    let control = control(Arc::clone(&catalog), "127.0.0.1:0", server::Options::default()).await;
    let mut node = node(control.address, Mode::Wildcard, TOKEN);
    assert!(tokio::time::timeout(BOUND, node.handle.synced()).await.unwrap());
    assert_eq!(node.store.borrow().keys().collect::<Vec<_>>(), ["a", "policy"]);

    // The refusal is visible on both sides.
    let rejected = |status: &client::Status| status.types[WORKLOAD_TYPE].rejected.contains_key("b");
    until("the client's own refusal", &mut node.handle.status(), rejected).await;
    poll("the refusal at the server", || {
        let clients = control.service.clients();
        let types = clients.first().map(|client| client.types.clone()).unwrap_or_default();
        types.iter().flat_map(|status| &status.nacks).any(|nack| nack.resource == "b" && nack.reason == "it is bad")
    })
    .await;
    let client = control.service.clients().remove(0);
    assert_eq!((&*client.client, &*client.node_id), ("ns/sa", "ztunnel~node1"));
    assert_eq!((client.nacks, control.service.nacks()), (1, 1));

    set(&catalog, &[thing("a", &[], "2"), thing("b", &[], "2")]);
    until("the update", &mut node.store, |store| store.len() == 3 && store["a"].body == "2").await;
    catalog.update(WORKLOAD_TYPE, [] as [Resource; 0], ["a"]);
    until("the removal", &mut node.store, |store| !store.contains_key("a")).await;
    until("no refusal", &mut node.handle.status(), |status| status.types[WORKLOAD_TYPE].rejected.is_empty()).await;
    poll("the ACKs", || {
        control.service.clients()[0].types.iter().all(|status| !status.in_flight && status.nacks.is_empty())
    })
    .await;
    node.task.abort();
    poll("the client to be gone", || control.service.clients().is_empty()).await;
}

#[tokio::test]
async fn a_client_that_comes_back_gets_only_the_difference() {
    let catalog = Arc::new(Catalog::new());
    let many: Vec<Resource> = (0..500).map(|n| thing(&format!("w{n}"), &[], "1")).collect();
    set(&catalog, &many);
    let mut options = server::Options::default();
    options.limits.max_response = 4096;
    options.limits.max_first_response = 4096;
    let first = control(Arc::clone(&catalog), "127.0.0.1:0", options.clone()).await;
    let mut node = node(first.address, Mode::Wildcard, TOKEN);
    assert!(tokio::time::timeout(BOUND, node.handle.synced()).await.unwrap());
    assert_eq!(node.store.borrow().len(), 500, "the first answer is complete, though it comes in parts");
    assert!(node.handle.status().borrow().types[WORKLOAD_TYPE].responses > 3);
    assert_eq!(node.applied.load(Ordering::SeqCst), 500);

    let mut status = node.handle.status();
    first.server.abort();
    first.service.close();
    until("the end of the stream", &mut status, |status| status.connected_since.is_none()).await;
    let lost = status.borrow().disconnected_since;
    assert!(lost.is_some() && status.borrow().last_error.is_some() && status.borrow().synced);
    // As long as it is tried in vain.
    until("a second attempt", &mut status, |status| status.terminations.values().sum::<u64>() >= 2).await;
    assert_eq!(status.borrow().disconnected_since, lost);
    catalog.update(WORKLOAD_TYPE, [thing("w7", &[], "2"), thing("new", &[], "1")], ["w8"]);
    let address = first.address.to_string();
    let _second = control(Arc::clone(&catalog), &address, options).await;
    until("the difference", &mut node.store, |store| {
        store.contains_key("new") && !store.contains_key("w8") && store["w7"].body == "2"
    })
    .await;
    assert_eq!(node.applied.load(Ordering::SeqCst), 502);
    assert_eq!(status.borrow().disconnected_since, None);
    assert!(status.borrow().terminations.values().sum::<u64>() >= 1);
}

#[tokio::test]
async fn names_are_resolved_on_demand() {
    let catalog = Arc::new(Catalog::new());
    set(&catalog, &[thing("uid", &["net/10.0.0.1"], "1"), thing("other", &[], "1")]);
    let control = control(Arc::clone(&catalog), "127.0.0.1:0", server::Options::default()).await;
    let mut node = node(control.address, Mode::OnDemand, TOKEN);
    // Asked before there is a connection.
    let demand = node.handle.demand().clone();
    let ask = async |name: &'static str| {
        tokio::time::timeout(BOUND, demand.resolve(WORKLOAD_TYPE, name)).await.unwrap().unwrap()
    };
    assert_eq!(ask("net/10.0.0.1").await, Answer::Present);
    assert_eq!(node.store.borrow().keys().collect::<Vec<_>>(), ["uid"], "the sink has it when the caller goes on");
    assert_eq!(ask("net/10.0.0.2").await, Answer::Absent);
    assert_eq!(ask("net/10.0.0.2").await, Answer::Absent, "remembered");
    set(&catalog, &[thing("late", &["net/10.0.0.2"], "1")]);
    until("what has come to be", &mut node.store, |store| store.contains_key("late")).await;
    assert_eq!(ask("net/10.0.0.2").await, Answer::Present);
    assert!(tokio::time::timeout(BOUND, node.handle.synced()).await.unwrap());
    assert!(demand.resolve("other type", "x").await.is_err());

    // And again after the stream was lost.
    control.service.close();
    let mut status = node.handle.status();
    until("the end of the stream", &mut status, |status| status.terminations.values().sum::<u64>() > 0).await;
    let pending = tokio::spawn(async move { demand.resolve(WORKLOAD_TYPE, "other").await });
    control.server.abort();
    let _ = control.server.await;
    let again = self::control(Arc::clone(&catalog), &control.address.to_string(), server::Options::default()).await;
    assert_eq!(tokio::time::timeout(BOUND, pending).await.unwrap().unwrap(), Ok(Answer::Present));
    poll("its subscriptions", || {
        again.service.clients().iter().any(|client| client.types.iter().any(|status| status.names == 3))
    })
    .await;
}

#[tokio::test]
async fn strangers_and_crowds_are_refused() {
    let catalog = Arc::new(Catalog::new());
    let options = server::Options { max_clients: 1, ..server::Options::default() };
    let control = control(catalog, "127.0.0.1:0", options).await;
    let stranger = node(control.address, Mode::Wildcard, "wrong");
    let refused = |status: &client::Status| status.last_error.as_ref().is_some_and(|error| error.contains("Unauth"));
    until("the refusal", &mut stranger.handle.status(), refused).await;
    stranger.task.abort();

    let friend = node(control.address, Mode::Wildcard, TOKEN);
    assert!(tokio::time::timeout(BOUND, friend.handle.synced()).await.unwrap());
    let one_too_many = node(control.address, Mode::Wildcard, TOKEN);
    let full = |status: &client::Status| status.last_error.as_ref().is_some_and(|error| error.contains("too many"));
    until("the refusal", &mut one_too_many.handle.status(), full).await;
    friend.task.abort();
    assert!(tokio::time::timeout(BOUND, one_too_many.handle.synced()).await.unwrap(), "there is room now");
}

#[tokio::test]
async fn silence_and_age_end_a_stream() {
    use mesh_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;

    let catalog = Arc::new(Catalog::new());
    set(&catalog, &[thing("a", &[], "1")]);
    let options = server::Options { patience: Duration::from_millis(100), ..server::Options::default() };
    let patient = control(Arc::clone(&catalog), "127.0.0.1:0", options).await;
    let open = async |address: SocketAddr, requests: Vec<DeltaDiscoveryRequest>| {
        let channel = client::endpoint(&format!("http://{address}")).unwrap().connect().await.unwrap();
        let stream = futures_util::StreamExt::chain(tokio_stream::iter(requests), tokio_stream::pending());
        let mut request = tonic::Request::new(stream);
        *request.metadata_mut() = client::metadata(TOKEN, "Kubernetes").unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        client.delta_aggregated_resources(request).await.unwrap().into_inner()
    };
    let mut silent = open(patient.address, Vec::new()).await;
    let end = tokio::time::timeout(BOUND, silent.message()).await.unwrap().unwrap_err();
    assert_eq!(end.code(), tonic::Code::DeadlineExceeded);

    let request = DeltaDiscoveryRequest { type_url: WORKLOAD_TYPE.into(), ..DeltaDiscoveryRequest::default() };
    let mut deaf = open(patient.address, vec![request]).await;
    assert!(tokio::time::timeout(BOUND, deaf.message()).await.unwrap().unwrap().is_some());
    let end = tokio::time::timeout(BOUND, deaf.message()).await.unwrap().unwrap_err();
    assert_eq!(end.code(), tonic::Code::DeadlineExceeded, "no ACK");

    let options = server::Options { max_age: Duration::from_millis(50), ..server::Options::default() };
    let impatient = control(catalog, "127.0.0.1:0", options).await;
    let node = node(impatient.address, Mode::Wildcard, TOKEN);
    let again = |status: &client::Status| status.terminations.get("Reconnect").is_some_and(|count| *count > 1);
    until("streams that age", &mut node.handle.status(), again).await;
    assert_eq!(node.applied.load(Ordering::SeqCst), 1, "nothing is sent twice");
}

#[tokio::test]
async fn a_client_that_says_no_more_still_gets_what_it_asked_for() {
    use mesh_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;

    let catalog = Arc::new(Catalog::new());
    let large = Resource { body: Bytes::from(vec![7; 8 << 20]), ..thing("large", &[], "1") };
    set(&catalog, &[large]);
    let control = control(catalog, "127.0.0.1:0", server::Options::default()).await;
    let first = DeltaDiscoveryRequest { type_url: WORKLOAD_TYPE.into(), ..DeltaDiscoveryRequest::default() };
    let mut request = tonic::Request::new(tokio_stream::iter([first]));
    *request.metadata_mut() = client::metadata(TOKEN, "Kubernetes").unwrap();
    let channel = client::endpoint(&format!("http://{}", control.address)).unwrap().connect().await.unwrap();
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(16 << 20);
    let mut responses = client.delta_aggregated_resources(request).await.unwrap().into_inner();
    let response = tokio::time::timeout(BOUND, responses.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(response.resources.len(), 1);
    let end = tokio::time::timeout(BOUND, responses.message()).await.unwrap();
    assert!(end.is_ok_and(|end| end.is_none()));
    poll("the client to be gone", || control.service.clients().is_empty()).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_ended_and_nothing_is_kept_for_it() {
    let catalog = Arc::new(Catalog::new());
    let large = Resource { body: Bytes::from(vec![7; 1 << 20]), ..thing("large", &[], "1") };
    set(&catalog, &[large]);
    let options = server::Options { patience: Duration::from_secs(2), ..server::Options::default() };
    let control = control(catalog, "127.0.0.1:0", options).await;
    let mut deaf = slow_reader(control.address).await;
    poll("the response to be on its way", || {
        control.service.clients().iter().any(|client| client.types[..].len() == 1)
    })
    .await;
    poll("the client to be ended", || control.service.clients().is_empty()).await;
    // What the connection had taken comes, and then it is cut off: nobody takes that for the whole.
    let (mut got, mut is_cut) = (0, false);
    while let Some(piece) = tokio::time::timeout(BOUND, deaf.data()).await.unwrap() {
        let Ok(piece) = piece else {
            is_cut = true;
            break;
        };
        let _ = deaf.flow_control().release_capacity(piece.len());
        got += piece.len();
    }
    assert!(is_cut && got < 1 << 19, "cut: {is_cut}, {got} bytes");
}

#[tokio::test]
async fn a_client_that_is_slower_than_patience_but_reads_is_waited_for() {
    let catalog = Arc::new(Catalog::new());
    let large = Resource { body: Bytes::from(vec![7; 2 << 20]), ..thing("large", &[], "1") };
    set(&catalog, &[large]);
    let options = server::Options { patience: Duration::from_secs(5), ..server::Options::default() };
    let control = control(Arc::clone(&catalog), "127.0.0.1:0", options).await;
    let mut slow = slow_reader(control.address).await;
    let mut got = 0;
    // All of it takes twice the patience, each step a twentieth of it.
    while got < 2 << 20 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        for _ in 0..3 {
            let piece = tokio::time::timeout(BOUND, slow.data()).await.unwrap().expect("the stream goes on").unwrap();
            slow.flow_control().release_capacity(piece.len()).unwrap();
            got += piece.len();
        }
    }
    assert_eq!(control.service.clients().len(), 1);
}

#[tokio::test]
async fn large_requests_are_read_one_after_another_and_nobody_holds_a_turn_for_long() {
    /// What is blocked is so however long one waits.
    const MOMENT: Duration = Duration::from_millis(300);

    let catalog = Arc::new(Catalog::new());
    let many: Vec<Resource> = (0..5_000).map(|n| thing(&format!("w{n}"), &[], "1")).collect();
    set(&catalog, &many);
    let large = versions(&many);
    assert!(large.len() > 64 << 10, "more than a window");
    let (begin, rest) = large.split_at(30_000);
    let small = framed(&DeltaDiscoveryRequest { type_url: WORKLOAD_TYPE.into(), ..DeltaDiscoveryRequest::default() });
    let long = Duration::from_secs(3600);
    let options = server::Options { max_reading: 1, patience: long, reading: long, ..server::Options::default() };
    let patient = control(Arc::clone(&catalog), "127.0.0.1:0", options.clone()).await;
    // One that says nothing has no turn; one that stalls has it; another's waits, and small ones need none.
    let (_silent, _) = raw(patient.address, TOKEN, &[]).await;
    let (mut first, mut sender) = raw(patient.address, TOKEN, begin).await;
    poll("those two", || patient.service.clients().len() == 2).await;
    let (mut second, _second) = raw(patient.address, OTHER_TOKEN, &large).await;
    let (mut other, _other) = raw(patient.address, OTHER_TOKEN, &small).await;
    assert!(answered(&mut other).await);
    assert!(tokio::time::timeout(MOMENT, second.data()).await.is_err(), "it is not its turn");
    sender.send_data(Bytes::copy_from_slice(rest), false).unwrap();
    assert!(answered(&mut first).await && answered(&mut second).await);

    let options = server::Options { reading: Duration::from_secs(5), ..options };
    let strict = control(Arc::clone(&catalog), "127.0.0.1:0", options.clone()).await;
    let (mut stalling, _stalling) = raw(strict.address, TOKEN, begin).await;
    poll("the stalling one", || strict.service.clients().len() == 1).await;
    // Of the same client: one turn is its own.
    let (mut next, _next) = raw(strict.address, TOKEN, &large).await;
    let (mut last, _last) = raw(strict.address, OTHER_TOKEN, &large).await;
    assert_eq!(end(&mut stalling).await, tonic::Code::DeadlineExceeded);
    assert!(answered(&mut next).await && answered(&mut last).await);

    let options = server::Options { patience: Duration::from_millis(500), reading: long, ..options };
    let busy = control(catalog, "127.0.0.1:0", options).await;
    let (_stalling, _held) = raw(busy.address, TOKEN, begin).await;
    poll("the stalling one", || busy.service.clients().len() == 1).await;
    let (mut late, _late) = raw(busy.address, OTHER_TOKEN, &large).await;
    assert_eq!(end(&mut late).await, tonic::Code::Unavailable, "it may try another replica");
}

/// Else those that stand last in a long queue give up, and stand behind all others again.
#[test]
fn a_client_waits_longer_than_a_server_lets_it_wait() {
    let (client, server) = (client::Options::default(), server::Options::default());
    // A turn to read its versions, the reading, and a turn for its first state.
    let longest = server.patience + server.reading + server.patience;
    assert!(client.first_response > longest, "{:?}, and a server may take {longest:?}", client.first_response);
}

#[tokio::test]
async fn what_comes_while_a_first_sync_waits_is_read_all_the_same() {
    let catalog = Arc::new(Catalog::new());
    let many: Vec<Resource> = (0..5_000).map(|n| thing(&format!("w{n}"), &[], "1")).collect();
    set(&catalog, &many);
    catalog.update(AUTHORIZATION_TYPE, [thing("policy", &[], "1")], NOTHING);
    let small =
        framed(&DeltaDiscoveryRequest { type_url: AUTHORIZATION_TYPE.into(), ..DeltaDiscoveryRequest::default() });
    let both = [&small[..], &versions(&many)].concat();
    // Nobody has a place to sync for a while, and a large request less time than that.
    let (patience, reading) = (Duration::from_secs(8), Duration::from_secs(3));
    let options = server::Options { max_syncing: 0, patience, reading, ..server::Options::default() };
    let control = control(catalog, "127.0.0.1:0", options).await;
    let (mut client, _sender) = raw(control.address, TOKEN, &both).await;
    assert!(answered(&mut client).await);
}

#[tokio::test]
async fn one_client_does_not_take_the_places_of_all() {
    let catalog = Arc::new(Catalog::new());
    let options = server::Options { max_streams: 2, ..server::Options::default() };
    let control = control(catalog, "127.0.0.1:0", options).await;
    let [first, second] = [(); 2].map(|()| node(control.address, Mode::Wildcard, TOKEN));
    for node in [&first, &second] {
        assert!(tokio::time::timeout(BOUND, node.handle.synced()).await.unwrap());
    }
    let third = node(control.address, Mode::Wildcard, TOKEN);
    let full =
        |status: &client::Status| status.last_error.as_ref().is_some_and(|error| error.contains("of this client"));
    until("the refusal", &mut third.handle.status(), full).await;
    let other = node(control.address, Mode::Wildcard, OTHER_TOKEN);
    assert!(tokio::time::timeout(BOUND, other.handle.synced()).await.unwrap(), "others have their own");
    first.task.abort();
    assert!(tokio::time::timeout(BOUND, third.handle.synced()).await.unwrap(), "there is room now");
}

/// A first request of a client that has all of `things`.
fn versions(things: &[Resource]) -> Vec<u8> {
    let versions = things.iter().map(|thing| (thing.name.to_string(), thing.version.to_string())).collect();
    framed(&DeltaDiscoveryRequest {
        type_url: WORKLOAD_TYPE.into(),
        initial_resource_versions: versions,
        ..DeltaDiscoveryRequest::default()
    })
}

/// A message with its prefix.
fn framed(request: &DeltaDiscoveryRequest) -> Vec<u8> {
    use prost::Message as _;

    let mut framed = vec![0];
    framed.extend(u32::try_from(request.encoded_len()).unwrap().to_be_bytes());
    framed.extend(request.encode_to_vec());
    framed
}

/// Whether a response comes.
async fn answered(body: &mut h2::RecvStream) -> bool {
    tokio::time::timeout(BOUND, body.data()).await.expect("an answer").is_some_and(|data| data.is_ok())
}

/// How it ends.
async fn end(body: &mut h2::RecvStream) -> tonic::Code {
    let trailers = tokio::time::timeout(BOUND, body.trailers()).await.expect("its end").unwrap().unwrap();
    tonic::Code::from_bytes(trailers["grpc-status"].as_bytes())
}

/// The body of an answer to a request for everything, read as the caller likes, with the windows of HTTP/2's defaults.
async fn slow_reader(address: SocketAddr) -> h2::RecvStream {
    let everything = DeltaDiscoveryRequest { type_url: WORKLOAD_TYPE.into(), ..DeltaDiscoveryRequest::default() };
    let (body, requests) = raw(address, TOKEN, &framed(&everything)).await;
    // It stays open as long as the body is read.
    tokio::spawn(async move {
        std::future::pending::<()>().await;
        drop(requests);
    });
    body
}

/// The body of an answer to whoever says `bytes`, and where it may say more.
async fn raw(address: SocketAddr, token: &str, bytes: &[u8]) -> (h2::RecvStream, h2::SendStream<Bytes>) {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let path = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
    let request = http::Request::post(format!("http://{address}{path}"))
        .header("content-type", "application/grpc")
        .header("authorization", format!("Bearer {token}"))
        .header("clusterid", "Kubernetes")
        .body(())
        .unwrap();
    let (response, mut requests) = sender.ready().await.unwrap().send_request(request, false).unwrap();
    requests.send_data(Bytes::copy_from_slice(bytes), false).unwrap();
    (response.await.unwrap().into_body(), requests)
}
