//! The node proxy: everything that touches bytes from outside, in a process without any privilege.

pub mod admit;
pub mod config;
pub mod connect;
pub mod dial;
pub mod error;
pub mod handover;
pub mod jail;
pub mod live;
pub mod local;
pub mod metrics;
pub mod plan;
pub mod pods;
pub mod record;
pub mod sockets;
mod sys;

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
}

/// Runs the proxy until it is told to end. Must be called before the process has a second thread.
///
/// # Errors
/// Why it did not start.
pub fn run(config: Config) -> Result<(), Error> {
    config.check()?;
    jail::enter(config.uid)?;
    Ok(())
}
