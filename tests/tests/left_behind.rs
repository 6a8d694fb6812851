//! A pod that is enrolled and withdrawn a hundred times leaves nothing: on the node, in its namespace, in the processes.
//! `CULVERT_ROUNDS` says how many times; 100 by default.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "the figures of a run")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use common::{connect, echo_any, until_connected};
use nix::sys::stat::fstat;
use tests::Error;
use tests::bpf;
use tests::cgroup::resident;
use tests::cluster::Cluster;
use tests::families::Families;
use tests::netns::NetNs;
use tests::picture::{self, Picture, differences, files};

/// What agent and proxy together may have grown by: pools and the allocator's own.
const MEMORY: u64 = 16 << 20;
/// Rounds before memory is looked at.
const WARM: usize = 40;
const BOUND: Duration = Duration::from_secs(20);

fn picture(cluster: &Cluster, networks: &[(&str, &NetNs)]) -> Result<Picture, Error> {
    let node = cluster.node(1)?;
    let mut all = Picture::new();
    let pins = node.bpffs();
    all.insert("pins".to_owned(), cluster.mounts().run(|| files(&pins))?);
    let agent = node.agent()?.pid().expect("running");
    let objects = cluster.mounts().run(|| bpf::objects_of(&pins, agent))??;
    all.insert("eBPF objects".to_owned(), objects.iter().map(|object| format!("{object:?}")).collect());
    all.insert("run folder".to_owned(), files(&node.run_dir()));
    for (name, part) in [("agent", node.agent()?), ("proxy", node.proxy()?)] {
        let mut descriptors = descriptors(part.pid().expect("running"));
        if name == "proxy" {
            descriptors.retain(|line| !line.ends_with(" x socket"));
        }
        all.insert(format!("descriptors of {name}"), descriptors);
    }
    let group = fs::metadata(node.group().path()).unwrap().ino();
    let mut inodes = Vec::new();
    for (name, network) in networks {
        inodes.push(u32::try_from(fstat(network.as_fd()).unwrap().st_ino).unwrap());
        all.extend(picture::of_network(name, network)?);
    }
    let links = bpf::links()?.into_iter().filter(|link| match link {
        bpf::Link::Cgroup { id, .. } => *id == group,
        bpf::Link::Netns { inode, .. } => inodes.contains(inode),
    });
    let mut links: Vec<String> = links.map(|link| format!("{link:?}")).collect();
    links.sort();
    all.insert("links of programs".to_owned(), links);
    Ok(all)
}

/// Kinds of descriptors and how many there are of each; namespaces by their inode.
fn descriptors(pid: u32) -> Vec<String> {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.display().to_string();
        let kind = match target.split_once(":[") {
            Some(("net" | "mnt", _)) | None => target.clone(),
            Some((kind, _)) => kind.to_owned(),
        };
        *kinds.entry(kind).or_default() += 1;
    }
    kinds.into_iter().map(|(kind, count)| format!("{count} x {kind}")).collect()
}

/// How many sockets the proxy may have more or less than before: its stock for the other pod follows that pod's rate.
const STOCK: usize = 16;

fn proxy_sockets(cluster: &Cluster) -> Result<usize, Error> {
    let all = descriptors(cluster.node(1)?.proxy()?.pid().expect("running"));
    let line = all.iter().find_map(|line| line.strip_suffix(" x socket"));
    Ok(line.and_then(|count| count.parse().ok()).unwrap_or(0))
}

/// Resident bytes of agent and proxy.
fn memory(cluster: &Cluster) -> Result<[u64; 2], Error> {
    let node = cluster.node(1)?;
    let of = |pid: Option<u32>| pid.and_then(|pid| resident(pid.cast_signed())).unwrap_or(0);
    Ok([of(node.agent()?.pid()), of(node.proxy()?.pid())])
}

#[test]
fn a_hundred_rounds_leave_nothing() -> Result<(), Error> {
    let rounds = std::env::var("CULVERT_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(100);
    let cluster = Cluster::builder().nodes(1).families(Families::Dual).start()?;
    let peer = echo_any(&cluster, "peer", 1).enrolled(true).start()?;
    let pod = echo_any(&cluster, "pod", 1).enrolled(true).unannounced().start()?;
    let node = cluster.node(1)?;
    let networks = [("pod", pod.network()), ("node", node.network()), ("proxy", node.proxy_network()?)];
    let to = peer.at(7000).to_string();
    // Once before, so that what is made once and kept is there.
    pod.enrol()?;
    until_connected(&pod, &to);
    let enrolled = picture(&cluster, &networks)?;
    pod.withdraw()?;
    pod.wait_known()?;
    let before = tests::wait::until("a state that stays", BOUND, || {
        let one = picture(&cluster, &networks).ok()?;
        std::thread::sleep(Duration::from_millis(300));
        let two = picture(&cluster, &networks).ok()?;
        differences(&one, &two).is_empty().then_some(two)
    })?;
    assert!(differences(&before, &enrolled).len() > 10, "an enrolment that leaves no trace shows nothing here");
    let enrol_and_withdraw = |round: usize| -> Result<(), Error> {
        pod.enrol()?;
        if round.is_multiple_of(10) {
            assert!(connect(&pod, &to, &["--send", "hello", "--read", "5"]).ok, "round {round}");
        }
        pod.withdraw()
    };
    // The allocator's own pools fill up first.
    (0..WARM).try_for_each(enrol_and_withdraw)?;
    let (used, sockets) = (memory(&cluster)?, proxy_sockets(&cluster)?);
    (0..rounds).try_for_each(enrol_and_withdraw)?;
    pod.wait_known()?;
    let mut left = Vec::new();
    let same = tests::wait::until("the state before", BOUND, || {
        left = differences(&before, &picture(&cluster, &networks).ok()?);
        left.is_empty().then_some(())
    });
    assert!(same.is_ok(), "left after {rounds} rounds: {left:#?}");
    let now = proxy_sockets(&cluster)?;
    assert!(now.abs_diff(sockets) <= STOCK, "the proxy had {sockets} sockets, now {now}");
    let now = memory(&cluster)?;
    eprintln!("{rounds} rounds: agent and proxy had {used:?} bytes resident, now {now:?}");
    let grown = now.iter().sum::<u64>().saturating_sub(used.iter().sum());
    assert!(grown < MEMORY, "agent and proxy grew by {grown} bytes: {used:?} to {now:?}");
    Ok(())
}
