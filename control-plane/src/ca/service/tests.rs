//! The service over loopback, as callers see it.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::SystemTime;

use futures_util::future::join_all;
use mesh_identity::authority::Authority;
use mesh_identity::ca_client::CaOptions;
use mesh_identity::key::PrivateKey;
use mesh_identity::{BearerToken, CaClient, Connector, IssuedCertificate, Options, Store, handshake, peer_id};
use mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use prost_types::{Struct, Value};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;
use tonic::transport::{Channel, Server};

use super::*;
use crate::ca::{AUDIENCE, BoundPod, NodeIdentity, PodRecord, TokenKey, always, serving_config};

const HOUR: Duration = Duration::from_secs(3600);

/// One pod per entry: namespace, name, account, node.
struct Pods(Mutex<Vec<(String, String, PodRecord)>>);

impl Pods {
    fn new() -> Arc<Self> {
        let pods = Arc::new(Self(Mutex::default()));
        pods.add("culvert-system", "ztunnel-1", "ztunnel", "node-1");
        pods.add("culvert-system", "ztunnel-2", "ztunnel", "node-2");
        pods.add("shop", "cart", "cart", "node-1");
        pods.add("shop", "pay", "pay", "node-2");
        pods
    }

    fn add(&self, namespace: &str, name: &str, account: &str, node: &str) {
        let record = PodRecord {
            uid: format!("uid-{name}"),
            service_account: account.to_owned(),
            node: node.to_owned(),
            is_over: false,
        };
        self.0.lock().unwrap().push((namespace.to_owned(), name.to_owned(), record));
    }

    fn remove(&self, name: &str) {
        self.0.lock().unwrap().retain(|(_, pod, _)| pod != name);
    }
}

impl Directory for Pods {
    fn pod(&self, namespace: &str, name: &str) -> Option<PodRecord> {
        let pods = self.0.lock().unwrap();
        pods.iter().find(|(ns, pod, _)| ns == namespace && pod == name).map(|(_, _, record)| record.clone())
    }

    fn identity_on_node(&self, node: &str, id: &SpiffeId) -> NodeIdentity {
        let pods = self.0.lock().unwrap();
        let of_id: Vec<_> = pods
            .iter()
            .filter(|(ns, _, pod)| ns == id.namespace() && pod.service_account == id.service_account())
            .collect();
        match of_id.iter().any(|(_, _, pod)| pod.node == node) {
            true => NodeIdentity::Present,
            false if of_id.is_empty() => NodeIdentity::UnknownYet,
            false => NodeIdentity::Absent,
        }
    }
}

struct World {
    tokens: Arc<TokenKey>,
    pods: Arc<Pods>,
    authority: Arc<Authority>,
    channel: Channel,
}

impl World {
    async fn new() -> Self {
        let tokens = Arc::new(TokenKey::generate().unwrap());
        let pods = Pods::new();
        let authority = Arc::new(Authority::generate("cluster.local", SystemTime::now()).unwrap());
        let service = service(&authority, &tokens, &pods);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Server::builder().add_service(service.into_server());
        let incoming = TcpListenerStream::new(listener).map(|socket| {
            // Else each answer waits for the client's delayed acknowledgement.
            socket.and_then(|socket| socket.set_nodelay(true).map(|()| socket))
        });
        tokio::spawn(router.serve_with_incoming(incoming));
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Self { tokens, pods, authority, channel }
    }

    fn token(&self, namespace: &str, account: &str, pod: &str) -> String {
        self.tokens.mint(&caller(namespace, account, pod), AUDIENCE, HOUR, SystemTime::now()).unwrap()
    }

    fn ztunnel(&self) -> String {
        self.token("culvert-system", "ztunnel", "ztunnel-1")
    }

    /// Sends a request with the header and the message as given.
    async fn send(&self, header: Option<&str>, message: IstioCertificateRequest) -> Result<Vec<String>, Status> {
        let mut request = Request::new(message);
        if let Some(header) = header {
            request.metadata_mut().insert("authorization", header.parse().unwrap());
        }
        let mut client = IstioCertificateServiceClient::new(self.channel.clone());
        client.create_certificate(request).await.map(|answer| answer.into_inner().cert_chain)
    }

