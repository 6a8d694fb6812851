//! What is known of a cluster whose API server has faults: after each of them, what the index holds is what there is.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fake_kubernetes::{Api, Asked, Place};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use super::cluster::{Cluster, Credentials, Patience};
use super::status::{KindReport, WatchState, Watches};
use super::{Batch, Kubernetes};
use crate::api::Kind;
use crate::index::{Index, Options};

const PODS: &str = "/api/v1/pods";
const SERVICES: &str = "/api/v1/services";
/// Longest that something is waited for; more than the minute after which the library reads a token anew.
const LONG: Duration = Duration::from_secs(120);

/// A source that follows the API server, and the index of what it tells.
struct Running {
    index: Index,
    batches: mpsc::Receiver<Batch>,
    watches: Watches,
    /// Names that the index must have after every batch.
    kept: Vec<&'static str>,
    _folder: tempfile::TempDir,
}

impl Running {
    async fn start(api: &Api) -> Self {
        Self::start_as(api, None, Patience::default()).await
    }

    async fn start_as(api: &Api, token: Option<&Path>, patience: Patience) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kubeconfig");
        std::fs::write(&path, api.kubeconfig(token)).unwrap();
        let cluster = Cluster::connect_with(&Credentials::Kubeconfig(path), patience).await.unwrap();
        let source = Kubernetes::new(cluster);
        let watches = source.watches();
        let (sender, batches) = mpsc::channel(16);
        tokio::spawn(source.run(sender));
        let index = Index::new(Options {
            cluster_id: "Kubernetes".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            root_namespace: "culvert-system".into(),
            confirmation: Duration::from_secs(60),
        });
        Self { index, batches, watches, kept: Vec::new(), _folder: folder }
    }

    /// Takes in the next batch.
    async fn batch(&mut self) {
        let batch = tokio::time::timeout(LONG, self.batches.recv()).await;
        let batch = batch.unwrap_or_else(|_| panic!("nothing is told; there is {:?}", self.names())).unwrap();
        self.index.apply(batch.events, SystemTime::now());
        let names = self.names();
        assert!(self.kept.iter().all(|name| names.contains(*name)), "{names:?} lacks one of {:?}", self.kept);
    }

    /// Takes in batches until the index has these pods and services, and nothing else.
    async fn until(&mut self, names: &[&str]) {
        let wanted: BTreeSet<String> = names.iter().map(|&name| name.to_owned()).collect();
        while self.names() != wanted {
            self.batch().await;
        }
    }

    /// The pods and services that the index has.
    fn names(&self) -> BTreeSet<String> {
        let names = self.index.resources().map(|resource| resource.name.clone());
        // `Kubernetes//Pod/shop/web-1`, `shop/web.shop.svc.cluster.local`.
        names.filter_map(|name| Some(name.rsplit('/').next()?.split('.').next()?.to_owned())).collect()
    }

    fn report(&self, kind: Kind) -> KindReport {
        let found = self.watches.reports().into_iter().find(|(known, _)| *known == kind);
        found.unwrap().1
    }

    /// Waits until the watches are as wanted.
    async fn watched(&self, what: &str, wanted: impl Fn(Kind, &KindReport) -> bool) {
        let deadline = tokio::time::Instant::now() + LONG;
        while !self.watches.reports().iter().all(|(kind, report)| wanted(*kind, report)) {
            assert!(tokio::time::Instant::now() < deadline, "{what}: {:#?}", self.watches.reports());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// How often each kind was listed.
    fn lists(&self) -> BTreeSet<u64> {
        self.watches.reports().iter().map(|(_, report)| report.lists).collect()
    }
}

fn pod(name: &str) -> Value {
    let number: u8 = name.trim_start_matches("web-").parse().unwrap();
    let address = format!("10.244.0.{number}");
    json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "labels": {"app": "web"}},
        "spec": {"nodeName": "n", "serviceAccountName": "web", "containers": [{"name": "main"}]},
        "status": {
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn service(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}")},
        "spec": {"clusterIP": "None", "selector": {"app": "web"}, "ports": [{"port": 80}]},
    })
}

/// An API server that has these pods, and the service `web`. It knows of streamed lists, or of pages alone.
async fn serve(pods: &[&str], is_streaming: bool) -> Api {
    let api = Api::serve().await.unwrap();
    if !is_streaming {
        api.list_by_pages();
    }
    for name in pods {
        api.put(PODS, pod(name));
    }
    api.put(SERVICES, service("web"));
    api
}

/// What a list of the one or the other way is known by in its query.
fn list(is_streaming: bool) -> &'static str {
    if is_streaming { "sendInitialEvents=true" } else { "limit=" }
}

fn is_first_page(asked: &Asked) -> bool {
    asked.path == PODS && asked.query.contains("limit=") && !asked.query.contains("continue=")
}

