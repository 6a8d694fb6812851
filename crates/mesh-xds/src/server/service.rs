//! The server over gRPC: one task and one [`Machine`] per client.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use mesh_proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::{Catalog, ClientStatus, Limits, Machine};

/// Requests taken at once.
const MAX_BATCH: usize = 16;

/// How the service behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// What one client may ask for.
    pub limits: Limits,
    /// Clients at a time; more are refused.
    pub max_clients: usize,
    /// Clients that may bring their initial versions at a time, because those are large; more wait.
    pub max_syncing: usize,
    /// Largest request, in bytes.
    pub max_request: usize,
    /// Time for the first request, for an ACK, and for the client to take a response.
    pub patience: Duration,
    /// Life of a stream, less up to a tenth; after it the client must come back and authenticate again.
    pub max_age: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            max_clients: 4096,
            max_syncing: 64,
            max_request: 64 << 20,
            patience: Duration::from_secs(60),
            max_age: Duration::from_secs(3600),
        }
    }
}

/// An authenticated client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Who it is, for status and logs.
    pub name: String,
}

/// A tonic server with the settings that a discovery service needs: HTTP/2 keepalive, so that dead clients end.
pub fn transport() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .tcp_nodelay(true)
        .max_concurrent_streams(64)
}

type Authenticated = Pin<Box<dyn Future<Output = Result<Client, Status>> + Send>>;
type Authenticate = dyn Fn(&MetadataMap, Option<SocketAddr>) -> Authenticated + Send + Sync;

/// The discovery service over a [`Catalog`]. Cheap to clone; clones share the clients.
///
/// Serve it only when the catalog is filled: a client that comes back to an empty one drops all that it has.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

struct Inner {
    catalog: Arc<Catalog>,
    authenticate: Box<Authenticate>,
    limits: Arc<Limits>,
    options: Options,
    places: Arc<Semaphore>,
    syncing: Arc<Semaphore>,
    next_id: AtomicU64,
    nacks: AtomicU64,
    clients: Mutex<BTreeMap<u64, ClientStatus>>,
    closing: watch::Sender<bool>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("clients", &self.clients().len()).finish_non_exhaustive()
    }
}

impl Service {
    /// Serves `catalog` to the clients that `authenticate` accepts, by the metadata of their call and the address that it
    /// comes from, if that is known. It may take its time, but must bound that itself.
    pub fn new<F>(
        catalog: Arc<Catalog>,
        authenticate: impl Fn(&MetadataMap, Option<SocketAddr>) -> F + Send + Sync + 'static,
        options: Options,
    ) -> Self
    where
        F: Future<Output = Result<Client, Status>> + Send + 'static,
    {
        Self(Arc::new(Inner {
            catalog,
            authenticate: Box::new(move |metadata, peer| Box::pin(authenticate(metadata, peer))),
            limits: Arc::new(options.limits.clone()),
            places: Arc::new(Semaphore::new(options.max_clients)),
            syncing: Arc::new(Semaphore::new(options.max_syncing)),
            options,
            next_id: AtomicU64::new(1),
            nacks: AtomicU64::new(0),
            clients: Mutex::new(BTreeMap::new()),
            closing: watch::Sender::new(false),
        }))
    }

    /// The gRPC service, to be added to a tonic server.
    pub fn server(&self) -> AggregatedDiscoveryServiceServer<Self> {
        AggregatedDiscoveryServiceServer::new(self.clone()).max_decoding_message_size(self.0.options.max_request)
    }

