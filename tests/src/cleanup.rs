//! Finds and removes what clusters left behind whose harness was killed.
//!
//! The kernel takes namespaces, links and mounts with their last process. Left are control groups (with processes
//! that the harness's death did not kill) and folders; both carry the owner's process id and start time in their
//! name, so that another harness can tell a dead owner from a living one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::cgroup::{Cgroup, Hierarchy};
use crate::error::Context;
use crate::kubernetes::cgroups;
use crate::{Error, wait};

/// Folder of all clusters.
pub const ROOT: &str = "/run/culvert-test";
/// Folder of what is too large for memory: the images and volumes of real nodes.
pub const DISK: &str = "/var/lib/culvert-test";
/// Beginning of the names of control groups.
pub const GROUP_PREFIX: &str = "culvert-test-";
const MEMORY_NOTE: &str = "memory-group";

/// Name of a cluster: its harness's process id and start time, and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterId {
    pid: u32,
    started: u64,
    number: u32,
}

impl ClusterId {
    /// A new name in this process.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn new() -> Result<Self, Error> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let pid = std::process::id();
        let started = started(pid).ok_or_else(|| Error::Absent("no /proc/<pid>/stat of this process".to_owned()))?;
        Ok(Self { pid, started, number: NEXT.fetch_add(1, Ordering::Relaxed) })
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-').map(str::parse::<u64>);
        let mut next = || parts.next()?.ok();
        let (pid, started, number) = (next()?, next()?, next()?);
        let id = Self { pid: u32::try_from(pid).ok()?, started, number: u32::try_from(number).ok()? };
        (id.to_string() == text).then_some(id)
    }

    /// The process id of its harness.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// True while its harness lives.
    pub fn alive(&self) -> bool {
        started(self.pid) == Some(self.started)
    }

    /// Its folder.
    pub fn folder(&self) -> PathBuf {
        Path::new(ROOT).join(self.to_string())
    }

    /// Its folder on disk, if it has real nodes.
    pub fn disk(&self) -> PathBuf {
        Path::new(DISK).join(self.to_string())
    }

    /// Name of its control group.
    pub fn group(&self) -> String {
        format!("{GROUP_PREFIX}{self}")
    }
}

impl std::fmt::Display for ClusterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}-{}", self.pid, self.started, self.number)
    }
}

/// Start time of a process in clock ticks since boot (field 22 of `/proc/<pid>/stat`); None if there is none, or it
/// is dead and only waits to be reaped.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Removes what dead clusters left and gives their names.
///
/// # Errors
/// Something cannot be removed.
pub fn sweep() -> Result<Vec<String>, Error> {
    let hierarchy = Hierarchy::detect()?;
    let folders = [ROOT, DISK].into_iter().flat_map(|folder| names(Path::new(folder)));
    let mut found: Vec<ClusterId> = folders.filter_map(|n| ClusterId::parse(&n)).collect();
    let groups = hierarchy.memory.iter().flat_map(|folder| names(folder)).chain(cgroups::names());
    found.extend(groups.filter_map(|n| ClusterId::parse(n.strip_prefix(GROUP_PREFIX)?)));
    found.sort_by_key(ToString::to_string);
    found.dedup();
    found.retain(|id| !id.alive());
    for id in &found {
        remove(&hierarchy, id)?;
    }
    Ok(found.iter().map(ToString::to_string).collect())
}

/// Notes where the cluster's v1 memory group is made: beneath its harness's own group, which another harness that
/// cleans up may not share.
pub(crate) fn note(hierarchy: &Hierarchy, id: &ClusterId) -> Result<(), Error> {
    let Some(memory) = &hierarchy.memory else { return Ok(()) };
    let file = id.folder().join(MEMORY_NOTE);
    fs::write(&file, memory.as_os_str().as_encoded_bytes()).during(|| format!("writing {}", file.display()))
}

/// Kills a cluster's processes and removes its control groups and folder.
pub(crate) fn remove(hierarchy: &Hierarchy, id: &ClusterId) -> Result<(), Error> {
    let folder = id.folder();
    let noted = fs::read_to_string(folder.join(MEMORY_NOTE)).ok().map(PathBuf::from);
    let hierarchy = Hierarchy { memory: noted.or_else(|| hierarchy.memory.clone()), ..hierarchy.clone() };
    let group = Cgroup::existing(&hierarchy, &id.group());
    group.kill()?;
    group.remove()?;
    cgroups::remove(&id.group())?;
    // Two harnesses may sweep at once.
    for folder in [folder, id.disk()] {
        wait::until(&format!("removing {}", folder.display()), Duration::from_secs(20), || {
            (fs::remove_dir_all(&folder).is_ok() || !folder.exists()).then_some(())
        })?;
    }
    // Not empty while there are other clusters.
    let _ = fs::remove_dir(ROOT);
    let _ = fs::remove_dir(DISK);
    Ok(())
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_living_from_the_dead() {
        let own = ClusterId::new().expect("own");
        assert!(own.alive());
        assert_eq!(ClusterId::parse(&own.to_string()), Some(own));
        let reused = ClusterId { started: own.started + 1, ..own };
        assert!(!reused.alive(), "another process had this id");
        assert!(!ClusterId { pid: 1 << 30, ..own }.alive());
        for foreign in ["", "1-2", "1-2-x", "01-2-3", "1-2-3-4", "../../etc"] {
            assert_eq!(ClusterId::parse(foreign), None, "{foreign}");
        }
    }
}
