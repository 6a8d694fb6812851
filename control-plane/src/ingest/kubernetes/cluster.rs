//! The connection to a cluster's API server.

use std::path::PathBuf;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use kube::client::{Body, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig};
use tower_service::Service;

/// Longest that an API server that has too much to do may tell a watch to stay away.
const LONGEST_REST: Duration = Duration::from_secs(30);

/// How long the API server may be silent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Time for a connection to come about.
    pub(super) connect: Duration,
    /// Silence after which a connection counts as dead. Watches are told where they are every minute, so that one whose
    /// path was cut without a word is noticed; one that is merely quiet is resumed where it was.
    pub(super) read: Duration,
    /// Time for a request to be taken.
    pub(super) write: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { connect: Duration::from_secs(5), read: Duration::from_secs(90), write: Duration::from_secs(30) }
    }
}

/// Where the credentials for the API server come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// What Kubernetes mounts into a pod: the token of its service account, read again as it is renewed.
    InCluster,
    /// The current context of a kubeconfig file.
    Kubeconfig(PathBuf),
}

/// Why there is no way to the API server. That it does not answer is none: that is tried again.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The kubeconfig file is not usable.
    #[error("cannot use the kubeconfig {path}: {reason}; correct it, or name another with --kubeconfig")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is nothing mounted that a pod would have.
    #[error("no service account is mounted here: {0}; run in a pod, or name a file with --kubeconfig")]
    NotInCluster(String),
    /// The credentials or certificates do not work.
    #[error("cannot make a client for the API server: {0}")]
    Client(String),
}

/// A way to the API server. Cheap to clone; clones share the connections.
#[derive(Clone)]
pub struct Cluster {
    client: kube::Client,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cluster")
    }
}

impl Cluster {
    /// Reads the credentials. Nothing is asked of the API server yet.
    ///
    /// # Errors
    /// The credentials are not there, or malformed.
    pub async fn connect(credentials: &Credentials) -> Result<Self, ClusterError> {
        Self::connect_with(credentials, Patience::default()).await
    }

    /// As [`Cluster::connect`], with another patience.
    pub(super) async fn connect_with(credentials: &Credentials, patience: Patience) -> Result<Self, ClusterError> {
        let mut config = match credentials {
            Credentials::InCluster => {
                kube::Config::incluster().map_err(|error| ClusterError::NotInCluster(describe(&error)))?
            }
            Credentials::Kubeconfig(path) => {
                let wrong = |error: kube::config::KubeconfigError| ClusterError::Kubeconfig {
                    path: path.clone(),
                    reason: describe(&error),
                };
                let file = Kubeconfig::read_from(path).map_err(wrong)?;
                kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrong)?
            }
        };
        config.connect_timeout = Some(patience.connect);
        config.read_timeout = Some(patience.read);
        config.write_timeout = Some(patience.write);
        config.reset_reader_on_write = true;
        // Who asks knows better how often and how long.
        config.default_retry = false;
        let builder = ClientBuilder::try_from(config).map_err(|error| ClusterError::Client(describe(&error)))?;
        Ok(Self { client: builder.with_layer(&Rested).with_layer(&Consistent).build() })
    }

    /// The client, for the modules that talk to the API server.
    pub(crate) fn client(&self) -> kube::Client {
        self.client.clone()
    }
}

/// An error of the client with its causes, which its own text leaves out.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = inner.source();
    }
    text
}

/// Asks for streaming lists as of now. The library asks for any state (`resourceVersion=0`), and a replica of the API
/// server that lags behind would make objects vanish that exist: their traffic would leave the mesh.
#[derive(Clone, Copy, Debug)]
struct Consistent;

impl<S> tower_layer::Layer<S> for Consistent {
    type Service = ConsistentService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ConsistentService { inner }
    }
}

#[derive(Clone, Debug)]
struct ConsistentService<S> {
    inner: S,
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for ConsistentService<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Some(uri) = consistent(request.uri()) {
            *request.uri_mut() = uri;
        }
        self.inner.call(request)
    }
}

