//! What the manager does unasked: pods that are gone are withdrawn, those that lost something in the kernel are mended,
//! stranded ones are tried again.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::super::adopt::{self, Adoption, Stranded};
use super::super::drift::Drift;
use super::super::netns::{self, inode_at};
use super::super::pod::{EnrolError, Pod, Sandbox};
use super::{Connected, Notice, Task, blocking};

/// How often pods are looked after that are gone, have no listeners, are stranded or refused by a proxy.
pub(super) const ROUND: Duration = Duration::from_secs(2);
/// How often the manager looks whether a pod's namespace says that something changed.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// In how many ticks every pod is checked in the kernel, whether something is known to have changed or not.
const TICKS_PER_ROUND: u64 = 20;
/// Longest wait before pods are looked for again that are captured and not known.
const LONGEST_SEARCH: Duration = Duration::from_secs(60);
/// Most pods that are checked in one tick because something changed: the others wait for the next.
const MAX_CHANGED: usize = 32;

/// Which pods are checked when.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    tick: u64,
    /// What is wrong with a pod, as it was logged last.
    wrong: HashMap<String, String>,
    /// What is wrong with the node's programs, as it was logged last.
    node_error: Option<String>,
    /// When pods are looked for next that are captured and not known, and how long the wait is then.
    search: Option<(Instant, Duration)>,
}

impl Schedule {
    /// Those of `count` pods whose turn it is: every one once in [`TICKS_PER_ROUND`], evenly spread.
    fn turn(&mut self, count: usize) -> impl Fn(usize) -> bool + use<> {
        self.tick = self.tick.wrapping_add(1);
        let turn = self.tick % TICKS_PER_ROUND;
        move |index| index < count && index as u64 % TICKS_PER_ROUND == turn
    }

    /// Whether it is time: at first in each round, then ever less often, since every process is looked at.
    fn search_is_due(&mut self) -> bool {
        let now = Instant::now();
        let (next, wait) = self.search.unwrap_or((now, ROUND));
        if now < next {
            return false;
        }
        self.search = Some((now + wait, (wait * 2).min(LONGEST_SEARCH)));
        true
    }

    /// A pod is gone.
    pub(super) fn forget(&mut self, uid: &str) {
        self.wrong.remove(uid);
    }
}

impl Task {
    /// Checks in the kernel the pods whose turn it is, and those in whose namespace something changed; mends what is
    /// missing.
    pub(super) async fn tick(&mut self) {
        let mut pods = self.all();
        pods.sort_by(|a, b| a.info.uid.cmp(&b.info.uid));
        let turn = self.schedule.turn(pods.len());
        let mut changed = 0;
        let due: Vec<Arc<Pod>> = pods
            .into_iter()
            .enumerate()
            .filter(|(index, pod)| {
                // What is not asked now says so again in the next tick.
                let changed_now = changed < MAX_CHANGED && pod.take_changes();
                changed += usize::from(changed_now);
                changed_now || turn(*index)
            })
            .map(|(_, pod)| pod)
            .collect();
        if due.is_empty() {
            return;
        }
        let host = Arc::clone(&self.host);
        let looked = blocking(move || {
            Ok(due
                .into_iter()
                .map(|pod| {
                    let found = pod.look_after(&host);
                    (pod, found)
                })
                .collect::<Vec<_>>())
        });
        for (pod, (found, wrong)) in looked.await.unwrap_or_default() {
            self.report(&pod, &found, wrong);
        }
    }

    fn report(&mut self, pod: &Pod, found: &[Drift], wrong: Option<EnrolError>) {
        let uid = &pod.info.uid;
        if !found.is_empty() {
            let what: Vec<&str> = found.iter().map(|drift| drift.name()).collect();
            tracing::warn!(
                pod = uid,
                name = pod.info.name,
                namespace = pod.info.namespace,
                what = what.join(","),
                mended = wrong.is_none(),
                "capture was changed behind the agent's back"
            );
        }
        match wrong.map(|error| error.to_string()) {
            Some(reason) if self.schedule.wrong.get(uid) != Some(&reason) => {
                tracing::error!(pod = uid, reason, "not wholly in force");
                self.schedule.wrong.insert(uid.clone(), reason);
            }
            Some(_) => {}
            None => {
                if self.schedule.wrong.remove(uid).is_some() {
                    tracing::info!(pod = uid, "in force again");
                }
            }
        }
    }

    /// Withdraws pods whose namespace is gone, opens listeners that nobody returned, tells proxies again of pods that
    /// they refused, and tries stranded pods again.
    pub(super) async fn round(&mut self) {
        self.look_at_node().await;
        for pod in self.all() {
            if is_gone(&pod).await {
                let (uid, path) = (pod.info.uid.clone(), pod.sandbox().path);
                tracing::warn!(pod = uid, path = %path.display(), "its network namespace is gone and nobody withdrew it");
                drop(pod);
                self.withdraw(&uid, None, None);
            } else if pod.has_listeners(&self.host).is_err() {
                let opening = Arc::clone(&pod);
                let host = Arc::clone(&self.host);
                match blocking(move || opening.open_listeners(&host)).await {
                    Ok(()) => {
                        tracing::info!(pod = pod.info.uid, "listeners opened again");
                        self.announce(&pod);
                    }
                    Err(error) => tracing::warn!(pod = pod.info.uid, %error, "no listeners yet"),
                }
            }
        }
        for (proxy, uid) in self.refusals.due(Instant::now()) {
            let told = self.get(&uid).and_then(|pod| Some((pod.info.clone(), pod.listeners()?)));
            if let (Some(Connected { notices, .. }), Some((info, listeners))) = (self.proxies.get(&proxy), told) {
                // A full or closed channel: the connection is about to end.
                let _ = notices.try_send(Notice::Added(info, listeners));
            }
        }
        if !self.complete && self.schedule.search_is_due() {
            self.search().await;
        }
        for uid in self.stranded.keys().cloned().collect::<Vec<_>>() {
            self.look_after_stranded(&uid).await;
        }
    }

