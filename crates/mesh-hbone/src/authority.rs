//! The target of a CONNECT: `ip:port`, `[ipv6]:port` or `name:port`.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// Longest authority that is accepted: a DNS name of 253 bytes, a colon and a port.
pub const MAX_AUTHORITY: usize = 253 + 6;

/// The `:authority` of a CONNECT, as it was sent and as it was understood. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Authority {
    raw: Arc<str>,
    target: Target,
}

/// What an [`Authority`] names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// An address literal and a port.
    Address(SocketAddr),
    /// A host name, in lower case, and a port. Used between networks only.
    Name {
        /// The host name.
        host: Arc<str>,
        /// The port, not 0.
        port: u16,
    },
}

/// Why a text is not the authority of a CONNECT.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum InvalidAuthority {
    /// Longer than [`MAX_AUTHORITY`].
    #[error("authority is longer than {MAX_AUTHORITY} bytes")]
    TooLong,
    /// No port, or not a number from 1 to 65535 without leading zeros.
    #[error("authority has no valid port")]
    Port,
    /// The host is neither an address nor a name.
    #[error("authority has no valid host")]
    Host,
}

impl Authority {
    /// The text as it was sent.
    pub fn as_str(&self) -> &str {
        &self.raw
    }

    /// What it names.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The address, if it names one.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match &self.target {
            Target::Address(addr) => Some(*addr),
            Target::Name { .. } => None,
        }
    }

    /// The port.
    pub fn port(&self) -> u16 {
        match &self.target {
            Target::Address(addr) => addr.port(),
            Target::Name { port, .. } => *port,
        }
    }

    /// An authority that names a host.
    ///
    /// # Errors
    /// If the name is not one.
    pub fn from_name(host: &str, port: u16) -> Result<Self, InvalidAuthority> {
        format!("{host}:{port}").parse()
    }
}

impl From<SocketAddr> for Authority {
    fn from(addr: SocketAddr) -> Self {
        // A scope id has no meaning on another machine.
        let addr = SocketAddr::new(addr.ip(), addr.port());
        Authority { raw: addr.to_string().into(), target: Target::Address(addr) }
    }
}

impl FromStr for Authority {
    type Err = InvalidAuthority;

    fn from_str(raw: &str) -> Result<Self, Self::Err> {
        if raw.len() > MAX_AUTHORITY {
            return Err(InvalidAuthority::TooLong);
        }
        let (host, port) = raw.rsplit_once(':').ok_or(InvalidAuthority::Port)?;
        let port = parse_port(port)?;
        let target = match host.strip_prefix('[') {
            Some(rest) => {
                let ip = rest.strip_suffix(']').and_then(|ip| ip.parse::<Ipv6Addr>().ok());
                Target::Address(SocketAddr::new(ip.ok_or(InvalidAuthority::Host)?.into(), port))
            }
            None => match host.parse::<Ipv4Addr>() {
                Ok(ip) => Target::Address(SocketAddr::new(ip.into(), port)),
                Err(_) => Target::Name { host: parse_name(host)?.into(), port },
            },
        };
        Ok(Authority { raw: raw.into(), target })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.raw)
    }
}

fn parse_port(text: &str) -> Result<u16, InvalidAuthority> {
    if text.is_empty() || text.starts_with('0') || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(InvalidAuthority::Port);
    }
    text.parse().map_err(|_| InvalidAuthority::Port)
}

/// A DNS name. One whose last label is numeric is refused: `10.0.0.256` or `010.1` must not reach a resolver that takes it
/// for an address (RFC 1123 section 2.1).
fn parse_name(host: &str) -> Result<String, InvalidAuthority> {
    let labels = || host.strip_suffix('.').unwrap_or(host).split('.');
    let label_ok = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let numeric = labels().next_back().is_none_or(|last| last.bytes().all(|b| b.is_ascii_digit()));
    if host.len() > 253 || numeric || !labels().all(label_ok) {
        return Err(InvalidAuthority::Host);
    }
    Ok(host.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Target, InvalidAuthority> {
        text.parse::<Authority>().map(|authority| authority.target().clone())
    }

    #[test]
    fn addresses_and_names() {
        assert_eq!(parse("10.0.0.1:80"), Ok(Target::Address("10.0.0.1:80".parse().unwrap())));
        assert_eq!(parse("[fd00::1]:15008"), Ok(Target::Address("[fd00::1]:15008".parse().unwrap())));
        let name = Target::Name { host: "reviews.default.svc.cluster.local".into(), port: 9080 };
        assert_eq!(parse("Reviews.default.svc.cluster.local:9080"), Ok(name));
        let authority = Authority::from_name("a_b.example.", 1).unwrap();
        assert_eq!((authority.as_str(), authority.port(), authority.socket_addr()), ("a_b.example.:1", 1, None));
    }

    #[test]
    fn what_is_sent_is_what_was_meant() {
        for text in ["10.0.0.1:80", "[fd00::1]:15008", "[::ffff:10.0.0.1]:1"] {
            let addr: SocketAddr = text.parse().unwrap();
            let authority = Authority::from(addr);
            assert_eq!(authority.to_string().parse(), Ok(authority.clone()));
            assert_eq!(authority.socket_addr(), Some(addr));
        }
        let scoped = "[fe80::1%3]:80".parse().unwrap();
        assert_eq!(Authority::from(SocketAddr::V6(scoped)).as_str(), "[fe80::1]:80");
    }

    #[test]
    fn what_is_neither_is_refused() {
        for text in ["", "10.0.0.1", "10.0.0.1:", "a:0", "a:080", "a:65536", "a:+1", "a:-1", "[fd00::1]"] {
            assert_eq!(parse(text), Err(InvalidAuthority::Port), "{text:?}");
        }
        let hosts = [
            "fd00::1",
            ":80",
            ".:80",
            "a..b:80",
            "-a:80",
            "a-:80",
            "a b:80",
            "user@a:80",
            "fd00::1:80",
            "[fd00::1:80",
            "[fd00::1%1]:80",
            "[10.0.0.1]:80",
            "10.0.0.256:80",
            "1.2.3:80",
            "127.1:80",
            "010.0.0.1:80",
            "0x7f.1:80",
            "a/b:80",
            "\u{e4}:80",
        ];
        for text in hosts {
            assert_eq!(parse(text), Err(InvalidAuthority::Host), "{text:?}");
        }
        assert_eq!(parse(&format!("{}:80", "a".repeat(64))), Err(InvalidAuthority::Host));
        assert_eq!(parse(&format!("{}:80", "a.".repeat(200))), Err(InvalidAuthority::TooLong));
    }
}
