//! One type's part of the catalog. All collections are persistent: a clone is a few reference counts.

use std::collections::{HashSet, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use imbl::{HashMap, OrdMap, OrdSet};

use super::Entry;
use super::part::{Draft, Part};
use super::whole::Whole;

type Index = HashMap<Arc<str>, OrdSet<Arc<str>>>;

/// Parts that are kept for other clients that are as far as the one they were encoded for.
const KEPT_PARTS: usize = 4;

/// An entry, and the change that made it what it is.
#[derive(Debug)]
pub(in crate::server) struct Stored {
    pub(in crate::server) entry: Entry,
    pub(in crate::server) version: u64,
    /// Aliases that it had and has not any more, the last ones: whoever has them now must be told before this, or with it.
    gave_up: Box<[Arc<str>]>,
}

impl Stored {
    /// Aliases that it has or had, the last ones first.
    fn had(&self) -> impl Iterator<Item = Arc<str>> {
        self.entry.resource.aliases.iter().chain(&self.gave_up).cloned()
    }
}

/// Aliases that a name is remembered to have given up. One that gives up more is told in some order to a client that is so
/// far behind.
const MAX_GIVEN_UP: usize = 16;

/// What is gone.
#[derive(Clone, Debug)]
struct Gone {
    /// The change that removed it.
    version: u64,
    /// Aliases that it had: should it come back, those who have them now must be told before.
    gave_up: Box<[Arc<str>]>,
}

/// What a change is of, in the order in which clients are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Something that refers to nothing.
    Plain,
    /// Something that refers to something else.
    Referring,
    /// Something that is gone.
    Gone,
}

/// How many there are.
const CLASSES: usize = 3;

impl Class {
    fn of(entry: &Entry) -> Self {
        if entry.refers { Self::Referring } else { Self::Plain }
    }
}

/// Up to which change a client was told, of each class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::server) struct Progress([u64; CLASSES]);

impl Progress {
    /// All changes up to this one, and none after it.
    pub(in crate::server) fn at(version: u64) -> Self {
        Self([version; CLASSES])
    }

    /// The change up to which it was told all.
    pub(in crate::server) fn told(&self) -> u64 {
        self.0.into_iter().min().unwrap_or_default()
    }

    /// Whether it was told this.
    fn has(&self, stored: &Stored) -> bool {
        let Self([plain, referring, _]) = self;
        stored.version
            <= match Class::of(&stored.entry) {
                Class::Referring => *referring,
                Class::Plain | Class::Gone => *plain,
            }
    }

    /// Whether it was told none after that one.
    pub(in crate::server) fn is_even(&self) -> bool {
        *self == Self::at(self.told())
    }
}

#[derive(Clone, Debug, Default)]
pub(in crate::server) struct Kind {
    entries: OrdMap<Arc<str>, Arc<Stored>>,
    aliases: Index,
    members: Index,
    version: u64,
    /// The last change of each name, by its number, in the order of [`Class`]: a client that is far behind has no more to
    /// be told than names.
    logs: [OrdMap<u64, Arc<str>>; CLASSES],
    /// Names that are gone.
    gone: HashMap<Arc<str>, Gone>,
    /// Removals up to this change may be forgotten.
    forgotten: u64,
    encoded: Arc<Encoded>,
}

/// What was encoded for one client and may serve others. Shared by all versions of a type.
#[derive(Debug, Default)]
struct Encoded {
    /// Kept by those that are being sent it.
    whole: Mutex<Weak<Whole>>,
    parts: Mutex<VecDeque<(PartKey, Arc<Part>)>>,
}

/// What makes a part the same: the changes after which it begins, the version that it is of, and the limit of its size.
type PartKey = (Progress, u64, usize);

/// Removals that are asked for are forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct Overrun;

impl Kind {
    /// The number of changes so far.
    pub(in crate::server) fn version(&self) -> u64 {
        self.version
    }

