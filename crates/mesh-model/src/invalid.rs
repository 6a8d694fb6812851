//! Workloads and services whose objects are not valid where they come from. The discovery protocol has no word for that:
//! culvertd adds an extension, so that connections to them are refused for this reason, and not for what else of the
//! resource keeps a proxy from carrying them.

use mesh_proto::workload as wire;

/// Name of the extension.
pub const EXTENSION: &str = "culvert.dev/invalid";

/// Type of its payload, as `google.protobuf.Any` names it. Another type is one of the future, and not read.
pub const PAYLOAD_TYPE: &str = "type.googleapis.com/culvert.discovery.v1.Invalid";

/// Why connections to such a resource are refused.
pub(crate) const REASON: &str = "its object is not valid, and the control plane knows no earlier version of it";

/// Whether the extension is there.
pub(crate) fn is_said(extensions: &[wire::Extension]) -> bool {
    let payload = |one: &&wire::Extension| one.config.as_ref().is_some_and(|payload| payload.type_url == PAYLOAD_TYPE);
    extensions.iter().filter(payload).any(|one| one.name == EXTENSION)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use prost::Message as _;

    use super::*;
    use crate::fixture::{pod, service};
    use crate::resolve::{Destination, Viewpoint};
    use crate::snapshot::{Change, Snapshot};

    fn extension(name: &str, type_url: &str) -> wire::Extension {
        let config = prost_types::Any { type_url: type_url.into(), value: Vec::new() };
        wire::Extension { name: name.into(), config: Some(config) }
    }

    /// Whether what has that address is taken, and whether it is refused to the control plane.
    fn taken(name: &str, address: wire::address::Type, ip: [u8; 4]) -> (bool, bool) {
        let body = wire::Address { r#type: Some(address) }.encode_to_vec();
        let (change, error) = Change::address(name, &body);
        let mut snapshot = Snapshot::new();
        snapshot.apply(change);
        let destination = snapshot.destination(&Viewpoint::default(), IpAddr::from(ip));
        let is_taken = match destination {
            Destination::Service(_) | Destination::Workload(_) => true,
            Destination::Unusable(unusable) => {
                assert_eq!(&*unusable.reason, REASON);
                false
            }
            Destination::Unknown => panic!("{name} is nowhere"),
        };
        (is_taken, error.is_some())
    }

    #[test]
    fn what_is_not_valid_where_it_comes_from_is_where_it_says_and_takes_no_connections() {
        let said = extension(EXTENSION, PAYLOAD_TYPE);
        let others = [
            extension("example.com/anything", PAYLOAD_TYPE),
            extension(EXTENSION, "type.googleapis.com/culvert.discovery.v9.Invalid"),
            wire::Extension { name: EXTENSION.into(), config: None },
        ];
        for (extensions, is_taken) in [(vec![], true), (others.to_vec(), true), (vec![others[0].clone(), said], false)]
        {
            let workload = wire::Workload { extensions: extensions.clone(), ..pod("a", &["10.0.0.1"]) };
            let uid = workload.uid.clone();
            // The control plane is told of no mistake: it is not its own.
            assert_eq!(taken(&uid, wire::address::Type::Workload(workload), [10, 0, 0, 1]), (is_taken, false));
            let service = wire::Service { extensions, ..service("web", &["10.96.0.1"], &[(80, 80)]) };
            let key = format!("{}/{}", service.namespace, service.hostname);
            assert_eq!(taken(&key, wire::address::Type::Service(service), [10, 96, 0, 1]), (is_taken, false));
        }
    }
}
