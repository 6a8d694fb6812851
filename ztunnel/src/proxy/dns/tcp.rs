//! Connections of applications to port 53. Queries that the mesh can answer are answered; from the first bytes on that are
//! anything else, the connection is carried as any other: bytes are only looked at, and taken when they are answered.
//!
//! What is behind port 53 need not be DNS, nor a resolver: a service of the mesh on that port is reached through the
//! ordinary path, by tunnel if that is how it is reached.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::answer::{Decision, Transport, decide};
use super::message::{self, HEADER};
use super::metrics::Outcome;
use crate::proxy::dial;
use crate::proxy::open::PodStream;
use crate::proxy::outbound;
use crate::proxy::pods::Pod;
use crate::proxy::worker::{Accepted, Worker};

/// Longest query that is looked at: the longest name leaves room for options.
const MAX_QUERY: usize = 512;

/// Bytes before a query that tell its length.
const PREFIX: usize = 2;

/// How long the first query is waited for: a server may be what speaks first.
const FIRST: Duration = Duration::from_millis(500);

/// How long a client that was answered may take to ask again.
const IDLE: Duration = Duration::from_secs(10);

/// Longest that a client may take to read an answer.
const WRITE: Duration = Duration::from_secs(10);

/// Queries that are answered on one connection; the rest is the resolver's.
const QUERIES: usize = 1000;

/// What is to become of a connection.
enum Next {
    /// It goes to where it was addressed, and counts as this.
    HandOver(Outcome),
    /// It is at its end.
    Close,
}

/// What most connections that are not answered are.
const HAND_OVER: Next = Next::HandOver(Outcome::HandedOver);

/// Serves one connection to its end.
pub async fn serve(worker: &Arc<Worker>, pod: &Arc<Pod>, mut accepted: Accepted) {
    let token = pod.live.token();
    let next = tokio::select! {
        biased;
        () = pod.live.closed() => return dial::reset(accepted.stream),
        next = answer(worker, pod, &mut accepted.stream) => next,
    };
    drop(token);
    match next {
        Ok(Next::HandOver(outcome)) => {
            worker.shared.dns.metrics.count(outcome);
            match registered_anew(accepted.stream) {
                Ok(stream) => outbound::serve(worker, pod, Accepted { stream, ..accepted }).await,
                Err(error) => tracing::error!(%error, ?pod, "cannot carry a connection to port 53"),
            }
        }
        Ok(Next::Close) => {}
        Err(error) => {
            tracing::debug!(%error, ?pod, "a DNS connection ended");
            dial::reset(accepted.stream);
        }
    }
}

/// The stream as the runtime knows a new one. Who peeks has told the runtime that nothing is there to be read, and bytes
/// that have been seen and left would not wake up anybody again.
fn registered_anew(stream: PodStream) -> io::Result<PodStream> {
    stream.map(|stream| TcpStream::from_std(stream.into_std()?))
}

/// Answers queries as long as they can be answered.
async fn answer(worker: &Worker, pod: &Pod, stream: &mut PodStream) -> io::Result<Next> {
    let shared = &worker.shared;
    let Ok(_permit) = pod.dns.connections.try_acquire() else { return Ok(Next::HandOver(Outcome::RateLimited)) };
    let mut random = fastrand::Rng::new();
    let mut buffer = vec![0; PREFIX + MAX_QUERY];
    for answered in 0..QUERIES {
        let wait = if answered == 0 { FIRST } else { IDLE };
        let peeked = match timeout(wait, peek(stream, &mut buffer)).await {
            Ok(peeked) => peeked?,
            Err(_) if answered == 0 => Peeked::Other,
            // Half a query is none, and who has been answered has no reason to wait for more.
            Err(_) => Peeked::End,
        };
        let length = match peeked {
            Peeked::Query(length) => length,
            Peeked::Other => return Ok(HAND_OVER),
            Peeked::End if answered == 0 => return Ok(HAND_OVER),
            Peeked::End => return Ok(Next::Close),
        };
        if !pod.dns.take() {
            return Ok(Next::HandOver(Outcome::RateLimited));
        }
        let Some(query) = buffer.get(PREFIX..PREFIX + length) else { return Ok(HAND_OVER) };
        let snapshot = shared.state.snapshot();
        let local = shared.local(pod);
        let decision = decide(Some(&snapshot), &local, &shared.dns.domain, query, Transport::Tcp, &mut random);
        let (answer, outcome) = match decision {
            Decision::Answer(answer, outcome) => (answer, outcome),
            Decision::Forward | Decision::Drop => return Ok(HAND_OVER),
        };
        let Ok(size) = u16::try_from(answer.len()) else { return Ok(HAND_OVER) };
        // Taken now, all of it: it was seen.
        let Some(seen) = buffer.get_mut(..PREFIX + length) else { return Ok(HAND_OVER) };
        stream.read_exact(seen).await?;
        let told = [size.to_be_bytes().as_slice(), &answer].concat();
        timeout(WRITE, stream.write_all(&told)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        shared.dns.metrics.count(outcome);
    }
    Ok(HAND_OVER)
}

/// What stands at the beginning of what has not been read.
enum Peeked {
    /// A whole query of this length.
    Query(usize),
    /// Something else.
    Other,
    /// The client sends no more.
    End,
}

/// Waits for a whole query, or for what cannot become one.
async fn peek(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Peeked> {
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        let peeked = stream.try_io(Interest::READABLE, || {
            let seen = recv(stream.as_fd().as_raw_fd(), buffer, MsgFlags::MSG_PEEK)?;
            match judge(buffer.get(..seen).unwrap_or_default()) {
                _ if seen == 0 => Ok(Peeked::End),
                Some(judged) => Ok(judged),
                // Bytes that are not enough count as none: only more of them wake this up again.
                None => Err(io::ErrorKind::WouldBlock.into()),
            }
        });
        match peeked {
            Ok(peeked) => return Ok(peeked),
            // There will be no more of it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && ready.is_read_closed() => {
                return Ok(Peeked::Other);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// What these first bytes are; none if it takes more to tell.
fn judge(bytes: &[u8]) -> Option<Peeked> {
    let length = usize::from(message::u16_at(bytes, 0)?);
    let query = bytes.get(PREFIX..).unwrap_or_default();
    // A query has a header, and a question of at least a root, a type and a class.
    if !(HEADER + 5..=MAX_QUERY).contains(&length) || (query.len() >= HEADER && !message::is_query(query)) {
        return Some(Peeked::Other);
    }
    (query.len() >= length).then_some(Peeked::Query(length))
}
