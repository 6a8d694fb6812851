//! The CONNECT that tells the far side what a connection is: target, source workload, client address, trace context.

use std::fmt::Write as _;
use std::net::SocketAddr;

use mesh_hbone::headers::{BAGGAGE, FORWARDED, TRACEPARENT};
use mesh_hbone::{Authority, Connect, Headers};
use mesh_model::Workload;
use mesh_model::workload::WorkloadType;

use super::forwarded;

/// The request for a connection that `client`, an application of `source`, opened to `target`, known as `host`.
pub fn request(target: Authority, source: Option<&Workload>, client: SocketAddr, host: Option<&str>) -> Connect {
    let mut headers = Headers::new();
    let baggage = source.map(baggage).unwrap_or_default();
    let fields = [(BAGGAGE, baggage), (FORWARDED, forwarded::field(client, host)), (TRACEPARENT, traceparent())];
    for (name, value) in fields {
        // All three are optional to the receiver. None can be invalid but through a name that discovery should not have
        // given, and then the connection is worth more than the field.
        if !value.is_empty()
            && let Err(error) = headers.add(name, value)
        {
            tracing::debug!(%error, name, "field left out");
        }
    }
    Connect { authority: target, headers }
}

/// Who opens the connection (W3C baggage). Empty values are left out.
fn baggage(source: &Workload) -> String {
    let kind = match source.origin.workload_type {
        WorkloadType::Deployment => "k8s.deployment.name",
        WorkloadType::CronJob => "k8s.cronjob.name",
        WorkloadType::Pod => "k8s.pod.name",
        WorkloadType::Job => "k8s.job.name",
    };
    let members = [
        ("k8s.cluster.name", &source.location.cluster_id),
        ("k8s.namespace.name", &source.origin.namespace),
        (kind, &source.origin.workload_name),
        ("service.name", &source.origin.canonical_name),
        ("service.version", &source.origin.canonical_revision),
        ("cloud.region", &source.location.locality.region),
        ("cloud.availability_zone", &source.location.locality.zone),
    ];
    let mut baggage = String::with_capacity(256);
    for (key, value) in members {
        // The alphabet of W3C baggage without what would need escaping.
        let plain = value.bytes().all(|byte| byte.is_ascii_graphic() && !b"\",;\\%".contains(&byte));
        if !value.is_empty() && plain {
            let comma = if baggage.is_empty() { "" } else { "," };
            // Writing to a String cannot fail.
            let _ = write!(baggage, "{comma}{key}={value}");
        }
    }
    baggage
}

/// A trace of its own, not sampled (W3C trace context).
fn traceparent() -> String {
    // All zero would be invalid.
    format!("00-{:032x}-{:016x}-00", fastrand::u128(1..), fastrand::u64(1..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_proto::workload as wire;

    fn workload() -> Workload {
        let wire = wire::Workload {
            uid: "Kubernetes//Pod/shop/cart-1".into(),
            namespace: "shop".into(),
            workload_name: "cart".into(),
            canonical_name: "cart".into(),
            canonical_revision: "v2".into(),
            locality: Some(wire::Locality { region: "eu".into(), zone: "a b".into(), subzone: String::new() }),
            ..wire::Workload::default()
        };
        Workload::try_from(&wire).unwrap()
    }

    #[test]
    fn the_far_side_is_told_who_connects() {
        let client: SocketAddr = "10.1.2.3:4567".parse().unwrap();
        let target: Authority = "10.9.9.9:80".parse().unwrap();
        let connect = request(target, Some(&workload()), client, Some("cart.shop.svc.cluster.local"));
        assert_eq!(connect.authority.as_str(), "10.9.9.9:80");
        assert_eq!(
            connect.headers.get(BAGGAGE),
            Some(
                "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,\
                 service.version=v2,cloud.region=eu"
            )
        );
        assert_eq!(connect.headers.get(FORWARDED), Some("for=\"10.1.2.3:4567\";host=cart.shop.svc.cluster.local"));
        let trace: Vec<_> = connect.headers.get(TRACEPARENT).unwrap().split('-').map(str::to_owned).collect();
        assert_eq!(trace.iter().map(String::len).collect::<Vec<_>>(), [2, 32, 16, 2]);
    }

    #[test]
    fn an_unknown_source_is_no_reason_to_fail() {
        let client: SocketAddr = "[2001:db8::1]:4567".parse().unwrap();
        let connect = request("10.9.9.9:80".parse().unwrap(), None, client, None);
        assert_eq!(connect.headers.get(BAGGAGE), None);
        assert_eq!(connect.headers.get(FORWARDED), Some("for=\"[2001:db8::1]:4567\""));
    }
}
