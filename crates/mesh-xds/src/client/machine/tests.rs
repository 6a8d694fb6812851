//! The client's side of the protocol, message by message.

use mesh_proto::discovery::Resource as WireResource;
use prost_types::Any;

use super::*;
use crate::{Update, WORKLOAD_TYPE};

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

/// Keeps updates, refuses bodies that begin with "bad".
#[derive(Default)]
struct Store(Vec<Update>);

impl Sink for Store {
    fn apply(&mut self, update: Update) -> Vec<Rejection> {
        let bad = update.set.iter().filter(|resource| resource.body.starts_with(b"bad"));
        let rejections =
            bad.map(|resource| Rejection { name: resource.name.to_string(), reason: "it is\nbad".into() }).collect();
        self.0.push(update);
        rejections
    }
}

fn machine(mode: Mode) -> Machine {
    let node = Node { id: "node".into(), ..Node::default() };
    Machine::new(node, [(WORKLOAD_TYPE.into(), mode)], 2)
}

fn resource(name: &str, aliases: &[&str], version: &str, body: &str) -> WireResource {
    WireResource {
        name: name.into(),
        aliases: aliases.iter().map(ToString::to_string).collect(),
        version: version.into(),
        resource: Some(Any { type_url: WORKLOAD_TYPE.into(), value: body.into() }),
    }
}

fn response(nonce: &str, resources: Vec<WireResource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: WORKLOAD_TYPE.into(),
        nonce: nonce.into(),
        resources,
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        system_version_info: String::new(),
    }
}

fn requests(machine: &mut Machine) -> Vec<DeltaDiscoveryRequest> {
    std::iter::from_fn(|| machine.request()).collect()
}

fn initial(request: &DeltaDiscoveryRequest) -> Vec<(&str, &str)> {
    let mut versions: Vec<_> =
        request.initial_resource_versions.iter().map(|(name, version)| (name.as_str(), version.as_str())).collect();
    versions.sort_unstable();
    versions
}

#[test]
fn a_wildcard_asks_for_nothing_by_name() {
    let mut machine = machine(Mode::Wildcard);
    assert!(machine.request().is_none(), "not connected");
    machine.connected();
    let first = requests(&mut machine);
    assert_eq!(first.len(), 1);
    assert_eq!(first[0].node.as_ref().unwrap().id, "node");
    assert!(first[0].resource_names_subscribe.is_empty() && first[0].resource_names_unsubscribe.is_empty());
    assert!(first[0].response_nonce.is_empty() && first[0].initial_resource_versions.is_empty());
}

#[test]
fn a_response_is_applied_and_acknowledged() {
    let (mut machine, mut store) = (machine(Mode::Wildcard), Store::default());
    machine.connected();
    requests(&mut machine);
    assert!(!machine.is_synced());
    machine.received(response("1", vec![resource("a", &["x"], "v", "body")], &["z"]), NOW, &mut store);
    assert!(machine.is_synced());
    assert_eq!(store.0[0].set[0].body, "body");
    assert_eq!(store.0[0].removed, ["z"]);
    let ack = requests(&mut machine);
    assert_eq!((ack.len(), &*ack[0].response_nonce, &ack[0].error_detail), (1, "1", &None));
    assert!(ack[0].node.is_none());
}

#[test]
fn a_first_answer_in_parts_is_complete_with_the_last() {
    let (mut machine, mut store) = (machine(Mode::Wildcard), Store::default());
    machine.connected();
    let part =
        DeltaDiscoveryResponse { system_version_info: format!("7{}", crate::MORE), ..response("1", vec![], &[]) };
    machine.received(part, NOW, &mut store);
    assert!(!machine.is_synced());
    machine.received(response("2", vec![], &[]), NOW, &mut store);
    assert!(machine.is_synced());
}

