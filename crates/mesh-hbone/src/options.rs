//! The limits and times of a tunnel. The defaults are what other HBONE implementations use, so that both ends agree.

use std::sync::Arc;
use std::time::Duration;

use crate::Backlog;

/// Limits and times of one tunnel, either end. `Options::default()` is right for a mesh.
#[derive(Debug, Clone)]
pub struct Options {
    /// Flow-control window of each stream that we receive on, in bytes. Bounds what one slow reader can make us hold. Smaller
    /// while the share that pays for the tunnel is under pressure.
    pub stream_window: u32,
    /// Flow-control window of the whole connection, in bytes.
    pub connection_window: u32,
    /// Largest DATA frame that we accept, in bytes (16 KiB to 16 MiB - 1, RFC 9113 section 6.5.2). So much may have to wait for
    /// its rest, and so much may be kept by one byte of it.
    pub max_frame_size: u32,
    /// Bytes that one stream may have queued for the socket before `write` waits.
    pub send_buffer: usize,
    /// Bytes that one poll of a connection reads, and as many that it writes, before others on its thread have their turn.
    pub poll_budget: usize,
    /// Client: streams that we put on one tunnel at most; the peer's SETTINGS_MAX_CONCURRENT_STREAMS lowers it.
    pub client_streams: usize,
    /// Server: concurrent streams that we allow the peer, announced as SETTINGS_MAX_CONCURRENT_STREAMS.
    pub server_streams: u32,
    /// Largest header list that we accept, in bytes as RFC 9113 section 10.5.1 counts them.
    pub max_header_list: u32,
    /// Time between two PINGs, counted from the last answer.
    pub ping_interval: Duration,
    /// Time that the peer has to answer a PING before the tunnel counts as dead.
    pub ping_timeout: Duration,
    /// Time for the HTTP/2 connection preface.
    pub handshake_timeout: Duration,
    /// Where what this one tunnel holds is noted; by default it counts for nobody.
    pub backlog: Arc<Backlog>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            max_frame_size: 256 << 10,
            send_buffer: 512 << 10,
            // With TLS this takes 50 to 100 microseconds in each direction.
            poll_budget: 128 << 10,
            client_streams: 100,
            server_streams: 200,
            max_header_list: 16 << 10,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            handshake_timeout: Duration::from_secs(10),
            backlog: Arc::default(),
        }
    }
}
