//! A server that checks what arrives: numbered requests and numbered streams. It counts on its side what
//! [`super::storm`] counts on the client's.
//!
//! A connection begins with one byte. `r`: a request, 8 bytes (big endian), answered with the same. `s`: a stream of
//! 8-byte numbers from 0 without a gap, each given back, until the client's end. `q`: the counts, a line of JSON.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::net;

/// First byte of a request's connection.
pub const REQUEST: u8 = b'r';
/// First byte of a stream.
pub const STREAM: u8 = b's';
/// First byte of a question for the counts.
pub const QUERY: u8 = b'q';

/// `culvert-app numbered`.
#[derive(Debug, Args)]
pub struct Options {
    /// Where to listen.
    #[arg(long, required = true)]
    listen: Vec<SocketAddr>,
}

/// What the server counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Requests received whole.
    pub requests: u64,
    /// Requests whose number had come before: something was sent twice.
    pub duplicates: u64,
    /// Streams begun.
    pub streams: u64,
    /// Streams that ended with the client's end.
    pub ended_streams: u64,
    /// Numbers received on streams.
    pub messages: u64,
    /// Numbers that were not the next one.
    pub gaps: u64,
}

#[derive(Debug, Default)]
struct State {
    counts: Counts,
    seen: HashSet<u64>,
}

type Shared = Arc<Mutex<State>>;

/// Serves until killed.
///
/// # Errors
/// A port cannot be had.
pub async fn run(options: Options) -> io::Result<bool> {
    let state = Shared::default();
    let mut servers = tokio::task::JoinSet::new();
    for at in options.listen {
        servers.spawn(serve(net::listen(at)?, Arc::clone(&state)));
    }
    while servers.join_next().await.is_some() {}
    Ok(true)
}

async fn serve(listener: TcpListener, state: Shared) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let state = Arc::clone(&state);
                // What breaks is seen in the counts of both sides.
                tokio::spawn(async move { one(stream, &state).await.ok() });
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

async fn one(mut stream: TcpStream, state: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match stream.read_u8().await? {
        REQUEST => {
            let number = stream.read_u64().await?;
            count(state, |state| {
                state.counts.requests += 1;
                state.counts.duplicates += u64::from(!state.seen.insert(number));
            });
            stream.write_u64(number).await?;
            // The client closes first, as most do; what it still sends is nothing that this knows.
            stream.read(&mut [0; 1]).await.map(drop)
        }
        STREAM => {
            count(state, |state| state.counts.streams += 1);
            numbers(&mut stream, state).await?;
            count(state, |state| state.counts.ended_streams += 1);
            stream.shutdown().await
        }
        QUERY => {
            let text = count(state, |state| serde_json::to_string(&state.counts))?;
            stream.write_all(format!("{text}\n").as_bytes()).await
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Until the client's end, which must not cut a number in two.
async fn numbers(stream: &mut TcpStream, state: &Shared) -> io::Result<()> {
    let (mut expected, mut buffer, mut have) = (0_u64, [0; 8192], 0);
    loop {
        let got = stream.read(&mut buffer[have..]).await?;
        have += got;
        if got == 0 {
            return if have == 0 { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        let whole = have - have % 8;
        for number in buffer[..whole].as_chunks::<8>().0.iter().map(|bytes| u64::from_be_bytes(*bytes)) {
            count(state, |state| {
                state.counts.messages += 1;
                state.counts.gaps += u64::from(number != expected);
            });
            expected = number.wrapping_add(1);
        }
        stream.write_all(&buffer[..whole]).await?;
        buffer.copy_within(whole..have, 0);
        have -= whole;
    }
}

fn count<T>(state: &Shared, work: impl FnOnce(&mut State) -> T) -> T {
    work(&mut state.lock().unwrap_or_else(PoisonError::into_inner))
}
