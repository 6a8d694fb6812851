//! Sockets made in a pod's namespace for the proxy, which may not enter it: listeners, and fresh sockets for
//! connections.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use mesh_proto::node::Listener;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use ztunnel_ebpf::{MARK_DELIVERY, PORT_INBOUND_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND};

use super::capture::{Listeners, netns_cookie};
use super::netns::{Netns, NetnsError};

/// Connections that wait for the proxy, per listener; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Somebody listens on the proxy's port in the pod: the proxy of a former agent, or an application.
    #[error("port {0} is in use in the pod")]
    PortInUse(u16),
    /// The system call failed.
    #[error("cannot {what}: {source}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The listening sockets of one pod. The proxy has duplicates.
#[derive(Debug)]
pub struct ListenerSet {
    /// 15001.
    pub outbound: OwnedFd,
    /// 15006.
    pub inbound_plaintext: OwnedFd,
    /// 15008.
    pub inbound_hbone: OwnedFd,
}

impl ListenerSet {
    /// The kinds, in the order in which they are announced.
    pub const KINDS: [Listener; 3] = [Listener::Outbound, Listener::InboundPlaintext, Listener::InboundHbone];

    /// Opens them in a pod's namespace. Blocks shortly.
    ///
    /// # Errors
    /// [`SocketError::PortInUse`] is to be expected where a proxy outlived its agent.
    pub fn open(netns: &Netns) -> Result<Self, SocketError> {
        netns.run(|| {
            Ok(Self {
                outbound: listen(PORT_OUTBOUND, true)?,
                inbound_plaintext: listen(PORT_INBOUND_PLAINTEXT, true)?,
                inbound_hbone: listen(PORT_INBOUND_HBONE, false)?,
            })
        })?
    }

    /// Listeners that a proxy returned: one of each kind, on its port. Others are closed.
    #[must_use]
    pub fn returned(sockets: Vec<(Listener, OwnedFd)>) -> Option<Self> {
        let (mut outbound, mut inbound_plaintext, mut inbound_hbone) = (None, None, None);
        for (kind, socket) in sockets {
            let (slot, port) = match kind {
                Listener::Outbound => (&mut outbound, PORT_OUTBOUND),
                Listener::InboundPlaintext => (&mut inbound_plaintext, PORT_INBOUND_PLAINTEXT),
                Listener::InboundHbone => (&mut inbound_hbone, PORT_INBOUND_HBONE),
                Listener::DnsUdp | Listener::DnsTcp | Listener::Unspecified => continue,
            };
            let found = SockRef::from(&socket).local_addr().ok()?.as_socket()?.port();
            if found != port {
                return None;
            }
            *slot = Some(socket);
        }
        Some(Self { outbound: outbound?, inbound_plaintext: inbound_plaintext?, inbound_hbone: inbound_hbone? })
    }

    /// Whether all were made in the network namespace with this cookie.
    #[must_use]
    pub fn are_in(&self, cookie: u64) -> bool {
        self.descriptors().into_iter().all(|socket| netns_cookie(socket).is_ok_and(|found| found == cookie))
    }

    /// Borrowed, for the socket map.
    #[must_use]
    pub fn borrow(&self) -> Listeners<'_> {
        Listeners {
            outbound: self.outbound.as_fd(),
            inbound_plaintext: self.inbound_plaintext.as_fd(),
            inbound_hbone: self.inbound_hbone.as_fd(),
        }
    }

    /// In the order of [`Self::KINDS`].
    #[must_use]
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.outbound.as_fd(), self.inbound_plaintext.as_fd(), self.inbound_hbone.as_fd()]
    }
}

fn listen(port: u16, transparent: bool) -> Result<OwnedFd, SocketError> {
    let socket = tcp()?;
    socket.set_reuse_address(true).map_err(failed("set SO_REUSEADDR"))?;
    if transparent {
        socket.set_ip_transparent_v4(true).map_err(failed("set IP_TRANSPARENT"))?;
    }
    let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
    let in_use = |what| {
        move |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => SocketError::PortInUse(port),
            _ => SocketError::Socket { what, source },
        }
    };
    socket.bind(&address.into()).map_err(in_use("bind a listener"))?;
    socket.listen(BACKLOG).map_err(in_use("listen"))?;
    Ok(socket.into())
}

/// A socket for a connection to the next hop, in the calling thread's namespace. It must be exempted before it is used.
///
/// # Errors
/// When the kernel refuses.
pub fn upstream() -> Result<OwnedFd, SocketError> {
    Ok(tcp()?.into())
}

/// A socket that delivers to the pod's own application with the client's address, in the calling thread's namespace: it
/// may be bound to any address, stays on `lo` and carries the mark of deliveries. It must be exempted before it is
/// used.
///
/// # Errors
/// When the kernel refuses.
pub fn delivery() -> Result<OwnedFd, SocketError> {
    let socket = tcp()?;
    socket.set_ip_transparent_v4(true).map_err(failed("set IP_TRANSPARENT"))?;
    socket.set_reuse_address(true).map_err(failed("set SO_REUSEADDR"))?;
    socket.set_mark(MARK_DELIVERY).map_err(failed("set SO_MARK"))?;
    // Without the device the proxy's own packets look as if they came from outside, and it would capture itself.
    socket.bind_device(Some(b"lo")).map_err(failed("set SO_BINDTODEVICE"))?;
    // The port is chosen at connect, by the whole 4-tuple: bind alone becomes slow when many ports are taken.
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)
        .map_err(|errno| SocketError::Socket { what: "set IP_BIND_ADDRESS_NO_PORT", source: errno.into() })?;
    Ok(socket.into())
}

/// Non-blocking, close-on-exec, without delay of small segments.
fn tcp() -> Result<Socket, SocketError> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))
        .map_err(failed("make a TCP socket"))?;
    socket.set_tcp_nodelay(true).map_err(failed("set TCP_NODELAY"))?;
    Ok(socket)
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> SocketError {
    move |source| SocketError::Socket { what, source }
}