    pub(in crate::server) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(in crate::server) fn get(&self, name: &str) -> Option<&Arc<Stored>> {
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

    /// Tells it, and at once those that have now what it had and are due, or that would be nobody's for a while. What was due
    /// once must not be so again.
    pub(in crate::server) fn tell<'k>(
        &'k self,
        stored: &'k Arc<Stored>,
        draft: &mut Draft<'k>,
        mut is_due: impl FnMut(&'k Arc<Stored>) -> bool,
    ) {
        draft.set(stored);
        let mut successors: Vec<&Arc<Stored>> = self.successors(stored).collect();
        while let Some(next) = successors.pop() {
            if is_due(next) {
                draft.set(next);
                successors.extend(self.successors(next));
            }
        }
    }

    /// Those that have now what this one had.
    fn successors<'k>(&'k self, stored: &'k Stored) -> impl Iterator<Item = &'k Arc<Stored>> {
        let aliases = stored.gave_up.iter().filter_map(|alias| self.aliases.get(alias));
        aliases.flatten().filter_map(|name| self.entries.get(name))
    }

    /// The entries in a range of names, in their order.
    pub(in crate::server) fn range(
        &self,
        range: (Bound<&Arc<str>>, Bound<&Arc<str>>),
    ) -> impl Iterator<Item = (&Arc<str>, &Arc<Stored>)> {
        self.entries.range::<_, Arc<str>>(range)
    }

    /// All entries, in the order of their names.
    pub(in crate::server) fn all(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Stored>)> {
        self.entries.iter()
    }

    /// Names changed since a version, each with its last change, in the order in which clients are told.
    pub(in crate::server) fn changed_since(
        &self,
        version: u64,
    ) -> Result<impl Iterator<Item = (&u64, &Arc<str>)>, Overrun> {
        if version < self.forgotten {
            return Err(Overrun);
        }
        Ok(self.logs.iter().flat_map(move |log| log.range::<_, u64>((Bound::Excluded(version), Bound::Unbounded))))
    }

    /// The changes since those that have room in `max` bytes, one at least, encoded.
    pub(in crate::server) fn changes(&self, type_url: &str, since: Progress, max: usize) -> Result<Arc<Part>, Overrun> {
        let key = (since, self.version, max);
        if let Some((_, part)) = lock(&self.encoded.parts).iter().find(|(known, _)| *known == key) {
            return Ok(part.clone());
        }
        if since.told() < self.forgotten {
            return Err(Overrun);
        }
        let mut draft = Draft::new(type_url);
        let mut upto = since;
        // Those that are told before their turn. It comes all the same: that they were is not noted.
        let mut early: HashSet<&str> = HashSet::new();
        'all: for (class, log) in self.logs.iter().enumerate() {
            for (version, name) in log.range::<_, u64>((Bound::Excluded(upto.0[class]), Bound::Unbounded)) {
                if draft.size() >= max {
                    break 'all;
                }
                upto.0[class] = *version;
                match self.entries.get(name) {
                    None => draft.remove(name.clone()),
                    Some(_) if early.contains(&**name) => {}
                    Some(stored) => {
                        self.tell(stored, &mut draft, |next| {
                            !upto.has(next) && early.insert(&next.entry.resource.name)
                        });
                    }
                }
            }
            upto.0[class] = self.version;
        }
        let part = Arc::new(draft.finish(upto));
        let mut parts = lock(&self.encoded.parts);
        parts.truncate(KEPT_PARTS - 1);
        parts.push_front((key, part.clone()));
        Ok(part)
    }

    /// Everything, encoded in segments of about `size` bytes: of this version, or a later one.
    pub(in crate::server) fn whole(&self, type_url: &str, size: usize) -> Arc<Whole> {
        // Held while it is encoded: who else needs it has nothing better to do than to wait for it.
        let mut shared = lock(&self.encoded.whole);
        let known = shared.upgrade().filter(|whole| whole.size() == size);
        if let Some(whole) = known.as_ref().filter(|whole| whole.version() >= self.version) {
            return whole.clone();
        }
        let refreshed = known.and_then(|whole| whole.refreshed(self, type_url));
        let whole = Arc::new(refreshed.unwrap_or_else(|| Whole::new(self, type_url, size)));
        *shared = Arc::downgrade(&whole);
        whole
    }

    pub(super) fn set(&mut self, entry: Entry) {
        let name = entry.resource.name.clone();
        let before = self.entries.get(&name).cloned();
        if before.as_ref().is_some_and(|before| before.entry == entry) {
            return;
        }
        let mut had: Vec<Arc<str>> = Vec::new();
        if let Some(before) = before {
            self.log(Class::of(&before.entry)).remove(&before.version);
            self.unindex(&before.entry);
            had.extend(before.had());
        }
        for alias in &entry.resource.aliases {
            self.aliases.entry(alias.clone()).or_default().insert(name.clone());
        }
        for group in &entry.member_of {
            self.members.entry(group.clone()).or_default().insert(name.clone());
        }
        if let Some(gone) = self.gone.remove(&name) {
            self.log(Class::Gone).remove(&gone.version);
            had.extend(gone.gave_up);
        }
        had.retain(|alias| !entry.resource.aliases.contains(alias));
        had.truncate(MAX_GIVEN_UP);
        self.version += 1;
        let version = self.version;
        self.log(Class::of(&entry)).insert(version, name.clone());
        self.entries.insert(name, Arc::new(Stored { entry, version, gave_up: had.into() }));
    }

    pub(super) fn remove(&mut self, name: &str) {
        if let Some((name, stored)) = self.entries.remove_with_key(name) {
            self.log(Class::of(&stored.entry)).remove(&stored.version);
            self.unindex(&stored.entry);
            self.version += 1;
            let version = self.version;
            self.log(Class::Gone).insert(version, name.clone());
            self.gone.insert(name, Gone { version, gave_up: stored.had().take(MAX_GIVEN_UP).collect() });
        }
    }

    /// Forgets the oldest removals, until no more are left than resources, or `min`.
    pub(super) fn trim(&mut self, min: usize) {
        let most = min.max(self.entries.len());
        while self.log(Class::Gone).len() > most {
            let Some((oldest, name)) = self.log(Class::Gone).get_min().cloned() else { return };
            self.log(Class::Gone).remove(&oldest);
            self.gone.remove(&name);
            self.forgotten = oldest;
        }
    }

    fn log(&mut self, class: Class) -> &mut OrdMap<u64, Arc<str>> {
        let [plain, referring, gone] = &mut self.logs;
        match class {
            Class::Plain => plain,
            Class::Referring => referring,
            Class::Gone => gone,
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unindex(index: &mut Index, key: &Arc<str>, name: &Arc<str>) {
    if let Some(names) = index.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            index.remove(key);
        }
    }
}
