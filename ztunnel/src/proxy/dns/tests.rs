//! Queries over real sockets of the loopback interface: the application, the proxy, and a resolver.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use super::message;
use super::udp;
use crate::proxy::pods::{Pod, Port};
use crate::proxy::testing::{DNS_TEST_PORT, DNS_TEST_UPSTREAM_PORT, LocalSockets, Mesh, Proxy, soon, until};
use crate::proxy::worker::Accepted;

/// The pod, the resolver and the service's address, by their last byte.
const CLIENT: u8 = 1;
const RESOLVER: u8 = 53;
const VIP: u8 = 9;

struct Bench {
    mesh: Mesh,
    proxy: Proxy,
    pod: Arc<Pod>,
    application: UdpSocket,
    resolver: UdpSocket,
}

impl Bench {
    async fn new() -> Self {
        let bench = Self::ignorant().await;
        let service = bench.mesh.service("api", VIP, &[(80, 80)]);
        bench.proxy.learn(&[bench.mesh.workload("client", CLIENT)], &[service]);
        bench
    }

    /// One whose proxy knows nothing yet.
    async fn ignorant() -> Self {
        let mesh = Mesh::new();
        let proxy = mesh.proxy();
        // Queries are sent to the resolver's address; here the proxy listens there, and the resolver beside it.
        let listener = std::net::UdpSocket::bind(mesh.addr(RESOLVER, DNS_TEST_PORT)).unwrap();
        let reply = Some(OwnedFd::from(listener.try_clone().unwrap()));
        let listener = OwnedFd::from(listener);
        udp::prepare(&listener).unwrap();
        let sockets = LocalSockets { reply, ..LocalSockets::default() };
        let pod = proxy.pod_with("client", mesh.ip(CLIENT), sockets, 100);
        let serving = udp::serve(Arc::clone(&proxy.worker), Arc::clone(&pod), listener, proxy.drain.clone());
        tokio::spawn(serving);
        let application = UdpSocket::bind(mesh.addr(CLIENT, 0)).await.unwrap();
        application.connect(mesh.addr(RESOLVER, DNS_TEST_PORT)).await.unwrap();
        let resolver = UdpSocket::bind(mesh.addr(RESOLVER, DNS_TEST_UPSTREAM_PORT)).await.unwrap();
        Self { mesh, proxy, pod, application, resolver }
    }

    async fn ask(&self, query: &Message) {
        self.application.send(&query.to_vec().unwrap()).await.unwrap();
    }

    async fn told(&self) -> Message {
        let mut buffer = [0; 4096];
        let length = soon(self.application.recv(&mut buffer)).await.unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    }

    /// The next query that the resolver gets, and from where.
    async fn forwarded(&self) -> (Message, SocketAddr) {
        let mut buffer = [0; 4096];
        let (length, from) = soon(self.resolver.recv_from(&mut buffer)).await.unwrap();
        (Message::from_vec(&buffer[..length]).unwrap(), from)
    }

    fn count(&self, outcome: &str) -> u64 {
        self.proxy.metric("culvert_dns_requests_total", &[&format!("outcome=\"{outcome}\"")])
    }
}

fn query(id: u16, name: &str) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message
}

fn answer(query: &Message, ttl: u32) -> Vec<u8> {
    let mut answer = query.clone().into_response();
    let name = query.queries[0].name.clone();
    answer.answers.push(Record::from_rdata(name, ttl, RData::A(A([192, 0, 2, 7].into()))));
    answer.to_vec().unwrap()
}

fn addresses(answer: &Message) -> Vec<String> {
    answer.answers.iter().map(|record| record.data.to_string()).collect()
}

#[tokio::test]
async fn a_name_of_the_mesh_is_answered_from_the_address_that_was_asked() {
    let bench = Bench::new().await;
    for (id, name) in [(1, "api."), (2, "API.shop."), (3, "api.shop.svc.cluster.local.")] {
        bench.ask(&query(id, name)).await;
        // The application's socket is connected: an answer from elsewhere would not be heard.
        let told = bench.told().await;
        assert_eq!((told.metadata.id, addresses(&told)), (id, vec![bench.mesh.ip(VIP).to_string()]), "{name}");
    }
    until(|| bench.count("answered") == 3).await;
    assert_eq!(bench.proxy.metric("istio_dns_requests_total", &[]), 3);
    assert_eq!(bench.proxy.metric("istio_dns_upstream_requests_total", &[]), 0);
}

