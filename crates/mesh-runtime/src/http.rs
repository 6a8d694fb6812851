//! One small HTTP/1.1 server for the process's own pages: admin, metrics, readiness. Everything that a client can make
//! it hold is bounded: connections, header bytes and time, body bytes and time, a connection's whole life.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

pub use ::http::StatusCode;
use ::http::{HeaderMap, HeaderValue, Method, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// What a [`Server`] allows its clients.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time; more wait in the kernel's accept queue.
    pub max_connections: usize,
    /// Largest request body, in bytes; more is answered 413.
    pub max_body: usize,
    /// Largest request head, in bytes.
    pub max_head: usize,
    /// Time for a request's head, the wait between two requests included.
    pub head_timeout: Duration,
    /// Time for a request's body.
    pub body_timeout: Duration,
    /// Life of a connection.
    pub max_life: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 64,
            max_body: 1 << 20,
            max_head: 16 << 10,
            head_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(10),
            max_life: Duration::from_secs(300),
        }
    }
}

/// A request, read whole.
#[derive(Clone, Debug)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The path, as sent.
    pub path: String,
    /// The query, without `?`, as sent; empty if there is none.
    pub query: String,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Request {
    /// The first value of a query parameter. Nothing is percent-decoded but `%3A`, `%2C` and `%3D`, which tools put into log
    /// levels (`:`, `,` and `=`).
    pub fn parameter(&self, name: &str) -> Option<String> {
        self.query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then(|| {
                [("%3A", ":"), ("%3a", ":"), ("%2C", ","), ("%2c", ","), ("%3D", "="), ("%3d", "=")]
                    .iter()
                    .fold(value.to_owned(), |value, (from, to)| value.replace(from, to))
            })
        })
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// The Content-Type.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
}

impl Reply {
    /// 200 with plain text.
    pub fn text(body: impl Into<Bytes>) -> Self {
        Self { status: StatusCode::OK, content_type: "text/plain; charset=utf-8", body: body.into() }
    }

    /// 200 with JSON, indented; 500 if the value has no JSON form.
    pub fn json(value: &impl serde::Serialize) -> Self {
        match serde_json::to_vec_pretty(value) {
            Ok(body) => Self { status: StatusCode::OK, content_type: "application/json", body: body.into() },
            Err(error) => Self::text(format!("{error}\n")).with_status(StatusCode::INTERNAL_SERVER_ERROR),
        }
    }

    /// The same answer with another status.
    #[must_use]
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// The same answer with another Content-Type.
    #[must_use]
    pub fn with_content_type(mut self, content_type: &'static str) -> Self {
        self.content_type = content_type;
        self
    }
}

type Handler = Arc<dyn Fn(Request) -> Pin<Box<dyn Future<Output = Reply> + Send>> + Send + Sync>;

struct Route {
    help: &'static str,
    handler: Handler,
}

/// Which closure answers which method and path.
#[derive(Default)]
pub struct Router {
    routes: BTreeMap<&'static str, BTreeMap<&'static str, Route>>,
    /// Turns to read and answer a request; none for as many as there are connections.
    turns: Option<Semaphore>,
}

impl Router {
    /// No routes.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same routes for at most `requests` at a time, over all connections. A request waits for its turn before its body
    /// is read, so that those who wait hold no more than a head; for as long as its body may take, then it is answered 503.
    #[must_use]
    pub fn at_most(mut self, requests: usize) -> Self {
        self.turns = Some(Semaphore::new(requests));
        self
    }

    /// Answers `GET path` (and HEAD). `help` is shown on the index page. A later route replaces an earlier one.
    pub fn get<F, Fut>(&mut self, path: &'static str, help: &'static str, handler: F)
    where
        F: Fn(Request) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Reply> + Send + 'static,
    {
        self.add("GET", path, help, handler);
    }

    /// Answers `POST path`.
    pub fn post<F, Fut>(&mut self, path: &'static str, help: &'static str, handler: F)
    where
        F: Fn(Request) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Reply> + Send + 'static,
    {
        self.add("POST", path, help, handler);
    }

    fn add<F, Fut>(&mut self, method: &'static str, path: &'static str, help: &'static str, handler: F)
    where
        F: Fn(Request) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Reply> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |request| Box::pin(handler(request)));
        self.routes.entry(path).or_default().insert(method, Route { help, handler });
    }

    /// One line per route: method, path, help.
    pub fn index(&self) -> String {
        let mut lines = String::new();
        for (path, methods) in &self.routes {
            for (method, route) in methods {
                lines.push_str(&format!("{method:<5}{path:<24}{}\n", route.help));
            }
        }
        lines
    }

    /// Answers one request: 404 without a route, 405 with one for another method.
    pub async fn reply(&self, request: Request) -> Reply {
        let Some(methods) = self.routes.get(request.path.as_str()) else {
            return Reply::text("no such page\n").with_status(StatusCode::NOT_FOUND);
        };
        let method = if request.method == Method::HEAD { "GET" } else { request.method.as_str() };
        match methods.get(method) {
            Some(route) => (route.handler)(request).await,
            None => Reply::text("method not allowed here\n").with_status(StatusCode::METHOD_NOT_ALLOWED),
        }
    }
}

