//! What a node's processes see of the machine: its files, read as they are, with the node's own writes over them. A mount
//! namespace whose root is an overlay; the kernel takes all of it away with its last process.
//!
//! As on a machine of its own a node has `/run` (empty at first), `/etc`, `/opt/cni/bin`, `/var/lib/kubelet`,
//! `/var/lib/containerd`, `/var/log/pods`, a BPF filesystem on `/sys/fs/bpf`, and a `/sys` that shows its own links. The
//! control groups are the machine's.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, pivot_root};

use crate::Error;
use crate::error::Context;
use crate::mounts::MountNs;
use crate::netns::{NetNs, on_thread};

/// Written by the kubelet, with these values, and shared by the whole machine. A node sees files instead, which hold the
/// values already.
const TUNABLES: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Folders too large for memory: they lie in the node's folder on disk.
const ON_DISK: &[&str] = &["var/lib/containerd", "var/lib/kubelet", "var/log/pods"];

/// Makes the namespace. `disk`: an empty folder of the node's own, on a filesystem that can be the upper side of an
/// overlay; `network` decides which links `/sys` shows.
///
/// # Errors
/// The kernel refuses a mount; the text names it.
pub(super) fn create(disk: &Path, network: &NetNs) -> Result<MountNs, Error> {
    let root = disk.join("root");
    for folder in ON_DISK.iter().map(|folder| disk.join("disk").join(folder)).chain([root.clone(), disk.join("over")]) {
        make(&folder)?;
    }
    on_thread(|| {
        setns(network, CloneFlags::CLONE_NEWNET).during(|| "entering a node's network".to_owned())?;
        unshare(CloneFlags::CLONE_NEWNS).during(|| "making a mount namespace".to_owned())?;
        // What is mounted outside later is seen inside, never the other way round.
        attach(None, Path::new("/"), None, MsFlags::MS_SLAVE | MsFlags::MS_REC, None)?;
        let mounts = mount_points()?;
        lay_out(disk, &root, &mounts)?;
        enter(&root)?;
        hide_tunables()?;
        // So that what a pod mounts with `mountPropagation: Bidirectional` is seen by the node's other pods.
        attach(None, Path::new("/"), None, MsFlags::MS_SHARED | MsFlags::MS_REC, None)?;
        MountNs::of_thread()
    })?
}

fn lay_out(disk: &Path, root: &Path, mounts: &[PathBuf]) -> Result<(), Error> {
    // In memory, since an overlay's upper side may not lie below its lower one.
    let over = disk.join("over");
    let plain = MsFlags::MS_NODEV;
    attach(Some("tmpfs"), &over, Some("tmpfs"), plain, Some("mode=0755"))?;
    let (upper, work) = (over.join("upper"), over.join("work"));
    make(&upper)?;
    make(&work)?;
    let options = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
    attach(Some("overlay"), root, Some("overlay"), MsFlags::empty(), Some(&options))?;
    attach_run(&root.join("run"))?;
    attach(Some("sysfs"), &root.join("sys"), Some("sysfs"), MsFlags::MS_NOSUID | plain | MsFlags::MS_NOEXEC, None)?;
    // The overlay shows the root filesystem alone.
    let own = ["/", "/run", "/sys"].map(Path::new);
    for at in mounts.iter().filter(|at| !own.contains(&at.as_path())) {
        let below = |folder: &str| at.starts_with(folder) && at != Path::new(folder);
        let nested = mounts.iter().any(|other| at != other && at.starts_with(other) && !own.contains(&other.as_path()));
        let target = root.join(at.strip_prefix("/").unwrap_or(at));
        if nested || below("/run") || at == Path::new("/sys/fs/bpf") || !target.exists() {
            continue;
        }
        attach(at.to_str(), &target, None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
    }
    attach_bpf(&root.join("sys/fs/bpf"))?;
    for folder in ON_DISK {
        let target = root.join(folder);
        make(&target)?;
        attach(disk.join("disk").join(folder).to_str(), &target, None, MsFlags::MS_BIND, None)?;
    }
    for folder in ["etc/cni/net.d", "etc/containerd", "etc/kubernetes", "opt/cni/bin", "run/netns"] {
        make(&root.join(folder))?;
    }
    Ok(())
}

fn attach_run(at: &Path) -> Result<(), Error> {
    attach(Some("tmpfs"), at, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"))
}

fn attach_bpf(at: &Path) -> Result<(), Error> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    attach(Some("bpf"), at, Some("bpf"), safe, Some("mode=0700"))
}

/// What a machine forgets when its power goes: `/run` with the names of namespaces in it, everything pinned, the mounts of
/// pods' volumes. To be called in the node's namespace, when none of its processes is left.
///
/// # Errors
/// The kernel refuses to take a mount away, or to make it anew.
pub(super) fn forget() -> Result<(), Error> {
    let volumes = mount_points()?.into_iter().rev().filter(|at| at.starts_with("/var/lib/kubelet/pods"));
    let (run, bpf) = (Path::new("/run"), Path::new("/sys/fs/bpf"));
    for at in volumes.chain([run, bpf].map(Path::to_path_buf)) {
        // With all that is mounted below it.
        umount2(&at, MntFlags::MNT_DETACH).during(|| format!("taking {} away", at.display()))?;
    }
    attach_run(run)?;
    attach_bpf(bpf)?;
    make(Path::new("/run/netns"))
}

/// Makes `root` the root of the namespace, and forgets the machine's.
fn enter(root: &Path) -> Result<(), Error> {
    let what = || format!("making {} the root", root.display());
    chdir(root).during(what)?;
    // The old root is stacked over the new one, and removed from there: pivot_root(2), "pivot_root(".", ".")".
    pivot_root(".", ".").during(what)?;
    umount2(".", MntFlags::MNT_DETACH).during(what)?;
    chdir("/").during(what)
}

fn hide_tunables() -> Result<(), Error> {
    let folder = Path::new("/run/tunables");
    make(folder)?;
    for (name, value) in TUNABLES {
        let (from, to) = (folder.join(name.replace('/', ".")), Path::new("/proc/sys").join(name));
        if to.exists() {
            fs::write(&from, format!("{value}\n")).during(|| format!("writing {}", from.display()))?;
            attach(from.to_str(), &to, None, MsFlags::MS_BIND, None)?;
        }
    }
    Ok(())
}

fn attach(
    from: Option<&str>,
    at: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), Error> {
    mount(from, at, kind, flags, options)
        .during(|| format!("mounting {} on {}", kind.or(from).unwrap_or(""), at.display()))
}

fn make(folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).during(|| format!("making {}", folder.display()))
}

/// Where something is mounted, each place once, in the order in which it was mounted.
fn mount_points() -> Result<Vec<PathBuf>, Error> {
    let table = fs::read_to_string("/proc/self/mountinfo").during(|| "reading the mounts".to_owned())?;
    let mut found: Vec<PathBuf> = Vec::new();
    for at in table.lines().filter_map(|line| line.split(' ').nth(4)) {
        // proc(5): blanks are written in octal.
        let at = PathBuf::from(at.replace("\\040", " "));
        if !found.contains(&at) {
            found.push(at);
        }
    }
    Ok(found)
}
