//! The certificate authority's answers, counted.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};
use tower_service::Service;

use super::metrics::Metrics;

/// The certificate authority's gRPC service, each answer of which is counted, also those to callers that are not let in.
#[derive(Debug, Clone)]
pub(super) struct Metered<S> {
    inner: S,
    metrics: Metrics,
}

impl<S> Metered<S> {
    pub(super) fn new(inner: S, metrics: &Metrics) -> Self {
        Self { inner, metrics: metrics.clone() }
    }
}

impl<S: NamedService> NamedService for Metered<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for Metered<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let (answer, metrics) = (self.inner.call(request), self.metrics.clone());
        Box::pin(async move {
            let answer = answer.await?;
            // What is refused has no message, and its status among the headers.
            match Status::from_header_map(answer.headers()).map(|status| status.code()) {
                None | Some(Code::Ok) => drop(metrics.certificates_issued.inc()),
                Some(code) => metrics.certificate_refused(code),
            }
            Ok(answer)
        })
    }
}
