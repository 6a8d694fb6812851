//! What the mesh's programs use: processor time, context switches, memory, by the control groups that they run in.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::plan::Cost;
use crate::Error;
use crate::cgroup::Cgroup;
use crate::cluster::{Cluster, Mesh};

/// How long memory may take to come to rest.
const SETTLE: Duration = Duration::from_secs(10);

/// Programs whose use is added up.
#[derive(Debug, Clone)]
pub struct Part {
    /// `proxy-out` (node 1), `proxy-in` (node 2), `agents` or `culvertd`.
    pub name: &'static str,
    groups: Vec<Cgroup>,
}

/// The mesh's programs.
#[derive(Debug, Clone)]
pub struct Parts(Vec<Part>);

/// Memory of one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// The part's name.
    pub part: &'static str,
    /// Charged to its control groups in bytes; none where the kernel does not account it.
    pub charged: Option<u64>,
    /// Resident memory of its processes in bytes.
    pub resident: u64,
}

/// Use since the programs were started.
#[derive(Debug, Clone, Copy)]
pub struct Used {
    proxies: Option<Duration>,
    agents: Option<Duration>,
    switches: u64,
}

impl Parts {
    /// Those of a cluster; of a peer all that runs on a node counts as its proxy.
    ///
    /// # Errors
    /// The cluster runs without a mesh.
    pub fn of(cluster: &Cluster, mesh: &Mesh) -> Result<Self, Error> {
        let missing = |name: &str| Error::Absent(format!("{name} has no control group"));
        let agent = |node: usize| {
            let group = cluster.node(node)?.agent()?.spec().group.clone();
            group.ok_or_else(|| missing("an agent"))
        };
        let proxy = |node: usize| match mesh {
            Mesh::Peer(_) => agent(node),
            Mesh::Culvert | Mesh::Off => {
                cluster.node(node)?.proxy()?.spec().group.clone().ok_or_else(|| missing("a proxy"))
            }
        };
        let part = |name, groups| Part { name, groups };
        let mut parts = vec![part("proxy-out", vec![proxy(1)?]), part("proxy-in", vec![proxy(2)?])];
        if *mesh == Mesh::Culvert {
            parts.push(part("agents", vec![agent(1)?, agent(2)?]));
        }
        let culvertd = cluster.control()?.component.spec().group.clone();
        parts.push(part("culvertd", vec![culvertd.ok_or_else(|| missing("culvertd"))?]));
        Ok(Self(parts))
    }

    fn groups(&self, prefix: &str) -> Vec<&Cgroup> {
        self.0.iter().filter(|p| p.name.starts_with(prefix)).flat_map(|p| &p.groups).collect()
    }

    /// Processor time and context switches so far.
    pub fn used(&self) -> Used {
        let (proxies, agents) = (self.groups("proxy"), self.groups("agents"));
        let cpu = |groups: &[&Cgroup]| {
            let each: Option<Vec<Duration>> = groups.iter().map(|g| g.cpu()).collect();
            each.filter(|each| !each.is_empty()).map(|each| each.iter().sum())
        };
        Used { proxies: cpu(&proxies), agents: cpu(&agents), switches: proxies.iter().map(|g| switches(g)).sum() }
    }

    /// Memory now.
    pub fn memory(&self) -> Vec<Memory> {
        let of = |part: &Part| {
            let charged: Option<Vec<u64>> = part.groups.iter().map(Cgroup::memory).collect();
            let resident = part.groups.iter().map(Cgroup::resident).sum();
            Memory { part: part.name, charged: charged.map(|c| c.iter().sum()), resident }
        };
        self.0.iter().map(of).collect()
    }

    /// Memory when it has come to rest: three looks a quarter of a second apart within half a percent; after 10 s as it
    /// is.
    pub fn memory_at_rest(&self) -> Vec<Memory> {
        let (start, mut last, mut calm) = (Instant::now(), self.memory(), 0);
        while calm < 3 && start.elapsed() < SETTLE {
            std::thread::sleep(Duration::from_millis(250));
            let now = self.memory();
            let near = |a: u64, b: u64| a.abs_diff(b) <= a / 200;
            let same = |(a, b): (&Memory, &Memory)| {
                near(a.resident, b.resident) && near(a.charged.unwrap_or(0), b.charged.unwrap_or(0))
            };
            calm = if last.iter().zip(&now).all(same) { calm + 1 } else { 0 };
            last = now;
        }
        last
    }
}

impl Used {
    /// What was used since `before`.
    pub fn since(self, before: Self) -> Cost {
        let seconds = |now: Option<Duration>, then: Option<Duration>| Some(now?.saturating_sub(then?).as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "for a mean")]
        let switches = self.switches.saturating_sub(before.switches) as f64;
        Cost { proxies: seconds(self.proxies, before.proxies), agents: seconds(self.agents, before.agents), switches }
    }
}

/// Context switches, voluntary and not, of all threads of a group that live now.
fn switches(group: &Cgroup) -> u64 {
    let tasks = group.processes().into_iter().filter_map(|pid| std::fs::read_dir(format!("/proc/{pid}/task")).ok());
    let files = tasks.flat_map(|task| task.flatten()).map(|thread| thread.path().join("status"));
    files.map(|file: PathBuf| std::fs::read_to_string(file).map_or(0, |text| switches_in(&text))).sum()
}

fn switches_in(status: &str) -> u64 {
    let count = |line: &str| {
        let (name, value) = line.split_once(':')?;
        matches!(name, "voluntary_ctxt_switches" | "nonvoluntary_ctxt_switches")
            .then(|| value.trim().parse::<u64>().ok())?
    };
    status.lines().filter_map(count).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_switches_of_both_kinds() {
        let status = "Name:\tx\nVmRSS:\t 9 kB\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t5\n";
        assert_eq!(switches_in(status), 155);
        assert_eq!(switches_in(""), 0);
    }

    #[test]
    fn use_is_a_difference() {
        let used = |ms, switches| Used { proxies: Some(Duration::from_millis(ms)), agents: None, switches };
        let cost = used(1500, 30).since(used(500, 10));
        assert_eq!(cost, Cost { proxies: Some(1.0), agents: None, switches: 20.0 });
    }
}
