//! The cluster that is measured: two nodes, and on them a plain and a meshed pair of every pod that a load needs.

use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Failure;
use super::mesh_usage::Parts;
use super::plan::{Load, QUIET, Sample};
use crate::app::load::Report as LoadReport;
use crate::cluster::{Builder, Cluster, Mesh};
use crate::netns::NetNs;
use crate::pod::{Output, Pod};
use crate::{Error, wait};

/// How long a new pod may take to be reached through the mesh.
const REACHED: Duration = Duration::from_secs(30);

/// What a run may take beyond its own seconds: operations under way have 10 s to end.
const GRACE: Duration = Duration::from_secs(20);

/// Ports of the server of short connections.
const ANSWER_PORTS: [u16; 4] = [7000, 7001, 7002, 7003];

/// Ports of the server of HTTP: a client that closes first needs a port of its own for a minute, and there are 28,000 for
/// each port of the server. Enough for a minute of plain TCP.
const HTTP_PORTS: std::ops::Range<u16> = PORT..PORT + 32;

/// Port of every other server.
pub(super) const PORT: u16 = 7000;

/// Seconds that a flood begins before the load, and ends after it.
const FLOOD_LEAD: f64 = 0.3;

/// Port of HBONE.
const HBONE: u16 = 15008;

/// What carries the traffic, and where the programs are.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The mesh, a peer, or nothing.
    pub mesh: Mesh,
    /// Folder of the programs.
    pub bins: PathBuf,
    /// Worker threads of each proxy; none: as many as it takes by itself. A peer is not told.
    pub workers: Option<usize>,
}

impl Setup {
    /// A cluster of two nodes.
    ///
    /// # Errors
    /// It does not start.
    pub fn cluster(&self) -> Result<Cluster, Error> {
        self.builder().start()
    }

    /// What describes that cluster.
    pub fn builder(&self) -> Builder {
        let mut cluster = Cluster::builder().nodes(2).mesh(self.mesh.clone()).bin_dir(&self.bins);
        if let Some(workers) = self.workers {
            cluster = cluster.proxy_args(&["--workers", &workers.to_string()]);
        }
        cluster
    }
}

/// One side: a client on node 1 and its servers on node 2, all plain or all in the mesh.
#[derive(Debug)]
pub struct Side {
    meshed: bool,
    client: Arc<Pod>,
    transfer: Arc<Pod>,
    http: Arc<Pod>,
    answer: Arc<Pod>,
    /// Who floods, towards `transfer` or `answer`, while `client` asks `http`.
    flooder: Arc<Pod>,
}

/// A cluster with both sides.
#[derive(Debug)]
pub struct Rig {
    /// Plain TCP.
    pub plain: Side,
    /// The mesh, and what it uses.
    pub mesh: Option<(Side, Parts)>,
    // Last, so that the pods end with it.
    _cluster: Cluster,
}

impl Rig {
    /// Starts everything, and waits until the mesh's pods are reached through tunnels.
    ///
    /// # Errors
    /// A part does not start, or traffic between the mesh's pods goes past the mesh.
    pub fn start(setup: &Setup) -> Result<Self, Error> {
        let cluster = setup.cluster()?;
        let plain = Side::start(&cluster, false)?;
        let mesh = match setup.mesh {
            Mesh::Off => None,
            Mesh::Culvert | Mesh::Peer(_) => Some((Side::start(&cluster, true)?, Parts::of(&cluster, &setup.mesh)?)),
        };
        Ok(Self { plain, mesh, _cluster: cluster })
    }
}

impl Side {
    fn start(cluster: &Cluster, meshed: bool) -> Result<Self, Error> {
        let answers: Vec<String> =
            ANSWER_PORTS.iter().flat_map(|p| ["--listen".to_owned(), format!("0.0.0.0:{p}")]).collect();
        let words = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        let listen = format!("0.0.0.0:{PORT}");
        let transfer = words(&["echo", "--mode", "transfer", "--quiet", "--listen", &listen]);
        let https = HTTP_PORTS.flat_map(|p| ["--listen".to_owned(), format!("0.0.0.0:{p}")]);
        let http = [words(&["http"]), https.collect()].concat();
        let answer = [words(&["echo", "--mode", "answer", "--quiet"]), answers].concat();
        let side = Self {
            meshed,
            client: client(cluster, "client", meshed)?,
            flooder: client(cluster, "flooder", meshed)?,
            transfer: server(cluster, "transfer", meshed, transfer)?,
            http: server(cluster, "http", meshed, http)?,
            answer: server(cluster, "answer", meshed, answer)?,
        };
        if meshed {
            for server in [&side.transfer, &side.http, &side.answer] {
                until_tunnelled(&side.client, server)?;
            }
            for server in [&side.transfer, &side.answer] {
                until_tunnelled(&side.flooder, server)?;
            }
        }
        Ok(side)
    }

