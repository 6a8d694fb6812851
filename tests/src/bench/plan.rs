//! What can be measured, as data: names, loads, and how figures follow from one run. Pure.

use super::report::Unit;
use super::stats::Better;

/// One measurement.
#[derive(Debug, PartialEq, Eq)]
pub struct Measurement {
    /// What `--only` calls it.
    pub name: &'static str,
    /// What it does.
    pub title: &'static str,
    /// How.
    pub kind: Kind,
    /// Whether it takes so long that it is taken only when it is asked for by name.
    pub on_request: bool,
}

/// How a measurement is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A load on plain pods and on mesh pods in turn.
    Load(Load),
    /// New connections for a minute: this load, in slices.
    Minute(Load),
    /// HTTP requests of one pod over one kept connection: alone, and while another pod floods. In a fresh cluster whose
    /// proxies have one worker thread, so that both pods share it.
    TwoPods,
    /// Memory of the mesh with this many open connections, in a fresh cluster.
    OpenConnections(usize),
    /// Memory of the mesh with this many workloads in discovery, in a fresh cluster, and what a change of one costs.
    Workloads(usize),
    /// The same with proxies that know only what their pods use.
    OnDemand(usize),
}

/// A load: a client on node 1, a server on node 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// Bytes in one direction over this many connections, without checksums.
    Bulk(usize),
    /// HTTP requests over this many kept connections, 1 KiB each.
    Keepalive(usize),
    /// New connections, one byte there and back, by this many clients; the server closes first.
    Connections(usize),
    /// An HTTP request of 1 KiB on a new connection each, by this many clients; the client closes first.
    Short(usize),
}

/// What [`Kind::TwoPods`] measures of the quiet pod.
pub const QUIET: Load = Load::Keepalive(1);

/// What the other pod does meanwhile, by the name of its figures. Nothing comes first: the others are compared with it.
pub const FLOODS: [(&str, Option<Load>); 3] =
    [("alone", None), ("bytes", Some(Load::Bulk(8))), ("connections", Some(Load::Connections(64)))];

/// All measurements, in the order in which they are taken.
pub const ALL: &[Measurement] = &[
    load("bulk-1", "bulk data, 1 stream", Load::Bulk(1)),
    load("bulk-4", "bulk data, 4 streams", Load::Bulk(4)),
    load("keepalive-1", "HTTP requests, 1 kept connection", Load::Keepalive(1)),
    load("keepalive-64", "HTTP requests, 64 kept connections", Load::Keepalive(64)),
    load("connections-16", "new connections, one byte and close, 16 clients", Load::Connections(16)),
    load("short-32", "HTTP requests, a new connection each, 32 clients", Load::Short(32)),
    Measurement {
        name: "two-pods",
        title: "HTTP requests of a pod, 1 kept connection: alone; beside another pod's 8 bulk streams; beside another \
                pod's 64 clients that make new connections. One worker thread in each proxy",
        kind: Kind::TwoPods,
        on_request: false,
    },
    minute(
        "minute-connections",
        "a minute of new connections, one byte and close, 16 clients; the server closes first",
        Load::Connections(16),
    ),
    minute(
        "minute-short",
        "a minute of HTTP requests on new connections, 32 clients; the client closes first",
        Load::Short(32),
    ),
    Measurement {
        name: "memory-connections",
        title: "memory of the mesh: idle, with 1,000 open connections, after them",
        kind: Kind::OpenConnections(1_000),
        on_request: false,
    },
    Measurement {
        name: "memory-workloads",
        title: "memory of the mesh: idle, with 10,000 more workloads in discovery, after them",
        kind: Kind::Workloads(10_000),
        on_request: false,
    },
    Measurement {
        name: "memory-100k",
        title: "memory of the mesh: idle, with 100,000 more workloads in discovery, after them; on request",
        kind: Kind::Workloads(100_000),
        on_request: true,
    },
    Measurement {
        name: "memory-on-demand",
        title: "the same with proxies that know only what their pods use; on request",
        kind: Kind::OnDemand(100_000),
        on_request: true,
    },
];

const fn load(name: &'static str, title: &'static str, load: Load) -> Measurement {
    Measurement { name, title, kind: Kind::Load(load), on_request: false }
}

const fn minute(name: &'static str, title: &'static str, load: Load) -> Measurement {
    Measurement { name, title, kind: Kind::Minute(load), on_request: false }
}

/// What one run of a load gave.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sample {
    /// How long it took.
    pub seconds: f64,
    /// Bytes moved, of a bulk load.
    pub bytes: f64,
    /// Operations done, of the others.
    pub operations: f64,
    /// Median latency in microseconds.
    pub p50: f64,
    /// 99th percentile in microseconds.
    pub p99: f64,
    /// What it cost the mesh's programs; none without the mesh.
    pub cost: Option<Cost>,
}

