//! Taking over what an earlier agent left: the kernel's state is the truth, the pods' files say what it means.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use super::enrolment::found;
use super::host::Host;
use super::netns::Netns;
use super::pod::{self, EnrolError, Pod, PodInfo, Sandbox};
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
    /// Whether its file is lost: then nothing is known of it but its UID and its namespace, until somebody announces it. No proxy
    /// is told of it meanwhile, since it has no identity.
    pub unnamed: bool,
}

impl Stranded {
    /// One that is not served, or not any more where its file says so.
    pub fn new(saved: Saved) -> Self {
        let leaving = saved.leaving;
        let reason = String::from("it was withdrawn and is not released yet");
        Self { saved, reason, listeners: None, leaving, netns: None, unnamed: false }
    }

    /// One that the kernel holds and no file tells of.
    ///
    /// # Errors
    /// When its namespace cannot be asked.
    fn unnamed(uid: String, netns: &Netns, path: PathBuf) -> Result<Self, EnrolError> {
        let nothing = String::new;
        let info =
            PodInfo { uid, name: nothing(), namespace: nothing(), service_account: nothing(), addresses: Vec::new() };
        let before = pod::before_unknown(netns)?;
        let saved = Saved::new(&info, netns, &Sandbox { id: nothing(), path }, before);
        let reason = String::from(
            "captured, but what an earlier agent wrote down of it is lost; it is taken over when it is announced again \
             (as by its labels), or restart the pod",
        );
        Ok(Self { reason, unnamed: true, ..Self::new(saved) })
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

/// Pods by UID: those that are adopted, and those that are not; and whether every pod that is pinned is among them.
type Adopted = (HashMap<String, Arc<Pod>>, BTreeMap<String, Stranded>, bool);

/// Takes over the pods of an earlier agent. Those that cannot be served are stranded; their capture stays. What is left
/// of others is removed.
///
/// # Errors
/// When the folder of the pods' files cannot be read.
pub fn all(host: &Host, state: &State) -> Result<Adopted, StateError> {
    let (mut pods, mut stranded) = (HashMap::new(), BTreeMap::new());
    let (mut known, mut cookies) = (BTreeSet::new(), BTreeSet::new());
    let mut unread = Vec::new();
    for saved in state.load()? {
        let saved = match saved {
            Ok(saved) => saved,
            Err(error) => {
                tracing::error!(%error, "cannot read the state of a pod; its capture stays as it is");
                unread.push(error);
                continue;
            }
        };
        let uid = saved.pod.uid.clone();
        known.insert(uid.clone());
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
    let (unnamed, all_known) = search(host, &known);
    cookies.extend(unnamed.iter().map(|found| found.saved.netns_cookie));
    // A file that nothing pinned goes with is of a pod that is gone.
    unread.retain(|error| error.uid().is_none_or(|uid| !host.capture.is_dead(&uid)));
    if all_known && unread.is_empty() {
        sweep_map(host, &cookies);
    }
    stranded.extend(unnamed.into_iter().map(|found| (found.saved.pod.uid.clone(), found)));
    Ok((pods, stranded, all_known))
}

/// Takes over one pod, with the listeners that a proxy returned, if one did. Blocks shortly.
pub fn one(host: &Host, saved: &Saved, returned: Option<Arc<ListenerSet>>) -> Adoption {
    let Some(netns) = Netns::find(&saved.netns_path, saved.netns_inode, saved.netns_cookie) else {
        return if is_gone(host, saved) {
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

/// Whether a pod's namespace is gone: it left its path and its processes ended, or the kernel says so. Blocks shortly.
pub fn is_gone(host: &Host, saved: &Saved) -> bool {
    saved.is_gone() || host.capture.is_dead(&saved.pod.uid)
}

/// Looks in the kernel for pods that are captured, in whichever layout, and that are none of these UIDs. Removes the pins of
/// namespaces that are gone. Returns those that were found, and whether there are no others. Blocks: looks at every process if
/// there are any.
pub fn search(host: &Host, known: &BTreeSet<String>) -> (Vec<Stranded>, bool) {
    let held = match host.capture.held() {
        Ok(held) => held,
        Err(error) => {
            tracing::warn!(%error, "cannot look for what is pinned");
            return (Vec::new(), false);
        }
    };
    let mut found = BTreeMap::new();
    let mut complete = true;
    for held in held.into_iter().filter(|held| held.uid.as_ref().is_none_or(|uid| !known.contains(uid))) {
        let folder = held.folder.display();
        match (&held.uid, &held.netns_inode) {
            (_, Ok(None)) => {
                if let Err(error) = host.capture.unpin(&held) {
                    tracing::warn!(%folder, %error, "cannot remove what is left of a namespace that is gone");
                    complete = false;
                }
            }
            (_, Err(error)) => {
                tracing::warn!(%folder, %error, "cannot ask what is pinned here; left as it is");
                complete = false;
            }
            (Some(uid), Ok(Some(inode))) if found.contains_key(uid) => {
                // In another layout too. One in two namespaces is one too many.
                complete &= found.get(uid).is_some_and(|known: &Stranded| known.saved.netns_inode == *inode);
            }
            (uid, Ok(Some(inode))) => match uid.as_ref().and_then(|uid| unnamed(uid, *inode)) {
                Some(stranded) => drop(found.insert(stranded.saved.pod.uid.clone(), stranded)),
                None => {
                    tracing::warn!(%folder, inode, "captured, and neither its file nor its network namespace is found");
                    complete = false;
                }
            },
        }
    }
    (found.into_values().collect(), complete)
}

/// The network namespace with this inode, and its path, which may be empty; `None` where it is not to be found. Blocks: may look at
/// every process.
pub fn netns_of(inode: u64) -> Option<(Netns, PathBuf)> {
    let found = found::of_inode(inode)?;
    let netns = Netns::new(std::fs::File::open(&found.open).ok()?.into()).ok()?;
    (netns.inode() == inode).then_some((netns, found.path))
}

/// A pod that is captured and of which no file tells, if its namespace is to be found.
fn unnamed(uid: &str, inode: u64) -> Option<Stranded> {
    let (netns, path) = netns_of(inode)?;
    match Stranded::unnamed(uid.to_owned(), &netns, path) {
        Ok(stranded) => {
            tracing::warn!(pod = uid, "captured, and nothing is written down of it; its capture stays");
            Some(stranded)
        }
        Err(error) => {
            tracing::warn!(pod = uid, %error, "captured, and nothing is written down of it, nor can it be asked");
            None
        }
    }
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
