//! What can be missing of an enrolled pod in the kernel, and how often each was found missing and mended.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Something that was in force and is not any more, although nobody told the agent to undo it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Drift {
    /// A policy rule in the pod's namespace.
    Rule = 0,
    /// The local route in the mesh's table.
    Route = 1,
    /// A sysctl of the namespace.
    Sysctl = 2,
    /// The namespace's `lo` was down.
    Loopback = 3,
    /// A program of the pod, its link, its maps or their pins.
    Program = 4,
    /// The guard at the pod's edge.
    Guard = 5,
    /// The pod's entry in the node's map of enrolled pods.
    Entry = 6,
    /// The pod's destinations in the node's map of routes.
    Destinations = 7,
    /// The listeners that the pod's programs steer to.
    Listeners = 8,
    /// The node's own programs: the connect hooks and the observer of the kubelet.
    Hooks = 9,
}

impl Drift {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::Rule,
        Self::Route,
        Self::Sysctl,
        Self::Loopback,
        Self::Program,
        Self::Guard,
        Self::Entry,
        Self::Destinations,
        Self::Listeners,
        Self::Hooks,
    ];

    /// The value of the metric's label.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rule => "rule",
            Self::Route => "route",
            Self::Sysctl => "sysctl",
            Self::Loopback => "loopback",
            Self::Program => "program",
            Self::Guard => "guard",
            Self::Entry => "entry",
            Self::Destinations => "destinations",
            Self::Listeners => "listeners",
            Self::Hooks => "hooks",
        }
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How often each was found.
#[derive(Debug, Default)]
pub struct Counts([AtomicU64; Drift::ALL.len()]);

impl Counts {
    /// One more.
    pub fn add(&self, what: Drift) {
        if let Some(count) = self.0.get(what as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many since the start.
    #[must_use]
    pub fn get(&self, what: Drift) -> u64 {
        self.0.get(what as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_count_of_its_own() {
        let counts = Counts::default();
        for (index, what) in Drift::ALL.into_iter().enumerate() {
            assert_eq!(what as usize, index);
            counts.add(what);
        }
        counts.add(Drift::Guard);
        assert_eq!(Drift::ALL.map(|what| counts.get(what)), [1, 1, 1, 1, 1, 2, 1, 1, 1, 1]);
    }
}
