//! Asks everybody: the API server once for each kind, and the mesh's own pods, so many at a time, each within its own time.
//! Whoever does not answer is a line of the report, not the end of it.

#![expect(
    clippy::result_large_err,
    reason = "a pod that is no part of the mesh is no error, but what most of them are"
)]

use std::convert::Infallible;
use std::io::{IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::ConfigMap;
use serde::de::DeserializeOwned;
use tokio::time::{interval, sleep};

use super::cluster::{Cluster, all, inside};
use super::error::{AskError, CliError};
use super::facts::{AgentPod, Asked, Component, Culvertd, Facts, Part, Pod};
use super::read;

/// Pods asked at a time.
const AT_ONCE: usize = 16;
/// Quiet before anything is said of the progress.
const PATIENCE: Duration = Duration::from_secs(2);
/// Port of the admin pages of culvertd, on its loopback.
const CULVERTD_ADMIN: u16 = 15016;
/// Port of the admin pages of a proxy, on its loopback.
const PROXY_ADMIN: u16 = 15000;
/// The ConfigMap with the roots, and its key.
const ROOTS: (&str, &str) = ("culvert-ca-root-cert", "root-cert.pem");

/// Everything that `status` and `check` judge.
///
/// # Errors
/// The API server does not answer, or does not let this user see the nodes, namespaces or pods.
pub async fn everything(cluster: &Cluster, namespace: &str, kubernetes: String) -> Result<Facts, CliError> {
    let (nodes, namespaces, pods, events, sandboxes, roots, desired) = tokio::join!(
        cluster.list("nodes", all, "", "", read::node),
        cluster.list("namespaces", all, "", "", read::namespace),
        cluster.list("pods", all, "", "", |pod| read::pod(pod, namespace)),
        cluster.list("events", all, "", "reportingController=culvert-node", read::complaint),
        cluster.list("events", all, "", "reason=FailedCreatePodSandBox", read::refused_start),
        cluster.get::<ConfigMap>(namespace, ROOTS.0),
        desired(cluster, namespace),
    );
    let (mut parts, mut others): (Vec<Part>, Vec<Pod>) = (Vec::new(), Vec::new());
    for pod in pods? {
        match pod {
            Ok(part) => parts.push(part),
            Err(pod) => others.push(pod),
        }
    }
    others.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    let mut facts = Facts {
        kubernetes,
        system_namespace: namespace.to_owned(),
        nodes: nodes?,
        namespaces: namespaces?.into_iter().collect(),
        pods: others,
        ..Facts::default()
    };
    facts.nodes.sort_by(|a, b| a.name.cmp(&b.name));
    // Of one pod the latest counts.
    let latest = |events: Vec<Option<(String, String, String)>>| {
        let mut events: Vec<_> = events.into_iter().flatten().collect();
        events.sort_by(|a, b| a.1.cmp(&b.1));
        events.into_iter().map(|(uid, _, why)| (uid, why)).collect()
    };
    for (events, told) in [(events, &mut facts.complaints), (sandboxes, &mut facts.refused_starts)] {
        match events {
            Ok(events) => *told = latest(events),
            Err(error) => drop(facts.unknown.insert("events".to_owned(), error.to_string())),
        }
    }
    for (component, found) in desired {
        match found {
            Ok(desired) => drop(facts.desired.insert(component, desired)),
            Err(error) => drop(facts.unknown.insert(component.workload().to_owned(), error)),
        }
    }
    let (name, key) = ROOTS;
    match roots {
        Ok(map) => {
            let of_map = |map: Option<ConfigMap>| {
                let mut data = map.ok_or_else(|| format!("there is no ConfigMap {name}"))?.data.unwrap_or_default();
                read::roots(&data.remove(key).ok_or_else(|| format!("the ConfigMap {name} has no {key}"))?)
            };
            facts.roots = Some(of_map(map));
        }
        Err(error) => drop(facts.unknown.insert(format!("the ConfigMap {name}"), error)),
    }
    let (culvertd, agents, proxies) = split(parts);
    let total = culvertd.len() + agents.len() + proxies.len();
    let progress = Progress::new(total);
    let asked = async {
        tokio::join!(
            statuses(cluster, namespace, culvertd, &progress),
            agent_pods(cluster, namespace, agents, &progress),
            dumps(cluster, namespace, proxies, "/config_dump?include=discovery,certificates", &progress),
        )
    };
    (facts.culvertd, facts.agents, facts.proxies) = progress.shown(asked).await;
    Ok(facts)
}

/// How many pods of each part there should be; none where it is not installed.
async fn desired(cluster: &Cluster, namespace: &str) -> Vec<(Component, Result<Option<i32>, String>)> {
    let daemons = |component: Component| async move {
        let found = cluster.get::<DaemonSet>(namespace, component.workload()).await;
        (component, found.map(|set| set.map(|set| set.status.unwrap_or_default().desired_number_scheduled)))
    };
    let control = async {
        let found = cluster.get::<Deployment>(namespace, Component::Culvertd.workload()).await;
        let replicas = |deployment: Deployment| deployment.spec.replicas.unwrap_or(1);
        (Component::Culvertd, found.map(|deployment| deployment.map(replicas)))
    };
    let (control, agents, proxies) = tokio::join!(control, daemons(Component::Agent), daemons(Component::Proxy));
    vec![control, agents, proxies]
}

/// The mesh's own pods.
///
/// # Errors
/// As [`Cluster::list`].
pub async fn parts(cluster: &Cluster, namespace: &str) -> Result<Vec<Part>, CliError> {
    let pods = cluster.list("pods", inside, namespace, "", |pod| read::pod(pod, namespace)).await?;
    let mut parts: Vec<Part> = pods.into_iter().filter_map(Result::ok).collect();
    parts.sort_by(|a, b| (a.component, &a.node, &a.pod).cmp(&(b.component, &b.node, &b.pod)));
    Ok(parts)
}

/// The node of a pod, and its service account.
///
/// # Errors
/// It is not there, or runs nowhere yet.
pub async fn home(cluster: &Cluster, namespace: &str, name: &str) -> Result<(String, String), CliError> {
    let found = cluster.get::<k8s_openapi::api::core::v1::Pod>(namespace, name).await;
    let found = found.map_err(|reason| CliError::Api { what: format!("pod {namespace}/{name}"), reason })?;
    let spec = found.and_then(|pod| pod.spec);
    let spec =
        spec.ok_or_else(|| CliError::NotFound(format!("there is no pod {namespace}/{name}; --pod names one")))?;
    let account = spec.service_account_name.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_owned());
    let node = spec.node_name.filter(|node| !node.is_empty());
    let nowhere =
        || CliError::NotFound(format!("pod {namespace}/{name} is on no node yet; `kubectl describe` says why"));
    Ok((node.ok_or_else(nowhere)?, account))
}

