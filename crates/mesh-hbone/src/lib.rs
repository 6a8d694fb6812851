//! HBONE: one HTTP/2 CONNECT stream per application connection, over any byte stream (normally TLS 1.3).
//!
//! [`client::handshake`] turns a byte stream into a [`Tunnel`], on which any number of callers [`Tunnel::open`]
//! a [`Stream`]; [`pool::Pool`] keeps tunnels per key. [`server::serve`] is the other end. [`copy::splice`] joins a
//! stream with a TCP connection, [`copy::relay`] joins two TCP connections, both with half-close and reset carried over.
//! [`memory`] is the account of what all of them hold for receivers that do not take it.
//!
//! This crate knows neither certificates nor policy: whoever hands in the byte stream has authenticated it. The HTTP/2
//! implementation behind it is an inner matter; no type of it appears in the interface. Timers and tasks are tokio's,
//! so everything here runs inside a tokio runtime (current-thread or not) with time enabled.

pub mod authority;
pub mod backlog;
mod budget;
pub mod client;
mod connection;
pub mod copy;
mod flood;
pub mod headers;
pub mod memory;
pub mod options;
pub mod pace;
mod piece;
pub mod pool;
pub mod server;
pub mod stream;

pub use authority::{Authority, Target};
pub use backlog::Backlog;
pub use client::{Accepted, Connect, OpenError, Slot, Tunnel};
pub use connection::ConnectionError;
pub use headers::Headers;
pub use memory::Memory;
pub use options::Options;
pub use stream::{ReadHalf, ResetReason, Stream, StreamError, WriteHalf};
