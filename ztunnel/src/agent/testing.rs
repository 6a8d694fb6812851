//! What the tests of this module stand on: bpffs and namespaces of their own on the real kernel. They need root.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::TryStreamExt as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::{LinkUnspec, LinkVeth, RouteMessageBuilder};

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

    /// Gives a namespace a path, as runtimes do.
    pub fn name(&self, pod: &TestPod, name: &str) -> PathBuf {
        let path = self.path("netns").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        let open = format!("/proc/self/fd/{}", pod.netns.as_fd().as_raw_fd());
        mount(Some(open.as_str()), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        path
    }
}

/// Takes a namespace's path away, as runtimes do.
pub fn unname(path: &Path) {
    umount2(path, MntFlags::MNT_DETACH).unwrap();
    fs::remove_file(path).unwrap();
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
            // They can only be removed empty; files of a cgroup are none of it.
            for child in fs::read_dir(entry.path()).into_iter().flatten().filter_map(Result::ok) {
                let _ = fs::remove_dir(child.path());
            }
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
    for name in fs::read_dir(folder.join("netns")).into_iter().flatten().filter_map(Result::ok) {
        let _ = umount2(&name.path(), MntFlags::MNT_DETACH);
    }
    let _ = fs::remove_dir_all(folder);
}

/// Where the cgroup v2 hierarchy is mounted. Programs at its root see every process; the tests' own only act in
/// namespaces that the tests enrolled.
pub fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup v2 is mounted");
    line.split(' ').nth(1).unwrap().into()
}

/// A cgroup of its own below the root, removed at the end.
pub struct Cgroup(pub PathBuf);

impl Cgroup {
    pub fn new(name: &str) -> Self {
        sweep();
        let path = cgroup_root().join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let path = path.join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        fs::remove_dir(&self.0).unwrap();
        // The last one takes the folder with it.
        let _ = self.0.parent().map(fs::remove_dir);
    }
}

/// A network namespace with an address of each family, joined to another by a veth pair.
pub struct TestPod {
    pub netns: Netns,
    pub address: Ipv4Addr,
}

pub const A: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 5);
pub const B: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 6);
pub const A6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 5);
pub const B6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 6);

/// Two pods on one link: [`A`] and [`B`].
pub fn pair() -> (TestPod, TestPod) {
    let (a, b) = (new_netns(), new_netns());
    join(&a, &b, "eth0", "peer");
    give(&a, "eth0", A, A6);
    give(&b, "peer", B, B6);
    (TestPod { netns: a, address: A }, TestPod { netns: b, address: B })
}

/// Addresses of a second network: of pod A, and of its neighbour there.
pub const C: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 5);
pub const D: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 6);
pub const C6: Ipv6Addr = Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, 5);
pub const D6: Ipv6Addr = Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, 6);

/// Joins two pods once more: `net1` of the first with [`C`], `peer1` of the other with [`D`].
pub fn second_link(a: &TestPod, b: &TestPod) {
    join(&a.netns, &b.netns, "net1", "peer1");
    give(&a.netns, "net1", C, C6);
    give(&b.netns, "peer1", D, D6);
}

/// A node and a pod, [`A`], whose interface has its other end, `host0`, in the node's namespace, with the addresses [`B`].
/// All of the pod's routes lead there.
pub fn node_and_pod() -> (TestPod, TestPod) {
    let (a, node) = (new_netns(), new_netns());
    join(&a, &node, "eth0", "host0");
    give(&node, "host0", B, B6);
    give(&a, "eth0", A, A6);
    configure(&a, async |handle| {
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::UNSPECIFIED, 0).gateway(B);
        handle.route().add(v4.build()).execute().await.unwrap();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(Ipv6Addr::UNSPECIFIED, 0).gateway(B6);
        handle.route().add(v6.build()).execute().await.unwrap();
    });
    (TestPod { netns: node, address: B }, TestPod { netns: a, address: A })
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

/// Makes a veth pair, one end in each namespace.
fn join(a: &Netns, b: &Netns, name_a: &str, name_b: &str) {
    let other = b.as_fd().as_raw_fd();
    configure(a, async |handle| {
        handle.link().add(LinkVeth::new(name_a, name_b).build()).execute().await.unwrap();
        let index = index_of(&handle, name_b).await;
        handle.link().set(LinkUnspec::new_with_index(index).setns_by_fd(other).build()).execute().await.unwrap();
    });
    configure(b, async |_| {});
}

/// Gives an interface its addresses and sets it up.
pub fn give(netns: &Netns, name: &str, v4: Ipv4Addr, v6: Ipv6Addr) {
    configure(netns, async |handle| {
        let index = index_of(&handle, name).await;
        handle.address().add(index, v4.into(), 24).execute().await.unwrap();
        let mut request = handle.address().add(index, v6.into(), 64);
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        request.execute().await.unwrap();
        handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await.unwrap();
    });
}

pub fn configure(netns: &Netns, work: impl AsyncFnOnce(rtnetlink::Handle) + Send) {
    // Not made inside: the first runtime of a process makes a pair of sockets for signals, which are never closed and
    // would hold the namespace.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    netns
        .run(|| {
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                tokio::spawn(connection);
                handle.link().set(LinkUnspec::new_with_index(1).up().build()).execute().await.unwrap();
                work(handle).await;
            });
        })
        .unwrap();
}

pub async fn index_of(handle: &rtnetlink::Handle, name: &str) -> u32 {
    let mut links = handle.link().get().match_name(name).execute();
    links.try_next().await.unwrap().unwrap().header.index
}
