//! The mesh on a real Kubernetes, from the shipped manifests: `kubectl apply` and one label encrypt a namespace, every
//! part is rolled out under load, and pods that come and go while agents are killed are never seen in clear.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "the figures of a run")]

mod cases;
mod churn;
mod cli;
mod drain;
mod ipv6;
mod kinds;
mod mesh;
mod page;
mod reboot;
mod removal;
mod rollout;
mod rotation;
