//! The `:authority` of a CONNECT, identities, and the fields beside them.

use std::net::SocketAddr;

use bytes::Bytes;
use mesh_hbone::authority::MAX_AUTHORITY;
use mesh_hbone::headers::{MAX_BYTES, MAX_FIELDS};
use mesh_hbone::{Authority, Headers, Target};
use mesh_model::SpiffeId;

/// Reads the input as an authority, as an identity, and as a list of fields, one per line.
pub fn run(input: &[u8]) {
    let mut headers = Headers::new();
    for line in input.split(|byte| *byte == b'\n') {
        let (name, value) = line.split_at(line.iter().position(|b| *b == b':').unwrap_or(line.len()));
        let name = String::from_utf8_lossy(name).into_owned();
        let before = headers.len();
        match headers.add(name.clone(), Bytes::copy_from_slice(value)) {
            Ok(()) => assert!(headers.get_bytes(&name).is_some()),
            Err(_) => assert_eq!(headers.len(), before),
        }
    }
    assert!(headers.len() <= MAX_FIELDS);
    assert!(headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() <= MAX_BYTES);
    let Ok(text) = std::str::from_utf8(input) else { return };
    authority(text);
    identity(text);
}

fn authority(text: &str) {
    let Ok(authority) = text.parse::<Authority>() else { return };
    assert!(text.len() <= MAX_AUTHORITY && authority.as_str() == text && authority.port() != 0);
    match authority.target() {
        Target::Address(address) => {
            assert_eq!(authority.socket_addr(), Some(*address));
            assert_eq!(Authority::from(*address).socket_addr(), Some(*address));
        }
        Target::Name { host, port } => {
            assert!(text.parse::<SocketAddr>().is_err(), "an address is no name");
            assert!(host.bytes().all(|b| b.is_ascii_graphic() && !b.is_ascii_uppercase() && !b"/@[]:".contains(&b)));
            assert_eq!(Authority::from_name(host, *port).unwrap().target(), authority.target());
        }
    }
}

fn identity(text: &str) {
    let Ok(id) = text.parse::<SpiffeId>() else { return };
    assert_eq!(id.as_str(), text);
    let again = SpiffeId::new(id.trust_domain(), id.namespace(), id.service_account()).unwrap();
    assert_eq!(again, id, "one text for each identity");
    assert_eq!(text, format!("spiffe://{}/ns/{}/sa/{}", id.trust_domain(), id.namespace(), id.service_account()));
}
