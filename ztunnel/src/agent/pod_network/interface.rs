//! The interface that holds a pod's address, and its other end on the node.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd as _};

use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::nsid::{NsidAttribute, NsidMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{LOOPBACK, PodNetworkError, failed, mirror};
use crate::agent::netlink::Netlink;
use crate::agent::netns::Netns;

/// The interface of a pod: the one that holds its address, or, where that is `lo`, the one by which its packets leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index in the pod's namespace. That of `lo` only where nothing leaves.
    pub index: u32,
    /// Whether `lo` holds the address, and no other interface does.
    pub is_on_loopback: bool,
    /// The index of its other end, if it is a veth (or the like) whose other end is in the namespace that was given.
    pub host_end: Option<u32>,
}

/// Finds the interface that holds an address of a pod. Does not block.
///
/// `node`: the namespace in which the host end is looked for, the agent's own.
///
/// # Errors
/// When the kernel refuses; [`PodNetworkError::NoInterface`] when no interface has the address;
/// [`PodNetworkError::SeveralWays`] when `lo` has it and packets leave by more than one.
pub fn find(netns: &Netns, address: IpAddr, node: &impl AsFd) -> Result<Interface, PodNetworkError> {
    let mut netlink = netns.route();
    let holder = holder(&mut netlink, address)?.ok_or(PodNetworkError::NoInterface(address))?;
    let is_on_loopback = holder == LOOPBACK;
    let index = if is_on_loopback { way_out(&mut netlink, address)? } else { holder };
    if index == LOOPBACK {
        return Ok(Interface { index, is_on_loopback, host_end: None });
    }
    let link = link(&mut netlink, index)?;
    let other = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) if *index != 0 => Some(*index),
        _ => None,
    });
    // Absent where both ends are in one namespace.
    let id = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkNetNsId(id) => Some(*id),
        _ => None,
    });
    let host_end = match (other, id) {
        (Some(other), Some(id)) if Some(id) == id_of(&mut netlink, node)? => Some(other),
        (Some(_) | None, _) => None,
    };
    Ok(Interface { index, is_on_loopback, host_end })
}

impl Interface {
    /// Whether anything can leave the pod by it.
    #[must_use]
    pub const fn leads_out(self) -> bool {
        self.index != LOOPBACK
    }
}

/// Whether one of these addresses was added just now and is still looked for elsewhere in the link (IPv6's detection of
/// duplicates): it cannot be used yet.
///
/// # Errors
/// When the kernel refuses.
pub fn is_settling(netns: &Netns, addresses: &[IpAddr]) -> Result<bool, PodNetworkError> {
    let found = list(&mut netns.route())?;
    Ok(found
        .iter()
        .filter(|message| is_tentative(message))
        .any(|message| addresses.iter().any(|wanted| holds(message, *wanted))))
}

/// Whether `lo` is up.
pub fn is_loopback_up(netlink: &mut Netlink) -> Result<bool, PodNetworkError> {
    Ok(link(netlink, LOOPBACK)?.header.flags.contains(LinkFlags::Up))
}

/// An address that `lo` has as well is the other interface's: it is by that one that packets leave.
fn holder(netlink: &mut Netlink, address: IpAddr) -> Result<Option<u32>, PodNetworkError> {
    let all = list(netlink)?;
    let holders = || all.iter().filter(|message| holds(message, address)).map(|message| message.header.index);
    Ok(holders().find(|index| *index != LOOPBACK).or_else(|| holders().next()))
}

/// The interface by which a namespace is left whose address is on `lo`; `lo` itself if by none.
fn way_out(netlink: &mut Netlink, address: IpAddr) -> Result<u32, PodNetworkError> {
    let ways = mirror::ways_out(netlink)?;
    if ways.len() > 1 {
        return Err(PodNetworkError::SeveralWays(address));
    }
    Ok(ways.first().copied().unwrap_or(LOOPBACK))
}

fn list(netlink: &mut Netlink) -> Result<Vec<AddressMessage>, PodNetworkError> {
    let answers = netlink.list(&RouteNetlinkMessage::GetAddress(AddressMessage::default()));
    let answers = answers.map_err(failed("cannot list addresses"))?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => Some(message),
            _ => None,
        })
        .collect())
}

/// On a link with a peer address, the local one is what counts.
fn holds(message: &AddressMessage, wanted: IpAddr) -> bool {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    local.or(address) == Some(wanted)
}

/// Whether an address will be usable soon. An optimistic one is already, and a duplicate never will be.
fn is_tentative(message: &AddressMessage) -> bool {
    // The attribute has the header's flags too, and more; before Linux 3.14 there is the header alone.
    let flags = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let flags = flags.unwrap_or_else(|| AddressFlags::from_bits_retain(message.header.flags.bits().into()));
    flags.contains(AddressFlags::Tentative) && !flags.intersects(AddressFlags::Optimistic | AddressFlags::Dadfailed)
}

fn link(netlink: &mut Netlink, index: u32) -> Result<LinkMessage, PodNetworkError> {
    let mut query = LinkMessage::default();
    query.header.interface_family = AddressFamily::Unspec;
    query.header.index = index;
    let answers = netlink.get(RouteNetlinkMessage::GetLink(query)).map_err(failed("cannot ask for an interface"))?;
    let link = answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    link.ok_or(PodNetworkError::Gone(index))
}

/// The number by which the socket's namespace knows another, if it has one.
fn id_of(netlink: &mut Netlink, other: &impl AsFd) -> Result<Option<i32>, PodNetworkError> {
    let mut query = NsidMessage::default();
    let fd = u32::try_from(other.as_fd().as_raw_fd()).unwrap_or(u32::MAX);
    query.attributes.push(NsidAttribute::Fd(fd));
    let answers =
        netlink.get(RouteNetlinkMessage::GetNsId(query)).map_err(failed("cannot ask for a namespace's id"))?;
    Ok(answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewNsId(message) => message.attributes.into_iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(id) if id >= 0 => Some(id),
            _ => None,
        }),
        _ => None,
    }))
}