/// What a run cost the mesh's programs on both nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Seconds of processor time of the proxies; none where the kernel does not count it.
    pub proxies: Option<f64>,
    /// Seconds of processor time of the agents; none if there are none.
    pub agents: Option<f64>,
    /// Context switches of the proxies.
    pub switches: f64,
}

/// A figure of a load.
#[derive(Debug)]
pub struct FigureOf {
    /// Its name.
    pub name: &'static str,
    /// What it is counted in.
    pub unit: Unit,
    /// Which way it is good.
    pub better: Better,
    /// Its value in one run; none if it has none there.
    pub value: fn(&Sample) -> Option<f64>,
}

impl Load {
    /// Its figures; the first is the one to show while it runs.
    pub fn figures(self) -> &'static [FigureOf] {
        match self {
            Self::Bulk(_) => BULK,
            Self::Keepalive(_) => REQUESTS,
            Self::Connections(_) | Self::Short(_) => CONNECTIONS,
        }
    }
}

/// A rate beside a flood, as a share of what it is alone.
pub fn share(alone: Option<&Sample>, beside: &Sample) -> Option<f64> {
    let alone = alone?;
    Some(beside.operations / beside.seconds / (alone.operations / alone.seconds)).filter(|share| share.is_finite())
}

const BULK: &[FigureOf] = &[
    higher("throughput", Unit::BytesPerSecond, |run| Some(run.bytes / run.seconds)),
    lower("cpu.proxies", Unit::CpuPerGb, |run| Some(run.cost?.proxies? / (run.bytes / 1e9))),
    lower("cpu.agents", Unit::CpuPerGb, |run| Some(run.cost?.agents? / (run.bytes / 1e9))),
];

const REQUESTS: &[FigureOf] = &[
    higher("requests", Unit::PerSecond, |run| Some(run.operations / run.seconds)),
    P50,
    P99,
    CPU_PROXIES,
    CPU_AGENTS,
    SWITCHES,
];

const CONNECTIONS: &[FigureOf] = &[
    higher("connections", Unit::PerSecond, |run| Some(run.operations / run.seconds)),
    P50,
    P99,
    CPU_PROXIES,
    CPU_AGENTS,
    SWITCHES,
];

const P50: FigureOf = lower("p50", Unit::Microseconds, |run| Some(run.p50));
const P99: FigureOf = lower("p99", Unit::Microseconds, |run| Some(run.p99));
const CPU_PROXIES: FigureOf =
    lower("cpu.proxies", Unit::CpuPer10k, |run| Some(run.cost?.proxies? / run.operations * 1e4));
const CPU_AGENTS: FigureOf = lower("cpu.agents", Unit::CpuPer10k, |run| Some(run.cost?.agents? / run.operations * 1e4));
const SWITCHES: FigureOf =
    lower("switches.proxies", Unit::PerOperation, |run| Some(run.cost?.switches / run.operations));

const fn higher(name: &'static str, unit: Unit, value: fn(&Sample) -> Option<f64>) -> FigureOf {
    FigureOf { name, unit, better: Better::Higher, value }
}

const fn lower(name: &'static str, unit: Unit, value: fn(&Sample) -> Option<f64>) -> FigureOf {
    FigureOf { name, unit, better: Better::Lower, value }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn values(load: Load, sample: &Sample) -> Vec<(&'static str, Option<f64>)> {
        load.figures().iter().map(|f| (f.name, (f.value)(sample))).collect()
    }

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = ALL.iter().map(|m| m.name).collect();
        assert_eq!(names.len(), ALL.len());
        for measurement in ALL {
            let Kind::Load(load) = measurement.kind else { continue };
            let figures: BTreeSet<_> = load.figures().iter().map(|f| f.name).collect();
            assert_eq!(figures.len(), load.figures().len(), "{}", measurement.name);
        }
    }

    #[test]
    fn figures_of_a_run() {
        let cost = Cost { proxies: Some(1.0), agents: Some(0.25), switches: 4000.0 };
        let run = Sample { seconds: 2.0, bytes: 4e9, operations: 1000.0, p50: 50.0, p99: 99.0, cost: Some(cost) };
        assert_eq!(
            values(Load::Bulk(1), &run),
            [("throughput", Some(2e9)), ("cpu.proxies", Some(0.25)), ("cpu.agents", Some(0.0625))]
        );
        assert_eq!(
            values(Load::Short(1), &run),
            [
                ("connections", Some(500.0)),
                ("p50", Some(50.0)),
                ("p99", Some(99.0)),
                ("cpu.proxies", Some(10.0)),
                ("cpu.agents", Some(2.5)),
                ("switches.proxies", Some(4.0)),
            ]
        );
        let plain = Sample { cost: None, ..run };
        assert_eq!(values(Load::Keepalive(1), &plain)[0], ("requests", Some(500.0)));
        assert!(values(Load::Keepalive(1), &plain)[3..].iter().all(|(_, value)| value.is_none()));
    }
}
