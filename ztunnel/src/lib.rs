//! The node proxy and its agent.

pub mod agent;
pub mod ask;
pub mod cni;
pub mod proxy;