    async fn ask(&self, token: &str, asked: Option<&str>) -> Result<SpiffeId, Status> {
        let chain = self.send(Some(&format!("Bearer {token}")), message(asked)).await?;
        let issued = IssuedCertificate::from_wire(&chain).unwrap();
        Ok(peer_id(std::slice::from_ref(&issued.leaf)).unwrap())
    }

    async fn refused(&self, token: &str, asked: Option<&str>) -> (Code, String) {
        let status = self.ask(token, asked).await.unwrap_err();
        assert!(!status.message().contains(token), "{status}");
        (status.code(), status.message().to_owned())
    }
}

fn service(authority: &Arc<Authority>, tokens: &Arc<TokenKey>, pods: &Arc<Pods>) -> CaService {
    let authenticator = Authenticator::local(tokens.clone(), Clock::system());
    CaService::new(
        always(authority.clone()),
        authenticator,
        pods.clone(),
        Policy::new("cluster.local"),
        Clock::system(),
    )
}

fn caller(namespace: &str, account: &str, pod: &str) -> Caller {
    Caller {
        namespace: namespace.to_owned(),
        service_account: account.to_owned(),
        pod: Some(BoundPod { name: pod.to_owned(), uid: Some(format!("uid-{pod}")) }),
        node: None,
    }
}

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const PAY: &str = "spiffe://cluster.local/ns/shop/sa/pay";

/// A request whose CSR asks for `PAY`, whatever is asked beside it.
fn message(asked: Option<&str>) -> IstioCertificateRequest {
    let csr = PrivateKey::generate().unwrap().csr_pem(&id(PAY)).unwrap();
    IstioCertificateRequest { csr, validity_duration: 3600, metadata: asked.map(impersonating) }
}

fn impersonating(asked: &str) -> Struct {
    let value = Value { kind: Some(Kind::StringValue(asked.to_owned())) };
    Struct { fields: [(IMPERSONATED_IDENTITY.to_owned(), value)].into() }
}

#[tokio::test]
async fn a_node_proxy_gets_the_identities_of_its_node_only() {
    let world = World::new().await;
    assert_eq!(world.ask(&world.ztunnel(), Some(CART)).await.unwrap(), id(CART));
    let (code, text) = world.refused(&world.ztunnel(), Some(PAY)).await;
    assert_eq!(code, Code::PermissionDenied);
    assert!(text.contains(PAY) && text.contains("node-1"), "{text}");

    let new = "spiffe://cluster.local/ns/shop/sa/new";
    let (code, text) = world.refused(&world.ztunnel(), Some(new)).await;
    assert!(code == Code::Unavailable && text.contains("retry"), "{text}");
    world.pods.add("shop", "new-1", "new", "node-1");
    assert_eq!(world.ask(&world.ztunnel(), Some(new)).await.unwrap(), id(new));
}

#[tokio::test]
async fn an_ordinary_pod_gets_its_own_identity_only() {
    let world = World::new().await;
    let cart = world.token("shop", "cart", "cart");
    assert_eq!(world.ask(&cart, None).await.unwrap(), id(CART), "whatever its request names");
    let (code, text) = world.refused(&cart, Some(PAY)).await;
    assert_eq!(code, Code::PermissionDenied);
    assert!(text.contains("not a node proxy") && text.contains("shop/cart"), "{text}");
}

#[tokio::test]
async fn a_dead_pods_token_is_refused() {
    let world = World::new().await;
    let token = world.ztunnel();
    world.pods.remove("ztunnel-1");
    let (code, text) = world.refused(&token, Some(CART)).await;
    assert!(code == Code::PermissionDenied && text.contains("does not exist"), "{text}");
    // Another of the same name has taken its place.
    world.pods.add("culvert-system", "ztunnel-1", "ztunnel", "node-1");
    world.pods.0.lock().unwrap().last_mut().unwrap().2.uid = "uid-next".to_owned();
    let (code, text) = world.refused(&token, Some(CART)).await;
    assert!(code == Code::PermissionDenied && text.contains("earlier pod"), "{text}");
}

