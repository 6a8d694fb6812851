//! What the tests of this module stand on: bpffs and namespaces of their own on the real kernel. They need root.

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::TryStreamExt as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{LinkUnspec, LinkVeth};

use super::netns::Netns;

const PREFIX: &str = "culvert-agent-test-";

/// A folder with a bpffs in it, removed at the end; those that dead test processes left are removed at the start.
pub struct Scratch {
    folder: PathBuf,
}

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("{PREFIX}{}-{number}", std::process::id()));
        let bpffs = folder.join("bpf");
        fs::create_dir_all(&bpffs).unwrap();
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>)
            .expect("tests of the agent need root and bpffs");
        Self { folder }
    }

    pub fn bpffs(&self) -> PathBuf {
        self.folder.join("bpf")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

fn sweep() {
    for entry in fs::read_dir(cgroup_root()).unwrap().filter_map(Result::ok) {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            let _ = fs::remove_dir(entry.path());
        }
    }
    for entry in fs::read_dir(std::env::temp_dir()).unwrap().filter_map(Result::ok) {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let alive = rest.split('-').next().is_some_and(|pid| Path::new("/proc").join(pid).exists());
        if !alive {
            remove(&entry.path());
        }
    }
}

fn remove(folder: &Path) {
    let _ = umount2(&folder.join("bpf"), MntFlags::MNT_DETACH);
    let _ = fs::remove_dir_all(folder);
}

/// Where the cgroup v2 hierarchy is mounted. Programs at its root see every process; the tests' own only act in
/// namespaces that the tests enrolled.
pub fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup v2 is mounted");
    line.split(' ').nth(1).unwrap().into()
}

/// A network namespace with one address, joined to another by a veth pair.
pub struct TestPod {
    pub netns: Netns,
    pub address: Ipv4Addr,
}

pub const A: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 5);
pub const B: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 6);

/// Two pods on one link: [`A`] and [`B`].
pub fn pair() -> (TestPod, TestPod) {
    let (a, b) = (new_netns(), new_netns());
    let other = b.as_fd().as_raw_fd();
    configure(&a, async |handle| {
        handle.link().add(LinkVeth::new("eth0", "peer").build()).execute().await.unwrap();
        let index = index_of(&handle, "peer").await;
        handle.link().set(LinkUnspec::new_with_index(index).setns_by_fd(other).build()).execute().await.unwrap();
        address(&handle, "eth0", A).await;
    });
    configure(&b, async |handle| address(&handle, "peer", B).await);
    (TestPod { netns: a, address: A }, TestPod { netns: b, address: B })
}

/// A new namespace, alive as long as the value.
pub fn new_netns() -> Netns {
    let fd: OwnedFd = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        fs::File::open("/proc/thread-self/ns/net").unwrap().into()
    })
    .join()
    .unwrap();
    Netns::new(fd).unwrap()
}

fn configure(netns: &Netns, work: impl AsyncFnOnce(rtnetlink::Handle) + Send) {
    netns
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                tokio::spawn(connection);
                handle.link().set(LinkUnspec::new_with_index(1).up().build()).execute().await.unwrap();
                work(handle).await;
            });
        })
        .unwrap();
}

async fn index_of(handle: &rtnetlink::Handle, name: &str) -> u32 {
    let mut links = handle.link().get().match_name(name).execute();
    links.try_next().await.unwrap().unwrap().header.index
}

async fn address(handle: &rtnetlink::Handle, name: &str, address: Ipv4Addr) {
    let index = index_of(handle, name).await;
    handle.address().add(index, address.into(), 24).execute().await.unwrap();
    handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await.unwrap();
}
