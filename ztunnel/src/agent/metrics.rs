//! The agent's metrics: what the programs count, read from the kernel at each scrape, and how many pods are enrolled.

use std::fmt;
use std::sync::Arc;

use mesh_runtime::metrics::Registry;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use ztunnel_ebpf::Counter;

use super::drift::Drift;
use super::host::Host;
use super::manager::Manager;

/// A registry with all of them.
pub fn registry(host: Arc<Host>, manager: Manager) -> Registry {
    let registry = Registry::new();
    registry.register(|registry| registry.register_collector(Box::new(Kernel { host, manager })));
    registry
}

struct Kernel {
    host: Arc<Host>,
    manager: Manager,
}

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for counter in Counter::ALL {
            let Ok(value) = self.host.capture.counter(counter) else { continue };
            let name = format!("culvert_capture_{}", counter.name());
            let metric = encoder.encode_descriptor(&name, counter.help(), None, MetricType::Counter)?;
            ConstCounter::new(value).encode(metric)?;
        }
        let pods = i64::try_from(self.manager.count()).unwrap_or(i64::MAX);
        let help = "Pods that are enrolled on this node";
        let metric = encoder.encode_descriptor("culvert_enrolled_pods", help, None, MetricType::Gauge)?;
        ConstGauge::new(pods).encode(metric)?;
        let pods = i64::try_from(self.manager.count_weaker()).unwrap_or(i64::MAX);
        let help = "Enrolled pods whose guard stands in the pod itself, where a process that may open packet sockets gets past";
        let metric = encoder.encode_descriptor("culvert_weaker_pods", help, None, MetricType::Gauge)?;
        ConstGauge::new(pods).encode(metric)?;
        let help = "Times that something of an enrolled pod was found missing in the kernel and mended";
        let mut metric = encoder.encode_descriptor("culvert_agent_drift", help, None, MetricType::Counter)?;
        for what in Drift::ALL {
            let labels = [("what", what.name())];
            ConstCounter::new(self.host.drift.get(what)).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kernel")
    }
}
