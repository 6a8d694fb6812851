//! The `forwarded` field of a CONNECT, in which a peer says for whom it opens a connection.

use std::net::{Ipv6Addr, SocketAddr};

use ztunnel::proxy::forwarded::{field, host};

/// Reads the input as a field, and as the name of a host that is written into one.
pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Some(found) = host(text) {
        let bounds = text.as_bytes().as_ptr_range();
        assert!(bounds.contains(&found.as_ptr()), "it is a part of the field: nothing is made up");
        assert!(!found.is_empty() && !found.contains(['"', '\\']), "{found:?} is not what was quoted");
        assert_eq!(
            host(&format!("for=\"a;host=b,c\\\"\";Host=\"{found}\", host=other")),
            Some(found),
            "one way to read it"
        );
    }
    // No name that this mesh writes is read as another one, whatever is in it.
    let is_name = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && !b"\",;\\".contains(&b));
    let client = SocketAddr::from((Ipv6Addr::LOCALHOST, 80));
    let read = field(client, Some(text));
    assert!(!is_name || host(&read) == Some(text), "{read}");
    assert_eq!(host(&field(client, None)), None);
}
