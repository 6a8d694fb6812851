//! One type's part of the catalog. All collections are persistent: a clone is a few reference counts.

use std::ops::Bound;
use std::sync::Arc;

use imbl::{HashMap, OrdMap, OrdSet, Vector};

use super::Entry;

type Index = HashMap<Arc<str>, OrdSet<Arc<str>>>;

#[derive(Clone, Debug, Default)]
pub(in crate::server) struct Kind {
    entries: OrdMap<Arc<str>, Arc<Entry>>,
    aliases: Index,
    members: Index,
    /// Names that changed, oldest first; the change `log[i]` made version `trimmed + i + 1`.
    log: Vector<Arc<str>>,
    trimmed: u64,
}

/// The log does not reach back far enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct Overrun;

impl Kind {
    /// The number of changes so far.
    pub(in crate::server) fn version(&self) -> u64 {
        self.trimmed + self.log.len() as u64
    }

    pub(in crate::server) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(in crate::server) fn get(&self, name: &str) -> Option<&Arc<Entry>> {
        self.entries.get(name)
    }

    /// Primary names of the resources with this primary name or alias.
    pub(in crate::server) fn lookup(&self, name: &str) -> Vec<Arc<str>> {
        let primary = self.entries.get_key_value(name).map(|(name, _)| name);
        let aliased = self.aliases.get(name).into_iter().flatten().filter(|found| &***found != name);
        primary.into_iter().chain(aliased).cloned().collect()
    }

    /// Primary names of the resources that belong to the one named.
    pub(in crate::server) fn members(&self, name: &str) -> impl Iterator<Item = &Arc<str>> {
        self.members.get(name).into_iter().flatten()
    }

    /// The entries behind a name, in the order of their names; all of them if none is given.
    pub(in crate::server) fn after(&self, name: Option<&Arc<str>>) -> impl Iterator<Item = (&Arc<str>, &Arc<Entry>)> {
        let from: Bound<&Arc<str>> = name.map_or(Bound::Unbounded, Bound::Excluded);
        self.entries.range::<_, Arc<str>>((from, Bound::Unbounded))
    }

    /// Names changed since a version; a name may come more than once.
    pub(in crate::server) fn changed_since(&self, version: u64) -> Result<impl Iterator<Item = &Arc<str>>, Overrun> {
        let skip = version.checked_sub(self.trimmed).ok_or(Overrun)?;
        let skip = usize::try_from(skip).map_err(|_| Overrun)?.min(self.log.len());
        Ok(self.log.focus().narrow(skip..).into_iter())
    }

    pub(super) fn set(&mut self, entry: Entry) {
        let name = entry.resource.name.clone();
        let before = self.entries.get(&name).cloned();
        if before.as_deref() == Some(&entry) {
            return;
        }
        if let Some(before) = before {
            self.unindex(&before);
        }
        for alias in &entry.resource.aliases {
            self.aliases.entry(alias.clone()).or_default().insert(name.clone());
        }
        for group in &entry.member_of {
            self.members.entry(group.clone()).or_default().insert(name.clone());
        }
        self.entries.insert(name.clone(), Arc::new(entry));
        self.log.push_back(name);
    }

    pub(super) fn remove(&mut self, name: &str) {
        if let Some((name, entry)) = self.entries.remove_with_key(name) {
            self.unindex(&entry);
            self.log.push_back(name);
        }
    }

    /// Forgets the oldest changes.
    pub(super) fn trim(&mut self, min: usize) {
        let keep = min.max(2 * self.entries.len());
        while self.log.len() > keep {
            self.log.pop_front();
            self.trimmed += 1;
        }
    }

    fn unindex(&mut self, entry: &Entry) {
        let name = &entry.resource.name;
        for alias in &entry.resource.aliases {
            unindex(&mut self.aliases, alias, name);
        }
        for group in &entry.member_of {
            unindex(&mut self.members, group, name);
        }
    }
}

fn unindex(index: &mut Index, key: &Arc<str>, name: &Arc<str>) {
    if let Some(names) = index.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            index.remove(key);
        }
    }
}
