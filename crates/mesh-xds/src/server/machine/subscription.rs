//! One type's part of a client's stream.

mod first;
mod queue;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use mesh_proto::discovery::DeltaDiscoveryRequest;

use self::first::First;
use self::queue::Queue;
use super::Limits;
use crate::server::catalog::{Draft, Kind, Overrun, Part, Progress, Stored};
use crate::server::response::Content;
use crate::server::status::TypeStatus;

#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) type_url: Arc<str>,
    /// Whether a request was taken.
    begun: bool,
    wildcard: bool,
    /// Names asked for, primary or alias.
    named: HashSet<Arc<str>>,
    /// Primary names of what a client without wildcard has.
    known: HashSet<Arc<str>>,
    /// Primary names of what was asked for by name, as far as it exists: what belongs to it is sent as well.
    groups: HashSet<Arc<str>>,
    /// These changes were considered. A client with a wildcard is told later ones from the catalog's log.
    cursor: Progress,
    /// Responses in a row after each of which it was told some changes before earlier ones.
    uneven: usize,
    /// What is still to be sent of a wildcard's first state.
    first: First,
    /// Primary names to be sent, or removed if they are gone by then.
    queue: Queue,
    /// Of those, what is gone: told when all that is there was.
    leaving: Queue,
    /// Names asked for that are to be answered as absent, if they are so when all of the queue is sent.
    asked: Queue,
    /// A response is due even if there is nothing to say: to the first request, and after one that announced more.
    owed: bool,
    in_flight: Option<InFlight>,
    sent: u64,
    acked: u64,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    names: Names,
    version: u64,
    is_first: bool,
}

/// The names in a response.
#[derive(Clone, Debug)]
pub(super) enum Names {
    /// Those of a whole state.
    All,
    /// The names of this part.
    Of(Arc<Part>),
}

impl Names {
    /// Whether the name may have been in the response: those of a whole state are what there is now.
    pub(super) fn contain(&self, name: &str, kind: &Kind) -> bool {
        match self {
            Self::All => kind.get(name).is_some(),
            Self::Of(part) => part.names().iter().any(|known| **known == *name),
        }
    }
}

/// The content of a response.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) content: Content,
    pub(super) resources: usize,
    /// Another response follows, even if it comes to nothing.
    pub(super) more: bool,
    names: Names,
}

impl Chunk {
    fn of(part: Arc<Part>) -> Self {
        let (resources, names) = (part.resources(), Names::Of(part.clone()));
        Self { content: Content::Part(part), resources, more: false, names }
    }

    fn is_empty(&self) -> bool {
        matches!(&self.names, Names::Of(part) if part.is_empty())
    }
}

impl Subscription {
    pub(super) fn new(type_url: Arc<str>, version: u64) -> Self {
        Self {
            type_url,
            begun: false,
            wildcard: false,
            named: HashSet::new(),
            known: HashSet::new(),
            groups: HashSet::new(),
            cursor: Progress::at(version),
            uneven: 0,
            first: First::default(),
            queue: Queue::default(),
            leaving: Queue::default(),
            asked: Queue::default(),
            owed: false,
            in_flight: None,
            sent: 0,
            acked: 0,
        }
    }

    /// Ends the response in flight, if the nonce is its; returns the names in it. A stale nonce changes nothing.
    pub(super) fn acknowledge(&mut self, nonce: &str, accepted: bool) -> Option<Names> {
        let done = self.in_flight.take_if(|in_flight| in_flight.nonce == nonce)?;
        if accepted {
            self.acked = done.version;
        }
        Some(done.names)
    }

