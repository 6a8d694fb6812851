//! The record of a connection: the access log's fields, and that it is written exactly once, whatever happens.

use std::fmt::Debug;
use std::sync::Mutex;

use mesh_runtime::metrics::Registry;
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::subscriber::with_default;

use super::*;
use crate::proxy::live::CloseReason;
use crate::proxy::local::fixture;

/// Keeps the events of the access log: level, then fields in order.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<Line>>>);

type Line = (tracing::Level, Vec<(String, String)>);

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "access"
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        self.0.lock().unwrap().push((*event.metadata().level(), fields.0));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Fields(Vec<(String, String)>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push((field.name().to_owned(), format!("{value:?}")));
    }
}

impl Log {
    fn lines(&self) -> Vec<Line> {
        self.0.lock().unwrap().clone()
    }
}

fn side(name: &str, ip: &str, port: u16) -> Side {
    let workload = Workload::try_from(&fixture::pod(name, &[ip])).unwrap();
    let identity = Some(workload.spiffe_id().clone());
    Side { addr: (fixture::ip(ip), port).into(), workload: Some(Arc::new(workload)), identity }
}

fn carried(direction: Direction) -> Facts {
    let service = fixture::service("api", "10.96.0.1", &[(80, 8080)]);
    let mut facts = Facts::new(direction, fixture::at("10.0.0.1:4000"), fixture::at("10.0.0.2:15008"));
    facts.src = side("cart", "10.0.0.1", 4000);
    facts.dst = side("api", "10.0.0.2", 15008);
    facts.hbone_addr = Some("10.0.0.2:8080".parse().unwrap());
    facts.service = Some(Arc::new(Service::try_from(&service).unwrap()));
    facts.policy = Some("shop/allow-cart".into());
    facts.mtls = true;
    // Left is the tunnel, right the pod's application.
    facts.counters.left_to_right.store(100, Ordering::Relaxed);
    facts.counters.right_to_left.store(7, Ordering::Relaxed);
    facts
}

fn value<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
}

#[test]
fn the_access_log_has_the_fields_that_pipelines_read() {
    let (log, registry) = (Log::default(), Registry::new());
    let metrics = Metrics::register(&registry);
    with_default(log.clone(), || {
        let record = Record::open(&metrics, &Live::new(1), carried(Direction::Outbound)).unwrap();
        record.finish(Ok(()));
    });
    let lines = log.lines();
    assert_eq!(lines.len(), 1);
    let (level, fields) = &lines[0];
    assert_eq!(*level, tracing::Level::INFO);
    let names: Vec<_> = fields.iter().map(|(name, _)| name.as_str()).filter(|name| *name != "message").collect();
    let expected = "src.addr src.workload src.namespace src.identity src.cluster dst.addr dst.hbone_addr dst.service \
                    dst.workload dst.namespace dst.identity dst.cluster direction bytes_sent bytes_recv duration policy";
    assert_eq!(names, expected.split_whitespace().collect::<Vec<_>>());
    for (name, expected) in [
        ("message", "connection complete"),
        ("src.addr", "10.0.0.1:4000"),
        ("src.workload", "\"cart\""),
        ("src.namespace", "\"shop\""),
        ("src.identity", "\"spiffe://cluster.local/ns/shop/sa/cart\""),
        ("src.cluster", "\"Kubernetes\""),
        ("dst.addr", "10.0.0.2:15008"),
        ("dst.hbone_addr", "10.0.0.2:8080"),
        ("dst.service", "\"api.shop.svc.cluster.local\""),
        ("dst.identity", "\"spiffe://cluster.local/ns/shop/sa/api\""),
        ("direction", "\"outbound\""),
        ("bytes_sent", "7"),
        ("bytes_recv", "100"),
        ("policy", "\"shop/allow-cart\""),
    ] {
        assert_eq!(value(fields, name), Some(expected), "{name}");
    }
}

#[test]
fn metrics_count_what_the_client_got_as_sent_on_both_sides() {
    for (direction, sent, received) in [(Direction::Outbound, 100, 7), (Direction::Inbound, 7, 100)] {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry);
        let record = Record::open(&metrics, &Live::new(1), carried(direction)).unwrap();
        record.facts.publish_bytes();
        record.facts.publish_bytes();
        record.finish(Ok(()));
        let text = registry.encode().unwrap();
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(line("istio_tcp_sent_bytes_total").ends_with(&format!(" {sent}")), "{text}");
        assert!(line("istio_tcp_received_bytes_total").ends_with(&format!(" {received}")), "{text}");
        assert!(line("istio_tcp_connections_opened_total").ends_with(" 1"), "{text}");
        assert!(line("istio_build{").contains("component=\"ztunnel\""), "{text}");
        let labels = line("istio_tcp_connections_closed_total");
        for label in [
            "source_workload=\"unknown\"",
            "source_workload_namespace=\"shop\"",
            "destination_service=\"api.shop.svc.cluster.local\"",
            "destination_service_name=\"api\"",
            "destination_principal=\"spiffe://cluster.local/ns/shop/sa/api\"",
            "request_protocol=\"tcp\"",
            "response_flags=\"-\"",
            "connection_security_policy=\"mutual_tls\"",
        ] {
            assert!(labels.contains(label), "{label} is missing in {labels}");
        }
    }
}

#[test]
fn a_record_that_is_dropped_reports_all_the_same() {
    let (log, registry) = (Log::default(), Registry::new());
    let metrics = Metrics::register(&registry);
    let live = Live::new(1);
    with_default(log.clone(), || {
        drop(Record::open(&metrics, &live, carried(Direction::Inbound)).unwrap());
        let first = Record::open(&metrics, &live, carried(Direction::Inbound)).unwrap();
        assert!(Record::open(&metrics, &live, carried(Direction::Inbound)).is_err());
        first.finish(Err(CloseReason::Drained.into()));
    });
    let lines = log.lines();
    let reasons: Vec<_> = lines.iter().map(|(_, fields)| value(fields, "reason").unwrap()).collect();
    assert_eq!(reasons, ["\"cut_off\"", "\"too_many_connections\"", "\"drained\""]);
    assert!(lines.iter().all(|(level, fields)| *level == tracing::Level::ERROR && value(fields, "error").is_some()));
    assert_eq!(live.count(), 0);
    let text = registry.encode().unwrap();
    let open = text.lines().find(|line| line.starts_with("istio_tcp_sockets_open{")).unwrap();
    assert!(open.ends_with(" 0"), "{open}");
}