#[tokio::test]
async fn everything_else_is_asked_of_the_resolver_under_another_id_and_port() {
    let bench = Bench::new().await;
    let asked = query(77, "wWw.example.com.");
    bench.ask(&asked).await;
    let (forwarded, from) = bench.forwarded().await;
    assert!(forwarded.queries[0].name.eq_case(&asked.queries[0].name), "letters are kept");
    assert_ne!(from.port(), bench.application.local_addr().unwrap().port());
    // What does not match is no answer.
    let mut forged = query(forwarded.metadata.id, "other.example.com.");
    forged.metadata.message_type = MessageType::Response;
    bench.resolver.send_to(&answer(&forged, 60), from).await.unwrap();
    let mut other_id = forwarded.clone();
    other_id.metadata.id ^= 1;
    bench.resolver.send_to(&answer(&other_id, 60), from).await.unwrap();
    let stranger = UdpSocket::bind(bench.mesh.addr(99, 0)).await.unwrap();
    stranger.send_to(&answer(&forwarded, 60), from).await.unwrap();
    bench.resolver.send_to(&answer(&forwarded, 60), from).await.unwrap();
    let told = bench.told().await;
    assert_eq!((told.metadata.id, addresses(&told)), (77, vec![String::from("192.0.2.7")]));
    until(|| bench.count("forwarded") == 1).await;
    assert_eq!(bench.proxy.metric("istio_dns_upstream_requests_total", &[]), 1);

    // Kept for its time.
    bench.ask(&query(78, "www.EXAMPLE.com.")).await;
    let told = bench.told().await;
    assert_eq!((told.metadata.id, addresses(&told)), (78, vec![String::from("192.0.2.7")]));
    assert_eq!(told.queries[0].name.to_ascii(), "www.EXAMPLE.com.");
    until(|| bench.count("cached") == 1).await;
}

#[tokio::test]
async fn an_answer_of_the_resolver_passes_as_it_is() {
    let bench = Bench::new().await;
    bench.ask(&query(5, "gone.example.com.")).await;
    let (forwarded, from) = bench.forwarded().await;
    let mut denial = forwarded.clone().into_response();
    denial.metadata.response_code = ResponseCode::NXDomain;
    denial.metadata.truncation = true;
    denial.metadata.authentic_data = true;
    bench.resolver.send_to(&denial.to_vec().unwrap(), from).await.unwrap();
    let told = bench.told().await;
    denial.metadata.id = 5;
    assert_eq!(told, denial);
}

#[tokio::test]
async fn a_proxy_that_knows_nothing_forwards() {
    let bench = Bench::ignorant().await;
    bench.ask(&query(1, "api.shop.svc.cluster.local.")).await;
    let (forwarded, from) = bench.forwarded().await;
    bench.resolver.send_to(&answer(&forwarded, 0), from).await.unwrap();
    assert_eq!(addresses(&bench.told().await), ["192.0.2.7"]);
}

#[tokio::test]
async fn a_resolver_that_is_not_there_fails_at_once() {
    let mut bench = Bench::new().await;
    // Nobody listens there any more.
    bench.resolver = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    bench.ask(&query(3, "www.example.com.")).await;
    let told = bench.told().await;
    assert_eq!((told.metadata.id, told.metadata.response_code), (3, ResponseCode::ServFail));
    assert_eq!(bench.proxy.metric("istio_dns_upstream_failures_total", &[]), 1);
}

#[tokio::test]
async fn strangers_are_not_answered() {
    let bench = Bench::new().await;
    let stranger = UdpSocket::bind(bench.mesh.addr(77, 0)).await.unwrap();
    let bytes = query(1, "api.").to_vec().unwrap();
    stranger.send_to(&bytes, bench.mesh.addr(RESOLVER, DNS_TEST_PORT)).await.unwrap();
    until(|| bench.count("invalid") == 1).await;
    bench.application.send(&[0; 5000]).await.unwrap();
    bench.application.send(&[]).await.unwrap();
    until(|| bench.count("invalid") == 3).await;
    // And everybody else still is.
    bench.ask(&query(2, "api.")).await;
    assert_eq!(bench.told().await.metadata.id, 2);
    assert!(matches!(stranger.try_recv(&mut [0; 16]), Err(error) if error.kind() == ErrorKind::WouldBlock));
}

