//! Memory of the mesh: idle, under something, and after it, each time in a fresh cluster.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::mesh_usage::{Memory, Parts};
use super::report::Unit;
use super::rig::{self, PORT, Setup};
use super::{Failure, synthetic};
use crate::cluster::Cluster;
use crate::{Error, http, wait};

/// How long a step may take.
const BOUND: Duration = Duration::from_secs(300);

/// The type of workloads and services in discovery.
const WORKLOAD_TYPE: &str = "type.googleapis.com/istio.workload.Address";

/// Where culvertd's admin pages are by default, on its loopback.
const CULVERTD_ADMIN: u16 = 15016;

/// One value of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    /// Name of the figure.
    pub name: String,
    /// What it is counted in.
    pub unit: Unit,
    /// The value.
    pub value: f64,
}

impl Taken {
    fn new(name: impl Into<String>, unit: Unit, value: f64) -> Self {
        Self { name: name.into(), unit, value }
    }
}

/// Memory with `count` connections open, each of them used once.
///
/// # Errors
/// The cluster does not start, or a connection fails.
pub fn open_connections(setup: &Setup, count: usize) -> Result<Vec<Taken>, Failure> {
    let cluster = setup.cluster()?;
    let listen = format!("0.0.0.0:{PORT}");
    let echo = ["echo", "--quiet", "--listen", &listen].map(str::to_owned).to_vec();
    let server = rig::server(&cluster, "echo", true, echo)?;
    let client = rig::client(&cluster, "client", true)?;
    rig::until_tunnelled(&client, &server)?;
    let parts = Parts::of(&cluster, &setup.mesh)?;
    let idle = parts.memory_at_rest();

    let (to, number) = (server.at(PORT).to_string(), count.to_string());
    // One exchange on each, and then nothing for ten minutes.
    let held = client.spawn(["hold", "--to", &to, "--connections", &number, "--interval", "600000"])?;
    held.wait_for(&format!("\"exchanges\":{}}}", count / 10 * 10), BOUND)?;
    let open_now = || rig::established(server.network(), |line| line.local.port() == PORT);
    let found = open_now()?;
    if found < count {
        return Err(Failure::Load(format!("{found} of {count} connections are open at the server")));
    }
    let open = parts.memory_at_rest();

    drop(held);
    wait::try_until("the connections to be closed", BOUND, || Ok((open_now()? == 0).then_some(())))?;
    let after = parts.memory_at_rest();

    let mut values = states(&[("idle", &idle), ("open", &open), ("after", &after)]);
    values.extend(each("per-connection", &idle, &open, count));
    Ok(values)
}

/// What a proxy knows of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// All that there is.
    Everything,
    /// What its pods use, of Culvert's.
    Used,
}

/// Memory with `count` more workloads in discovery, how long they take to be known and forgotten, and what a change of one
/// of them costs.
///
/// # Errors
/// The cluster does not start, or the workloads do not arrive or do not go.
pub fn workloads(setup: &Setup, count: usize, scope: Known) -> Result<Vec<Taken>, Failure> {
    let cluster = match scope {
        Known::Everything => setup.cluster()?,
        Known::Used => setup.builder().proxy_args(&["--discovery", "on-demand"]).start()?,
    };
    let parts = Parts::of(&cluster, &setup.mesh)?;
    let idle = parts.memory_at_rest();
    let before = wait::try_until("the proxies to know the cluster", BOUND, || known(&cluster, scope))?.resources;

    let files = synthetic::files(count);
    let start = Instant::now();
    for (name, text) in &files {
        cluster.directory().write_raw(name, text)?;
    }
    until_known(&cluster, scope, before + count as u64)?;
    let arrived = start.elapsed();
    let loaded = parts.memory_at_rest();
    let changes = changes(&cluster, scope, &parts, count)?;

    let start = Instant::now();
    cluster.directory().remove(CHANGING)?;
    for (name, _) in &files {
        cluster.directory().remove(name)?;
    }
    until_known(&cluster, scope, before)?;
    let gone = start.elapsed();
    let after = parts.memory_at_rest();

    let mut values = states(&[("idle", &idle), ("loaded", &loaded), ("after", &after)]);
    values.extend(each("per-workload", &idle, &loaded, count));
    values.push(Taken::new("until-known", Unit::Seconds, arrived.as_secs_f64()));
    values.push(Taken::new("until-forgotten", Unit::Seconds, gone.as_secs_f64()));
    values.extend(changes);
    Ok(values)
}

/// The file of the pod that changes.
const CHANGING: &str = "synthetic-changing.yaml";
/// How often it changes.
const CHANGES: u32 = 50;

/// What one change of one pod costs: processor time of both proxies together, and the time from the file to the last
/// proxy's word, which is mostly culvertd's look at its folder.
fn changes(cluster: &Cluster, scope: Known, parts: &Parts, count: usize) -> Result<Vec<Taken>, Failure> {
    let change = |ready: bool| -> Result<(), Failure> {
        let version = wait::try_until("the proxies to be up to date", BOUND, || known(cluster, scope))?.version;
        cluster.directory().write_raw(CHANGING, &synthetic::one(count, ready))?;
        let later = || Ok(known(cluster, scope)?.filter(|now| now.version > version));
        wait::try_until("the change to be known", BOUND, later)?;
        Ok(())
    };
    change(true)?;
    let (start, used) = (Instant::now(), parts.used());
    for number in 0..CHANGES {
        change(number % 2 == 1)?;
    }
    let (elapsed, cost) = (start.elapsed() / CHANGES, parts.used().since(used));
    let cpu =
        cost.proxies.map(|seconds| Taken::new("proxies.cpu.per-change", Unit::Seconds, seconds / f64::from(CHANGES)));
    Ok(cpu.into_iter().chain([Taken::new("until-changed", Unit::Seconds, elapsed.as_secs_f64())]).collect())
}

