//! An HTTP/1.1 server with keepalive, and the server loop that Bookinfo uses as well.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use super::net;

/// `culvert-app http`.
#[derive(Debug, Args)]
pub struct Options {
    /// Where to listen; may be given several times.
    #[arg(long, required = true)]
    listen: Vec<SocketAddr>,
    /// Bytes of each answer's body.
    #[arg(long, default_value_t = 1024)]
    body: usize,
}

/// Serves until killed.
///
/// # Errors
/// The port cannot be had.
pub async fn run(options: Options) -> io::Result<bool> {
    let body = Bytes::from(vec![b'b'; options.body]);
    let mut servers = tokio::task::JoinSet::new();
    for at in options.listen {
        let body = body.clone();
        servers.spawn(serve(at, move |_request| {
            let body = body.clone();
            async move { Response::new(Full::new(body)) }
        }));
    }
    // They end only when a port cannot be had.
    servers.join_next().await.unwrap_or_else(|| Ok(Ok(false)))?
}

/// Answers every request on `at` with `answer`, until killed.
///
/// # Errors
/// The port cannot be had.
pub async fn serve<A, F>(at: SocketAddr, answer: A) -> io::Result<bool>
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let listener = net::listen(at)?;
    net::emit(&serde_json::json!({"event": "listening", "local": listener.local_addr()?}));
    loop {
        // Out of descriptors for a moment, or the client was gone already.
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        if stream.set_nodelay(true).is_err() {
            continue;
        }
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await) }
            });
            // A client that breaks off concerns nobody else.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
