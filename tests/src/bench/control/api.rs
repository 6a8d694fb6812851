//! An API server that has nothing behind it: lists and watches of a [`Population`], tokens that are all good, and a
//! shelf for the few objects that culvertd itself writes.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::client;
use super::population::Population;
use crate::Error;
use crate::error::Context;

/// Objects written at once while a watch begins.
const AT_ONCE: usize = 200;
/// How often a watch is told that it is still there.
const BOOKMARK: Duration = Duration::from_secs(30);
/// Longest body that is read.
const MAX_BODY: usize = 1 << 20;
/// Who every token belongs to.
const ACCOUNT: &str = "system:serviceaccount:culvert-system:ztunnel";

type Body = BoxBody<Bytes, Infallible>;

/// The server. Cheap to clone.
#[derive(Clone)]
pub struct Api(Arc<Inner>);

struct Inner {
    population: Population,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Counts the changes; the version of every object is 1 before its first.
    version: u64,
    watches: BTreeMap<String, Vec<mpsc::UnboundedSender<Bytes>>>,
    shelf: BTreeMap<String, Value>,
}

impl Api {
    /// Serves `population` on a port of the loopback interface.
    ///
    /// # Errors
    /// There is no port.
    pub async fn serve(population: Population) -> Result<(Self, SocketAddr), Error> {
        let listener = TcpListener::bind("127.0.0.1:0").await.during(|| "listening as the API server".to_owned())?;
        let address = listener.local_addr().during(|| "asking for the API server's port".to_owned())?;
        let state = Mutex::new(State { version: 1, ..State::default() });
        let api = Self(Arc::new(Inner { population, state }));
        let (accepting, telling) = (api.clone(), api.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let api = accepting.clone();
                tokio::spawn(async move {
                    let answer = service_fn(move |request| {
                        let api = api.clone();
                        async move { Ok::<_, Infallible>(api.answer(request).await) }
                    });
                    // That a client leaves is no error of ours.
                    let _ =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
                });
            }
        });
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(BOOKMARK).await;
                telling.bookmark();
            }
        });
        Ok((api, address))
    }

    /// Changes one pod: its application has another version from now on.
    pub fn change_pod(&self, number: usize, version: &str) {
        let mut object = self.0.population.pod(number, version).object();
        let mut state = self.state();
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        state.tell("pods", &event("MODIFIED", &object));
    }

    /// The roots that culvertd has published, PEM.
    pub fn roots(&self) -> Option<String> {
        let state = self.state();
        let (_, published) = state.shelf.iter().find(|(path, _)| path.ends_with("/culvert-ca-root-cert"))?;
        Some(published["data"]["root-cert.pem"].as_str()?.to_owned())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bookmark(&self) {
        let mut state = self.state();
        let plurals: Vec<String> = state.watches.keys().cloned().collect();
        for plural in plurals {
            let event = event("BOOKMARK", &bookmark(state.version, false));
            state.tell(&plural, &event);
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let Some((plural, is_namespaced, name)) = parse(&path) else {
            return reply(StatusCode::NOT_FOUND, &failure(404));
        };
        let query = request.uri().query().unwrap_or_default().to_owned();
        match (request.method(), name) {
            // Of a namespace only the mesh's own objects are asked for, and it has no pods.
            (&Method::GET, None) => self.collection(plural, &query, is_namespaced),
            (&Method::GET, Some(_)) => match self.state().shelf.get(&path) {
                Some(found) => reply(StatusCode::OK, found),
                None => reply(StatusCode::NOT_FOUND, &failure(404)),
            },
            (&Method::POST, None) if plural == "tokenreviews" => match read(request).await {
                Some(review) => reply(StatusCode::CREATED, &accepted(review)),
                None => reply(StatusCode::BAD_REQUEST, &failure(400)),
            },
            (&(Method::POST | Method::PUT | Method::PATCH), name) => {
                let place = if name.is_none() { Some(format!("{path}/")) } else { None };
                match read(request).await {
                    Some(object) => self.store(path, place, object),
                    None => reply(StatusCode::BAD_REQUEST, &failure(400)),
                }
            }
            _ => reply(StatusCode::METHOD_NOT_ALLOWED, &failure(405)),
        }
    }

    fn store(&self, path: String, folder: Option<String>, mut object: Value) -> Response<Body> {
        let path = match folder {
            Some(folder) => folder + object["metadata"]["name"].as_str().unwrap_or_default(),
            None => path,
        };
        let mut state = self.state();
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        object["metadata"]["uid"] = json!(format!("shelf-{path}"));
        state.shelf.insert(path, object.clone());
        reply(StatusCode::OK, &object)
    }

    fn collection(&self, plural: &str, query: &str, is_empty: bool) -> Response<Body> {
        let has = |pair: &str| query.split('&').any(|found| found == pair);
        let population = self.0.population;
        let count = if is_empty { 0 } else { population.count(plural) };
        let object = {
            let plural = plural.to_owned();
            move |number| versioned(population.object(&plural, number))
        };
        if !has("watch=true") {
            let items: Vec<Value> = (0..count).map(object).collect();
            let version = self.state().version.to_string();
            let list = json!({
                "apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": version}, "items": items,
            });
            return reply(StatusCode::OK, &list);
        }
        let (changes, told) = mpsc::unbounded_channel();
        let mut state = self.state();
        let version = state.version;
        state.watches.entry(plural.to_owned()).or_default().push(changes);
        drop(state);
        let told = UnboundedReceiverStream::new(told);
        if !has("sendInitialEvents=true") {
            return streamed(told);
        }
        let batches = (0..count).step_by(AT_ONCE).map(move |from| {
            let events = (from..count.min(from + AT_ONCE)).map(|number| event("ADDED", &object(number)));
            events.collect::<Vec<_>>().concat().into()
        });
        let end = event("BOOKMARK", &bookmark(version, true));
        streamed(stream::iter(batches).chain(stream::iter([end])).chain(told))
    }
}

