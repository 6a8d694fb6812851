//! What the manager does unasked: pods that are gone are withdrawn, those that lost something in the kernel are mended,
//! stranded ones are tried again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::super::adopt::{self, Adoption, Stranded};
use super::super::drift::Drift;
use super::super::netns::{self, inode_at};
use super::super::pod::{EnrolError, Pod};
use super::{Connected, Notice, Task, blocking};

/// How often pods are looked after that are gone, have no listeners, are stranded or refused by a proxy.
pub(super) const ROUND: Duration = Duration::from_secs(2);
/// How often the manager looks whether a pod's namespace says that something changed.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// In how many ticks every pod is checked in the kernel, whether something is known to have changed or not.
const TICKS_PER_ROUND: u64 = 20;
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
}

impl Schedule {
    /// Those of `count` pods whose turn it is: every one once in [`TICKS_PER_ROUND`], evenly spread.
    fn turn(&mut self, count: usize) -> impl Fn(usize) -> bool + use<> {
        self.tick = self.tick.wrapping_add(1);
        let turn = self.tick % TICKS_PER_ROUND;
        move |index| index < count && index as u64 % TICKS_PER_ROUND == turn
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
                if let Err(error) = self.withdraw(&uid).await {
                    tracing::warn!(pod = uid, %error, "cannot withdraw");
                }
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
        for (proxy, uid) in self.refusals.due(tokio::time::Instant::now()) {
            let told = self.get(&uid).and_then(|pod| Some((pod.info.clone(), pod.listeners()?)));
            if let (Some(Connected { notices, .. }), Some((info, listeners))) = (self.proxies.get(&proxy), told) {
                // A full or closed channel: the connection is about to end.
                let _ = notices.try_send(Notice::Added(info, listeners));
            }
        }
        for uid in self.stranded.keys().cloned().collect::<Vec<_>>() {
            self.look_after_stranded(&uid).await;
        }
    }

    /// Checks the node's own programs, and whether others stand beside them.
    async fn look_at_node(&mut self) {
        let host = Arc::clone(&self.host);
        // What another version's agent left goes only when nothing depends on it any more.
        let all_known = self.complete && self.stranded.is_empty();
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
        let Some(Stranded { saved, listeners, leaving, reason, .. }) = self.stranded.get(uid) else { return };
        if *leaving {
            let known = reason.clone();
            match self.withdraw(uid).await {
                Ok(()) => {}
                Err(error) if known.ends_with(&error.to_string()) => {}
                Err(error) => tracing::warn!(pod = uid, %error, "cannot withdraw yet"),
            }
            return;
        }
        let (host, saved, listeners) = (Arc::clone(&self.host), saved.clone(), listeners.clone());
        match blocking(move || Ok(adopt::one(&host, &saved, listeners))).await {
            Ok(Adoption::Adopted(pod)) => self.adopted(*pod),
            Ok(Adoption::Gone) => {
                if let Err(error) = self.withdraw(uid).await {
                    tracing::warn!(pod = uid, %error, "cannot clean up after a pod that is gone");
                }
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
