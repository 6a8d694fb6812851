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

use super::capture::NodeCapture;
use super::manager::Manager;

/// A registry with all of them.
pub fn registry(node: Arc<NodeCapture>, manager: Manager) -> Registry {
    let registry = Registry::new();
    registry.register(|registry| registry.register_collector(Box::new(Kernel { node, manager })));
    registry
}

struct Kernel {
    node: Arc<NodeCapture>,
    manager: Manager,
}

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for counter in Counter::ALL {
            let Ok(value) = self.node.counter(counter) else { continue };
            let name = format!("culvert_capture_{}", counter.name());
            let metric = encoder.encode_descriptor(&name, help(counter), None, MetricType::Counter)?;
            ConstCounter::new(value).encode(metric)?;
        }
        let pods = i64::try_from(self.manager.count()).unwrap_or(i64::MAX);
        let help = "Pods that are enrolled on this node";
        let metric = encoder.encode_descriptor("culvert_enrolled_pods", help, None, MetricType::Gauge)?;
        ConstGauge::new(pods).encode(metric)
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kernel")
    }
}

const fn help(counter: Counter) -> &'static str {
    match counter {
        Counter::Captured => "Connections of enrolled pods that were marked for the proxy",
        Counter::Denied => "Connections of enrolled pods that were refused because they could not be captured",
        Counter::InboundSteered => "Connections from outside that were steered to the proxy",
        Counter::OutboundSteered => "Captured connections that were steered to the proxy",
        Counter::Dropped => "Packets dropped for want of a listener of the proxy, or addressed to one directly",
    }
}