/// By component; what is being deleted or has ended is not asked.
pub fn split(parts: Vec<Part>) -> (Vec<Part>, Vec<Part>, Vec<Part>) {
    let (mut culvertd, mut agents, mut proxies) = (Vec::new(), Vec::new(), Vec::new());
    for part in parts.into_iter().filter(|part| !part.ends) {
        match part.component {
            Component::Culvertd => culvertd.push(part),
            Component::Agent => agents.push(part),
            Component::Proxy => proxies.push(part),
        }
    }
    (culvertd, agents, proxies)
}

/// `/status` of each replica of culvertd.
pub async fn statuses(
    cluster: &Cluster,
    namespace: &str,
    parts: Vec<Part>,
    progress: &Progress,
) -> Vec<Asked<Culvertd>> {
    each(parts, progress, async |part| cluster.page(namespace, &part.pod, CULVERTD_ADMIN, "/status").await).await
}

/// What each agent has in force.
async fn agent_pods(
    cluster: &Cluster,
    namespace: &str,
    parts: Vec<Part>,
    progress: &Progress,
) -> Vec<Asked<Vec<AgentPod>>> {
    let command = ["ztunnel", "pods", "--output", "json"];
    each(parts, progress, async |part| {
        let said = cluster.run(namespace, &part.pod, "agent", &command).await?;
        serde_json::from_slice(&said).map_err(|error| AskError::Malformed(error.to_string()))
    })
    .await
}

