//! One type's part of the client machine.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use mesh_proto::discovery::{self, DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use super::version::Version;
use super::{Answer, Received, SubscribeError, Subscribed};
use crate::client::{Mode, Nack, Sink, TypeStatus};
use crate::{MORE, Rejection, Resource, Update};

type Resolved = Vec<(Arc<str>, Answer)>;

#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) type_url: Arc<str>,
    pub(super) status: TypeStatus,
    mode: Mode,
    /// What the sink has accepted, by primary name.
    known: HashMap<Arc<str>, Version>,
    /// The primary name and the aliases of each known resource; empty with a wildcard, where nothing is asked for.
    names: HashMap<Arc<str>, Box<[Arc<str>]>>,
    /// How many known resources have a name, asked for or not: they may lose it after it was asked for.
    holders: HashMap<Arc<str>, usize>,
    /// Resources whose last content was refused, and those of their names that were asked for.
    refused: HashMap<Arc<str>, Vec<Arc<str>>>,
    /// What was asked for, by the name it was asked by.
    wanted: HashMap<Arc<str>, Wanted>,
    /// Wanted names that are absent, by when they became so.
    absent: BTreeMap<u64, Arc<str>>,
    clock: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Asked,
    Present,
    Rejected,
    Absent(u64),
}

impl Subscription {
    pub(super) fn new(type_url: Arc<str>, mode: Mode) -> Self {
        Self {
            type_url,
            status: TypeStatus::default(),
            mode,
            known: HashMap::new(),
            names: HashMap::new(),
            holders: HashMap::new(),
            refused: HashMap::new(),
            wanted: HashMap::new(),
            absent: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Subscribes, and says what is known, so that only differences and removals come back. What was refused last is known
    /// in no version: the sink may have put something in its place, and must hear of it whatever became of it.
    pub(super) fn first_request(&self) -> DeltaDiscoveryRequest {
        let mut request = DeltaDiscoveryRequest {
            type_url: self.type_url.to_string(),
            initial_resource_versions: self
                .known
                .iter()
                .map(|(name, version)| (name.to_string(), version.to_string()))
                .chain(self.refused.keys().map(|name| (name.to_string(), String::new())))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        };
        match self.mode {
            // No names at all means everything.
            Mode::Wildcard => {}
            Mode::OnDemand => {
                request.resource_names_subscribe = vec!["*".into()];
                request.resource_names_unsubscribe = vec!["*".into()];
                request.resource_names_subscribe.extend(self.wanted_names(|wanted| wanted != Wanted::Asked));
            }
        }
        request
    }

    /// Names that have no answer yet go apart from the known versions: else the server could hold that the client has the
    /// resource, and not answer.
    pub(super) fn second_request(&self) -> Option<DeltaDiscoveryRequest> {
        let names: Vec<String> = self.wanted_names(|wanted| wanted == Wanted::Asked).collect();
        (!names.is_empty()).then(|| DeltaDiscoveryRequest {
            type_url: self.type_url.to_string(),
            resource_names_subscribe: names,
            ..DeltaDiscoveryRequest::default()
        })
    }

    fn wanted_names(&self, filter: impl Fn(Wanted) -> bool) -> impl Iterator<Item = String> {
        self.wanted.iter().filter(move |(_, wanted)| filter(**wanted)).map(|(name, _)| name.to_string())
    }

    pub(super) fn pending(&self) -> usize {
        self.wanted_names(|wanted| wanted == Wanted::Asked).count()
    }

    /// What is known about a name, if it need not be asked for.
    pub(super) fn state(&self, name: &str) -> Option<Subscribed> {
        if self.mode == Mode::Wildcard {
            let answer = if self.known.contains_key(name) { Answer::Present } else { Answer::Absent };
            return Some(Subscribed::Answered(answer));
        }
        self.wanted.get(name).map(|wanted| match wanted {
            Wanted::Asked => Subscribed::Pending,
            Wanted::Present => Subscribed::Answered(Answer::Present),
            Wanted::Rejected => Subscribed::Answered(Answer::Rejected),
            Wanted::Absent(_) => Subscribed::Answered(Answer::Absent),
        })
    }

    /// Room for one more name; returns the one that gave way.
    pub(super) fn make_room(&mut self, max: usize) -> Result<Option<Arc<str>>, SubscribeError> {
        if self.wanted.len() < max {
            return Ok(None);
        }
        let (_, evicted) = self.absent.pop_first().ok_or(SubscribeError::TooManyNames)?;
        self.wanted.remove(&evicted);
        Ok(Some(evicted))
    }

    pub(super) fn want(&mut self, name: Arc<str>) {
        self.wanted.insert(name, Wanted::Asked);
    }

    pub(super) fn received(
        &mut self,
        response: DeltaDiscoveryResponse,
        now: SystemTime,
        sink: &mut (impl Sink + ?Sized),
    ) -> Received {
        let complete = !response.system_version_info.ends_with(MORE);
        let (update, mut rejections) = self.read(response);
        let envelopes = rejections.len();
        // All but the bodies, which the sink takes.
        let strip = |resource: &Resource| Resource { body: Bytes::new(), ..resource.clone() };
        let accepted: Vec<Resource> = update.set.iter().map(strip).collect();
        let removed = update.removed.clone();
        if !update.set.is_empty() || !update.removed.is_empty() {
            rejections.extend(sink.apply(update));
        }

        let mut resolved = Vec::new();
        for name in removed {
            self.remove(&name, &mut resolved);
        }
        let refused: HashSet<&str> = rejections.iter().map(|rejection| rejection.name.as_str()).collect();
        for Resource { name, version, aliases, .. } in accepted {
            if refused.contains(&*name) {
                self.reject(name, &aliases, &mut resolved);
            } else {
                self.set(name, version, &aliases, &mut resolved);
            }
        }
        // A resource whose envelope was refused is in no update, but may have been asked for.
        for Rejection { name, .. } in rejections.iter().take(envelopes) {
            self.reject(name.as_str().into(), &[], &mut resolved);
        }
        for Rejection { name, reason } in &rejections {
            self.status.nack(name, Nack { reason: reason.clone(), at: now });
        }
        self.status.answered |= complete;
        self.status.responses += 1;
        self.status.resources = self.known.len();
        self.status.names = self.wanted.len();
        Received { resolved, rejections }
    }

    /// Unwraps a response: no name twice, none both set and removed, only bodies of the right type.
    fn read(&self, response: DeltaDiscoveryResponse) -> (Update, Vec<Rejection>) {
        let mut rejections = Vec::new();
        let mut set: Vec<Resource> = Vec::with_capacity(response.resources.len());
        let mut places: HashMap<Arc<str>, usize> = HashMap::with_capacity(response.resources.len());
        for wire in response.resources {
            match self.unwrap(wire) {
                Ok(resource) => match places.get(&resource.name).and_then(|place| set.get_mut(*place)) {
                    // The last one holds.
                    Some(earlier) => *earlier = resource,
                    None => {
                        places.insert(resource.name.clone(), set.len());
                        set.push(resource);
                    }
                },
                Err(rejection) => rejections.push(rejection),
            }
        }
        let mut seen = HashSet::new();
        let mut removed = response.removed_resources;
        removed.retain(|name| !places.contains_key(name.as_str()) && seen.insert(name.clone()));
        (Update { type_url: self.type_url.clone(), set, removed }, rejections)
    }

    fn unwrap(&self, wire: discovery::Resource) -> Result<Resource, Rejection> {
        let reason = match wire.resource {
            _ if wire.name.is_empty() => "a resource without a name".to_owned(),
            None => "a resource without a body".to_owned(),
            Some(any) if *any.type_url != *self.type_url => format!("the body is of type {:?}", any.type_url),
            Some(any) => {
                // A name that is known stays the one allocation, which the sink may hold too.
                let known = self.known.get_key_value(wire.name.as_str());
                return Ok(Resource {
                    name: known.map_or_else(|| wire.name.into(), |(name, _)| Arc::clone(name)),
                    aliases: wire.aliases.into_iter().map(Arc::from).collect(),
                    version: wire.version.into(),
                    body: any.value.into(),
                });
            }
        };
        Err(Rejection { name: wire.name, reason })
    }

    fn set(&mut self, name: Arc<str>, version: Arc<str>, aliases: &[Arc<str>], resolved: &mut Resolved) {
        self.no_longer_refused(&name, resolved);
        self.known.insert(Arc::clone(&name), version.into());
        if self.mode == Mode::Wildcard {
            return;
        }
        let mut seen = HashSet::new();
        let names = std::iter::once(&name).chain(aliases).filter(|name| seen.insert(Arc::clone(name)));
        let names: Box<[Arc<str>]> = names.cloned().collect();
        for name in &names {
            *self.holders.entry(name.clone()).or_default() += 1;
            self.answer(name, Answer::Present, resolved);
        }
        let before = self.names.insert(name, names);
        self.release(before, resolved);
    }

    /// A known resource is gone, or was replaced: it no longer has these names.
    fn release(&mut self, names: Option<Box<[Arc<str>]>>, resolved: &mut Resolved) {
        for name in names.unwrap_or_default() {
            match self.holders.get_mut(&name) {
                Some(holders) if *holders > 1 => *holders -= 1,
                _ => drop(self.holders.remove(&name)),
            }
            // A name that waits for its answer goes on waiting: there may be another resource on the way.
            if self.wanted.get(&name) == Some(&Wanted::Present) {
                self.answer(&name, Answer::Absent, resolved);
            }
        }
    }

    /// What was accepted before stays known.
    fn reject(&mut self, name: Arc<str>, aliases: &[Arc<str>], resolved: &mut Resolved) {
        self.no_longer_refused(&name, resolved);
        let names = self.wanted_of(&name, aliases);
        for name in &names {
            self.answer(name, Answer::Rejected, resolved);
        }
        if !name.is_empty() {
            self.refused.insert(name, names);
        }
    }

    fn remove(&mut self, name: &str, resolved: &mut Resolved) {
        self.no_longer_refused(name, resolved);
        self.known.remove(name);
        // It would keep the room for all that ever was there.
        if self.known.len() < self.known.capacity() / 8 {
            self.known.shrink_to(self.known.len() * 2);
        }
        let before = self.names.remove(name);
        self.release(before, resolved);
        self.answer(name, Answer::Absent, resolved);
    }

    fn no_longer_refused(&mut self, name: &str, resolved: &mut Resolved) {
        self.status.rejected.remove(name);
        for name in self.refused.remove(name).unwrap_or_default() {
            if self.wanted.get(&name).is_some_and(|wanted| *wanted == Wanted::Rejected) {
                self.answer(&name, Answer::Absent, resolved);
            }
        }
    }

    /// Those of a resource's names that were asked for.
    fn wanted_of(&self, name: &Arc<str>, aliases: &[Arc<str>]) -> Vec<Arc<str>> {
        let mut wanted: Vec<Arc<str>> = Vec::new();
        for name in std::iter::once(name).chain(aliases) {
            if self.wanted.contains_key(name) && !wanted.contains(name) {
                wanted.push(name.clone());
            }
        }
        wanted
    }

    /// Notes what was learned about a name, if it was asked for. While a known resource has it, it is present.
    fn answer(&mut self, name: &str, answer: Answer, resolved: &mut Resolved) {
        let Some((name, before)) = self.wanted.get_key_value(name) else { return };
        let (name, before) = (name.clone(), *before);
        let answer = if self.holders.contains_key(&name) { Answer::Present } else { answer };
        let now = match (answer, before) {
            (Answer::Absent, Wanted::Absent(_)) => before,
            (Answer::Absent, Wanted::Asked | Wanted::Present | Wanted::Rejected) => {
                self.clock += 1;
                self.absent.insert(self.clock, name.clone());
                Wanted::Absent(self.clock)
            }
            (Answer::Present, _) => Wanted::Present,
            (Answer::Rejected, _) => Wanted::Rejected,
        };
        if let Wanted::Absent(since) = before
            && now != before
        {
            self.absent.remove(&since);
        }
        self.wanted.insert(name.clone(), now);
        if before == Wanted::Asked {
            resolved.push((name, answer));
        }
    }
}