/// The same request for a state that is not older than the request; none where it does not begin a streaming list.
fn consistent(uri: &Uri) -> Option<Uri> {
    let (path, query) = uri.path_and_query()?.as_str().split_once('?')?;
    if !query.split('&').any(|pair| pair == "sendInitialEvents=true") {
        return None;
    }
    let kept: Vec<&str> = query.split('&').filter(|pair| *pair != "resourceVersion=0").collect();
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(format!("{path}?{}", kept.join("&")).parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// Stays away for as long as an API server that has too much to do says: what it answers to a watch or a list reaches the
/// one who asked only then. Others who ask know better how long they can wait.
#[derive(Clone, Copy, Debug)]
struct Rested;

impl<S> tower_layer::Layer<S> for Rested {
    type Service = RestedService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        RestedService { inner }
    }
}

#[derive(Clone, Debug)]
struct RestedService<S> {
    inner: S,
}

impl<S, B> Service<Request<Body>> for RestedService<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: Send,
    S::Future: Send + 'static,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let is_followed = request.uri().query().is_some_and(follows);
        let answering = self.inner.call(request);
        let rested = async move {
            let answered = answering.await;
            let told = answered.as_ref().ok().and_then(|answer| rest(answer.status(), answer.headers()));
            if let Some(rest) = told.filter(|_| is_followed) {
                tokio::time::sleep(rest).await;
            }
            answered
        };
        rested.boxed()
    }
}

/// Whether that is asked by a watch, or by the list before it.
fn follows(query: &str) -> bool {
    query.split('&').any(|pair| pair == "watch=true" || pair.starts_with("limit="))
}

/// How long whoever got this answer is to stay away.
fn rest(code: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    if !matches!(code, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        return None;
    }
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_REST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_told_to_stay_away_does_so_for_a_while() {
        let says = |value: &'static str| HeaderMap::from_iter([(header::RETRY_AFTER, value.parse().unwrap())]);
        let told = |code, value| rest(code, &says(value));
        assert_eq!(told(StatusCode::TOO_MANY_REQUESTS, "2"), Some(Duration::from_secs(2)));
        assert_eq!(told(StatusCode::SERVICE_UNAVAILABLE, "100000"), Some(LONGEST_REST));
        assert_eq!(told(StatusCode::OK, "2"), None);
        for odd in ["-1", "soon", "Wed, 21 Oct 2026 07:28:00 GMT"] {
            assert_eq!(told(StatusCode::TOO_MANY_REQUESTS, odd), None, "{odd}");
        }
        assert_eq!(rest(StatusCode::TOO_MANY_REQUESTS, &HeaderMap::new()), None);
        assert!(follows("&limit=500") && follows("a=b&watch=true") && !follows("watch=false&pretty=1"));
    }

    #[test]
    fn streaming_lists_are_of_now_and_nothing_else_is_touched() {
        let uri = "https://api:6443/api/v1/pods?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan\
                   &allowWatchBookmarks=true&resourceVersion=0";
        let asked = consistent(&uri.parse().unwrap()).unwrap().to_string();
        assert_eq!(
            asked,
            "https://api:6443/api/v1/pods?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan\
             &allowWatchBookmarks=true"
        );
        assert_eq!(consistent(&"/api/v1/pods?watch=true&resourceVersion=0".parse().unwrap()), None);
        assert_eq!(consistent(&"/api/v1/pods".parse().unwrap()), None);
    }

    #[tokio::test]
    async fn credentials_that_are_not_there_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        let error = Cluster::connect(&Credentials::Kubeconfig(path.clone())).await.unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("--kubeconfig"), "{error}");
        std::fs::write(&path, "apiVersion: v1\nkind: Config\n").unwrap();
        assert!(Cluster::connect(&Credentials::Kubeconfig(path)).await.is_err());
    }
}
