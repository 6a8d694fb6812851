//! The client against servers on the loopback interface.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use mesh_proto::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use mesh_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use prost_types::value::Kind;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::MetadataMap;
use tonic::transport::server::ServerTlsConfig;
use tonic::transport::{Channel, Identity, Server};
use tonic::{Request, Response, Status};

use super::{CaClient, CaOptions, IMPERSONATED_IDENTITY};
use crate::key::PrivateKey;
use crate::testing::{HOUR, authority, id};
use crate::{
    Authority, BearerToken, Clock, Connector, Credential, CsrPublicKey, FileToken, IssueError, IssuedCertificate,
    Issuer, TokenError,
};

type Answer = dyn Fn(&IstioCertificateRequest) -> Result<Vec<String>, Status> + Send + Sync;

/// Answers as told and keeps what it saw.
#[derive(Clone)]
struct FakeCa {
    seen: Arc<Mutex<Vec<(MetadataMap, IstioCertificateRequest)>>>,
    answer: Arc<Answer>,
}

impl FakeCa {
    fn new(answer: impl Fn(&IstioCertificateRequest) -> Result<Vec<String>, Status> + Send + Sync + 'static) -> Self {
        Self { seen: Arc::default(), answer: Arc::new(answer) }
    }

    fn signing(root: Arc<Authority>) -> Self {
        Self::new(move |request| {
            let key = CsrPublicKey::from_pem(&request.csr).unwrap();
            Ok(root.sign(&key, &id("a"), HOUR, SystemTime::now()).unwrap().to_wire())
        })
    }

    async fn start(&self, tls: Option<ServerTlsConfig>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls).unwrap();
        }
        let router = server.add_service(IstioCertificateServiceServer::new(self.clone()));
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    async fn channel(&self) -> Channel {
        let address = self.start(None).await;
        Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy()
    }
}

#[tonic::async_trait]
impl IstioCertificateService for FakeCa {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let answer = (self.answer)(&message);
        self.seen.lock().unwrap().push((metadata, message));
        answer.map(|cert_chain| Response::new(IstioCertificateResponse { cert_chain }))
    }
}

fn token(text: &str) -> Arc<BearerToken> {
    Arc::new(BearerToken::new(text).unwrap())
}

async fn ask(client: &CaClient) -> Result<IssuedCertificate, IssueError> {
    let csr = PrivateKey::generate().unwrap().csr_pem(&id("a")).unwrap();
    client.issue(&id("a"), csr).await
}

#[tokio::test]
async fn a_request_carries_token_cluster_and_identity() {
    let ca = FakeCa::signing(Arc::new(authority()));
    let options = CaOptions { cluster_id: "east".to_owned(), lifetime: HOUR, ..CaOptions::default() };
    let client = CaClient::new(ca.channel().await, token("abc.def.ghi"), options);
    let key = PrivateKey::generate().unwrap();
    let csr = key.csr_pem(&id("a")).unwrap();
    let issued = client.issue(&id("a"), csr.clone()).await.unwrap();
    Credential::new(&id("a"), key, issued, &Clock::system()).unwrap();

    let seen = ca.seen.lock().unwrap();
    let (metadata, message) = &seen[0];
    assert_eq!(metadata.get("authorization").unwrap(), "Bearer abc.def.ghi");
    assert_eq!(metadata.get("clusterid").unwrap(), "east");
    assert!(metadata.contains_key("grpc-timeout"));
    assert_eq!((message.csr.as_str(), message.validity_duration), (csr.as_str(), 3600));
    let wanted = &message.metadata.as_ref().unwrap().fields[IMPERSONATED_IDENTITY];
    assert_eq!(wanted.kind, Some(Kind::StringValue("spiffe://cluster.local/ns/ns/sa/a".to_owned())));
}

#[tokio::test]
async fn who_wants_its_own_identity_names_none() {
    let ca = FakeCa::signing(Arc::new(authority()));
    let options = CaOptions { impersonate: false, ..CaOptions::default() };
    ask(&CaClient::new(ca.channel().await, token("t"), options)).await.unwrap();
    assert_eq!(ca.seen.lock().unwrap()[0].1.metadata, None);
}