#[tokio::test]
async fn a_watch_that_is_too_old_begins_with_a_list() {
    for is_streaming in [true, false] {
        let api = serve(&["web-1", "web-2"], is_streaming).await;
        let mut running = Running::start(&api).await;
        running.until(&["web", "web-1", "web-2"]).await;
        running.kept = vec!["web", "web-2"];
        api.forget(|world| {
            world.delete(PODS, "shop", "web-1");
            world.put(PODS, pod("web-3"));
        });
        running.until(&["web", "web-2", "web-3"]).await;
        api.put(PODS, pod("web-4"));
        running.until(&["web", "web-2", "web-3", "web-4"]).await;
        assert_eq!(running.report(Kind::Pod).lists, 2);
        assert_eq!(running.report(Kind::Pod).trouble, None);
    }
}

#[tokio::test]
async fn a_watch_that_is_too_old_when_it_starts_begins_with_a_list() {
    for is_streaming in [true, false] {
        let api = serve(&["web-1", "web-2"], is_streaming).await;
        api.refuse_old_at_start();
        let mut running = Running::start(&api).await;
        running.until(&["web", "web-1", "web-2"]).await;
        running.kept = vec!["web", "web-2"];
        // The connection breaks, and what happens before the next one is forgotten.
        let before = api.asked().len();
        api.hold(PODS, "watch=true", 1, Place::Start);
        api.cut();
        api.until_asked("to go on", before, |asked| asked.path == PODS).await;
        api.forget(|world| {
            world.delete(PODS, "shop", "web-1");
            world.put(PODS, pod("web-3"));
        });
        api.release();
        running.until(&["web", "web-2", "web-3"]).await;
        assert_eq!(running.report(Kind::Pod).lists, 2);
    }
}

#[tokio::test]
async fn pages_are_asked_for_where_lists_are_not_streamed() {
    let api = serve(&["web-1", "web-2", "web-3", "web-4", "web-5"], false).await;
    api.pages_of(2);
    let mut running = Running::start(&api).await;
    running.batch().await;
    running.until(&["web", "web-1", "web-2", "web-3", "web-4", "web-5"]).await;
    api.delete(PODS, "shop", "web-5");
    running.until(&["web", "web-1", "web-2", "web-3", "web-4"]).await;
    api.forget(|world| world.delete(PODS, "shop", "web-4"));
    running.until(&["web", "web-1", "web-2", "web-3"]).await;
    let asked: Vec<Asked> = api.asked().into_iter().filter(|asked| asked.path == PODS).collect();
    let count = |is_it: &dyn Fn(&Asked) -> bool| asked.iter().filter(|asked| is_it(asked)).count();
    // What was found out once is not tried again; a page is no larger than we can take.
    assert_eq!(count(&|asked| asked.says("sendInitialEvents=true")), 1);
    assert_eq!((count(&is_first_page), count(&|asked| asked.query.contains("continue="))), (2, 3), "{asked:#?}");
    assert!(asked.iter().all(|asked| !asked.query.contains("limit=") || asked.says("limit=500")), "{asked:#?}");
    // Of now, and not of whatever a replica that lags behind has.
    assert!(asked.iter().all(|asked| !asked.says("resourceVersion=0")), "{asked:#?}");
}

#[tokio::test]
async fn a_list_that_is_too_old_amid_its_pages_begins_anew() {
    let api = serve(&["web-1", "web-2", "web-3", "web-4", "web-5"], false).await;
    api.pages_of(2);
    // The first list of all, of which nothing may be told before it is complete.
    api.hold(PODS, "continue=", 1, Place::Start);
    let mut running = Running::start(&api).await;
    api.until_asked("the second page", 0, |asked| asked.path == PODS && asked.query.contains("continue=")).await;
    running.watched("the other kinds", |kind, report| kind == Kind::Pod || report.state == WatchState::Synced).await;
    api.forget(|world| world.delete(PODS, "shop", "web-1"));
    assert!(matches!(running.batches.try_recv(), Err(TryRecvError::Empty)));
    api.release();
    running.batch().await;
    assert!(!running.names().contains("web-1"));
    running.until(&["web", "web-2", "web-3", "web-4", "web-5"]).await;

    // A repeated one: what its pages did not show before it broke off is there all the same.
    running.kept = vec!["web", "web-4", "web-5"];
    let before = api.asked().len();
    api.hold(PODS, "continue=", 1, Place::Start);
    api.forget(|world| world.delete(PODS, "shop", "web-2"));
    api.until_asked("the second page", before, |asked| asked.path == PODS && asked.query.contains("continue=")).await;
    api.forget(|world| {
        world.delete(PODS, "shop", "web-3");
        world.put(PODS, pod("web-6"));
    });
    api.release();
    running.until(&["web", "web-4", "web-5", "web-6"]).await;
    assert_eq!(running.report(Kind::Pod).state, WatchState::Synced);
}

