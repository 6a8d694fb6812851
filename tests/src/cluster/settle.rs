//! Waiting until the proxies know what the API server shows: a change travels by way of culvertd, and a test that did
//! not wait would race with it. What a mesh does meanwhile is tested on purpose or not at all.

use std::time::Duration;

use serde_json::Value;

use super::{Mesh, Shared};
use crate::kube::PodRecord;
use crate::{Error, wait};

/// How long a change may take from the folder to every proxy.
const TRAVEL: Duration = Duration::from_secs(20);

impl Shared {
    /// Waits until every running proxy knows the pod as it is: its address, whether it is captured, whether it is
    /// ready. Nothing is waited for while culvertd is down, nor for a proxy that is.
    pub fn wait_known(&self, pod: &PodRecord) -> Result<(), Error> {
        if self.mesh != Mesh::Culvert || self.control.get().is_none_or(|c| c.component.pid().is_none()) {
            return Ok(());
        }
        for node in &self.nodes {
            if node.proxy()?.pid().is_none() {
                continue;
            }
            let mut last = Value::Null;
            let known = wait::until("known", TRAVEL, || {
                last = seen(&node.config_dump().ok()?, pod).cloned().unwrap_or(Value::Null);
                as_it_is(&last, pod).then_some(())
            });
            known.map_err(|_late| Error::Timeout {
                what: format!("the proxy of {} to learn of the pod {}.{}", node.name, pod.name, pod.namespace),
                waited: TRAVEL,
                log: format!("; it knows: {last}"),
            })?;
        }
        Ok(())
    }
}

fn seen<'d>(dump: &'d Value, pod: &PodRecord) -> Option<&'d Value> {
    let mut workloads = dump["workloads"].as_array()?.iter();
    workloads.find(|w| w["name"] == pod.name.as_str() && w["namespace"] == pod.namespace.as_str())
}

fn as_it_is(workload: &Value, pod: &PodRecord) -> bool {
    let hbone = workload["protocol"].as_str().is_some_and(|p| p.eq_ignore_ascii_case("hbone"));
    let addresses = workload["addresses"].as_array().into_iter().flatten();
    let listed: Vec<&str> = addresses.filter_map(Value::as_str).collect();
    let here = pod.ips.iter().all(|ip| listed.contains(&ip.to_string().as_str()));
    // A pod may also say of itself that it speaks HBONE.
    let native = pod.labels.get("networking.istio.io/tunnel").is_some_and(|kind| kind == "http");
    let serves = pod.ready && pod.captured();
    let (healthy, draining) = (workload["healthy"] == true, workload["draining"] == true);
    here && hbone == (pod.captured() || native) && (!serves || if pod.terminating { draining } else { healthy })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_is_known_when_the_proxy_has_it_as_it_is() {
        let uid = String::new();
        let mut pod = PodRecord {
            name: "web".to_owned(),
            namespace: "default".to_owned(),
            service_account: uid.clone(),
            uid,
            labels: [].into(),
            annotations: [(crate::kube::REDIRECTION.to_owned(), "enabled".to_owned())].into(),
            owner: None,
            node: "node1".to_owned(),
            host_ip: [10, 0, 0, 1].into(),
            ips: vec![[10, 0, 0, 2].into()],
            ports: Vec::new(),
            ready: true,
            terminating: false,
        };
        let dump = json!({"workloads": [
            {"name": "web", "namespace": "other"},
            {"name": "web", "namespace": "default", "addresses": ["10.0.0.2"], "protocol": "Hbone", "healthy": true},
        ]});
        let found = seen(&dump, &pod).expect("found");
        assert!(as_it_is(found, &pod));
        pod.annotations.clear();
        assert!(!as_it_is(found, &pod), "no longer captured");
        let unhealthy = json!({"addresses": ["10.0.0.2"], "protocol": "Hbone", "healthy": false});
        pod.annotations.insert(crate::kube::REDIRECTION.to_owned(), "enabled".to_owned());
        assert!(!as_it_is(&unhealthy, &pod));
        assert!(!as_it_is(&Value::Null, &pod));
    }
}
