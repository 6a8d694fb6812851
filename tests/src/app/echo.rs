//! A TCP server with manners to choose from.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{net, transfer};

/// `culvert-app echo`.
#[derive(Debug, Args)]
pub struct Options {
    /// Where to listen; may be given several times.
    #[arg(long, required = true)]
    listen: Vec<SocketAddr>,
    /// What to do with a connection.
    #[arg(long, value_enum, default_value_t = Mode::Echo)]
    mode: Mode,
    /// Says nothing about connections.
    #[arg(long)]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Gives back what it gets; closes its side when the client has closed its own.
    Echo,
    /// Speaks first: a line of JSON with both addresses and the marker; then as echo.
    Banner,
    /// Reads to the end, then answers with a line of JSON: bytes and SHA-256.
    Sink,
    /// Serves `culvert-app transfer`.
    Transfer,
    /// Speaks first and closes its side at once, then reads to the client's end and reports what it got.
    CloseFirst,
    /// Resets the connection after the first bytes.
    Reset,
    /// Gives back the first bytes and closes, as short-lived exchanges end.
    Answer,
    /// Accepts and never reads.
    Hold,
}

/// Serves until killed. One line of JSON per accepted connection and one at its end.
///
/// # Errors
/// A port cannot be had.
pub async fn run(options: Options) -> io::Result<bool> {
    let options = Arc::new(options);
    let mut servers = tokio::task::JoinSet::new();
    for at in &options.listen {
        let listener = net::listen(*at)?;
        net::emit(&json!({"event": "listening", "local": listener.local_addr()?}));
        servers.spawn(serve(listener, Arc::clone(&options)));
    }
    while servers.join_next().await.is_some() {}
    Ok(true)
}

async fn serve(listener: TcpListener, options: Arc<Options>) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                tokio::spawn(one(stream, peer, options.mode, options.quiet));
            }
            // Out of descriptors for a moment, or the client was gone already.
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

async fn one(mut stream: TcpStream, peer: SocketAddr, mode: Mode, quiet: bool) {
    let local = stream.local_addr().ok();
    if !quiet {
        net::emit(&json!({"event": "accepted", "peer": peer, "local": local}));
    }
    let mut counts = Counts::default();
    let done = serve_one(&mut stream, peer, mode, &mut counts).await;
    if !quiet {
        let end = done.as_ref().map_or_else(net::kind, |()| "closed");
        let Counts { received, sent } = counts;
        net::emit(
            &json!({"event": "ended", "peer": peer, "local": local, "received": received, "sent": sent, "end": end}),
        );
    }
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    pub received: u64,
    pub sent: u64,
}

async fn serve_one(stream: &mut TcpStream, peer: SocketAddr, mode: Mode, counts: &mut Counts) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match mode {
        Mode::Echo => echo(stream, counts).await,
        Mode::Banner => {
            banner(stream, peer, counts).await?;
            echo(stream, counts).await
        }
        Mode::Sink => {
            let (bytes, sha256) = transfer::drain(stream).await?;
            counts.received = bytes;
            say(stream, &json!({"bytes": bytes, "sha256": sha256}), counts).await?;
            stream.shutdown().await
        }
        Mode::Transfer => transfer::serve(stream, counts).await,
        Mode::CloseFirst => {
            banner(stream, peer, counts).await?;
            stream.shutdown().await?;
            counts.received = transfer::drain(stream).await?.0;
            Ok(())
        }
        Mode::Reset => {
            counts.received = stream.read(&mut [0; 1024]).await? as u64;
            stream.set_zero_linger()
        }
        Mode::Answer => {
            let mut buffer = [0; 4096];
            let got = stream.read(&mut buffer).await?;
            counts.received = got as u64;
            stream.write_all(&buffer[..got]).await?;
            counts.sent = got as u64;
            stream.shutdown().await
        }
        Mode::Hold => {
            std::future::pending::<()>().await;
            Ok(())
        }
    }
}

async fn banner(stream: &mut TcpStream, peer: SocketAddr, counts: &mut Counts) -> io::Result<()> {
    let hello = json!({"peer": peer, "local": stream.local_addr()?, "marker": net::marker(), "pod": std::env::var("POD_NAME").ok()});
    say(stream, &hello, counts).await
}

async fn say(stream: &mut TcpStream, value: &serde_json::Value, counts: &mut Counts) -> io::Result<()> {
    let line = format!("{value}\n");
    stream.write_all(line.as_bytes()).await?;
    counts.sent += line.len() as u64;
    Ok(())
}

async fn echo(stream: &mut TcpStream, counts: &mut Counts) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return stream.shutdown().await,
            got => {
                counts.received += got as u64;
                stream.write_all(&buffer[..got]).await?;
                counts.sent += got as u64;
            }
        }
    }
}
