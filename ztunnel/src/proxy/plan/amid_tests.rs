//! What a proxy does while it is told of changes in parts, each resource in a response of its own: it may refuse, but not let
//! out what it would let out neither before nor after. Addresses change hands by their owners' end, as those of pods and
//! services do, and by edits that take one from an owner that goes on, as those of entries do.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_model::Snapshot;
use mesh_proto::core::Node;
use mesh_proto::workload as wire;
use mesh_xds::client::{self, Mode};
use mesh_xds::server::{self, Catalog, Entry, Limits};
use mesh_xds::{Resource, WORKLOAD_TYPE};
use proptest::prelude::*;
use prost::Message as _;

use super::{OriginalDst, Plan, TunnelKind, plan};
use crate::proxy::local::fixture::{at, id, in_service, ip, local, pod, service, waypoint};
use crate::proxy::state::{Discovery, State};

const NOW: SystemTime = SystemTime::UNIX_EPOCH;
/// Addresses that pods and services have in turn; the last one of each is the waypoint's.
const PODS: [&str; 4] = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9"];
const SERVICES: [&str; 3] = ["10.96.0.1", "10.96.0.2", "10.96.0.9"];
const GATE: &str = "gate";

/// What becomes of one pod or service.
#[derive(Clone, Debug)]
enum Change {
    /// It has this address, and is bound to the waypoint or not; and whether it is behind each of the two services.
    Pod(usize, usize, bool, [bool; 2]),
    /// It has this address, and is bound or not.
    Service(usize, usize, bool),
    /// The waypoint, its service and its pod, is there.
    Gate,
    PodGone(usize),
    ServiceGone(usize),
    GateGone,
}

#[derive(Clone, Debug)]
enum Step {
    /// All at once.
    Update(Vec<Change>),
    /// The proxy is told so many parts.
    Tell(usize),
    /// It is told all that there is.
    TellAll,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let change = prop_oneof![
        6 => (0..5_usize, 0..3_usize, any::<bool>(), any::<[bool; 2]>())
            .prop_map(|(name, address, is_bound, of)| Change::Pod(name, address, is_bound, of)),
        4 => (0..3_usize, 0..2_usize, any::<bool>())
            .prop_map(|(name, address, is_bound)| Change::Service(name, address, is_bound)),
        2 => Just(Change::Gate),
        4 => (0..5_usize).prop_map(Change::PodGone),
        3 => (0..3_usize).prop_map(Change::ServiceGone),
        1 => Just(Change::GateGone),
    ];
    let step = prop_oneof![
        4 => prop::collection::vec(change, 1..8).prop_map(Step::Update),
        4 => (1..4_usize).prop_map(Step::Tell),
        1 => Just(Step::TellAll),
    ];
    prop::collection::vec(step, 1..30)
}

/// All that there is at one time, by name.
#[derive(Clone, Debug, Default)]
struct World(BTreeMap<String, wire::address::Type>);

/// What the world has at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Nobody,
    /// Those there are bound to a waypoint.
    Bound,
    /// Some is not.
    Free,
}

impl World {
    fn workload(&mut self, workload: wire::Workload) {
        self.0.insert(workload.uid.clone(), wire::address::Type::Workload(workload));
    }

    fn service(&mut self, service: wire::Service) {
        self.0.insert(format!("shop/{}", service.hostname), wire::address::Type::Service(service));
    }

    fn apply(&mut self, change: &Change) {
        let bound = |is_bound: bool| is_bound.then(|| waypoint(GATE));
        match *change {
            Change::Pod(name, address, is_bound, of) => {
                let mut made = pod(&format!("w{name}"), &[PODS[address]]);
                for (at, is_of) in of.into_iter().enumerate() {
                    if is_of {
                        made = in_service(made, &format!("s{at}"), &[(80, 8080)]);
                    }
                }
                self.workload(wire::Workload { waypoint: bound(is_bound), ..made });
            }
            Change::Service(name, address, is_bound) => {
                let made = service(&format!("s{name}"), SERVICES[address], &[(80, 8080)]);
                self.service(wire::Service { waypoint: bound(is_bound), ..made });
            }
            Change::Gate => {
                self.service(service(GATE, SERVICES[2], &[(15008, 15008)]));
                self.workload(in_service(pod("gate-1", &[PODS[3]]), GATE, &[(15008, 15008)]));
            }
            Change::PodGone(name) => self.remove(&format!("Kubernetes//Pod/shop/w{name}")),
            Change::ServiceGone(name) => self.remove(&format!("shop/s{name}.shop.svc.cluster.local")),
            Change::GateGone => {
                self.remove(&format!("shop/{GATE}.shop.svc.cluster.local"));
                self.remove("Kubernetes//Pod/shop/gate-1");
            }
        }
    }

    fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    fn owner(&self, address: &str) -> Owner {
        let IpAddr::V4(v4) = ip(address) else { return Owner::Nobody };
        let has = |bytes: &[u8]| *bytes == v4.octets();
        let is_bound = self.0.values().filter_map(|one| match one {
            wire::address::Type::Workload(workload) => {
                workload.addresses.iter().any(|at| has(at)).then_some(workload.waypoint.is_some())
            }
            wire::address::Type::Service(service) => {
                service.addresses.iter().any(|at| has(&at.address)).then_some(service.waypoint.is_some())
            }
        });
        is_bound.fold(Owner::Nobody, |owner, is_bound| match (owner, is_bound) {
            (Owner::Nobody | Owner::Bound, true) => Owner::Bound,
            _ => Owner::Free,
        })
    }

    fn entries(&self) -> impl Iterator<Item = Entry> {
        self.0.iter().map(|(name, one)| {
            let (refers, addresses): (bool, Vec<&[u8]>) = match one {
                wire::address::Type::Workload(workload) => {
                    (workload.waypoint.is_some(), workload.addresses.iter().map(AsRef::as_ref).collect())
                }
                wire::address::Type::Service(service) => {
                    (service.waypoint.is_some(), service.addresses.iter().map(|at| at.address.as_ref()).collect())
                }
            };
            let aliases = addresses.iter().map(|address| format!("/{address:?}").into()).collect();
            let body = wire::Address { r#type: Some(one.clone()) }.encode_to_vec();
            let version = format!("{body:?}").into();
            let resource = Resource { name: name.as_str().into(), aliases, version, body: body.into() };
            Entry { refers, ..Entry::from(resource) }
        })
    }
}

/// A control plane and a proxy that is told by it.
struct Told {
    catalog: Catalog,
    server: server::Machine,
    client: client::Machine,
    state: Arc<State>,
    sink: Discovery,
    world: World,
    /// What there was since the proxy last knew all that there was.
    worlds: Vec<World>,
}

impl Told {
    fn new() -> Self {
        let limits = Limits { max_response: 1, max_first_response: 1, ..Limits::default() };
        let types = [(WORKLOAD_TYPE.into(), Mode::Wildcard)];
        let mut client = client::Machine::new(Node { id: "n".into(), ..Node::default() }, types, 100);
        client.connected();
        let state = State::new();
        let sink = state.sink("node-1");
        let (server, world) = (server::Machine::new(Arc::new(limits)), World::default());
        let mut told =
            Self { catalog: Catalog::new(), server, client, state, sink, worlds: vec![world.clone()], world };
        // What it does before it knows anything is another question: it waits.
        while told.tell() {}
        told
    }

    fn update(&mut self, changes: &[Change]) {
        let before = self.world.clone();
        changes.iter().for_each(|change| self.world.apply(change));
        let gone = before.0.into_keys().filter(|name| !self.world.0.contains_key(name));
        self.catalog.update(WORKLOAD_TYPE, self.world.entries(), gone);
        self.worlds.push(self.world.clone());
    }

    /// Tells one part. Returns false if there was none.
    fn tell(&mut self) -> bool {
        while let Some(request) = self.client.request() {
            self.server.request(&self.catalog.snapshot(), request, NOW).unwrap();
        }
        let response = self.server.respond(&self.catalog.snapshot()).unwrap();
        let Some(response) = response else {
            self.worlds = vec![self.world.clone()];
            return false;
        };
        self.client.received(response.to_message(), NOW, &mut self.sink);
        true
    }

