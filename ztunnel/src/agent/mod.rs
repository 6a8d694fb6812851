//! The node's agent: prepares pods, loads eBPF, opens sockets in their namespaces and hands them to the proxy. It
//! parses nothing that a pod or a peer sent.
//!
//! A pod is announced on `cni.sock` ([`announce`]) and enrolled by one task ([`manager`]) step by step ([`pod`]): rules
//! and a route in its namespace ([`pod_network`]), listeners ([`sockets`]), programs and maps ([`capture`]). The proxy
//! learns of it and gets its sockets on `proxy/agent.sock` ([`handover`]). All that matters lies in the kernel: an
//! agent that dies changes nothing, the next one adopts what it finds ([`state`]).

mod adopt;
pub mod announce;
pub mod capture;
pub mod config;
pub mod drift;
pub mod enrolment;
pub mod handover;
pub mod host;
pub mod maker;
pub mod manager;
mod metrics;
pub mod netlink;
pub mod netns;
pub mod plugin;
pub mod pod;
pub mod pod_network;
pub mod preflight;
mod refusals;
pub mod run_dir;
pub mod selftest;
pub mod sock_diag;
pub mod sockets;
pub mod state;
mod uninstall;

#[cfg(test)]
mod sys;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_runtime::log::{LogError, LogHandle};
use mesh_runtime::ready::Readiness;
use mesh_runtime::signal::Shutdown;
use mesh_runtime::{admin, http, limits, log, seqpacket};
use tokio::task::JoinSet;

pub use config::Config;

use capture::{CaptureError, NodeCapture};
use enrolment::{AnySource, Enrolment, Removal, SourceError};
use host::{Choices, Host};
use maker::Maker;
use manager::Manager;
use preflight::PreflightError;
use run_dir::{RunDir, RunDirError};
use selftest::SelfTestError;
use state::{State, StateError};

