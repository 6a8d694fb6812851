//! The names of a service's ports, which SRV records are made of. The discovery protocol has no field for them: culvertd
//! sends them as an extension of the service, other control planes do not.

use std::collections::HashSet;
use std::sync::Arc;

use mesh_proto::{extension, workload as wire};
use prost::Message as _;

use crate::service::{ServicePort, find_port};

/// Name of the extension.
pub const EXTENSION: &str = "culvert.dev/port-names";

/// Type of its payload, as `google.protobuf.Any` names it. Another type is one of the future, and not read.
pub const PAYLOAD_TYPE: &str = "type.googleapis.com/culvert.discovery.v1.PortNames";

/// Longest name: a DNS label.
const MAX_NAME: usize = 63;

/// The names of a service's ports; empty where they are not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortNames(Box<[(Arc<str>, u16)]>);

impl PortNames {
    /// The service port of that name, which must be in lower case.
    pub fn port(&self, name: &str) -> Option<u16> {
        self.0.iter().find(|(known, _)| **known == *name).map(|(_, port)| *port)
    }

    /// Reads the extension, if it is there, for a service of these ports. Where it breaks a rule no name is known: it is no
    /// reason to lose the service.
    pub(crate) fn from_wire(extensions: &[wire::Extension], ports: &[ServicePort]) -> Self {
        Self::read(extensions, ports).unwrap_or_default()
    }

    fn read(extensions: &[wire::Extension], ports: &[ServicePort]) -> Option<Self> {
        let mut named = extensions.iter().filter(|extension| extension.name == EXTENSION);
        let (extension, None) = (named.next()?, named.next()) else { return None };
        let payload = extension.config.as_ref().filter(|payload| payload.type_url == PAYLOAD_TYPE)?;
        let message = extension::PortNames::decode(&*payload.value).ok()?;
        let (mut names, mut numbers) = (HashSet::new(), HashSet::new());
        let mut known = Vec::with_capacity(message.ports.len().min(ports.len()));
        for port in &message.ports {
            let name = Some(port.name.as_str()).filter(|name| is_label(name) && names.insert(*name))?;
            let number = u16::try_from(port.service_port).ok().filter(|number| find_port(ports, *number).is_some())?;
            if !numbers.insert(number) {
                return None;
            }
            known.push((name.into(), number));
        }
        Some(Self(known.into()))
    }
}

/// Whether it is a DNS label in lower case, as Kubernetes wants the name of a port (RFC 1123, section 2.1).
fn is_label(name: &str) -> bool {
    let usual = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(usual) && !name.starts_with('-') && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::service;
    use crate::service::Service;

    fn extension(name: &str, type_url: &str, value: Vec<u8>) -> wire::Extension {
        wire::Extension { name: name.into(), config: Some(prost_types::Any { type_url: type_url.into(), value }) }
    }

    fn names(ports: &[(&str, u32)]) -> wire::Extension {
        let ports = ports.iter().map(|(name, port)| extension::PortName { service_port: *port, name: (*name).into() });
        let message = extension::PortNames { ports: ports.collect() };
        extension(EXTENSION, PAYLOAD_TYPE, message.encode_to_vec())
    }

    fn read(extensions: Vec<wire::Extension>) -> PortNames {
        let wire = wire::Service { extensions, ..service("web", &["10.96.0.1"], &[(80, 8080), (443, 0)]) };
        let service = Service::try_from(&wire).unwrap();
        assert_eq!((service.ports.len(), service.addresses.len()), (2, 1));
        service.port_names
    }

    #[test]
    fn a_port_is_found_by_its_name() {
        let known = read(vec![names(&[("http", 80), ("https", 443)])]);
        assert_eq!((known.port("http"), known.port("https"), known.port("grpc")), (Some(80), Some(443), None));
        assert_eq!(read(vec![names(&[("a-1", 443)])]).port("a-1"), Some(443));
    }

    #[test]
    fn what_this_version_does_not_know_is_ignored() {
        let without = PortNames::default();
        let other = extension("example.com/anything", PAYLOAD_TYPE, vec![0xff; 9]);
        let future = extension(EXTENSION, "type.googleapis.com/culvert.discovery.v9.PortNames", vec![0xff; 9]);
        let bare = wire::Extension { name: EXTENSION.into(), config: None };
        for extensions in [vec![], vec![other.clone()], vec![future], vec![bare], vec![names(&[])]] {
            assert_eq!(read(extensions.clone()), without, "{extensions:?}");
        }
        assert_eq!(read(vec![other, names(&[("http", 80)])]).port("http"), Some(80));
    }

    #[test]
    fn what_cannot_be_costs_the_names_and_not_the_service() {
        let cases = [
            vec![extension(EXTENSION, PAYLOAD_TYPE, vec![0xff; 9])],
            vec![names(&[("http", 81)])],
            vec![names(&[("http", 65536 + 80)])],
            vec![names(&[("https", 443), ("http", 81)])],
            vec![names(&[("http", 80), ("http", 443)])],
            vec![names(&[("http", 80), ("web", 80)])],
            vec![names(&[("http", 80)]), names(&[])],
        ];
        for extensions in cases {
            assert_eq!(read(extensions.clone()), PortNames::default(), "{extensions:?}");
        }
        let long = "a".repeat(64);
        for name in ["", "-http", "http-", "Http", "a.b", "_http", "h\u{e4}", &long] {
            assert_eq!(read(vec![names(&[(name, 80)])]), PortNames::default(), "{name:?}");
        }
    }
}
