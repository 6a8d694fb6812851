//! The port on which the API server asks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use mesh_runtime::drain;
use mesh_runtime::http::{Limits, Reply, Router, connection};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_stream::StreamExt;

use super::review;
use crate::serve::{Bounds, accept};

/// Where AdmissionReviews are answered.
pub const PATH: &str = "/validate";
/// Reviews at a time. Anybody who reaches the port may send one, and its values are larger in memory than their text.
const MAX_REVIEWS: usize = 4;
/// Bounds of the port, which only API servers need. etcd takes no object of more than 1.5 MiB, and a review holds two.
const LIMITS: Limits = Limits {
    max_connections: 128,
    max_body: 3 << 20,
    max_head: 16 << 10,
    head_timeout: Duration::from_secs(30),
    // A slow body keeps others from their turn.
    body_timeout: Duration::from_secs(3),
    max_life: Duration::from_secs(3600),
};

/// Answers on `listener`, with the certificate of `tls`, until `watcher` drains.
pub async fn serve(listener: TcpListener, tls: &ServerConfig, watcher: drain::Watcher) {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let router = Arc::new(routes());
    // The API servers may all come from one address.
    let bounds =
        Bounds { all: LIMITS.max_connections, of_one: LIMITS.max_connections, patience: Duration::from_secs(10) };
    let mut connections = accept(listener, TlsAcceptor::from(Arc::new(tls)), bounds, watcher.clone());
    while let Some(accepted) = connections.next().await {
        let Ok(stream) = accepted else { continue };
        let (router, watcher) = (router.clone(), watcher.clone());
        tokio::spawn(async move {
            let served = tokio::time::timeout(LIMITS.max_life, connection(stream, router, LIMITS, false));
            tokio::select! {
                _ = served => {}
                () = watcher.draining() => {}
            }
        });
    }
}

fn routes() -> Router {
    let mut routes = Router::new().at_most(MAX_REVIEWS);
    // A review goes on when whoever asked for it has gone: it counts until it has ended.
    let turns = Arc::new(Semaphore::new(MAX_REVIEWS));
    routes.post(PATH, "answers an AdmissionReview", move |request| {
        let turn = Arc::clone(&turns).acquire_owned();
        async move { answer(request.body, turn.await).await }
    });
    routes
}

/// The answer to a review of `body`, which has the turn `turn`.
async fn answer(body: Bytes, turn: Result<OwnedSemaphorePermit, AcquireError>) -> Reply {
    // Large objects take their time, and discovery has the same workers.
    let reviewed = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        review::answer(&body)
    });
    match reviewed.await {
        Ok(Ok(answer)) => {
            tracing::debug!(allowed = answer.is_allowed(), "object reviewed");
            Reply::json(&answer)
        }
        Ok(Err(error)) => Reply::text(format!("{error}\n")).with_status(StatusCode::BAD_REQUEST),
        Err(error) => {
            tracing::error!(%error, "a review did not end");
            Reply::text("the review did not end\n".to_owned()).with_status(StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}
