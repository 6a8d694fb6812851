//! The wire: message types and gRPC stubs generated from `proto/`. No hand-written logic lives here;
//! `mesh-model` says what the messages mean and which of them are valid.

#![allow(missing_docs, clippy::all, reason = "generated code")]

mod wire {
    include!(concat!(env!("OUT_DIR"), "/wire.rs"));
}

/// What culvertd tells beyond the shared discovery protocol, `culvert.discovery.v1`.
pub use wire::culvert::discovery::v1 as extension;
/// Hand-over of pods and sockets between the agent and the proxy of one node, `culvert.node.v1`.
pub use wire::culvert::node::v1 as node;
/// The part of `envoy.config.core.v3` that discovery requests carry.
pub use wire::envoy::config::core::v3 as core;
/// Delta discovery, `envoy.service.discovery.v3`, cut down to what the mesh uses.
pub use wire::envoy::service::discovery::v3 as discovery;
/// `google.rpc.Status`, which a NACK carries.
pub use wire::google::rpc;
/// L4 authorization, `istio.security`.
pub use wire::istio::security;
/// Certificate signing, `istio.v1.auth`.
pub use wire::istio::v1::auth as ca;
/// Workload discovery, `istio.workload`: what a node proxy learns about workloads and services.
pub use wire::istio::workload;
