//! One poll of a connection moves a bounded amount, however much there is to move; and all of it arrives.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use mesh_hbone::server::Request;
use mesh_hbone::{Connect, Headers, Options, client, server};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::mpsc;

use crate::support::{SOON, connect, soon};

const STREAMS: usize = 4;
/// Bytes of each stream: one window.
const EACH: usize = 4 << 20;

/// Bytes of a connection, and the most that one poll of it has moved.
#[derive(Debug, Default)]
struct Meter {
    read: AtomicUsize,
    written: AtomicUsize,
    most_read: AtomicUsize,
    most_written: AtomicUsize,
}

impl Meter {
    /// The future, whose polls are compared.
    async fn of_each_poll<F: Future>(self: Arc<Self>, future: F) -> F::Output {
        let mut future = Box::pin(future);
        std::future::poll_fn(|cx| {
            let before = (self.read.load(Ordering::Relaxed), self.written.load(Ordering::Relaxed));
            let polled = future.as_mut().poll(cx);
            self.most_read.fetch_max(self.read.load(Ordering::Relaxed) - before.0, Ordering::Relaxed);
            self.most_written.fetch_max(self.written.load(Ordering::Relaxed) - before.1, Ordering::Relaxed);
            polled
        })
        .await
    }
}

/// A pipe that counts what passes.
struct Metered {
    io: DuplexStream,
    meter: Arc<Meter>,
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.meter.read.fetch_add(buf.filled().len() - before, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.meter.written.fetch_add(written, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        self.meter.written.fetch_add(written, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn one_poll_moves_no_more_than_its_budget() {
    // The pipe holds everything: nothing but the budget ends a poll.
    let (near, far) = tokio::io::duplex(2 * STREAMS * EACH);
    let options = Options { send_buffer: EACH, ..Options::default() };
    let meters: [Arc<Meter>; 2] = Default::default();
    let [near, far] = [(near, &meters[0]), (far, &meters[1])].map(|(io, m)| Metered { io, meter: Arc::clone(m) });

    let (tx, mut requests) = mpsc::unbounded_channel::<Request>();
    let serving = {
        let options = options.clone();
        async move {
            server::serve(far, &options, std::future::pending(), move |request| {
                let _ = tx.send(request);
                std::future::ready(())
            })
            .await
        }
    };
    let server = tokio::spawn(Arc::clone(&meters[1]).of_each_poll(serving));
    let (tunnel, driver) = client::handshake(near, &options).await.unwrap();
    tokio::spawn(Arc::clone(&meters[0]).of_each_poll(driver));

    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let request: Connect = connect("10.0.0.1:80");
        let opening = tunnel.clone();
        let opening = tokio::spawn(async move { opening.open(request, SOON).await });
        let far = soon(requests.recv()).await.unwrap().accept(&Headers::new()).unwrap();
        streams.push((soon(opening).await.unwrap().unwrap().1, far));
    }
    let copies: Vec<_> = streams
        .into_iter()
        .map(|(mut near, mut far)| {
            tokio::spawn(async move {
                let sending = tokio::spawn(async move {
                    near.write(Bytes::from(vec![7; EACH])).await.unwrap();
                    near.finish().await.unwrap();
                    near
                });
                let mut received = 0;
                while let Some(bytes) = far.read().await.unwrap() {
                    received += bytes.len();
                }
                far.finish().await.unwrap();
                sending.await.unwrap();
                received
            })
        })
        .collect();
    for copy in copies {
        assert_eq!(soon(copy).await.unwrap(), EACH);
    }
    drop(tunnel);
    soon(server).await.unwrap().unwrap();

    let budget = options.poll_budget;
    for (end, meter) in ["client", "server"].iter().zip(&meters) {
        let (read, written) = (meter.most_read.load(Ordering::Relaxed), meter.most_written.load(Ordering::Relaxed));
        assert!(read <= budget && written <= budget, "{end}: one poll read {read} and wrote {written}");
    }
    let busiest = (meters[0].most_written.load(Ordering::Relaxed), meters[1].most_read.load(Ordering::Relaxed));
    assert_eq!(busiest, (budget, budget), "there was more than that to move");
}