#[test]
fn a_nack_names_what_was_refused_and_keeps_the_rest() {
    let (mut machine, mut store) = (machine(Mode::Wildcard), Store::default());
    machine.connected();
    requests(&mut machine);
    machine.received(response("1", vec![resource("a", &[], "1", "good")], &[]), NOW, &mut store);
    let mut empty = resource("empty", &[], "1", "");
    empty.resource = None;
    let mut foreign = resource("foreign", &[], "1", "");
    foreign.resource.as_mut().unwrap().type_url = "other".into();
    let resources = vec![resource("a", &[], "2", "bad"), resource("b", &[], "2", "good"), empty, foreign];
    let received = machine.received(response("2", resources, &[]), NOW, &mut store);
    assert_eq!(received.rejections.len(), 3);
    let nack = requests(&mut machine).pop().unwrap();
    let error = nack.error_detail.unwrap();
    assert_eq!((&*nack.response_nonce, error.code), ("2", INVALID_ARGUMENT));
    assert!(error.message.contains("a: it is bad") && error.message.contains("empty: "), "{}", error.message);
    assert!(error.message.contains("foreign: ") && !error.message.contains("b: "), "{}", error.message);
    let (_, status) = machine.status().next().unwrap();
    assert_eq!(status.rejected.keys().collect::<Vec<_>>(), ["a", "empty", "foreign"]);
    assert_eq!((status.nacks, status.resources), (3, 2));

    // What was refused is named without a version, so that it or its removal is told again.
    machine.disconnected();
    machine.connected();
    assert_eq!(initial(&requests(&mut machine)[0]), [("a", ""), ("b", "2"), ("empty", ""), ("foreign", "")]);
    machine.received(response("1", vec![resource("a", &[], "3", "good")], &["empty", "foreign"]), NOW, &mut store);
    assert!(machine.status().next().unwrap().1.rejected.is_empty());
    machine.disconnected();
    machine.connected();
    assert_eq!(initial(&requests(&mut machine)[0]), [("a", "3"), ("b", "2")]);
}

#[test]
fn a_long_nack_is_cut() {
    let rejections: Vec<Rejection> =
        (0..1000).map(|n| Rejection { name: format!("name-{n}"), reason: "x".repeat(100) }).collect();
    let text = nack_text(&rejections);
    assert!(text.len() < MAX_NACK + 100 && text.ends_with(" more"), "{}", text.len());
}

#[test]
fn a_reconnect_names_what_is_known_even_without_a_version() {
    let (mut machine, mut store) = (machine(Mode::Wildcard), Store::default());
    machine.connected();
    let resources = vec![resource("a", &[], "", "1"), resource("b", &[], "2", "1"), resource("c", &[], "3", "1")];
    machine.received(response("1", resources, &[]), NOW, &mut store);
    machine.received(response("2", vec![], &["c"]), NOW, &mut store);
    machine.disconnected();
    assert!(machine.request().is_none(), "an ACK of a stream that is gone is not sent");
    machine.connected();
    let first = requests(&mut machine);
    assert_eq!(first.len(), 1);
    assert!(first[0].node.is_some());
    assert_eq!(initial(&first[0]), [("a", ""), ("b", "2")]);
}

#[test]
fn duplicates_and_contradictions_are_settled_before_the_sink() {
    let (mut machine, mut store) = (machine(Mode::Wildcard), Store::default());
    machine.connected();
    let resources = vec![resource("a", &[], "1", "old"), resource("b", &[], "1", "b"), resource("a", &[], "2", "new")];
    machine.received(response("1", resources, &["a", "c", "c"]), NOW, &mut store);
    let update = &store.0[0];
    assert_eq!(update.set.len(), 2);
    assert_eq!(update.set[0].body, "new");
    assert_eq!(update.removed, ["c"]);
}

#[test]
fn a_type_not_asked_for_is_refused() {
    let (mut machine, mut store) = (machine(Mode::Wildcard), Store::default());
    machine.connected();
    requests(&mut machine);
    let other = DeltaDiscoveryResponse { type_url: "other".into(), ..response("9", vec![], &[]) };
    machine.received(other, NOW, &mut store);
    let nack = requests(&mut machine).pop().unwrap();
    assert_eq!((&*nack.type_url, &*nack.response_nonce), ("other", "9"));
    assert!(nack.error_detail.is_some() && store.0.is_empty());
}

#[test]
fn on_demand_is_said_in_the_first_request() {
    let mut machine = machine(Mode::OnDemand);
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "net/10.0.0.1"), Ok(Subscribed::Pending));
    machine.connected();
    let both = requests(&mut machine);
    assert_eq!(both[0].resource_names_subscribe, ["*"]);
    assert_eq!(both[0].resource_names_unsubscribe, ["*"]);
    assert_eq!(both[1].resource_names_subscribe, ["net/10.0.0.1"]);
    assert_eq!(both.len(), 2);
}

