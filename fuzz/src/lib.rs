//! What the fuzz targets do with their input: one module per parser of bytes that a pod, a peer, a client or a file sends.
//!
//! `fuzz_targets/` gives these functions to libFuzzer (`cargo xtask soak`, or `cargo fuzz run <target>`); `tests/replay.rs`
//! gives them every input that is kept in `corpus/`, on every `cargo test`. A target fails by panicking: because the code
//! under test does, or because something that must hold of its result does not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a target reports by panicking")]

pub mod authority;
pub mod certificate_request;
pub mod cni;
mod cursor;
pub mod discovery;
pub mod dns;
pub mod forwarded;
pub mod hbone_client;
pub mod hbone_server;
pub mod http;
pub mod node;
pub mod objects;
pub mod peer_certificate;
pub mod port_names;
pub mod seqpacket;
pub mod token;
pub mod xds_client;
pub mod xds_server;

use std::future::Future;
use std::time::Duration;

/// Longest that one input may take; more is a hang. Sanitizers and a busy machine included.
const PATIENCE: Duration = Duration::from_secs(20);

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Name of the target and of its corpus.
    pub name: &'static str,
    /// Tries one input.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "authority", run: authority::run },
    Target { name: "certificate_request", run: certificate_request::run },
    Target { name: "cni", run: cni::run },
    Target { name: "discovery", run: discovery::run },
    Target { name: "dns", run: dns::run },
    Target { name: "forwarded", run: forwarded::run },
    Target { name: "hbone_client", run: hbone_client::run },
    Target { name: "hbone_server", run: hbone_server::run },
    Target { name: "http", run: http::run },
    Target { name: "node", run: node::run },
    Target { name: "objects", run: objects::run },
    Target { name: "peer_certificate", run: peer_certificate::run },
    Target { name: "port_names", run: port_names::run },
    Target { name: "seqpacket", run: seqpacket::run },
    Target { name: "token", run: token::run },
    Target { name: "xds_client", run: xds_client::run },
    Target { name: "xds_server", run: xds_server::run },
];

/// Runs `work` on a runtime of its own.
///
/// # Panics
/// If it hangs.
fn on_runtime<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await.expect("the input must not hang") })
}
