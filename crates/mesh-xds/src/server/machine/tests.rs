//! The server's side of the protocol, message by message.

use bytes::Bytes;
use mesh_proto::core::Node;
use mesh_proto::rpc;

use super::*;
use crate::Resource;
use crate::server::response::Content;
use crate::server::{Catalog, Entry};

const NOW: SystemTime = SystemTime::UNIX_EPOCH;
const NOTHING: [&str; 0] = [];

pub(super) fn thing(name: &str, aliases: &[&str], body: &str) -> Resource {
    Resource {
        name: name.into(),
        aliases: aliases.iter().map(|alias| Arc::from(*alias)).collect(),
        version: format!("v-{body}").into(),
        body: Bytes::copy_from_slice(body.as_bytes()),
    }
}

fn member(name: &str, of: &str) -> Entry {
    Entry { member_of: vec![of.into()], ..thing(name, &[], "1").into() }
}

pub(super) struct Peer {
    pub(super) catalog: Catalog,
    pub(super) machine: Machine,
}

impl Peer {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    pub(super) fn with(limits: Limits) -> Self {
        Self { catalog: Catalog::remembering(8), machine: Machine::new(Arc::new(limits)) }
    }

    pub(super) fn set(&self, things: &[Resource]) {
        self.catalog.update(WORKLOAD_TYPE, things.to_vec(), NOTHING);
    }

    fn remove(&self, names: &[&str]) {
        self.catalog.update(WORKLOAD_TYPE, [] as [Resource; 0], names);
    }

