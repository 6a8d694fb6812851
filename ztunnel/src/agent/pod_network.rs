//! Rules, route and sysctl that a pod's namespace needs, by rtnetlink: marked packets are delivered locally, or
//! nowhere.

use std::fs;
use std::io;
use std::net::Ipv4Addr;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};
use ztunnel_ebpf::{MARK_DELIVERY, MARK_OUTBOUND, ROUTE_TABLE, RULE_PRIORITY};

use super::netns::{Netns, NetnsError};

/// Makes replies to a marked SYN carry its mark, so that they go back to the proxy. Per network namespace.
const ACCEPT_SYSCTL: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";
/// The same for answers that no socket gives: without it the reset for a port on which nobody listens would be sent out
/// of the pod to the real client, and the proxy would wait for its connection in vain.
const REFLECT_SYSCTL: &str = "/proc/sys/net/ipv4/fwmark_reflect";
/// `lo` has this index in every namespace.
const LOOPBACK: u32 = 1;
const MARKS: [u32; 2] = [MARK_OUTBOUND, MARK_DELIVERY];

/// Why a pod's namespace could not be prepared or checked.
#[derive(Debug, thiserror::Error)]
pub enum PodNetworkError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A netlink request failed.
    #[error("{what}: {source}")]
    Netlink {
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// No netlink socket, or no runtime for it.
    #[error("cannot open a netlink socket: {0}")]
    Open(#[source] io::Error),
    /// The sysctl could not be read or written.
    #[error("{path}: {source} (the agent needs /proc/sys writable)")]
    Sysctl {
        /// Which.
        path: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What is there is not what was asked for.
    #[error("in the pod's network namespace there is no {0}")]
    Missing(&'static str),
}

/// What was there before, to be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Before {
    /// Value of `net.ipv4.tcp_fwmark_accept`.
    pub fwmark_accept: bool,
    /// Value of `net.ipv4.fwmark_reflect`.
    pub fwmark_reflect: bool,
}

/// Prepares a namespace for capture: nothing is captured by this alone. Preparing it twice changes nothing.
///
/// Blocks; not for a runtime's thread.
///
/// # Errors
/// When the kernel refuses; what was done is taken back.
pub fn prepare(netns: &Netns, address: Ipv4Addr) -> Result<Before, PodNetworkError> {
    let before = netns.run(read_before)??;
    match mend(netns, address) {
        Ok(()) => Ok(before),
        Err(error) => {
            // The cause of the failure is worth more than that of the cleaning.
            let _ = restore(netns, before);
            Err(error)
        }
    }
}

/// Sets what is missing of it in a namespace that was prepared before, where connections may be captured: what is there
/// stays, whatever fails.
///
/// Blocks; not for a runtime's thread.
///
/// # Errors
/// When the kernel refuses.
pub fn mend(netns: &Netns, address: Ipv4Addr) -> Result<(), PodNetworkError> {
    netns.run(|| {
        write_sysctl(ACCEPT_SYSCTL, true)?;
        write_sysctl(REFLECT_SYSCTL, true)?;
        netlink(async |handle| {
            set_loopback_up(&handle).await?;
            add_route(&handle, address).await?;
            for mark in MARKS {
                add_rule(&handle, to_table(mark)).await?;
                add_rule(&handle, prohibit(mark)).await?;
            }
            Ok(())
        })
    })?
}

/// Reads back what [`prepare`] set.
///
/// # Errors
/// The first thing that is missing.
pub fn verify(netns: &Netns, address: Ipv4Addr) -> Result<(), PodNetworkError> {
    netns.run(|| {
        let Before { fwmark_accept, fwmark_reflect } = read_before()?;
        if !fwmark_accept {
            return Err(PodNetworkError::Missing("net.ipv4.tcp_fwmark_accept=1"));
        }
        if !fwmark_reflect {
            return Err(PodNetworkError::Missing("net.ipv4.fwmark_reflect=1"));
        }
        netlink(async |handle| {
            let rules = rules(&handle).await?;
            for mark in MARKS {
                if !rules.iter().any(|rule| is_ours(rule, mark, RuleAction::ToTable)) {
                    return Err(PodNetworkError::Missing("rule that sends the mark to the proxy's table"));
                }
                if !rules.iter().any(|rule| is_ours(rule, mark, RuleAction::Prohibit)) {
                    return Err(PodNetworkError::Missing("rule that prohibits what the proxy's table does not take"));
                }
            }
            let source = RouteAttribute::PrefSource(RouteAddress::Inet(address));
            if routes(&handle).await?.iter().any(|route| route.attributes.contains(&source)) {
                Ok(())
            } else {
                Err(PodNetworkError::Missing("local route in the proxy's table"))
            }
        })
    })?
}

/// Removes what [`prepare`] set and puts back what was there before.
///
/// # Errors
/// When the kernel refuses; the rest is removed all the same.
pub fn restore(netns: &Netns, before: Before) -> Result<(), PodNetworkError> {
    netns.run(|| {
        let accept = write_sysctl(ACCEPT_SYSCTL, before.fwmark_accept);
        let sysctl = accept.and(write_sysctl(REFLECT_SYSCTL, before.fwmark_reflect));
        let netlink = netlink(async |handle| {
            for rule in rules(&handle).await? {
                let ours = MARKS.iter().any(|mark| {
                    is_ours(&rule, *mark, RuleAction::ToTable) || is_ours(&rule, *mark, RuleAction::Prohibit)
                });
                if ours {
                    handle.rule().del(rule).execute().await.map_err(failed("cannot remove a policy rule"))?;
                }
            }
            for route in routes(&handle).await? {
                handle.route().del(route).execute().await.map_err(failed("cannot remove the route"))?;
            }
            Ok(())
        });
        netlink.and(sysctl)
    })?
}

/// Gives `lo` another address, for a namespace that has no other device.
///
/// # Errors
/// When the kernel refuses.
pub fn add_loopback_address(netns: &Netns, address: Ipv4Addr) -> Result<(), PodNetworkError> {
    netns.run(|| {
        netlink(async |handle| {
            let request = handle.address().add(LOOPBACK, address.into(), 32);
            request.execute().await.map_err(failed("cannot add an address to lo"))
        })
    })?
}

/// Runs requests on a netlink socket of the calling thread's namespace.
fn netlink<T>(work: impl AsyncFnOnce(Handle) -> Result<T, PodNetworkError>) -> Result<T, PodNetworkError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(PodNetworkError::Open)?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(PodNetworkError::Open)?;
        let connection = tokio::spawn(connection);
        let result = work(handle).await;
        connection.abort();
        result
    })
}

