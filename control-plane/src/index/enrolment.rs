//! Pods that are enrolled by their labels, but whose capture nobody has confirmed yet.
//!
//! Such a pod would get plaintext where its owner asked for mutual TLS, so it is marked unhealthy; but not for ever, or a
//! broken node agent would take every application down. The clock is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use super::Note;
use crate::api::{Kind, Name, ObjectId};

/// Who waits since when.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    since: BTreeMap<Name, SystemTime>,
    deadlines: BTreeSet<(SystemTime, Name)>,
    /// Those that were enrolled before they had an address: the CNI plugin has captured them before anything ran in them.
    from_start: BTreeSet<Name>,
}

impl Waiting {
    /// The pod waits, since `now` if it did not before (or since `began`, where that is known). Returns whether it is
    /// still within its time.
    pub(super) fn wait(&mut self, pod: &Name, began: SystemTime, bound: Duration, now: SystemTime) -> bool {
        let since = *self.since.entry(pod.clone()).or_insert(began);
        // A time that cannot be expressed is never reached.
        let Some(deadline) = since.checked_add(bound) else { return true };
        let entry = (deadline, pod.clone());
        if deadline > now {
            self.deadlines.insert(entry);
            true
        } else {
            self.deadlines.remove(&entry);
            false
        }
    }

    /// The pod has no address yet, and is enrolled or not.
    pub(super) fn start(&mut self, pod: &Name, is_enrolled: bool) {
        if is_enrolled {
            self.from_start.insert(pod.clone());
        }
    }

    /// Whether the pod was enrolled before it had an address.
    pub(super) fn is_from_start(&self, pod: &Name) -> bool {
        self.from_start.contains(pod)
    }

    /// What cannot be told from the objects that are there now.
    #[cfg(test)]
    pub(super) fn take_starts_of(&mut self, other: &Self) {
        self.from_start.clone_from(&other.from_start);
    }

    /// The pod waits no longer.
    pub(super) fn forget(&mut self, pod: &Name, bound: Duration) {
        self.from_start.remove(pod);
        if let Some(since) = self.since.remove(pod)
            && let Some(deadline) = since.checked_add(bound)
        {
            self.deadlines.remove(&(deadline, pod.clone()));
        }
    }

    /// The pods whose time ended at or before `now`.
    pub(super) fn due(&self, now: SystemTime) -> Vec<Name> {
        self.deadlines.iter().take_while(|(deadline, _)| *deadline <= now).map(|(_, pod)| pod.clone()).collect()
    }

    /// When the next pod's time ends.
    pub(super) fn next_deadline(&self) -> Option<SystemTime> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// What to tell people about each waiting pod.
    pub(super) fn notes(&self, bound: Duration) -> Vec<Note> {
        let note = |(pod, since): (&Name, &SystemTime)| {
            let within = since.checked_add(bound).is_none_or(|end| self.deadlines.contains(&(end, pod.clone())));
            let reason = if within {
                "enrolled, but its node's agent has not confirmed that its traffic is captured; gets no traffic until then"
            } else if self.from_start.contains(pod) {
                "enrolled, but its node's agent did not confirm in time that its traffic is captured; is reached by tunnel, as it \
                 was enrolled from its start"
            } else {
                "enrolled, but its node's agent did not confirm in time that its traffic is captured; gets plaintext traffic"
            };
            Note { object: ObjectId::namespaced(Kind::Pod, pod).to_string(), reason: reason.to_owned() }
        };
        self.since.iter().map(note).collect()
    }
}
