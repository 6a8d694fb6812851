//! The peers against each other, so that a failure against the mesh is the mesh's.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_proto::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use mesh_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use mesh_proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_proto::workload::Address;
use prost::Message;
use prost_types::value::Kind;
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair, SanType};
use rustls::crypto::aws_lc_rs::kx_group;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Identity as TlsIdentity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::hbone_server::Behaviour;
use super::xds_client::{NodeInfo, Session, WORKLOAD_TYPE, decode};
use super::{Error, Identity, ca_client, hbone_client, hbone_server};

const ALICE: &str = "spiffe://cluster.local/ns/default/sa/alice";
const BOB: &str = "spiffe://cluster.local/ns/default/sa/bob";

struct Root {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Root {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Root { issuer: Issuer::new(params, key), pem }
    }

    fn leaf(&self, names: Vec<SanType>) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn identity(&self, spiffe: &str) -> Identity {
        let (chain, key) = self.leaf(vec![SanType::URI(spiffe.try_into().unwrap())]);
        Identity::from_pem(&chain, &key, &self.pem).unwrap()
    }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

async fn connect(
    server: &hbone_server::Server,
    identity: &Identity,
    expected: &str,
) -> Result<hbone_client::Client, Error> {
    hbone_client::connect(TcpStream::connect(server.address).await.unwrap(), identity, expected).await
}

#[tokio::test]
async fn tunnel_between_bare_peers() {
    let root = Root::new();
    let server = hbone_server::serve(listener().await, &root.identity(BOB), Behaviour::Echo).unwrap();
    let client = connect(&server, &root.identity(ALICE), BOB).await.unwrap();
    let settled = &client.negotiated;
    assert_eq!((settled.version.as_str(), settled.alpn.as_str(), settled.peer.as_str()), ("TLSv1_3", "h2", BOB));
    let answer = client.connect("10.1.2.3:80", &[("baggage", "service.name=alice")]).await.unwrap();
    assert_eq!(answer.status, 200);
    let mut stream = answer.stream().unwrap();
    stream.write("hello").await.unwrap();
    stream.finish().unwrap();
    assert_eq!(stream.read_to_end().await.unwrap(), b"hello");
    let records = server.wait_records(1).await.unwrap();
    let record = &records[0];
    assert_eq!((record.method.as_str(), record.authority.as_str()), ("CONNECT", "10.1.2.3:80"));
    assert!(!record.scheme_or_path);
    assert_eq!(record.header("baggage"), Some("service.name=alice"));
    assert_eq!(record.negotiated.peer, ALICE);
}

#[tokio::test]
async fn statuses_resets_and_handlers() {
    let root = Root::new();
    let (alice, bob) = (root.identity(ALICE), root.identity(BOB));
    let server = hbone_server::serve(listener().await, &bob, Behaviour::Status(503)).unwrap();
    let client = connect(&server, &alice, BOB).await.unwrap();
    let answer = client.connect("10.1.2.3:80", &[]).await.unwrap();
    assert_eq!((answer.status, answer.stream.is_none()), (503, true));

    let server = hbone_server::serve(listener().await, &bob, Behaviour::Reset(8)).unwrap();
    let client = connect(&server, &alice, BOB).await.unwrap();
    assert!(matches!(client.connect("10.1.2.3:80", &[]).await, Err(Error::Http2(_))));

    let run: hbone_server::Handler = Arc::new(|_, mut stream| {
        Box::pin(async move {
            let _ = stream.write("first").await;
            let _ = stream.read().await;
            stream.reset(10);
        })
    });
    let server = hbone_server::serve(listener().await, &bob, Behaviour::Run(run)).unwrap();
    let client = connect(&server, &alice, BOB).await.unwrap();
    let mut stream = client.connect("10.1.2.3:80", &[]).await.unwrap().stream().unwrap();
    assert_eq!(stream.read_up_to(5).await.unwrap(), b"first");
    stream.write("go").await.unwrap();
    assert_eq!(stream.wait_reset().await.unwrap(), 10);
}

#[tokio::test]
async fn strangers_are_refused() {
    let (root, foreign) = (Root::new(), Root::new());
    let (alice, bob) = (root.identity(ALICE), root.identity(BOB));
    let server = hbone_server::serve(listener().await, &bob, Behaviour::Echo).unwrap();
    let wrong = connect(&server, &alice, ALICE).await.unwrap_err();
    assert!(wrong.to_string().contains("expected"), "{wrong}");
    // A client that trusts nobody else, and one that nobody trusts.
    assert!(connect(&server, &foreign.identity(ALICE), BOB).await.is_err());
    let (chain, key) = foreign.leaf(vec![SanType::URI(ALICE.try_into().unwrap())]);
    let forged = Identity::from_pem(&chain, &key, &root.pem).unwrap();
    // TLS 1.3: the client learns of the refusal with its first read.
    if let Ok(client) = connect(&server, &forged, BOB).await {
        assert!(client.connect("10.1.2.3:80", &[]).await.is_err());
    }
    assert!(server.records().is_empty());
}

#[tokio::test]
async fn one_key_exchange_only() {
    let root = Root::new();
    let (mut alice, mut bob) = (root.identity(ALICE), root.identity(BOB));
    bob.key_exchanges = vec![kx_group::X25519MLKEM768];
    let server = hbone_server::serve(listener().await, &bob, Behaviour::Echo).unwrap();
    let client = connect(&server, &alice, BOB).await.unwrap();
    assert_eq!(client.negotiated.key_exchange, "X25519MLKEM768");
    alice.key_exchanges = vec![kx_group::X25519];
    assert!(connect(&server, &alice, BOB).await.is_err());
}

/// A control plane that signs what is asked and serves one workload.
#[derive(Clone)]
struct Control(Arc<Root>);

#[tonic::async_trait]
impl IstioCertificateService for Control {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let metadata = request.metadata();
        if metadata.get("authorization").is_none_or(|token| token != "Bearer good") {
            return Err(Status::unauthenticated("token"));
        }
        assert_eq!(metadata.get("clusterid").unwrap(), "Kubernetes");
        let request = request.into_inner();
        let wanted = request.metadata.and_then(|m| m.fields.get("ImpersonatedIdentity").cloned()).and_then(|v| v.kind);
        assert_eq!(wanted, Some(Kind::StringValue(ALICE.to_owned())));
        let csr = CertificateSigningRequestParams::from_pem(&request.csr).unwrap();
        assert_eq!(csr.params.subject_alt_names, vec![SanType::URI(ALICE.try_into().unwrap())]);
        let leaf = csr.signed_by(&self.0.issuer).unwrap();
        Ok(Response::new(IstioCertificateResponse { cert_chain: vec![leaf.pem(), self.0.pem.clone()] }))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Control {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut requests = request.into_inner();
        let (tx, rx) = mpsc::channel(4);
        tokio::spawn(async move {
            let first = requests.message().await.unwrap().unwrap();
            assert!(first.node.unwrap().id.starts_with("ztunnel~10.0.0.1~pod.ns~ns."));
            assert_eq!(first.initial_resource_versions.get("old").unwrap(), "1");
            let body =
                prost_types::Any { type_url: WORKLOAD_TYPE.to_owned(), value: Address::default().encode_to_vec() };
            let resource = Resource { name: "new".to_owned(), resource: Some(body), ..Resource::default() };
            let response = DeltaDiscoveryResponse {
                type_url: WORKLOAD_TYPE.to_owned(),
                nonce: "n1".to_owned(),
                resources: vec![resource],
                removed_resources: vec!["old".to_owned()],
                ..DeltaDiscoveryResponse::default()
            };
            tx.send(Ok(response)).await.unwrap();
            let nack = requests.message().await.unwrap().unwrap();
            assert_eq!((nack.response_nonce.as_str(), nack.error_detail.unwrap().code), ("n1", 3));
            assert!(nack.node.is_none());
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }
}

async fn control() -> (SocketAddr, Arc<Root>) {
    let root = Arc::new(Root::new());
    let (chain, key) = root.leaf(vec![SanType::DnsName("localhost".try_into().unwrap())]);
    let listener = listener().await;
    let address = listener.local_addr().unwrap();
    let control = Control(Arc::clone(&root));
    let server = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(TlsIdentity::from_pem(chain, key)))
        .unwrap()
        .add_service(IstioCertificateServiceServer::new(control.clone()))
        .add_service(AggregatedDiscoveryServiceServer::new(control));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, root)
}

#[tokio::test]
async fn certificate_is_issued_and_usable() {
    let (address, root) = control().await;
    let issued = ca_client::request(address, &root.pem, "good", ALICE, Some(ALICE)).await.unwrap();
    assert_eq!(Identity::from_issued(&issued).unwrap().spiffe().unwrap(), ALICE);
    let refused = ca_client::request(address, &root.pem, "bad", ALICE, Some(ALICE)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let foreign = Root::new();
    let unknown = ca_client::request(address, &foreign.pem, "good", ALICE, Some(ALICE)).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::Unavailable);
}

#[tokio::test]
async fn discovery_by_hand() {
    let (address, root) = control().await;
    let node = NodeInfo {
        ip: "10.0.0.1".parse().unwrap(),
        pod: "pod".to_owned(),
        namespace: "ns".to_owned(),
        node: "node".to_owned(),
    };
    let mut session = Session::open(address, &root.pem, "good", &node).await.unwrap();
    session.subscribe_wildcard(WORKLOAD_TYPE, &[("old", "1")]).await.unwrap();
    let response = session.next().await.unwrap();
    session.nack(&response, "not wanted").await.unwrap();
    let collected = session.collected(WORKLOAD_TYPE);
    assert!(collected.removed.contains("old"));
    let address: Address = decode(&collected.resources["new"], WORKLOAD_TYPE).unwrap();
    assert_eq!(address, Address::default());
    assert!(decode::<Address>(&collected.resources["new"], "another").is_err());
}
