//! Calls within their bounds: who calls is known from the headers before anything else of the call is read, and it has its time.
//! Strangers would hold what they have begun to send for as long as they like.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tonic::Status;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;
use tonic::transport::server::TcpConnectInfo;
use tower_service::Service;

use super::service::CaService;

/// Longest that a call may take, from its headers on.
const PATIENCE: Duration = Duration::from_secs(20);

/// A gRPC service that finds the [`Caller`](super::Caller) in the extensions of its requests.
#[derive(Debug, Clone)]
pub struct Bounded<S> {
    inner: S,
    authority: CaService,
    patience: Duration,
}

impl<S> Bounded<S> {
    pub(super) fn new(inner: S, authority: CaService) -> Self {
        Self { inner, authority, patience: PATIENCE }
    }

    /// Gives calls this long instead.
    #[cfg(test)]
    pub(super) fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }
}

impl<S: NamedService> NamedService for Bounded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for Bounded<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        // The one that was asked whether it is ready.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        let (authority, patience) = (self.authority.clone(), self.patience);
        Box::pin(async move {
            let answer = async {
                let (mut head, body) = request.into_parts();
                let peer = head.extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
                let metadata = MetadataMap::from_headers(head.headers.clone());
                match authority.admit(&metadata, peer.map(|peer| peer.ip())).await {
                    Ok(caller) => {
                        head.extensions.insert(caller);
                        inner.call(http::Request::from_parts(head, body)).await
                    }
                    Err(status) => Ok(status.into_http()),
                }
            };
            let late = |_| Ok(Status::deadline_exceeded("the request did not come in time").into_http());
            tokio::time::timeout(patience, answer).await.unwrap_or_else(late)
        })
    }
}
