//! A connection that must be captured, made before the agent says that it is ready: programs can be loaded, attached and
//! reported in place, and still see nothing (another cgroup root than the host's is the usual reason).

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use ztunnel_ebpf::PodEntry;

use super::capture::{Attachment, CaptureError, NodeCapture, Route};
use super::netns::{Netns, NetnsError};
use super::pod_network::{self, Needs, PodNetworkError};
use super::sockets::{ListenerSet, SocketError};

/// The address of the pod that is played (RFC 5737: for documentation).
const POD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Where its connection goes; nobody is there.
const DESTINATION: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Everything happens inside this kernel: this is for a machine under load.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why the connection was not captured.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// No network namespace could be made for it.
    #[error("cannot make a network namespace for the test connection: {0}")]
    Namespace(#[source] io::Error),
    /// It could not be used.
    #[error("test connection: {0}")]
    Netns(#[from] NetnsError),
    /// It could not be prepared.
    #[error("test connection: {0}")]
    Network(#[from] PodNetworkError),
    /// No listeners.
    #[error("test connection: {0}")]
    Socket(#[from] SocketError),
    /// The kernel refused programs or maps.
    #[error("test connection: {0}")]
    Capture(#[from] CaptureError),
    /// It went elsewhere.
    #[error(
        "a test connection was not captured although everything is in place ({0}); is --cgroup-root the root of the \
         host's cgroup v2 hierarchy, and this process below it?"
    )]
    NotCaptured(io::Error),
}

/// Plays a pod in a namespace of its own and opens a connection there. Leaves nothing behind. Blocks.
///
/// # Errors
/// When the connection did not reach the listener of a proxy, or could not be made.
pub fn run(node: &NodeCapture) -> Result<(), SelfTestError> {
    let netns = Netns::new(new_netns()?)?;
    let address = IpAddr::V4(POD);
    pod_network::add_loopback_address(&netns, address)?;
    pod_network::prepare(&netns, &Needs { addresses: &[address], dns: false })?;
    let listeners = ListenerSet::open(&netns, false)?;
    let uid = format!("self-test-{}", std::process::id());
    let entry = PodEntry::new(&[address], 0, 0).unwrap_or_default();
    let everywhere = Route { address: Ipv4Addr::UNSPECIFIED.into(), prefix: 0, captured: true };
    let told = node.set_routes(netns.cookie(), &[everywhere]);
    // Nothing leaves a namespace without a device: it needs no guard.
    let attachment = Attachment { uid: &uid, netns: &netns, entry, listeners: listeners.borrow(), guard: None };
    let capture = told.and_then(|()| node.attach_pod(attachment));
    let captured = netns.run(|| connect(listeners.outbound));
    // Both are undone whatever came of the connection; the namespace takes the rest with it.
    let (released, unpinned) = (node.release(netns.cookie()), node.unpin_pod(&uid));
    capture?;
    captured?.map_err(SelfTestError::NotCaptured)?;
    released?;
    Ok(unpinned?)
}

fn new_netns() -> Result<OwnedFd, SelfTestError> {
    let made = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    });
    made.map_err(SelfTestError::Namespace)
}

/// Connects, and takes the connection from the listener of the proxy.
fn connect(listener: OwnedFd) -> io::Result<()> {
    let destination = SocketAddr::from((DESTINATION, 9));
    let listener = TcpListener::from(listener);
    let client = TcpStream::connect_timeout(&destination, PATIENCE)?;
    let timeout = PollTimeout::try_from(PATIENCE).map_err(io::Error::other)?;
    poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], timeout)?;
    let (accepted, peer) = listener.accept()?;
    // A socket for both families tells IPv4 as IPv6 has it.
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    if canonical(accepted.local_addr()?) == destination && canonical(peer) == client.local_addr()? {
        Ok(())
    } else {
        Err(io::Error::other("another connection arrived"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::testing::{Cgroup, Scratch, cgroup_root};

    #[test]
    fn connection_is_captured_and_nothing_is_left() {
        let scratch = Scratch::new();
        let node = NodeCapture::open(&scratch.bpffs(), &cgroup_root(), None, false).unwrap();
        run(&node).unwrap();
        assert_eq!(node.cookies().unwrap(), Vec::<u64>::new());
        assert!(node.held().unwrap().is_empty());
    }

    #[test]
    fn cgroup_that_this_process_is_not_in_is_noticed() {
        let scratch = Scratch::new();
        let elsewhere = Cgroup::new("self-test");
        let node = NodeCapture::open(&scratch.bpffs(), &elsewhere.0, None, false).unwrap();
        let (result, held, cookies) = (run(&node), node.held(), node.cookies());
        assert!(matches!(result, Err(SelfTestError::NotCaptured(_))), "{result:?}");
        assert_eq!((held.unwrap().len(), cookies.unwrap().len()), (0, 0));
    }
}
