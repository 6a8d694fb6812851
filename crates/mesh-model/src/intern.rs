//! One copy of what many workloads have in common: whose they are, where they run, which services and policies they
//! belong to, and the texts in these.
//!
//! At 100,000 workloads the same few thousand would otherwise be held a million times.

use std::hash::Hash;
use std::sync::Arc;

use imbl::HashMap;

use crate::workload::{Gateways, Location, Membership, Origin, Workload};

/// Below this many things of a kind there is nothing to gain from looking for unused ones.
const SWEEP_FLOOR: usize = 1024;

/// What is in use, and some that no longer is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interner {
    texts: Pool<str>,
    origins: Pool<Origin>,
    locations: Pool<Location>,
    services: Pool<[Membership]>,
    policies: Pool<[Arc<str>]>,
    gateways: Pool<Gateways>,
    /// Workloads that went away since what is unused was last forgotten.
    gone: usize,
}

impl Interner {
    /// Puts the shared copies in place of a workload's own.
    pub(crate) fn share(&mut self, workload: &mut Workload) {
        let Self { texts, origins, locations, services, policies, gateways, gone: _ } = self;
        let shared = workload.shared();
        origins.share(shared.origin, |origin| texts.share_all(origin.texts()));
        locations.share(shared.location, |location| texts.share_all(location.texts()));
        services.share(shared.services, |all| texts.share_all(all.iter_mut().map(|one| &mut one.service)));
        policies.share(shared.policies, |keys| texts.share_all(keys.iter_mut()));
        if let Some(own) = shared.gateways {
            gateways.share(own, |_| {});
        }
        texts.share_all([&mut workload.hostname]);
        let due = texts.is_due() || origins.is_due() || locations.is_due();
        if due || services.is_due() || policies.is_due() || gateways.is_due() {
            self.sweep();
        }
    }

    /// A workload is gone. Once as many went as there are things, those that nothing holds are forgotten: constant time on
    /// average.
    pub(crate) fn release(&mut self) {
        self.gone += 1;
        if self.gone >= SWEEP_FLOOR.max(self.len()) {
            self.sweep();
        }
    }

    fn len(&self) -> usize {
        let Self { texts, origins, locations, services, policies, gateways, gone: _ } = self;
        let within = origins.all.len() + locations.all.len() + services.all.len() + policies.all.len();
        texts.all.len() + within + gateways.all.len()
    }

    /// Forgets what nothing else holds. What holds texts goes before the texts.
    fn sweep(&mut self) {
        self.origins.sweep();
        self.locations.sweep();
        self.services.sweep();
        self.policies.sweep();
        self.gateways.sweep();
        self.texts.sweep();
        self.gone = 0;
    }
}

/// Things of one kind, each once.
#[derive(Debug)]
struct Pool<T: ?Sized> {
    all: HashMap<Arc<T>, ()>,
    /// How many were in use when that was last looked at.
    in_use: usize,
}

impl<T: ?Sized> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Self { all: self.all.clone(), in_use: self.in_use }
    }
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { all: HashMap::new(), in_use: 0 }
    }
}

impl<T: ?Sized + Hash + Eq> Pool<T> {
    /// Puts the shared copy in the place of this one, or makes this one the copy; `before` is called then, with it, if
    /// nobody else holds it.
    fn share(&mut self, own: &mut Arc<T>, before: impl FnOnce(&mut T)) {
        if let Some((shared, ())) = self.all.get_key_value(&**own) {
            *own = Arc::clone(shared);
            return;
        }
        if let Some(own) = Arc::get_mut(own) {
            before(own);
        }
        self.all.insert(Arc::clone(own), ());
    }

    fn share_all<'a>(&mut self, all: impl IntoIterator<Item = &'a mut Arc<T>>)
    where
        T: 'a,
    {
        all.into_iter().for_each(|own| self.share(own, |_| {}));
    }

    /// Whether once as much again has come as was in use: constant time on average.
    fn is_due(&self) -> bool {
        self.all.len() >= SWEEP_FLOOR.max(self.in_use * 2)
    }

    /// A copy of the snapshot may keep some for longer, which costs a little memory and nothing else.
    fn sweep(&mut self) {
        // Counted before anything is removed: removing copies nodes, and with them the counts.
        let unused: Vec<_> = self.all.keys().filter(|one| Arc::strong_count(one) == 1).cloned().collect();
        for one in unused {
            self.all.remove(&one);
        }
        self.in_use = self.all.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{in_service, pod};

    fn workload(name: &str, node: &str) -> Workload {
        let mut wire = in_service(pod(name, &[]), "web", &[]);
        wire.node = node.into();
        wire.service_account = "web".into();
        Workload::try_from(&wire).unwrap()
    }

    #[test]
    fn what_is_equal_becomes_one() {
        let mut interner = Interner::default();
        let (mut a, mut b) = (workload("a", "node-1"), workload("b", "node-1"));
        let (before_a, before_b) = (a.clone(), b.clone());
        interner.share(&mut a);
        interner.share(&mut b);
        assert_eq!((&a, &b), (&before_a, &before_b));
        assert!(Arc::ptr_eq(&a.origin, &b.origin) && Arc::ptr_eq(&a.location, &b.location));
        assert!(Arc::ptr_eq(&a.services, &b.services));
    }

    #[test]
    fn equal_texts_become_one_in_things_that_differ() {
        let mut interner = Interner::default();
        let (mut a, mut b) = (workload("a", "node-1"), workload("b", "node-2"));
        interner.share(&mut a);
        interner.share(&mut b);
        assert!(!Arc::ptr_eq(&a.location, &b.location));
        assert!(Arc::ptr_eq(&a.location.cluster_id, &b.location.cluster_id));
    }

    #[test]
    fn what_is_not_used_is_forgotten() {
        let mut interner = Interner::default();
        let mut kept = workload("kept", "node-kept");
        interner.share(&mut kept);
        for number in 0..3 * SWEEP_FLOOR {
            interner.share(&mut workload("gone", &format!("node-{number}")));
            // One workload brings a handful at a time.
            for held in [interner.texts.all.len(), interner.locations.all.len()] {
                assert!(held < SWEEP_FLOOR + 16, "{held}");
            }
        }
        let mut again = workload("again", "node-kept");
        interner.share(&mut again);
        assert!(Arc::ptr_eq(&kept.location, &again.location));
    }

    #[test]
    fn what_went_away_is_forgotten_though_nothing_comes() {
        let mut interner = Interner::default();
        for number in 0..SWEEP_FLOOR / 2 {
            interner.share(&mut workload("gone", &format!("node-{number}")));
        }
        assert!(interner.locations.all.len() == SWEEP_FLOOR / 2 && interner.len() > SWEEP_FLOOR);
        for _ in 0..interner.len() {
            interner.release();
        }
        assert_eq!(interner.len(), 0);
    }
}