#[test]
fn an_alias_resolves_what_was_asked_for() {
    let (mut machine, mut store) = (machine(Mode::OnDemand), Store::default());
    machine.connected();
    requests(&mut machine);
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "net/10.0.0.1"), Ok(Subscribed::Pending));
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "net/10.0.0.1"), Ok(Subscribed::Pending));
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "net/10.0.0.2"), Ok(Subscribed::Pending));
    let asked = requests(&mut machine);
    assert_eq!(asked.len(), 1, "one request for both");
    assert_eq!(asked[0].resource_names_subscribe, ["net/10.0.0.1", "net/10.0.0.2"]);
    assert_eq!(machine.pending(), 2);
    let answer = response("1", vec![resource("uid", &["net/10.0.0.1"], "1", "x")], &["net/10.0.0.2"]);
    let mut resolved = machine.received(answer, NOW, &mut store).resolved;
    resolved.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(resolved, [("net/10.0.0.1".into(), Answer::Present), ("net/10.0.0.2".into(), Answer::Absent)]);
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "net/10.0.0.1"), Ok(Subscribed::Answered(Answer::Present)));
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "net/10.0.0.2"), Ok(Subscribed::Answered(Answer::Absent)));
    assert_eq!(store.0[0].removed, ["net/10.0.0.2"]);

    // Names stay true: the one comes to be, the other goes.
    machine.received(response("2", vec![resource("uid2", &["net/10.0.0.2"], "1", "x")], &["uid"]), NOW, &mut store);
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "net/10.0.0.1"), Ok(Subscribed::Answered(Answer::Absent)));
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "net/10.0.0.2"), Ok(Subscribed::Answered(Answer::Present)));
}

#[test]
fn an_alias_that_several_have_is_present_until_the_last_is_gone() {
    let (mut machine, mut store) = (machine(Mode::OnDemand), Store::default());
    machine.connected();
    machine.subscribe(WORKLOAD_TYPE, "vip").unwrap();
    let both = vec![resource("a", &["vip"], "1", "x"), resource("b", &["vip"], "1", "x")];
    machine.received(response("1", both, &[]), NOW, &mut store);
    machine.received(response("2", vec![], &["a"]), NOW, &mut store);
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "vip"), Ok(Subscribed::Answered(Answer::Present)));
    machine.received(response("3", vec![resource("b", &[], "2", "x")], &[]), NOW, &mut store);
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "vip"), Ok(Subscribed::Answered(Answer::Absent)));
}

#[test]
fn a_refused_answer_is_an_answer() {
    let (mut machine, mut store) = (machine(Mode::OnDemand), Store::default());
    machine.connected();
    machine.subscribe(WORKLOAD_TYPE, "vip").unwrap();
    let received = machine.received(response("1", vec![resource("a", &["vip"], "1", "bad")], &[]), NOW, &mut store);
    assert_eq!(received.resolved, [("vip".into(), Answer::Rejected)]);
}

#[test]
fn absent_names_give_way_to_new_ones() {
    let (mut machine, mut store) = (machine(Mode::OnDemand), Store::default());
    machine.connected();
    requests(&mut machine);
    machine.subscribe(WORKLOAD_TYPE, "a").unwrap();
    machine.subscribe(WORKLOAD_TYPE, "b").unwrap();
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "c"), Err(SubscribeError::TooManyNames));
    machine.received(response("1", vec![resource("a", &[], "1", "x")], &["b"]), NOW, &mut store);
    requests(&mut machine);
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "c"), Ok(Subscribed::Pending));
    let request = requests(&mut machine).pop().unwrap();
    assert_eq!(request.resource_names_subscribe, ["c"]);
    assert_eq!(request.resource_names_unsubscribe, ["b"]);
    machine.received(response("2", vec![resource("c", &[], "1", "x")], &[]), NOW, &mut store);
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "d"), Err(SubscribeError::TooManyNames));
}

#[test]
fn odd_subscriptions_are_refused() {
    let mut machine = machine(Mode::OnDemand);
    assert_eq!(machine.subscribe("other", "a"), Err(SubscribeError::UnknownType));
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, "*"), Err(SubscribeError::InvalidName));
    assert_eq!(machine.subscribe(WORKLOAD_TYPE, ""), Err(SubscribeError::InvalidName));
}