    /// The load for that long. The sample has no cost yet.
    ///
    /// # Errors
    /// An operation failed, or what is called the mesh did not carry it.
    pub fn run(&self, load: Load, seconds: f64) -> Result<Sample, Failure> {
        self.load(&self.client, load, seconds)
    }

    /// [`QUIET`] for that long, while the flooder does the other load; what the two gave.
    ///
    /// # Errors
    /// As for [`Side::run`], of either load.
    pub fn beside(&self, flood: Load, seconds: f64) -> Result<(Sample, Sample), Failure> {
        std::thread::scope(|scope| {
            let flood = scope.spawn(|| self.load(&self.flooder, flood, seconds + 2.0 * FLOOD_LEAD));
            std::thread::sleep(Duration::from_secs_f64(FLOOD_LEAD));
            let quiet = self.run(QUIET, seconds);
            // A flood that did not come to be would make the figure a lie.
            let flood = flood.join().map_err(|_| Failure::Load("the flood panicked".to_owned()))?;
            Ok((quiet?, flood.map_err(|f| f.of("the flood"))?))
        })
    }

    fn load(&self, client: &Pod, load: Load, seconds: f64) -> Result<Sample, Failure> {
        let server = match load {
            Load::Bulk(_) => &self.transfer,
            Load::Keepalive(_) | Load::Short(_) => &self.http,
            Load::Connections(_) => &self.answer,
        };
        let output = client.run_for(Duration::from_secs_f64(seconds) + GRACE, arguments(load, server.ip(), seconds))?;
        let sample = match load {
            Load::Bulk(_) => bulk(&output)?,
            Load::Keepalive(_) | Load::Connections(_) | Load::Short(_) => operations(&output)?,
        };
        if self.meshed && !tunnelled(client.network(), server.ip())? {
            return Err(Failure::PastTheMesh(server.name()));
        }
        Ok(sample)
    }
}

/// A pod on node 1 that only holds its namespace.
pub(super) fn client(cluster: &Cluster, name: &str, meshed: bool) -> Result<Arc<Pod>, Error> {
    named(cluster, name, meshed).node(1).start()
}

/// A server on node 2, with a service account of its own.
pub(super) fn server(cluster: &Cluster, name: &str, meshed: bool, command: Vec<String>) -> Result<Arc<Pod>, Error> {
    named(cluster, name, meshed).node(2).command(command).start()
}

fn named<'c>(cluster: &'c Cluster, name: &str, meshed: bool) -> crate::pod::PodBuilder<'c> {
    let name = format!("{name}-{}", if meshed { "mesh" } else { "plain" });
    cluster.pod(&name).namespace("bench").service_account(&name).label("app", &name).enrolled(meshed)
}

/// Waits until a connection to the server is carried by a tunnel: discovery has both pods by then.
pub(super) fn until_tunnelled(client: &Pod, server: &Pod) -> Result<(), Error> {
    let to = server.at(PORT).to_string();
    wait::try_until(&format!("{} reaches {} through the mesh", client.name(), server.name()), REACHED, || {
        let seen = client.run(["connect", "--to", &to, "--send", "x", "--timeout", "2000"])?;
        Ok((seen.status.success() && tunnelled(client.network(), server.ip())?).then_some(()))
    })
}

/// Whether an HBONE connection to that address is open in the client's namespace.
fn tunnelled(network: &NetNs, server: IpAddr) -> Result<bool, Error> {
    Ok(established(network, |line| SocketAddr::V4(line.remote) == (server, HBONE).into())? > 0)
}

/// How many connections of a namespace are open and meet the condition.
pub(super) fn established(network: &NetNs, condition: impl Fn(&Line) -> bool) -> Result<usize, Error> {
    let table = network.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp"))?;
    let table = table.map_err(|e| Error::io("reading /proc/net/tcp", e))?;
    Ok(table.lines().filter_map(Line::parse).filter(|line| condition(line)).count())
}

/// An open connection in `/proc/net/tcp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line {
    pub local: SocketAddrV4,
    pub remote: SocketAddrV4,
}

impl Line {
    /// `sl local_address rem_address st ...`, addresses in the machine's byte order; state 01 is ESTABLISHED.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().skip(1);
        let (local, remote, state) = (words.next()?, words.next()?, words.next()?);
        let address = |text: &str| {
            let (ip, port) = text.split_once(':')?;
            let ip = u32::from_str_radix(ip, 16).ok()?.to_ne_bytes();
            Some(SocketAddrV4::new(ip.into(), u16::from_str_radix(port, 16).ok()?))
        };
        (state == "01").then(|| Some(Self { local: address(local)?, remote: address(remote)? }))?
    }
}

