//! The node proxy: everything that touches bytes from outside, in a process without any privilege.

use std::io;
use std::net::SocketAddr;

pub mod admit;
mod app;
pub mod config;
pub mod connect;
mod contact;
pub mod descriptors;
pub mod dial;
pub mod discovery;
pub mod dns;
pub mod dump;
pub mod error;
pub mod forwarded;
pub mod guard;
pub mod handover;
pub mod held;
pub mod inbound;
pub mod jail;
pub mod live;
pub mod local;
pub mod lookup;
pub mod metrics;
pub mod open;
pub mod outbound;
pub mod plaintext;
pub mod plan;
pub mod pods;
mod profiling;
pub mod record;
pub mod sockets;
pub mod sources;
pub mod state;
mod sys;
pub mod tunnels;
pub mod turns;
pub mod worker;

pub use config::Config;

/// Why the proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The flags.
    #[error(transparent)]
    Config(#[from] config::InvalidConfig),
    /// Privilege could not be given up.
    #[error(transparent)]
    Jail(#[from] jail::JailError),
    /// The log could not be set up.
    #[error("cannot set up the log: {0}")]
    Log(#[from] mesh_runtime::log::LogError),
    /// Files that the proxy needs cannot be read.
    #[error("cannot read what the proxy needs: {}", .0.join("; "))]
    Files(Vec<String>),
    /// The main thread's runtime.
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    /// The signal handlers.
    #[error("cannot install signal handlers: {0}")]
    Signals(io::Error),
    /// A pod that is gone still has sockets open.
    #[error(transparent)]
    StillAlive(pods::StillAlive),
    /// The thread that talks to the agent has panicked.
    #[error("the conversation with the agent has ended; restart the proxy")]
    NoHandover,
    /// The worker threads, or the one that talks to the agent.
    #[error("cannot start the worker threads: {0}; lower --workers or raise the limit of processes")]
    Workers(io::Error),
    /// An address to listen on.
    #[error("cannot listen on {flag} {address}: {source}; does another proxy run in this network namespace?")]
    Bind {
        /// The flag.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// The control plane's address.
    #[error(transparent)]
    ControlPlane(mesh_identity::connector::ConnectorError),
}

/// Open files that a process may have where nobody has said anything, and the kernel does not say either.
const FEW_FILES: u64 = 1024;

/// Runs the proxy until it is told to end. Must be called before the process has a second thread.
///
/// # Errors
/// Why it did not start.
pub fn run(mut config: Config) -> Result<(), Error> {
    config.check()?;
    let format = config.log_format.parse()?;
    mesh_runtime::memory::keep_freed();
    // Every connection has two files. A lower limit carries fewer of them, and is no reason not to start.
    let raised = mesh_runtime::limits::raise_open_files();
    // The control group is out of sight in the jail.
    let memory = mesh_runtime::limits::memory();
    config.max_held_memory.get_or_insert_with(|| config::default_held_memory(memory));
    jail::enter(config.uid)?;
    let unreadable = app::check_files(&config);
    if !unreadable.is_empty() {
        return Err(Error::Files(unreadable));
    }
    let log = mesh_runtime::log::init(&config.log_level, format)?;
    let file_limit = match raised {
        Ok(files) => files,
        Err(error) => {
            tracing::warn!(%error, "cannot raise the limit of open files");
            mesh_runtime::limits::open_files_limit().unwrap_or(FEW_FILES)
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let file_limit = usize::try_from(file_limit).unwrap_or(usize::MAX);
    runtime.block_on(app::run(config, file_limit, log))
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
