//! Bulk data in both directions at once, with checksums of what arrived.
//!
//! The client sends one line of JSON ([`Order`]), then its bytes. The server sends its bytes meanwhile, and when it has
//! all of the client's, one line of JSON ([`Receipt`]). Both send the same known stream, so each can check what it got.

use std::io;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::echo::Counts;
use super::net;

/// Written and read at once.
const CHUNK: usize = 256 << 10;

/// `culvert-app transfer`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// `host:port` of `echo --mode transfer`.
    #[arg(long)]
    to: String,
    /// Bytes to send on each connection.
    #[arg(long, default_value_t = 0)]
    send: u64,
    /// Bytes to receive on each connection.
    #[arg(long, default_value_t = 0)]
    receive: u64,
    /// Instead of a number of bytes, sends and/or receives (those given as not 0) for this long.
    #[arg(long)]
    seconds: Option<f64>,
    /// Connections at once.
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Leaves out the checksums, which cost more than the transfer.
    #[arg(long)]
    no_checksum: bool,
    /// Longest time for everything, in seconds.
    #[arg(long, default_value_t = 600.0)]
    bound: f64,
}

/// What the client asks of the server.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Order {
    /// Bytes that the client will send; none: until it closes its side.
    send: Option<u64>,
    /// Bytes that the server shall send; none: until the connection is closed.
    receive: Option<u64>,
    checksum: bool,
}

/// What the server got.
#[derive(Debug, Serialize, Deserialize)]
struct Receipt {
    bytes: u64,
    sha256: Option<String>,
}

/// The known stream: a block of a generator's output, with a counter at the head of each repetition.
struct Pattern {
    block: Vec<u8>,
    blocks: u64,
}