    /// Looks again for pods that are captured and not known, while there may be any.
    async fn search(&mut self) {
        let known = self.all().into_iter().map(|pod| pod.info.uid.clone()).chain(self.stranded.keys().cloned());
        let known: BTreeSet<String> = known.chain(self.leaving.uids().map(str::to_owned)).collect();
        let host = Arc::clone(&self.host);
        let searched = blocking(move || Ok(adopt::search(&host, &known)));
        let Ok((found, complete)) = searched.await else { return };
        for stranded in found {
            let uid = stranded.saved.pod.uid.clone();
            self.listed.insert(uid.clone());
            self.stranded.insert(uid, stranded);
        }
        self.complete = complete;
    }

    /// Takes note of which pods exist. One that does not any more may still run, as when its object is deleted by force; and
    /// its runtime may be about to say that it ends. One with neither a process nor its path is gone.
    pub(super) async fn take_list(&mut self, uids: HashSet<String>) {
        let pods = self.all().into_iter().map(|pod| (pod.info.uid.clone(), pod.sandbox(), pod.netns().inode()));
        let stranded =
            self.stranded.iter().filter(|(_, stranded)| !stranded.leaving).map(|(uid, Stranded { saved, .. })| {
                let sandbox = Sandbox { id: saved.sandbox.clone(), path: saved.netns_path.clone() };
                (uid.clone(), sandbox, saved.netns_inode)
            });
        let is_unlisted = |uid: &String, sandbox: &Sandbox| {
            // A runtime that gives no UID has the pod named by its sandbox.
            *uid != sandbox.id && self.listed.contains(uid) && !uids.contains(uid)
        };
        let unlisted: Vec<_> = pods.chain(stranded).filter(|(uid, sandbox, _)| is_unlisted(uid, sandbox)).collect();
        self.listed.retain(|uid| unlisted.iter().any(|(unlisted, ..)| unlisted == uid));
        self.listed.extend(uids);
        for (uid, Sandbox { path, .. }, inode) in unlisted {
            if blocking(move || Ok(netns::is_gone(&path, inode))).await.unwrap_or(false) {
                tracing::warn!(pod = uid, "it exists no more, nothing of it runs here, and nobody withdrew it");
                self.withdraw(&uid, None, None);
            }
        }
    }

    /// Checks the node's own programs, and whether others stand beside them.
    async fn look_at_node(&mut self) {
        let host = Arc::clone(&self.host);
        // What another version's agent left goes only when nothing depends on it any more.
        let all_known = self.complete && self.stranded.is_empty() && self.leaving.is_empty();
        let looked = blocking(move || {
            let mended = host.mend_hooks()?;
            host.look_for_foreign_programs()?;
            if all_known {
                for version in host.capture.former_layouts() {
                    host.capture.remove_layout(version)?;
                    tracing::info!(version, "every pod is in force in the present layout; a former one is removed");
                }
            }
            Ok::<_, EnrolError>(mended)
        });
        match looked.await {
            Ok(false) => self.schedule.node_error = None,
            Ok(true) => {
                self.schedule.node_error = None;
                self.host.drift.add(Drift::Hooks);
                tracing::warn!(
                    what = Drift::Hooks.name(),
                    mended = true,
                    "capture was changed behind the agent's back"
                );
            }
            Err(error) => {
                let error = Some(error.to_string());
                if self.schedule.node_error != error {
                    tracing::error!(error, "the node's programs are not as they should be");
                    self.schedule.node_error = error;
                }
            }
        }
    }

    async fn look_after_stranded(&mut self, uid: &str) {
        let Some(Stranded { saved, listeners, leaving, unnamed, .. }) = self.stranded.get(uid) else { return };
        if *leaving {
            return self.withdraw(uid, None, None);
        }
        if *unnamed {
            let (host, saved) = (Arc::clone(&self.host), saved.clone());
            if blocking(move || Ok(adopt::is_gone(&host, &saved))).await.unwrap_or(false) {
                tracing::info!(pod = uid, "its network namespace is gone and nobody withdrew it");
                self.withdraw(uid, None, None);
            }
            return;
        }
        let (host, saved, listeners) = (Arc::clone(&self.host), saved.clone(), listeners.clone());
        match blocking(move || Ok(adopt::one(&host, &saved, listeners))).await {
            Ok(Adoption::Adopted(pod)) => {
                tracing::info!(pod = uid, "adopted after all");
                self.adopted(*pod);
            }
            Ok(Adoption::Gone) => {
                tracing::info!(pod = uid, "its network namespace is gone and nobody withdrew it");
                self.withdraw(uid, None, None);
            }
            Ok(Adoption::Failed(reason)) => {
                if let Some(stranded) = self.stranded.get_mut(uid)
                    && stranded.reason != reason
                {
                    tracing::warn!(pod = uid, reason, "cannot adopt yet; its capture stays as it is");
                    stranded.reason = reason;
                }
            }
            Err(error) => tracing::warn!(pod = uid, %error, "cannot adopt yet"),
        }
    }
}

/// Whether a pod's namespace, which had a path, is at none now and without processes: whoever made it removed it.
async fn is_gone(pod: &Arc<Pod>) -> bool {
    let (path, inode) = (pod.sandbox().path, pod.netns().inode());
    if path.as_os_str().is_empty() || inode_at(&path) == Some(inode) {
        return false;
    }
    blocking(move || Ok(netns::is_gone(&path, inode))).await.unwrap_or(false)
}
