//! What is known of a cluster whose API server has faults: after each of them it is what there is.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fake_kubernetes::{Api, Asked, Place};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Kubernetes;
use crate::agent::enrolment::source::client;
use crate::agent::enrolment::{Known, Removal, Source as _};
use crate::cni::decide::{Exclusions, Mode};

const PODS: &str = "/api/v1/pods";
const NAMESPACES: &str = "/api/v1/namespaces";
/// Longest that something is waited for; more than the minute after which the library reads a token anew.
const LONG: Duration = Duration::from_secs(120);

/// Follows the API server.
async fn follow(api: &Api, token: Option<&Path>, silence: Duration) -> watch::Receiver<Arc<Known>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    std::fs::write(&path, api.kubeconfig(token)).unwrap();
    let client = client(Some(&path), silence).await.unwrap();
    let (known, watched) = watch::channel(Arc::default());
    tokio::spawn(Kubernetes::new(client, "n".to_owned(), Exclusions::default(), Removal::default()).run(known));
    watched
}

fn pod(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}")},
        "spec": {"nodeName": "n", "serviceAccountName": "web", "containers": [{"name": "main"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.244.0.5"}]},
    })
}

fn namespace(name: &str, mode: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"istio.io/dataplane-mode": mode}}})
}

/// An API server that has these pods, in the namespace `shop`.
async fn serve(pods: &[&str]) -> Api {
    let api = Api::serve().await.unwrap();
    api.put(NAMESPACES, namespace("shop", "ambient"));
    for name in pods {
        api.put(PODS, pod(name));
    }
    api
}

/// Pods and namespaces that are known.
fn names(known: &Known) -> Vec<&str> {
    let pods = known.knowledge.pods.values().flat_map(BTreeMap::keys);
    known.knowledge.namespaces.keys().chain(pods).map(String::as_str).collect()
}

/// Waits until these are known, and nothing else. Until then it was always more than nothing, if it was before.
async fn until(known: &mut watch::Receiver<Arc<Known>>, wanted: &[&str]) {
    let had = !names(&known.borrow()).is_empty();
    let settled = known.wait_for(|known| {
        let names = names(known);
        assert!(!had || names.len() > 1, "all but nothing is known: {names:?}");
        names == wanted
    });
    let settled = tokio::time::timeout(LONG, settled).await;
    assert!(settled.is_ok(), "not known: {wanted:?}");
    drop(settled);
    assert_eq!(names(&known.borrow()), wanted);
}

fn is_list(asked: &Asked) -> bool {
    asked.path == PODS && !asked.says("watch=true") && !asked.query.contains("continue=")
}

fn lists(api: &Api) -> usize {
    api.asked().iter().filter(|asked| is_list(asked)).count()
}

#[tokio::test]
async fn a_watch_that_is_too_old_begins_with_a_list() {
    let api = serve(&["a", "b"]).await;
    let mut known = follow(&api, None, LONG).await;
    until(&mut known, &["shop", "a", "b"]).await;
    api.forget(|world| {
        world.delete(PODS, "shop", "a");
        world.put(PODS, pod("c"));
        world.put(NAMESPACES, namespace("shop", "none"));
    });
    until(&mut known, &["shop", "b", "c"]).await;
    known.wait_for(|known| known.knowledge.namespaces["shop"] == Mode::None).await.unwrap();
    api.put(PODS, pod("d"));
    until(&mut known, &["shop", "b", "c", "d"]).await;
    assert_eq!(lists(&api), 2);
}

#[tokio::test]
async fn a_watch_that_is_too_old_when_it_starts_begins_with_a_list() {
    let api = serve(&["a", "b"]).await;
    api.refuse_old_at_start();
    let mut known = follow(&api, None, LONG).await;
    until(&mut known, &["shop", "a", "b"]).await;
    let before = api.asked().len();
    api.hold(PODS, "watch=true", 1, Place::Start);
    api.cut();
    api.until_asked("to go on", before, |asked| asked.path == PODS).await;
    api.forget(|world| {
        world.delete(PODS, "shop", "a");
        world.put(PODS, pod("c"));
    });
    api.release();
    until(&mut known, &["shop", "b", "c"]).await;
}