#[tokio::test]
async fn a_flood_is_cut_and_counted() {
    let bench = Bench::new().await;
    let bytes = query(1, "api.").to_vec().unwrap();
    while bench.count("rate_limited") == 0 {
        for _ in 0..200 {
            bench.application.send(&bytes).await.unwrap();
            while bench.application.try_recv(&mut [0; 512]).is_ok() {}
        }
        tokio::task::yield_now().await;
    }
    assert!(bench.count("answered") >= 1900, "{}", bench.count("answered"));
}

#[tokio::test]
async fn a_pod_that_goes_takes_its_queries_with_it() {
    let bench = Bench::new().await;
    bench.ask(&query(1, "www.example.com.")).await;
    bench.forwarded().await;
    soon(bench.pod.live.close()).await;
}

#[tokio::test]
async fn a_draining_proxy_leaves_queries_to_the_next_and_answers_what_it_took() {
    let bench = Bench::new().await;
    bench.ask(&query(1, "www.example.com.")).await;
    let (forwarded, from) = bench.forwarded().await;
    let drained = tokio::spawn(bench.mesh.trigger().drain(Duration::from_secs(5)));
    until(|| bench.proxy.drain.is_draining()).await;
    bench.resolver.send_to(&answer(&forwarded, 60), from).await.unwrap();
    assert_eq!(bench.told().await.metadata.id, 1);
    bench.ask(&query(2, "api.")).await;
    let mut left = [0; 512];
    tokio::time::timeout(Duration::from_millis(300), bench.application.recv(&mut left)).await.unwrap_err();
    drained.abort();
}

/// A connection to port 53 of `at`, as the proxy accepts it.
async fn connected(bench: &Bench, at: SocketAddr) -> (TcpStream, Accepted) {
    let listener = TcpListener::bind(at).await.unwrap();
    let at = listener.local_addr().unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(bench.mesh.addr(CLIENT, 0)).unwrap();
    let (client, accepted) = tokio::join!(socket.connect(at), listener.accept());
    let (stream, peer) = accepted.unwrap();
    (client.unwrap(), Accepted::new(bench.pod.open.enter(stream).unwrap(), peer).unwrap())
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes()[..], message].concat()
}

async fn read_framed(stream: &mut TcpStream) -> Message {
    let length = soon(stream.read_u16()).await.unwrap();
    let mut bytes = vec![0; usize::from(length)];
    soon(stream.read_exact(&mut bytes)).await.unwrap();
    Message::from_vec(&bytes).unwrap()
}

fn serve_tcp(bench: &Bench, accepted: Accepted) {
    let (worker, pod) = (Arc::clone(&bench.proxy.worker), Arc::clone(&bench.pod));
    tokio::spawn(async move { super::tcp::serve(&worker, &pod, accepted).await });
}

#[tokio::test]
async fn queries_of_a_stream_are_answered_in_any_pieces() {
    let bench = Bench::new().await;
    let (mut client, accepted) = connected(&bench, bench.mesh.addr(20, 0)).await;
    client.set_nodelay(true).unwrap();
    serve_tcp(&bench, accepted);
    let first = framed(&query(1, "api.").to_vec().unwrap());
    let (head, tail) = first.split_at(1);
    client.write_all(head).await.unwrap();
    tokio::task::yield_now().await;
    // Its rest, a whole one, and the beginning of a third.
    let third = framed(&query(3, "api.shop.").to_vec().unwrap());
    let more = [tail, &framed(&query(2, "api.").to_vec().unwrap()), &third[..20]].concat();
    client.write_all(&more).await.unwrap();
    for id in [1, 2] {
        assert_eq!(read_framed(&mut client).await.metadata.id, id);
    }
    client.write_all(&third[20..]).await.unwrap();
    let told = read_framed(&mut client).await;
    assert_eq!((told.metadata.id, addresses(&told)), (3, vec![bench.mesh.ip(VIP).to_string()]));
    client.shutdown().await.unwrap();
    assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0);
    assert_eq!(bench.count("answered"), 3);
}