/// A page of each proxy.
pub async fn dumps<T: DeserializeOwned>(
    cluster: &Cluster,
    namespace: &str,
    parts: Vec<Part>,
    path: &str,
    progress: &Progress,
) -> Vec<Asked<T>> {
    each(parts, progress, async |part| cluster.page(namespace, &part.pod, PROXY_ADMIN, path).await).await
}

/// The version of each part; of an agent its program's, which is asked for it.
pub async fn versions(cluster: &Cluster, namespace: &str, parts: Vec<Part>, progress: &Progress) -> Vec<Asked<String>> {
    #[derive(serde::Deserialize)]
    struct Page {
        #[serde(default)]
        version: String,
    }
    each(parts, progress, async |part| match part.component {
        Component::Agent => {
            let said = cluster.run(namespace, &part.pod, "agent", &["ztunnel", "version"]).await?;
            Ok(String::from_utf8_lossy(&said).trim().to_owned())
        }
        Component::Culvertd => {
            let page: Page = cluster.page(namespace, &part.pod, CULVERTD_ADMIN, "/status").await?;
            Ok(page.version)
        }
        Component::Proxy => {
            let page: Page = cluster.page(namespace, &part.pod, PROXY_ADMIN, "/config_dump?include=discovery").await?;
            Ok(page.version)
        }
    })
    .await
}

/// Asks each pod that runs, so many at a time; in the order of `parts`.
async fn each<T>(
    parts: Vec<Part>,
    progress: &Progress,
    ask: impl AsyncFn(&Part) -> Result<T, AskError>,
) -> Vec<Asked<T>> {
    let ask = &ask;
    let asked = stream::iter(parts.into_iter().enumerate()).map(async |(index, part)| {
        let answer = match &part.not_running {
            None => ask(&part).await,
            Some(why) => Err(AskError::NotRunning(why.clone())),
        };
        progress.done.fetch_add(1, Ordering::Relaxed);
        (index, Asked { part, answer })
    });
    // Whoever is slow keeps nobody else waiting.
    let mut asked: Vec<_> = asked.buffer_unordered(AT_ONCE).collect().await;
    asked.sort_by_key(|(index, _)| *index);
    asked.into_iter().map(|(_, asked)| asked).collect()
}

/// How many have answered, shown on a terminal if it takes long.
#[derive(Debug)]
pub struct Progress {
    total: usize,
    done: AtomicUsize,
}

impl Progress {
    /// So many will be asked.
    pub fn new(total: usize) -> Self {
        Self { total, done: AtomicUsize::new(0) }
    }

    /// Does the work, and shows how far it is.
    pub async fn shown<T>(&self, work: impl Future<Output = T>) -> T {
        if !std::io::stderr().is_terminal() {
            return work.await;
        }
        tokio::pin!(work);
        tokio::select! {
            done = &mut work => done,
            never = self.watch() => match never {},
        }
    }

    async fn watch(&self) -> Infallible {
        sleep(PATIENCE).await;
        let _line = Line;
        let mut ticks = interval(Duration::from_millis(200));
        loop {
            ticks.tick().await;
            let done = self.done.load(Ordering::Relaxed);
            // Nobody is left to tell if this fails.
            let _ = write!(std::io::stderr(), "\r{done} of {} pods of the mesh have answered", self.total);
        }
    }
}

/// The line of the progress; wiped when it is done, also by Ctrl-C.
struct Line;

impl Drop for Line {
    fn drop(&mut self) {
        // Nobody is left to tell if this fails.
        let _ = write!(std::io::stderr(), "\r\u{1b}[K");
    }
}
