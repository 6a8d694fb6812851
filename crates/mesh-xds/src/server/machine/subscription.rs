//! One type's part of a client's stream.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use mesh_proto::discovery::{self, DeltaDiscoveryRequest};

use crate::server::catalog::{Entry, Kind, Overrun};
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
    /// Changes up to this version were considered.
    cursor: u64,
    /// Of a wildcard's first state: everything after this name is still to be sent.
    walk: Option<Option<Arc<str>>>,
    /// What the client said to have, as far as the walk has not come by.
    initial: HashMap<String, String>,
    /// Primary names to be sent, or removed if they are gone by then.
    queue: Queue,
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
    names: Vec<Arc<str>>,
    version: u64,
}

/// Part of a response.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    pub(super) resources: Vec<discovery::Resource>,
    pub(super) removed: Vec<String>,
    /// Another response follows, even if it comes to nothing.
    pub(super) more: bool,
    names: Vec<Arc<str>>,
    bytes: usize,
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
            cursor: version,
            walk: None,
            initial: HashMap::new(),
            queue: Queue::default(),
            asked: Queue::default(),
            owed: false,
            in_flight: None,
            sent: 0,
            acked: 0,
        }
    }

    /// Ends the response in flight, if the nonce is its; returns the names in it. A stale nonce changes nothing.
    pub(super) fn acknowledge(&mut self, nonce: &str, accepted: bool) -> Option<Vec<Arc<str>>> {
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
                self.initial = initial;
                // What the walk does not come by is gone.
                self.initial.extend(self.known.drain().map(|name| (name.to_string(), String::new())));
                self.walk = Some(None);
                self.cursor = kind.version();
            }
            (true, false) => {
                self.walk = None;
                self.initial.clear();
                self.queue.clear();
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
        let same = initial.get(&**name).zip(kind.get(name)).is_some_and(|(has, entry)| is_same(has, entry));
        if !same {
            self.queue.push(name.clone());
        }
    }

    /// Queues the differences to what a client without wildcard said to have.
    fn compare(&mut self, kind: &Kind, initial: HashMap<String, String>) {
        for (name, version) in initial {
            let entry = kind.get(&name);
            let name = entry.map_or_else(|| Arc::from(name), |entry| entry.resource.name.clone());
            self.known.insert(name.clone());
            if !entry.is_some_and(|entry| is_same(&version, entry)) {
                self.queue.push(name);
            }
        }
    }

    /// Finds what changed since the last call. While something is in flight or the walk goes on, the log is left to wait.
    pub(super) fn collect(&mut self, kind: &Kind) -> Result<(), Overrun> {
        if self.walk.is_some() || self.cursor == kind.version() {
            return Ok(());
        }
        let changed = kind.changed_since(self.cursor)?;
        if self.wildcard {
            // With a response in flight it is enough to know that there is more.
            if self.in_flight.is_none() {
                changed.for_each(|name| self.queue.push(name.clone()));
                self.cursor = kind.version();
            }
            return Ok(());
        }
        let changed: Vec<Arc<str>> = changed.cloned().collect();
        for name in changed {
            self.collect_named(kind, name);
        }
        self.cursor = kind.version();
        Ok(())
    }

    fn collect_named(&mut self, kind: &Kind, name: Arc<str>) {
        let Some(entry) = kind.get(&name) else {
            if self.known.contains(&name) || self.named.contains(&name) {
                self.queue.push(name);
            }
            return;
        };
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
        self.owed
            || self.is_syncing()
            || !self.queue.is_empty()
            || !self.asked.is_empty()
            || self.cursor != kind.version()
    }

    pub(super) fn is_syncing(&self) -> bool {
        self.walk.is_some()
    }

    pub(super) fn is_in_flight(&self) -> bool {
        self.in_flight.is_some()
    }

    pub(super) fn names(&self) -> usize {
        self.named.len()
    }

    /// Takes out the next response's worth, which is then in flight; nothing if it comes to nothing.
    pub(super) fn chunk(&mut self, kind: &Kind, max: usize, nonce: &str) -> Option<Chunk> {
        let mut chunk = Chunk::default();
        // What changed behind the walk belongs to the first state as well.
        let behind = self.walk.is_some() && self.cursor != kind.version();
        self.walk(kind, max, &mut chunk);
        while self.walk.is_none()
            && chunk.bytes < max
            && let Some(name) = self.queue.pop()
        {
            match kind.get(&name) {
                Some(entry) => chunk.set(&self.type_url, entry),
                None => {
                    self.known.remove(&name);
                    self.groups.remove(&name);
                    chunk.remove(name);
                }
            }
        }
        while self.walk.is_none()
            && self.queue.is_empty()
            && chunk.bytes < max
            && let Some(name) = self.asked.pop()
        {
            if kind.lookup(&name).is_empty() {
                chunk.remove(name);
            }
        }
        if chunk.names.is_empty() && !self.owed {
            return None;
        }
        chunk.more = behind || self.walk.is_some() || !self.queue.is_empty() || !self.asked.is_empty();
        self.owed = chunk.more;
        self.sent = kind.version();
        let names = std::mem::take(&mut chunk.names);
        self.in_flight = Some(InFlight { nonce: nonce.to_owned(), names, version: self.sent });
        Some(chunk)
    }

    /// Goes on with a wildcard's first state, over the resources as they are now: those that changed behind the walk are in
    /// the log, which is read when it is done.
    fn walk(&mut self, kind: &Kind, max: usize, chunk: &mut Chunk) {
        let Some(after) = self.walk.take() else { return };
        let mut last = after.clone();
        for (name, entry) in kind.after(after.as_ref()) {
            if chunk.bytes >= max {
                self.walk = Some(last);
                return;
            }
            last = Some(name.clone());
            let same = self.initial.remove(&**name).is_some_and(|has| is_same(&has, entry));
            if !same {
                chunk.set(&self.type_url, entry);
            }
        }
        for name in std::mem::take(&mut self.initial).into_keys() {
            self.queue.push(name.into());
        }
    }

    pub(super) fn status(&self) -> TypeStatus {
        TypeStatus {
            type_url: self.type_url.clone(),
            wildcard: self.wildcard,
            names: self.named.len(),
            sent: self.sent,
            acked: self.acked,
            in_flight: self.in_flight.is_some(),
            nacks: Vec::new(),
        }
    }
}

