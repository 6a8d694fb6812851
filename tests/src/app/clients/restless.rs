//! A program whose first instruction is a connect: what a pod does at its very beginning must be captured too.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use crate::app::net;

/// `culvert-app restless`. Prints how many connections it had when its time is over.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Where to; all in turn.
    #[arg(long, required = true)]
    to: Vec<SocketAddr>,
    /// What is sent on each connection.
    #[arg(long)]
    text: String,
    /// Ends after this many milliseconds.
    #[arg(long = "for", default_value_t = 1000)]
    time: u64,
    /// Milliseconds of rest after each connection.
    #[arg(long, default_value_t = 0)]
    pause: u64,
}

/// Connects and sends until its time is over; failures are what may happen.
///
/// # Errors
/// None.
pub fn run(options: &Options) -> io::Result<bool> {
    let end = Instant::now() + Duration::from_millis(options.time);
    let mut done = vec![0_u64; options.to.len()];
    let mut turn = 0;
    while Instant::now() < end {
        let at = turn % options.to.len();
        turn += 1;
        let Ok(mut stream) = TcpStream::connect_timeout(&options.to[at], Duration::from_millis(500)) else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        if stream.write_all(options.text.as_bytes()).is_ok() {
            done[at] += 1;
        }
        std::thread::sleep(Duration::from_millis(options.pause));
    }
    net::emit(&json!({"ok": true, "sent": done}));
    Ok(true)
}
