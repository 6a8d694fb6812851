//! The services of the Bookinfo sample: a product page that asks `details` and `reviews`, and reviews of which two of
//! three versions ask `ratings`. They call each other by service name, on a new connection each time.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

use super::{http, net, page};

/// Bound of a call to another service.
const CALL: Duration = Duration::from_secs(5);
/// Longest answer of another service.
const ANSWER: usize = 1 << 20;
/// Headers that belong to a request as a whole and go along with the calls that it causes.
const PASSED_ON: [&str; 8] =
    ["x-request-id", "traceparent", "tracestate", "baggage", "b3", "end-user", "user-agent", "authorization"];

/// `culvert-app bookinfo`.
#[derive(Debug, Args)]
pub struct Options {
    /// Which service.
    #[arg(value_enum)]
    service: Service,
    /// Its version: `v1`, `v2`, `v3`.
    #[arg(long, default_value = "v1")]
    version: String,
    /// Port to listen on.
    #[arg(long, default_value_t = 9080)]
    port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Service {
    Productpage,
    Details,
    Reviews,
    Ratings,
}

/// What every request handler knows.
#[derive(Debug)]
struct App {
    service: Service,
    version: String,
    pod: String,
    namespace: String,
    port: u16,
    marker: String,
}

/// Serves until killed.
///
/// # Errors
/// The port cannot be had.
pub async fn run(options: Options) -> io::Result<bool> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let app = Arc::new(App {
        service: options.service,
        version: options.version,
        pod: variable("POD_NAME"),
        namespace: variable("POD_NAMESPACE"),
        port: options.port,
        marker: net::marker(),
    });
    http::serve(SocketAddr::from(([0, 0, 0, 0], options.port)), move |request| {
        let app = Arc::clone(&app);
        async move { app.answer(request).await }
    })
    .await
}

/// An answer of another service.
#[derive(Debug)]
pub(super) struct Called {
    pub status: u16,
    pub body: Value,
}

impl App {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path().trim_end_matches('/').to_owned();
        let headers = request.headers();
        let answered = match (self.service, path.as_str()) {
            (_, "/health") => self.json(StatusCode::OK, json!({"status": format!("{:?} is healthy", self.service)})),
            (Service::Productpage, "" | "/index.html") => self.html(&page::index()),
            (Service::Productpage, "/productpage") => self.product_page(headers).await,
            (Service::Productpage, "/api/v1/products/0") => {
                let (details, reviews) = self.details_and_reviews(headers).await;
                let status = if details.status == 200 && reviews.status == 200 {
                    StatusCode::OK
                } else {
                    StatusCode::BAD_GATEWAY
                };
                self.json(status, json!({"details": details.body, "reviews": reviews.body}))
            }
            (Service::Details, "/details/0") => self.json(StatusCode::OK, page::details()),
            (Service::Reviews, "/reviews/0") => self.reviews(headers).await,
            (Service::Ratings, "/ratings/0") => {
                self.json(StatusCode::OK, json!({"id": 0, "ratings": {"Reviewer1": 5, "Reviewer2": 4}}))
            }
            _ => self.json(StatusCode::NOT_FOUND, json!({"error": format!("no page {path}")})),
        };
        answered.unwrap_or_else(|_unwritable| Response::new(Full::default()))
    }

    fn json(&self, status: StatusCode, mut body: Value) -> Result<Response<Full<Bytes>>, hyper::http::Error> {
        body["marker"] = json!(self.marker);
        self.respond(status, "application/json", body.to_string())
    }

    fn html(&self, body: &str) -> Result<Response<Full<Bytes>>, hyper::http::Error> {
        self.respond(StatusCode::OK, "text/html; charset=utf-8", format!("{body}<!-- {} -->\n", self.marker))
    }

    fn respond(
        &self,
        status: StatusCode,
        kind: &str,
        body: String,
    ) -> Result<Response<Full<Bytes>>, hyper::http::Error> {
        let response = Response::builder().status(status).header("content-type", kind);
        let response = response.header("x-marker", &self.marker).header("x-pod", &self.pod);
        response.body(Full::new(body.into()))
    }

    async fn product_page(&self, headers: &HeaderMap) -> Result<Response<Full<Bytes>>, hyper::http::Error> {
        let (details, reviews) = self.details_and_reviews(headers).await;
        let status =
            if details.status == 200 && reviews.status == 200 { StatusCode::OK } else { StatusCode::BAD_GATEWAY };
        let mut response = self.html(&page::product(&self.pod, &details, &reviews))?;
        *response.status_mut() = status;
        Ok(response)
    }

    async fn details_and_reviews(&self, headers: &HeaderMap) -> (Called, Called) {
        tokio::join!(self.call("details", "/details/0", headers), self.call("reviews", "/reviews/0", headers))
    }

    async fn reviews(&self, headers: &HeaderMap) -> Result<Response<Full<Bytes>>, hyper::http::Error> {
        let mut reviews = page::reviews();
        let color = match self.version.as_str() {
            "v2" => Some("black"),
            "v3" => Some("red"),
            _ => None,
        };
        let mut status = StatusCode::OK;
        if let Some(color) = color {
            let ratings = self.call("ratings", "/ratings/0", headers).await;
            if ratings.status != 200 {
                status = StatusCode::BAD_GATEWAY;
            }
            for review in &mut reviews {
                let stars = &ratings.body["ratings"][review["reviewer"].as_str().unwrap_or_default()];
                review["rating"] = json!({"stars": stars, "color": color});
            }
        }
        self.json(status, json!({"id": "0", "podname": self.pod, "version": self.version, "reviews": reviews}))
    }

    /// Asks another service of the namespace. A failure is an answer too: status 0, with the reason in the body.
    async fn call(&self, service: &str, path: &str, headers: &HeaderMap) -> Called {
        let name = format!("{service}.{}:{}", self.namespace, self.port);
        match net::within(CALL, self.fetch(&name, path, headers)).await {
            Ok(called) => called,
            Err(error) => {
                Called { status: 0, body: json!({"error": format!("{name}: {}: {error}", net::kind(&error))}) }
            }
        }
    }

    async fn fetch(&self, name: &str, path: &str, headers: &HeaderMap) -> io::Result<Called> {
        let stream = net::connect(net::resolve_one(name).await?, CALL).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::spawn(connection);
        let mut request = Request::get(path).header("host", name).header("x-marker", &self.marker);
        for header in PASSED_ON {
            if let Some(value) = headers.get(header) {
                request = request.header(header, value);
            }
        }
        let request = request.header("connection", "close").body(Empty::<Bytes>::new()).map_err(io::Error::other)?;
        let answer = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), ANSWER).collect().await.map_err(io::Error::other)?.to_bytes();
        Ok(Called { status, body: serde_json::from_slice(&body)? })
    }
}