/// `<part>.<kind>.<state>` for each.
fn states(states: &[(&str, &[Memory])]) -> Vec<Taken> {
    let mut values = Vec::new();
    for (state, memory) in states {
        for part in *memory {
            for (kind, bytes) in kinds(part) {
                values.push(Taken::new(format!("{}.{kind}.{state}", part.part), Unit::Bytes, bytes));
            }
        }
    }
    values
}

/// `<part>.<kind>.<name>`: the growth from one state to another for each of `count` things.
fn each(name: &str, from: &[Memory], to: &[Memory], count: usize) -> Vec<Taken> {
    let mut values = Vec::new();
    for (before, after) in from.iter().zip(to) {
        for ((kind, before_bytes), (_, after_bytes)) in kinds(before).into_iter().zip(kinds(after)) {
            #[expect(clippy::cast_precision_loss, reason = "a mean")]
            let mean = (after_bytes - before_bytes) / count as f64;
            values.push(Taken::new(format!("{}.{kind}.{name}", before.part), Unit::Bytes, mean));
        }
    }
    values
}

#[expect(clippy::cast_precision_loss, reason = "exact up to petabytes")]
fn kinds(memory: &Memory) -> Vec<(&'static str, f64)> {
    let charged = memory.charged.map(|bytes| ("cgroup", bytes as f64));
    charged.into_iter().chain([("rss", memory.resident as f64)]).collect()
}

/// How many workloads and services every node proxy has taken over, by culvertd's word: what it serves, if each client
/// has acknowledged the last of it. None while one has not. This costs the proxies nothing and holds for a peer too.
fn known(cluster: &Cluster, scope: Known) -> Result<Option<TakenOver>, Error> {
    let at = SocketAddr::from(([127, 0, 0, 1], CULVERTD_ADMIN));
    let text = http::get_ok(cluster.control()?.network(), at, "/status")?;
    let status: Value = serde_json::from_str(&text).map_err(|e| Error::Output {
        what: "culvertd's /status".to_owned(),
        reason: e.to_string(),
        output: text.chars().take(400).collect(),
    })?;
    Ok(taken_over(&status, scope, cluster.nodes().len()))
}

/// What the proxies have of discovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TakenOver {
    /// Workloads and services there are.
    resources: u64,
    /// Changes to them so far.
    version: u64,
}

/// See [`known`]; `clients` is how many there must be.
fn taken_over(status: &Value, scope: Known, clients: usize) -> Option<TakenOver> {
    let of_type = |list: &'_ Value| list.as_array()?.iter().find(|one| one["type"] == WORKLOAD_TYPE).cloned();
    let served = of_type(&status["resources"])?;
    let version = served["version"].as_u64()?;
    let acknowledged = |client: &Value| {
        let state = of_type(&client["types"])?;
        // Who is told only what it asked for need not hear of the last change.
        let is_last = scope == Known::Used || state["acked"].as_u64()? >= version;
        (state["in_flight"] == false && is_last).then_some(())
    };
    let all = status["clients"].as_array()?;
    let caught_up = all.iter().filter(|client| acknowledged(client).is_some()).count();
    let resources = served["resources"].as_u64()?;
    (caught_up == all.len() && caught_up >= clients).then_some(TakenOver { resources, version })
}

fn until_known(cluster: &Cluster, scope: Known, wanted: u64) -> Result<(), Error> {
    wait::try_until(&format!("{wanted} workloads and services known to the proxies"), BOUND, || {
        Ok(known(cluster, scope)?.filter(|now| now.resources == wanted).map(drop))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn states_and_growth_by_part_and_kind() {
        let memory = |charged, resident| [Memory { part: "agents", charged, resident }];
        let (idle, open) = (memory(Some(1000), 500), memory(Some(3000), 700));
        let found = states(&[("idle", &idle), ("open", &open)]);
        let names: Vec<&str> = found.iter().map(|v| v.name.as_str()).collect();
        assert_eq!(names, ["agents.cgroup.idle", "agents.rss.idle", "agents.cgroup.open", "agents.rss.open"]);
        let growth = each("per-connection", &idle, &open, 100);
        assert_eq!(growth[0], Taken::new("agents.cgroup.per-connection", Unit::Bytes, 20.0));
        assert_eq!(growth[1], Taken::new("agents.rss.per-connection", Unit::Bytes, 2.0));
        assert_eq!(states(&[("idle", &memory(None, 1))]).len(), 1, "not accounted is not 0");
    }
    #[test]
    fn workloads_are_known_when_every_client_has_acknowledged_them() {
        let client = |acked: u64, in_flight: bool| {
            let other = json!({"type": "other", "acked": 0, "in_flight": true});
            json!({"types": [other, {"type": WORKLOAD_TYPE, "acked": acked, "in_flight": in_flight}]})
        };
        let status = |clients: &[Value]| {
            let resources = json!([{"type": WORKLOAD_TYPE, "resources": 12, "version": 7}]);
            json!({"resources": resources, "clients": clients})
        };
        assert_eq!(
            taken_over(&status(&[client(7, false), client(8, false)]), Known::Everything, 2),
            Some(TakenOver { resources: 12, version: 7 })
        );
        assert_eq!(taken_over(&status(&[client(7, false), client(6, false)]), Known::Everything, 2), None);
        assert!(taken_over(&status(&[client(7, false), client(6, false)]), Known::Used, 2).is_some());
        assert_eq!(taken_over(&status(&[client(7, false), client(7, true)]), Known::Used, 2), None);
        assert_eq!(taken_over(&status(&[client(7, false)]), Known::Used, 2), None, "one is not connected");
    }
}