#[tokio::test]
async fn the_token_is_read_anew_for_each_request() {
    let ca = FakeCa::signing(Arc::new(authority()));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let client = CaClient::new(ca.channel().await, Arc::new(FileToken::new(&path)), CaOptions::default());
    let missing = ask(&client).await.unwrap_err();
    assert!(matches!(missing, IssueError::Token(TokenError::Read { .. })), "{missing}");
    for text in ["one\n", "two"] {
        std::fs::write(&path, text).unwrap();
        ask(&client).await.unwrap();
    }
    for (text, expected) in [("", "empty"), ("a b", "cannot hold"), (&*"x".repeat(20_000), "larger")] {
        std::fs::write(&path, text).unwrap();
        let error = ask(&client).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let seen = ca.seen.lock().unwrap();
    let sent: Vec<_> = seen.iter().map(|(metadata, _)| metadata.get("authorization").unwrap()).collect();
    assert_eq!(sent, ["Bearer one", "Bearer two"]);
}

#[tokio::test]
async fn a_status_says_whether_to_try_again() {
    for (status, refused) in [
        (Status::unavailable("not known yet, retry"), false),
        (Status::resource_exhausted("busy"), false),
        (Status::internal("broken"), false),
        (Status::permission_denied("not on your node"), true),
        (Status::unauthenticated("token expired"), true),
        (Status::invalid_argument("bad request"), true),
        (Status::unimplemented("no such service"), true),
    ] {
        let message = status.message().to_owned();
        let ca = FakeCa::new(move |_| Err(status.clone()));
        let client = CaClient::new(ca.channel().await, token("secret"), CaOptions::default());
        let error = ask(&client).await.unwrap_err();
        assert_eq!(error.is_refusal(), refused, "{error}");
        assert!(error.to_string().contains(&message) && !error.to_string().contains("secret"), "{error}");
    }
}

#[tokio::test]
async fn hostile_answers_are_errors() {
    for answer in [vec![], vec!["x".to_owned(); 2], vec!["y".repeat(100_000); 2], vec!["z".repeat(3_000_000)]] {
        let ca = FakeCa::new(move |_| Ok(answer.clone()));
        let client = CaClient::new(ca.channel().await, token("t"), CaOptions::default());
        ask(&client).await.unwrap_err();
    }
}

#[tokio::test]
async fn nobody_there_is_unavailable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let options = CaOptions { deadline: Duration::from_millis(200), ..CaOptions::default() };
    let channel = || Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    // Nobody answers.
    let error = ask(&CaClient::new(channel(), token("t"), options.clone())).await.unwrap_err();
    assert!(matches!(error, IssueError::Unavailable { .. }), "{error}");
    // Nobody listens.
    drop(listener);
    let error = ask(&CaClient::new(channel(), token("t"), options)).await.unwrap_err();
    assert!(matches!(error, IssueError::Unavailable { .. }), "{error}");
}

async fn serve_tls(root: &Authority, ca: &FakeCa) -> SocketAddr {
    let server = root.sign_server(&["127.0.0.1".to_owned()], HOUR, SystemTime::now()).unwrap();
    let identity = Identity::from_pem(&server.chain_pem, server.key_pem.expose());
    ca.start(Some(ServerTlsConfig::new().identity(identity))).await
}

fn connect(address: SocketAddr, roots: &Path) -> CaClient {
    let connector = Connector::new(&format!("https://{address}"), roots).unwrap();
    CaClient::with_connector(Arc::new(connector), token("t"), CaOptions::default())
}

#[tokio::test]
async fn the_server_is_checked_against_the_roots_in_the_file_and_they_can_be_replaced() {
    let (old, new) = (Arc::new(authority()), authority());
    let ca = FakeCa::signing(old.clone());
    let dir = tempfile::tempdir().unwrap();
    let roots = dir.path().join("root.pem");
    let client = connect(serve_tls(&old, &ca).await, &roots);

    let error = ask(&client).await.unwrap_err();
    assert!(error.to_string().contains("cannot read the roots"), "{error}");
    std::fs::write(&roots, "nothing").unwrap();
    let error = ask(&client).await.unwrap_err();
    assert!(error.to_string().contains("no usable certificate"), "{error}");
    std::fs::write(&roots, new.roots_pem()).unwrap();
    let error = ask(&client).await.unwrap_err();
    assert!(matches!(error, IssueError::Unavailable { .. }), "{error}");
    assert!(ca.seen.lock().unwrap().is_empty(), "no token for a server that is not trusted");
    std::fs::write(&roots, old.roots_pem()).unwrap();
    ask(&client).await.unwrap();
    std::fs::write(&roots, old.roots_pem() + &new.roots_pem()).unwrap();
    ask(&client).await.unwrap();
    assert_eq!(ca.seen.lock().unwrap().len(), 2);
}

#[test]
fn tokens_are_not_sent_in_clear() {
    for address in ["http://127.0.0.1:15012", "127.0.0.1:15012", "https://", ""] {
        let error = Connector::new(address, "/roots").unwrap_err();
        assert!(error.to_string().contains("https://<host>:<port>"), "{error}");
    }
    assert_eq!(format!("{:?}", token("secret")), "BearerToken(redacted)");
}
