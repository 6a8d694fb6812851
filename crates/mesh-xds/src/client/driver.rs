//! The client over gRPC: keeps a stream open, reconnects, and passes questions on.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_proto::core::Node;
use mesh_proto::discovery::DeltaDiscoveryRequest;
use mesh_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};

use super::demand::{Demand, Question, Waiting};
use super::{Machine, Mode, Sink, Status};

/// Requests that may wait to be written to the stream.
const REQUESTS: usize = 64;

/// How the client behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// First wait before connecting again; doubles with each failure.
    pub min_backoff: Duration,
    /// Longest wait before connecting again.
    pub max_backoff: Duration,
    /// Time for the connection, until the server has answered the call.
    pub opening: Duration,
    /// Time from then until a stream's first response: when many clients come at once, a server serves them one after the other, and
    /// who comes again stands behind all others.
    pub first_response: Duration,
    /// Time for the server to take a request.
    pub send: Duration,
    /// Largest response, in bytes.
    pub max_response: usize,
    /// Most names subscribed to, per type.
    pub max_names: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            min_backoff: Duration::from_millis(500),
            max_backoff: Duration::from_secs(15),
            opening: Duration::from_secs(30),
            first_response: Duration::from_secs(180),
            send: Duration::from_secs(30),
            max_response: 64 << 20,
            max_names: 65_536,
        }
    }
}

/// What a stream is opened over.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The channel; see [`endpoint`] for settings that detect a dead one.
    pub channel: Channel,
    /// Goes with the call; see [`metadata`].
    pub metadata: MetadataMap,
}

/// Makes connections. Called anew for each attempt, so that tokens and roots are read again.
pub trait Connect: Send {
    /// One attempt.
    fn connect(&mut self) -> impl Future<Output = Result<Connection, ConnectError>> + Send;
}

impl<F, Fut> Connect for F
where
    F: FnMut() -> Fut + Send,
    Fut: Future<Output = Result<Connection, ConnectError>> + Send,
{
    fn connect(&mut self) -> impl Future<Output = Result<Connection, ConnectError>> + Send {
        self()
    }
}

/// Why there is no connection, in words for the operator.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConnectError(String);

impl ConnectError {
    /// Wraps a reason.
    pub fn new(reason: impl fmt::Display) -> Self {
        Self(reason.to_string())
    }
}

/// An endpoint whose channels notice a dead server: HTTP/2 keepalive every 30 s with 10 s to answer, 5 s to connect.
/// `address` is a URI such as `https://culvertd.culvert-system.svc:15012`.
pub fn endpoint(address: &str) -> Result<Endpoint, ConnectError> {
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(ConnectError::new)?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20))
}

/// The metadata of a node proxy: bearer token and cluster. Fails if either has characters that a header cannot hold.
pub fn metadata(token: &str, cluster_id: &str) -> Result<MetadataMap, ConnectError> {
    let mut metadata = MetadataMap::new();
    let bearer = format!("Bearer {}", token.trim());
    let mut bearer =
        MetadataValue::try_from(bearer).map_err(|_| ConnectError::new("the token is not a header value"))?;
    bearer.set_sensitive(true);
    metadata.insert("authorization", bearer);
    let cluster =
        MetadataValue::try_from(cluster_id).map_err(|_| ConnectError::new("the cluster id is not a header value"))?;
    metadata.insert("clusterid", cluster);
    Ok(metadata)
}

/// What the rest of the process sees of the client. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    demand: Demand,
    status: watch::Receiver<Status>,
}

impl Handle {
    /// Asks for names of on-demand types.
    pub fn demand(&self) -> &Demand {
        &self.demand
    }

    /// The state, now and when it changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Resolves when every type has had its first complete answer; with `false` if the client ended before.
    pub async fn synced(&self) -> bool {
        self.status.clone().wait_for(|status| status.synced).await.is_ok()
    }
}

/// Runs a [`Machine`] over gRPC.
#[derive(Debug)]
pub struct Driver {
    machine: Machine,
    options: Options,
    questions: mpsc::Receiver<Question>,
    waiting: Waiting,
    status: watch::Sender<Status>,
}

impl Driver {
    /// A client that is not connected yet. For `node` and `types` see [`Machine::new`].
    pub fn new(node: Node, types: impl IntoIterator<Item = (Arc<str>, Mode)>, options: Options) -> (Self, Handle) {
        let (demand, questions) = Demand::new();
        let (status, statuses) = watch::channel(Status::default());
        let machine = Machine::new(node, types, options.max_names);
        let driver = Self { machine, options, questions, waiting: Waiting::default(), status };
        driver.publish(|status| status.disconnected_since = Some(SystemTime::now()));
        (driver, Handle { demand, status: statuses })
    }

    /// Connects and stays connected, until the future is dropped. `sink` is called on this task.
    pub async fn run(mut self, mut connect: impl Connect, mut sink: impl Sink) {
        let mut backoff = self.options.min_backoff;
        let mut is_first = true;
        loop {
            let end = self.session(&mut connect, &mut sink).await;
            self.machine.disconnected();
            // Attempts may fail for hours: each is counted, and the first is told.
            if end.worked || is_first {
                tracing::warn!(error = %end.error, "discovery stream ended");
            } else {
                tracing::debug!(error = %end.error, "no discovery stream");
            }
            is_first = false;
            self.publish(|status| {
                status.connected_since = None;
                status.disconnected_since.get_or_insert_with(SystemTime::now);
                *status.terminations.entry(end.kind).or_default() += 1;
                status.last_error = Some(end.error);
            });
            if end.worked {
                backoff = self.options.min_backoff;
            }
            // Between half of it and all of it, so that the clients of a server that went away do not come back at once.
            let wait = backoff.mul_f64(0.5 + 0.5 * fastrand::f64());
            backoff = (backoff * 2).min(self.options.max_backoff);
            self.idle(wait).await;
        }
    }

