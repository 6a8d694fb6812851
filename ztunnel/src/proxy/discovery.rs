//! The way to the control plane: who this proxy says it is, and its state as metrics.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_identity::{Connector, FileToken, TokenSource};
use mesh_proto::core::Node;
use mesh_xds::client::{Connect, ConnectError, Connection, Driver, Handle, Mode, Options, Status};
use mesh_xds::{AUTHORIZATION_TYPE, WORKLOAD_TYPE};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tokio::time::timeout;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

use super::config::{Config, Scope};
use super::lookup::Lookup;

/// A client for what the configuration says, not connected yet.
pub fn client(config: &Config) -> (Driver, Handle) {
    let workloads = match config.discovery {
        Scope::All => Mode::Wildcard,
        Scope::OnDemand => Mode::OnDemand,
    };
    // Policies first, and always all of them: a workload that names one that has not come yet is closed to everybody.
    let types = [(AUTHORIZATION_TYPE, Mode::Wildcard), (WORKLOAD_TYPE, workloads)];
    let types = types.map(|(type_url, mode)| (Arc::from(type_url), mode));
    Driver::new(node(config), types, Options::default())
}

/// What asks for what the client is not told by itself.
pub fn lookup(config: &Config, discovery: &Handle) -> Lookup {
    match config.discovery {
        Scope::All => Lookup::unneeded(),
        Scope::OnDemand => Lookup::on_demand(discovery.demand().clone()),
    }
}

/// Who this proxy says it is.
fn node(config: &Config) -> Node {
    let (name, namespace, ip) = (config.own_pod_name(), &config.pod_namespace, config.instance_ip);
    let text = |value: &str| Value { kind: Some(Kind::StringValue(value.to_owned())) };
    let metadata = [
        ("NAME", text(&name)),
        ("NAMESPACE", text(namespace)),
        ("INSTANCE_IPS", text(&ip.to_string())),
        ("NODE_NAME", text(&config.node)),
        ("CLUSTER_ID", text(&config.cluster_id)),
    ];
    let fields: BTreeMap<String, Value> = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Node {
        id: format!("ztunnel~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(Struct { fields }),
        ..Node::default()
    }
}

/// Makes connections to the control plane, with the token and the roots that the files hold at that time.
pub struct ControlPlane {
    /// The channel, and the roots that it trusts.
    pub connector: Connector,
    /// The bearer token.
    pub token: FileToken,
    /// Sent as `clusterid`.
    pub cluster_id: String,
}

impl Connect for ControlPlane {
    async fn connect(&mut self) -> Result<Connection, ConnectError> {
        let token = self.token.token().await.map_err(ConnectError::new)?;
        let channel = self.connector.channel().await.map_err(ConnectError::new)?;
        let mut metadata = MetadataMap::new();
        let mut bearer: MetadataValue<Ascii> = token.header().parse().map_err(ConnectError::new)?;
        bearer.set_sensitive(true);
        metadata.insert("authorization", bearer);
        metadata.insert("clusterid", self.cluster_id.parse().map_err(ConnectError::new)?);
        Ok(Connection { channel, metadata })
    }
}

/// Bytes of discovery after which it is worth giving back what they needed for a moment.
const LARGE: u64 = 256 << 10;

/// Time without an answer of discovery after which nothing of the last one is needed any more.
const REST: Duration = Duration::from_millis(250);

/// Gives memory back when the first answers have come, and whenever many things have come or gone, and no more is coming. The
/// allocator would keep it: it was taken between things that stay.
pub async fn return_memory(discovery: Handle) {
    let mut status = discovery.status();
    let received = |status: &Status| status.types.values().map(|one| one.bytes).sum::<u64>();
    let mut handled = None;
    discovery.synced().await;
    loop {
        // Each of them marks what it has seen.
        while timeout(REST, status.changed()).await.is_ok_and(|changed| changed.is_ok()) {}
        let now = received(&status.borrow_and_update());
        if handled.is_none_or(|handled| now.saturating_sub(handled) >= LARGE) {
            mesh_runtime::memory::rest();
            handled = Some(now);
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}

/// Discovery's state, read at each scrape.
pub struct DiscoveryMetrics(pub Handle);

impl fmt::Debug for DiscoveryMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DiscoveryMetrics")
    }
}

impl Collector for DiscoveryMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let status = self.0.status().borrow().clone();
        let away = status.disconnected_since.map(|lost| SystemTime::now().duration_since(lost).unwrap_or_default());
        let connected = ("culvert_xds_connected", "Whether there is a discovery stream (1) or not (0)");
        gauge(&mut encoder, connected, i64::from(away.is_none()))?;
        let away = i64::try_from(away.unwrap_or_default().as_secs()).unwrap_or(i64::MAX);
        let lost = ("culvert_xds_disconnected_seconds", "Time without a discovery stream; 0 while there is one");
        gauge(&mut encoder, lost, away)?;
        let terminations = status.terminations.iter().map(|(reason, count)| (*reason, *count));
        counters(
            &mut encoder,
            ("istio_xds_connection_terminations", "Discovery streams that ended", "reason"),
            terminations,
        )?;
        let messages = status.types.iter().map(|(type_url, status)| (type_url.as_ref(), status.responses));
        counters(&mut encoder, ("istio_xds_message", "Discovery responses received", "url"), messages)?;
        let bytes = status.types.iter().map(|(type_url, status)| (type_url.as_ref(), status.bytes));
        counters(&mut encoder, ("istio_xds_message_bytes", "Bytes of discovery responses received", "url"), bytes)?;
        let refused = status.types.iter().map(|(type_url, status)| (type_url.as_ref(), status.nacks));
        counters(&mut encoder, ("culvert_xds_rejected", "Discovery resources refused", "url"), refused)
    }
}

/// Writes a gauge without labels.
fn gauge(encoder: &mut DescriptorEncoder<'_>, (name, help): (&str, &str), value: i64) -> fmt::Result {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

/// Writes one counter per value of a label.
fn counters<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, label): (&str, &str, &'static str),
    values: impl Iterator<Item = (&'a str, u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (value, count) in values {
        let labels = [(label, value)];
        ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_there_is_no_control_plane_is_a_number() {
        let types = [(Arc::from(WORKLOAD_TYPE), Mode::Wildcard)];
        let (_driver, handle) = Driver::new(Node::default(), types, Options::default());
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(DiscoveryMetrics(handle)));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("# TYPE culvert_xds_connected gauge\nculvert_xds_connected 0\n"), "{text}");
        assert!(text.contains("\nculvert_xds_disconnected_seconds "), "{text}");
    }
}
