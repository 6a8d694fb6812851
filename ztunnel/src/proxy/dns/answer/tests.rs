use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::A;
use mesh_proto::workload as wire;
use proptest::prelude::*;

use super::*;
use crate::proxy::local::fixture::{id, in_service, ip, local, mesh, network_address, pod, service, with_port_names};

/// `reviews` has an IPv4 address, `many` and `few` are headless with 100 and 10 endpoints, `api.example.com` is of the outside.
fn shop() -> Snapshot {
    let ports = &[(80, 8080)][..];
    let names = &[("http", 80)][..];
    let many = wire::Service { addresses: Vec::new(), ..service("many", "10.96.0.9", ports) };
    let few = wire::Service { addresses: Vec::new(), ..service("few", "10.96.0.9", ports) };
    let endpoints = |name: &str, count, net: u8| -> Vec<_> {
        let endpoint = |i| in_service(pod(&format!("{name}-{i}"), &[&format!("10.0.{net}.{i}")]), name, &[]);
        (1..=count).map(endpoint).collect()
    };
    let pods = [endpoints("many", 100, 1), endpoints("few", 10, 2)].concat();
    let outside = wire::Service {
        hostname: "api.example.com".into(),
        addresses: vec![network_address("240.0.0.1"), network_address("2001:db8:f::1")],
        ..service("api", "240.0.0.1", &[])
    };
    let reviews = with_port_names(service("reviews", "10.96.0.1", ports), names);
    mesh(&pods, &[reviews, with_port_names(many, names), with_port_names(few, names), outside])
}

fn decide_at(snapshot: Option<&Snapshot>, query: &[u8], transport: Transport) -> Decision {
    let (identity, addresses) = (id("shop", "client"), [ip("10.0.0.1")]);
    let client = local("client", &identity, &addresses);
    decide(snapshot, &client, "cluster.local", query, transport, &mut fastrand::Rng::with_seed(3))
}

fn query(name: &str, of_type: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), of_type));
    message
}

fn with_edns(mut message: Message, size: u16, version: u8) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(size).set_version(version).set_dnssec_ok(true);
    message.edns = Some(edns);
    message
}

/// The answer, over UDP.
fn answered(message: &Message) -> (Message, usize, Outcome) {
    answered_over(message, Transport::Udp)
}

fn answered_over(message: &Message, transport: Transport) -> (Message, usize, Outcome) {
    let bytes = message.to_vec().unwrap();
    match decide_at(Some(&shop()), &bytes, transport) {
        Decision::Answer(answer, outcome) => {
            assert!(message::answers(&bytes, &answer));
            (Message::from_vec(&answer).unwrap(), answer.len(), outcome)
        }
        other => panic!("{:?} is not answered: {other:?}", message.queries),
    }
}

fn forwarded(message: &Message) -> bool {
    decide_at(Some(&shop()), &message.to_vec().unwrap(), Transport::Udp) == Decision::Forward
}

#[test]
fn an_address_is_told_with_the_letters_of_the_question() {
    let name = Name::from_ascii("rEviEws.Shop.svc.CLUSTER.local.").unwrap();
    let (answer, _, outcome) = answered(&query(&name.to_ascii(), RecordType::A));
    assert_eq!(outcome, Outcome::Answered);
    assert!(answer.queries[0].name.eq_case(&name) && answer.answers[0].name.eq_case(&name));
    assert_eq!(answer.answers[0].data, RData::A(A([10, 96, 0, 1].into())));
    assert_eq!((answer.answers.len(), answer.answers[0].ttl), (1, TTL));
    let flags = answer.metadata;
    assert!(flags.authoritative && flags.recursion_desired && flags.recursion_available && !flags.authentic_data);
    assert_eq!((flags.id, flags.response_code), (4711, ResponseCode::NoError));
    assert!(answer.edns.is_none(), "not asked for");
}

#[test]
fn the_other_family_has_no_data_rather_than_no_name() {
    let (answer, _, outcome) = answered(&query("reviews.shop.svc.cluster.local.", RecordType::AAAA));
    assert_eq!((outcome, answer.metadata.response_code), (Outcome::NoData, ResponseCode::NoError));
    assert_eq!(answer.answers.len(), 0);
    let [soa] = answer.authorities.as_slice() else { panic!("{answer:?}") };
    assert_eq!(soa.name, Name::from_ascii("cluster.local.").unwrap());
    assert!(matches!(&soa.data, RData::SOA(soa) if soa.minimum == TTL));
    let (answer, _, outcome) = answered(&query("api.example.com.", RecordType::AAAA));
    assert_eq!(outcome, Outcome::Answered);
    assert!(matches!(answer.answers[0].data, RData::AAAA(_)));
}