    /// The connected clients.
    pub fn clients(&self) -> Vec<ClientStatus> {
        self.0.clients.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// How many responses clients have refused so far, those that have left included.
    pub fn nacks(&self) -> u64 {
        self.0.nacks.load(Ordering::Relaxed)
    }

    /// Ends all streams, now and later, so that a server can drain; the clients reconnect elsewhere.
    pub fn close(&self) {
        self.0.closing.send_replace(true);
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let client = (self.0.authenticate)(request.metadata(), request.remote_addr()).await?;
        let place = Arc::clone(&self.0.places)
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted("too many discovery clients"))?;
        let stream = Stream::new(Arc::clone(&self.0), client, request.remote_addr(), place);
        // One response waits here, the rest in the catalog.
        let (responses, outgoing) = mpsc::channel(1);
        tokio::spawn(stream.run(request.into_inner(), responses));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// One client's stream.
struct Stream {
    service: Arc<Inner>,
    id: u64,
    machine: Machine,
    ack_by: Option<Instant>,
    _place: OwnedSemaphorePermit,
}

impl Stream {
    fn new(service: Arc<Inner>, client: Client, address: Option<SocketAddr>, place: OwnedSemaphorePermit) -> Self {
        let id = service.next_id.fetch_add(1, Ordering::Relaxed);
        tracing::info!(id, client = client.name, address = ?address, "discovery client connected");
        let status = ClientStatus {
            id,
            client: client.name,
            node_id: String::new(),
            address,
            connected_since: SystemTime::now(),
            types: Vec::new(),
        };
        service.clients.lock().unwrap_or_else(PoisonError::into_inner).insert(id, status);
        let machine = Machine::new(Arc::clone(&service.limits));
        Self { service, id, machine, ack_by: None, _place: place }
    }

    async fn run(
        mut self,
        requests: Streaming<DeltaDiscoveryRequest>,
        responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    ) {
        let end = tokio::select! {
            end = self.exchange(requests, &responses) => end,
            () = responses.closed() => Ok(()),
        };
        match end {
            Ok(()) => tracing::info!(id = self.id, "discovery client left"),
            Err(status) => {
                tracing::info!(id = self.id, code = ?status.code(), reason = status.message(), "discovery stream ended");
                // A client that does not read learns it from the end of the stream.
                let _ = responses.try_send(Err(status));
            }
        }
    }

    async fn exchange(
        &mut self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        responses: &mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    ) -> Result<(), Status> {
        let Options { patience, max_age, .. } = self.service.options;
        let mut changes = self.service.catalog.changes();
        let mut closing = self.service.closing.subscribe();
        let end_of_life = tokio::time::sleep(max_age.mul_f64(1.0 - 0.1 * fastrand::f64()));
        tokio::pin!(end_of_life);

        // Before a message is read: the versions that a client brings are decoded only with a permit.
        let permit = tokio::time::timeout(patience, Arc::clone(&self.service.syncing).acquire_owned());
        let mut permit = Some(permit.await.map_err(|_| Status::unavailable("busy: reconnect"))?);
        let first = tokio::time::timeout(patience, requests.message());
        match first.await.map_err(|_| Status::deadline_exceeded("no request came"))?? {
            Some(first) => self.take(first, &mut requests)?,
            None => return Ok(()),
        }
        loop {
            self.respond(responses).await?;
            permit.take_if(|_| !self.machine.is_syncing());
            self.publish();
            tokio::select! {
                request = requests.message() => match request? {
                    Some(request) => self.take(request, &mut requests)?,
                    None => return Ok(()),
                },
                changed = changes.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                }
                _ = closing.wait_for(|closing| *closing) => {
                    return Err(Status::unavailable("shutting down: reconnect"));
                }
                () = &mut end_of_life => return Err(Status::unavailable("the stream is old: reconnect")),
                () = until(self.ack_by) => return Err(Status::deadline_exceeded("no ACK came")),
            }
        }
    }

    /// Takes a request, and others that are there already: so that of several types asked for at once none is answered
    /// before its turn.
    fn take(
        &mut self,
        request: DeltaDiscoveryRequest,
        requests: &mut Streaming<DeltaDiscoveryRequest>,
    ) -> Result<(), Status> {
        let catalog = self.service.catalog.snapshot();
        let now = SystemTime::now();
        self.note_nack(&request);
        self.machine.request(&catalog, request, now)?;
        for _ in 0..MAX_BATCH {
            match requests.message().now_or_never() {
                Some(Ok(Some(request))) => {
                    self.note_nack(&request);
                    self.machine.request(&catalog, request, now)?;
                }
                Some(Err(status)) => return Err(status),
                // The end of the stream shows again at the next read.
                Some(Ok(None)) | None => break,
            }
        }
        self.ack_by = None;
        Ok(())
    }

    fn note_nack(&self, request: &DeltaDiscoveryRequest) {
        if let Some(error) = &request.error_detail {
            self.service.nacks.fetch_add(1, Ordering::Relaxed);
            let (r#type, reason) = (&request.type_url, &error.message);
            tracing::warn!(id = self.id, r#type, reason, "discovery client refused a response");
        }
    }

    /// Sends all that need not wait for an ACK.
    async fn respond(
        &mut self,
        responses: &mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    ) -> Result<(), Status> {
        let patience = self.service.options.patience;
        while let Some(response) = self.machine.respond(&self.service.catalog.snapshot())? {
            match tokio::time::timeout(patience, responses.send(Ok(response))).await {
                Ok(Ok(())) => {}
                // It is gone; the stream's end follows.
                Ok(Err(_)) => return Ok(()),
                Err(_) => return Err(Status::deadline_exceeded("responses are not read")),
            }
        }
        if !self.machine.is_in_flight() {
            self.ack_by = None;
        } else if self.ack_by.is_none() {
            self.ack_by = Some(Instant::now() + patience);
        }
        Ok(())
    }

    fn publish(&self) {
        let mut clients = self.service.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(status) = clients.get_mut(&self.id) {
            self.machine.node_id().clone_into(&mut status.node_id);
            status.types = self.machine.status();
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.service.clients.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
