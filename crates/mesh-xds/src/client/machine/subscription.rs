//! One type's part of the client machine.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use mesh_proto::discovery::{self, DeltaDiscoveryRequest, DeltaDiscoveryResponse};

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
    known: HashMap<Arc<str>, Known>,
    /// What was asked for, by the name it was asked by.
    wanted: HashMap<Arc<str>, Wanted>,
    /// Wanted names that are absent, by when they became so.
    absent: BTreeMap<u64, Arc<str>>,
    clock: u64,
}

#[derive(Debug)]
struct Known {
    version: Arc<str>,
    /// Those of its names that were asked for.
    answers: Vec<Arc<str>>,
}

#[derive(Clone, Copy, Debug)]
struct Wanted {
    state: State,
    /// Known resources that have the name.
    holders: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
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
            wanted: HashMap::new(),
            absent: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Subscribes, and says what is known, so that only differences and removals come back.
    pub(super) fn first_request(&self) -> DeltaDiscoveryRequest {
        let mut request = DeltaDiscoveryRequest {
            type_url: self.type_url.to_string(),
            initial_resource_versions: self
                .known
                .iter()
                .map(|(name, known)| (name.to_string(), known.version.to_string()))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        };
        match self.mode {
            // No names at all means everything.
            Mode::Wildcard => {}
            Mode::OnDemand => {
                request.resource_names_subscribe = vec!["*".into()];
                request.resource_names_unsubscribe = vec!["*".into()];
                request.resource_names_subscribe.extend(self.names(|state| state != State::Asked));
            }
        }
        request
    }

    /// Names that have no answer yet go apart from the known versions: else the server could hold that the client has the
    /// resource, and not answer.
    pub(super) fn second_request(&self) -> Option<DeltaDiscoveryRequest> {
        let names: Vec<String> = self.names(|state| state == State::Asked).collect();
        (!names.is_empty()).then(|| DeltaDiscoveryRequest {
            type_url: self.type_url.to_string(),
            resource_names_subscribe: names,
            ..DeltaDiscoveryRequest::default()
        })
    }

    fn names(&self, filter: impl Fn(State) -> bool) -> impl Iterator<Item = String> {
        self.wanted.iter().filter(move |(_, wanted)| filter(wanted.state)).map(|(name, _)| name.to_string())
    }

    pub(super) fn pending(&self) -> usize {
        self.names(|state| state == State::Asked).count()
    }

    /// What is known about a name, if it need not be asked for.
    pub(super) fn state(&self, name: &str) -> Option<Subscribed> {
        if self.mode == Mode::Wildcard {
            let answer = if self.known.contains_key(name) { Answer::Present } else { Answer::Absent };
            return Some(Subscribed::Answered(answer));
        }
        self.wanted.get(name).map(|wanted| match wanted.state {
            State::Asked => Subscribed::Pending,
            State::Present => Subscribed::Answered(Answer::Present),
            State::Rejected => Subscribed::Answered(Answer::Rejected),
            State::Absent(_) => Subscribed::Answered(Answer::Absent),
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
        self.wanted.insert(name, Wanted { state: State::Asked, holders: 0 });
    }

    pub(super) fn received(
        &mut self,
        response: DeltaDiscoveryResponse,
        now: SystemTime,
        sink: &mut (impl Sink + ?Sized),
    ) -> Received {
        let complete = !response.system_version_info.ends_with(MORE);
        let (update, mut rejections) = self.read(response);
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
                self.reject(&name, &aliases, &mut resolved);
            } else {
                self.set(name, version, &aliases, &mut resolved);
            }
        }
        for Rejection { name, reason } in &rejections {
            // A resource whose envelope was refused is in no update, but may have been asked for.
            self.reject(name, &[], &mut resolved);
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
                return Ok(Resource {
                    name: wire.name.into(),
                    aliases: wire.aliases.into_iter().map(Arc::from).collect(),
                    version: wire.version.into(),
                    body: any.value.into(),
                });
            }
        };
        Err(Rejection { name: wire.name, reason })
    }

    fn set(&mut self, name: Arc<str>, version: Arc<str>, aliases: &[Arc<str>], resolved: &mut Resolved) {
        let mut answers: Vec<Arc<str>> = Vec::new();
        for name in std::iter::once(&name).chain(aliases) {
            if self.wanted.contains_key(name) && !answers.contains(name) {
                answers.push(name.clone());
            }
        }
        self.status.rejected.remove(&*name);
        let before = self.known.insert(name, Known { version, answers: answers.clone() });
        for name in answers {
            self.answer(&name, Answer::Present, 1, resolved);
        }
        for name in before.map(|known| known.answers).unwrap_or_default() {
            self.answer(&name, Answer::Absent, -1, resolved);
        }
    }

    /// What was accepted before stays known, under its old version: so it is sent again after a reconnect.
    fn reject(&mut self, name: &str, aliases: &[Arc<str>], resolved: &mut Resolved) {
        self.answer(name, Answer::Rejected, 0, resolved);
        for alias in aliases {
            self.answer(alias, Answer::Rejected, 0, resolved);
        }
    }

    fn remove(&mut self, name: &str, resolved: &mut Resolved) {
        for name in self.known.remove(name).map(|known| known.answers).unwrap_or_default() {
            self.answer(&name, Answer::Absent, -1, resolved);
        }
        self.answer(name, Answer::Absent, 0, resolved);
        self.status.rejected.remove(name);
    }

    /// Notes what was learned about a name, if it was asked for: `holders` more or fewer resources have it, and unless one
    /// does, the answer is `answer`.
    fn answer(&mut self, name: &str, answer: Answer, holders: isize, resolved: &mut Resolved) {
        let Some((name, wanted)) = self.wanted.get_key_value(name) else { return };
        let (name, Wanted { state: before, holders: held }) = (name.clone(), *wanted);
        let holders = held.saturating_add_signed(holders);
        let answer = if holders > 0 { Answer::Present } else { answer };
        let state = match (answer, before) {
            (Answer::Absent, State::Absent(_)) => before,
            (Answer::Absent, State::Asked | State::Present | State::Rejected) => {
                self.clock += 1;
                self.absent.insert(self.clock, name.clone());
                State::Absent(self.clock)
            }
            (Answer::Present, _) => State::Present,
            (Answer::Rejected, _) => State::Rejected,
        };
        if let State::Absent(since) = before
            && state != before
        {
            self.absent.remove(&since);
        }
        self.wanted.insert(name.clone(), Wanted { state, holders });
        if before == State::Asked {
            resolved.push((name, answer));
        }
    }
}
