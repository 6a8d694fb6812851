//! Which destinations leave a pod by the interface that holds its address: its main routing table, as the programs are
//! told of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};

use super::{LOOPBACK, PodNetworkError, rules};
use crate::agent::capture::Route;
use crate::agent::netlink::Netlink;
use crate::agent::netns::Netns;

/// Most destinations of one pod that are told: the widest ones. What is not told is left alone by the connect hooks, and
/// stopped by the guard.
pub const MAX_ROUTES: usize = 512;

/// `RT_TABLE_LOCAL`.
const LOCAL_TABLE: u32 = 255;

/// Most addresses of the pod itself that are told beside them.
const MAX_LOCAL: usize = 256;

/// Addresses of one link only (RFC 4291).
const LINK_LOCAL: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);

/// A destination: an address and how many of its bits count.
type Destination = (IpAddr, u8);

/// Reads a pod's main routing table: for each destination whether it is left by the interface with this index; and its
/// local one: the pod's own addresses, of whichever interface, are not left at all. Asks the kernel only, and does not
/// block.
///
/// # Errors
/// When the kernel refuses.
pub fn read(netns: &Netns, own: u32) -> Result<Vec<Route>, PodNetworkError> {
    let mut netlink = netns.route();
    let main = rules::list_routes(&mut netlink, u32::from(RouteHeader::RT_TABLE_MAIN))?;
    let local = rules::list_routes(&mut netlink, LOCAL_TABLE)?;
    Ok(with_local(decide(&main, own), &local))
}

/// Adds what is delivered in the pod, which the kernel asks for before it looks at other routing tables.
fn with_local(mut routes: Vec<Route>, local: &[RouteMessage]) -> Vec<Route> {
    let local = local.iter().filter(|route| route.header.kind == RouteType::Local).filter_map(destination);
    // The programs know those of loopback.
    for (address, prefix) in local.filter(|(address, _)| !address.is_loopback()).take(MAX_LOCAL) {
        routes.retain(|route| (route.address, route.prefix) != (address, prefix));
        routes.push(Route { address, prefix, captured: false });
    }
    routes
}

/// What of the routing table matters. Of several routes to a destination the one with the least metric counts, and of
/// equal ones any that leaves by the pod's own interface.
fn decide(routes: &[RouteMessage], own: u32) -> Vec<Route> {
    let mut best = BTreeMap::<Destination, (u32, bool)>::new();
    for route in routes {
        let Some(destination) = destination(route) else { continue };
        let candidate = (metric(route), leaves_by(route, own));
        let slot = best.entry(destination).or_insert(candidate);
        if candidate.0 < slot.0 {
            *slot = candidate;
        } else if candidate.0 == slot.0 {
            slot.1 |= candidate.1;
        }
    }
    // An address of one link says nothing without its interface, and is no peer of the mesh. It is left alone; the guard
    // stops TCP to it all the same.
    for ((address, prefix), (_, captured)) in &mut best {
        *captured &= !is_link_local(*address, *prefix);
    }
    if best.iter().any(|((address, prefix), (_, captured))| address.is_ipv6() && *prefix < LINK_LOCAL.1 && *captured) {
        best.insert((IpAddr::V6(LINK_LOCAL.0), LINK_LOCAL.1), (u32::MAX, false));
    }
    // The programs look IPv4 addresses up as mapped ones, which a default route of IPv6 covers too.
    if best.keys().any(covers_mapped) {
        best.entry((IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)).or_insert((u32::MAX, false));
    }
    let mut all: Vec<Route> =
        best.into_iter().map(|((address, prefix), (_, captured))| Route { address, prefix, captured }).collect();
    all.sort_by_key(|route| (route.prefix, route.address));
    all.truncate(MAX_ROUTES);
    all
}

/// Whether all of an IPv6 destination is in `fe80::/10`.
fn is_link_local(address: IpAddr, prefix: u8) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => prefix >= LINK_LOCAL.1 && address.is_unicast_link_local(),
    }
}

/// Whether all IPv4-mapped addresses (`::ffff:0:0/96`) are in an IPv6 destination.
fn covers_mapped((address, prefix): &Destination) -> bool {
    let mapped = Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().to_bits();
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => *prefix <= 96 && (address.to_bits() ^ mapped).leading_zeros() >= u32::from(*prefix),
    }
}

fn destination(route: &RouteMessage) -> Option<Destination> {
    let prefix = route.header.destination_prefix_length;
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    });
    let address = match (address, route.header.address_family) {
        (Some(address), _) => address,
        (None, AddressFamily::Inet) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        (None, AddressFamily::Inet6) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        (None, _) => return None,
    };
    // Routes of one source only are not followed by every connection: they say nothing.
    (route.header.source_prefix_length == 0).then_some((address, prefix))
}

fn metric(route: &RouteMessage) -> u32 {
    let metric = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    metric.unwrap_or(0)
}

/// Whether packets leave by this interface.
fn leaves_by(route: &RouteMessage, own: u32) -> bool {
    interfaces(route).contains(&own)
}

/// The interfaces by which packets leave. A destination that the kernel refuses itself is left to it.
fn interfaces(route: &RouteMessage) -> Vec<u32> {
    if route.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let of = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    };
    route.attributes.iter().flat_map(of).collect()
}

/// The interfaces by which a namespace is left: those of its default routes, or of all its routes if it has no default one.
///
/// # Errors
/// When the kernel refuses.
pub fn ways_out(netlink: &mut Netlink) -> Result<BTreeSet<u32>, PodNetworkError> {
    Ok(ways(&rules::list_routes(netlink, u32::from(RouteHeader::RT_TABLE_MAIN))?))
}

