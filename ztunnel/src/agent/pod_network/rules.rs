//! Policy rules and local routes of a pod's namespace: which there are to be, which of them are missing, and which of
//! what is there are the mesh's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use rtnetlink::packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use ztunnel_ebpf::{MARK_DELIVERY, MARK_DNS, MARK_OUTBOUND, PORT_RESOLVER, ROUTE_TABLE, RULE_PRIORITY};

use super::{LOOPBACK, Needs, PodNetworkError, failed};
use crate::agent::netlink::Netlink;

/// The rules that a pod needs.
pub fn wanted_rules(needs: &Needs<'_>) -> Vec<RuleMessage> {
    let v4 = needs.v4().map(|_| AddressFamily::Inet);
    let v6 = needs.v6().map(|_| AddressFamily::Inet6);
    v4.into_iter().chain(v6).flat_map(|family| all_of(family, needs.dns)).collect()
}

/// All rules of a family, with or without those for DNS.
fn all_of(family: AddressFamily, dns: bool) -> Vec<RuleMessage> {
    let mut rules = Vec::new();
    for mark in [MARK_OUTBOUND, MARK_DELIVERY] {
        rules.push(marked(family, mark, RuleAction::ToTable, ROUTE_TABLE, RULE_PRIORITY));
        // What the table does not take must not leave by another.
        rules.push(marked(family, mark, RuleAction::Prohibit, 0, RULE_PRIORITY + 1));
    }
    if dns {
        // The proxy's own queries would come back to it.
        let main = u32::from(RouteHeader::RT_TABLE_MAIN);
        rules.push(marked(family, MARK_DNS, RuleAction::ToTable, main, RULE_PRIORITY - 1));
        let mut queries = rule(family, RuleAction::ToTable, ROUTE_TABLE, RULE_PRIORITY + 2);
        queries.attributes.extend([
            RuleAttribute::Iifname(String::from("lo")),
            RuleAttribute::IpProtocol(IpProtocol::Udp),
            RuleAttribute::DestinationPortRange(RulePortRange { start: PORT_RESOLVER, end: PORT_RESOLVER }),
        ]);
        rules.push(queries);
    }
    rules
}

fn rule(family: AddressFamily, action: RuleAction, table: u32, priority: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = action;
    rule.attributes = vec![RuleAttribute::Priority(priority)];
    if table != 0 {
        rule.attributes.push(RuleAttribute::Table(table));
    }
    rule
}

fn marked(family: AddressFamily, mark: u32, action: RuleAction, table: u32, priority: u32) -> RuleMessage {
    let mut rule = rule(family, action, table, priority);
    rule.attributes.extend([RuleAttribute::FwMark(mark), RuleAttribute::FwMask(u32::MAX)]);
    rule
}

/// Whether a rule of the kernel is this one of ours.
fn is(found: &RuleMessage, wanted: &RuleMessage) -> bool {
    found.header.family == wanted.header.family
        && found.header.action == wanted.header.action
        && wanted.attributes.iter().all(|attribute| found.attributes.contains(attribute))
}

/// Which of the wanted rules the kernel does not have.
pub fn missing_rules(needs: &Needs<'_>, found: &[RuleMessage]) -> Vec<RuleMessage> {
    let mut wanted = wanted_rules(needs);
    wanted.retain(|wanted| !found.iter().any(|found| is(found, wanted)));
    wanted
}

/// Those of the kernel's rules that are ours, wanted or not.
pub fn our_rules(found: Vec<RuleMessage>) -> impl Iterator<Item = RuleMessage> {
    let ours = [all_of(AddressFamily::Inet, true), all_of(AddressFamily::Inet6, true)].concat();
    found.into_iter().filter(move |found| ours.iter().any(|ours| is(found, ours)))
}

/// Those of the kernel's rules that are ours and that the pod does not need (any more).
pub fn surplus_rules(needs: &Needs<'_>, found: Vec<RuleMessage>) -> Vec<RuleMessage> {
    let wanted = wanted_rules(needs);
    our_rules(found).filter(|found| !wanted.iter().any(|wanted| is(found, wanted))).collect()
}

/// All rules of both families.
pub fn list_rules(netlink: &mut Netlink) -> Result<Vec<RuleMessage>, PodNetworkError> {
    let mut rules = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut query = RuleMessage::default();
        query.header.family = family;
        let answers = match netlink.list(&RouteNetlinkMessage::GetRule(query)) {
            // The kernel has no IPv6.
            Err(error) if family == AddressFamily::Inet6 && error.is(libc::EAFNOSUPPORT) => Vec::new(),
            other => other.map_err(failed("cannot list policy rules"))?,
        };
        rules.extend(answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRule(rule) if rule.header.family == family => Some(rule),
            _ => None,
        }));
    }
    Ok(rules)
}

/// The local routes that a pod needs in the proxy's table.
pub fn wanted_routes(needs: &Needs<'_>) -> Vec<RouteMessage> {
    let v4 = needs.v4().map(|address| {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::UNSPECIFIED, 0);
        // Without a preferred source the kernel would take the destination for one.
        local(route.pref_source(address))
    });
    let v6 = needs.v6().map(|address| {
        let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(Ipv6Addr::UNSPECIFIED, 0);
        local(route.pref_source(address))
    });
    v4.into_iter().chain(v6).collect()
}

fn local<T>(route: RouteMessageBuilder<T>) -> RouteMessage {
    route
        .output_interface(LOOPBACK)
        .table_id(ROUTE_TABLE)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .protocol(RouteProtocol::Static)
        .build()
}

/// Which of the wanted routes the kernel does not have.
pub fn missing_routes(needs: &Needs<'_>, found: &[RouteMessage]) -> Vec<RouteMessage> {
    let mut wanted = wanted_routes(needs);
    wanted.retain(|wanted| {
        let same = |found: &RouteMessage| {
            let source = |route: &RouteMessage| {
                route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::PrefSource(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
                    RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
                    _ => None,
                })
            };
            found.header.address_family == wanted.header.address_family
                && found.header.destination_prefix_length == 0
                && found.header.kind == RouteType::Local
                && source(found) == source(wanted)
        };
        !found.iter().any(same)
    });
    wanted
}

/// Those routes of the proxy's table that are of a family of which the pod has no address (any more).
pub fn surplus_routes(needs: &Needs<'_>, mut found: Vec<RouteMessage>) -> Vec<RouteMessage> {
    let wanted = wanted_routes(needs);
    found.retain(|found| !wanted.iter().any(|wanted| found.header.address_family == wanted.header.address_family));
    found
}

/// The routes of one table in both families.
pub fn list_routes(netlink: &mut Netlink, table: u32) -> Result<Vec<RouteMessage>, PodNetworkError> {
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut query = RouteMessage::default();
        query.header.address_family = family;
        query.attributes.push(RouteAttribute::Table(table));
        let answers = match netlink.list(&RouteNetlinkMessage::GetRoute(query)) {
            // No such table yet; the kernel has no IPv6.
            Err(error) if error.is(libc::ENOENT) || error.is(libc::EAFNOSUPPORT) => Vec::new(),
            other => other.map_err(failed("cannot list routes"))?,
        };
        routes.extend(answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route)
                if route.header.address_family == family && table_of(&route) == table =>
            {
                Some(route)
            }
            _ => None,
        }));
    }
    Ok(routes)
}

fn table_of(route: &RouteMessage) -> u32 {
    let attribute = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    attribute.unwrap_or(u32::from(route.header.table))
}
