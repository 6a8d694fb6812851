//! TLS connections for the servers: a bounded number, each with a bounded time for its handshake, and none of them
//! able to hold up the others.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_runtime::drain;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::{debug, warn};

const HANDSHAKE: Duration = Duration::from_secs(10);
/// Pause after a failed accept, which mostly means that descriptors ran out.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts until `watcher` drains, at most `max_connections` at a time.
pub(crate) fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    max_connections: usize,
    watcher: drain::Watcher,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let permits = Arc::new(Semaphore::new(max_connections));
        loop {
            let accepted = async {
                // The permit first: a connection over the limit stays in the kernel's queue.
                let permit = Arc::clone(&permits).acquire_owned().await;
                (permit, listener.accept().await)
            };
            let (permit, accepted) = tokio::select! {
                accepted = accepted => accepted,
                () = watcher.draining() => return,
                () = sender.closed() => return,
            };
            match (permit, accepted) {
                (Ok(permit), Ok((stream, _))) => {
                    tokio::spawn(handshake(stream, acceptor.clone(), permit, sender.clone()));
                }
                (Ok(_), Err(error)) => {
                    warn!(%error, "accept failed");
                    tokio::time::sleep(PAUSE).await;
                }
                // The semaphore is never closed.
                (Err(_), _) => return,
            }
        }
    });
    ReceiverStream::new(receiver)
}

async fn handshake(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    permit: OwnedSemaphorePermit,
    sender: mpsc::Sender<io::Result<Connection>>,
) {
    let peer = stream.connect_info();
    let _ = stream.set_nodelay(true);
    match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => {
            let _ = sender.send(Ok(Connection { stream, peer, _permit: permit })).await;
        }
        Ok(Err(error)) => debug!(peer = ?peer.remote_addr, %error, "TLS handshake failed"),
        Err(_) => debug!(peer = ?peer.remote_addr, "TLS handshake took too long"),
    }
}

/// One accepted connection, which counts until it is dropped.
pub(crate) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: TcpConnectInfo,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
