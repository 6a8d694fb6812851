//! Sockets made in a pod's namespace for the proxy, which may not enter it: listeners, and fresh sockets for
//! connections.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use mesh_proto::node::Listener;
use nix::sys::socket::{SetSockOpt, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use ztunnel_ebpf::{
    MARK_DELIVERY, MARK_DNS, PORT_DNS, PORT_INBOUND_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND, PORT_RESOLVER,
};

use super::capture::{Listeners, netns_cookie};
use super::netns::{Netns, NetnsError};

/// The kinds of listeners, in the order in which they are announced.
const KINDS: [Listener; 5] =
    [Listener::Outbound, Listener::InboundPlaintext, Listener::InboundHbone, Listener::DnsUdp, Listener::DnsTcp];

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
    /// Answers of a resolver with this address cannot be sent in the pod.
    #[error("{0} is no address of a resolver whose answers could come from outside")]
    Resolver(IpAddr),
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

/// The listening sockets of one pod, each for both families. The proxy has duplicates.
#[derive(Debug)]
pub struct ListenerSet {
    /// 15001.
    pub outbound: OwnedFd,
    /// 15006.
    pub inbound_plaintext: OwnedFd,
    /// 15008.
    pub inbound_hbone: OwnedFd,
    /// 15053, UDP and TCP; none where DNS is not the mesh's.
    pub dns: Option<DnsListeners>,
    /// For IPv6 alone, each beside one of the same kind that serves only IPv4: agents before layout 2 opened those.
    pub v6: Vec<(Listener, OwnedFd)>,
}

/// The listening sockets for DNS.
#[derive(Debug)]
pub struct DnsListeners {
    /// Queries, each with the address of the resolver that was asked (`IP_RECVORIGDSTADDR`).
    pub udp: OwnedFd,
    /// Captured connections to port 53.
    pub tcp: OwnedFd,
}

impl ListenerSet {
    /// Opens them in a pod's namespace. Blocks shortly.
    ///
    /// # Errors
    /// [`SocketError::PortInUse`] is to be expected where a proxy outlived its agent.
    pub fn open(netns: &Netns, dns: bool) -> Result<Self, SocketError> {
        netns.run(|| {
            Ok(Self {
                outbound: listen(PORT_OUTBOUND, true, Serving::Both)?,
                inbound_plaintext: listen(PORT_INBOUND_PLAINTEXT, true, Serving::Both)?,
                inbound_hbone: listen(PORT_INBOUND_HBONE, false, Serving::Both)?,
                dns: if dns { Some(DnsListeners::open_here()?) } else { None },
                v6: Vec::new(),
            })
        })?
    }

    /// Listeners that a proxy returned: one of each kind, on its port, and beside it one for IPv6 alone; those for DNS may be
    /// missing. Others are closed.
    #[must_use]
    pub fn returned(sockets: Vec<(Listener, OwnedFd)>) -> Option<Self> {
        let (mut outbound, mut inbound_plaintext, mut inbound_hbone) = (None, None, None);
        let (mut dns_udp, mut dns_tcp) = (None, None);
        let mut v6 = Vec::new();
        for (kind, socket) in sockets {
            let (slot, port) = match kind {
                Listener::Outbound => (&mut outbound, PORT_OUTBOUND),
                Listener::InboundPlaintext => (&mut inbound_plaintext, PORT_INBOUND_PLAINTEXT),
                Listener::InboundHbone => (&mut inbound_hbone, PORT_INBOUND_HBONE),
                Listener::DnsUdp => (&mut dns_udp, PORT_DNS),
                Listener::DnsTcp => (&mut dns_tcp, PORT_DNS),
                Listener::Unspecified => continue,
            };
            let wanted = if kind == Listener::DnsUdp { Type::DGRAM } else { Type::STREAM };
            let found = SockRef::from(&socket);
            let port_found = found.local_addr().ok()?.as_socket()?.port();
            if port_found != port || found.r#type().ok()? != wanted {
                return None;
            }
            if !serves_only_v6(&socket) {
                *slot = Some(socket);
            } else if !v6.iter().any(|(known, _)| *known == kind) {
                v6.push((kind, socket));
            }
        }
        let dns = dns_udp.zip(dns_tcp).map(|(udp, tcp)| DnsListeners { udp, tcp });
        let (outbound, inbound_plaintext, inbound_hbone) = (outbound?, inbound_plaintext?, inbound_hbone?);
        Some(Self { outbound, inbound_plaintext, inbound_hbone, dns, v6 })
    }

    /// The same with what it lacks of what is needed: those that a proxy returned may be of a time without DNS, or without
    /// IPv6.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn completed(listeners: Arc<Self>, netns: &Netns, needs: Needs) -> Result<Arc<Self>, SocketError> {
        if !listeners.lacks_dns(needs) && listeners.without_v6(needs).is_empty() {
            return Ok(listeners);
        }
        let duplicate = |socket: BorrowedFd<'_>| socket.try_clone_to_owned().map_err(failed("duplicate a listener"));
        let dns = match &listeners.dns {
            Some(dns) => Some(DnsListeners { udp: duplicate(dns.udp.as_fd())?, tcp: duplicate(dns.tcp.as_fd())? }),
            None if needs.dns => Some(netns.run(DnsListeners::open_here)??),
            None => None,
        };
        let v6 = listeners.v6.iter().map(|(kind, socket)| Ok((*kind, duplicate(socket.as_fd())?)));
        let mut v6 = v6.collect::<Result<Vec<_>, SocketError>>()?;
        let lacking = listeners.without_v6(needs);
        v6.extend(netns.run(|| lacking.into_iter().map(open_v6).collect::<Result<Vec<_>, _>>())??);
        Ok(Arc::new(Self {
            outbound: duplicate(listeners.outbound.as_fd())?,
            inbound_plaintext: duplicate(listeners.inbound_plaintext.as_fd())?,
            inbound_hbone: duplicate(listeners.inbound_hbone.as_fd())?,
            dns,
            v6,
        }))
    }

    /// Whether it has no listeners for DNS although they are needed.
    #[must_use]
    pub const fn lacks_dns(&self, needs: Needs) -> bool {
        needs.dns && self.dns.is_none()
    }

    /// The kinds that nobody serves in IPv6 although it is needed.
    #[must_use]
    pub fn without_v6(&self, needs: Needs) -> Vec<Listener> {
        if !needs.v6 {
            return Vec::new();
        }
        let served = |kind| self.v6.iter().any(|(known, _)| *known == kind);
        let all = self.kinds().into_iter().zip(self.descriptors());
        all.filter(|(kind, socket)| serves_only_v4(socket) && !served(*kind)).map(|(kind, _)| kind).collect()
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
            dns_udp: self.dns.as_ref().map(|dns| dns.udp.as_fd()),
            dns_tcp: self.dns.as_ref().map(|dns| dns.tcp.as_fd()),
            v6: KINDS.map(|kind| self.v6.iter().find(|(known, _)| *known == kind).map(|(_, socket)| socket.as_fd())),
        }
    }

    /// The kinds, in the order in which they are announced.
    #[must_use]
    pub fn kinds(&self) -> Vec<Listener> {
        let mut kinds = vec![Listener::Outbound, Listener::InboundPlaintext, Listener::InboundHbone];
        if self.dns.is_some() {
            kinds.extend([Listener::DnsUdp, Listener::DnsTcp]);
        }
        kinds.extend(self.v6.iter().map(|(kind, _)| *kind));
        kinds
    }

    /// In the order of [`Self::kinds`]: those for IPv6 alone come last.
    #[must_use]
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut all = vec![self.outbound.as_fd(), self.inbound_plaintext.as_fd(), self.inbound_hbone.as_fd()];
        all.extend(self.dns.iter().flat_map(|dns| [dns.udp.as_fd(), dns.tcp.as_fd()]));
        all.extend(self.v6.iter().map(|(_, socket)| socket.as_fd()));
        all
    }
}