    pub(super) fn subscribe(&mut self, kind: &Kind, request: DeltaDiscoveryRequest) {
        let first = !std::mem::replace(&mut self.begun, true);
        let was_wildcard = self.wildcard;
        let subscribe = request.resource_names_subscribe;
        let unsubscribe = request.resource_names_unsubscribe;
        // In a first request no names at all means everything.
        self.wildcard |= (first && subscribe.is_empty()) || subscribe.iter().any(|name| name == "*");
        self.wildcard &= !unsubscribe.iter().any(|name| name == "*");
        let mut initial = HashMap::new();
        if first {
            self.owed = true;
            initial = request.initial_resource_versions;
        }

        for name in subscribe.into_iter().filter(|name| name != "*") {
            let name: Arc<str> = name.into();
            self.named.insert(name.clone());
            self.queue_name(kind, &name, &initial);
        }
        for name in unsubscribe.iter().filter(|name| *name != "*") {
            // What it brought stays known and up to date: it may be on its way, and the client could not tell that it
            // would not be told of later changes.
            self.named.remove(name.as_str());
            self.asked.remove(name);
        }
        match (was_wildcard, self.wildcard) {
            (false, true) => {
                // All that there is comes with the first state.
                self.queue.clear();
                self.leaving.clear();
                self.first = First::new(kind, std::mem::take(&mut self.known), initial);
                self.cursor = Progress::at(kind.version());
            }
            (true, false) => {
                self.first = First::default();
                self.queue.clear();
                self.leaving.clear();
                let named: Vec<Arc<str>> = self.named.iter().cloned().collect();
                for name in named {
                    self.queue_name(kind, &name, &HashMap::new());
                }
            }
            (false, false) => self.compare(kind, initial),
            (true, true) => {}
        }
    }

    /// Queues what a name stands for: first what belongs to it, so that whoever waits for the name has all of it then.
    fn queue_name(&mut self, kind: &Kind, name: &Arc<str>, initial: &HashMap<String, String>) {
        let found = kind.lookup(name);
        // Even if it is there: it may be gone, or lose the alias, before it is sent.
        self.asked.push(name.clone());
        for primary in &found {
            self.groups.insert(primary.clone());
            for member in kind.members(primary) {
                self.queue_unless_same(kind, member, initial);
            }
        }
        for primary in &found {
            self.queue_unless_same(kind, primary, initial);
        }
    }

    fn queue_unless_same(&mut self, kind: &Kind, name: &Arc<str>, initial: &HashMap<String, String>) {
        if !self.wildcard {
            self.known.insert(name.clone());
        }
        let same = initial.get(&**name).zip(kind.get(name)).is_some_and(|(has, stored)| is_same(has, stored));
        if !same {
            self.queue.push(name.clone());
        }
    }

    /// Queues the differences to what a client without wildcard said to have.
    fn compare(&mut self, kind: &Kind, initial: HashMap<String, String>) {
        for (name, version) in initial {
            let stored = kind.get(&name);
            let name = stored.map_or_else(|| Arc::from(name), |stored| stored.entry.resource.name.clone());
            self.known.insert(name.clone());
            if !stored.is_some_and(|stored| is_same(&version, stored)) {
                self.queue.push(name);
            }
        }
    }

    /// Finds what changed since the last call, for a client without a wildcard: with one there is nothing to find, the
    /// log is what it gets.
    pub(super) fn collect(&mut self, kind: &Kind) -> Result<(), Overrun> {
        if self.wildcard || self.cursor.told() >= kind.version() {
            return Ok(());
        }
        let changed: Vec<Arc<str>> = kind.changed_since(self.cursor.told())?.map(|(_, name)| name.clone()).collect();
        for name in changed {
            self.collect_named(kind, name);
        }
        self.cursor = Progress::at(kind.version());
        Ok(())
    }

    fn collect_named(&mut self, kind: &Kind, name: Arc<str>) {
        let Some(stored) = kind.get(&name) else {
            if self.known.contains(&name) || self.named.contains(&name) {
                self.queue.push(name);
            }
            return;
        };
        let entry = &stored.entry;
        let asked = self.named.contains(&name) || entry.resource.aliases.iter().any(|alias| self.named.contains(alias));
        if asked && self.groups.insert(name.clone()) {
            for member in kind.members(&name) {
                self.known.insert(member.clone());
                self.queue.push(member.clone());
            }
        }
        if asked || self.known.contains(&name) || entry.member_of.iter().any(|group| self.groups.contains(group)) {
            self.known.insert(name.clone());
            self.queue.push(name);
        }
    }

    /// Whether there is something to send; valid after [`Self::collect`].
    pub(super) fn has_more(&self, kind: &Kind) -> bool {
        self.owed || self.remains() || self.cursor.told() < kind.version()
    }

    /// Whether something is left that is not in the log.
    fn remains(&self) -> bool {
        !self.first.is_done() || !self.queue.is_empty() || !self.leaving.is_empty() || !self.asked.is_empty()
    }

