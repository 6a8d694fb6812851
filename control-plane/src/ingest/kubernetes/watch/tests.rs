//! What a watch does about errors, against an API server that answers as it is told.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Mutex;
use std::task::{Context, Poll};

use http::{Request, Response, StatusCode};
use kube::client::Body;
use kube::core::Status;

use serde_json::{Value, json};

use super::super::status::Watches;
use super::*;

fn refused(code: u16) -> kube::Error {
    let status = Status { code, reason: "Reason".to_owned(), message: "told so".to_owned(), ..Status::default() };
    kube::Error::Api(Box::new(status))
}

#[test]
fn errors_are_answered_by_what_they_mean() {
    let start = |code| Error::WatchStartFailed(refused(code));
    let list = |code| Error::InitialListFailed(refused(code));
    assert_eq!(reaction(&start(422), true, true), Reaction::UsePages);
    assert_eq!(reaction(&start(400), true, false), Reaction::Resume);
    assert_eq!(reaction(&start(410), true, false), Reaction::Restart);
    assert_eq!(reaction(&start(404), false, true), Reaction::Discover);
    assert_eq!(reaction(&list(404), false, false), Reaction::Discover);
    for code in [401, 403, 429, 500, 503] {
        assert_eq!(reaction(&list(code), false, false), Reaction::Resume, "{code}");
    }
    assert_eq!(reaction(&list(404), true, false), Reaction::Resume);
    let unreadable = serde_json::from_str::<u8>("x").unwrap_err();
    assert_eq!(reaction(&Error::WatchFailed(kube::Error::SerdeError(unreadable)), true, true), Reaction::Restart);
    assert!(describe(&list(403)).contains("told so"));
}

#[test]
fn groups_are_those_of_the_kind() {
    let slices = resource(Kind::EndpointSlice, "v1");
    assert_eq!((slices.group.as_str(), slices.version.as_str()), ("discovery.k8s.io", "v1"));
    let pods = resource(Kind::Pod, "v1");
    assert_eq!((pods.group.as_str(), pods.version.as_str(), pods.api_version.as_str()), ("", "v1", "v1"));
    let policies = resource(Kind::AuthorizationPolicy, "v1beta1");
    assert_eq!((policies.group.as_str(), policies.plural.as_str()), ("security.istio.io", "authorizationpolicies"));
    assert_eq!(policies.api_version, "security.istio.io/v1beta1");
    for kind in Kind::ALL {
        assert_eq!(api_version(kind, kind.version()), kind.api_version());
        assert_eq!(kind.versions().first(), Some(&kind.version()));
    }
}

/// What it is asked for, and what it answers, in order.
type Script = Arc<Mutex<VecDeque<(&'static str, StatusCode, String)>>>;

/// An API server that answers by its script.
#[derive(Clone)]
struct Fake(Script);

impl tower_service::Service<Request<Body>> for Fake {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (path, code, body) = self.0.lock().unwrap().pop_front().expect("no more was to be asked");
        let asked = request.uri().path();
        assert_eq!(asked, path, "{} is left", self.0.lock().unwrap().len());
        ready(Ok(Response::builder().status(code).body(Body::from(body.into_bytes())).unwrap()))
    }
}

const OBJECTS: &str = "/apis/security.istio.io/v1/authorizationpolicies";
const OLDER_OBJECTS: &str = "/apis/security.istio.io/v1beta1/authorizationpolicies";
const V1: &str = "/apis/security.istio.io/v1";
const V1BETA1: &str = "/apis/security.istio.io/v1beta1";

fn answers(path: &'static str, body: &[Value]) -> (&'static str, StatusCode, String) {
    (path, StatusCode::OK, body.iter().map(|line| format!("{line}\n")).collect())
}

fn fails(path: &'static str, code: u16) -> (&'static str, StatusCode, String) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "told so"});
    (path, StatusCode::from_u16(code).unwrap(), status.to_string())
}

/// A list of one policy.
fn list(path: &'static str) -> (&'static str, StatusCode, String) {
    let metadata = json!({"name": "p", "namespace": "shop", "resourceVersion": "7"});
    let end = json!({"resourceVersion": "7", "annotations": {"k8s.io/initial-events-end": "true"}});
    answers(
        path,
        &[
            json!({"type": "ADDED", "object": {"metadata": metadata}}),
            json!({"type": "BOOKMARK", "object": {"kind": "AuthorizationPolicy", "apiVersion": "v1", "metadata": end}}),
        ],
    )
}

/// Discovery of one version that has these kinds.
fn serves(path: &'static str, plurals: &[&str]) -> (&'static str, StatusCode, String) {
    let kinds = plurals.iter().map(
        |name| json!({"name": name, "singularName": "", "namespaced": true, "kind": "K", "verbs": ["list", "watch"]}),
    );
    let kinds: Vec<_> = kinds.collect();
    answers(path, &[json!({"kind": "APIResourceList", "groupVersion": "g/v", "resources": kinds})])
}

#[tokio::test(start_paused = true)]
async fn a_kind_is_gone_when_discovery_says_so_twice() {
    let script = Script::default();
    let told = script.clone();
    let steps = follow(
        kube::Client::new(Fake(script.clone()), "default"),
        Kind::AuthorizationPolicy,
        Watches::new([Kind::AuthorizationPolicy]).of(Kind::AuthorizationPolicy),
    );
    let steps = steps.filter(|step| std::future::ready(!matches!(step, Step::Listing)));
    let mut steps = std::pin::pin!(steps);
    // The watch that follows the list does not find the kind, which is there all the same; then discovery does not, once;
    // then it does not know; then not the kind, but its group.
    let nothing = || [fails(OBJECTS, 404), fails(V1, 404), fails(V1BETA1, 404)];
    let mut said = vec![list(OBJECTS), fails(OBJECTS, 404), serves(V1, &["authorizationpolicies"])];
    said.extend(nothing());
    said.extend([fails(OBJECTS, 404), fails(V1, 503)]);
    said.extend([fails(OBJECTS, 404), serves(V1, &["requestauthentications"]), fails(V1BETA1, 404)]);
    said.extend(nothing());
    told.lock().unwrap().extend(said);
    assert!(matches!(steps.next().await, Some(Step::Present(_))));
    assert!(matches!(steps.next().await, Some(Step::Listed)));
    assert!(matches!(steps.next().await, Some(Step::Absent)));
    assert!(told.lock().unwrap().is_empty(), "not all was asked");
    // It is there again, in an older version.
    let again = [fails(OBJECTS, 404), fails(V1, 404), serves(V1BETA1, &["authorizationpolicies"]), list(OLDER_OBJECTS)];
    told.lock().unwrap().extend(again);
    assert!(matches!(steps.next().await, Some(Step::Present(_))));
    assert!(matches!(steps.next().await, Some(Step::Listed)));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_found_at_start_is_asked_for_twice_as_well() {
    let script = Script::default();
    let nothing = || [fails(OBJECTS, 404), fails(V1, 404), fails(V1BETA1, 404)];
    script.lock().unwrap().extend(nothing().into_iter().chain(nothing()));
    let status = Watches::new([Kind::AuthorizationPolicy]).of(Kind::AuthorizationPolicy);
    let client = kube::Client::new(Fake(script.clone()), "default");
    let steps = follow(client, Kind::AuthorizationPolicy, status);
    let steps = steps.filter(|step| std::future::ready(!matches!(step, Step::Listing)));
    assert!(matches!(std::pin::pin!(steps).next().await, Some(Step::Absent)));
    assert!(script.lock().unwrap().is_empty(), "not all was asked");
}
