//! The control groups of a cluster of real nodes. The kubelet wants one folder for its pods, under the same name in every
//! hierarchy that the machine has, made beforehand.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::tree;
use crate::error::Context;
use crate::{Error, wait};

/// Controllers that a kubelet wants for its pods.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"];

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    at: PathBuf,
    unified: bool,
}

/// Makes the group `<cluster>/<node>` everywhere and gives its name as the kubelet's `cgroupRoot` wants it.
///
/// # Errors
/// A folder cannot be made.
pub(super) fn create(cluster: &str, node: &str) -> Result<String, Error> {
    for mount in mounts()? {
        let top = mount.at.join(cluster);
        let own = top.join(node);
        fs::create_dir_all(&own).during(|| format!("making the control group {}", own.display()))?;
        if mount.unified {
            for folder in [&mount.at, &top, &own] {
                for controller in CONTROLLERS {
                    // Those that are v1 on this machine, or that it does not have, are refused.
                    let _ = fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"));
                }
            }
        }
        // A v1 group accepts no process before it has CPUs and memory nodes; other controllers have no such files.
        for folder in [&top, &own] {
            for file in ["cpuset.cpus", "cpuset.mems"].into_iter().filter(|_| !mount.unified) {
                if let (Ok(all), file) = (fs::read_to_string(mount.at.join(file)), folder.join(file)) {
                    fs::write(&file, all.trim()).during(|| format!("writing {}", file.display()))?;
                }
            }
        }
    }
    Ok(format!("/{cluster}/{node}"))
}

/// Kills what is in the group of a cluster, in any hierarchy, and removes it. A group that is gone is fine.
///
/// # Errors
/// A process does not end, or a group cannot be removed, within some seconds.
pub(crate) fn remove(cluster: &str) -> Result<(), Error> {
    let tops = tops(cluster)?;
    end(cluster, &tops)?;
    tops.iter().try_for_each(|top| remove_tree(top))
}

/// Kills what is in the group `<cluster>/<node>`, and removes the groups of its pods.
///
/// # Errors
/// As [`remove`].
pub(super) fn empty(cluster: &str, node: &str) -> Result<(), Error> {
    let name = format!("{cluster}/{node}");
    let tops = tops(&name)?;
    end(&name, &tops)?;
    // The kubelet's name for them.
    tops.iter().try_for_each(|top| remove_tree(&top.join("kubepods")))
}

/// The folders of a group, one in each hierarchy that has it.
fn tops(name: &str) -> Result<Vec<PathBuf>, Error> {
    Ok(mounts()?.into_iter().map(|mount| mount.at.join(name)).filter(|top| top.exists()).collect())
}

fn end(name: &str, tops: &[PathBuf]) -> Result<(), Error> {
    wait::until(&format!("processes of {name} gone"), Duration::from_secs(20), || {
        let left: Vec<i32> = tops.iter().flat_map(|top| processes(top)).collect();
        for pid in &left {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        left.is_empty().then_some(())
    })
}

fn remove_tree(top: &Path) -> Result<(), Error> {
    for folder in tree(top).into_iter().rev() {
        wait::until(&format!("removing {}", folder.display()), Duration::from_secs(5), || {
            (fs::remove_dir(&folder).is_ok() || !folder.exists()).then_some(())
        })?;
    }
    Ok(())
}

/// Names of the groups at the top of any hierarchy.
pub(crate) fn names() -> Vec<String> {
    let mounts = mounts().unwrap_or_default();
    let entries = mounts.iter().filter_map(|mount| fs::read_dir(&mount.at).ok()).flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn processes(top: &Path) -> Vec<i32> {
    let files = tree(top).into_iter().map(|folder| folder.join("cgroup.procs"));
    let texts = files.filter_map(|file| fs::read_to_string(file).ok());
    texts
        .flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<i32>>())
        .filter(|pid| *pid > 0)
        .collect()
}

fn mounts() -> Result<Vec<Mount>, Error> {
    let table = fs::read_to_string("/proc/self/mounts").during(|| "reading /proc/self/mounts".to_owned())?;
    Ok(parse(&table))
}

/// Each hierarchy once: a controller may be mounted in several places.
fn parse(table: &str) -> Vec<Mount> {
    let mut found: Vec<(Mount, &str)> = Vec::new();
    for line in table.lines() {
        let mut words = line.split(' ').skip(1);
        let (Some(at), Some(kind), Some(options)) = (words.next(), words.next(), words.next()) else { continue };
        let unified = kind == "cgroup2";
        if (unified || kind == "cgroup")
            && !found.iter().any(|(mount, seen)| mount.unified == unified && (unified || *seen == options))
        {
            found.push((Mount { at: at.into(), unified }, options));
        }
    }
    found.into_iter().map(|(mount, _)| mount).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hierarchy_is_found_once() {
        let table = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                     cgroup /mnt/cpu cgroup rw,cpu 0 0\ncgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n\
                     cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup2 /mnt/two cgroup2 rw 0 0\n";
        let found = parse(table);
        let at: Vec<_> = found.iter().map(|mount| mount.at.to_str().expect("text")).collect();
        assert_eq!(at, ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"]);
        assert!(found[2].unified && !found[0].unified);
    }
}