#[tokio::test]
async fn bad_tokens_are_unauthenticated() {
    let world = World::new().await;
    let now = SystemTime::now();
    let ztunnel = caller("culvert-system", "ztunnel", "ztunnel-1");
    let mint = |key: &TokenKey, audience: &str, at| key.mint(&ztunnel, audience, HOUR, at).unwrap();
    let good = mint(&world.tokens, AUDIENCE, now);
    let (_, rest) = good.split_once('.').unwrap();
    // {"alg":"none"}
    let none = format!("eyJhbGciOiJub25lIn0.{rest}");
    let (body, _) = rest.rsplit_once('.').unwrap();
    let unsigned = format!("eyJhbGciOiJub25lIn0.{body}.");
    for (token, expected) in [
        (mint(&world.tokens, AUDIENCE, now - 2 * HOUR), "expired"),
        (mint(&world.tokens, AUDIENCE, now + HOUR), "not valid yet"),
        (mint(&world.tokens, "vault", now), "audience"),
        (mint(&TokenKey::generate().unwrap(), AUDIENCE, now), "signature"),
        (none, "malformed"),
        (unsigned, "malformed"),
        ("nonsense".to_owned(), "malformed"),
    ] {
        let (code, text) = world.refused(&token, Some(CART)).await;
        assert!(code == Code::Unauthenticated && text.contains(expected), "{expected}: {text}");
    }
    for header in [None, Some(""), Some("Bearer"), Some("Bearer "), Some("Basic abc"), Some(&*good)] {
        let status = world.send(header, message(Some(CART))).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{header:?}");
    }
    world.send(Some(&format!("bearer {good}")), message(Some(CART))).await.unwrap();

    let mut twice = Request::new(message(Some(CART)));
    for token in [&good, &good] {
        twice.metadata_mut().append("authorization", format!("Bearer {token}").parse().unwrap());
    }
    let mut client = IstioCertificateServiceClient::new(world.channel.clone());
    assert_eq!(client.create_certificate(twice).await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn bad_requests_are_named() {
    let world = World::new().await;
    let header = format!("Bearer {}", world.ztunnel());
    let asked = Some(impersonating(CART));
    let refused = async |message| {
        let status = world.send(Some(&header), message).await.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    let (code, text) = world.refused(&world.ztunnel(), Some("spiffe://other.example/ns/shop/sa/cart")).await;
    assert!(code == Code::PermissionDenied && text.contains("trust domain cluster.local"), "{text}");
    let (code, text) = world.refused(&world.ztunnel(), Some("cart")).await;
    assert!(code == Code::InvalidArgument && text.contains("spiffe://"), "{text}");
    let (code, text) = refused(IstioCertificateRequest { metadata: asked.clone(), ..Default::default() }).await;
    assert!(code == Code::InvalidArgument && text.contains("not PEM"), "{text}");
    let long = IstioCertificateRequest { csr: "x".repeat(20_000), metadata: asked.clone(), ..Default::default() };
    let (code, text) = refused(long).await;
    assert!(code == Code::InvalidArgument && text.contains("16384"), "{text}");
    let huge = IstioCertificateRequest { csr: "x".repeat(1_000_000), metadata: asked, ..Default::default() };
    assert_eq!(refused(huge).await.0, Code::OutOfRange);

    // A name that is no string must not be taken for no name: the caller would get an identity it did not ask for.
    for kind in [None, Some(Kind::NullValue(0)), Some(Kind::BoolValue(true))] {
        let fields = [(IMPERSONATED_IDENTITY.to_owned(), Value { kind })].into();
        let odd = IstioCertificateRequest { metadata: Some(Struct { fields }), ..message(None) };
        assert_eq!(refused(odd).await.0, Code::InvalidArgument);
    }
}

#[tokio::test]
async fn one_caller_cannot_ask_without_end() {
    let world = World::new().await;
    let header = format!("Bearer {}", world.token("shop", "cart", "cart"));
    let request = message(None);
    let answers = join_all((0..1000).map(|_| world.send(Some(&header), request.clone()))).await;
    let served = answers.iter().filter(|answer| answer.is_ok()).count();
    assert!((500..1000).contains(&served), "{served}");
    let refused = answers.into_iter().filter_map(Result::err);
    assert!(refused.map(|status| status.code()).all(|code| code == Code::ResourceExhausted));
    assert_eq!(world.ask(&world.ztunnel(), Some(CART)).await.unwrap(), id(CART), "others are served");
}

/// A call whose message never comes, answered nevertheless.
async fn begin(channel: &Channel, token: Option<&str>) -> Status {
    let mut request = Request::new(tokio_stream::pending::<IstioCertificateRequest>());
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<IstioCertificateRequest, IstioCertificateResponse>::default();
    let path = "/istio.v1.auth.IstioCertificateService/CreateCertificate".parse().unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(60), client.client_streaming(request, path, codec));
    answer.await.expect("an answer").unwrap_err()
}

#[tokio::test]
async fn what_a_caller_sends_is_read_when_it_is_known_and_for_a_while_only() {
    let world = World::new().await;
    assert_eq!(begin(&world.channel, None).await.code(), Code::Unauthenticated);
    assert_eq!(begin(&world.channel, Some("nonsense")).await.code(), Code::Unauthenticated);

    let service = service(&world.authority, &world.tokens, &world.pods).into_server();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(service.with_patience(Duration::from_millis(50)));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let status = begin(&channel, Some(&world.ztunnel())).await;
    assert!(status.code() == Code::DeadlineExceeded && status.message().contains("in time"), "{status}");
}

/// The whole way: culvertd's TLS, the client, the store, and a tunnel between two identities.
#[tokio::test]
async fn two_node_proxies_get_certificates_and_make_a_tunnel() {
    let world = World::new().await;
    let address = serve_tls(&world).await;
    let dir = tempfile::tempdir().unwrap();
    let roots = dir.path().join("root.pem");
    std::fs::write(&roots, world.authority.roots_pem()).unwrap();
    let store = |pod: &str| {
        let token = BearerToken::new(&world.token("culvert-system", "ztunnel", pod)).unwrap();
        let connector = Connector::new(&format!("https://localhost:{}", address.port()), &roots).unwrap();
        let client = CaClient::with_connector(Arc::new(connector), Arc::new(token), CaOptions::default());
        Store::new(Arc::new(client), Options::default())
    };
    let (first, second) = (store("ztunnel-1"), store("ztunnel-2"));
    let cart = first.certificate(&id(CART)).await.unwrap();
    let pay = second.certificate(&id(PAY)).await.unwrap();
    let error = first.certificate(&id(PAY)).await.unwrap_err();
    assert!(error.to_string().contains("no running pod of"), "{error}");

    let (near, far) = tokio::io::duplex(64 * 1024);
    let expected = [id(PAY)];
    let (opened, accepted) =
        tokio::join!(handshake::connect(near, &cart, address.ip(), &expected), handshake::accept(far, &pay));
    assert_eq!((opened.unwrap().1, accepted.unwrap().1), (id(PAY), id(CART)));
}

async fn serve_tls(world: &World) -> SocketAddr {
    let names = vec!["localhost".to_owned()];
    let acceptor = TlsAcceptor::from(serving_config(always(world.authority.clone()), names, Clock::system()).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            if sender.send(acceptor.accept(socket).await).await.is_err() {
                return;
            }
        }
    });
    let service = service(&world.authority, &world.tokens, &world.pods).into_server();
    let incoming = tokio_stream::wrappers::ReceiverStream::new(receiver);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    address
}
