//! Links, addresses and routes inside the cluster's namespaces, by route netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use futures_util::{StreamExt, pin_mut};
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::Error;

/// Makes a veth pair: `name` in the handle's namespace, `peer_name` in the namespace `peer`. Both are down.
///
/// # Errors
/// The kernel's refusal.
pub async fn veth(handle: &Handle, name: &str, peer_name: &str, peer: impl AsFd) -> Result<(), Error> {
    let other = LinkUnspec::new_with_name(peer_name).setns_by_fd(peer.as_fd().as_raw_fd()).build();
    let pair = LinkVeth::new(name, peer_name).set_info_data(InfoData::Veth(InfoVeth::Peer(other))).build();
    handle.link().add(pair).execute().await.map_err(Error::netlink(format!("making the link {name}")))
}

/// The interface index of a link.
///
/// # Errors
/// No such link.
pub async fn index(handle: &Handle, name: &str) -> Result<u32, Error> {
    let found = handle.link().get().match_name(name.to_owned()).execute();
    pin_mut!(found);
    match found.next().await {
        Some(Ok(link)) => Ok(link.header.index),
        Some(Err(source)) => Err(Error::netlink(format!("looking for the link {name}"))(source)),
        None => Err(Error::Absent(format!("no link {name}"))),
    }
}

/// Removes a link, and a veth's other end with it.
///
/// # Errors
/// No such link.
pub async fn remove(handle: &Handle, name: &str) -> Result<(), Error> {
    let at = index(handle, name).await?;
    handle.link().del(at).execute().await.map_err(Error::netlink(format!("removing the link {name}")))
}

/// Sets a link up.
///
/// # Errors
/// No such link.
pub async fn up(handle: &Handle, name: &str) -> Result<(), Error> {
    let change = LinkUnspec::new_with_name(name).up().build();
    handle.link().set(change).execute().await.map_err(Error::netlink(format!("setting the link {name} up")))
}

/// Adds an address to a link. It is usable at once: without this the kernel says so of one of IPv6 in the background, even where
/// it looks for no duplicates.
///
/// # Errors
/// No such link, or the address is there already.
pub async fn address(handle: &Handle, name: &str, address: IpAddr, prefix: u8) -> Result<(), Error> {
    let link = index(handle, name).await?;
    let mut request = handle.address().add(link, address, prefix);
    if address.is_ipv6() {
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    }
    let added = request.execute().await;
    added.map_err(Error::netlink(format!("adding {address}/{prefix} to {name}")))
}

/// Where a route leads.
#[derive(Debug, Clone, Copy)]
pub enum Via<'a> {
    /// A neighbour on this link.
    Link(&'a str),
    /// A gateway reachable through this link.
    Gateway(IpAddr, &'a str),
}

/// Adds a route to `to/prefix`, with `source` as the preferred source address.
///
/// # Errors
/// The kernel's refusal.
pub async fn route(handle: &Handle, to: IpAddr, prefix: u8, via: Via<'_>, source: Option<IpAddr>) -> Result<(), Error> {
    let link = match via {
        Via::Link(link) | Via::Gateway(_, link) => index(handle, link).await?,
    };
    let message = message(to, prefix, via, source, link);
    let message = message.ok_or_else(|| Error::Absent(format!("a route to {to}/{prefix} mixes the families")))?;
    let added = handle.route().add(message).execute().await;
    added.map_err(Error::netlink(format!("adding a route to {to}/{prefix}")))
}

/// Removes every route to `to/prefix` through the link from the main table.
///
/// # Errors
/// The kernel's refusal.
pub async fn remove_route(handle: &Handle, to: IpAddr, prefix: u8, link: &str) -> Result<(), Error> {
    let at = index(handle, link).await?;
    let message = message(to, prefix, Via::Link(link), None, at);
    let mut message = message.ok_or_else(|| Error::Absent(format!("no route to {to}/{prefix}")))?;
    // Any scope, whatever it was made with.
    message.header.scope = RouteScope::NoWhere;
    let removed = handle.route().del(message).execute().await;
    removed.map_err(Error::netlink(format!("removing the route to {to}/{prefix}")))
}

/// The route as netlink wants it; None if its addresses are not all of one family.
fn message(to: IpAddr, prefix: u8, via: Via<'_>, source: Option<IpAddr>, link: u32) -> Option<RouteMessage> {
    match to {
        IpAddr::V4(to) => {
            let mut message = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, prefix);
            message = match via {
                Via::Link(_) => message.output_interface(link).scope(RouteScope::Link),
                Via::Gateway(IpAddr::V4(gateway), _) => message.output_interface(link).gateway(gateway),
                Via::Gateway(IpAddr::V6(_), _) => return None,
            };
            match source {
                Some(IpAddr::V4(source)) => Some(message.pref_source(source).build()),
                Some(IpAddr::V6(_)) => None,
                None => Some(message.build()),
            }
        }
        IpAddr::V6(to) => {
            let mut message = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, prefix);
            message = match via {
                Via::Link(_) => message.output_interface(link),
                Via::Gateway(IpAddr::V6(gateway), _) => message.output_interface(link).gateway(gateway),
                Via::Gateway(IpAddr::V4(_), _) => return None,
            };
            match source {
                Some(IpAddr::V6(source)) => Some(message.pref_source(source).build()),
                Some(IpAddr::V4(_)) => None,
                None => Some(message.build()),
            }
        }
    }
}

/// Names of all links.
///
/// # Errors
/// The kernel's refusal.
pub async fn names(handle: &Handle) -> Result<Vec<String>, Error> {
    let links = handle.link().get().execute();
    pin_mut!(links);
    let mut names = Vec::new();
    while let Some(link) = links.next().await {
        let link = link.map_err(Error::netlink("listing links"))?;
        names.extend(link.attributes.into_iter().filter_map(|a| match a {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        }));
    }
    Ok(names)
}