    /// Takes questions while there is no stream.
    async fn idle(&mut self, wait: Duration) {
        let sleep = tokio::time::sleep(wait);
        tokio::pin!(sleep);
        loop {
            tokio::select! {
                () = &mut sleep => return,
                Some(question) = self.questions.recv() => self.ask(question),
            }
        }
    }

    async fn session(&mut self, connect: &mut impl Connect, sink: &mut impl Sink) -> End {
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        let (patience, first) = (self.options.opening, self.options.first_response);
        // Before the call: some servers answer it only once they have read a request.
        self.machine.connected();
        while requests.capacity() > 0
            && let Some(request) = self.machine.request()
        {
            let _ = requests.try_send(request);
        }
        let opening = open(connect, outgoing, self.options.max_response);
        let mut responses = match self.until(opening, patience).await {
            Ok(Ok(responses)) => responses,
            Ok(Err(end)) => return end,
            Err(_) => return End::new("ConnectionError", format!("no connection within {patience:?}"), false),
        };
        self.publish(|status| {
            status.connected_since = Some(SystemTime::now());
            status.disconnected_since = None;
            status.connections += 1;
            status.last_error = None;
        });
        let mut worked = false;
        let deadline = tokio::time::Instant::now() + first;
        loop {
            while let Some(request) = self.machine.request() {
                match tokio::time::timeout(self.options.send, requests.send(request)).await {
                    Ok(Ok(())) => {}
                    // The reason is in the responses.
                    Ok(Err(_)) => break,
                    Err(_) => return End::new("Error", "the server takes no requests".into(), worked),
                }
            }
            tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        worked = true;
                        self.receive(response, sink);
                    }
                    Ok(None) => return End::new("Complete", "the server closed the stream".into(), worked),
                    Err(status) => return End::status(&status, worked),
                },
                Some(question) = self.questions.recv() => self.ask(question),
                () = tokio::time::sleep_until(deadline), if !worked => {
                    return End::new("Error", format!("no response within {first:?}"), false);
                }
            }
        }
    }

    /// Waits for `work`, at most `limit`, and takes questions meanwhile.
    async fn until<T>(
        &mut self,
        work: impl Future<Output = T>,
        limit: Duration,
    ) -> Result<T, tokio::time::error::Elapsed> {
        let work = tokio::time::timeout(limit, work);
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                Some(question) = self.questions.recv() => self.ask(question),
            }
        }
    }

    fn receive(&mut self, response: mesh_proto::discovery::DeltaDiscoveryResponse, sink: &mut impl Sink) {
        let bytes = response.encoded_len() as u64;
        let type_url: Arc<str> = response.type_url.as_str().into();
        let received = self.machine.received(response, SystemTime::now(), sink);
        for rejection in &received.rejections {
            tracing::warn!(r#type = %type_url, resource = rejection.name, reason = rejection.reason, "resource refused");
        }
        self.waiting.resolve(&type_url, &received);
        self.publish(|status| {
            if let Some(status) = status.types.get_mut(&type_url) {
                status.bytes += bytes;
            }
        });
    }

    fn ask(&mut self, question: Question) {
        use super::Subscribed;

        match self.machine.subscribe(&question.type_url, &question.name) {
            Ok(Subscribed::Pending) => self.waiting.add(question),
            Ok(Subscribed::Answered(answer)) => drop(question.reply.send(Ok(answer))),
            Err(error) => drop(question.reply.send(Err(error.into()))),
        }
    }

    /// Shows the machine's state, and whatever `change` adds.
    fn publish(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(|status| {
            status.synced = self.machine.is_synced();
            for (type_url, now) in self.machine.status() {
                let shown = status.types.entry(type_url.clone()).or_default();
                let bytes = shown.bytes;
                shown.clone_from(now);
                shown.bytes = bytes;
            }
            change(status);
        });
    }
}

/// How a session ended.
struct End {
    kind: &'static str,
    error: String,
    /// Whether the server answered at all: then the next attempt need not wait long.
    worked: bool,
}

impl End {
    fn new(kind: &'static str, error: String, worked: bool) -> Self {
        Self { kind, error, worked }
    }

    fn status(status: &tonic::Status, worked: bool) -> Self {
        // A server that asks to come back (drain, age, too far behind) is no error.
        let kind = match status.code() {
            tonic::Code::Unavailable | tonic::Code::Aborted if worked => "Reconnect",
            _ => "Error",
        };
        Self::new(kind, format!("{:?}: {}", status.code(), status.message()), worked)
    }
}

async fn open(
    connect: &mut impl Connect,
    outgoing: mpsc::Receiver<DeltaDiscoveryRequest>,
    max_response: usize,
) -> Result<Streaming<mesh_proto::discovery::DeltaDiscoveryResponse>, End> {
    let connection = connect.connect().await.map_err(|error| End::new("ConnectionError", error.to_string(), false))?;
    let mut client = AggregatedDiscoveryServiceClient::new(connection.channel).max_decoding_message_size(max_response);
    let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
    *request.metadata_mut() = connection.metadata;
    let response = client
        .delta_aggregated_resources(request)
        .await
        .map_err(|status| End { kind: "ConnectionError", ..End::status(&status, false) })?;
    Ok(response.into_inner())
}
