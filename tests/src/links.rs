//! Links, addresses and routes inside the cluster's namespaces, by route netlink.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};

use futures_util::{StreamExt, pin_mut};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::packet_route::route::RouteScope;
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

/// Sets a link up.
///
/// # Errors
/// No such link.
pub async fn up(handle: &Handle, name: &str) -> Result<(), Error> {
    let change = LinkUnspec::new_with_name(name).up().build();
    handle.link().set(change).execute().await.map_err(Error::netlink(format!("setting the link {name} up")))
}

/// Adds an IPv4 address to a link.
///
/// # Errors
/// No such link, or the address is there already.
pub async fn address(handle: &Handle, name: &str, address: Ipv4Addr, prefix: u8) -> Result<(), Error> {
    let link = index(handle, name).await?;
    let added = handle.address().add(link, address.into(), prefix).execute().await;
    added.map_err(Error::netlink(format!("adding {address}/{prefix} to {name}")))
}

/// Where a route leads.
#[derive(Debug, Clone, Copy)]
pub enum Via<'a> {
    /// A neighbour on this link.
    Link(&'a str),
    /// A gateway reachable through this link.
    Gateway(Ipv4Addr, &'a str),
}

/// Adds a route to `to/prefix`, with `source` as the preferred source address.
///
/// # Errors
/// The kernel's refusal.
pub async fn route(
    handle: &Handle,
    to: Ipv4Addr,
    prefix: u8,
    via: Via<'_>,
    source: Option<Ipv4Addr>,
) -> Result<(), Error> {
    let mut message = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, prefix);
    message = match via {
        Via::Link(link) => message.output_interface(index(handle, link).await?).scope(RouteScope::Link),
        Via::Gateway(gateway, link) => message.output_interface(index(handle, link).await?).gateway(gateway),
    };
    if let Some(source) = source {
        message = message.pref_source(source);
    }
    let added = handle.route().add(message.build()).execute().await;
    added.map_err(Error::netlink(format!("adding a route to {to}/{prefix}")))
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