/// The command line of `culvert-app`.
fn arguments(load: Load, server: IpAddr, seconds: f64) -> Vec<String> {
    let words = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (to, time) = (format!("{server}:{PORT}"), seconds.to_string());
    let with = |kind: &str, clients: usize, targets: &[String]| {
        let mut args = words(&["load", "--kind", kind, "--clients", &clients.to_string(), "--seconds", &time]);
        args.extend(targets.iter().flat_map(|to| ["--to".to_owned(), to.clone()]));
        args
    };
    match load {
        Load::Bulk(streams) => {
            let streams = streams.to_string();
            words(&["transfer", "--to", &to, "--streams", &streams, "--send", "1", "--seconds", &time, "--no-checksum"])
        }
        Load::Keepalive(clients) => with("keepalive", clients, &[to]),
        Load::Short(clients) => {
            with("short", clients, &HTTP_PORTS.map(|p| format!("{server}:{p}")).collect::<Vec<_>>())
        }
        Load::Connections(clients) => with("connections", clients, &ANSWER_PORTS.map(|p| format!("{server}:{p}"))),
    }
}

/// What `culvert-app transfer` printed.
fn bulk(output: &Output) -> Result<Sample, Failure> {
    #[derive(serde::Deserialize)]
    struct Moved {
        ok: bool,
        sent: f64,
        received: f64,
        seconds: f64,
    }
    // A connection that breaks is told by an error without figures.
    match output.json::<Moved>() {
        Ok(moved) if moved.ok && moved.sent > 0.0 && output.status.success() => {
            Ok(Sample { seconds: moved.seconds, bytes: moved.sent + moved.received, ..Sample::default() })
        }
        Ok(_) | Err(_) => Err(Failure::Load(said(output))),
    }
}

/// What `culvert-app load` printed.
fn operations(output: &Output) -> Result<Sample, Failure> {
    let Ok(report) = output.json::<LoadReport>() else { return Err(Failure::Load(said(output))) };
    if !report.failures.is_empty() {
        let kinds: Vec<String> = report.failures.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let all = report.operations + report.failures.values().sum::<u64>();
        return Err(Failure::Load(format!("of {all} operations failed: {}", kinds.join(", "))));
    }
    if !report.ok || !output.status.success() {
        return Err(Failure::Load(said(output)));
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let operations = report.operations as f64;
    let (p50, p99) = (report.p50_us.into(), report.p99_us.into());
    Ok(Sample { seconds: report.seconds, operations, p50, p99, ..Sample::default() })
}

fn said(output: &Output) -> String {
    let text = format!("{} {}", output.stdout.trim(), output.stderr.trim());
    format!("the load ended with {}: {}", output.status, text.trim())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn output(code: i32, stdout: &str) -> Output {
        Output { status: ExitStatus::from_raw(code << 8), stdout: stdout.to_owned(), stderr: String::new() }
    }

    #[test]
    fn open_connections_are_read_from_proc() {
        let [a, b] = [0x0201_f40a_u32, 0x0102_f40a].map(|n| format!("{:08X}", u32::from_le(n)));
        let line = format!("   1: {a}:1B58 {b}:3AA0 01 00000000:00000000 00:00000000 00000000");
        let found = Line::parse(&line).unwrap();
        assert_eq!(found.local, "10.244.1.2:7000".parse().unwrap());
        assert_eq!(found.remote, "10.244.2.1:15008".parse().unwrap());
        assert_eq!(Line::parse(&line.replace(" 01 ", " 06 ")), None);
        assert_eq!(Line::parse("  sl  local_address rem_address   st tx_queue"), None);
    }

    #[test]
    fn a_failed_operation_fails_the_run() {
        let report = |failures: &str, ok: bool| {
            format!(
                r#"{{"ok":{ok},"operations":90,"failures":{failures},"seconds":2.0,"per_second":45.0,"p50_us":5,"p90_us":6,"p99_us":7,"max_us":8}}"#
            )
        };
        let good = operations(&output(0, &report("{}", true))).unwrap();
        assert_eq!((good.operations, good.seconds, good.p50, good.p99), (90.0, 2.0, 5.0, 7.0));
        let bad = operations(&output(1, &report(r#"{"reset":2,"timeout":8}"#, false))).unwrap_err();
        assert_eq!(bad.to_string(), "of 100 operations failed: 2 reset, 8 timeout");
        assert!(operations(&output(1, &report("{}", false))).is_err(), "nothing done");
        assert!(operations(&output(1, r#"{"ok":false,"error":"not-found"}"#)).is_err());
    }

    #[test]
    fn bulk_counts_only_when_all_of_it_arrived() {
        let moved = r#"{"ok":true,"sent":4000,"received":0,"seconds":2.0}"#;
        assert_eq!(bulk(&output(0, moved)).unwrap().bytes, 4000.0);
        assert!(bulk(&output(1, &moved.replace("true", "false"))).is_err());
        assert!(bulk(&output(0, &moved.replace("4000", "0"))).is_err());
        assert!(bulk(&output(1, r#"{"ok":false,"error":"reset"}"#)).unwrap_err().to_string().contains("reset"));
    }
}