async fn set_loopback_up(handle: &Handle) -> Result<(), PodNetworkError> {
    let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
    handle.link().set(up).execute().await.map_err(failed("cannot set lo up"))
}

async fn add_route(handle: &Handle, address: Ipv4Addr) -> Result<(), PodNetworkError> {
    // Without a preferred source the kernel would take the destination for one.
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
        .output_interface(LOOPBACK)
        .pref_source(address)
        .table_id(ROUTE_TABLE)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .protocol(RouteProtocol::Static)
        .build();
    handle
        .route()
        .add(route)
        .replace()
        .execute()
        .await
        .map_err(failed("cannot add the local route (is the announced address one of the namespace?)"))
}

async fn add_rule(handle: &Handle, rule: RuleMessage) -> Result<(), PodNetworkError> {
    let mut request = handle.rule().add();
    *request.message_mut() = rule;
    match request.execute().await {
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::EEXIST => Ok(()),
        other => other.map_err(failed("cannot add a policy rule (is CONFIG_IP_MULTIPLE_TABLES in this kernel?)")),
    }
}

fn to_table(mark: u32) -> RuleMessage {
    let mut rule = marked(mark, RuleAction::ToTable, RULE_PRIORITY);
    rule.attributes.push(RuleAttribute::Table(ROUTE_TABLE));
    rule
}

/// What the table does not take must not leave by another.
fn prohibit(mark: u32) -> RuleMessage {
    marked(mark, RuleAction::Prohibit, RULE_PRIORITY + 1)
}

fn marked(mark: u32, action: RuleAction, priority: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = AddressFamily::Inet;
    rule.header.action = action;
    rule.attributes =
        vec![RuleAttribute::FwMark(mark), RuleAttribute::FwMask(u32::MAX), RuleAttribute::Priority(priority)];
    rule
}

fn is_ours(rule: &RuleMessage, mark: u32, action: RuleAction) -> bool {
    let wanted = match action {
        RuleAction::ToTable => to_table(mark),
        _ => prohibit(mark),
    };
    rule.header.action == action && wanted.attributes.iter().all(|attribute| rule.attributes.contains(attribute))
}

async fn rules(handle: &Handle) -> Result<Vec<RuleMessage>, PodNetworkError> {
    handle.rule().get(IpVersion::V4).execute().try_collect().await.map_err(failed("cannot list policy rules"))
}

/// The routes of the proxy's table.
async fn routes(handle: &Handle) -> Result<Vec<RouteMessage>, PodNetworkError> {
    let mut query = RouteMessage::default();
    query.header.address_family = AddressFamily::Inet;
    query.header.table = RouteHeader::RT_TABLE_UNSPEC;
    let all: Vec<RouteMessage> =
        handle.route().get(query).execute().try_collect().await.map_err(failed("cannot list routes"))?;
    let table = RouteAttribute::Table(ROUTE_TABLE);
    Ok(all.into_iter().filter(|route| route.attributes.contains(&table)).collect())
}

fn failed(what: &'static str) -> impl Fn(rtnetlink::Error) -> PodNetworkError {
    move |source| PodNetworkError::Netlink { what, source }
}

fn read_before() -> Result<Before, PodNetworkError> {
    Ok(Before { fwmark_accept: read_sysctl(ACCEPT_SYSCTL)?, fwmark_reflect: read_sysctl(REFLECT_SYSCTL)? })
}

fn read_sysctl(path: &'static str) -> Result<bool, PodNetworkError> {
    let text = fs::read_to_string(path).map_err(|source| PodNetworkError::Sysctl { path, source })?;
    Ok(text.trim() != "0")
}

fn write_sysctl(path: &'static str, on: bool) -> Result<(), PodNetworkError> {
    fs::write(path, if on { "1" } else { "0" }).map_err(|source| PodNetworkError::Sysctl { path, source })
}
