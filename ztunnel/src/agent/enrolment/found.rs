//! The network namespace of a pod that ran before anybody announced it: found by its processes, which are in the pod's
//! cgroup (the kubelet names it by the pod's UID).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Where runtimes keep the namespaces that they made.
const NAMESPACES: [&str; 2] = ["/run/netns", "/var/run/docker/netns"];
/// Most of a process's list of cgroups that is looked at, in bytes.
const MAX_CGROUPS: u64 = 16 << 10;

/// Why no namespace is known to be the pod's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// No process is in its cgroup.
    #[error("no process of it is found (the agent needs hostPID, and the pod a running container)")]
    NoProcess,
    /// Its processes are in several, of which the runtime made none or more than one. A process can make namespaces of its
    /// own, which are not the pod's.
    #[error("its processes are in {0} network namespaces, and none is known to be the pod's; restart the pod")]
    Several(usize),
}

/// A pod's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where it can be opened now.
    pub open: PathBuf,
    /// Where it stays as long as the pod does; empty if nowhere.
    pub path: PathBuf,
    /// Its inode.
    pub inode: u64,
}

/// The network namespace of the pod with one of these UIDs. Blocks: looks at every process.
///
/// # Errors
/// When there is none, or it cannot be told which.
pub fn find(uids: &[String]) -> Result<Found, NotFound> {
    let own = inode(Path::new("/proc/self/ns/net"));
    let mut found: BTreeMap<u64, PathBuf> = BTreeMap::new();
    for process in fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok) {
        if process.file_name().to_str().is_none_or(|name| name.parse::<u32>().is_err()) {
            continue;
        }
        let path = process.path();
        if !cgroups(&path).is_some_and(|text| is_of(&text, uids)) {
            continue;
        }
        let netns = path.join("ns/net");
        if let Some(inode) = inode(&netns).filter(|inode| Some(*inode) != own) {
            found.entry(inode).or_insert(netns);
        }
    }
    choose(&found, &made_by_runtimes())
}

/// The network namespace with this inode: where a runtime keeps it, else where a process is in it. Blocks.
#[must_use]
pub fn of_inode(wanted: u64) -> Option<Found> {
    if let Some(path) = made_by_runtimes().remove(&wanted) {
        return Some(Found { open: path.clone(), path, inode: wanted });
    }
    let processes = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let open = processes.map(|process| process.path().join("ns/net")).find(|path| inode(path) == Some(wanted))?;
    Some(Found { open, path: PathBuf::new(), inode: wanted })
}

/// Those that a runtime made are the pods'; of one alone there is no question.
fn choose(found: &BTreeMap<u64, PathBuf>, made: &BTreeMap<u64, PathBuf>) -> Result<Found, NotFound> {
    let all = found.len();
    let place = |inode: &u64| made.get(inode).cloned().unwrap_or_default();
    let mut of_runtimes = found.iter().filter(|(inode, _)| made.contains_key(*inode));
    let chosen = match (of_runtimes.next(), of_runtimes.next()) {
        (Some(one), None) => Some(one),
        // Where runtimes keep theirs elsewhere.
        (None, None) if all == 1 && made.is_empty() => found.iter().next(),
        (None | Some(_), _) => None,
    };
    let none = if all == 0 { NotFound::NoProcess } else { NotFound::Several(all) };
    chosen.map(|(inode, open)| Found { open: open.clone(), path: place(inode), inode: *inode }).ok_or(none)
}

fn made_by_runtimes() -> BTreeMap<u64, PathBuf> {
    let folders = NAMESPACES.iter().filter_map(|folder| fs::read_dir(folder).ok());
    let paths = folders.flatten().filter_map(|entry| Some(entry.ok()?.path()));
    paths.filter_map(|path| Some((inode(&path)?, path))).collect()
}

/// Whether a process's cgroups (`/proc/PID/cgroup`) are those of a pod with one of these UIDs: a part of a path is
/// `pod<uid>`, or, as systemd has it, ends in `pod<uid>.slice` with `_` for `-`.
fn is_of(cgroups: &str, uids: &[String]) -> bool {
    let uid_in = |part: &str| {
        let by_systemd =
            || Some(part.strip_suffix(".slice")?.rsplit('-').next()?.strip_prefix("pod")?.replace('_', "-"));
        part.strip_prefix("pod").map(str::to_owned).filter(|_| !part.ends_with(".slice")).or_else(by_systemd)
    };
    // The first that looks like a pod's: a pod may make what groups it likes below its own.
    let pod_of = |path: &str| path.split('/').find_map(uid_in);
    let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.filter_map(pod_of).any(|found| uids.contains(&found))
}

/// `None`: the process is gone.
fn cgroups(process: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(process.join("cgroup")).ok()?.take(MAX_CGROUPS).read_to_string(&mut text).ok()?;
    Some(text)
}

fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|found| found.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";

    #[test]
    fn cgroup_of_a_pod_is_known_in_every_form() {
        let uids = [String::from("other"), String::from(UID)];
        for text in [
            format!("0::/kubepods/besteffort/pod{UID}/9f8e\n"),
            format!("9:cpu:/\n4:memory:/node/kubepods/pod{UID}/9f8e\n0::/\n"),
            format!("0::/../../pod{UID}/9f8e\n"),
            format!(
                "0::/kubepods.slice/kubepods-besteffort-pod{}.slice/cri-containerd-9f8e.scope\n",
                UID.replace('-', "_")
            ),
        ] {
            assert!(is_of(&text, &uids), "{text}");
            assert!(!is_of(&text, &uids[..1]), "{text}");
        }
        for text in ["0::/\n", "", "0::/system.slice/kubelet.service\n", &format!("0::/kubepods/pod{UID}x/1\n")] {
            assert!(!is_of(text, &uids), "{text}");
        }
        let nested = format!("0::/kubepods/podanother/1/pod{UID}\n");
        assert!(!is_of(&nested, &uids), "{nested}");
    }

    #[test]
    fn what_a_process_made_itself_is_not_the_pods() {
        let process = |inode: u64| (inode, PathBuf::from(format!("/proc/{inode}/ns/net")));
        let made: BTreeMap<u64, PathBuf> =
            [(1, PathBuf::from("/run/netns/cni-1")), (9, "/run/netns/cni-9".into())].into();
        let choose = |inodes: &[u64]| choose(&inodes.iter().copied().map(process).collect(), &made);
        let found = choose(&[1, 2]).unwrap();
        assert_eq!((found.inode, found.path.to_str().unwrap()), (1, "/run/netns/cni-1"));
        assert_eq!(choose(&[3]), Err(NotFound::Several(1)), "its own namespace has no process");
        let alone = super::choose(&[process(3)].into(), &BTreeMap::new()).unwrap();
        assert_eq!((alone.inode, alone.path), (3, PathBuf::new()), "of one alone there is no question");
        assert_eq!(choose(&[]), Err(NotFound::NoProcess));
        assert_eq!(choose(&[2, 3]), Err(NotFound::Several(2)));
        assert_eq!(choose(&[1, 9, 3]), Err(NotFound::Several(3)));
    }
}
