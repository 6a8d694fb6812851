//! Resource bodies. Equal content gives equal bytes, on every replica: a client that reconnects with the versions it has
//! is not sent them again.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::Arc;

use bytes::Bytes;
use mesh_model::service::BLOCKS;
use mesh_proto::{security, workload as wire};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use sha2::{Digest, Sha256};

use super::resource::Resource;

/// Fields of `istio.workload.Address`.
const WORKLOAD: u32 = 1;
const SERVICE: u32 = 2;

/// The resource of a workload that belongs to `services` (by `namespace/hostname`).
pub(super) fn workload(
    workload: &wire::Workload,
    services: BTreeMap<String, wire::PortList>,
    aliases: Vec<Arc<str>>,
) -> Resource {
    let mut message = workload.encode_to_vec();
    let member_of = services.keys().map(|name| name.as_str().into()).collect();
    // A map's own encoding follows the hash map's order, which differs from run to run. Messages may be concatenated:
    // one message per entry, in order, means the same.
    for entry in services {
        let part = wire::Workload { services: HashMap::from([entry]), ..Default::default() };
        message.extend(part.encode_to_vec());
    }
    let is_bound = workload.waypoint.is_some();
    Resource { member_of, is_bound, ..resource(workload.uid.as_str().into(), aliases, address(WORKLOAD, &message)) }
}

/// The resource of a service.
pub(super) fn service(name: Arc<str>, service: &wire::Service, mut aliases: Vec<Arc<str>>) -> Resource {
    let is_block = |address: &wire::NetworkAddress| {
        address
            .length
            .is_some_and(|length| usize::try_from(length).is_ok_and(|length| length < 8 * address.address.len()))
    };
    if service.addresses.iter().any(is_block) {
        aliases.push(BLOCKS.into());
    }
    // A waypoint's own service may be bound to itself, by its namespace.
    let is_bound = service.waypoint.as_ref().is_some_and(|waypoint| !is_of(waypoint, service));
    Resource { is_bound, ..resource(name, aliases, address(SERVICE, &service.encode_to_vec())) }
}

/// Whether the waypoint is that service.
fn is_of(waypoint: &wire::GatewayAddress, service: &wire::Service) -> bool {
    use wire::gateway_address::Destination;
    match &waypoint.destination {
        Some(Destination::Hostname(host)) => host.namespace == service.namespace && host.hostname == service.hostname,
        Some(Destination::Address(address)) => {
            service.addresses.iter().any(|own| own.network == address.network && own.address == address.address)
        }
        None => false,
    }
}

/// The resource of a policy.
pub(super) fn policy(policy: &security::Authorization) -> Resource {
    let name = format!("{}/{}", policy.namespace, policy.name).into();
    let is_named = policy.scope == i32::from(security::Scope::WorkloadSelector);
    Resource { is_named, ..resource(name, Vec::new(), policy.encode_to_vec().into()) }
}

fn resource(name: Arc<str>, aliases: Vec<Arc<str>>, body: Bytes) -> Resource {
    let mut version = String::with_capacity(16);
    for byte in Sha256::digest(&body).iter().take(8) {
        // Writing to a string cannot fail.
        let _ = write!(version, "{byte:02x}");
    }
    Resource { name, aliases, version: version.into(), body, member_of: Vec::new(), is_named: false, is_bound: false }
}

fn address(field: u32, message: &[u8]) -> Bytes {
    let mut body = Vec::with_capacity(message.len() + 6);
    encode_key(field, WireType::LengthDelimited, &mut body);
    encode_varint(message.len() as u64, &mut body);
    body.extend_from_slice(message);
    body.into()
}
