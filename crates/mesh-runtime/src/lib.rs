//! The process around the mesh: drain, signals, readiness, admin pages, metrics, logs, and sockets that carry
//! file descriptors. It knows no mesh word; every component uses it.

pub mod admin;
pub mod drain;
pub mod http;
pub mod limits;
pub mod log;
pub mod memory;
pub mod metrics;
pub mod ready;
pub mod seqpacket;
pub mod signal;