impl DnsListeners {
    fn open_here() -> Result<Self, SocketError> {
        Ok(Self { udp: open_dns_udp(Serving::Both)?, tcp: listen(PORT_DNS, true, Serving::Both)? })
    }
}

/// A listener for IPv6 alone, in the calling thread's namespace.
fn open_v6(kind: Listener) -> Result<(Listener, OwnedFd), SocketError> {
    let socket = match kind {
        Listener::Outbound => listen(PORT_OUTBOUND, true, Serving::V6),
        Listener::InboundPlaintext => listen(PORT_INBOUND_PLAINTEXT, true, Serving::V6),
        Listener::InboundHbone | Listener::Unspecified => listen(PORT_INBOUND_HBONE, false, Serving::V6),
        Listener::DnsUdp => open_dns_udp(Serving::V6),
        Listener::DnsTcp => listen(PORT_DNS, true, Serving::V6),
    };
    Ok((kind, socket?))
}

fn open_dns_udp(serving: Serving) -> Result<OwnedFd, SocketError> {
    let (udp, family) = listening(Type::DGRAM, Protocol::UDP, serving)?;
    udp.set_reuse_address(true).map_err(failed("set SO_REUSEADDR"))?;
    transparent(&udp, family)?;
    set(&udp, sockopt::Ipv4OrigDstAddr, "set IP_RECVORIGDSTADDR")?;
    if family == Family::V6 {
        set(&udp, sockopt::Ipv6OrigDstAddr, "set IPV6_RECVORIGDSTADDR")?;
    }
    udp.bind(&family.any(PORT_DNS).into()).map_err(in_use("bind the listener for DNS", PORT_DNS))?;
    Ok(udp.into())
}

