//! The client's and the server's machine talk through queues in memory, interleaved at random with updates,
//! subscriptions, refusals and disconnects. Whatever the order: when all is said, the client has what the catalog has.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use mesh_proto::core::Node;
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_xds::client::{self, Answer, Mode, Sink, Subscribed};
use mesh_xds::server::{self, Catalog, Entry, Limits, Violation};
use mesh_xds::{AUTHORIZATION_TYPE, Rejection, Resource, Update, WORKLOAD_TYPE};
use proptest::prelude::*;

const PRIMARIES: [&str; 6] = ["ns/s0", "ns/s1", "w0", "w1", "w2", "w3"];
const ALIASES: [&str; 4] = ["net/0", "net/1", "net/2", "net/3"];
const NOW: SystemTime = SystemTime::UNIX_EPOCH;

#[derive(Clone, Debug)]
enum Step {
    Set {
        policy: bool,
        name: usize,
        aliases: BTreeSet<usize>,
        service: Option<usize>,
        body: Body,
    },
    Remove {
        policy: bool,
        name: usize,
    },
    Both {
        set: usize,
        remove: usize,
        body: Body,
    },
    Subscribe {
        name: usize,
    },
    /// Requests from the client to the server.
    Up(usize),
    /// Requests and responses from the server to the client.
    Down(usize),
    Disconnect,
}

#[derive(Clone, Copy, Debug)]
struct Body {
    value: u8,
    bad: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let body = || (0..3_u8, prop::bool::weighted(0.15)).prop_map(|(value, bad)| Body { value, bad });
    let name = || 0..PRIMARIES.len();
    let set =
        (any::<bool>(), name(), prop::collection::btree_set(0..ALIASES.len(), 0..3), prop::option::of(0..2_usize));
    let step = prop_oneof![
        6 => (set, body()).prop_map(|((policy, name, aliases, service), body)| {
            Step::Set { policy, name, aliases, service, body }
        }),
        3 => (any::<bool>(), name()).prop_map(|(policy, name)| Step::Remove { policy, name }),
        1 => (name(), name(), body()).prop_map(|(set, remove, body)| Step::Both { set, remove, body }),
        4 => (0..PRIMARIES.len() + ALIASES.len()).prop_map(|name| Step::Subscribe { name }),
        6 => (1..4_usize).prop_map(Step::Up),
        6 => (1..4_usize).prop_map(Step::Down),
        1 => Just(Step::Disconnect),
    ];
    prop::collection::vec(step, 1..80)
}

/// What the client's side accepted, by type and name, and what it refused last.
#[derive(Default)]
struct Store(BTreeMap<(String, String), Resource>, BTreeSet<(String, String)>);

impl Sink for Store {
    fn apply(&mut self, update: Update) -> Vec<Rejection> {
        let key = |name: &str| (update.type_url.to_string(), name.to_owned());
        for name in &update.removed {
            self.0.remove(&key(name));
            self.1.remove(&key(name));
        }
        let mut rejections = Vec::new();
        for resource in &update.set {
            if resource.body.starts_with(b"bad") {
                rejections.push(Rejection { name: resource.name.to_string(), reason: "bad".into() });
                self.1.insert(key(&resource.name));
            } else {
                self.1.remove(&key(&resource.name));
                self.0.insert(key(&resource.name), resource.clone());
            }
        }
        rejections
    }
}

struct World {
    catalog: Catalog,
    limits: Arc<Limits>,
    client: client::Machine,
    server: server::Machine,
    store: Store,
    up: VecDeque<DeltaDiscoveryRequest>,
    down: VecDeque<DeltaDiscoveryResponse>,
    asked: BTreeSet<String>,
    /// Whether policies have an empty version.
    unversioned: bool,
}

