//! What there is to serve: the current resources of each type, and the order in which they changed last.
//!
//! Clients that do not get all changes in one response are told them in an order of their own: first what refers to nothing,
//! then what refers to something, and last what is gone. So nothing is told before what it refers to, and what takes the
//! place of another is there before that one goes. Where one gives up an alias and goes on, whoever has it now is told in the
//! same response, if not before.
//!
//! A change costs time in proportion to the logarithm of the number of resources. Readers take a [`Snapshot`], which
//! shares its structure with the catalog, and never wait for a writer. However far a client is behind, each name is told
//! once; only removals are forgotten one day, and clients that have missed one must start over. What is sent is encoded
//! once, in pieces that clients share.

mod kind;
mod part;
mod whole;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::watch;

pub(super) use self::kind::{Kind, Overrun, Progress, Stored};
pub(super) use self::part::{Draft, Part};
pub(super) use self::whole::Whole;
use crate::Resource;

/// Removals remembered per type at least; as many as there are resources if that is more.
const MIN_REMOVALS: usize = 16_384;

/// A resource, and the resources whose subscribers get it as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The resource.
    pub resource: Resource,
    /// Primary names of resources of the same type that this one belongs to: whoever asks for one of them gets this
    /// resource too, before it. A workload names its services, so that asking for a service brings its endpoints. Not
    /// on the wire.
    pub member_of: Vec<Arc<str>>,
    /// It cannot be used without another resource of its type, which must be known before it. Not on the wire.
    pub refers: bool,
}

impl From<Resource> for Entry {
    fn from(resource: Resource) -> Self {
        Self { resource, member_of: Vec::new(), refers: false }
    }
}

/// The resources of all types. Shared by the writer and all clients' streams.
#[derive(Debug)]
pub struct Catalog {
    current: RwLock<Snapshot>,
    /// Held by the one update that is going on.
    writing: Mutex<()>,
    changes: watch::Sender<u64>,
    min_removals: usize,
}

impl Default for Catalog {
    fn default() -> Self {
        Self::new()
    }
}

impl Catalog {
    /// Nothing.
    pub fn new() -> Self {
        Self::remembering(MIN_REMOVALS)
    }

    /// Nothing; remembers at least `min_removals` removals per type.
    pub fn remembering(min_removals: usize) -> Self {
        Self { current: RwLock::default(), writing: Mutex::new(()), changes: watch::Sender::new(0), min_removals }
    }

    /// Puts in `set` and takes out `removed`, at once. A name in both is set. What is set to what it already is, and the
    /// removal of what is not there, is no change. Returns the number of changes.
    pub fn update<E: Into<Entry>, N: AsRef<str>>(
        &self,
        type_url: &str,
        set: impl IntoIterator<Item = E>,
        removed: impl IntoIterator<Item = N>,
    ) -> usize {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // Made beside the current one and swapped in: readers see all of the update or nothing.
        let mut next = self.snapshot();
        let kinds = Arc::make_mut(&mut next.0);
        if !kinds.contains_key(type_url) {
            kinds.insert(type_url.into(), Kind::default());
        }
        let Some(kind) = kinds.get_mut(type_url) else { return 0 };
        let before = kind.version();
        let set: Vec<Entry> = set.into_iter().map(Into::into).collect();
        let names: std::collections::HashSet<&str> = set.iter().map(|entry| &*entry.resource.name).collect();
        let removed: Vec<N> = removed.into_iter().filter(|name| !names.contains(name.as_ref())).collect();
        drop(names);
        for entry in set {
            kind.set(entry);
        }
        for name in removed {
            kind.remove(name.as_ref());
        }
        let changes = kind.version() - before;
        kind.trim(self.min_removals);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
        if changes > 0 {
            self.changes.send_modify(|version| *version += changes);
        }
        usize::try_from(changes).unwrap_or(usize::MAX)
    }

    /// Everything as it is now. Costs no copy.
    pub fn snapshot(&self) -> Snapshot {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Wakes after each update that changed something; the value counts the changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

/// A catalog at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot(Arc<BTreeMap<Arc<str>, Kind>>);

impl Snapshot {
    /// The resources with this primary name or alias: more than one if they share an alias.
    pub fn lookup(&self, type_url: &str, name: &str) -> Vec<&Resource> {
        let Some(kind) = self.kind(type_url) else { return Vec::new() };
        kind.lookup(name).iter().filter_map(|name| kind.get(name)).map(|stored| &stored.entry.resource).collect()
    }

    /// Every resource of a type, in the order of their names.
    pub fn resources(&self, type_url: &str) -> impl Iterator<Item = &Resource> {
        self.kind(type_url).into_iter().flat_map(Kind::all).map(|(_, stored)| &stored.entry.resource)
    }

    /// The number of resources of a type.
    pub fn len(&self, type_url: &str) -> usize {
        self.kind(type_url).map_or(0, Kind::len)
    }

    /// The types that ever had a resource, and the number of changes to each so far.
    pub fn versions(&self) -> impl Iterator<Item = (&Arc<str>, u64)> {
        self.0.iter().map(|(type_url, kind)| (type_url, kind.version()))
    }

    /// The number of changes to a type so far.
    pub fn version(&self, type_url: &str) -> u64 {
        self.kind(type_url).map_or(0, Kind::version)
    }

    pub(super) fn kind(&self, type_url: &str) -> Option<&Kind> {
        self.0.get(type_url)
    }
}

#[cfg(test)]
mod tests;
