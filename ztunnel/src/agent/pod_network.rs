//! Rules, routes and sysctls that a pod's namespace needs, by rtnetlink: marked packets are delivered locally, or
//! nowhere.
//!
//! For each family of which the pod has an address:
//!
//! | priority | rule | why |
//! |---|---|---|
//! | `RULE_PRIORITY - 1` | DNS mark → main table | the proxy's own queries leave (with DNS only) |
//! | `RULE_PRIORITY` | outbound and delivery mark → table `ROUTE_TABLE` | to the proxy, or to the application |
//! | `RULE_PRIORITY + 1` | the same marks → prohibit | what the table does not take must not leave |
//! | `RULE_PRIORITY + 2` | UDP to port 53 from this machine → `ROUTE_TABLE` | queries reach the proxy (with DNS only) |

mod interface;
pub mod mirror;
mod rules;
mod sysctl;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::rule::RuleMessage;
use rtnetlink::{AddressMessageBuilder, LinkUnspec};
use ztunnel_ebpf::ROUTE_TABLE;

use super::netlink::{Netlink, NetlinkError};
use super::netns::{Netns, NetnsError};

pub use interface::{Interface, find as find_interface};
pub use sysctl::{Before, use_proc};

/// `lo` has this index in every namespace.
const LOOPBACK: u32 = 1;
/// How long addresses that were just added may take to become usable.
const SETTLING: Duration = Duration::from_secs(3);
/// Wait before it is asked again whether they are.
const PAUSE: Duration = Duration::from_millis(50);

/// What of a pod decides what its namespace needs.
#[derive(Clone, Copy, Debug)]
pub struct Needs<'a> {
    /// Its addresses; the first of each family is the source of what it sends through the proxy.
    pub addresses: &'a [IpAddr],
    /// Whether its DNS queries go to the proxy.
    pub dns: bool,
}

impl Needs<'_> {
    fn v4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        })
    }

    fn v6(&self) -> Option<Ipv6Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(v6) => Some(*v6),
        })
    }
}

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
        source: NetlinkError,
    },
    /// The sysctl could not be read or written.
    #[error("{path}: {source} (the agent needs /proc/sys writable)")]
    Sysctl {
        /// Which.
        path: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No interface has the address.
    #[error("no interface of the pod's network namespace has its address {0}")]
    NoInterface(IpAddr),
    /// Its address is on `lo`, and its routes leave by several interfaces.
    #[error(
        "its address {0} is on lo, and its routes lead out by several interfaces: which of them is the pod's cannot be \
         told (give it one default route)"
    )]
    SeveralWays(IpAddr),
    /// An interface was removed meanwhile.
    #[error("the pod's interface {0} is gone")]
    Gone(u32),
    /// What is there is not what was asked for.
    #[error("the pod's network namespace has {0}")]
    Missing(Box<Missing>),
}

/// What a pod's namespace lacks, or has of the mesh's and must not have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Policy rules.
    pub rules: Vec<RuleMessage>,
    /// Local routes in the proxy's table.
    pub routes: Vec<RouteMessage>,
    /// Sysctls that are off.
    pub sysctls: Vec<&'static str>,
    /// `lo` is down.
    pub loopback: bool,
    /// Policy rules of the mesh that the pod does not need: of DNS that is off by now, of a family that it left.
    pub surplus_rules: Vec<RuleMessage>,
    /// Routes in the proxy's table of a family that the pod left.
    pub surplus_routes: Vec<RouteMessage>,
}

impl Missing {
    /// Everything is as it should be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.rules.is_empty() {
            let count = self.rules.len();
            parts.push(format!("no policy rule that sends the mesh's packets to its table, or nowhere ({count})"));
        }
        if !self.routes.is_empty() {
            parts.push(format!("no local route in table {ROUTE_TABLE} ({})", self.routes.len()));
        }
        parts.extend(self.sysctls.iter().map(|name| format!("no sysctl {name}")));
        if self.loopback {
            parts.push(String::from("no device lo that is up"));
        }
        if !self.surplus_rules.is_empty() {
            parts.push(format!("policy rules of the mesh that it must not have ({})", self.surplus_rules.len()));
        }
        if !self.surplus_routes.is_empty() {
            let count = self.surplus_routes.len();
            parts.push(format!("routes in table {ROUTE_TABLE} that it must not have ({count})"));
        }
        f.write_str(&parts.join(", "))
    }
}

/// Reads what [`prepare`] will change. Blocks shortly.
///
/// # Errors
/// When it cannot be read.
pub fn before(netns: &Netns, needs: &Needs<'_>) -> Result<Before, PodNetworkError> {
    netns.run(|| sysctl::read(needs.v6().is_some()))?
}