impl World {
    fn new(mode: Mode, max_response: usize, max_names: usize, unversioned: bool) -> Self {
        let limits = Arc::new(Limits { max_response, max_first_response: max_response, ..Limits::default() });
        let types = [(AUTHORIZATION_TYPE.into(), Mode::Wildcard), (WORKLOAD_TYPE.into(), mode)];
        let mut client = client::Machine::new(Node { id: "n".into(), ..Node::default() }, types, max_names);
        client.connected();
        Self {
            catalog: Catalog::remembering(3),
            server: server::Machine::new(Arc::clone(&limits)),
            limits,
            client,
            store: Store::default(),
            up: VecDeque::new(),
            down: VecDeque::new(),
            asked: BTreeSet::new(),
            unversioned,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Set { policy, name, aliases, service, body } => {
                let entry = self.entry(policy, name, &aliases, service, body);
                self.catalog.update(kind(policy), [entry], [] as [&str; 0]);
            }
            Step::Remove { policy, name } => {
                self.catalog.update(kind(policy), [] as [Entry; 0], [PRIMARIES[name]]);
            }
            Step::Both { set, remove, body } => {
                let entry = self.entry(false, set, &BTreeSet::from([0]), None, body);
                self.catalog.update(kind(false), [entry], [PRIMARIES[remove]]);
            }
            Step::Subscribe { name } => {
                let name = PRIMARIES.iter().chain(&ALIASES).nth(name).unwrap();
                if self.client.subscribe(WORKLOAD_TYPE, name).is_ok() {
                    self.asked.insert((*name).to_owned());
                }
            }
            Step::Up(count) => (0..count).for_each(|_| {
                self.up();
            }),
            Step::Down(count) => (0..count).for_each(|_| {
                self.down();
            }),
            Step::Disconnect => self.reconnect(),
        }
    }

    fn entry(&self, policy: bool, name: usize, aliases: &BTreeSet<usize>, service: Option<usize>, body: Body) -> Entry {
        // As it is with workloads: the body says to which services it belongs.
        let body = format!("{}{}-{service:?}", if body.bad { "bad" } else { "good" }, body.value);
        let version = if policy && self.unversioned { String::new() } else { format!("{body}{aliases:?}") };
        let resource = Resource {
            name: PRIMARIES[name].into(),
            aliases: aliases.iter().map(|alias| Arc::from(ALIASES[*alias])).collect(),
            version: version.into(),
            body: Bytes::from(body),
        };
        let member_of = service.map(|service| PRIMARIES[service].into()).into_iter().collect();
        Entry { resource, member_of, refers: aliases.len() > 1 }
    }

    fn reconnect(&mut self) {
        self.client.disconnected();
        self.server = server::Machine::new(Arc::clone(&self.limits));
        self.up.clear();
        self.down.clear();
        self.client.connected();
    }

    fn up(&mut self) -> bool {
        self.up.extend(std::iter::from_fn(|| self.client.request()));
        let Some(request) = self.up.pop_front() else { return false };
        self.server.request(&self.catalog.snapshot(), request, NOW).unwrap();
        true
    }

    fn down(&mut self) -> bool {
        loop {
            match self.server.respond(&self.catalog.snapshot()) {
                Ok(Some(response)) => self.down.push_back(response.to_message()),
                Ok(None) => break,
                Err(Violation::TooFarBehind) => {
                    self.reconnect();
                    return true;
                }
                Err(other) => panic!("{other}"),
            }
        }
        let mut unacked: Vec<&str> = self.down.iter().map(|response| response.type_url.as_str()).collect();
        let waiting = unacked.len();
        unacked.sort_unstable();
        unacked.dedup();
        assert_eq!(unacked.len(), waiting, "one response per type is in flight");
        let Some(response) = self.down.pop_front() else { return false };
        self.client.received(response, NOW, &mut self.store);
        true
    }