    /// Whether the first state is not sent and acknowledged yet.
    pub(super) fn is_syncing(&self) -> bool {
        !self.first.is_done() || self.in_flight.as_ref().is_some_and(|in_flight| in_flight.is_first)
    }

    pub(super) fn is_in_flight(&self) -> bool {
        self.in_flight.is_some()
    }

    pub(super) fn names(&self) -> usize {
        self.named.len()
    }

    /// Takes out the next response's worth, which is then in flight; nothing if it comes to nothing.
    pub(super) fn chunk(&mut self, kind: &Kind, limits: &Limits, nonce: &str) -> Result<Option<Chunk>, Overrun> {
        let is_first = !self.first.is_done();
        let mut chunk = if is_first {
            self.first_part(kind, limits)
        } else if self.remains() {
            self.queued(kind, limits.max_response)
        } else if self.cursor.told() < kind.version() {
            let part = kind.changes(&self.type_url, self.cursor, limits.max_response)?;
            self.cursor = part.upto();
            // Changes come faster than they are taken, and some would never be told.
            self.uneven = if self.cursor.is_even() { 0 } else { self.uneven + 1 };
            if self.uneven > limits.max_uneven {
                return Err(Overrun);
            }
            Chunk::of(part)
        } else {
            Chunk::of(Arc::default())
        };
        if chunk.is_empty() && !self.owed {
            return Ok(None);
        }
        // What changed while the first state was sent belongs to it as well.
        chunk.more = self.remains() || self.cursor.told() < kind.version();
        self.owed = chunk.more;
        self.sent = self.cursor.told();
        self.in_flight =
            Some(InFlight { nonce: nonce.to_owned(), names: chunk.names.clone(), version: self.sent, is_first });
        Ok(Some(chunk))
    }

    /// The next part of a wildcard's first state.
    fn first_part(&mut self, kind: &Kind, limits: &Limits) -> Chunk {
        let mut draft = Draft::new(&self.type_url);
        // The log is not looked at before all of it is sent.
        let mut cursor = self.cursor.told();
        let whole = self.first.take(kind, &self.type_url, limits, &mut cursor, &mut draft);
        self.cursor = Progress::at(cursor);
        // Names that were asked for as well: what exists of them is in the state.
        let is_last = self.first.is_done() && cursor >= kind.version();
        while is_last
            && draft.size() < limits.max_response
            && let Some(name) = self.asked.pop()
        {
            if kind.lookup(&name).is_empty() {
                draft.remove(name);
            }
        }
        let part = Arc::new(draft.finish(self.cursor));
        let Some((whole, range)) = whole else { return Chunk::of(part) };
        let resources = whole.segments(range.clone()).iter().map(|segment| segment.resources()).sum();
        Chunk { content: Content::Whole(whole, range, part), resources, more: false, names: Names::All }
    }

    /// What is queued by name.
    fn queued(&mut self, kind: &Kind, max: usize) -> Chunk {
        let mut draft = Draft::new(&self.type_url);
        while draft.size() < max
            && let Some(name) = self.queue.pop()
        {
            match kind.get(&name) {
                Some(stored) => kind.tell(stored, &mut draft, |next| self.queue.remove(&next.entry.resource.name)),
                None => self.leaving.push(name),
            }
        }
        while self.queue.is_empty()
            && draft.size() < max
            && let Some(name) = self.leaving.pop()
        {
            // What has come back since was told.
            if kind.get(&name).is_none() {
                self.known.remove(&name);
                self.groups.remove(&name);
                draft.remove(name);
            }
        }
        while self.queue.is_empty()
            && self.leaving.is_empty()
            && draft.size() < max
            && let Some(name) = self.asked.pop()
        {
            if kind.lookup(&name).is_empty() {
                draft.remove(name);
            }
        }
        Chunk::of(Arc::new(draft.finish(self.cursor)))
    }

    pub(super) fn status(&self) -> TypeStatus {
        TypeStatus {
            type_url: self.type_url.clone(),
            wildcard: self.wildcard,
            names: self.named.len(),
            sent: self.sent,
            acked: self.acked,
            considered: self.cursor.told(),
            in_flight: self.in_flight.is_some(),
            nacks: Vec::new(),
        }
    }
}

/// An empty version says nothing.
fn is_same(version: &str, stored: &Stored) -> bool {
    !version.is_empty() && *version == *stored.entry.resource.version
}