#[tokio::test]
async fn a_list_that_is_too_old_amid_its_pages_begins_anew() {
    let api = serve(&["a", "b", "c", "d"]).await;
    api.pages_of(2);
    let mut known = follow(&api, None, LONG).await;
    until(&mut known, &["shop", "a", "b", "c", "d"]).await;
    let before = api.asked().len();
    api.hold(PODS, "continue=", 1, Place::Start);
    api.forget(|world| world.delete(PODS, "shop", "a"));
    api.until_asked("the second page", before, |asked| asked.query.contains("continue=")).await;
    // What is known stays until the list is whole.
    assert_eq!(names(&known.borrow()), ["shop", "a", "b", "c", "d"]);
    api.forget(|world| {
        world.delete(PODS, "shop", "b");
        world.put(PODS, pod("e"));
    });
    api.release();
    until(&mut known, &["shop", "c", "d", "e"]).await;
}

#[tokio::test]
async fn a_slow_list_takes_nothing_away_and_holds_up_no_label() {
    let api = serve(&["a", "b"]).await;
    api.hold(PODS, "", 1, Place::Middle);
    let mut known = follow(&api, None, LONG).await;
    api.until_asked("the watch of namespaces", 0, |asked| asked.path == NAMESPACES && asked.says("watch=true")).await;
    assert_eq!(**known.borrow(), Known::default(), "half of it is known");
    api.release();
    until(&mut known, &["shop", "a", "b"]).await;
    let before = api.asked().len();
    api.hold(PODS, "", 1, Place::Middle);
    api.forget(|world| world.delete(PODS, "shop", "a"));
    api.until_asked("the list", before, |asked| asked.path == PODS).await;
    api.put(NAMESPACES, namespace("late", "ambient"));
    until(&mut known, &["late", "shop", "a", "b"]).await;
    api.release();
    until(&mut known, &["late", "shop", "b"]).await;
}

#[tokio::test]
async fn an_answer_that_falls_silent_or_breaks_off_is_asked_for_again() {
    let api = serve(&["a", "b"]).await;
    api.hold(PODS, "", 1, Place::Middle);
    let mut known = follow(&api, None, Duration::from_secs(2)).await;
    until(&mut known, &["shop", "a", "b"]).await;
    let before = api.asked().len();
    api.hold(PODS, "", 1, Place::Middle);
    api.forget(|world| world.delete(PODS, "shop", "a"));
    api.until_asked("the list", before, |asked| asked.path == PODS).await;
    api.cut();
    until(&mut known, &["shop", "b"]).await;
}

#[tokio::test]
async fn who_is_told_to_stay_away_comes_back_when_it_may() {
    let api = serve(&["a"]).await;
    api.refuse(PODS, "", 2, 429, &[("Retry-After", "1")]);
    let mut known = follow(&api, None, LONG).await;
    until(&mut known, &["shop", "a"]).await;
    let asked = api.asked();
    let times: Vec<_> = asked.iter().filter(|asked| is_list(asked)).map(|asked| asked.at).collect();
    assert_eq!(times.len(), 3, "{asked:#?}");
    assert!(times.windows(2).all(|two| two[1] - two[0] >= Duration::from_secs(1)), "{times:?}");
}

#[tokio::test]
async fn a_token_that_ended_is_replaced_by_the_one_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "one").unwrap();
    let api = serve(&["a"]).await;
    api.trust("one");
    let mut known = follow(&api, Some(&file), LONG).await;
    until(&mut known, &["shop", "a"]).await;
    let before = api.asked().len();
    api.trust("two");
    api.put(PODS, pod("b"));
    api.until_asked("with the old token", before, |asked| asked.path == PODS).await;
    assert_eq!(names(&known.borrow()), ["shop", "a"]);
    std::fs::write(&file, "two").unwrap();
    until(&mut known, &["shop", "a", "b"]).await;
    assert_eq!(lists(&api), 1, "what was known was asked for again");
}
