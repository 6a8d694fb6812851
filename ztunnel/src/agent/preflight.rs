//! What the agent needs from the machine, checked at start: everything that is missing is named at once, each with its
//! remedy.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{self, FsType, statfs as stat_fs};
use nix::unistd::{AccessFlags, access};

use super::capture::probe::{self, Probe};
use super::config::Config;

/// One thing that is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What is missing, and what for.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// Everything that is missing.
#[derive(Debug, thiserror::Error)]
pub struct PreflightError(pub Vec<Missing>);

impl fmt::Display for PreflightError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("this machine lacks what the agent needs:")?;
        for Missing { what, remedy } in &self.0 {
            write!(f, "\n  - {what}\n    {remedy}")?;
        }
        Ok(())
    }
}

/// The capabilities that are used, by number.
const CAPABILITIES: [(u32, &str, &str); 5] = [
    (12, "NET_ADMIN", "rules, routes, transparent sockets"),
    (13, "NET_RAW", "marks and devices of sockets"),
    (21, "SYS_ADMIN", "entering pods' network namespaces"),
    (38, "PERFMON", "loading eBPF programs"),
    (39, "BPF", "loading eBPF programs"),
];

/// Checks the machine.
///
/// # Errors
/// With everything that is missing.
pub fn check(config: &Config) -> Result<(), PreflightError> {
    let mut missing = Vec::new();
    let capabilities = effective_capabilities();
    for (bit, name, purpose) in CAPABILITIES {
        if capabilities & (1 << bit) == 0 {
            missing.push(Missing {
                what: format!("capability {name} ({purpose})"),
                remedy: String::from("run the agent as root, or add it to the container's securityContext"),
            });
        }
    }
    let cgroup_root = config.cgroup2_root();
    if file_system(&cgroup_root) != Some(statfs::CGROUP2_SUPER_MAGIC) {
        missing.push(Missing {
            what: format!("cgroup v2 at {} (the connect hook is attached there)", cgroup_root.display()),
            remedy: String::from(
                "give the mount point of type cgroup2 in /proc/mounts with --cgroup-root, or `mount -t cgroup2 none DIR`",
            ),
        });
    }
    let bpffs = existing_ancestor(&config.bpffs);
    if file_system(&bpffs) != Some(statfs::BPF_FS_MAGIC) {
        missing.push(Missing {
            what: format!("bpffs at {} (capture is pinned there)", config.bpffs.display()),
            remedy: format!(
                "mount -t bpf bpf {}, or give another folder with --bpffs",
                mount_point(&config.bpffs).display()
            ),
        });
    }
    let accept = config.proc_dir.join("sys/net/ipv4/tcp_fwmark_accept");
    if access(&accept, AccessFlags::W_OK).is_err() {
        missing.push(Missing {
            what: format!("{}, writable (replies of applications return to the proxy)", accept.display()),
            remedy: String::from("mount the host's /proc in the agent's container, and give its place with --proc-dir"),
        });
    }
    // Probing needs the capabilities; without them every probe would fail and say so.
    if missing.is_empty() {
        let absent = probe::all().into_iter().filter(|probe| !probe.present);
        missing.extend(absent.map(|Probe { feature, since, loss, .. }| Missing {
            what: format!("kernel feature {feature} ({loss})"),
            remedy: format!("it came with Linux {since}; a kernel from 6.1 on has all that is needed"),
        }));
    }
    if missing.is_empty() { Ok(()) } else { Err(PreflightError(missing)) }
}

fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .unwrap_or(0)
}

fn file_system(path: &Path) -> Option<FsType> {
    stat_fs(path).ok().map(|found| found.filesystem_type())
}

/// The folder that exists and in which the path would be made.
fn existing_ancestor(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// The usual mount point where it is asked for, else the folder itself.
fn mount_point(path: &Path) -> PathBuf {
    let usual = Path::new("/sys/fs/bpf");
    if path.starts_with(usual) { usual.to_owned() } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::agent::testing::{Scratch, cgroup_root};

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        config: Config,
    }

    fn config(bpffs: &Path, cgroup_root: &Path) -> Config {
        let arguments = [Path::new("agent"), Path::new("--bpffs"), bpffs, Path::new("--cgroup-root"), cgroup_root];
        Command::parse_from(arguments).config
    }

    #[test]
    fn machine_that_has_everything_passes() {
        let scratch = Scratch::new();
        check(&config(&scratch.bpffs().join("made/later"), &cgroup_root())).unwrap();
    }

    #[test]
    fn everything_that_is_missing_is_named_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let error = check(&config(&folder.path().join("bpf"), folder.path())).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.0.len(), 2, "{text}");
        assert!(text.contains("cgroup v2 at") && text.contains("--cgroup-root"), "{text}");
        assert!(text.contains("bpffs at") && text.contains("mount -t bpf bpf"), "{text}");
    }
}