impl Pattern {
    fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut block = Vec::with_capacity(CHUNK);
        while block.len() < CHUNK {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend(state.to_le_bytes());
        }
        Self { block, blocks: 0 }
    }

    fn next(&mut self) -> &[u8] {
        self.block[..8].copy_from_slice(&self.blocks.to_le_bytes());
        self.blocks += 1;
        &self.block
    }

    /// SHA-256 of the first `bytes` of the stream.
    fn sha256(bytes: u64) -> String {
        let (mut pattern, mut hash, mut left) = (Self::new(), Sha256::new(), bytes);
        while left > 0 {
            let block = pattern.next();
            let part = usize::try_from(left).unwrap_or(CHUNK).min(block.len());
            hash.update(&block[..part]);
            left -= part as u64;
        }
        hex(&hash.finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Sends the stream, up to `bytes` or until `deadline`.
async fn send(to: &mut (impl AsyncWrite + Unpin), bytes: Option<u64>, deadline: Option<Instant>) -> io::Result<u64> {
    let (mut pattern, mut sent) = (Pattern::new(), 0_u64);
    while bytes.is_none_or(|b| sent < b) && deadline.is_none_or(|d| Instant::now() < d) {
        let block = pattern.next();
        let part = bytes.map_or(block.len(), |b| usize::try_from(b - sent).unwrap_or(CHUNK).min(block.len()));
        to.write_all(&block[..part]).await?;
        sent += part as u64;
    }
    to.flush().await?;
    Ok(sent)
}

/// Reads up to `bytes`, or to the end, or until `deadline`.
async fn receive(
    from: &mut (impl AsyncRead + Unpin),
    bytes: Option<u64>,
    deadline: Option<Instant>,
    checksum: bool,
) -> io::Result<Receipt> {
    let (mut buffer, mut hash, mut got) = (vec![0; CHUNK], Sha256::new(), 0_u64);
    while bytes.is_none_or(|b| got < b) && deadline.is_none_or(|d| Instant::now() < d) {
        let room = bytes.map_or(CHUNK, |b| usize::try_from(b - got).unwrap_or(CHUNK).min(CHUNK));
        let read = from.read(&mut buffer[..room]).await?;
        if read == 0 {
            break;
        }
        if checksum {
            hash.update(&buffer[..read]);
        }
        got += read as u64;
    }
    Ok(Receipt { bytes: got, sha256: checksum.then(|| hex(&hash.finalize())) })
}

/// Reads to the end: bytes and SHA-256.
pub(super) async fn drain(from: &mut TcpStream) -> io::Result<(u64, String)> {
    let receipt = receive(from, None, None, true).await?;
    Ok((receipt.bytes, receipt.sha256.unwrap_or_default()))
}

/// The server's side of one connection.
pub(super) async fn serve(stream: &mut TcpStream, counts: &mut Counts) -> io::Result<()> {
    let (from, mut to) = stream.split();
    let mut from = BufReader::with_capacity(CHUNK, from);
    let mut line = String::new();
    (&mut from).take(1024).read_line(&mut line).await?;
    let order: Order = serde_json::from_str(&line)?;
    let (sent, receipt) =
        tokio::join!(send(&mut to, order.receive, None), receive(&mut from, order.send, None, order.checksum));
    let receipt = receipt?;
    counts.received = receipt.bytes;
    // A client that receives without a bound closes in the middle.
    counts.sent = sent?;
    let line = serde_json::to_string(&receipt)? + "\n";
    to.write_all(line.as_bytes()).await?;
    to.shutdown().await
}

#[derive(Debug, Default)]
struct Done {
    sent: u64,
    received: u64,
    problem: Option<String>,
}

async fn one(options: Options) -> io::Result<Done> {
    let at = net::resolve_one(&options.to).await?;
    let mut stream = net::connect(at, Duration::from_secs(10)).await?;
    let deadline = options.seconds.map(|s| Instant::now() + Duration::from_secs_f64(s));
    let amount = |bytes: u64| if bytes > 0 && deadline.is_some() { None } else { Some(bytes) };
    let order = Order { send: amount(options.send), receive: amount(options.receive), checksum: !options.no_checksum };
    stream.write_all((serde_json::to_string(&order)? + "\n").as_bytes()).await?;
    let (from, mut to) = stream.split();
    let mut from = BufReader::with_capacity(CHUNK, from);
    let sending = async {
        let sent = send(&mut to, order.send, deadline).await?;
        if order.send.is_none() {
            to.shutdown().await?;
        }
        Ok::<_, io::Error>(sent)
    };
    let (sent, got) = tokio::join!(sending, receive(&mut from, order.receive, deadline, order.checksum));
    let (sent, got) = (sent?, got?);
    let mut done = Done { sent, received: got.bytes, problem: None };
    if order.receive.is_none() {
        return Ok(done);
    }
    let mut line = String::new();
    from.take(1024).read_line(&mut line).await?;
    let receipt: Receipt = serde_json::from_str(&line)?;
    let expected = |bytes: u64| order.checksum.then(|| Pattern::sha256(bytes));
    if receipt.bytes != sent || receipt.sha256 != expected(sent) {
        done.problem = Some(format!("sent {sent} bytes, the server got {receipt:?}"));
    } else if Some(got.bytes) != order.receive || got.sha256 != expected(got.bytes) {
        done.problem = Some(format!("wanted {:?} bytes, got {got:?}", order.receive));
    }
    Ok(done)
}

/// Moves the bytes and prints how many, how fast and whether they were right.
///
/// # Errors
/// A connection breaks, or not all is done in time.
pub async fn run(options: Options) -> io::Result<bool> {
    let start = Instant::now();
    let bound = Duration::from_secs_f64(options.bound);
    let mut streams = tokio::task::JoinSet::new();
    for _ in 0..options.streams {
        let options = options.clone();
        streams.spawn(async move { net::within(bound, one(options)).await });
    }
    let (mut sent, mut received, mut problems) = (0, 0, Vec::new());
    while let Some(done) = streams.join_next().await {
        let done = done.map_err(io::Error::other)??;
        sent += done.sent;
        received += done.received;
        problems.extend(done.problem);
    }
    let seconds = start.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let rate = (sent + received) as f64 / seconds / f64::from(1 << 20);
    let ok = problems.is_empty();
    net::emit(&json!({
        "ok": ok, "sent": sent, "received": received, "streams": options.streams, "seconds": seconds,
        "mib_per_second": rate, "checksum": !options.no_checksum, "problems": problems,
    }));
    Ok(ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_sent_is_what_is_expected() {
        let bytes = 3 * CHUNK as u64 + 17;
        let mut sent = Vec::new();
        assert_eq!(send(&mut sent, Some(bytes), None).await.expect("sent"), bytes);
        let receipt = receive(&mut sent.as_slice(), None, None, true).await.expect("received");
        assert_eq!((receipt.bytes, receipt.sha256), (bytes, Some(Pattern::sha256(bytes))));
        // A block lost or repeated is noticed as well as a bit: the counter differs.
        assert!(sent[..CHUNK] != sent[CHUNK..2 * CHUNK]);
        sent[CHUNK] ^= 1;
        let receipt = receive(&mut sent.as_slice(), None, None, true).await.expect("received");
        assert_ne!(receipt.sha256, Some(Pattern::sha256(bytes)));
    }
}
