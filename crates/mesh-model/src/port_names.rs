//! The names of a service's ports, which SRV records are made of. The discovery protocol has no field for them: culvertd
//! sends them as an extension of the service, other control planes do not.

use std::collections::HashSet;
use std::sync::Arc;

use mesh_proto::{extension, workload as wire};
use prost::Message as _;
use thiserror::Error;

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

    /// Reads the extension, if it is there, for a service of these ports.
    pub(crate) fn from_wire(extensions: &[wire::Extension], ports: &[ServicePort]) -> Result<Self, InvalidPortNames> {
        let mut named = extensions.iter().filter(|extension| extension.name == EXTENSION);
        let Some(extension) = named.next() else { return Ok(Self::default()) };
        if named.next().is_some() {
            return Err(InvalidPortNames::Twice { what: EXTENSION.into() });
        }
        let Some(payload) = extension.config.as_ref().filter(|payload| payload.type_url == PAYLOAD_TYPE) else {
            return Ok(Self::default());
        };
        let message = extension::PortNames::decode(&*payload.value).map_err(|_| InvalidPortNames::Unreadable)?;
        let (mut names, mut numbers) = (HashSet::new(), HashSet::new());
        let mut known = Vec::with_capacity(message.ports.len().min(ports.len()));
        for port in &message.ports {
            let name = port.name.as_str();
            if !is_label(name) {
                return Err(InvalidPortNames::Name { name: name.into() });
            }
            let number = u16::try_from(port.service_port).ok().filter(|number| find_port(ports, *number).is_some());
            let number = number.ok_or(InvalidPortNames::NoSuchPort { port: port.service_port })?;
            if !names.insert(name) || !numbers.insert(number) {
                return Err(InvalidPortNames::Twice { what: format!("{name} of port {number}").into() });
            }
            known.push((name.into(), number));
        }
        Ok(Self(known.into()))
    }
}

/// Whether it is a DNS label in lower case, as Kubernetes wants the name of a port (RFC 1123, section 2.1).
fn is_label(name: &str) -> bool {
    let usual = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(usual) && !name.starts_with('-') && !name.ends_with('-')
}

/// Why the names of a service's ports cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidPortNames {
    /// The payload does not decode.
    #[error("the payload of {EXTENSION} cannot be read")]
    Unreadable,
    /// Not a name.
    #[error("{name:?} is not a DNS label in lower case")]
    Name {
        /// What was given.
        name: Box<str>,
    },
    /// A port that the service does not have.
    #[error("the service has no port {port}")]
    NoSuchPort {
        /// The number on the wire.
        port: u32,
    },
    /// The extension, a name or a port is there more than once.
    #[error("{what} is there twice")]
    Twice {
        /// What.
        what: Box<str>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::service;
    use crate::service::{InvalidService, Service};

    fn extension(name: &str, type_url: &str, value: Vec<u8>) -> wire::Extension {
        wire::Extension { name: name.into(), config: Some(prost_types::Any { type_url: type_url.into(), value }) }
    }

    fn names(ports: &[(&str, u32)]) -> wire::Extension {
        let ports = ports.iter().map(|(name, port)| extension::PortName { service_port: *port, name: (*name).into() });
        let message = extension::PortNames { ports: ports.collect() };
        extension(EXTENSION, PAYLOAD_TYPE, message.encode_to_vec())
    }

    fn read(extensions: Vec<wire::Extension>) -> Result<PortNames, InvalidService> {
        let wire = wire::Service { extensions, ..service("web", &["10.96.0.1"], &[(80, 8080), (443, 0)]) };
        Service::try_from(&wire).map(|service| service.port_names)
    }

    #[test]
    fn a_port_is_found_by_its_name() {
        let known = read(vec![names(&[("http", 80), ("https", 443)])]).unwrap();
        assert_eq!((known.port("http"), known.port("https"), known.port("grpc")), (Some(80), Some(443), None));
        assert_eq!(read(vec![names(&[("a-1", 443)])]).unwrap().port("a-1"), Some(443));
    }

    #[test]
    fn what_this_version_does_not_know_is_ignored() {
        let without = PortNames::default();
        let other = extension("example.com/anything", PAYLOAD_TYPE, vec![0xff; 9]);
        let future = extension(EXTENSION, "type.googleapis.com/culvert.discovery.v9.PortNames", vec![0xff; 9]);
        let bare = wire::Extension { name: EXTENSION.into(), config: None };
        for extensions in [vec![], vec![other.clone()], vec![future], vec![bare], vec![names(&[])]] {
            assert_eq!(read(extensions.clone()), Ok(without.clone()), "{extensions:?}");
        }
        assert_eq!(read(vec![other, names(&[("http", 80)])]).unwrap().port("http"), Some(80));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let twice = |what: &str| InvalidPortNames::Twice { what: what.into() };
        let cases = [
            (vec![extension(EXTENSION, PAYLOAD_TYPE, vec![0xff; 9])], InvalidPortNames::Unreadable),
            (vec![names(&[("http", 81)])], InvalidPortNames::NoSuchPort { port: 81 }),
            (vec![names(&[("http", 65536 + 80)])], InvalidPortNames::NoSuchPort { port: 65616 }),
            (vec![names(&[("http", 80), ("http", 443)])], twice("http of port 443")),
            (vec![names(&[("http", 80), ("web", 80)])], twice("web of port 80")),
            (vec![names(&[("http", 80)]), names(&[])], twice(EXTENSION)),
        ];
        for (extensions, expected) in cases {
            assert_eq!(read(extensions), Err(InvalidService::PortNames(expected)));
        }
        let long = "a".repeat(64);
        for name in ["", "-http", "http-", "Http", "a.b", "_http", "h\u{e4}", &long] {
            let refused = Err(InvalidService::PortNames(InvalidPortNames::Name { name: name.into() }));
            assert_eq!(read(vec![names(&[(name, 80)])]), refused);
        }
    }
}