/// An empty version says nothing.
fn is_same(version: &str, entry: &Entry) -> bool {
    !version.is_empty() && *version == *entry.resource.version
}

impl Chunk {
    fn set(&mut self, type_url: &Arc<str>, entry: &Entry) {
        let resource = &entry.resource;
        let names: usize = resource.aliases.iter().map(|alias| alias.len()).sum();
        self.bytes += type_url.len() + resource.name.len() + resource.version.len() + resource.body.len() + names;
        self.names.push(resource.name.clone());
        self.resources.push(discovery::Resource {
            version: resource.version.to_string(),
            resource: Some(prost_types::Any { type_url: type_url.to_string(), value: resource.body.to_vec() }),
            name: resource.name.to_string(),
            aliases: resource.aliases.iter().map(ToString::to_string).collect(),
        });
    }

    fn remove(&mut self, name: Arc<str>) {
        self.bytes += name.len();
        self.removed.push(name.to_string());
        self.names.push(name);
    }
}

/// Names in the order in which they came, none twice.
#[derive(Debug, Default)]
struct Queue {
    order: VecDeque<Arc<str>>,
    members: HashSet<Arc<str>>,
}

impl Queue {
    fn push(&mut self, name: Arc<str>) {
        if self.members.insert(name.clone()) {
            self.order.push_back(name);
        }
    }

    fn pop(&mut self) -> Option<Arc<str>> {
        // Names that were removed are still in the order.
        while let Some(name) = self.order.pop_front() {
            if self.members.remove(&name) {
                return Some(name);
            }
        }
        None
    }

    fn remove(&mut self, name: &str) {
        self.members.remove(name);
    }

    fn clear(&mut self) {
        self.order.clear();
        self.members.clear();
    }

    fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}
