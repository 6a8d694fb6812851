//! The proxy put together: what is bound, what is started, in what order it ends.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_hbone::Memory;
use mesh_identity::ca_client::CaOptions;
use mesh_identity::{CaClient, Connector, FileToken, Store};
use mesh_runtime::admin;
use mesh_runtime::drain::{self, Drained};
use mesh_runtime::http::{Reply, Router, Server};
use mesh_runtime::log::LogHandle;
use mesh_runtime::metrics::Registry;
use mesh_runtime::ready::Readiness;
use mesh_runtime::signal::Shutdown;
use tokio::sync::oneshot::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::Error;
use super::config::Config;
use super::contact;
use super::descriptors::Descriptors;
use super::discovery::{self, ControlPlane, DiscoveryMetrics};
use super::dns::{Dns, DnsMetrics};
use super::dump::{Dump, Included};
use super::guard;
use super::handover::Handover;
use super::held;
use super::live::CloseReason;
use super::metrics::Metrics;
use super::pods::{Bounds, Pods, StillAlive};
use super::profiling;
use super::sockets::NodeCap;
use super::state::State;
use super::tunnels::Tunnels;
use super::worker::{Shared, Workers};

/// Time that forced connections have to end.
const FORCED: Duration = Duration::from_secs(1);

/// Time between two updates of the byte counters of connections that live long.
const PUBLISH: Duration = Duration::from_secs(1);

/// Updates between two looks at how many descriptors are open: before Linux 6.2 that takes a system call for each few of them.
const DESCRIPTORS_EVERY: u32 = 5;

/// Runs the proxy until it is told to end, on the main thread's runtime. It may have `file_limit` descriptors open.
///
/// # Errors
/// Why it could not start.
pub async fn run(config: Config, file_limit: usize, log: LogHandle) -> Result<(), Error> {
    let mut shutdown = Shutdown::new().map_err(Error::Signals)?;
    let (admin, ready, stats) = tokio::try_join!(
        bind("--admin-addr", config.admin_addr),
        bind("--ready-addr", config.ready_addr),
        bind("--metrics-addr", config.metrics_addr),
    )?;
    let readiness = Readiness::new();
    let (pending_discovery, pending_agent) =
        (readiness.register("first answer of discovery"), readiness.register("pods of this node, from the agent"));

    let registry = Registry::new();
    let metrics = Metrics::register(&registry);
    let (driver, discovery) = discovery::client(&config);
    let collector = DiscoveryMetrics(discovery.clone());
    registry.register(|registry| registry.register_collector(Box::new(collector)));

    let state = State::new();
    let shared = Arc::new(Shared {
        state: Arc::clone(&state),
        lookup: discovery::lookup(&config, &discovery),
        certificates: certificates(&config)?,
        metrics: metrics.clone(),
        tunnels: Tunnels::default(),
        addresses: Arc::default(),
        hbone: mesh_hbone::Options::default(),
        dns: Dns::new(&config.cluster_domain, DnsMetrics::register(&registry)),
        network: config.network.clone(),
        node: config.node.clone(),
        cluster_id: config.cluster_id.clone(),
    });
    let (trigger, watcher) = drain::channel();
    let workers = Workers::start(config.worker_count(), &shared, &watcher).map_err(Error::Workers)?;
    drop(watcher);

    let (notices, orders) = mpsc::unbounded_channel();
    // What lies in stock must leave room for what is in use.
    let cap = NodeCap::new(config.stock_cap.min(file_limit / 8));
    let descriptors = Descriptors::new(file_limit);
    let bounds = Bounds {
        connections: config.max_connections_per_pod,
        stock: Arc::clone(&cap),
        descriptors: Arc::clone(&descriptors),
    };
    let memory = Memory::new(config.held_memory());
    let pods = Pods::new(Box::new(Arc::clone(&workers)), config.trust_domain.clone(), bounds, notices, memory.clone());
    let handover = Handover {
        agent_socket: config.agent_socket.clone(),
        pods: Arc::clone(&pods),
        notices: orders,
        pending: Some(pending_agent),
    };
    let control_plane = ControlPlane {
        connector: Connector::new(&config.xds_address, &config.ca_roots).map_err(Error::ControlPlane)?,
        token: FileToken::new(&config.token),
        cluster_id: config.cluster_id.clone(),
    };
    let synced = discovery.clone();
    let sink = state.sink(&config.node);
    tokio::spawn(driver.run(control_plane, sink));
    tokio::spawn(discovery::return_memory(discovery.clone()));
    tokio::spawn(contact::watch(discovery.clone()));
    tokio::spawn(async move {
        if synced.synced().await {
            // Only now the workers accept: to a proxy that knows nobody every destination is outside the mesh.
            state.set_complete();
            pending_discovery.done();
        }
    });
    let mut failure = handover.start().map_err(Error::Workers)?;
    tokio::spawn(guard::run(Arc::clone(&shared), Arc::clone(&pods)));
    tokio::spawn(held::run(memory, Arc::clone(&pods), shared.tunnels.clone(), metrics.clone()));
    tokio::spawn(publish(metrics, Arc::clone(&pods), Arc::clone(&cap), descriptors));

    let pages = Pages { log: log.clone(), readiness, registry };
    let dump = Dump { shared, pods: Arc::clone(&pods), cap, discovery };
    let ended = pages.serve(admin, ready, stats, dump, &shutdown);
    tracing::info!(node = config.node, workers = config.worker_count(), "ztunnel proxy started");

    let reason = tokio::select! {
        reason = shutdown.wait() => reason,
        failed = &mut failure => return Err(give_up(failed, &log)),
    };
    tracing::info!(?reason, connections = open_connections(&pods), deadline = ?config.drain_deadline, "draining");
    let drained = tokio::select! {
        drained = end(trigger, &pods, config.drain_deadline) => drained,
        _ = shutdown.wait() => Drained::Abandoned,
        failed = &mut failure => return Err(give_up(failed, &log)),
    };
    tracing::info!(?drained, "ended");
    workers.stop();
    ended.send_replace(true);
    log.flush(Duration::from_secs(1));
    Ok(())
}