    pub(super) fn send(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Violation> {
        self.machine.request(&self.catalog.snapshot(), request, NOW)
    }

    /// What is sent next, in short: the nonce, `name=body` for each resource, `-name` for each removal.
    pub(super) fn next(&mut self) -> Option<(String, Vec<String>)> {
        self.machine.respond(&self.catalog.snapshot()).unwrap().map(|response| {
            let response = response.to_message();
            let set = response.resources.iter().map(|resource| {
                let body = &resource.resource.as_ref().unwrap().value;
                format!("{}={}", resource.name, String::from_utf8_lossy(body))
            });
            let removed = response.removed_resources.iter().map(|name| format!("-{name}"));
            (response.nonce.clone(), set.chain(removed).collect())
        })
    }

    /// Takes what is sent next, and acknowledges it.
    pub(super) fn take(&mut self) -> Vec<String> {
        let (nonce, said) = self.next().expect("a response");
        self.send(ack(&nonce)).unwrap();
        said
    }
}

pub(super) fn subscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: WORKLOAD_TYPE.into(),
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

pub(super) fn on_demand(names: &[&str]) -> DeltaDiscoveryRequest {
    let mut request = subscribe(names);
    request.resource_names_subscribe.push("*".into());
    request.resource_names_unsubscribe.push("*".into());
    request
}

pub(super) fn having(mut request: DeltaDiscoveryRequest, versions: &[(&str, &str)]) -> DeltaDiscoveryRequest {
    request.initial_resource_versions =
        versions.iter().map(|(name, version)| (name.to_string(), version.to_string())).collect();
    request
}

pub(super) fn ack(nonce: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { response_nonce: nonce.into(), ..subscribe(&[]) }
}

fn nack(nonce: &str, message: &str) -> DeltaDiscoveryRequest {
    let error = rpc::Status { code: 3, message: message.into(), details: vec![] };
    DeltaDiscoveryRequest { error_detail: Some(error), ..ack(nonce) }
}

#[test]
fn a_wildcard_gets_everything_then_changes() {
    let mut peer = Peer::new();
    peer.set(&[thing("a", &[], "1"), thing("b", &[], "1")]);
    assert_eq!(peer.next(), None);
    peer.send(subscribe(&[])).unwrap();
    assert_eq!(peer.take(), ["a=1", "b=1"]);
    assert_eq!(peer.next(), None);
    peer.set(&[thing("b", &[], "2"), thing("c", &[], "1")]);
    peer.remove(&["a"]);
    assert_eq!(peer.take(), ["b=2", "c=1", "-a"]);
    assert_eq!(peer.next(), None);
}

#[test]
fn the_first_request_is_answered_even_with_nothing() {
    let mut peer = Peer::new();
    peer.send(subscribe(&[])).unwrap();
    assert_eq!(peer.take(), [""; 0]);
    let mut unknown = subscribe(&["x"]);
    unknown.type_url = "unknown".into();
    peer.send(unknown).unwrap();
    assert_eq!(peer.next().unwrap().1, ["-x"]);
}

#[test]
fn one_response_is_in_flight_and_changes_coalesce() {
    let mut peer = Peer::new();
    peer.set(&[thing("a", &[], "1")]);
    peer.send(subscribe(&[])).unwrap();
    let (nonce, _) = peer.next().unwrap();
    peer.set(&[thing("a", &[], "2"), thing("b", &[], "1")]);
    peer.set(&[thing("a", &[], "3")]);
    peer.remove(&["b"]);
    assert_eq!(peer.next(), None, "not before the ACK");
    peer.send(ack("stale")).unwrap();
    assert_eq!(peer.next(), None, "a stale nonce is no ACK");
    peer.send(ack(&nonce)).unwrap();
    assert_eq!(peer.take(), ["a=3", "-b"]);
}

#[test]
fn a_client_that_comes_back_gets_the_difference() {
    let mut peer = Peer::new();
    peer.set(&[thing("a", &[], "1"), thing("b", &[], "2"), thing("c", &[], "1")]);
    let first = having(subscribe(&[]), &[("a", "v-1"), ("b", "v-1"), ("gone", "v-1")]);
    peer.send(first).unwrap();
    assert_eq!(peer.take(), ["b=2", "c=1", "-gone"]);
}

#[test]
fn an_empty_version_is_sent_again_and_its_removal_is_told() {
    let mut peer = Peer::new();
    peer.set(&[Resource { version: "".into(), ..thing("a", &[], "1") }]);
    peer.send(having(subscribe(&[]), &[("a", ""), ("gone", "")])).unwrap();
    assert_eq!(peer.take(), ["a=1", "-gone"]);
}

#[test]
fn a_large_state_comes_in_parts() {
    let mut peer = Peer::with(Limits { max_response: 300, max_first_response: 300, ..Limits::default() });
    let all: Vec<Resource> = (0..20).map(|n| thing(&format!("thing-{n:02}"), &[], "1")).collect();
    peer.set(&all);
    // Those in the middle are known: the walk must not fall back behind them.
    let known: Vec<String> = (5..15).map(|n| format!("thing-{n:02}")).collect();
    let known: Vec<(&str, &str)> = known.iter().map(|name| (name.as_str(), "v-1")).collect();
    peer.send(having(subscribe(&[]), &known)).unwrap();
    let mut said = Vec::new();
    let mut parts = 0;
    loop {
        let response = peer.machine.respond(&peer.catalog.snapshot()).unwrap().unwrap().to_message();
        said.extend(response.resources.iter().map(|resource| resource.name.clone()));
        parts += 1;
        // Changes behind and before the walk.
        if parts == 1 {
            peer.set(&[thing("thing-00", &[], "2"), thing("thing-19", &[], "2")]);
            peer.remove(&["thing-18"]);
        }
        let more = response.system_version_info.ends_with(MORE);
        assert!(more || parts > 1);
        peer.send(ack(&response.nonce)).unwrap();
        if !more {
            break;
        }
    }
    assert!(parts >= 3, "{parts}");
    for n in (0..5).chain(15..18) {
        assert!(said.contains(&format!("thing-{n:02}")), "{n}: {said:?}");
    }
    assert!(!said.contains(&"thing-10".to_owned()));
    assert_eq!(said.iter().filter(|name| *name == "thing-00").count(), 2);
    assert_eq!(said.iter().filter(|name| *name == "thing-03").count(), 1);
    assert_eq!(peer.next(), None);
}

#[test]
fn the_first_state_is_whole_and_changes_come_in_parts() {
    let mut peer = Peer::with(Limits { max_response: 300, ..Limits::default() });
    let all = |body: &str| (0..20).map(|n| thing(&format!("thing-{n:02}"), &[], body)).collect::<Vec<Resource>>();
    peer.set(&all("1"));
    peer.send(subscribe(&[])).unwrap();
    let first = peer.machine.respond(&peer.catalog.snapshot()).unwrap().unwrap().to_message();
    assert!(first.resources.len() == 20 && !first.system_version_info.ends_with(MORE));
    peer.send(ack(&first.nonce)).unwrap();
    peer.set(&all("2"));
    let next = peer.machine.respond(&peer.catalog.snapshot()).unwrap().unwrap().to_message();
    assert!(next.resources.len() < 20 && next.system_version_info.ends_with(MORE));
}

#[test]
fn names_and_aliases_on_demand() {
    let mut peer = Peer::new();
    peer.set(&[thing("uid", &["net/10.0.0.1"], "1"), thing("other", &["net/10.0.0.2"], "1")]);
    peer.send(on_demand(&[])).unwrap();
    assert_eq!(peer.take(), [""; 0]);
    peer.send(subscribe(&["net/10.0.0.1", "net/10.0.0.9"])).unwrap();
    assert_eq!(peer.take(), ["uid=1", "-net/10.0.0.9"]);
    peer.set(&[thing("other", &["net/10.0.0.2"], "2")]);
    assert_eq!(peer.next(), None, "nobody asked for it");
    // The absent name comes to be; the present one changes hands.
    peer.set(&[thing("new", &["net/10.0.0.9"], "1"), thing("heir", &["net/10.0.0.1"], "1")]);
    peer.remove(&["uid"]);
    assert_eq!(peer.take(), ["new=1", "heir=1", "-uid"]);
    // What is asked for again is sent again.
    peer.send(subscribe(&["net/10.0.0.9"])).unwrap();
    assert_eq!(peer.take(), ["new=1"]);
}

#[test]
fn asking_for_a_service_brings_its_endpoints_first() {
    let mut peer = Peer::new();
    peer.catalog.update(WORKLOAD_TYPE, [member("w2", "ns/svc"), member("w1", "ns/svc"), member("w3", "ns/x")], NOTHING);
    peer.set(&[thing("ns/svc", &["net/vip"], "1")]);
    peer.send(on_demand(&["net/vip"])).unwrap();
    assert_eq!(peer.take(), ["w1=1", "w2=1", "ns/svc=1"]);
    // One joins, one leaves: it is told that it left.
    peer.catalog.update(WORKLOAD_TYPE, [member("w3", "ns/svc")], NOTHING);
    assert_eq!(peer.take(), ["w3=1"]);
    peer.set(&[thing("w1", &[], "2")]);
    assert_eq!(peer.take(), ["w1=2"]);
    peer.remove(&["w2"]);
    assert_eq!(peer.take(), ["-w2"]);
}

#[test]
fn a_service_that_comes_later_brings_endpoints_that_were_there() {
    let mut peer = Peer::new();
    peer.catalog.update(WORKLOAD_TYPE, [member("w1", "ns/svc")], NOTHING);
    peer.send(on_demand(&["net/vip"])).unwrap();
    assert_eq!(peer.take(), ["-net/vip"]);
    peer.set(&[thing("ns/svc", &["net/vip"], "1")]);
    assert_eq!(peer.take(), ["w1=1", "ns/svc=1"]);
}

#[test]
fn an_on_demand_client_that_comes_back_gets_the_difference() {
    let mut peer = Peer::new();
    peer.set(&[thing("a", &["x"], "2"), thing("b", &["y"], "1"), thing("left", &[], "2"), thing("new", &["z"], "1")]);
    let versions = [("a", "v-1"), ("b", "v-1"), ("left", "v-1"), ("gone", "v-1")];
    peer.send(having(on_demand(&["x", "y", "z", "q"]), &versions)).unwrap();
    let mut said = peer.take();
    said.sort_unstable();
    assert_eq!(said, ["-gone", "-q", "a=2", "left=2", "new=1"]);
    peer.set(&[thing("left", &[], "3")]);
    assert_eq!(peer.take(), ["left=3"]);
}

#[test]
fn a_wildcard_can_be_taken_up_later_and_left() {
    let mut peer = Peer::new();
    peer.set(&[thing("a", &[], "1"), thing("b", &[], "1")]);
    peer.send(on_demand(&["a"])).unwrap();
    assert_eq!(peer.take(), ["a=1"]);
    // Unseen when the wildcard begins.
    peer.remove(&["a"]);
    peer.send(subscribe(&["*"])).unwrap();
    assert_eq!(peer.take(), ["b=1", "-a"]);
    let mut leave = subscribe(&["b"]);
    leave.resource_names_unsubscribe.push("*".into());
    peer.send(leave).unwrap();
    assert_eq!(peer.take(), ["b=1", "-a"], "what is asked for by name");
    peer.set(&[thing("c", &[], "1")]);
    assert_eq!(peer.next(), None);
}

#[test]
fn a_nack_is_remembered_and_its_resource_not_sent_again_until_it_changes() {
    let mut peer = Peer::new();
    peer.set(&[thing("a", &[], "1"), thing("b", &[], "1")]);
    peer.send(subscribe(&[])).unwrap();
    let (nonce, _) = peer.next().unwrap();
    peer.send(nack(&nonce, "a: no good\nz: never sent")).unwrap();
    let expected = Nack { resource: "a".into(), reason: "no good".into(), at: NOW };
    assert_eq!(peer.machine.status()[0].nacks, [expected]);
    assert_eq!(peer.machine.status()[0].acked, 0);
    assert_eq!(peer.next(), None);
    peer.set(&[thing("b", &[], "2")]);
    assert_eq!(peer.take(), ["b=2"]);
    assert_eq!(peer.machine.status()[0].nacks.len(), 1, "still refused");
    peer.set(&[thing("a", &[], "2")]);
    assert_eq!(peer.take(), ["a=2"]);
    assert!(peer.machine.status()[0].nacks.is_empty());
    assert_eq!(peer.machine.status()[0].acked, 4);
}

#[test]
fn a_nack_in_other_words_is_remembered_whole() {
    let mut peer = Peer::new();
    peer.set(&[thing("a", &[], "1")]);
    peer.send(subscribe(&[])).unwrap();
    let (nonce, _) = peer.next().unwrap();
    peer.send(nack(&nonce, &"something is wrong ".repeat(1000))).unwrap();
    let nacks = &peer.machine.status()[0].nacks;
    assert_eq!(nacks[0].resource, "");
    assert_eq!(nacks[0].reason.len(), MAX_REASON);
    // It names nothing that could be sent again, so it is over with the next response that is accepted.
    peer.set(&[thing("b", &[], "1")]);
    assert!(!peer.take().is_empty());
    assert!(peer.machine.status()[0].nacks.is_empty());
}

#[test]
fn policies_go_before_the_workloads_that_they_apply_to() {
    let mut peer = Peer::with(Limits { max_response: 1, max_first_response: 1, ..Limits::default() });
    peer.set(&[thing("workload", &[], "1")]);
    peer.catalog.update(AUTHORIZATION_TYPE, [thing("p1", &[], "1"), thing("p2", &[], "1")], NOTHING);
    // Asked for in the other order.
    peer.send(subscribe(&[])).unwrap();
    peer.send(DeltaDiscoveryRequest { type_url: AUTHORIZATION_TYPE.into(), ..subscribe(&[]) }).unwrap();
    let (nonce, said) = peer.next().unwrap();
    assert_eq!(said, ["p1=1"]);
    assert_eq!(peer.next(), None, "workloads wait for the rest of the policies");
    peer.send(DeltaDiscoveryRequest { type_url: AUTHORIZATION_TYPE.into(), ..ack(&nonce) }).unwrap();
    assert_eq!(peer.next().unwrap().1, ["p2=1"]);
    assert_eq!(peer.take(), ["workload=1"], "all policies are on their way");
}

pub(super) fn referring(name: &str, body: &str) -> Entry {
    Entry { refers: true, ..thing(name, &[], body).into() }
}

#[test]
fn nothing_goes_before_what_it_refers_to_and_what_is_gone_goes_last() {
    let mut peer = Peer::with(Limits { max_response: 1, ..Limits::default() });
    peer.set(&[thing("old", &["vip"], "1"), thing("other", &[], "1")]);
    peer.send(subscribe(&[])).unwrap();
    assert_eq!(peer.take(), ["old=1", "other=1"]);
    let both = [referring("a", "1"), thing("new", &["vip"], "1").into()];
    peer.catalog.update(WORKLOAD_TYPE, both, ["old"]);
    assert_eq!(peer.take(), ["new=1"]);
    // It changes again, and so does what is referred to, before the others are told.
    peer.set(&[thing("new", &["vip"], "2"), thing("b", &[], "1")]);
    peer.remove(&["other"]);
    assert_eq!(peer.take(), ["new=2"]);
    assert_eq!(peer.take(), ["b=1"]);
    assert_eq!(peer.take(), ["a=1"]);
    assert_eq!(peer.take(), ["-old"]);
    assert_eq!(peer.take(), ["-other"]);
    assert_eq!(peer.next(), None);
    assert_eq!(peer.machine.status()[0].acked, peer.catalog.snapshot().version(WORKLOAD_TYPE));
    // It refers to nothing any more, and is told of like the others.
    peer.catalog.update(WORKLOAD_TYPE, [Entry::from(thing("a", &[], "2")), referring("b", "2")], ["new"]);
    assert_eq!([peer.take(), peer.take(), peer.take()], [["a=2"], ["b=2"], ["-new"]]);
}

#[test]
fn on_demand_too_what_is_gone_goes_last() {
    let mut peer = Peer::with(Limits { max_response: 1, ..Limits::default() });
    peer.set(&[thing("old", &["vip"], "1")]);
    peer.send(on_demand(&["vip"])).unwrap();
    assert_eq!(peer.take(), ["old=1"]);
    peer.remove(&["old"]);
    peer.set(&[thing("new", &["vip"], "1")]);
    assert_eq!([peer.take(), peer.take()], [["new=1"], ["-old"]]);
    // It is gone when it is the turn of its name, and back when it is that of the removals.
    peer.set(&[thing("new", &["vip"], "2")]);
    let (nonce, _) = peer.next().unwrap();
    peer.remove(&["new"]);
    assert_eq!(peer.next(), None);
    peer.set(&[thing("newer", &["vip"], "1")]);
    peer.send(ack(&nonce)).unwrap();
    assert_eq!(peer.take(), ["newer=1"]);
    peer.set(&[thing("new", &["vip"], "3")]);
    assert_eq!(peer.take(), ["new=3"]);
    let (nonce, said) = peer.next().unwrap();
    assert_eq!(said, [""; 0], "it was announced that more follows");
    peer.send(ack(&nonce)).unwrap();
    assert_eq!(peer.next(), None);
}

#[test]
fn a_client_that_never_comes_to_an_end_must_come_back() {
    let mut peer = Peer::with(Limits { max_response: 1, max_uneven: 8, ..Limits::default() });
    peer.set(&[thing("a", &[], "1"), thing("b", &[], "1")]);
    peer.send(subscribe(&[])).unwrap();
    peer.take();
    peer.remove(&["b"]);
    for n in 0..8 {
        peer.set(&[thing("a", &[], &format!("{n}")), thing("c", &[], &format!("{n}"))]);
        peer.take();
    }
    peer.set(&[thing("a", &[], "x"), thing("c", &[], "x")]);
    assert_eq!(peer.machine.respond(&peer.catalog.snapshot()).unwrap_err(), Violation::TooFarBehind);
}

#[test]
fn a_client_that_is_far_behind_is_told_each_name_once() {
    let mut peer = Peer::new();
    peer.set(&[thing("a", &[], "1")]);
    peer.send(subscribe(&[])).unwrap();
    let (nonce, _) = peer.next().unwrap();
    for n in 0..1_000 {
        peer.set(&[thing("a", &[], &n.to_string()), thing("b", &[], &n.to_string())]);
        peer.remove(&["b"]);
    }
    peer.send(ack(&nonce)).unwrap();
    assert_eq!(peer.take(), ["a=999", "-b"]);
    assert_eq!(peer.next(), None);
}

#[test]
fn a_client_that_missed_a_removal_which_is_forgotten_must_come_back() {
    let mut peer = Peer::new();
    peer.set(&[thing("a", &[], "1")]);
    peer.send(subscribe(&[])).unwrap();
    let (nonce, _) = peer.next().unwrap();
    for n in 0..20 {
        peer.set(&[thing(&n.to_string(), &[], "1")]);
        peer.remove(&[&n.to_string()]);
    }
    peer.send(ack(&nonce)).unwrap();
    assert_eq!(peer.machine.respond(&peer.catalog.snapshot()).unwrap_err(), Violation::TooFarBehind);
}

/// Whether two responses have the same bytes in memory, beside their own heads.
fn shares(a: &Response, b: &Response) -> bool {
    let pieces = |response: &Response| match &response.content {
        Content::Part(part) => vec![part.bytes().as_ptr()],
        Content::Whole(whole, range, _) => {
            whole.segments(range.clone()).iter().map(|segment| segment.bytes().as_ptr()).collect()
        }
    };
    pieces(a) == pieces(b)
}

#[test]
fn clients_that_are_equally_far_share_what_they_are_sent() {
    let catalog = Catalog::new();
    let all: Vec<Resource> = (0..5_000).map(|n| thing(&format!("thing-{n}"), &[], "1")).collect();
    catalog.update(WORKLOAD_TYPE, all, NOTHING);
    let mut machines = [(); 3].map(|()| Machine::new(Arc::default()));
    let mut respond = |catalog: &Snapshot| {
        machines.each_mut().map(|machine| {
            machine.request(catalog, subscribe(&[]), NOW).unwrap();
            let response = machine.respond(catalog).unwrap().unwrap();
            machine.request(catalog, ack(&response.nonce), NOW).unwrap();
            response
        })
    };
    let [a, b, c] = respond(&catalog.snapshot());
    assert!(shares(&a, &b) && shares(&a, &c));
    assert_eq!((a.resources, a.to_message().resources.len()), (5_000, 5_000));
    catalog.update(WORKLOAD_TYPE, [thing("thing-7", &[], "2")], NOTHING);
    let [a, b, c] = respond(&catalog.snapshot());
    assert!(shares(&a, &b) && shares(&a, &c));
    assert_eq!(a.resources, 1);
}

#[test]
fn a_later_whole_state_is_exact_and_shares_what_did_not_change() {
    let catalog = Catalog::new();
    let all: Vec<Resource> = (0..20_000).map(|n| thing(&format!("thing-{n:05}"), &["x"], "1")).collect();
    catalog.update(WORKLOAD_TYPE, all, NOTHING);
    let first = |catalog: &Snapshot| {
        let mut machine = Machine::new(Arc::default());
        machine.request(catalog, subscribe(&[]), NOW).unwrap();
        machine.respond(catalog).unwrap().unwrap()
    };
    let before = first(&catalog.snapshot());
    // One changes, one goes, and one comes at either end and in the middle.
    let new = ["a", "thing-01000-5", "z"].map(|name| thing(name, &[], "1"));
    catalog.update(WORKLOAD_TYPE, [thing("thing-02000", &[], "2")].into_iter().chain(new), ["thing-00000"]);
    let snapshot = catalog.snapshot();
    let after = first(&snapshot);
    let said: Vec<(String, Vec<u8>)> =
        after.to_message().resources.into_iter().map(|r| (r.name, r.resource.unwrap().value)).collect();
    let expected: Vec<(String, Vec<u8>)> =
        snapshot.resources(WORKLOAD_TYPE).map(|r| (r.name.to_string(), r.body.to_vec())).collect();
    assert_eq!(said, expected);
    let segments = |response: &Response| match &response.content {
        Content::Whole(whole, range, _) => whole.segments(range.clone()).iter().map(|s| s.bytes().as_ptr()).collect(),
        Content::Part(_) => Vec::new(),
    };
    let (old, new) = (segments(&before), segments(&after));
    let shared = new.iter().filter(|segment| old.contains(segment)).count();
    assert!(new.len() > 10 && shared + 4 >= new.len(), "{shared} of {}", new.len());
}

#[test]
fn limits_hold() {
    let limits = Limits { max_types: 1, max_names: 2, max_known: 1, ..Limits::default() };
    let mut peer = Peer::with(limits);
    peer.send(on_demand(&["a", "b"])).unwrap();
    assert_eq!(peer.send(subscribe(&["c"])), Err(Violation::TooManyNames));
    assert_eq!(peer.send(subscribe(&[""])), Err(Violation::InvalidName));
    assert_eq!(peer.send(subscribe(&[&"x".repeat(MAX_NAME + 1)])), Err(Violation::InvalidName));
    let other = DeltaDiscoveryRequest { type_url: "other".into(), ..subscribe(&[]) };
    assert_eq!(peer.send(other), Err(Violation::TooManyTypes));
    let known = having(subscribe(&[]), &[("a", "1"), ("b", "1")]);
    assert_eq!(peer.send(known), Err(Violation::TooManyVersions));
    let node = Node { id: "x".repeat(MAX_NAME + 1), ..Node::default() };
    let long = DeltaDiscoveryRequest { node: Some(node), ..subscribe(&[]) };
    assert_eq!(peer.send(long), Err(Violation::InvalidName));
}
