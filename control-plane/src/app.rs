//! Puts the parts together. Everything is bound and read before anything is served, so that a mistake in the set-up is an
//! error at start.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_identity::Clock;
use mesh_runtime::log::LogHandle;
use mesh_runtime::ready::Readiness;
use mesh_runtime::signal::Requester;
use mesh_runtime::{admin, drain, http, metrics};
use mesh_xds::server::{self, Catalog};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::info;

use crate::admission::{self, Bundle};
use crate::ca::kubernetes::{Root, RootError, TokenReviewer};
use crate::ca::serving::ServingError;
use crate::ca::{self, Authenticator, Authorities, CaService, Policy, State, StateError};
use crate::config::{self, Config};
use crate::index::{Index, Roster};
use crate::ingest::{Cluster, ClusterError, Directory, DirectoryError, Kubernetes, Limits, Source, Timing};
use crate::serve::{self, Metrics, Pipeline, View};
use crate::status::{Facts, Status};

/// Time for everything to end once asked; a little more than the gRPC server's own.
const DRAIN: Duration = Duration::from_secs(7);

/// Why the control plane cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} for {purpose}: {error}; choose another with --{option}")]
    Bind {
        /// What for.
        purpose: &'static str,
        /// The option that says where.
        option: &'static str,
        /// Where.
        address: SocketAddr,
        /// The system's answer.
        error: io::Error,
    },
    /// The state directory is not usable.
    #[error(transparent)]
    State(#[from] StateError),
    /// The cluster's authority is not usable.
    #[error(transparent)]
    Root(#[from] RootError),
    /// culvertd's own certificate cannot be made.
    #[error(transparent)]
    Serving(#[from] ServingError),
    /// The source cannot be read.
    #[error(transparent)]
    Source(#[from] DirectoryError),
    /// There is no way to the API server.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The gRPC server ended.
    #[error("the gRPC server failed: {0}")]
    Server(#[from] tonic::transport::Error),
    /// A part ended that must not.
    #[error("{0} ended unexpectedly; see the log")]
    Ended(&'static str),
}

/// The control plane, bound and ready to run.
pub struct App {
    source: Source,
    cluster: Option<InCluster>,
    grpc: TcpListener,
    tls: Arc<ServerConfig>,
    authority: CaService,
    discovery: server::Service,
    metrics: Metrics,
    pipeline: Pipeline,
    viewer: watch::Receiver<Arc<View>>,
    facts: Facts,
    readiness: Readiness,
    /// Servers of metrics, readiness and admin pages, with what they serve.
    pages: Vec<(http::Server, http::Router)>,
    addresses: Addresses,
}

/// Where the control plane listens.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// Discovery and certificates.
    pub xds: SocketAddr,
    /// Metrics.
    pub metrics: SocketAddr,
    /// Readiness.
    pub ready: SocketAddr,
    /// Admin pages.
    pub admin: SocketAddr,
    /// The validation webhook; none without a cluster.
    pub webhook: Option<SocketAddr>,
}

impl App {
    /// Opens the state, binds every address, puts the parts together. `quit` is what `POST /quitquitquit` asks.
    ///
    /// # Errors
    /// Something of that is not possible.
    pub async fn new(config: Config, log: &LogHandle, quit: Requester) -> Result<Self, AppError> {
        let clock = Clock::system();
        let Origin { source, authorities, authenticator, followed } = Origin::open(&config, &clock).await?;
        let watches = source.watches();
        let leading = followed.as_ref().map(|followed| followed.status.leading());
        let tls = ca::serving_config(authorities.clone(), config.xds_san.clone(), clock.clone())?;
        let roster = Arc::new(Roster::default());
        let node_proxies = config.node_proxies.clone();
        let policy = Policy {
            trust_domain: config.index.trust_domain.clone(),
            node_proxies: config.node_proxies,
            pods_are_vouched_for: matches!(source, Source::Kubernetes(_)),
        };
        let authority = CaService::new(authorities, authenticator.clone(), roster.clone(), policy, clock);
        let catalog = Arc::new(Catalog::new());
        let discovery = serve::discovery(catalog.clone(), authenticator);
        let registry = metrics::Registry::new();
        let counted = registry.register(|registry| {
            Metrics::register(registry, catalog.clone(), discovery.clone(), watches.clone(), leading.clone())
        });
        let (view, viewer) = watch::channel(Arc::new(View::default()));
        let facts = Facts::new(&source, viewer.clone(), discovery.clone(), node_proxies);
        let readiness = Readiness::new();

        let grpc = bind("discovery", "xds-addr", config.xds_addr).await?;
        let cluster = match followed {
            Some(followed) => Some(InCluster::bind(followed, config.webhook_addr).await?),
            None => None,
        };
        let (metrics_page, metrics_addr) = page("metrics", "metrics-addr", config.metrics_addr).await?;
        let (ready_page, ready_addr) = page("readiness", "ready-addr", config.ready_addr).await?;
        let (admin_page, admin_addr) = page("the admin pages", "admin-addr", config.admin_addr).await?;
        let addresses = Addresses {
            xds: local("discovery", "xds-addr", config.xds_addr, grpc.local_addr())?,
            metrics: metrics_addr,
            ready: ready_addr,
            admin: admin_addr,
            webhook: cluster.as_ref().map(|cluster| cluster.address),
        };
        let mut metrics_routes = http::Router::new();
        registry.mount(&mut metrics_routes);
        let mut ready_routes = http::Router::new();
        readiness.mount(&mut ready_routes);
        let mut admin_routes = admin::routes(log, quit);
        serve::mount(&mut admin_routes, viewer.clone(), catalog.clone(), discovery.clone(), watches, leading);
        Ok(Self {
            source,
            cluster,
            grpc,
            tls,
            authority,
            discovery,
            metrics: counted.clone(),
            pipeline: Pipeline { index: Box::new(Index::new(config.index)), roster, catalog, view, metrics: counted },
            viewer,
            facts,
            readiness,
            pages: vec![
                (metrics_page, metrics_routes),
                (ready_page, ready_routes),
                (admin_page.local_only(), admin::finish(admin_routes)),
            ],
            addresses,
        })
    }

    /// Where it listens; of use where a port was left to the system.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Whether it serves.
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// Serves until `stop` resolves, then drains.
    ///
    /// # Errors
    /// The source cannot be read at start, or a part failed.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), AppError> {
        let Addresses { xds, metrics, ready, admin, webhook } = self.addresses;
        info!(%xds, %metrics, %ready, %admin, webhook = webhook.map(tracing::field::display), "listening");
        let (trigger, watcher) = drain::channel();
        let (batches, source_batches) = mpsc::channel(16);
        // Before the readiness page answers: what is not registered yet is not missed by it.
        let synced = self.readiness.register("the source is read");
        let serving = self.readiness.register("discovery is served");
        let mut pages = JoinSet::new();
        for (server, router) in self.pages {
            let watcher = watcher.clone();
            pages.spawn(async move { server.serve(router, async move { watcher.draining().await }).await });
        }
        let mut source = tokio::spawn(self.source.run(batches));
        let mut beside =
            self.cluster.map(|cluster| cluster.run(self.tls.clone(), self.facts, watcher.clone())).unwrap_or_default();
        let mut pipeline = tokio::spawn(self.pipeline.run(source_batches, synced, watcher.clone()));
        let mut viewer = self.viewer;
        let grpc = async {
            // A client that came back to an empty catalog would drop everything that it has.
            tokio::select! {
                _ = viewer.wait_for(|view| view.synced) => {}
                () = watcher.draining() => return Ok(()),
            }
            info!("serving");
            serving.done();
            serve::grpc(self.grpc, TlsAcceptor::from(self.tls), self.discovery, self.authority, &self.metrics, watcher)
                .await
        };
        tokio::pin!(grpc, stop);
        let result = tokio::select! {
            () = &mut stop => Ok(()),
            // Each of the two ends when the other has; the source knows why.
            _ = &mut pipeline => match (&mut source).await {
                Ok(Err(error)) => Err(error.into()),
                Ok(Ok(())) => Err(AppError::Ended("the pipeline")),
                Err(_) => Err(AppError::Ended("the source")),
            },
            error = failed(&mut beside) => Err(error),
            result = &mut grpc => Err(result.err().map_or(AppError::Ended("the gRPC server"), AppError::from)),
        };
        if result.is_ok() {
            info!("draining");
            let drained = trigger.drain(DRAIN);
            let (drained, _) = tokio::join!(drained, grpc.as_mut());
            info!(?drained, "drained");
        }
        source.abort();
        beside.shutdown().await;
        pages.shutdown().await;
        result
    }
}

/// Where everything comes from: objects, the authority, and who knows the tokens.
struct Origin {
    source: Source,
    authorities: Authorities,
    authenticator: Authenticator,
    /// What is kept up to date in the cluster, if there is one.
    followed: Option<Followed>,
}

/// What is kept up to date in a cluster.
struct Followed {
    root: Root,
    bundle: Bundle,
    status: Status,
}

impl Origin {
    async fn open(config: &Config, clock: &Clock) -> Result<Self, AppError> {
        let trust_domain = &config.index.trust_domain;
        match &config.source {
            config::Source::Directory { manifests, state } => {
                let state = State::open(state, trust_domain, clock.now())?;
                Ok(Self {
                    source: Source::Directory(Directory::new(manifests, Limits::default(), Timing::default())),
                    authorities: ca::always(state.authority),
                    authenticator: Authenticator::local(state.token_key, clock.clone()),
                    followed: None,
                })
            }
            config::Source::Kubernetes(credentials) => {
                let cluster = Cluster::connect(credentials).await?;
                let namespace = &config.system_namespace;
                let (root, authorities) = Root::open(&cluster, namespace, trust_domain, clock.clone()).await?;
                let reviewer = TokenReviewer::new(&cluster, config.token_audiences.clone(), clock.clone());
                let bundle = Bundle::new(&cluster, authorities.clone());
                let status = Status::new(&cluster, namespace, &config.pod_name);
                Ok(Self {
                    source: Source::Kubernetes(Kubernetes::new(cluster)),
                    authorities,
                    authenticator: Authenticator::kubernetes(reviewer),
                    followed: Some(Followed { root, bundle, status }),
                })
            }
        }
    }
}

/// What runs beside the servers in a cluster: its authority is followed, objects are checked before they are stored, and
/// one of the replicas writes what there is to say.
struct InCluster {
    followed: Followed,
    webhook: TcpListener,
    address: SocketAddr,
}

impl InCluster {
    async fn bind(followed: Followed, address: SocketAddr) -> Result<Self, AppError> {
        let (purpose, option) = ("the validation webhook", "webhook-addr");
        let webhook = bind(purpose, option, address).await?;
        let address = local(purpose, option, address, webhook.local_addr())?;
        Ok(Self { followed, webhook, address })
    }

    fn run(self, tls: Arc<ServerConfig>, facts: Facts, watcher: drain::Watcher) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        let Followed { root, bundle, status } = self.followed;
        tasks.spawn(root.run());
        tasks.spawn(bundle.run());
        tasks.spawn(status.run(facts, watcher.clone()));
        tasks.spawn(async move { admission::serve(self.webhook, &tls, watcher).await });
        tasks
    }
}

/// Waits until one of the tasks that run beside the servers ends, which none must: without the root's, the authority would
/// not be followed any more, and nobody would know.
async fn failed(beside: &mut JoinSet<()>) -> AppError {
    match beside.join_next().await {
        Some(ended) => {
            tracing::error!(error = ended.err().map(tracing::field::display), "a part beside the servers ended");
            AppError::Ended("a part that follows the cluster")
        }
        // Without a cluster there is nothing beside.
        None => std::future::pending().await,
    }
}

async fn bind(purpose: &'static str, option: &'static str, address: SocketAddr) -> Result<TcpListener, AppError> {
    TcpListener::bind(address).await.map_err(|error| AppError::Bind { purpose, option, address, error })
}

async fn page(
    purpose: &'static str,
    option: &'static str,
    address: SocketAddr,
) -> Result<(http::Server, SocketAddr), AppError> {
    let server =
        http::Server::bind(address).await.map_err(|error| AppError::Bind { purpose, option, address, error })?;
    let bound = local(purpose, option, address, server.local_addr())?;
    Ok((server, bound))
}

fn local(
    purpose: &'static str,
    option: &'static str,
    address: SocketAddr,
    bound: io::Result<SocketAddr>,
) -> Result<SocketAddr, AppError> {
    bound.map_err(|error| AppError::Bind { purpose, option, address, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_beside_the_servers_that_ends_is_an_error() {
        for panics in [false, true] {
            let mut beside = JoinSet::new();
            beside.spawn(std::future::pending());
            beside.spawn(async move { assert!(!panics, "as asked") });
            assert!(matches!(failed(&mut beside).await, AppError::Ended(_)));
        }
        // Where there is none, none is missed.
        let none = tokio::time::timeout(Duration::from_millis(10), failed(&mut JoinSet::new())).await;
        assert!(none.is_err());
    }
}
