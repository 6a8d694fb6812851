//! Limits of the process, and how far it is from them.

use std::path::{Component, Path, PathBuf};
use std::{fs, io};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit of open files to what the process may have (the hard limit). Returns it.
///
/// # Errors
/// When the kernel refuses; the limit stays as it was.
pub fn raise_open_files() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// How many files the process may have open.
///
/// # Errors
/// When the kernel does not say.
pub fn open_files_limit() -> io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}

/// How many files the process has open. Before Linux 6.2 each of them is looked at.
///
/// # Errors
/// When `/proc` is not there or not readable.
pub fn open_files() -> io::Result<usize> {
    let known = fs::metadata(OPEN_FILES)?.len();
    if known > 0 {
        return Ok(usize::try_from(known).unwrap_or(usize::MAX));
    }
    // One of them is what this is read by.
    Ok(fs::read_dir(OPEN_FILES)?.count().saturating_sub(1))
}

/// Has an entry for each open file; since Linux 6.2 its size says how many.
const OPEN_FILES: &str = "/proc/self/fd";

/// Where control groups are.
const GROUPS: &str = "/sys/fs/cgroup";

/// Limits from this on, in bytes, mean that there is none: older kernels have no word for it.
const NO_LIMIT: u64 = 1 << 50;

/// The lowest limit of memory, in bytes, of the control groups that this process is in; none if there is none in sight.
pub fn memory() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let texts = memory_files(&groups).into_iter().filter_map(|file| fs::read_to_string(file).ok());
    texts.filter_map(|text| limit(&text)).min()
}

/// The files with the limits of memory of these control groups (a `/proc/<pid>/cgroup`, cgroups(7)) and of those above them.
fn memory_files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => (PathBuf::from(GROUPS), "memory.max"),
            one if one.split(',').any(|one| one == "memory") => {
                (Path::new(GROUPS).join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let names = Path::new(path).components().filter(|part| matches!(part, Component::Normal(_)));
        let below: PathBuf = names.collect();
        files.extend(below.ancestors().map(|group| root.join(group).join(file)));
    }
    files
}

fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|limit| *limit < NO_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_those_that_are_listed() {
        // Tests beside this one open files too: until no one does in between.
        let (mut counted, mut listed) = (0, 1);
        while counted != listed {
            listed = fs::read_dir(OPEN_FILES).unwrap().count() - 1;
            counted = open_files().unwrap();
        }
        assert!(counted >= 3);
    }

    #[test]
    fn limits_of_memory_are_those_of_all_groups_above() {
        let files = |groups: &str| -> Vec<String> {
            memory_files(groups).iter().map(|file| file.to_str().unwrap().to_owned()).collect()
        };
        let expected = ["/sys/fs/cgroup/a/b/memory.max", "/sys/fs/cgroup/a/memory.max", "/sys/fs/cgroup/memory.max"];
        assert_eq!(files("0::/a/b\n"), expected);
        assert_eq!(files("0::/\n"), expected[2..]);
        assert_eq!(files("0::/../a\n"), expected[1..]);
        let older = "4:memory,hugetlb:/a\n3:cpu,cpuacct:/a\n1:name=systemd:/x:y\n";
        let expected = ["/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
        assert_eq!(files(older), expected);
        assert_eq!(files("nonsense\n:\n"), [""; 0]);
        assert_eq!(
            (limit("1073741824\n"), limit("max\n"), limit("9223372036854771712\n")),
            (Some(1 << 30), None, None)
        );
    }

    #[test]
    fn limit_is_the_hard_one() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard / 2, hard).unwrap();
        assert_eq!(raise_open_files().unwrap(), hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }
}
