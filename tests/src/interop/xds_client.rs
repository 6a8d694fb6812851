//! A bare delta discovery client: every request is made by hand, and nothing is acknowledged unless asked.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_proto::core::Node;
use mesh_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_proto::rpc::Status as RpcStatus;
use prost::Message;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::ca_client::{authenticated, channel};
use super::{Error, PATIENCE};

/// Type of workloads and services.
pub const WORKLOAD_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type of authorizations.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
/// gRPC's INVALID_ARGUMENT, the code of a NACK.
const INVALID_ARGUMENT: i32 = 3;

/// Who the client says it is.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// The proxy's own address.
    pub ip: IpAddr,
    /// The proxy's pod.
    pub pod: String,
    /// The proxy's namespace.
    pub namespace: String,
    /// The node.
    pub node: String,
}

impl NodeInfo {
    fn to_wire(&self) -> Node {
        let text = |value: &str| Value { kind: Some(Kind::StringValue(value.to_owned())) };
        let fields = [
            ("NAME", text(&self.pod)),
            ("NAMESPACE", text(&self.namespace)),
            ("INSTANCE_IPS", text(&self.ip.to_string())),
            ("NODE_NAME", text(&self.node)),
            ("CLUSTER_ID", text("Kubernetes")),
        ];
        Node {
            id: format!("ztunnel~{}~{}.{}~{}.svc.cluster.local", self.ip, self.pod, self.namespace, self.namespace),
            cluster: "ztunnel".to_owned(),
            metadata: Some(Struct { fields: fields.map(|(name, value)| (name.to_owned(), value)).into() }),
        }
    }
}

/// One discovery stream, and what came on it.
#[derive(Debug)]
pub struct Session {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    node: Option<Node>,
    state: HashMap<String, Collected>,
}

/// The resources of one type after all responses so far.
#[derive(Debug, Clone, Default)]
pub struct Collected {
    /// By name.
    pub resources: BTreeMap<String, Resource>,
    /// Names that were removed, or asked for and not there.
    pub removed: BTreeSet<String>,
    /// Responses of this type so far.
    pub responses: usize,
}

impl Session {
    /// Opens a stream to the control plane at `address` (its certificate is for `localhost`).
    ///
    /// # Errors
    /// If the channel or the stream cannot be opened; `Error::Grpc` with the status if the token is refused at once.
    pub async fn open(address: SocketAddr, root_pem: &str, token: &str, node: &NodeInfo) -> Result<Self, Error> {
        let channel = channel(address, root_pem).await?;
        let (requests, outgoing) = mpsc::channel(16);
        let request = authenticated(ReceiverStream::new(outgoing), token)?;
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = timeout(PATIENCE, client.delta_aggregated_resources(request));
        let responses = responses.await.map_err(|_| Error::Timeout("discovery stream"))??.into_inner();
        Ok(Session { requests, responses, node: Some(node.to_wire()), state: HashMap::new() })
    }

    /// Sends any request. The first one of the session gets the node.
    ///
    /// # Errors
    /// If the stream has ended.
    pub async fn send(&mut self, mut request: DeltaDiscoveryRequest) -> Result<(), Error> {
        if request.node.is_none() {
            request.node = self.node.take();
        }
        self.requests.send(request).await.map_err(|_| Error::Ended("discovery stream"))
    }

    /// Subscribes to everything of a type; `known` are names and versions from an earlier session.
    ///
    /// # Errors
    /// If the stream has ended.
    pub async fn subscribe_wildcard(&mut self, type_url: &str, known: &[(&str, &str)]) -> Result<(), Error> {
        let known = known.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect();
        self.send(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            initial_resource_versions: known,
            ..DeltaDiscoveryRequest::default()
        })
        .await
    }

    /// Starts a type on demand: subscribes to and unsubscribes from `*` in one request.
    ///
    /// # Errors
    /// If the stream has ended.
    pub async fn start_on_demand(&mut self, type_url: &str) -> Result<(), Error> {
        self.change(type_url, &["*"], &["*"]).await
    }

    /// Subscribes to names of a type and unsubscribes from others.
    ///
    /// # Errors
    /// If the stream has ended.
    pub async fn change(&mut self, type_url: &str, subscribe: &[&str], unsubscribe: &[&str]) -> Result<(), Error> {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        self.send(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            resource_names_subscribe: names(subscribe),
            resource_names_unsubscribe: names(unsubscribe),
            ..DeltaDiscoveryRequest::default()
        })
        .await
    }

    /// The next response, added to what was collected; not acknowledged.
    ///
    /// # Errors
    /// If the stream ended (with its status), or nothing comes in [`PATIENCE`].
    pub async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Error> {
        self.next_within(PATIENCE).await
    }

    /// [`Session::next`] with another limit.
    ///
    /// # Errors
    /// As [`Session::next`].
    pub async fn next_within(&mut self, limit: Duration) -> Result<DeltaDiscoveryResponse, Error> {
        let response =
            timeout(limit, self.responses.message()).await.map_err(|_| Error::Timeout("discovery response"))?;
        let response = response?.ok_or(Error::Ended("discovery stream"))?;
        let state = self.state.entry(response.type_url.clone()).or_default();
        state.responses += 1;
        for name in &response.removed_resources {
            state.resources.remove(name);
            state.removed.insert(name.clone());
        }
        for resource in &response.resources {
            state.removed.remove(&resource.name);
            state.resources.insert(resource.name.clone(), resource.clone());
        }
        Ok(response)
    }

    /// Acknowledges a response.
    ///
    /// # Errors
    /// If the stream has ended.
    pub async fn ack(&mut self, response: &DeltaDiscoveryResponse) -> Result<(), Error> {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        })
        .await
    }

    /// Refuses a response.
    ///
    /// # Errors
    /// If the stream has ended.
    pub async fn nack(&mut self, response: &DeltaDiscoveryResponse, reason: &str) -> Result<(), Error> {
        let detail = RpcStatus { code: INVALID_ARGUMENT, message: reason.to_owned(), ..RpcStatus::default() };
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: Some(detail),
            ..DeltaDiscoveryRequest::default()
        })
        .await
    }

    /// What was collected of a type.
    pub fn collected(&self, type_url: &str) -> Collected {
        self.state.get(type_url).cloned().unwrap_or_default()
    }

    /// Takes and acknowledges responses until what was collected of `type_url` satisfies `done`.
    ///
    /// # Errors
    /// If it does not in [`PATIENCE`], or the stream ended.
    pub async fn collect_until(
        &mut self,
        type_url: &str,
        done: impl Fn(&Collected) -> bool,
    ) -> Result<Collected, Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let collected = self.collected(type_url);
            if done(&collected) {
                return Ok(collected);
            }
            let response = timeout_at(deadline, self.next()).await.map_err(|_| Error::Timeout("discovery state"))??;
            self.ack(&response).await?;
        }
    }
}

/// The body of a resource as a message of its type.
///
/// # Errors
/// If there is none, of another type, or not decodable.
pub fn decode<M: Message + Default>(resource: &Resource, type_url: &str) -> Result<M, Error> {
    let body =
        resource.resource.as_ref().filter(|any| any.type_url == type_url).ok_or(Error::Ended("resource body"))?;
    Ok(M::decode(body.value.as_ref())?)
}