fn listen(port: u16, is_transparent: bool, serving: Serving) -> Result<OwnedFd, SocketError> {
    let (socket, family) = listening(Type::STREAM, Protocol::TCP, serving)?;
    set_no_delay(&socket)?;
    socket.set_reuse_address(true).map_err(failed("set SO_REUSEADDR"))?;
    if is_transparent {
        transparent(&socket, family)?;
    }
    socket.bind(&family.any(port).into()).map_err(in_use("bind a listener", port))?;
    socket.listen(BACKLOG).map_err(in_use("listen", port))?;
    Ok(socket.into())
}

/// Which families a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Serving {
    /// Both, or IPv4 alone where the kernel has no IPv6.
    Both,
    /// IPv6 alone.
    V6,
}

/// What of a pod decides which listeners it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Those for DNS too.
    pub dns: bool,
    /// Whether it has an address of IPv6.
    pub v6: bool,
}

fn listening(kind: Type, protocol: Protocol, serving: Serving) -> Result<(Socket, Family), SocketError> {
    match Socket::new(Domain::IPV6, kind.nonblocking(), Some(protocol)) {
        Ok(socket) => {
            socket.set_only_v6(serving == Serving::V6).map_err(failed("set or clear IPV6_V6ONLY"))?;
            Ok((socket, Family::V6))
        }
        Err(error) if serving == Serving::Both && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            Ok((socket(Family::V4, kind, protocol)?, Family::V4))
        }
        Err(error) => Err(failed("make a listener")(error)),
    }
}

fn serves_only_v4(socket: &impl AsFd) -> bool {
    SockRef::from(socket).domain().is_ok_and(|domain| domain == Domain::IPV4)
}

fn serves_only_v6(socket: &impl AsFd) -> bool {
    let known = SockRef::from(socket);
    known.domain().is_ok_and(|domain| domain == Domain::IPV6) && known.only_v6().unwrap_or(false)
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    const fn domain(self) -> Domain {
        match self {
            Self::V4 => Domain::IPV4,
            Self::V6 => Domain::IPV6,
        }
    }

    fn any(self, port: u16) -> SocketAddr {
        match self {
            Self::V4 => (Ipv4Addr::UNSPECIFIED, port).into(),
            Self::V6 => (Ipv6Addr::UNSPECIFIED, port).into(),
        }
    }
}

/// A socket for a connection to the next hop, in the calling thread's namespace. It must be exempted before it is used.
///
/// # Errors
/// When the kernel refuses.
pub fn upstream(family: Family) -> Result<OwnedFd, SocketError> {
    let socket = socket(family, Type::STREAM, Protocol::TCP)?;
    set_no_delay(&socket)?;
    Ok(socket.into())
}