    fn check(&self) {
        let snapshot = self.state.snapshot();
        for address in PODS.iter().chain(&SERVICES) {
            let owners: Vec<Owner> = self.worlds.iter().map(|world| world.owner(address)).collect();
            for seed in 0..6 {
                let way = way(&snapshot, address, seed);
                let why = || format!("{address} is {way:?}; it was {owners:?}");
                match way {
                    Way::Refused | Way::Waypoint => {}
                    Way::Direct => assert!(owners.iter().any(|owner| *owner != Owner::Bound), "{}", why()),
                    Way::Through => assert!(owners.contains(&Owner::Nobody), "{}", why()),
                }
            }
        }
    }
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Refused,
    Waypoint,
    Direct,
    /// As if the mesh did not know the address.
    Through,
}

fn way(snapshot: &Snapshot, address: &str, seed: u64) -> Way {
    let (identity, addresses) = (id("shop", "client"), [ip("10.0.0.100")]);
    let source = local("client", &identity, &addresses);
    let to = OriginalDst(at(&format!("{address}:80")));
    match plan(snapshot, &source, to, &|_| false, &mut fastrand::Rng::with_seed(seed)) {
        Err(_) => Way::Refused,
        Ok(Plan::Tunnel { kind: TunnelKind::Direct, .. }) => Way::Direct,
        Ok(Plan::Tunnel { kind: TunnelKind::ServiceWaypoint | TunnelKind::WorkloadWaypoint, .. }) => Way::Waypoint,
        Ok(plan @ Plan::Plain { .. }) => panic!("every pod speaks HBONE: {plan:?}"),
        Ok(Plan::PassThrough { .. }) => Way::Through,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_let_out_between_two_states_that_is_let_out_in_neither(steps in steps()) {
        let mut told = Told::new();
        for step in &steps {
            match step {
                Step::Update(changes) => told.update(changes),
                Step::Tell(parts) => for _ in 0..*parts {
                    told.tell();
                    told.check();
                },
                Step::TellAll => while told.tell() {
                    told.check();
                },
            }
        }
    }
}

#[test]
fn what_takes_the_place_of_another_is_there_before_that_one_goes() {
    let mut told = Told::new();
    told.update(&[Change::Pod(0, 0, false, [true, false]), Change::Service(0, 0, false)]);
    while told.tell() {}
    let both = |told: &Told| (way(&told.state.snapshot(), PODS[0], 0), way(&told.state.snapshot(), SERVICES[0], 0));
    assert_eq!(both(&told), (Way::Direct, Way::Direct));
    // Another pod with the address of the one, another service with that of the other; and they are bound.
    let pods = [Change::PodGone(0), Change::Pod(1, 0, true, [false, true])];
    let services = [Change::ServiceGone(0), Change::Service(1, 0, true), Change::Gate];
    told.update(&[&pods[..], &services[..]].concat());
    let mut ways = Vec::new();
    while told.tell() {
        told.check();
        ways.push(both(&told));
    }
    assert_eq!(ways.last(), Some(&(Way::Waypoint, Way::Waypoint)));
    assert!(ways.len() == 6 && ways.iter().all(|(pod, service)| *pod != Way::Through && *service != Way::Through));
    // What is bound to the waypoint is told when that one is known: it is not refused meanwhile. After that the former ones
    // go, one after the other.
    assert!(ways[..4].iter().all(|(pod, service)| *pod != Way::Refused && *service != Way::Refused), "{ways:?}");
}

#[test]
fn an_address_that_an_edit_gives_to_another_is_never_nobodys() {
    let mut told = Told::new();
    told.update(&[Change::Pod(0, 0, false, [true, false]), Change::Pod(1, 1, false, [false, false])]);
    while told.tell() {}
    let ways = |told: &Told| [PODS[0], PODS[1]].map(|address| way(&told.state.snapshot(), address, 0));
    // They change places; then each in turn has the one and is bound, or not.
    for bound in [[false, false], [true, false], [false, true]] {
        let at = usize::from(bound[0] == bound[1]);
        let changes = [Change::Pod(0, at, bound[0], [false, true]), Change::Pod(1, 1 - at, bound[1], [true, false])];
        told.update(&[&changes[..], &[Change::Gate]].concat());
        while told.tell() {
            told.check();
            assert!(!ways(&told).contains(&Way::Through));
        }
    }
}