#[tokio::test]
async fn a_slow_list_takes_nothing_away_and_holds_up_no_other_kind() {
    for is_streaming in [true, false] {
        let api = serve(&["web-1", "web-2", "web-3"], is_streaming).await;
        api.hold(PODS, list(is_streaming), 1, Place::Middle);
        let mut running = Running::start(&api).await;
        running
            .watched("the other kinds", |kind, report| kind == Kind::Pod || report.state == WatchState::Synced)
            .await;
        assert!(matches!(running.batches.try_recv(), Err(TryRecvError::Empty)));
        assert_eq!(running.report(Kind::Pod).state, WatchState::Pending);
        api.delete(PODS, "shop", "web-2");
        api.release();
        running.until(&["web", "web-1", "web-3"]).await;

        running.kept = vec!["web", "web-3"];
        let before = api.asked().len();
        api.hold(PODS, list(is_streaming), 1, Place::Middle);
        api.forget(|world| world.delete(PODS, "shop", "web-1"));
        api.until_asked("the list", before, |asked| asked.path == PODS).await;
        api.put(SERVICES, service("late"));
        running.until(&["web", "late", "web-1", "web-3"]).await;
        api.release();
        running.until(&["web", "late", "web-3"]).await;
    }
}

#[tokio::test]
async fn a_list_that_falls_silent_is_asked_for_again() {
    for is_streaming in [true, false] {
        let api = serve(&["web-1", "web-2"], is_streaming).await;
        api.hold(PODS, list(is_streaming), 1, Place::Middle);
        let patience = Patience { read: Duration::from_secs(2), ..Patience::default() };
        let mut running = Running::start_as(&api, None, patience).await;
        running.until(&["web", "web-1", "web-2"]).await;
        // Those that were merely quiet went on where they were.
        assert_eq!(running.report(Kind::Service).lists, 1);
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_asked_for_again() {
    for is_streaming in [true, false] {
        let api = serve(&["web-1", "web-2"], is_streaming).await;
        api.hold(PODS, list(is_streaming), 1, Place::Middle);
        let mut running = Running::start(&api).await;
        running
            .watched("the other kinds", |kind, report| kind == Kind::Pod || report.state == WatchState::Synced)
            .await;
        api.cut();
        running.until(&["web", "web-1", "web-2"]).await;
        running.kept = vec!["web", "web-1", "web-2"];
        let lists = running.report(Kind::Pod).lists;
        // A watch that breaks off goes on where it was, and knows what happened meanwhile.
        for number in 3..8 {
            api.cut();
            api.put(PODS, pod(&format!("web-{number}")));
        }
        running.until(&["web", "web-1", "web-2", "web-3", "web-4", "web-5", "web-6", "web-7"]).await;
        assert_eq!((running.report(Kind::Pod).lists, running.report(Kind::Service).lists), (lists, 1));
    }
}

#[tokio::test]
async fn who_is_told_to_stay_away_comes_back_when_it_may() {
    const REST: Duration = Duration::from_secs(1);
    let wait = [("Retry-After", "1")];
    for is_streaming in [true, false] {
        let api = serve(&["web-1"], is_streaming).await;
        api.refuse(PODS, list(is_streaming), 2, 429, &wait);
        let mut running = Running::start(&api).await;
        running.until(&["web", "web-1"]).await;
        running.kept = vec!["web", "web-1"];
        let lists = running.report(Kind::Pod).lists;
        // Where lists are not streamed, the watch begins after the list.
        api.until_asked("to watch", 0, |asked| {
            asked.path == PODS && asked.says("watch=true") && (is_streaming || !asked.says("sendInitialEvents=true"))
        })
        .await;
        let before = api.asked().len();
        api.refuse(PODS, "watch=true", 2, 429, &wait);
        api.cut();
        api.put(PODS, pod("web-2"));
        running.until(&["web", "web-1", "web-2"]).await;
        assert_eq!(running.report(Kind::Pod).lists, lists);
        let asked = api.asked();
        let of_the_list = asked.iter().filter(|asked| asked.path == PODS && asked.query.contains(list(is_streaming)));
        let of_the_watch = asked.iter().skip(before).filter(|asked| asked.path == PODS);
        for times in
            [of_the_list.map(|asked| asked.at).collect::<Vec<_>>(), of_the_watch.map(|asked| asked.at).collect()]
        {
            assert_eq!(times.len(), 3, "{asked:#?}");
            assert!(times.windows(2).all(|two| two[1] - two[0] >= REST), "{times:?}");
        }
    }
}

#[tokio::test]
async fn a_token_that_ended_is_replaced_by_the_one_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "one").unwrap();
    let api = serve(&["web-1"], true).await;
    api.trust("one");
    let mut running = Running::start_as(&api, Some(&file), Patience::default()).await;
    running.until(&["web", "web-1"]).await;
    running.kept = vec!["web", "web-1"];
    api.trust("two");
    api.put(PODS, pod("web-2"));
    let refused = |_, report: &KindReport| report.trouble.as_ref().is_some_and(|why| why.contains("Unauthorized"));
    running.watched("nobody is let in", refused).await;
    assert!(matches!(running.batches.try_recv(), Err(TryRecvError::Empty)));
    // The kubelet writes another one. It is read within a minute.
    std::fs::write(&file, "two").unwrap();
    running.until(&["web", "web-1", "web-2"]).await;
    // Of the other kinds nothing was heard since.
    assert_eq!(running.report(Kind::Pod).trouble, None);
    assert_eq!(running.lists(), [1].into(), "what was known was asked for again");
}
