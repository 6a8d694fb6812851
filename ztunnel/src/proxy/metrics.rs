//! The numbers that dashboards read, under the names and labels that they know from Istio's ztunnel, and a few of our own.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::sync::{Arc, PoisonError, RwLock};

use mesh_model::{SpiffeId, Workload};
use mesh_runtime::metrics::Registry;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::record::{Direction, Facts, Side};

/// A label's value; empty or absent ones read `unknown`.
#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
struct Text(Option<Arc<str>>);

impl EncodeLabelValue for Text {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(self.0.as_deref().filter(|text| !text.is_empty()).unwrap_or("unknown"))
    }
}

/// A label's value that is an identity.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Principal(Option<SpiffeId>);

impl EncodeLabelValue for Principal {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(self.0.as_ref().map_or("unknown", SpiffeId::as_str))
    }
}

/// A label's value that is one of a few.
type Word = &'static str;

/// What a connection failed of, as `response_flags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResponseFlags {
    /// `-`: it did not.
    None,
    /// `DENY`: policy, here or at the far side.
    Deny,
    /// `CONNECT`: the destination could not be reached.
    Connect,
    /// `TLS_FAILURE`: the TLS handshake.
    TlsFailure,
    /// `H2_HANDSHAKE_FAILURE`: the HTTP/2 handshake.
    H2HandshakeFailure,
    /// `NETWORK_POLICY`: something drops packets to the HBONE port.
    NetworkPolicy,
    /// `IDENTITY_ERROR`: no certificate.
    IdentityError,
}

impl ResponseFlags {
    /// As dashboards read it.
    pub fn as_str(self) -> Word {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
        }
    }
}

/// The labels of a connection.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Labels {
    reporter: Word,
    source_workload: Text,
    source_canonical_service: Text,
    source_canonical_revision: Text,
    source_workload_namespace: Text,
    source_principal: Principal,
    source_app: Text,
    source_version: Text,
    source_cluster: Text,
    destination_service: Text,
    destination_service_name: Text,
    destination_service_namespace: Text,
    destination_workload: Text,
    destination_canonical_service: Text,
    destination_canonical_revision: Text,
    destination_workload_namespace: Text,
    destination_principal: Principal,
    destination_app: Text,
    destination_version: Text,
    destination_cluster: Text,
    request_protocol: Word,
    response_flags: Word,
    connection_security_policy: Word,
}

impl Labels {
    /// Of a connection that has not failed.
    pub fn of(facts: &Facts) -> Self {
        let (source, destination) = (Party::of(&facts.src), Party::of(facts.destination()));
        let service = facts.asked_service();
        Self {
            reporter: facts.direction.reporter(),
            source_workload: source.workload,
            source_canonical_service: source.canonical_service.clone(),
            source_canonical_revision: source.canonical_revision.clone(),
            source_workload_namespace: source.namespace,
            source_principal: source.principal,
            source_app: source.canonical_service,
            source_version: source.canonical_revision,
            source_cluster: source.cluster,
            destination_service: Text(service.map(|service| Arc::clone(&service.hostname))),
            destination_service_name: Text(service.map(|service| Arc::clone(&service.name))),
            destination_service_namespace: Text(service.map(|service| Arc::clone(&service.namespace))),
            destination_workload: destination.workload,
            destination_canonical_service: destination.canonical_service.clone(),
            destination_canonical_revision: destination.canonical_revision.clone(),
            destination_workload_namespace: destination.namespace,
            destination_principal: destination.principal,
            destination_app: destination.canonical_service,
            destination_version: destination.canonical_revision,
            destination_cluster: destination.cluster,
            request_protocol: "tcp",
            response_flags: ResponseFlags::None.as_str(),
            connection_security_policy: if facts.is_mtls() { "mutual_tls" } else { "unknown" },
        }
    }

    /// The same of a connection that failed.
    #[must_use]
    pub fn failed(mut self, flags: ResponseFlags) -> Self {
        self.response_flags = flags.as_str();
        self
    }
}

/// The labels of one end.
struct Party {
    workload: Text,
    canonical_service: Text,
    canonical_revision: Text,
    namespace: Text,
    principal: Principal,
    cluster: Text,
}

