//! Names of the cluster's services, as the API server has them at the moment they are asked for
//! (<https://github.com/kubernetes/dns/blob/master/docs/specification.md>, addresses only).

use std::net::IpAddr;

use serde_json::Value;

use super::api::Api;
use crate::Error;
use crate::resolver::Names;

/// The cluster's domain.
pub const DOMAIN: &str = "cluster.local";

/// The services of an API server.
#[derive(Debug)]
pub(super) struct Services(pub Api);

impl Names for Services {
    fn resolve(&self, _client: IpAddr, asked: &str) -> Result<Option<Vec<IpAddr>>, Error> {
        let Some(name) = Name::parse(asked) else { return Ok(None) };
        let Name { namespace, service, host } = name;
        let path = format!("/api/v1/namespaces/{namespace}/services/{service}");
        let Some(object) = self.0.get(&path)? else { return Ok(None) };
        let addresses = cluster_ips(&object);
        if host.is_none() && !addresses.is_empty() {
            return Ok(Some(addresses));
        }
        let path = format!(
            "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices\
             ?labelSelector=kubernetes.io%2Fservice-name%3D{service}"
        );
        let endpoints = ready(&self.0.list(&path)?, host);
        Ok((host.is_none() || !endpoints.is_empty()).then_some(endpoints))
    }
}

#[derive(Debug, PartialEq)]
struct Name<'n> {
    namespace: &'n str,
    service: &'n str,
    host: Option<&'n str>,
}

impl<'n> Name<'n> {
    /// `[<host>.]<service>.<namespace>.svc.cluster.local`
    fn parse(asked: &'n str) -> Option<Self> {
        let labels = asked.strip_suffix(DOMAIN)?.strip_suffix(".svc.")?;
        // What goes into a path is a label of the API server's kind.
        if !labels.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-".contains(&byte)) {
            return None;
        }
        let mut labels = labels.rsplit('.');
        let (namespace, service, host) = (labels.next()?, labels.next()?, labels.next());
        let empty = namespace.is_empty() || service.is_empty() || labels.next().is_some();
        (!empty).then_some(Self { namespace, service, host })
    }
}

fn cluster_ips(service: &Value) -> Vec<IpAddr> {
    let addresses = service["spec"]["clusterIPs"].as_array().into_iter().flatten();
    addresses.filter_map(Value::as_str).filter_map(|text| text.parse().ok()).collect()
}

/// Addresses of the ready endpoints, of those called `host` if there is one.
fn ready(slices: &[Value], host: Option<&str>) -> Vec<IpAddr> {
    let endpoints = slices.iter().filter_map(|slice| slice["endpoints"].as_array()).flatten();
    // No condition means ready (EndpointConditions.ready).
    let wanted = endpoints.filter(|endpoint| endpoint["conditions"]["ready"].as_bool() != Some(false));
    let wanted = wanted.filter(|endpoint| host.is_none_or(|host| endpoint["hostname"] == host));
    let addresses = wanted.filter_map(|endpoint| endpoint["addresses"].as_array()).flatten();
    addresses.filter_map(Value::as_str).filter_map(|text| text.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_of_services_and_of_their_hosts() {
        let found = Name::parse("web.shop.svc.cluster.local");
        assert_eq!(found, Some(Name { namespace: "shop", service: "web", host: None }));
        let found = Name::parse("db-0.db.shop.svc.cluster.local");
        assert_eq!(found, Some(Name { namespace: "shop", service: "db", host: Some("db-0") }));
        for other in
            ["web", "web.shop", "shop.svc.cluster.local", "a.b.c.d.svc.cluster.local", "x/y.z.svc.cluster.local"]
        {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }

    #[test]
    fn endpoints_that_are_not_ready_are_left_out() {
        let slice = json!({"endpoints": [
            {"addresses": ["10.0.0.1"], "hostname": "a"},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": false}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": true}},
        ]});
        let slices = [slice];
        assert_eq!(ready(&slices, None), ["10.0.0.1", "10.0.0.3"].map(|ip| ip.parse::<IpAddr>().expect("an address")));
        assert_eq!(ready(&slices, Some("a")).len(), 1);
        assert_eq!(cluster_ips(&json!({"spec": {"clusterIPs": ["None"]}})), Vec::<IpAddr>::new());
    }
}
