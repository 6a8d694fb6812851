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
