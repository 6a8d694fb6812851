//! As much of HTTP/1.1 as this takes: one question for a connection.

use std::io;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::Asked;

/// Longest head of a question.
const MAX_HEAD: u64 = 64 * 1024;

/// What went wrong, as the API says it.
pub(crate) fn status(code: u16) -> Value {
    let reason = match code {
        401 => "Unauthorized",
        404 => "NotFound",
        410 => "Expired",
        422 => "Invalid",
        429 => "TooManyRequests",
        504 => "Timeout",
        _ => "Other",
    };
    json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "message": reason, "reason": reason,
        "code": code,
    })
}

/// An answer that is said at once.
pub(crate) struct Reply {
    code: u16,
    headers: String,
    body: String,
}

impl Reply {
    /// A refusal, with more headers.
    pub(crate) fn refusal(code: u16, headers: &str) -> Self {
        Self { code, headers: headers.to_owned(), body: status(code).to_string() }
    }
}

/// A connection.
pub(crate) struct Connection(BufReader<TcpStream>);

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self(BufReader::new(stream))
    }

    /// Reads the question; none if there is none.
    pub(crate) async fn read(&mut self) -> io::Result<Option<Asked>> {
        let mut head = (&mut self.0).take(MAX_HEAD);
        let mut line = String::new();
        if head.read_line(&mut line).await? == 0 {
            return Ok(None);
        }
        let target = line.split(' ').nth(1).unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let (path, query) = (path.to_owned(), query.to_owned());
        let mut token = None;
        loop {
            line.clear();
            if head.read_line(&mut line).await? == 0 || line.trim_end().is_empty() {
                return Ok(Some(Asked { path, query, token, at: Instant::now() }));
            }
            let (name, value) = line.split_once(':').unwrap_or((&line, ""));
            if name.eq_ignore_ascii_case("authorization") {
                token = value.trim().strip_prefix("Bearer ").map(str::to_owned);
            }
        }
    }

    pub(crate) async fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        let Reply { code, headers, body } = reply;
        let length = body.len();
        let text = format!(
            "HTTP/1.1 {code} No\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        );
        self.write(&text).await
    }

    /// Begins an answer of which parts follow.
    pub(crate) async fn begin(&mut self) -> io::Result<()> {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\
                    Transfer-Encoding: chunked\r\n\r\n";
        self.write(head).await
    }

    pub(crate) async fn part(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.write(&format!("{:x}\r\n{text}\r\n", text.len())).await
    }

    /// That was all. An answer without this is one that broke off.
    pub(crate) async fn end(&mut self) -> io::Result<()> {
        self.write("0\r\n\r\n").await
    }

    async fn write(&mut self, text: &str) -> io::Result<()> {
        let stream = self.0.get_mut();
        stream.write_all(text.as_bytes()).await?;
        stream.flush().await
    }
}
