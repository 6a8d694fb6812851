//! The few header fields that travel beside a CONNECT and its answer, as a small bounded list.

use std::borrow::Cow;

use bytes::Bytes;
use thiserror::Error;

/// Name of the field that tells the peer about the source workload (W3C baggage).
pub const BAGGAGE: &str = "baggage";
/// Name of the field that tells the peer the client's address (RFC 7239).
pub const FORWARDED: &str = "forwarded";
/// Name of the trace context field (W3C trace context).
pub const TRACEPARENT: &str = "traceparent";
/// Name of the field that tells the network a connection came from, in the inner CONNECT of a double tunnel.
pub const X_FORWARDED_NETWORK: &str = "x-forwarded-network";
/// Name of the field by which waypoints and gateways mark what they forward.
pub const X_ISTIO_SOURCE: &str = "x-istio-source";

/// Most fields that one list holds.
pub const MAX_FIELDS: usize = 64;
/// Most bytes that one list holds, names and values together.
pub const MAX_BYTES: usize = 16 << 10;

/// Header fields in the order in which they were added. At most [`MAX_FIELDS`] fields and [`MAX_BYTES`] bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers {
    fields: Vec<(Cow<'static, str>, Bytes)>,
    bytes: usize,
}

/// Why a header field cannot be added to a [`Headers`] list.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum HeaderError {
    /// The name is empty, not lower case, or holds a byte that a field name cannot hold.
    #[error("invalid header name {0:?}")]
    Name(String),
    /// The value holds a control byte.
    #[error("invalid value of header {0}")]
    Value(String),
    /// The list is full.
    #[error("more than {MAX_FIELDS} header fields or {MAX_BYTES} bytes of them")]
    TooMany,
}

impl Headers {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a field. The name must be lower case.
    ///
    /// # Errors
    /// If name or value cannot be sent in HTTP/2 (RFC 9113 section 8.2.1), or the list is full.
    pub fn add(&mut self, name: impl Into<Cow<'static, str>>, value: impl Into<Bytes>) -> Result<(), HeaderError> {
        let (name, value) = (name.into(), value.into());
        if name.is_empty() || !name.bytes().all(is_name_byte) {
            return Err(HeaderError::Name(name.into_owned()));
        }
        let trimmed = value.first().is_none_or(|b| !is_space(*b)) && value.last().is_none_or(|b| !is_space(*b));
        if !trimmed || !value.iter().all(|b| *b == b'\t' || (*b >= 0x20 && *b != 0x7f)) {
            return Err(HeaderError::Value(name.into_owned()));
        }
        let bytes = self.bytes + name.len() + value.len();
        if self.fields.len() == MAX_FIELDS || bytes > MAX_BYTES {
            return Err(HeaderError::TooMany);
        }
        self.bytes = bytes;
        self.fields.push((name, value));
        Ok(())
    }

    /// The first value of this name if it is UTF-8. Absence and unreadable values are the same to a receiver.
    pub fn get(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.get_bytes(name)?).ok()
    }

    /// The first value of this name.
    pub fn get_bytes(&self, name: &str) -> Option<&[u8]> {
        self.fields.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_ref())
    }

    /// All fields, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.fields.iter().map(|(n, v)| (n.as_ref(), v.as_ref()))
    }

    /// Number of fields.
    pub fn len(&self) -> usize {
        self.fields.len()
    }

    /// Whether there is no field.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }

    pub(crate) fn to_map(&self) -> Result<http::HeaderMap, HeaderError> {
        let mut map = http::HeaderMap::with_capacity(self.fields.len());
        for (name, value) in &self.fields {
            let key = http::HeaderName::from_bytes(name.as_bytes())
                .map_err(|_| HeaderError::Name(name.clone().into_owned()))?;
            let value = http::HeaderValue::from_maybe_shared(value.clone())
                .map_err(|_| HeaderError::Value(name.clone().into_owned()))?;
            map.append(key, value);
        }
        Ok(map)
    }

    /// Fields that came from a peer.
    pub(crate) fn from_map(map: &http::HeaderMap) -> Result<Self, HeaderError> {
        let mut headers = Headers { fields: Vec::with_capacity(map.len().min(MAX_FIELDS)), bytes: 0 };
        for (name, value) in map {
            headers.add(name.as_str().to_owned(), Bytes::copy_from_slice(value.as_bytes()))?;
        }
        Ok(headers)
    }
}

/// A lower-case token byte (RFC 9110 section 5.6.2; RFC 9113 section 8.2.1 forbids upper case).
fn is_name_byte(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&b)
}

fn is_space(b: u8) -> bool {
    b == b' ' || b == b'\t'
}