/// Why the agent did not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Logs.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The machine lacks something.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The agent's folder.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The programs.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Capture is in place and does nothing.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// The pods' files.
    #[error(transparent)]
    State(#[from] StateError),
    /// Where labels come from.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The CNI plugin cannot be removed.
    #[error("the CNI plugin stays: {0}")]
    Plugin(#[from] plugin::PluginError),
    /// A socket of the agent.
    #[error("{path}: {source}")]
    Socket {
        /// Where.
        path: String,
        /// What failed.
        #[source]
        source: seqpacket::Error,
    },
    /// The admin pages can change the agent, and whoever reaches their port may.
    #[error(
        "--admin-addr {0} can be reached from other machines; an address of this one only, such as 127.0.0.1, is wanted"
    )]
    AdminNotLocal(std::net::SocketAddr),
    /// The address of the admin pages.
    #[error("cannot listen on {address} (--admin-addr): {source}")]
    Admin {
        /// The address.
        address: std::net::SocketAddr,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The runtime, a thread or a signal handler.
    #[error("cannot start: {0}")]
    Start(#[source] io::Error),
    /// A task ended that never should.
    #[error("a task of the agent failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Time after which the first pods and labels have been looked at.
const STARTED: Duration = Duration::from_secs(2);
/// Time without a pod that comes or goes after which none is expected soon.
const REST: Duration = Duration::from_secs(10);

/// How long what blocks is waited for before the node is left without the mesh: pods are killed after 10 s.
const LAST_THREADS: Duration = Duration::from_secs(3);

/// Threads for system calls that block shortly: memory of each stays with the process.
const BLOCKING_THREADS: usize = 4;

/// Runs the agent until it is told to end. Capture stays in force after that, unless the mesh is being taken off the
/// cluster: then every pod is released, and nothing is left.
///
/// # Errors
/// When it cannot start, with everything that is missing; or when one of its sockets fails.
pub fn run(config: &Config) -> Result<(), Error> {
    if let Some(address) = config.admin_addr.filter(|address| !address.ip().is_loopback()) {
        return Err(Error::AdminNotLocal(address));
    }
    let log = log::init(&config.log_level, config.log_format.parse()?)?;
    // Each pod takes some: a lower limit serves fewer pods, and is no reason not to start.
    if let Err(error) = limits::raise_open_files() {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    if config.uninstall {
        pod_network::use_proc(&config.proc_dir);
        let run_dir = RunDir::open(&config.run_dir, config.proxy_uid)?;
        return uninstall::uninstall(config, &run_dir);
    }
    let run_dir = RunDir::open_when_free(&config.run_dir, config.proxy_uid)?;
    preflight::check(config)?;
    pod_network::use_proc(&config.proc_dir);
    let (cgroup_root, choices) = (config.cgroup2_root(), Choices::from(config));
    let capture = NodeCapture::open(&config.bpffs, &cgroup_root, choices.kubelet(), config.ebpf_log)?;
    let host = Host::new(capture, cgroup_root, choices).map_err(Error::Start)?;
    host.look_for_foreign_programs()?;
    selftest::run(&host.capture)?;
    // One thread is enough for what the agent does by itself; what blocks is done on a few others, which end when they are
    // not needed for a while.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .map_err(Error::Start)?;
    let removal = Removal::default();
    let result = runtime.block_on(serve(config, &run_dir, Arc::new(host), &log, &removal));
    if result.is_ok() && removal.is_wanted() {
        // What is still under way in a thread would put back what is removed.
        runtime.shutdown_timeout(LAST_THREADS);
        return uninstall::uninstall(config, &run_dir);
    }
    // Threads that wait for the kernel must not hold up the end.
    runtime.shutdown_background();
    result
}

async fn serve(
    config: &Config,
    run_dir: &RunDir,
    host: Arc<Host>,
    log: &LogHandle,
    removal: &Removal,
) -> Result<(), Error> {
    let mut shutdown = Shutdown::new().map_err(Error::Start)?;
    let readiness = Readiness::new();
    let adopting = readiness.register("adopting pods");
    let mut tasks = Tasks::new();
    if config.ebpf_log {
        let host = Arc::clone(&host);
        tasks.spawn(async move { host.capture.forward_logs().await.map(|never| match never {}).map_err(Error::from) });
    }
    let source = AnySource::open(config, removal).await?;
    // Before the sockets are there, and before pods are adopted, which may take long: those that start meanwhile wait.
    if let Some(plugin) = config.plugin() {
        let (readiness, waiting) = (readiness.clone(), readiness.register(plugin::CHAINED));
        tasks.spawn(async move {
            plugin.keep(readiness, waiting).await;
            Ok(())
        });
    }
    let manager = start(run_dir, config.proxy_uid, &host, source, &readiness, &mut tasks)?;
    let served = manager.clone();
    if let Some(address) = config.admin_addr {
        let failed = |source| Error::Admin { address, source };
        let server = http::Server::bind(address).await.map_err(failed)?.local_only();
        let mut router = admin::routes(log, shutdown.requester());
        readiness.mount(&mut router);
        metrics::registry(host, manager).mount(&mut router);
        let router = admin::finish(router);
        tasks.spawn(async move {
            server.serve(router, std::future::pending()).await;
            Ok(())
        });
    }
    adopting.done();
    tracing::info!(run_dir = %config.run_dir.display(), "ready");
    tasks.spawn(async move {
        return_memory(served).await;
        Ok(())
    });
    tokio::select! {
        reason = shutdown.wait() => {
            if removal.is_wanted() {
                tracing::info!(?reason, "ending, and with it the mesh on this node");
            } else {
                tracing::info!(?reason, "ending; capture stays in force");
            }
            Ok(())
        }
        Some(ended) = tasks.join_next() => ended?,
    }
}

/// Gives memory back when the agent has started, and whenever pods have come or gone and no more do.
async fn return_memory(manager: Manager) {
    let uids = || manager.pods().iter().map(|pod| pod.info.uid.clone()).collect::<BTreeSet<_>>();
    tokio::time::sleep(STARTED).await;
    mesh_runtime::memory::rest();
    let (mut handled, mut last) = (uids(), BTreeSet::new());
    loop {
        tokio::time::sleep(REST).await;
        let now = uids();
        if now == last && now != handled {
            mesh_runtime::memory::rest();
            handled = now.clone();
        }
        last = now;
    }
}

/// Tasks of which none should end by itself.
type Tasks = JoinSet<Result<(), Error>>;

/// Adopts what is there and opens the agent's sockets. Needs a tokio runtime.
fn start(
    run_dir: &RunDir,
    proxy_uid: u32,
    host: &Arc<Host>,
    source: Option<AnySource>,
    readiness: &Readiness,
    tasks: &mut Tasks,
) -> Result<Manager, Error> {
    let maker = Maker::start(Arc::clone(host)).map_err(Error::Start)?;
    let manager = Manager::start(Arc::clone(host), State::new(run_dir.state()))?;
    // The proxy's socket first: whoever announces a pod may expect that it is served.
    let proxies = bind(&run_dir.proxy_socket())?;
    run_dir.give(&run_dir.proxy_socket(), proxy_uid)?;
    let announcers = bind(&run_dir.cni_socket())?;
    let served = manager.clone();
    tasks.spawn(async move {
        handover::serve(proxies, proxy_uid, served, maker).await;
        Ok(())
    });
    let kubernetes = source.as_ref().and_then(AnySource::kubernetes).cloned();
    let enrolment = Enrolment::start(run_dir.path(), manager.clone(), source);
    if let Some(kubernetes) = kubernetes {
        let enrolment = enrolment.clone();
        tasks.spawn(async move {
            enrolment.report(kubernetes).await;
            Ok(())
        });
    }
    let readiness = readiness.clone();
    tasks.spawn(async move {
        announce::serve(announcers, enrolment, readiness).await;
        Ok(())
    });
    Ok(manager)
}

fn bind(path: &Path) -> Result<seqpacket::Listener, Error> {
    seqpacket::Listener::bind(path, 0o600).map_err(|source| Error::Socket { path: path.display().to_string(), source })
}
