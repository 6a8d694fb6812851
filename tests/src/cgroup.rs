//! Control groups: a tree per cluster under the cgroup v2 mount, and beside it a v1 memory tree on hosts where the
//! memory controller is still v1.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::Context;
use crate::{Error, wait};

/// Where this machine mounts its control groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// The cgroup v2 mount.
    pub unified: PathBuf,
    /// The v1 memory controller's folder to make groups in, if memory is accounted there.
    pub memory: Option<PathBuf>,
}

impl Hierarchy {
    /// Reads `/proc/mounts` and `/proc/self/cgroup`.
    ///
    /// # Errors
    /// No cgroup v2 mount.
    pub fn detect() -> Result<Self, Error> {
        let mounts = fs::read_to_string("/proc/mounts").during(|| "reading /proc/mounts".to_owned())?;
        let own = fs::read_to_string("/proc/self/cgroup").during(|| "reading /proc/self/cgroup".to_owned())?;
        Self::parse(&mounts, &own).ok_or_else(|| Error::Absent("no cgroup2 filesystem is mounted".to_owned()))
    }

    fn parse(mounts: &str, own: &str) -> Option<Self> {
        let mut unified = None;
        let mut memory = None;
        for line in mounts.lines() {
            let mut words = line.split(' ').skip(1);
            let (Some(at), Some(kind), Some(options)) = (words.next(), words.next(), words.next()) else { continue };
            if kind == "cgroup2" && unified.is_none() {
                unified = Some(PathBuf::from(at));
            } else if kind == "cgroup" && options.split(',').any(|o| o == "memory") {
                memory = Some(PathBuf::from(at));
            }
        }
        // Beneath the harness's own group where that is visible, so that limits set for it keep holding.
        let memory = memory.map(|mount| {
            let path = own.lines().filter_map(|l| l.split_once(':')?.1.split_once(':'));
            let own =
                path.filter(|(controllers, _)| controllers.split(',').any(|c| c == "memory")).map(|(_, p)| p).next();
            let nested = own.map(|p| mount.join(p.trim_start_matches('/')));
            nested.filter(|p| p.is_dir()).unwrap_or(mount)
        });
        Some(Self { unified: unified?, memory })
    }
}

/// One control group.
#[derive(Debug, Clone)]
pub struct Cgroup {
    unified: PathBuf,
    memory: Option<PathBuf>,
}

impl Cgroup {
    /// Makes the group `name` at the top of the hierarchy.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn create(hierarchy: &Hierarchy, name: &str) -> Result<Self, Error> {
        Self { unified: hierarchy.unified.clone(), memory: hierarchy.memory.clone() }.child(name)
    }

    /// The group `name`, whether or not it exists.
    pub(crate) fn existing(hierarchy: &Hierarchy, name: &str) -> Self {
        Self { unified: hierarchy.unified.join(name), memory: hierarchy.memory.as_ref().map(|m| m.join(name)) }
    }

    /// Makes a group inside this one. With a v2 memory controller it is switched on for the new group.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn child(&self, name: &str) -> Result<Self, Error> {
        // At the machine's root this is refused or already done; a group that holds processes cannot do it either.
        // The figures are then missing, nothing else.
        if self.unified.join("cgroup.type").exists() {
            let _ = fs::write(self.unified.join("cgroup.subtree_control"), "+memory");
        }
        let child = Self { unified: self.unified.join(name), memory: self.memory.as_ref().map(|m| m.join(name)) };
        for folder in std::iter::once(&child.unified).chain(&child.memory) {
            fs::create_dir_all(folder).during(|| format!("making the control group {}", folder.display()))?;
        }
        Ok(child)
    }

    /// Its folder in the cgroup v2 filesystem.
    pub fn path(&self) -> &Path {
        &self.unified
    }

    /// Files to which a process writes `0` to join the group.
    pub(crate) fn entrances(&self) -> impl Iterator<Item = PathBuf> {
        std::iter::once(&self.unified).chain(&self.memory).map(|f| f.join("cgroup.procs"))
    }

    /// Processes in it and below.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        for folder in std::iter::once(&self.unified).chain(&self.memory) {
            for folder in tree(folder) {
                let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
                found.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|pid| *pid > 0));
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Memory charged to it in bytes: `memory.current`, or `memory.usage_in_bytes` of the v1 controller. None where
    /// the kernel does not account it.
    pub fn memory(&self) -> Option<u64> {
        let unified = number(&self.unified.join("memory.current"));
        unified.or_else(|| number(&self.memory.as_ref()?.join("memory.usage_in_bytes")))
    }

    /// CPU time used by its processes since it was made.
    pub fn cpu(&self) -> Option<Duration> {
        let text = fs::read_to_string(self.unified.join("cpu.stat")).ok()?;
        let used = text.lines().find_map(|l| l.strip_prefix("usage_usec "))?;
        Some(Duration::from_micros(used.trim().parse().ok()?))
    }

    /// Resident memory of its processes in bytes, from /proc.
    pub fn resident(&self) -> u64 {
        self.processes().into_iter().filter_map(resident).sum()
    }

    /// Kills every process in it and below, and waits until they are gone.
    ///
    /// # Errors
    /// Some are still there after 10 s.
    pub fn kill(&self) -> Result<(), Error> {
        wait::until(&format!("processes of {} gone", self.unified.display()), Duration::from_secs(10), || {
            let left = self.processes();
            // Older kernels than 5.14 have no cgroup.kill.
            if !left.is_empty() && fs::write(self.unified.join("cgroup.kill"), "1").is_err() {
                for pid in &left {
                    let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
                }
            }
            left.is_empty().then_some(())
        })
    }

    /// Removes it and all below. Groups that are gone already are fine.
    ///
    /// # Errors
    /// A group still holds a process.
    pub fn remove(&self) -> Result<(), Error> {
        for folder in std::iter::once(&self.unified).chain(&self.memory) {
            for folder in tree(folder).into_iter().rev() {
                // A group is busy for a moment after its last process was reaped.
                wait::until(&format!("removing {}", folder.display()), Duration::from_secs(5), || {
                    (fs::remove_dir(&folder).is_ok() || !folder.exists()).then_some(())
                })?;
            }
        }
        Ok(())
    }
}

/// Resident set of a process in bytes.
pub fn resident(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// The folder and all below, parents first. Empty if it does not exist.
pub(crate) fn tree(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut next = vec![top.to_path_buf()];
    while let Some(folder) = next.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        next.extend(entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        found.push(folder);
    }
    found
}

fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_unified_mount_wherever_it_is() {
        let hybrid =
            "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let found = Hierarchy::parse(hybrid, "4:memory:/nowhere/at/all\n0::/\n").expect("hybrid");
        assert_eq!(found.unified, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(found.memory.as_deref(), Some(Path::new("/sys/fs/cgroup/memory")));

        let pure =
            Hierarchy::parse("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n", "0::/user.slice\n").expect("pure");
        assert_eq!(pure, Hierarchy { unified: "/sys/fs/cgroup".into(), memory: None });
        assert_eq!(Hierarchy::parse("proc /proc proc rw 0 0\n", ""), None);
    }
}
