//! Network namespaces, held as file descriptors: when their holders are gone, even by `kill -9`, the kernel removes
//! the namespace with all links, rules and attached programs. Nothing has a name on the machine.

use std::fs::File;
use std::future::Future;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

use crate::Error;
use crate::error::Context;
use crate::families::Families;

/// One network namespace.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
    label: String,
}

impl NetNs {
    /// Makes an empty namespace; `label` is for messages only. Loopback is up, IPv6 is off.
    ///
    /// # Errors
    /// The kernel refuses (no CAP_SYS_ADMIN, no memory).
    pub fn create(label: impl Into<String>) -> Result<Self, Error> {
        Self::create_for(Families::V4, label)
    }

    /// As [`NetNs::create`], with IPv6 if `families` has it: addresses are usable at once (no duplicate detection).
    ///
    /// # Errors
    /// As [`NetNs::create`].
    pub fn create_for(families: Families, label: impl Into<String>) -> Result<Self, Error> {
        let label = label.into();
        let made = on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).during(|| format!("making network namespace {label}"))?;
            File::open("/proc/thread-self/ns/net").during(|| format!("opening network namespace {label}"))
        })??;
        let namespace = Self { fd: made.into(), label };
        if families.v6() {
            for (name, value) in [("all/disable_ipv6", "0"), ("default/disable_ipv6", "0"), ("default/accept_dad", "0")]
            {
                namespace.sysctl(&format!("net/ipv6/conf/{name}"), value)?;
            }
        } else {
            // A kernel without IPv6 has no such setting.
            let _ = namespace.sysctl("net/ipv6/conf/all/disable_ipv6", "1");
        }
        namespace.netlink(|handle| async move { crate::links::up(&handle, "lo").await })?;
        Ok(namespace)
    }

    /// That of a process. It lives at least as long as this.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of_process(pid: u32, label: impl Into<String>) -> Result<Self, Error> {
        let label = label.into();
        let file = File::open(format!("/proc/{pid}/ns/net")).during(|| format!("opening network namespace {label}"))?;
        Ok(Self { fd: file.into(), label })
    }

    /// Runs `work` on a thread of its own inside the namespace and gives its result. Sockets made there stay in the
    /// namespace wherever they are used afterwards.
    ///
    /// The thread is in the harness's cgroup, not in a pod's, so its connections are not captured by the mesh; use a
    /// process ([`crate::pod::Pod::run`]) for those.
    ///
    /// # Errors
    /// The namespace cannot be entered, or `work` panicked.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
        on_thread(|| {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)
                .during(|| format!("entering network namespace {}", self.label))?;
            Ok(work())
        })?
    }

    /// Runs `work` with a route-netlink handle of this namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered, the socket cannot be made, or `work` fails.
    pub fn netlink<T, F>(&self, work: impl FnOnce(rtnetlink::Handle) -> F + Send) -> Result<T, Error>
    where
        T: Send,
        F: Future<Output = Result<T, Error>>,
    {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.during(|| "making a runtime".to_owned())?.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().during(|| "opening netlink".to_owned())?;
                let connection = tokio::spawn(connection);
                let done = work(handle).await;
                connection.abort();
                done
            })
        })?
    }

    /// Writes `/proc/sys/<name>` as seen in this namespace.
    ///
    /// # Errors
    /// No such setting, or the value is refused.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<(), Error> {
        let path = PathBuf::from("/proc/sys").join(name);
        self.run(|| std::fs::write(&path, value).during(|| format!("setting {} to {value}", path.display())))?
    }

    /// Connects from inside the namespace, within `bound`. Not captured by the mesh (see [`NetNs::run`]).
    ///
    /// # Errors
    /// As [`TcpStream::connect_timeout`].
    pub fn connect(&self, to: SocketAddr, bound: Duration) -> Result<TcpStream, Error> {
        self.run(|| TcpStream::connect_timeout(&to, bound).during(|| format!("connecting to {to}")))?
    }

    /// Listens inside the namespace.
    ///
    /// # Errors
    /// As [`TcpListener::bind`].
    pub fn listen(&self, at: SocketAddr) -> Result<TcpListener, Error> {
        self.run(|| TcpListener::bind(at).during(|| format!("listening at {at}")))?
    }

    /// A path of the namespace, valid while the harness lives: for `nsenter --net=<path>`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()))
    }

    /// What messages call it.
    pub fn label(&self) -> &str {
        &self.label
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Runs `work` on a thread that ends with it, so that whatever namespace the thread entered is left again.
pub(crate) fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("in-namespace".to_owned()).spawn_scoped(scope, work);
        match thread.during(|| "starting a thread".to_owned())?.join() {
            Ok(value) => Ok(value),
            // A failed assertion inside the closure fails the test that made it.
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