#[test]
fn a_search_domain_too_much_is_an_alias() {
    let (answer, ..) = answered(&query("api.example.com.shop.svc.cluster.local.", RecordType::A));
    let api = Name::from_ascii("api.example.com.").unwrap();
    assert_eq!(answer.answers[0].data, RData::CNAME(CNAME(api.clone())));
    assert_eq!(answer.answers[1].name, api);
    assert_eq!(answer.answers[1].data, RData::A(A([240, 0, 0, 1].into())));
}

#[test]
fn what_is_not_known_fully_is_forwarded() {
    let known = "reviews.shop.svc.cluster.local.";
    let unknown = ["example.com.", "none.shop.svc.cluster.local.", ".", "local.", "*.shop.svc.cluster.local."];
    for name in unknown {
        assert!(forwarded(&query(name, RecordType::A)), "{name}");
    }
    for of_type in [RecordType::SRV, RecordType::TXT, RecordType::PTR, RecordType::ANY, RecordType::HTTPS] {
        assert!(forwarded(&query(known, of_type)), "{of_type}");
    }
    let mut chaos = query(known, RecordType::A);
    chaos.queries[0].query_class = DNSClass::CH;
    let mut two = query(known, RecordType::A);
    two.queries.push(two.queries[0].clone());
    let mut notify = query(known, RecordType::A);
    notify.metadata.op_code = OpCode::Notify;
    let mut more = query(known, RecordType::A);
    more.additionals.push(Record::from_rdata(Name::root(), 1, RData::A(A([1, 2, 3, 4].into()))));
    for odd in [chaos, two, notify, more, with_edns(query(known, RecordType::A), 1232, 1)] {
        assert!(forwarded(&odd), "{odd:?}");
    }
    let bytes = query(known, RecordType::A).to_vec().unwrap();
    assert_eq!(decide_at(None, &bytes, Transport::Udp), Decision::Forward, "nothing is known yet");
}

#[test]
fn what_is_no_query_is_dropped() {
    let mut answer = query("reviews.", RecordType::A);
    answer.metadata.message_type = MessageType::Response;
    let answer = answer.to_vec().unwrap();
    for bytes in [&[][..], &[0; 11], &answer] {
        assert_eq!(decide_at(Some(&shop()), bytes, Transport::Udp), Decision::Drop);
    }
}

#[test]
fn an_answer_is_as_long_as_the_client_takes() {
    let many = || query("many.shop.svc.cluster.local.", RecordType::A);
    let (cut, length, _) = answered(&many());
    assert!(cut.metadata.truncation && length <= 512 && cut.answers.len() > 20, "{length}: {}", cut.answers.len());
    let (cut, length, _) = answered(&with_edns(many(), 1232, 0));
    assert!(cut.metadata.truncation && (1000..=1232).contains(&length), "{length}");
    let edns = cut.edns.unwrap();
    assert_eq!((edns.max_payload(), edns.flags().dnssec_ok, edns.version()), (OUR_UDP, true, 0));
    let (whole, length, _) = answered(&with_edns(many(), 4096, 0));
    assert!(!whole.metadata.truncation && whole.answers.len() == 100, "{length}");
    let (cut, length, _) = answered(&with_edns(many(), 0, 0));
    assert!(cut.metadata.truncation && length <= 512, "{length}");
    let (whole, ..) = answered_over(&many(), Transport::Tcp);
    assert_eq!((whole.metadata.truncation, whole.answers.len()), (false, 100));
}

#[test]
fn a_named_port_is_told_with_the_addresses_of_its_target() {
    let (answer, _, outcome) = answered(&query("_HTTP._tcp.Reviews.shop.svc.cluster.local.", RecordType::SRV));
    assert_eq!((outcome, answer.metadata.response_code), (Outcome::Answered, ResponseCode::NoError));
    let target = Name::from_ascii("reviews.shop.svc.cluster.local.").unwrap();
    let [record] = answer.answers.as_slice() else { panic!("{answer:?}") };
    assert_eq!(record.name, answer.queries[0].name);
    assert_eq!((record.ttl, &record.data), (TTL, &RData::SRV(SRV::new(0, 100, 80, target.clone()))));
    assert_eq!(answer.additionals, [Record::from_rdata(target, TTL, RData::A(A([10, 96, 0, 1].into())))]);
    // With a search domain too much.
    let (answer, ..) = answered(&query("_http._tcp.reviews.shop.shop.svc.cluster.local.", RecordType::SRV));
    let meant = Name::from_ascii("_http._tcp.reviews.shop.svc.cluster.local.").unwrap();
    assert_eq!(answer.answers[0].data, RData::CNAME(CNAME(meant.clone())));
    assert_eq!((&answer.answers[1].name, answer.answers[1].record_type()), (&meant, RecordType::SRV));
    for name in ["_grpc._tcp.reviews.shop.svc.cluster.local.", "_http._udp.reviews.shop.svc.cluster.local."] {
        assert!(forwarded(&query(name, RecordType::SRV)), "{name}");
    }
    assert!(forwarded(&query("_http._tcp.reviews.shop.svc.cluster.local.", RecordType::TXT)));
}

