//! The control plane's metrics.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_xds::server::{self, Catalog, ClientStatus, Sent, Snapshot, TypeStatus};
use mesh_xds::{AUTHORIZATION_TYPE, WORKLOAD_TYPE};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use tonic::Code;

use crate::api::Kind;
use crate::ingest::Watches;
use crate::ingest::kubernetes::{KindReport, WatchState};
use crate::status::Leading;

/// The metrics that are counted as things happen. Cheap to clone; clones share the numbers.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    objects: Family<KindLabel, Gauge>,
    refused: Gauge,
    files: Gauge,
    changes: Family<TypeLabel, Counter>,
    pub(super) certificates_issued: Counter,
    certificates_refused: Family<CodeLabel, Counter>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// Discovery type, by its short name. Types that are not ours share one label, so that a client cannot make new ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TypeLabel {
    r#type: &'static str,
}

impl TypeLabel {
    pub(super) fn of(type_url: &str) -> Self {
        let name = match type_url {
            WORKLOAD_TYPE => "address",
            AUTHORIZATION_TYPE => "authorization",
            _ => "other",
        };
        Self { r#type: name }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabel {
    component: &'static str,
    tag: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

impl Metrics {
    /// The metrics, registered; those of the discovery service's present state are read when they are asked for.
    pub fn register(
        registry: &mut Registry,
        catalog: Arc<Catalog>,
        discovery: server::Service,
        watches: Watches,
        leading: Option<Leading>,
    ) -> Self {
        let own = Self::default();
        let build = Family::<BuildLabel, Gauge>::default();
        build.get_or_create(&BuildLabel { component: "culvertd", tag: env!("CARGO_PKG_VERSION") }).set(1);
        registry.register("istio_build", "Component and version", build);
        registry.register("culvert_objects", "Objects in force, by kind", own.objects.clone());
        registry.register(
            "culvert_objects_refused",
            "Objects and files that are not accepted now",
            own.refused.clone(),
        );
        registry.register("culvert_source_files", "Files that the source consists of", own.files.clone());
        registry.register("culvert_xds_changes", "Resources changed, by type", own.changes.clone());
        registry.register("culvert_ca_certificates_issued", "Certificates issued", own.certificates_issued.clone());
        registry.register(
            "culvert_ca_requests_refused",
            "Certificate requests refused, by gRPC code",
            own.certificates_refused.clone(),
        );
        registry.register_collector(Box::new(Present { catalog, discovery }));
        registry.register_collector(Box::new(Following(watches)));
        if let Some(leading) = leading {
            registry.register_collector(Box::new(Elected(leading)));
        }
        own
    }

    /// Notes what the source says.
    pub(super) fn source(&self, counts: impl IntoIterator<Item = (Kind, usize)>, files: usize, refused: usize) {
        for (kind, count) in counts {
            self.objects.get_or_create(&KindLabel { kind: kind.as_str() }).set(gauge(count));
        }
        self.files.set(gauge(files));
        self.refused.set(gauge(refused));
    }

    /// Notes that resources of a type changed.
    pub(super) fn changed(&self, type_url: &str, count: usize) {
        self.changes.get_or_create(&TypeLabel::of(type_url)).inc_by(count as u64);
    }

    pub(super) fn certificate_refused(&self, code: Code) {
        self.certificates_refused.get_or_create(&CodeLabel { code: code_name(code) }).inc();
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// What is read from the discovery service when metrics are asked for.
struct Present {
    catalog: Arc<Catalog>,
    discovery: server::Service,
}

impl Debug for Present {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Present")
    }
}

impl Collector for Present {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let snapshot = self.catalog.snapshot();
        let clients = self.discovery.clients();
        let mut show = |name: &str, help: &str, value: usize| {
            let metric = ConstGauge::new(gauge(value));
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        show("culvert_xds_clients", "Discovery clients connected", clients.len())?;
        let types = || clients.iter().flat_map(|client| &client.types);
        show(
            "culvert_xds_nacked_resources",
            "Resources that some client refuses now",
            types().map(|kind| kind.nacks.len()).sum(),
        )?;
        show(
            "culvert_xds_in_flight",
            "Discovery responses that wait for their ACK",
            types().filter(|kind| kind.in_flight).count(),
        )?;
        let pending: Vec<u64> = clients.iter().map(|client| pending(client, &snapshot)).collect();
        show(
            "culvert_xds_pending_changes",
            "Changes that clients have not been sent yet, those of all clients together",
            usize::try_from(pending.iter().sum::<u64>()).unwrap_or(usize::MAX),
        )?;
        show(
            "culvert_xds_slowest_pending_changes",
            "Changes that the client which is furthest behind has not been sent yet",
            usize::try_from(pending.into_iter().max().unwrap_or_default()).unwrap_or(usize::MAX),
        )?;
        let mut count = |name: &str, help: &str, value: u64| {
            let metric = ConstCounter::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        count("culvert_xds_nacks", "Discovery responses refused by clients", self.discovery.nacks())?;
        count("culvert_xds_clients_refused", "Discovery clients that were not let in", self.discovery.refused())?;
        let sent = self.discovery.sent();
        let mut counters = |name, help, read: fn(&Sent) -> u64| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for type_url in [WORKLOAD_TYPE, AUTHORIZATION_TYPE, ""] {
                let value = sent.get(type_url).map(read).unwrap_or_default();
                ConstCounter::new(value).encode(family.encode_family(&TypeLabel::of(type_url))?)?;
            }
            Ok(())
        };
        counters("culvert_xds_pushes", "Discovery responses sent, by type", |sent| sent.responses)?;
        counters("culvert_xds_pushed_resources", "Resources in discovery responses sent, by type", |sent| {
            sent.resources
        })?;
        let mut encoder =
            encoder.encode_descriptor("culvert_xds_resources", "Resources served, by type", None, MetricType::Gauge)?;
        for type_url in [WORKLOAD_TYPE, AUTHORIZATION_TYPE] {
            let label = TypeLabel::of(type_url);
            ConstGauge::new(gauge(snapshot.len(type_url))).encode(encoder.encode_family(&label)?)?;
        }
        Ok(())
    }
}

/// Changes that a client has not been sent yet. Those that do not concern it count until the server has looked at them.
pub(super) fn pending(client: &ClientStatus, snapshot: &Snapshot) -> u64 {
    let of = |kind: &TypeStatus| snapshot.version(&kind.type_url).saturating_sub(kind.considered);
    client.types.iter().map(of).sum()
}

/// How the watches of the source are doing, read when metrics are asked for.
#[derive(Debug)]
struct Following(Watches);

impl Collector for Following {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let reports = self.0.reports();
        if reports.is_empty() {
            return Ok(());
        }
        let mut gauges = |name, help, read: fn(&KindReport) -> i64| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (kind, report) in &reports {
                let label = KindLabel { kind: kind.as_str() };
                ConstGauge::new(read(report)).encode(family.encode_family(&label)?)?;
            }
            Ok(())
        };
        gauges(
            "culvert_watch_synced",
            "Kinds that were listed completely, or that the cluster does not have",
            |report| i64::from(report.state != WatchState::Pending),
        )?;
        gauges(
            "culvert_watch_last_event_timestamp_seconds",
            "When something was last heard of a kind, in seconds since 1970",
            |report| {
                let since = report.last_event.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
                since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
            },
        )?;
        let mut counters = |name, help, read: fn(&KindReport) -> u64| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (kind, report) in &reports {
                let label = KindLabel { kind: kind.as_str() };
                ConstCounter::new(read(report)).encode(family.encode_family(&label)?)?;
            }
            Ok(())
        };
        counters("culvert_watch_lists", "Lists begun; the second and later ones are restarts", |report| report.lists)?;
        counters("culvert_watch_failures", "Errors of watches, those of the connection included", |report| {
            report.failures
        })
    }
}

/// Whether this replica leads, asked when metrics are.
#[derive(Debug)]
struct Elected(Leading);

impl Collector for Elected {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let help = "Whether this replica leads, and writes into the cluster";
        let metric = ConstGauge::new(i64::from(self.0.leads()));
        metric.encode(encoder.encode_descriptor("culvertd_leader", help, None, metric.metric_type())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_dashboards_read() {
        let catalog = Arc::new(Catalog::new());
        let discovery = server::Service::new(
            catalog.clone(),
            |_, _| async { Err(tonic::Status::unauthenticated("nobody")) },
            server::Options::default(),
        );
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry, catalog, discovery, Watches::default(), None);
        metrics.source([(Kind::Pod, 3)], 2, 1);
        metrics.changed(WORKLOAD_TYPE, 4);
        metrics.certificates_issued.inc();
        metrics.certificate_refused(Code::PermissionDenied);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "culvert_objects{kind=\"Pod\"} 3",
            "culvert_objects_refused 1",
            "culvert_source_files 2",
            "culvert_xds_changes_total{type=\"address\"} 4",
            "culvert_xds_pushes_total{type=\"other\"} 0",
            "culvert_xds_pushed_resources_total{type=\"address\"} 0",
            "culvert_xds_clients_refused_total 0",
            "culvert_xds_clients 0",
            "culvert_xds_pending_changes 0",
            "culvert_xds_slowest_pending_changes 0",
            "culvert_xds_nacks_total 0",
            "culvert_xds_resources{type=\"authorization\"} 0",
            "culvert_ca_certificates_issued_total 1",
            "culvert_ca_requests_refused_total{code=\"PERMISSION_DENIED\"} 1",
            "istio_build{component=\"culvertd\"",
        ] {
            assert!(text.lines().any(|found| found.starts_with(line)), "{line} is not in\n{text}");
        }
    }
}
