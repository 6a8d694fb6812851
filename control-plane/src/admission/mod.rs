//! The validation webhook: what the source would refuse is refused before it is stored, with field and fix. It never
//! holds a cluster up: while it is away the API server goes on without it (`failurePolicy: Ignore`), and the source still
//! keeps the last good version.

mod bundle;
mod review;
mod server;

pub use bundle::Bundle;
pub use server::{PATH, serve};
