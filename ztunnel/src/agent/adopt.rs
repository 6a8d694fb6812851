//! Taking over what an earlier agent left: the kernel's state is the truth, the pods' files say what it means.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::capture::{PodCapture, folder_name};
use super::host::Host;
use super::netns::Netns;
use super::pod::{EnrolError, Pod};
use super::sockets::ListenerSet;
use super::state::{Saved, State, StateError};

/// A pod that is captured but cannot be served, or that was withdrawn and is not wholly released. It is tried again.
/// Its capture stays until somebody withdraws it.
#[derive(Debug)]
pub struct Stranded {
    /// What its file says.
    pub saved: Saved,
    /// Why.
    pub reason: String,
    /// What a proxy kept of it: that proxy goes on serving it.
    pub listeners: Option<Arc<ListenerSet>>,
    /// Whether it was withdrawn: then what is tried again is that.
    pub leaving: bool,
    /// Its namespace, if it was open when the pod was withdrawn: its path may be gone by now.
    pub netns: Option<Netns>,
}

impl Stranded {
    /// One that is not served, or not any more where its file says so.
    pub fn new(saved: Saved) -> Self {
        let leaving = saved.leaving;
        let reason = String::from("it was withdrawn and is not released yet");
        Self { saved, reason, listeners: None, leaving, netns: None }
    }

    /// Takes listeners that a proxy returned, if they are of this pod and it has none. One that leaves needs
    /// none.
    pub fn take_listeners(&mut self, listeners: ListenerSet) {
        if !self.leaving && self.listeners.is_none() && listeners.are_in(self.saved.netns_cookie) {
            self.listeners = Some(Arc::new(listeners));
        }
    }
}

/// What became of one pod.
pub enum Adoption {
    /// It is served from now on.
    Adopted(Box<Pod>),
    /// Its namespace is gone.
    Gone,
    /// It is captured and cannot be served; the reason.
    Failed(String),
}

/// Pods by UID: those that are adopted, and those that are not; and whether every pod that may be captured is among them.
type Adopted = (HashMap<String, Arc<Pod>>, BTreeMap<String, Stranded>, bool);

/// Takes over the pods of an earlier agent. Those that cannot be served are stranded; their capture stays. What is left
/// of others is removed.
///
/// # Errors
/// When the folder of the pods' files cannot be read.
pub fn all(host: &Host, state: &State) -> Result<Adopted, StateError> {
    let (mut pods, mut stranded) = (HashMap::new(), BTreeMap::new());
    let (mut folders, mut cookies) = (BTreeSet::new(), BTreeSet::new());
    // Whether every pod that may be captured is known.
    let mut complete = true;
    for saved in state.load()? {
        let saved = match saved {
            Ok(saved) => saved,
            Err(error) => {
                tracing::error!(%error, "cannot read the state of a pod; its capture stays as it is");
                complete = false;
                continue;
            }
        };
        let uid = saved.pod.uid.clone();
        folders.insert(folder_name(&uid));
        cookies.insert(saved.netns_cookie);
        if saved.leaving {
            tracing::info!(
                pod = uid,
                "withdrawn while an earlier agent ran, and not wholly released; that is finished"
            );
            stranded.insert(uid, Stranded::new(saved));
            continue;
        }
        match one(host, &saved, None) {
            Adoption::Adopted(pod) => {
                tracing::info!(pod = uid, name = pod.info.name, namespace = pod.info.namespace, "adopted");
                pods.insert(uid, Arc::from(pod));
            }
            Adoption::Gone => {
                tracing::info!(pod = uid, "gone while no agent ran");
                bury(host, state, &saved);
            }
            Adoption::Failed(reason) => {
                tracing::error!(pod = uid, reason, "cannot adopt; its capture stays as it is");
                stranded.insert(uid, Stranded { reason, ..Stranded::new(saved) });
            }
        }
    }
    let complete = complete & sweep_pins(host, &folders);
    if complete {
        sweep_map(host, &cookies);
    }
    Ok((pods, stranded, complete))
}

/// Takes over one pod, with the listeners that a proxy returned, if one did. Blocks shortly.
pub fn one(host: &Host, saved: &Saved, returned: Option<Arc<ListenerSet>>) -> Adoption {
    let Some(netns) = Netns::find(&saved.netns_path, saved.netns_inode, saved.netns_cookie) else {
        let is_dead = || host.capture.adopt_pod(&saved.pod.uid).is_none_or(|pod| pod.is_dead().unwrap_or(false));
        return if saved.is_gone() || is_dead() {
            Adoption::Gone
        } else {
            Adoption::Failed(String::from("its network namespace was not found"))
        };
    };
    match Pod::adopt(host, saved, netns, returned) {
        Ok(pod) => Adoption::Adopted(Box::new(pod)),
        Err(error) => Adoption::Failed(error.to_string()),
    }
}

/// Removes the pins of namespaces that are gone. Returns whether no other is pinned than those that are known.
fn sweep_pins(host: &Host, known: &BTreeSet<String>) -> bool {
    let Ok(pinned) = host.capture.pinned() else { return false };
    let mut complete = true;
    for folder in pinned.into_iter().filter(|folder| !known.contains(folder)) {
        let capture = PodCapture::named(&host.capture, &folder);
        match capture.is_dead() {
            Ok(false) => {
                tracing::warn!(folder, "pinned for a pod that this agent knows nothing of; left in force");
                complete = false;
            }
            Err(error) if !error.is_absence() => {
                tracing::warn!(folder, %error, "cannot ask what is pinned here; left as it is");
                complete = false;
            }
            // An earlier agent was ended before it attached anything.
            Ok(true) | Err(_) => {
                let _ = capture.unpin();
            }
        }
    }
    complete
}

/// Removes namespaces from the map of pods that belong to none: cookies are not used twice, but the map has an end.
fn sweep_map(host: &Host, known: &BTreeSet<u64>) {
    let stale = host.capture.cookies().unwrap_or_default().into_iter().filter(|cookie| !known.contains(cookie));
    for cookie in stale {
        match host.capture.release(cookie) {
            Ok(()) => tracing::info!(cookie, "removed a namespace of no known pod from the map of pods"),
            Err(error) => tracing::warn!(cookie, %error, "cannot remove a namespace from the map of pods"),
        }
    }
}

/// Removes what is left of a pod whose namespace is gone.
fn bury(host: &Host, state: &State, saved: &Saved) {
    let uid = &saved.pod.uid;
    let steps = [
        host.capture.release(saved.netns_cookie).map_err(EnrolError::from),
        host.capture.unpin_pod(uid).map_err(EnrolError::from),
        state.remove(uid).map_err(EnrolError::from),
    ];
    for error in steps.into_iter().filter_map(Result::err) {
        tracing::warn!(pod = uid, %error, "cannot clean up after a pod that is gone");
    }
}