impl Party {
    fn of(side: &Side) -> Self {
        let workload = side.workload.as_deref();
        let of = |field: fn(&Workload) -> &Arc<str>| Text(workload.map(|workload| Arc::clone(field(workload))));
        Self {
            workload: of(|workload| &workload.origin.workload_name),
            canonical_service: of(|workload| &workload.origin.canonical_name),
            canonical_revision: of(|workload| &workload.origin.canonical_revision),
            namespace: of(|workload| &workload.origin.namespace),
            principal: Principal(side.identity.clone()),
            cluster: of(|workload| &workload.location.cluster_id),
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SocketLabels {
    reporter: Word,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FailureLabels {
    reporter: Word,
    reason: Word,
}

/// All metrics of the proxy. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    opened: Family<Labels, Counter>,
    closed: Family<Labels, Counter>,
    failed: Family<Labels, Counter>,
    sent: Family<Labels, Counter>,
    received: Family<Labels, Counter>,
    sockets_open: Family<SocketLabels, Gauge>,
    /// The counters of connections with these labels: hashing all of them takes longer than counting.
    known: Arc<RwLock<HashMap<Labels, Handles>>>,
    failures: Family<FailureLabels, Counter>,
    /// Pods that are served.
    pub pods_active: Gauge,
    /// Pods that the agent announced and that are not served.
    pub pods_pending: Gauge,
    /// Pods that began to be served.
    pub pods_started: Counter,
    /// Pods that ceased to be served.
    pub pods_stopped: Counter,
    /// Sockets in stock, all pods together.
    pub stock_idle: Gauge,
    /// Descriptors that the process has open.
    pub descriptors_open: Gauge,
    /// Descriptors that the process may have open.
    pub descriptors_limit: Gauge,
    /// Bytes that are held for receivers that do not take them.
    pub held: Gauge,
    /// Connections and tunnels that were given up for it.
    pub held_resets: Counter,
}

/// The counters of one connection, looked up once.
#[derive(Clone, Debug)]
pub struct Handles {
    /// Bytes towards the client.
    pub sent: Counter,
    /// Bytes from the client.
    pub received: Counter,
    /// Sockets open now.
    pub open: Gauge,
    opened: Counter,
    closed: Counter,
}

impl Metrics {
    /// Registers all metrics.
    pub fn register(registry: &Registry) -> Self {
        let metrics = Self::default();
        registry.register(|registry| metrics.register_all(registry));
        metrics
    }

    fn register_all(&self, registry: &mut prometheus_client::registry::Registry) {
        let tcp = "istio_tcp_";
        let mut family = |name: &str, help: &str, family: &Family<Labels, Counter>| {
            registry.register(format!("{tcp}{name}"), help, family.clone());
        };
        family("connections_opened", "Connections opened", &self.opened);
        family("connections_closed", "Connections closed", &self.closed);
        family("connections_failed", "Connections that could not be established", &self.failed);
        family("sent_bytes", "Bytes sent to clients as responses", &self.sent);
        family("received_bytes", "Bytes received from clients as requests", &self.received);
        registry.register("istio_tcp_sockets_open", "Connections that are open now", self.sockets_open.clone());
        registry.register(
            "workload_manager_active_proxy_count",
            "Pods that are served by this proxy",
            self.pods_active.clone(),
        );
        registry.register(
            "workload_manager_pending_proxy_count",
            "Pods that the agent announced and that are not served yet",
            self.pods_pending.clone(),
        );
        registry.register(
            "workload_manager_proxies_started",
            "Pods that this proxy began to serve",
            self.pods_started.clone(),
        );
        registry.register(
            "workload_manager_proxies_stopped",
            "Pods that this proxy ceased to serve",
            self.pods_stopped.clone(),
        );
        registry.register("culvert_connection_failures", "Failed connections by cause", self.failures.clone());
        registry.register("culvert_stocked_sockets", "Sockets in stock for all pods", self.stock_idle.clone());
        registry.register("process_open_fds", "Descriptors that are open", self.descriptors_open.clone());
        registry.register("process_max_fds", "Descriptors that may be open", self.descriptors_limit.clone());
        registry.register("culvert_held_bytes", "Memory held for receivers that do not take it", self.held.clone());
        registry.register(
            "culvert_held_resets",
            "Connections and tunnels given up because their pod held too much memory",
            self.held_resets.clone(),
        );
        let labels = [("component".into(), "ztunnel".into()), ("tag".into(), env!("CARGO_PKG_VERSION").into())];
        let build: Gauge = Gauge::default();
        build.set(1);
        registry.sub_registry_with_labels(labels.into_iter()).register("istio_build", "What this program is", build);
    }

    /// Counts a connection as opened.
    pub fn open(&self, direction: Direction, labels: &Labels) -> Handles {
        // Inserting leaves nothing half done.
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner).get(labels).cloned();
        let handles = known.unwrap_or_else(|| {
            let handles = Handles {
                sent: self.sent.get_or_create_owned(labels),
                received: self.received.get_or_create_owned(labels),
                open: self.sockets_open.get_or_create_owned(&SocketLabels { reporter: direction.reporter() }),
                opened: self.opened.get_or_create_owned(labels),
                closed: self.closed.get_or_create_owned(labels),
            };
            self.known.write().unwrap_or_else(PoisonError::into_inner).insert(labels.clone(), handles.clone());
            handles
        });
        handles.opened.inc();
        handles.open.inc();
        handles
    }

    /// Counts a connection as closed; `failed` are its labels if they have changed by a failure.
    pub fn close(&self, failed: Option<&Labels>, handles: &Handles) {
        handles.open.dec();
        match failed {
            Some(labels) => self.closed.get_or_create(labels).inc(),
            None => handles.closed.inc(),
        };
    }

    /// Counts a connection as failed, for `reason`.
    pub fn fail(&self, direction: Direction, labels: &Labels, reason: Word) {
        self.failed.get_or_create(labels).inc();
        self.failures.get_or_create(&FailureLabels { reporter: direction.reporter(), reason }).inc();
    }
}
