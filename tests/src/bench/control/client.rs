//! One discovery client that keeps next to nothing: HTTP/2 by hand, responses skimmed and acknowledged.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{BufMut, Bytes, BytesMut};
use http::Request;
use mesh_proto::core::Node;
use mesh_proto::discovery::DeltaDiscoveryRequest;
use prost::Message;
use rustls_pki_types::ServerName;
use serde_json::json;
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;

use super::board::Board;
use super::skim::{Response, Skimmer};
use crate::interop::xds_client::{AUTHORIZATION_TYPE, WORKLOAD_TYPE};

/// Windows of a real node proxy.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// Pause before a stream is opened again.
const PAUSE: Duration = Duration::from_millis(500);
/// Ends the version of a response that more of the same state follows.
const MORE: &str = "+more";

type Error = Box<dyn std::error::Error + Send + Sync>;

/// What all clients share.
pub struct Common {
    /// Where discovery is.
    pub address: SocketAddr,
    /// Trusts it.
    pub tls: TlsConnector,
    /// Workloads and services that there are.
    pub resources: usize,
    /// What is reported.
    pub board: Board,
}

/// Follows discovery for ever, as the node with that number.
pub async fn run(number: usize, common: Arc<Common>) {
    let mut is_synced = false;
    loop {
        if let Err(error) = follow(number, &common, &mut is_synced).await {
            common.board.trouble(format!("client {number}: {error}"));
        }
        common.board.again.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow(number: usize, common: &Common, is_synced: &mut bool) -> Result<(), Error> {
    let board = &common.board;
    let socket = TcpSocket::new_v4()?;
    // An address of its own, as a node has: culvertd counts by it what is asked.
    let own = Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + u32::try_from(number)?);
    socket.bind((own, 0).into())?;
    let stream = socket.connect(common.address).await?;
    stream.set_nodelay(true)?;
    let stream = common.tls.connect(ServerName::try_from("localhost")?, stream).await?;
    let (sender, connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .handshake::<_, Bytes>(stream)
        .await?;
    let connection = Aborting(tokio::spawn(connection));
    let request = Request::post(format!(
        "https://{}/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
        common.address
    ))
    .header("content-type", "application/grpc")
    .header("te", "trailers")
    .header("authorization", format!("Bearer {}", token(number)))
    .header("clusterid", "Kubernetes")
    .body(())?;
    let (response, mut requests) = sender.ready().await?.send_request(request, false)?;
    let node = Node { id: format!("ztunnel~{own}~ztunnel-{number}.culvert-system"), ..Node::default() };
    requests.send_data(ask(AUTHORIZATION_TYPE, "", Some(node)), false)?;
    requests.send_data(ask(WORKLOAD_TYPE, "", None), false)?;
    let response = response.await?;
    if let Some(status) = response.headers().get("grpc-status") {
        let message = response.headers().get("grpc-message");
        return Err(format!("refused: {status:?} {message:?}").into());
    }
    let mut body = response.into_body();
    let mut skimmer = Skimmer::default();
    let mut state = State::default();
    while let Some(piece) = body.data().await {
        let piece = piece?;
        board.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        let mut answers: Vec<Bytes> = Vec::new();
        skimmer.feed(&piece, |response| {
            answers.push(ask(&response.type_url, &response.nonce, None));
            state.take(&response, common, is_synced);
        })?;
        body.flow_control().release_capacity(piece.len())?;
        for answer in answers {
            requests.send_data(answer, false)?;
        }
    }
    let trailers = body.trailers().await?.unwrap_or_default();
    drop(connection);
    Err(format!("ended: {:?} {:?}", trailers.get("grpc-status"), trailers.get("grpc-message")).into())
}

/// What a client knows.
#[derive(Debug, Default)]
struct State {
    first: usize,
    is_complete: bool,
    /// The change that was reported last.
    seen: u64,
}

impl State {
    fn take(&mut self, response: &Response, common: &Common, is_synced: &mut bool) {
        if response.type_url != WORKLOAD_TYPE {
            return;
        }
        let board = &common.board;
        if !self.is_complete {
            self.first += response.resources;
            if response.version.ends_with(MORE) {
                return;
            }
            self.is_complete = true;
            if self.first != common.resources {
                board.wrong.fetch_add(1, Ordering::SeqCst);
                board.trouble(format!("{} resources, not {}", self.first, common.resources));
            }
            if !std::mem::replace(is_synced, true) {
                board.synced();
            }
            return;
        }
        let mark = board.mark();
        if self.seen != mark.number && memchr::memmem::find(&response.small, mark.text.as_bytes()).is_some() {
            self.seen = mark.number;
            board.seen();
        }
    }
}

/// A task that ends with its owner.
struct Aborting<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for Aborting<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Asks for everything of a type, or acknowledges the response with that nonce.
fn ask(type_url: &str, nonce: &str, node: Option<Node>) -> Bytes {
    let request = DeltaDiscoveryRequest {
        node,
        type_url: type_url.to_owned(),
        response_nonce: nonce.to_owned(),
        initial_resource_versions: HashMap::new(),
        ..DeltaDiscoveryRequest::default()
    };
    let length = request.encoded_len();
    let mut framed = BytesMut::with_capacity(length + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    framed.extend_from_slice(&request.encode_to_vec());
    framed.freeze()
}

/// Whose token it is.
pub fn number(token: &str) -> Option<usize> {
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&claims).ok()?;
    claims["jti"].as_str()?.parse().ok()
}

/// A token that says of itself what a service account's does. The API server of the bench accepts any.
fn token(number: usize) -> String {
    const END: u64 = 4_102_444_800;
    let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = part(&json!({"alg": "RS256", "kid": "bench"}));
    let subject = "system:serviceaccount:culvert-system:ztunnel";
    let claims = part(&json!({"aud": ["istio-ca"], "exp": END, "sub": subject, "jti": number.to_string()}));
    format!("{header}.{claims}.{}", URL_SAFE_NO_PAD.encode("unsigned"))
}
