//! The `forwarded` field of a CONNECT (RFC 7239): which client opened the connection, and the name that it asked for. Both are
//! what the peer says, for records only; nothing is decided by them.

use std::net::SocketAddr;

/// The field for a connection of this client, to what it knows as `host`.
#[must_use]
pub fn field(client: SocketAddr, host: Option<&str>) -> String {
    match host {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    }
}

/// The `host` that the first proxy of a field names. None if there is none, or if it is written with escapes, which no name
/// of a host needs.
#[must_use]
pub fn host(field: &str) -> Option<&str> {
    let mut rest = field;
    loop {
        let (pair, separator, after) = next(rest);
        let host = pair.trim_matches([' ', '\t']).split_once('=').filter(|(name, _)| name.eq_ignore_ascii_case("host"));
        if let Some((_, value)) = host {
            let value = value.strip_prefix('"').map_or(Some(value), |quoted| quoted.strip_suffix('"'))?;
            return (!value.is_empty() && !value.contains(['"', '\\'])).then_some(value);
        }
        // What follows a comma is what a later proxy says.
        if separator != Some(';') {
            return None;
        }
        rest = after;
    }
}

/// What stands before the next separator that is not in quotes; that separator, and what follows it.
fn next(text: &str) -> (&str, Option<char>, &str) {
    let (mut quoted, mut escaped) = (false, false);
    for (at, character) in text.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ';' | ',' if !quoted => {
                let (pair, after) = text.split_at(at);
                return (pair, Some(character), after.get(1..).unwrap_or_default());
            }
            _ => {}
        }
    }
    (text, None, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_is_found_as_peers_may_write_it() {
        for (field, wanted) in [
            ("for=\"10.1.2.3:4567\";host=cart.shop.svc.cluster.local", Some("cart.shop.svc.cluster.local")),
            ("host=\"cart.shop\"", Some("cart.shop")),
            ("For=\"[2001:db8::1]:80\"; Host=cart ;proto=http", Some("cart")),
            ("for=a, for=b;host=c", None),
            ("host=a,host=b", Some("a")),
            ("for=\"x;host=forged\";host=true", Some("true")),
            ("for=\"x\\\";host=forged\";host=true", Some("true")),
            ("for=\"never ends;host=x", None),
            ("host=", None),
            ("host=\"\"", None),
            ("host=\"x", None),
            ("host=\"a\\\"b\"", None),
            ("host=a\"b", None),
            ("ghost=x", None),
            ("host", None),
            ("", None),
            (";;host=x", Some("x")),
        ] {
            assert_eq!(host(field), wanted, "{field}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let client = "[2001:db8::1]:4567".parse().unwrap();
        assert_eq!(field(client, None), "for=\"[2001:db8::1]:4567\"");
        assert_eq!(host(&field(client, None)), None);
        assert_eq!(host(&field(client, Some("cart.shop"))), Some("cart.shop"));
    }
}
