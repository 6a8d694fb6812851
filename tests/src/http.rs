//! A blocking HTTP/1.1 client for one small request: admin pages, metrics, the product page.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::Error;
use crate::error::Context;
use crate::netns::NetNs;

/// Longest answer read.
const LIMIT: u64 = 64 << 20;
/// How long a request may take.
pub(crate) const BOUND: Duration = Duration::from_secs(10);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header lines as sent, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: String,
}

/// One request over a connected stream; the connection is closed after it.
///
/// # Errors
/// A broken connection, no answer within 10 s, or what is not HTTP.
pub fn exchange(stream: TcpStream, method: &str, host: &str, path: &str) -> Result<Answer, Error> {
    let what = || format!("{method} {path} from {host}");
    stream.set_read_timeout(Some(BOUND)).during(what)?;
    stream.set_write_timeout(Some(BOUND)).during(what)?;
    talk(stream, method, host, path, "", None)
}

/// As [`exchange`], over any stream that bounds its own waiting; with further lines of the head, each with its end, and `body`
/// with its media type.
pub(crate) fn talk(
    mut stream: impl Read + Write,
    method: &str,
    host: &str,
    path: &str,
    more: &str,
    body: Option<(&str, &[u8])>,
) -> Result<Answer, Error> {
    let what = || format!("{method} {path} from {host}");
    let mut request = format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{more}");
    if let Some((kind, _)) = body {
        request.push_str(&format!("content-type: {kind}\r\n"));
    }
    let body = body.map_or(&[][..], |(_, body)| body);
    request.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
    stream.write_all(&[request.as_bytes(), body].concat()).during(what)?;
    let mut bytes = Vec::new();
    stream.take(LIMIT).read_to_end(&mut bytes).during(what)?;
    parse(&bytes).ok_or_else(|| Error::Output {
        what: what(),
        reason: "not an HTTP/1.1 answer".to_owned(),
        output: String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned(),
    })
}

fn parse(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<_> =
        lines.filter_map(|l| l.split_once(':')).map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned())).collect();
    let rest = &bytes[end + 4..];
    let chunked = headers.iter().any(|(n, v)| n == "transfer-encoding" && v.eq_ignore_ascii_case("chunked"));
    let length = headers.iter().find(|(n, _)| n == "content-length").and_then(|(_, v)| v.parse::<usize>().ok());
    let body = match (chunked, length) {
        (true, _) => unchunk(rest)?,
        (false, Some(length)) => rest.get(..length)?.to_vec(),
        (false, None) => rest.to_vec(),
    };
    Some(Answer { status, headers, body: String::from_utf8_lossy(&body).into_owned() })
}

fn unchunk(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|w| w == b"\r\n")?;
        let size = std::str::from_utf8(&bytes[..end]).ok()?.split(';').next()?.trim();
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(bytes.get(end + 2..end + 2 + size)?);
        bytes = bytes.get(end + 2 + size + 2..)?;
    }
}

/// `GET` from inside a namespace.
///
/// # Errors
/// As [`exchange`], or no connection.
pub fn get(network: &NetNs, at: SocketAddr, path: &str) -> Result<Answer, Error> {
    exchange(network.connect(at, BOUND)?, "GET", &at.to_string(), path)
}

/// `POST` without a body from inside a namespace.
///
/// # Errors
/// As [`exchange`], or no connection.
pub fn post(network: &NetNs, at: SocketAddr, path: &str) -> Result<Answer, Error> {
    exchange(network.connect(at, BOUND)?, "POST", &at.to_string(), path)
}

/// The body of a `GET` that must be answered 200.
///
/// # Errors
/// As [`get`], or another status.
pub fn get_ok(network: &NetNs, at: SocketAddr, path: &str) -> Result<String, Error> {
    let answer = get(network, at, path)?;
    if answer.status == 200 {
        return Ok(answer.body);
    }
    let reason = format!("status {}", answer.status);
    Err(Error::Output { what: format!("GET {path} from {at}"), reason, output: answer.body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_by_length_and_by_chunks() {
        let plain = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi and more").expect("plain");
        assert_eq!((plain.status, plain.body.as_str()), (200, "hi"));
        let chunks = parse(b"HTTP/1.1 503 No\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1;x\r\nc\r\n0\r\n\r\n");
        assert_eq!(chunks.map(|a| (a.status, a.body)), Some((503, "abc".to_owned())));
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort"), None, "cut off");
        assert_eq!(parse(b"ssh"), None);
    }
}
