//! What is known of a pod, validated.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use mesh_model::{InvalidSpiffeId, SpiffeId};
use mesh_proto::node;
use ztunnel_ebpf::{POD_ADDRESSES, PodEntry};

use super::super::host::Host;
use super::super::sockets::Needs;

/// Longest name, namespace, service account or UID: what Kubernetes allows of any.
const MAX_NAME: usize = 253;
/// A pod as it was announced.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PodInfo {
    /// Unique for ever; Kubernetes' UID of the pod.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account: with the namespace, its identity.
    pub service_account: String,
    /// All addresses, the primary one first; at least one, of either family.
    pub addresses: Vec<IpAddr>,
}

/// Why an announced pod is not acceptable.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPod {
    /// The message has no pod.
    #[error("the request names no pod")]
    None,
    /// A text is empty, too long or has characters that such a name cannot have.
    #[error("the pod's {0} is empty, longer than {MAX_NAME} bytes or holds unusual characters")]
    Text(&'static str),
    /// Namespace and service account are no identity.
    #[error(transparent)]
    Identity(#[from] InvalidSpiffeId),
    /// An address is not 4 or 16 bytes, or no address of a pod.
    #[error("one of the pod's addresses is not a unicast IPv4 or IPv6 address")]
    Address,
    /// None, or more than [`POD_ADDRESSES`] of one family.
    #[error("a pod has an address, and at most {POD_ADDRESSES} of IPv4 and of IPv6 each")]
    Addresses,
}

/// Where a pod runs, as it was announced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// The runtime's id; empty if it gave none.
    pub id: String,
    /// Where the network namespace is to be found; empty if it has no path.
    pub path: PathBuf,
}

impl TryFrom<Option<node::Pod>> for PodInfo {
    type Error = InvalidPod;

    fn try_from(pod: Option<node::Pod>) -> Result<Self, InvalidPod> {
        let pod = pod.ok_or(InvalidPod::None)?;
        let addresses = pod.addresses.iter().map(|bytes| address(bytes)).collect::<Result<Vec<_>, _>>()?;
        let info = Self {
            uid: valid("uid", pod.uid, |byte| byte.is_ascii_graphic())?,
            name: valid("name", pod.name, in_name)?,
            namespace: valid("namespace", pod.namespace, in_name)?,
            service_account: valid("service account", pod.service_account, in_name)?,
            addresses,
        };
        // As the proxy will make it; the trust domain, which only the proxy knows, is not the pod's to choose.
        SpiffeId::new("cluster.local", &info.namespace, &info.service_account)?;
        match info.entry(0, 0) {
            Some(_) => Ok(info),
            None => Err(InvalidPod::Addresses),
        }
    }
}

impl PodInfo {
    /// As a message.
    #[must_use]
    pub fn to_wire(&self) -> node::Pod {
        node::Pod {
            uid: self.uid.clone(),
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
            addresses: self
                .addresses
                .iter()
                .map(|address| match address {
                    IpAddr::V4(v4) => v4.octets().to_vec(),
                    IpAddr::V6(v6) => v6.octets().to_vec(),
                })
                .collect(),
        }
    }

    /// What the programs are told of it: `interface` is the index of the one that holds its addresses; `None` if it has no address, or more than they hold.
    pub(super) fn entry(&self, interface: u32, flags: u32) -> Option<PodEntry> {
        PodEntry::new(&self.addresses, interface, flags)
    }

    /// Which listeners it needs.
    pub(super) fn listeners(&self, host: &Host) -> Needs {
        Needs { dns: host.dns(), v6: self.addresses.iter().any(IpAddr::is_ipv6) }
    }

    /// The address that comes first.
    ///
    /// # Errors
    /// When it has none; one that was announced has.
    pub fn primary(&self) -> Result<IpAddr, InvalidPod> {
        self.addresses.first().copied().ok_or(InvalidPod::Addresses)
    }
}

fn in_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_')
}

fn valid(what: &'static str, text: String, allowed: fn(u8) -> bool) -> Result<String, InvalidPod> {
    if text.is_empty() || text.len() > MAX_NAME || !text.bytes().all(allowed) {
        return Err(InvalidPod::Text(what));
    }
    Ok(text)
}

fn address(bytes: &[u8]) -> Result<IpAddr, InvalidPod> {
    let address = match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).map(IpAddr::from),
        _ => return Err(InvalidPod::Address),
    };
    let address = address.map_err(|_| InvalidPod::Address)?;
    let unusable = address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address == IpAddr::V4(Ipv4Addr::BROADCAST);
    // IPv4 in the clothes of IPv6 would be of both families.
    let mapped = address.to_canonical() != address;
    if unusable || mapped { Err(InvalidPod::Address) } else { Ok(address) }
}

#[cfg(test)]
mod tests;