    /// Lets both speak until neither has anything to say.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let (up, down) = (self.up(), self.down());
            if !up && !down {
                return;
            }
        }
        panic!("they never come to an end");
    }

    fn check(&mut self, mode: Mode) {
        let catalog = self.catalog.snapshot();
        assert!(self.client.is_synced());
        assert_eq!(self.client.pending(), 0);
        for type_url in [AUTHORIZATION_TYPE, WORKLOAD_TYPE] {
            let wildcard = type_url == AUTHORIZATION_TYPE || mode == Mode::Wildcard;
            let mut expected: BTreeMap<&str, &Resource> = BTreeMap::new();
            let mut visible: BTreeSet<&str> = BTreeSet::new();
            for resource in catalog.resources(type_url) {
                visible.insert(&resource.name);
                if wildcard {
                    expected.insert(&resource.name, resource);
                }
            }
            if !wildcard {
                for name in &self.asked {
                    for resource in catalog.lookup(type_url, name) {
                        expected.insert(&resource.name, resource);
                    }
                }
            }
            // Everything that is due is there, and current; what was refused may be there in an older form.
            for (name, resource) in &expected {
                let has = self.store.0.get(&(type_url.to_owned(), (*name).to_owned()));
                if resource.body.starts_with(b"bad") {
                    assert!(has.is_none_or(|has| has.body.starts_with(b"good")));
                } else {
                    assert_eq!(has, Some(*resource), "{name}");
                }
            }
            // Everything that is there exists, and is current.
            for ((_, name), has) in self.store.0.iter().filter(|((kind, _), _)| kind == type_url) {
                let now = catalog.lookup(type_url, name).into_iter().find(|resource| *resource.name == **name);
                let now = now.unwrap_or_else(|| panic!("{name} is gone, but the client has it"));
                assert!(now.body.starts_with(b"bad") || now == has, "{name}: {has:?}, now {now:?}");
            }
            // What was refused last is so still.
            for (_, name) in self.store.1.iter().filter(|(kind, _)| kind == type_url) {
                let now = catalog.resources(type_url).find(|resource| *resource.name == **name);
                assert!(now.is_some_and(|now| now.body.starts_with(b"bad")), "{name} was refused, and is {now:?}");
            }
            // What the client shows as refused is what it has refused.
            let (_, status) = self.client.status().find(|(known, _)| ***known == *type_url).unwrap();
            for name in status.rejected.keys() {
                assert!(catalog.lookup(type_url, name)[0].body.starts_with(b"bad"), "{name}");
            }
            for (name, resource) in &expected {
                assert_eq!(resource.body.starts_with(b"bad"), status.rejected.contains_key(*name), "{name}");
            }
        }
        if mode == Mode::OnDemand {
            self.check_answers(&catalog);
        }
    }

    fn check_answers(&mut self, catalog: &server::Snapshot) {
        for name in self.asked.clone() {
            let found = catalog.lookup(WORKLOAD_TYPE, &name);
            let good = found.iter().any(|resource| resource.body.starts_with(b"good"));
            // What was refused leaves the last good content in force, with the aliases that it had.
            let kept = self.store.0.values().any(|has| {
                let now = catalog.lookup(WORKLOAD_TYPE, &has.name).into_iter().find(|now| now.name == has.name);
                has.aliases.contains(&name.as_str().into()) && now.is_some_and(|now| now.body.starts_with(b"bad"))
            });
            match self.client.subscribe(WORKLOAD_TYPE, &name) {
                Ok(Subscribed::Answered(Answer::Present)) => assert!(!found.is_empty() || kept, "{name}"),
                Ok(Subscribed::Answered(Answer::Rejected)) => assert!(!good && !found.is_empty(), "{name}"),
                Ok(Subscribed::Answered(Answer::Absent)) => assert!(!good, "{name} is there"),
                other => panic!("{name}: {other:?}"),
            }
        }
        // The members of every service that was asked for are there as well.
        for ((kind, name), service) in &self.store.0 {
            if kind != WORKLOAD_TYPE || !self.asked.contains(name) || !service.name.starts_with("ns/") {
                continue;
            }
            let index = PRIMARIES.iter().position(|primary| primary == name).unwrap();
            let tag = format!("-Some({index})");
            for member in catalog.resources(WORKLOAD_TYPE) {
                if member.body.ends_with(tag.as_bytes()) && member.body.starts_with(b"good") {
                    let has = self.store.0.get(&(WORKLOAD_TYPE.to_owned(), member.name.to_string()));
                    assert_eq!(has, Some(member), "member of {name}");
                }
            }
        }
    }
}

fn kind(policy: bool) -> &'static str {
    if policy { AUTHORIZATION_TYPE } else { WORKLOAD_TYPE }
}

fn run(mode: Mode, steps: Vec<Step>, max_response: usize, max_names: usize, unversioned: bool) {
    let mut world = World::new(mode, max_response, max_names, unversioned);
    for step in steps {
        world.step(step);
    }
    world.settle();
    // With a limit of names some have been given up again: only those still subscribed to are held to anything.
    if max_names < PRIMARIES.len() + ALIASES.len() {
        let names: Vec<String> = world.asked.iter().cloned().collect();
        world.asked.clear();
        for name in names {
            if let Ok(Subscribed::Answered(Answer::Present)) = world.client.subscribe(WORKLOAD_TYPE, &name) {
                world.asked.insert(name);
            }
        }
        world.settle();
    }
    world.check(mode);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_wildcard_client_ends_with_the_catalog(steps in steps(), small in any::<bool>(), unversioned in any::<bool>()) {
        run(Mode::Wildcard, steps, if small { 150 } else { 1 << 20 }, 100, unversioned);
    }

    #[test]
    fn an_on_demand_client_ends_with_what_it_asked_for(steps in steps(), small in any::<bool>()) {
        run(Mode::OnDemand, steps, if small { 150 } else { 1 << 20 }, 100, false);
    }

    #[test]
    fn few_names_are_held_to_the_same(steps in steps(), small in any::<bool>()) {
        run(Mode::OnDemand, steps, if small { 150 } else { 1 << 20 }, 3, false);
    }
}
