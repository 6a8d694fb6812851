//! The control plane: reads Kubernetes objects, works out what every node proxy must know, and serves it.
//!
//! One pipeline: [`ingest`] (a source of objects) → typed events → [`index`] (pure, incremental) → [`serve`] (delta
//! discovery). [`ca`] signs, [`admission`] checks before anything is stored, [`status`] writes what the leader has to
//! say, [`api`] says which objects are valid; [`app`] puts the parts together; [`cli`] is the command line of whoever
//! runs all that.

pub mod admission;
pub mod api;
pub mod app;
pub mod ca;
pub mod cli;
pub mod commands;
pub mod config;
pub mod index;
pub mod ingest;
pub mod serve;
pub mod status;