fn ways(main: &[RouteMessage]) -> BTreeSet<u32> {
    let of = |is_wanted: fn(Destination) -> bool| -> BTreeSet<u32> {
        let routes = main.iter().filter(|route| destination(route).is_some_and(is_wanted));
        routes.flat_map(interfaces).filter(|index| *index != LOOPBACK).collect()
    };
    let default = of(|(_, prefix)| prefix == 0);
    if default.is_empty() { of(|(address, prefix)| !is_link_local(address, prefix)) } else { default }
}

#[cfg(test)]
mod tests {
    use rtnetlink::RouteMessageBuilder;

    use super::*;

    fn v4(address: [u8; 4], prefix: u8) -> RouteMessageBuilder<Ipv4Addr> {
        RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address.into(), prefix)
    }

    fn route(address: impl Into<IpAddr>, prefix: u8, captured: bool) -> Route {
        Route { address: address.into(), prefix, captured }
    }

    #[test]
    fn interface_decides_and_the_widest_come_first() {
        let routes = [
            v4([10, 0, 0, 0], 8).output_interface(3).build(),
            v4([0, 0, 0, 0], 0).output_interface(2).build(),
            RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
                .output_interface(2)
                .build(),
        ];
        let found = decide(&routes, 2);
        let wanted = [
            route(Ipv4Addr::UNSPECIFIED, 0, true),
            route(Ipv6Addr::UNSPECIFIED, 0, true),
            route([10, 0, 0, 0], 8, false),
            route(LINK_LOCAL.0, 10, false),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn way_out_is_that_of_the_default_routes_or_of_all() {
        let link_local = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(LINK_LOCAL.0, 64);
        let mut routes = vec![
            link_local.output_interface(9).build(),
            v4([10, 0, 0, 0], 8).output_interface(3).build(),
            v4([127, 0, 0, 0], 8).output_interface(LOOPBACK).build(),
        ];
        assert_eq!(ways(&[]), [].into());
        assert_eq!(ways(&routes), [3].into());
        routes.push(v4([0, 0, 0, 0], 0).output_interface(2).build());
        assert_eq!(ways(&routes), [2].into(), "further networks are left alone");
        let default = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(Ipv6Addr::UNSPECIFIED, 0);
        routes.push(default.output_interface(4).build());
        assert_eq!(ways(&routes), [2, 4].into());
    }

    #[test]
    fn default_route_of_ipv6_is_none_of_ipv4() {
        let default = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(Ipv6Addr::UNSPECIFIED, 0);
        let found = decide(&[default.output_interface(2).build()], 2);
        let link_local = route(LINK_LOCAL.0, 10, false);
        let wanted = [route(Ipv4Addr::UNSPECIFIED, 0, false), route(Ipv6Addr::UNSPECIFIED, 0, true), link_local];
        assert_eq!(found, wanted);
    }

    #[test]
    fn link_local_destinations_are_never_captured() {
        let v6 = |address: Ipv6Addr, prefix| {
            let builder = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, prefix);
            builder.output_interface(2).build()
        };
        let (unique, beside) = ("fd00::".parse().unwrap(), "fec0::".parse().unwrap());
        // No route covers all of them: only what is there is told.
        let found = decide(&[v6(LINK_LOCAL.0, 64), v6(unique, 64), v6(beside, 10)], 2);
        assert_eq!(found, [route(beside, 10, true), route(unique, 64, true), route(LINK_LOCAL.0, 64, false)]);
        let found = decide(&[v6(LINK_LOCAL.0, 10), v6(Ipv6Addr::UNSPECIFIED, 0)], 2);
        assert!(found.contains(&route(LINK_LOCAL.0, 10, false)));
        assert_eq!(found.len(), 3, "with the default route of IPv4: {found:?}");
    }

    #[test]
    fn least_metric_wins_and_ties_count_as_own() {
        let by = |interface, metric| v4([0, 0, 0, 0], 0).output_interface(interface).priority(metric).build();
        let default = |routes: &[RouteMessage]| decide(routes, 2)[0].captured;
        assert!(!default(&[by(2, 200), by(3, 100)]));
        assert!(default(&[by(3, 200), by(2, 100)]));
        assert!(default(&[by(3, 100), by(2, 100)]));
    }

    #[test]
    fn what_the_kernel_refuses_is_left_to_it() {
        let mut refused = v4([10, 0, 0, 0], 8).output_interface(2).build();
        refused.header.kind = RouteType::BlackHole;
        assert_eq!(decide(&[refused], 2), [route([10, 0, 0, 0], 8, false)]);
    }

    #[test]
    fn addresses_of_the_pod_itself_are_never_left() {
        let mut local = vec![
            v4([10, 244, 1, 5], 32).output_interface(2).build(),
            v4([192, 168, 7, 5], 32).output_interface(3).build(),
            v4([127, 0, 0, 0], 8).output_interface(1).build(),
        ];
        local.iter_mut().for_each(|route| route.header.kind = RouteType::Local);
        local.push(v4([10, 244, 1, 255], 32).output_interface(2).build());
        let main = [route([0, 0, 0, 0], 0, true), route([192, 168, 7, 5], 32, true)];
        let wanted =
            [route([0, 0, 0, 0], 0, true), route([10, 244, 1, 5], 32, false), route([192, 168, 7, 5], 32, false)];
        assert_eq!(with_local(main.into(), &local), wanted);
    }

    #[test]
    fn length_is_bounded() {
        let many: Vec<_> = (0..600_u32)
            .map(|number| {
                let address = Ipv4Addr::from_bits(0x0a00_0000 + number);
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).output_interface(2).build()
            })
            .chain([v4([0, 0, 0, 0], 0).output_interface(2).build()])
            .collect();
        let found = decide(&many, 2);
        assert_eq!(found.len(), MAX_ROUTES);
        assert_eq!(found[0].prefix, 0);
    }
}
