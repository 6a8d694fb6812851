//! The server over gRPC.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::body::Body;
use tonic::metadata::{GRPC_CONTENT_TYPE, MetadataMap};
use tonic::server::NamedService;
use tonic::{Request, Status};

use super::body::{self, Transfer};
use super::intake::{Bounds, Intake, Turns};
use super::stream::Stream;
use super::{Catalog, ClientStatus, Limits};

/// The one method.
const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// How the service behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// What one client may ask for.
    pub limits: Limits,
    /// Clients at a time; more are refused.
    pub max_clients: usize,
    /// Streams of one client at a time, by its name; more are refused. A client needs one, and some more as long as those that
    /// it lost do not show.
    pub max_streams: usize,
    /// Large requests that are read at a time, such as the first one with its versions, one of each client; more wait, but no
    /// longer than `patience`.
    pub max_reading: usize,
    /// Clients that are sent their first state at a time, so that each has it sooner; more wait, but no longer than
    /// `patience`.
    pub max_syncing: usize,
    /// Largest request, in bytes.
    pub max_request: usize,
    /// Time for a large request, from when it has its turn.
    pub reading: Duration,
    /// Time for the first request to begin; for a large one to have its turn; for an ACK, from when the client last took something of the response.
    pub patience: Duration,
    /// Time for an ACK, however slowly the client takes the response.
    pub max_transfer: Duration,
    /// Life of a stream, less up to a tenth; after it the client must come back and authenticate again.
    pub max_age: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            max_clients: 4096,
            max_streams: 16,
            max_reading: 16,
            max_syncing: 32,
            max_request: 64 << 20,
            // 7 MB, the versions of 100,000 resources, over a window of 64 KiB and a way of 100 ms take 11 s.
            reading: Duration::from_secs(30),
            patience: Duration::from_secs(60),
            max_transfer: Duration::from_secs(600),
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

/// What was sent to all clients so far, of one type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Responses.
    pub responses: u64,
    /// Resources in them.
    pub resources: u64,
}

/// A tonic server with the settings that a discovery service needs: HTTP/2 keepalive, so that dead clients end,
/// and windows as small as its requests are, so that what nobody reads takes little memory.
pub fn transport() -> tonic::transport::Server {
    /// Unread bytes of a stream, and of a connection with all its streams.
    const WINDOWS: (u32, u32) = (64 << 10, 128 << 10);
    tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .tcp_nodelay(true)
        .max_concurrent_streams(64)
}

type Authenticated = Pin<Box<dyn Future<Output = Result<Client, Status>> + Send>>;
type Authenticate = dyn Fn(&MetadataMap, Option<SocketAddr>) -> Authenticated + Send + Sync;

/// The discovery service over a [`Catalog`], to be added to a tonic server. Cheap to clone; clones share the clients.
///
/// Serve it only when the catalog is filled: a client that comes back to an empty one drops all that it has.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

pub(super) struct Inner {
    pub(super) catalog: Arc<Catalog>,
    authenticate: Box<Authenticate>,
    pub(super) limits: Arc<Limits>,
    pub(super) options: Options,
    places: Arc<Semaphore>,
    reading: Arc<Semaphore>,
    pub(super) syncing: Arc<Semaphore>,
    next_id: AtomicU64,
    nacks: AtomicU64,
    refused: AtomicU64,
    sent: Mutex<BTreeMap<Arc<str>, Sent>>,
    clients: Mutex<BTreeMap<u64, Arc<Mutex<ClientStatus>>>>,
    /// What each client has, by its name.
    own: Mutex<HashMap<String, Own>>,
    pub(super) closing: watch::Sender<bool>,
}