#[tokio::test]
async fn from_the_first_bytes_that_are_not_ours_a_stream_goes_where_it_was_addressed() {
    let unknown = framed(&query(2, "www.example.com.").to_vec().unwrap());
    let long = [&[0xff, 0xff][..], &[7; 100]].concat();
    let cases: [&[u8]; 4] = [&unknown, b"GET / HTTP/1.1\r\n\r\n", &long, b"\x00"];
    for (index, rest) in cases.into_iter().enumerate() {
        let bench = Bench::new().await;
        let at = bench.mesh.addr(20, 0);
        let (mut client, accepted) = connected(&bench, at).await;
        let server = TcpListener::bind(accepted.local).await.unwrap();
        serve_tcp(&bench, accepted);
        client.write_all(&framed(&query(1, "api.").to_vec().unwrap())).await.unwrap();
        assert_eq!(read_framed(&mut client).await.metadata.id, 1);
        client.write_all(rest).await.unwrap();
        if rest.len() < 2 {
            client.shutdown().await.unwrap();
        }
        let (mut carried, _) = soon(server.accept()).await.unwrap();
        let mut seen = vec![0; rest.len()];
        soon(carried.read_exact(&mut seen)).await.unwrap();
        assert_eq!(seen, rest, "case {index}");
        carried.write_all(b"answer").await.unwrap();
        let mut told = [0; 6];
        soon(client.read_exact(&mut told)).await.unwrap();
        assert_eq!(&told, b"answer");
        assert_eq!(bench.count("handed_over"), 1);
    }
}

#[tokio::test]
async fn a_client_that_sends_one_byte_and_waits_is_carried() {
    let bench = Bench::new().await;
    let (mut client, accepted) = connected(&bench, bench.mesh.addr(20, 0)).await;
    let server = TcpListener::bind(accepted.local).await.unwrap();
    client.write_all(b"?").await.unwrap();
    serve_tcp(&bench, accepted);
    let (mut carried, _) = soon(server.accept()).await.unwrap();
    assert_eq!(soon(carried.read_u8()).await.unwrap(), b'?');
    carried.write_all(b"!").await.unwrap();
    assert_eq!(soon(client.read_u8()).await.unwrap(), b'!');
}

#[tokio::test]
async fn a_stream_of_a_pod_that_asks_too_much_is_carried() {
    let bench = Bench::new().await;
    let (mut client, accepted) = connected(&bench, bench.mesh.addr(20, 0)).await;
    let server = TcpListener::bind(accepted.local).await.unwrap();
    let _all = bench.pod.dns.connections.acquire_many(256).await.unwrap();
    serve_tcp(&bench, accepted);
    let bytes = framed(&query(1, "api.").to_vec().unwrap());
    client.write_all(&bytes).await.unwrap();
    let (mut carried, _) = soon(server.accept()).await.unwrap();
    let mut seen = vec![0; bytes.len()];
    soon(carried.read_exact(&mut seen)).await.unwrap();
    assert_eq!(seen, bytes);
    assert_eq!((bench.count("rate_limited"), bench.count("handed_over")), (1, 0));
}

#[tokio::test]
async fn a_server_that_speaks_first_is_reached() {
    let bench = Bench::new().await;
    let (mut client, accepted) = connected(&bench, bench.mesh.addr(20, 0)).await;
    let server = TcpListener::bind(accepted.local).await.unwrap();
    serve_tcp(&bench, accepted);
    let (mut carried, _) = soon(server.accept()).await.unwrap();
    carried.write_all(b"220 hello").await.unwrap();
    let mut told = [0; 9];
    soon(client.read_exact(&mut told)).await.unwrap();
    assert_eq!(&told, b"220 hello");
}

#[tokio::test]
async fn the_accept_loop_serves_streams_of_port_53() {
    let bench = Bench::new().await;
    let at = bench.mesh.addr(30, DNS_TEST_PORT);
    bench.proxy.serve(&bench.pod, Port::DnsTcp, at).await;
    let mut client = soon(TcpStream::connect(at)).await.unwrap();
    client.write_all(&framed(&query(9, "api.").to_vec().unwrap())).await.unwrap();
    assert_eq!(read_framed(&mut client).await.metadata.id, 9);
    assert_eq!(message::id(&[0, 9]), Some(9));
}
