//! What this machine must have for the parts that use the real kernel. Everything missing is named at once, each with
//! the command that brings it.

use std::fs;
use std::process::Command;

use crate::Failure;

/// Oldest kernel whose `sk_lookup` programs can see the ingress interface.
const KERNEL: (u32, u32) = (6, 1);

/// Checks the machine.
///
/// # Errors
/// All that is missing, a line each, with the remedy.
pub fn check() -> Result<(), Failure> {
    let mut missing = Vec::new();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    match kernel(&release) {
        Some(version) if version >= KERNEL => {}
        _ => missing.push(format!(
            "Linux {}.{} or newer (this is {}): run on a newer kernel, e.g. `apt-get install linux-image-amd64`",
            KERNEL.0,
            KERNEL.1,
            release.trim()
        )),
    }
    if effective_uid() != Some(0) {
        missing.push("root, for network namespaces and eBPF: `sudo -E cargo xtask ...`".to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if !mounts.lines().any(|l| l.split(' ').nth(2) == Some("cgroup2")) {
        missing.push(
            "cgroup v2: `mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified`".to_owned(),
        );
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|l| l.ends_with("\tbpf")) {
        missing.push("the bpf file system: a kernel with CONFIG_BPF_SYSCALL=y".to_owned());
    }
    if Command::new("cc").arg("--version").output().is_err() {
        missing.push("a C compiler: `apt-get install gcc libc6-dev`".to_owned());
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure(format!("this machine lacks:\n  - {}", missing.join("\n  - "))))
}

/// Major and minor of a release such as `6.18.44-cloud`.
fn kernel(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.trim().split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn effective_uid() -> Option<u32> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|l| l.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_read() {
        assert_eq!(kernel("6.18.44-fc-v657\n"), Some((6, 18)));
        assert_eq!(kernel("6.1-rc3"), Some((6, 1)));
        assert_eq!(kernel("x"), None);
    }
}