/// A bound server. Binding is apart from serving, so that an address in use is an error at start.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    limits: Limits,
    local_only: bool,
}

impl Server {
    /// Listens on `address`.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        Ok(Self { listener, limits: Limits::default(), local_only: false })
    }

    /// The same server with other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Refuses what a web page in a browser on this machine could send: a Host that is not a loopback name or address
    /// (DNS rebinding), and POST with an Origin (cross-site requests).
    #[must_use]
    pub fn local_only(mut self) -> Self {
        self.local_only = true;
        self
    }

    /// The address that it listens on.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop` resolves, then cuts the connections that are left.
    pub async fn serve(self, router: Router, stop: impl Future<Output = ()> + Send) {
        let Self { listener, limits, local_only } = self;
        let router = Arc::new(router);
        let permits = Arc::new(Semaphore::new(limits.max_connections));
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        loop {
            let accepted = async {
                // The permit first: a connection over the limit stays in the kernel's queue.
                let permit = Arc::clone(&permits).acquire_owned().await;
                (permit, listener.accept().await)
            };
            tokio::select! {
                () = &mut stop => break,
                Some(_) = connections.join_next() => {}
                (permit, stream) = accepted => match stream {
                    Ok((stream, _)) => {
                        let router = Arc::clone(&router);
                        connections.spawn(async move {
                            let _permit = permit;
                            let _ = tokio::time::timeout(limits.max_life, connection(stream, router, limits, local_only)).await;
                        });
                    }
                    Err(error) => {
                        // Out of descriptors, mostly: try again when some may have been closed.
                        tracing::warn!(%error, "accept failed");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        connections.shutdown().await;
    }
}

/// Serves one connection until its end, over any byte stream. Does not bound its life.
pub async fn connection<IO>(stream: IO, router: Arc<Router>, limits: Limits, local_only: bool)
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let service = hyper::service::service_fn(|request| {
        let router = Arc::clone(&router);
        async move { Ok::<_, Infallible>(exchange(request, &router, &limits, local_only).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_buf_size(limits.max_head)
        .max_headers(64)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "connection ended");
    }
}

async fn exchange(
    request: hyper::Request<Incoming>,
    router: &Router,
    limits: &Limits,
    local_only: bool,
) -> hyper::Response<Full<Bytes>> {
    let reply = answer(request, router, limits, local_only).await.unwrap_or_else(|refused| refused);
    let mut response = hyper::Response::new(Full::new(reply.body));
    *response.status_mut() = reply.status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    response
}

async fn answer(
    request: hyper::Request<Incoming>,
    router: &Router,
    limits: &Limits,
    local_only: bool,
) -> Result<Reply, Reply> {
    let _turn = match &router.turns {
        // Never closed.
        Some(turns) => tokio::time::timeout(limits.body_timeout, turns.acquire())
            .await
            .map(Some)
            .map_err(|_| Reply::text("too many requests at a time\n").with_status(StatusCode::SERVICE_UNAVAILABLE))?,
        None => None,
    };
    let request = read(request, limits).await?;
    if local_only && is_foreign(&request) {
        return Err(Reply::text("only for clients on this machine\n").with_status(StatusCode::FORBIDDEN));
    }
    Ok(router.reply(request).await)
}

async fn read(request: hyper::Request<Incoming>, limits: &Limits) -> Result<Request, Reply> {
    let (head, body) = request.into_parts();
    let body = tokio::time::timeout(limits.body_timeout, Limited::new(body, limits.max_body).collect())
        .await
        .map_err(|_| Reply::text("the body took too long\n").with_status(StatusCode::REQUEST_TIMEOUT))?
        .map_err(|_| Reply::text("the body is too large\n").with_status(StatusCode::PAYLOAD_TOO_LARGE))?
        .to_bytes();
    let (path, query) = (head.uri.path().to_owned(), head.uri.query().unwrap_or_default().to_owned());
    Ok(Request { method: head.method, path, query, headers: head.headers, body })
}

fn is_foreign(request: &Request) -> bool {
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let local = host == "localhost"
        || host.starts_with("localhost:")
        || host.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback())
        || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    !local || (request.method != Method::GET && request.headers.contains_key(header::ORIGIN))
}

#[cfg(test)]
pub(crate) mod tests;