/// Waits until addresses that were just added are usable, for [`SETTLING`] at most, on no thread: whoever announces a pod
/// waits before the agent's other tasks hear of it. What cannot be found out is left to [`prepare`], which fails then.
/// Needs a tokio runtime.
pub async fn settle(netns: &OwnedFd, addresses: &[IpAddr]) {
    let opened = netns.try_clone().map(|fd| tokio::task::spawn_blocking(move || Netns::new(fd).ok()));
    let Ok(opening) = opened else { return };
    let Ok(Some(netns)) = opening.await else { return };
    let (netns, addresses) = (Arc::new(netns), Arc::<[IpAddr]>::from(addresses));
    let deadline = Instant::now() + SETTLING;
    while Instant::now() < deadline {
        let (netns, addresses) = (Arc::clone(&netns), Arc::clone(&addresses));
        let asked = tokio::task::spawn_blocking(move || interface::is_settling(&netns, &addresses)).await;
        if !matches!(asked, Ok(Ok(true))) {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Prepares a namespace for capture: nothing is captured by this alone. Preparing it twice changes nothing.
///
/// Blocks shortly; not for a runtime's thread.
///
/// # Errors
/// When the kernel refuses, also because the pod's address is not usable yet ([`settle`]); what was done stays, for
/// [`restore`].
pub fn prepare(netns: &Netns, needs: &Needs<'_>) -> Result<(), PodNetworkError> {
    mend(netns, needs).map(drop)
}

/// Asks the kernel what is missing, and what is there of the mesh's and must not be. Blocks shortly.
///
/// # Errors
/// When it cannot be asked.
pub fn inspect(netns: &Netns, needs: &Needs<'_>) -> Result<Missing, PodNetworkError> {
    let sysctls = netns.run(|| sysctl::off(needs.v6().is_some()))??;
    let mut netlink = netns.route();
    let found_rules = rules::list_rules(&mut netlink)?;
    let found_routes = rules::list_routes(&mut netlink, ROUTE_TABLE)?;
    Ok(Missing {
        rules: rules::missing_rules(needs, &found_rules),
        routes: rules::missing_routes(needs, &found_routes),
        sysctls,
        loopback: !interface::is_loopback_up(&mut netlink)?,
        surplus_rules: rules::surplus_rules(needs, found_rules),
        surplus_routes: rules::surplus_routes(needs, found_routes),
    })
}

/// Sets what is missing in a namespace, where connections may be captured, and then removes what of the mesh's must not
/// be there: what is needed stays, whatever fails. Returns what was missing, and what was removed.
///
/// Blocks; not for a runtime's thread.
///
/// # Errors
/// When the kernel refuses.
pub fn mend(netns: &Netns, needs: &Needs<'_>) -> Result<Missing, PodNetworkError> {
    let missing = inspect(netns, needs)?;
    if !missing.sysctls.is_empty() {
        netns.run(|| sysctl::switch_on(needs.v6().is_some()))??;
    }
    let mut netlink = netns.route();
    if missing.loopback {
        let up = RouteNetlinkMessage::SetLink(LinkUnspec::new_with_index(LOOPBACK).up().build());
        netlink.change(up).map_err(failed("cannot set lo up"))?;
    }
    for route in missing.routes.clone() {
        let what = "cannot add the local route (is the announced address one of the namespace?)";
        netlink.replace(RouteNetlinkMessage::NewRoute(route)).map_err(failed(what))?;
    }
    for rule in missing.rules.clone() {
        let what = "cannot add a policy rule (is CONFIG_IP_MULTIPLE_TABLES in this kernel?)";
        netlink.add(RouteNetlinkMessage::NewRule(rule)).map_err(failed(what))?;
    }
    for rule in missing.surplus_rules.clone() {
        remove(&mut netlink, RouteNetlinkMessage::DelRule(rule), "cannot remove a policy rule that is not needed")?;
    }
    for route in missing.surplus_routes.clone() {
        remove(&mut netlink, RouteNetlinkMessage::DelRoute(route), "cannot remove a route that is not needed")?;
    }
    Ok(missing)
}

/// Reads back what [`prepare`] set.
///
/// # Errors
/// What is missing, or must not be there.
pub fn verify(netns: &Netns, needs: &Needs<'_>) -> Result<(), PodNetworkError> {
    let missing = inspect(netns, needs)?;
    if missing.is_empty() { Ok(()) } else { Err(PodNetworkError::Missing(Box::new(missing))) }
}

/// Removes what [`prepare`] set, for both families, and puts back what was there before.
///
/// # Errors
/// When the kernel refuses; the rest is removed all the same.
pub fn restore(netns: &Netns, before: Before) -> Result<(), PodNetworkError> {
    let sysctls = netns.run(|| sysctl::write(before)).map_err(PodNetworkError::from).flatten();
    let mut netlink = netns.route();
    let mut first = Ok(());
    for rule in rules::our_rules(rules::list_rules(&mut netlink)?) {
        let removed = netlink.change(RouteNetlinkMessage::DelRule(rule)).map_err(failed("cannot remove a policy rule"));
        first = first.and(removed);
    }
    for route in rules::list_routes(&mut netlink, ROUTE_TABLE)? {
        let removed = netlink.change(RouteNetlinkMessage::DelRoute(route)).map_err(failed("cannot remove a route"));
        first = first.and(removed);
    }
    first.and(sysctls)
}

/// Gives `lo` another address, for a namespace that has no other device.
///
/// # Errors
/// When the kernel refuses.
pub fn add_loopback_address(netns: &Netns, address: IpAddr) -> Result<(), PodNetworkError> {
    let message: AddressMessage = match address {
        IpAddr::V4(v4) => AddressMessageBuilder::<Ipv4Addr>::new().index(LOOPBACK).address(v4, 32).build(),
        IpAddr::V6(v6) => AddressMessageBuilder::<Ipv6Addr>::new().index(LOOPBACK).address(v6, 128).build(),
    };
    let added = netns.route().add(RouteNetlinkMessage::NewAddress(message));
    added.map_err(failed("cannot add an address to lo"))
}

/// Removes something; that it is gone already is no error.
fn remove(netlink: &mut Netlink, request: RouteNetlinkMessage, what: &'static str) -> Result<(), PodNetworkError> {
    match netlink.change(request) {
        Err(error) if error.is(libc::ENOENT) || error.is(libc::ESRCH) => Ok(()),
        other => other.map_err(failed(what)),
    }
}

fn failed(what: &'static str) -> impl Fn(NetlinkError) -> PodNetworkError {
    move |source| PodNetworkError::Netlink { what, source }
}

#[cfg(test)]
mod tests;