/// What one client has.
struct Own {
    streams: usize,
    /// To read a large request, before it asks for a turn among all.
    turn: Arc<Semaphore>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("clients", &lock(&self.0.clients).len()).finish_non_exhaustive()
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
            reading: Arc::new(Semaphore::new(options.max_reading)),
            syncing: Arc::new(Semaphore::new(options.max_syncing)),
            options,
            next_id: AtomicU64::new(1),
            nacks: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            sent: Mutex::new(BTreeMap::new()),
            clients: Mutex::new(BTreeMap::new()),
            own: Mutex::new(HashMap::new()),
            closing: watch::Sender::new(false),
        }))
    }

    /// The connected clients.
    pub fn clients(&self) -> Vec<ClientStatus> {
        let clients: Vec<_> = lock(&self.0.clients).values().cloned().collect();
        clients.iter().map(|client| lock(client).clone()).collect()
    }

    /// How many responses clients have refused so far, those that have left included.
    pub fn nacks(&self) -> u64 {
        self.0.nacks.load(Ordering::Relaxed)
    }

    /// How many clients were not let in so far.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    /// What was sent so far, by type. Types that the catalog never had are together under the empty name.
    pub fn sent(&self) -> BTreeMap<Arc<str>, Sent> {
        lock(&self.0.sent).clone()
    }

    /// Ends all streams, now and later, so that a server can drain; the clients reconnect elsewhere.
    pub fn close(&self) {
        self.0.closing.send_replace(true);
    }

    /// Lets the client in: the body of the answer, which a task of its own fills.
    async fn open<B>(&self, request: Request<B>) -> Result<body::Body, Status>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let client = (self.0.authenticate)(request.metadata(), request.remote_addr()).await?;
        let place = Arc::new(Place::take(&self.0, &client.name)?);
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        tracing::info!(id, client = client.name, "discovery client connected");
        let status = Arc::new(Mutex::new(ClientStatus {
            id,
            client: client.name,
            node_id: String::new(),
            address: request.remote_addr(),
            connected_since: SystemTime::now(),
            nacks: 0,
            types: Vec::new(),
        }));
        lock(&self.0.clients).insert(id, status.clone());
        // Each type has one response in flight.
        let transfer = Arc::new(Transfer::new(self.0.limits.max_types));
        let Options { max_request, patience, reading, .. } = self.0.options;
        let turns = Turns { own: Arc::clone(&place.turn), all: Arc::clone(&self.0.reading) };
        let bounds = Bounds { max: max_request, patience, reading };
        let requests = Intake::new(request.into_inner(), turns, bounds);
        let stream = Stream::new(Arc::clone(&self.0), id, status, transfer.clone(), place.clone());
        tokio::spawn(stream.run(requests));
        Ok(body::Body::new(transfer, place))
    }

    async fn answer<B>(self, request: http::Request<B>) -> http::Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if request.uri().path() != METHOD {
            return Status::unimplemented("there is no such method").into_http();
        }
        match self.open(Request::from_http(request)).await {
            Ok(body) => {
                let mut response = http::Response::new(Body::new(body));
                response.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
                response
            }
            Err(status) => {
                self.0.refused.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(code = ?status.code(), reason = status.message(), "discovery client refused");
                status.into_http()
            }
        }
    }
}

impl Inner {
    pub(super) fn note_nack(&self) {
        self.nacks.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note_sent(&self, type_url: &str, is_known: bool, resources: usize) {
        let mut sent = lock(&self.sent);
        // A client cannot make new ones.
        let type_url = if is_known { type_url } else { "" };
        if !sent.contains_key(type_url) {
            sent.insert(type_url.into(), Sent::default());
        }
        if let Some(sent) = sent.get_mut(type_url) {
            sent.responses += 1;
            sent.resources += resources as u64;
        }
    }

    pub(super) fn forget(&self, id: u64) {
        lock(&self.clients).remove(&id);
    }
}

/// A stream's place among those of all clients, and among those of its own.
pub(super) struct Place {
    service: Arc<Inner>,
    client: String,
    turn: Arc<Semaphore>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    fn take(service: &Arc<Inner>, client: &str) -> Result<Self, Status> {
        let full = |text: &str| Status::resource_exhausted(text);
        let permit = Arc::clone(&service.places).try_acquire_owned();
        let permit = permit.map_err(|_| full("too many discovery clients"))?;
        let mut all = lock(&service.own);
        let new = || Own { streams: 0, turn: Arc::new(Semaphore::new(1)) };
        let own = all.entry(client.to_owned()).or_insert_with(new);
        if own.streams >= service.options.max_streams {
            return Err(full("too many discovery streams of this client"));
        }
        own.streams += 1;
        let turn = Arc::clone(&own.turn);
        Ok(Self { service: Arc::clone(service), client: client.to_owned(), turn, _permit: permit })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = lock(&self.service.own);
        if let Some(own) = all.get_mut(&self.client) {
            own.streams -= 1;
            if own.streams == 0 {
                all.remove(&self.client);
            }
        }
    }
}

impl NamedService for Service {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl<B> tower_service::Service<http::Request<B>> for Service
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move { Ok(service.answer(request).await) })
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
