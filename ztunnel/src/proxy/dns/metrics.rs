//! The numbers of DNS, under the names that dashboards know from Istio's ztunnel, and one family of our own.

use mesh_runtime::metrics::Registry;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use serde_json::{Value, json};

/// What became of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered with addresses of the mesh.
    Answered,
    /// Answered: the name is known and has nothing of that type.
    NoData,
    /// Answered with what a resolver has said before.
    Cached,
    /// Forwarded to the resolver that was asked.
    Forwarded,
    /// A TCP connection that was handed over as it is.
    HandedOver,
    /// Dropped: the pod asks more than it may.
    RateLimited,
    /// Dropped: too many of the pod's queries wait for resolvers.
    Overloaded,
    /// Dropped: no query, or not of the pod, or not to a resolver.
    Invalid,
    /// Dropped: there is no socket to answer from.
    NoSocket,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Answered,
        Self::NoData,
        Self::Cached,
        Self::Forwarded,
        Self::HandedOver,
        Self::RateLimited,
        Self::Overloaded,
        Self::Invalid,
        Self::NoSocket,
    ];

    /// As the metric names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::NoData => "no_data",
            Self::Cached => "cached",
            Self::Forwarded => "forwarded",
            Self::HandedOver => "handed_over",
            Self::RateLimited => "rate_limited",
            Self::Overloaded => "overloaded",
            Self::Invalid => "invalid",
            Self::NoSocket => "no_socket",
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// All numbers of DNS. Cheap to clone.
#[derive(Clone, Debug)]
pub struct DnsMetrics {
    requests: Counter,
    outcomes: Family<OutcomeLabels, Counter>,
    upstream_requests: Counter,
    upstream_failures: Counter,
    upstream_seconds: Histogram,
}

impl Default for DnsMetrics {
    fn default() -> Self {
        Self {
            requests: Counter::default(),
            outcomes: Family::default(),
            upstream_requests: Counter::default(),
            upstream_failures: Counter::default(),
            // From half a millisecond to eight seconds, which is more than a query waits.
            upstream_seconds: Histogram::new(exponential_buckets(0.0005, 2.0, 15)),
        }
    }
}

impl DnsMetrics {
    /// Registers all of them.
    pub fn register(registry: &Registry) -> Self {
        let metrics = Self::default();
        registry.register(|registry| {
            registry.register("istio_dns_requests", "DNS queries of applications", metrics.requests.clone());
            registry.register(
                "istio_dns_upstream_requests",
                "DNS queries forwarded to resolvers",
                metrics.upstream_requests.clone(),
            );
            registry.register(
                "istio_dns_upstream_failures",
                "DNS queries that resolvers did not answer",
                metrics.upstream_failures.clone(),
            );
            registry.register(
                "istio_dns_upstream_request_duration_seconds",
                "Time that resolvers take to answer",
                metrics.upstream_seconds.clone(),
            );
            registry.register("culvert_dns_requests", "DNS queries by what became of them", metrics.outcomes.clone());
        });
        metrics
    }

    /// Counts a query.
    pub fn count(&self, outcome: Outcome) {
        self.requests.inc();
        self.outcomes.get_or_create(&OutcomeLabels { outcome: outcome.as_str() }).inc();
    }

    /// Counts a query that a resolver was asked, and how long it took; none when it did not answer.
    pub fn upstream(&self, seconds: Option<f64>) {
        self.upstream_requests.inc();
        match seconds {
            Some(seconds) => self.upstream_seconds.observe(seconds),
            None => {
                self.upstream_failures.inc();
            }
        }
    }

    /// The counts, for dumps.
    pub fn json(&self) -> Value {
        let count = |outcome: Outcome| self.outcomes.get_or_create(&OutcomeLabels { outcome: outcome.as_str() }).get();
        let outcomes = Outcome::ALL.map(|outcome| (outcome.as_str().to_owned(), json!(count(outcome))));
        json!({
            "requests": self.requests.get(),
            "outcomes": serde_json::Map::from_iter(outcomes),
            "upstreamRequests": self.upstream_requests.get(),
            "upstreamFailures": self.upstream_failures.get(),
        })
    }
}