/// The hand-over has ended, which it never does by itself. No thread is waited for: one may be what is stuck.
fn give_up(failed: Result<StillAlive, RecvError>, log: &LogHandle) -> Error {
    let error = failed.map_or(Error::NoHandover, Error::StillAlive);
    tracing::error!(%error, "ending at once");
    log.flush(Duration::from_secs(1));
    error
}

/// Lets connections end by themselves until the deadline, then tells them to.
pub(super) async fn end(trigger: drain::Trigger, pods: &Pods, deadline: Duration) -> Drained {
    let drained = trigger.drain(deadline + FORCED / 2);
    tokio::pin!(drained);
    tokio::select! {
        drained = &mut drained => return drained,
        () = tokio::time::sleep(deadline) => {}
    }
    for pod in pods.pods() {
        pod.live.close_all(&CloseReason::Drained);
    }
    drained.await
}

fn certificates(config: &Config) -> Result<Store, Error> {
    let connector = Arc::new(Connector::new(config.ca(), &config.ca_roots).map_err(Error::ControlPlane)?);
    let options = CaOptions { cluster_id: config.cluster_id.clone(), ..CaOptions::default() };
    let token = Arc::new(FileToken::new(&config.token));
    let client = CaClient::with_connector(Arc::clone(&connector), token, options);
    let store = Store::new(Arc::new(client), mesh_identity::Options::default());
    tokio::spawn(mesh_identity::roots::follow(connector, store.clone()));
    Ok(store)
}

async fn bind(flag: &'static str, address: SocketAddr) -> Result<Server, Error> {
    Server::bind(address).await.map_err(|source| Error::Bind { flag, address, source })
}

/// Says at start what else would be noticed only by a connection that fails.
pub fn check_files(config: &Config) -> Vec<String> {
    let readable = |flag: &str, path: &Path| match std::fs::File::open(path) {
        Ok(_) => None,
        Err(error) => Some(format!("{flag} {}: {error}; it must be readable for uid {}", path.display(), config.uid)),
    };
    [readable("--ca-roots", &config.ca_roots), readable("--token", &config.token)].into_iter().flatten().collect()
}

fn open_connections(pods: &Pods) -> usize {
    pods.pods().iter().map(|pod| pod.live.count()).sum()
}

async fn publish(metrics: Metrics, pods: Arc<Pods>, cap: Arc<NodeCap>, descriptors: Arc<Descriptors>) {
    let mut ticks = interval(PUBLISH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    metrics.descriptors_limit.set(i64::try_from(descriptors.limit()).unwrap_or(i64::MAX));
    for tick in (0..DESCRIPTORS_EVERY).cycle() {
        ticks.tick().await;
        if tick == 0 {
            match mesh_runtime::limits::open_files() {
                Ok(open) => {
                    descriptors.saw(open);
                    metrics.descriptors_open.set(i64::try_from(open).unwrap_or(i64::MAX));
                }
                Err(error) => tracing::debug!(%error, "cannot tell how many descriptors are open"),
            }
        }
        metrics.stock_idle.set(i64::try_from(cap.idle()).unwrap_or(i64::MAX));
        metrics.pods_pending.set(i64::try_from(pods.unserved_count()).unwrap_or(i64::MAX));
        for pod in pods.pods() {
            for connection in pod.live.connections() {
                connection.facts.publish_bytes();
            }
        }
    }
}

/// What is served about the process.
struct Pages {
    log: LogHandle,
    readiness: Readiness,
    registry: Registry,
}

impl Pages {
    /// Serves all pages, until the returned switch is set.
    fn serve(
        self,
        admin: Server,
        ready: Server,
        stats: Server,
        dump: Dump,
        shutdown: &Shutdown,
    ) -> watch::Sender<bool> {
        let ended = watch::Sender::new(false);
        let until = || {
            let mut ended = ended.subscribe();
            async move {
                // An error means that the process ends as well.
                let _ = ended.wait_for(|ended| *ended).await;
            }
        };
        let mut pages = admin::routes(&self.log, shutdown.requester());
        let dump = Arc::new(dump);
        pages.get(
            "/config_dump",
            "what decisions are made by, and what lives; ?include=workloads,pods for parts",
            move |request| {
                let dump = Arc::clone(&dump);
                let included = Included::read(request.parameter("include").as_deref());
                async move { Reply::json(&dump.json(&included)) }
            },
        );
        profiling::mount(&mut pages);
        tokio::spawn(admin.local_only().serve(admin::finish(pages), until()));
        let mut health = Router::new();
        self.readiness.mount(&mut health);
        tokio::spawn(ready.serve(health, until()));
        let mut numbers = Router::new();
        self.registry.mount(&mut numbers);
        tokio::spawn(stats.serve(numbers, until()));
        ended
    }
}