impl State {
    fn tell(&mut self, plural: &str, event: &Bytes) {
        if let Some(watches) = self.watches.get_mut(plural) {
            watches.retain(|watch| watch.send(event.clone()).is_ok());
        }
    }
}

/// The plural, whether a namespace is named, and the object's name.
fn parse(path: &str) -> Option<(&str, bool, Option<&str>)> {
    let mut parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let skip = match *parts.first()? {
        "api" => 2,
        "apis" => 3,
        _ => return None,
    };
    parts.drain(..skip.min(parts.len()));
    match parts.as_slice() {
        ["namespaces", _, plural, rest @ ..] => Some((plural, true, rest.first().copied())),
        [plural, rest @ ..] => Some((plural, false, rest.first().copied())),
        [] => None,
    }
}

async fn read(request: Request<Incoming>) -> Option<Value> {
    let body = Limited::new(request.into_body(), MAX_BODY).collect().await.ok()?;
    serde_json::from_slice(&body.to_bytes()).ok()
}

/// The review with its answer: the token is good, and bound to a pod of its own, as each node's is.
fn accepted(mut review: Value) -> Value {
    let number = review["spec"]["token"].as_str().and_then(client::number).unwrap_or_default();
    let extra = json!({
        "authentication.kubernetes.io/pod-name": [format!("ztunnel-{number}")],
        "authentication.kubernetes.io/pod-uid": ["00000000-0000-4000-8000-000000000000"],
        "authentication.kubernetes.io/node-name": ["node-0"],
    });
    let audiences = review["spec"]["audiences"].clone();
    let user = json!({"username": ACCOUNT, "extra": extra});
    review["status"] = json!({"authenticated": true, "audiences": audiences, "user": user});
    review
}

fn versioned(mut object: Value) -> Value {
    object["metadata"]["resourceVersion"] = json!("1");
    object
}

fn bookmark(version: u64, is_initial: bool) -> Value {
    let annotations = if is_initial { json!({"k8s.io/initial-events-end": "true"}) } else { json!({}) };
    let metadata = json!({"name": "", "resourceVersion": version.to_string(), "annotations": annotations});
    json!({"apiVersion": "v1", "kind": "Bookmark", "metadata": metadata})
}

fn event(kind: &str, object: &Value) -> Bytes {
    format!("{}\n", json!({"type": kind, "object": object})).into()
}

fn failure(code: u16) -> Value {
    let reason = if code == 404 { "NotFound" } else { "BadRequest" };
    json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "message": reason, "reason": reason,
        "code": code,
    })
}

fn reply(status: StatusCode, value: &Value) -> Response<Body> {
    respond(status, Full::new(Bytes::from(value.to_string())).boxed())
}

fn streamed(parts: impl Stream<Item = Bytes> + Send + Sync + 'static) -> Response<Body> {
    respond(StatusCode::OK, BodyExt::boxed(StreamBody::new(parts.map(|part| Ok(Frame::data(part))))))
}

fn respond(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}