/// A socket that delivers to the pod's own application with the client's address, in the calling thread's namespace: it
/// may be bound to any address, stays on `lo` and carries the mark of deliveries. It must be exempted before it is
/// used.
///
/// # Errors
/// When the kernel refuses.
pub fn delivery(family: Family) -> Result<OwnedFd, SocketError> {
    let socket = socket(family, Type::STREAM, Protocol::TCP)?;
    set_no_delay(&socket)?;
    transparent(&socket, family)?;
    socket.set_reuse_address(true).map_err(failed("set SO_REUSEADDR"))?;
    socket.set_mark(MARK_DELIVERY).map_err(failed("set SO_MARK"))?;
    // Without the device the proxy's own packets look as if they came from outside, and it would capture itself.
    socket.bind_device(Some(b"lo")).map_err(failed("set SO_BINDTODEVICE"))?;
    // The port is chosen at connect, by the whole 4-tuple: bind alone becomes slow when many ports are taken.
    set(&socket, sockopt::IpBindAddressNoPort, "set IP_BIND_ADDRESS_NO_PORT")?;
    Ok(socket.into())
}

/// A UDP socket for queries to a resolver, in the calling thread's namespace. Its mark keeps them from the proxy.
///
/// # Errors
/// When the kernel refuses.
pub fn dns_upstream(family: Family) -> Result<OwnedFd, SocketError> {
    let socket = socket(family, Type::DGRAM, Protocol::UDP)?;
    socket.set_mark(MARK_DNS).map_err(failed("set SO_MARK"))?;
    Ok(socket.into())
}

/// A UDP socket for answers in the name of a resolver, in the calling thread's namespace: bound to its address and port
/// 53, and to `lo`, with the mark of deliveries, so that nothing leaves the pod by it.
///
/// # Errors
/// [`SocketError::Resolver`] when nobody's answers come from such an address; when the kernel refuses, for one because a
/// server of the pod's own holds port 53 of all addresses.
pub fn dns_reply(resolver: IpAddr, own: &[IpAddr]) -> Result<OwnedFd, SocketError> {
    let resolver = resolver.to_canonical();
    let unusable = resolver.is_loopback()
        || resolver.is_unspecified()
        || resolver.is_multicast()
        || resolver == IpAddr::V4(Ipv4Addr::BROADCAST)
        || own.contains(&resolver);
    if unusable {
        return Err(SocketError::Resolver(resolver));
    }
    let family = if resolver.is_ipv4() { Family::V4 } else { Family::V6 };
    let socket = socket(family, Type::DGRAM, Protocol::UDP)?;
    transparent(&socket, family)?;
    socket.set_reuse_address(true).map_err(failed("set SO_REUSEADDR"))?;
    socket.bind_device(Some(b"lo")).map_err(failed("set SO_BINDTODEVICE"))?;
    // In IPv6 the pod's own addresses are not on `lo`: without the mark's table there is no way to them by it.
    socket.set_mark(MARK_DELIVERY).map_err(failed("set SO_MARK"))?;
    let address = SocketAddr::from((resolver, PORT_RESOLVER));
    socket.bind(&address.into()).map_err(in_use("bind to a resolver's address", PORT_RESOLVER))?;
    Ok(socket.into())
}

/// Non-blocking, close-on-exec.
fn socket(family: Family, kind: Type, protocol: Protocol) -> Result<Socket, SocketError> {
    Socket::new(family.domain(), kind.nonblocking(), Some(protocol)).map_err(failed("make a socket"))
}

/// Without delay of small segments.
fn set_no_delay(socket: &Socket) -> Result<(), SocketError> {
    socket.set_tcp_nodelay(true).map_err(failed("set TCP_NODELAY"))
}

fn transparent(socket: &Socket, family: Family) -> Result<(), SocketError> {
    match family {
        Family::V4 => socket.set_ip_transparent_v4(true).map_err(failed("set IP_TRANSPARENT")),
        Family::V6 => socket.set_ip_transparent_v6(true).map_err(failed("set IPV6_TRANSPARENT")),
    }
}

fn set(socket: &Socket, option: impl SetSockOpt<Val = bool>, what: &'static str) -> Result<(), SocketError> {
    setsockopt(socket, option, &true).map_err(|errno| SocketError::Socket { what, source: errno.into() })
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> SocketError {
    move |source| SocketError::Socket { what, source }
}

fn in_use(what: &'static str, port: u16) -> impl Fn(io::Error) -> SocketError {
    move |source| match source.kind() {
        io::ErrorKind::AddrInUse => SocketError::PortInUse(port),
        _ => SocketError::Socket { what, source },
    }
}