#[test]
fn additional_addresses_are_left_out_before_an_answer_is_cut() {
    let srv = || query("_http._tcp.many.shop.svc.cluster.local.", RecordType::SRV);
    let counts = |answer: &Message| (answer.metadata.truncation, answer.answers.len(), answer.additionals.len());
    let (whole, length, _) = answered_over(&srv(), Transport::Tcp);
    assert_eq!(counts(&whole), (false, 100, 100));
    let (cut, short, _) = answered(&srv());
    assert!(cut.metadata.truncation && cut.additionals.is_empty() && short <= 512, "{short}");
    let (cut, short, _) = answered(&with_edns(srv(), 4096, 0));
    assert!(cut.metadata.truncation && cut.additionals.is_empty() && cut.edns.is_some(), "{:?}", counts(&cut));
    assert!((2000..=4096).contains(&short) && length > 4096, "{short} of {length}");
    // Too long by its additional records alone.
    let few = || query("_http._tcp.few.shop.svc.cluster.local.", RecordType::SRV);
    let (whole, length, _) = answered(&with_edns(few(), 4096, 0));
    assert_eq!(counts(&whole), (false, 10, 10));
    let (less, shorter, _) = answered(&with_edns(few(), u16::try_from(length).unwrap() - 1, 0));
    assert_eq!(counts(&less), (false, 10, 0));
    assert!(shorter < length, "{shorter} of {length}");
    // One target with its address fits anywhere.
    let (whole, ..) = answered(&with_edns(query("_http._tcp.reviews.", RecordType::SRV), 0, 0));
    assert_eq!((counts(&whole), whole.edns.is_some()), ((false, 1, 1), true));
}

#[test]
fn a_service_with_more_endpoints_than_a_message_holds_is_cut_in_any_transport() {
    let ports = &[(80, 8080)][..];
    // A pod of a StatefulSet is named by its own label: 1000 of them with long names are more than 64 KiB.
    let ask = |count: usize, padding: usize| {
        let host = "h".repeat(padding);
        let name = |i: usize| format!("{}-{i}", "p".repeat(padding));
        let endpoint =
            |i: usize| in_service(pod(&name(i), &[&format!("10.0.{}.{}", i / 250, 1 + i % 250)]), &host, &[]);
        let headless = wire::Service { addresses: Vec::new(), ..service(&host, "10.96.0.9", ports) };
        let snapshot =
            mesh(&(0..count).map(endpoint).collect::<Vec<_>>(), &[with_port_names(headless, &[("http", 80)])]);
        let asked = format!("_http._tcp.{host}.shop.svc.cluster.local.");
        move |transport, edns: Option<u16>| {
            let message = query(&asked, RecordType::SRV);
            let message = edns.map_or(message.clone(), |size| with_edns(message, size, 0)).to_vec().unwrap();
            match decide_at(Some(&snapshot), &message, transport) {
                Decision::Answer(answer, _) => (Message::from_vec(&answer).unwrap(), answer.len()),
                other => panic!("{other:?}"),
            }
        }
    };
    // Over 64 KiB by the answers, and by the additional records alone.
    for (count, padding, is_cut) in [(1000, 50, true), (600, 8, false)] {
        let ask = ask(count, padding);
        for edns in [None, Some(4096)] {
            let (answer, length) = ask(Transport::Tcp, edns);
            assert_eq!(answer.metadata.truncation, is_cut, "{count} {padding}: {length} bytes");
            assert_eq!((answer.answers.len() < count, answer.additionals.is_empty()), (is_cut, true));
            assert_eq!(answer.edns.is_some(), edns.is_some(), "what was asked with options is answered with some");
            // Cut, but not thrown away.
            assert!(length > 30_000, "{length}");
            let (answer, length) = ask(Transport::Udp, edns);
            let limit = usize::from(edns.unwrap_or(512));
            assert!(
                answer.metadata.truncation && length <= limit && answer.edns.is_some() == edns.is_some(),
                "{length}"
            );
            assert!(answer.additionals.is_empty() && !answer.answers.is_empty());
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_decided_on_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = decide_at(Some(&mesh(&[], &[])), &bytes, Transport::Udp);
    }

    /// A good query with some bytes changed: whatever is answered, it is this very question.
    #[test]
    fn an_answer_is_one_to_the_question(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
        let snapshot = mesh(&[], &[service("reviews", "10.96.0.1", &[])]);
        let query = with_edns(query("reviews.shop.svc.cluster.local.", RecordType::A), 1232, 0);
        let mut bytes = query.to_vec().unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Decision::Answer(answer, _) = decide_at(Some(&snapshot), &bytes, Transport::Udp) {
            prop_assert!(message::answers(&bytes, &answer));
            let question = message::question(&bytes).unwrap();
            prop_assert_eq!(&answer[question.clone()], &bytes[question]);
        }
    }
}
