//! What a hostile or broken client may send, byte by byte; and the sizes that are budgets.

use mesh_hbone::headers::{HeaderError, MAX_FIELDS};
use mesh_hbone::server::GivenUp;
use mesh_hbone::{Connect, Headers, OpenError, Options, client, copy, server};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

use crate::support::{SOON, connect, pair, pipe, soon, tcp};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
/// HPACK's static table: `:status: 400`.
const STATUS_400: u8 = 0x80 | 12;

/// A client that writes frames by hand.
struct Raw {
    io: DuplexStream,
    requests: mpsc::UnboundedReceiver<server::Request>,
}

async fn raw() -> Raw {
    let (mut io, far) = pipe();
    let (tx, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        server::serve(far, &Options::default(), std::future::pending(), move |request| {
            let _ = tx.send(request);
            std::future::ready(())
        })
        .await
    });
    io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut raw = Raw { io, requests };
    raw.frame(SETTINGS, 0, 0, &[]).await;
    raw
}

impl Raw {
    async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.io.write_all(&frame).await.unwrap();
    }

    /// A HEADERS frame with literal fields, END_HEADERS set.
    async fn headers(&mut self, stream: u32, fields: &[(&str, &str)]) {
        let mut block = Vec::new();
        for (name, value) in fields {
            block.push(0);
            for text in [name, value] {
                assert!(text.len() < 127);
                block.push(text.len() as u8);
                block.extend(text.bytes());
            }
        }
        self.frame(HEADERS, 4, stream, &block).await;
    }

    /// The next frame of one of these kinds: kind, stream, payload.
    async fn next(&mut self, kinds: &[u8]) -> (u8, u32, Vec<u8>) {
        soon(async {
            loop {
                let mut head = [0; 9];
                self.io.read_exact(&mut head).await.unwrap();
                let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
                self.io.read_exact(&mut payload).await.unwrap();
                if kinds.contains(&head[3]) {
                    return (head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload);
                }
            }
        })
        .await
    }
}

#[tokio::test]
async fn hand_written_connect_is_accepted() {
    let mut raw = raw().await;
    raw.headers(1, &[(":method", "CONNECT"), (":authority", "10.0.0.1:80"), ("traceparent", "00-1-2-00")]).await;
    let request = soon(raw.requests.recv()).await.unwrap();
    assert_eq!(request.authority.as_str(), "10.0.0.1:80");
    let _stream = request.accept(&Headers::new()).unwrap();
    let (_, stream, block) = raw.next(&[HEADERS]).await;
    assert_eq!((stream, block[0]), (1, 0x88));
}

#[tokio::test]
async fn what_is_no_connect_is_400() {
    let requests: [&[(&str, &str)]; 6] = [
        &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "10.0.0.1:80")],
        &[(":method", "POST"), (":scheme", "https"), (":path", "/x"), (":authority", "a.example:80")],
        &[(":method", "CONNECT")],
        &[(":method", "CONNECT"), (":authority", "10.0.0.1")],
        &[(":method", "CONNECT"), (":authority", "10.0.0.256:80")],
        &[(":method", "CONNECT"), (":authority", "10.0.0.1:0")],
    ];
    let mut raw = raw().await;
    for (stream, fields) in (1..).step_by(2).zip(requests) {
        raw.headers(stream, fields).await;
        // After a 400 follows a reset with NO_ERROR: the rest of the request is not wanted.
        let (kind, payload) = loop {
            let (kind, id, payload) = raw.next(&[HEADERS, RST_STREAM]).await;
            if id == stream {
                break (kind, payload);
            }
        };
        assert_eq!(kind, HEADERS, "{fields:?}");
        assert_eq!(payload[0], STATUS_400, "{fields:?}");
    }
    assert!(raw.requests.try_recv().is_err());
}

/// HTTP/2 calls these malformed (RFC 9113 sections 8.1.1 and 8.5): either answer refuses them.
#[tokio::test]
async fn malformed_connect_never_reaches_the_handler() {
    let requests: [&[(&str, &str)]; 3] = [
        &[(":method", "CONNECT"), (":scheme", "http"), (":authority", "10.0.0.1:80")],
        &[(":method", "CONNECT"), (":path", "/"), (":authority", "10.0.0.1:80")],
        &[
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "http"),
            (":path", "/"),
            (":authority", "10.0.0.1:80"),
        ],
    ];
    for fields in requests {
        let mut raw = raw().await;
        raw.headers(1, fields).await;
        let (kind, _, payload) = raw.next(&[HEADERS, RST_STREAM, GOAWAY]).await;
        assert!(kind != HEADERS || payload[0] == STATUS_400, "{fields:?}: {kind} {payload:?}");
        assert!(raw.requests.try_recv().is_err());
    }
}

#[tokio::test]
async fn oversized_header_list_is_refused() {
    let mut raw = raw().await;
    let value = "x".repeat(120);
    let mut fields = vec![(":method", "CONNECT"), (":authority", "10.0.0.1:80")];
    fields.extend(std::iter::repeat_n(("x-filler", value.as_str()), 150));
    // 150 * (8 + 120 + 32) bytes are more than the 16 KiB that we announced, and need two frames.
    raw.headers(1, &fields).await;
    let (kind, _, payload) = raw.next(&[HEADERS, RST_STREAM, GOAWAY]).await;
    assert!(kind != HEADERS || payload[0] != 0x88, "{kind} {payload:?}");
    assert!(raw.requests.try_recv().is_err());
}

#[tokio::test]
async fn more_fields_than_fit_are_400() {
    let mut raw = raw().await;
    let mut fields = vec![(":method", "CONNECT"), (":authority", "10.0.0.1:80")];
    fields.extend(std::iter::repeat_n(("a", "b"), MAX_FIELDS + 1));
    raw.headers(1, &fields).await;
    let (kind, _, payload) = raw.next(&[HEADERS, RST_STREAM]).await;
    assert_eq!((kind, payload[0]), (HEADERS, STATUS_400));
}

/// Most peers wait for the answer. What others send before it is bounded, and delivered after it.
#[tokio::test]
async fn what_comes_before_the_answer_is_bounded_and_not_lost() {
    let mut raw = raw().await;
    raw.headers(1, &[(":method", "CONNECT"), (":authority", "10.0.0.1:80")]).await;
    let mut request = soon(raw.requests.recv()).await.unwrap();
    raw.frame(DATA, 0, 1, b"early ").await;
    raw.frame(DATA, END_STREAM, 1, b"bird").await;
    let waiting = tokio::time::timeout(std::time::Duration::from_millis(200), request.given_up()).await;
    assert!(waiting.is_err(), "{waiting:?}");
    let mut stream = request.accept(&Headers::new()).unwrap();
    let mut got = Vec::new();
    while let Some(data) = soon(stream.read()).await.unwrap() {
        got.extend(data);
    }
    assert_eq!(got, b"early bird");

    raw.headers(3, &[(":method", "CONNECT"), (":authority", "10.0.0.1:80")]).await;
    let mut request = soon(raw.requests.recv()).await.unwrap();
    for _ in 0..5 {
        raw.frame(DATA, 0, 3, &[0; 4 << 10]).await;
    }
    assert_eq!(soon(request.given_up()).await, GivenUp::TooEarly);
}

#[tokio::test]
async fn rapid_reset_closes_the_connection() {
    let mut raw = raw().await;
    let mut flood = Vec::new();
    for stream in (1u32..20_001).step_by(2) {
        let block = b"\x00\x07:method\x07CONNECT\x00\x0a:authority\x0b10.0.0.1:80";
        flood.extend(&(block.len() as u32).to_be_bytes()[1..]);
        flood.extend([HEADERS, 4]);
        flood.extend(stream.to_be_bytes());
        flood.extend(block);
        flood.extend([0, 0, 4, RST_STREAM, 0]);
        flood.extend(stream.to_be_bytes());
        flood.extend(8u32.to_be_bytes());
    }
    // The server may hang up in the middle of it.
    let _ = raw.io.write_all(&flood).await;
    let (_, _, payload) = raw.next(&[GOAWAY]).await;
    assert_eq!(payload[4..8], 11u32.to_be_bytes(), "ENHANCE_YOUR_CALM");
}

#[tokio::test]
async fn a_server_that_floods_loses_the_client() {
    let (io, far) = pipe();
    let (tunnel, driver) = mesh_hbone::client::handshake(io, &Options::default()).await.unwrap();
    let driver = tokio::spawn(driver);
    let (mut answers, mut far) = tokio::io::split(far);
    let drained = tokio::spawn(async move { tokio::io::copy(&mut answers, &mut tokio::io::sink()).await });
    let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    far.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    // The client may hang up in the middle of it.
    let _ = soon(far.write_all(&ping.repeat(3_000))).await;
    let _ = soon(driver).await.unwrap();
    assert!(!tunnel.is_usable());
    let _ = soon(drained).await.unwrap();
}

#[tokio::test]
async fn handlers_of_reset_streams_are_bounded() {
    let (io, far) = pipe();
    let (tx, mut started) = mpsc::unbounded_channel();
    let options = Options { server_streams: 4, ..Options::default() };
    tokio::spawn({
        let options = options.clone();
        async move {
            server::serve(far, &options, std::future::pending(), move |request| {
                let _ = tx.send(());
                async move {
                    // Hangs, as a dial to a host that does not answer; does not look at cancellation.
                    let _request = request;
                    std::future::pending::<()>().await;
                }
            })
            .await
        }
    });
    let (tunnel, driver) = client::handshake(io, &options).await.unwrap();
    tokio::spawn(driver);
    let mut last = None;
    for _ in 0..9 {
        let within = std::time::Duration::from_millis(30);
        last = Some(tunnel.open(connect("10.0.0.1:80"), within).await.map(|_| ()).unwrap_err());
    }
    assert_eq!(last, Some(OpenError::Reset(mesh_hbone::ResetReason::Refused)));
    let mut n = 0;
    while started.try_recv().is_ok() {
        n += 1;
    }
    assert_eq!(n, 8);
}

#[test]
fn header_lists_are_bounded_and_checked() {
    let mut headers = Headers::new();
    assert!(matches!(headers.add("Upper", "x"), Err(HeaderError::Name(_))));
    assert!(matches!(headers.add("", "x"), Err(HeaderError::Name(_))));
    assert!(matches!(headers.add(":path", "x"), Err(HeaderError::Name(_))));
    assert!(matches!(headers.add("a", "x\r\ny: z"), Err(HeaderError::Value(_))));
    assert!(matches!(headers.add("a", " x"), Err(HeaderError::Value(_))));
    assert!(matches!(headers.add("a", "x".repeat(17 << 10)), Err(HeaderError::TooMany)));
    headers.add("a", "").unwrap();
    for _ in 1..MAX_FIELDS {
        headers.add("a", "b").unwrap();
    }
    assert_eq!(headers.add("a", "b"), Err(HeaderError::TooMany));
    assert_eq!(headers.len(), MAX_FIELDS);
    assert_eq!(headers.get("a"), Some(""));
}

/// Futures live as long as connections: their sizes are part of what a connection costs.
#[tokio::test]
async fn sizes_of_futures_stay_within_budget() {
    let mut pair = pair().await;
    let request = Connect { authority: "10.0.0.1:80".parse().unwrap(), headers: Headers::new() };
    let open = pair.tunnel.open(request, SOON);
    assert!(size_of_val(&open) <= 1800, "open: {}", size_of_val(&open));
    drop(open);
    let (near, far) = pair.stream().await;
    assert!(size_of_val(&near) <= 200, "stream: {}", size_of_val(&near));
    let counters = copy::Counters::default();
    let (plain, other) = tcp().await;
    let splice = copy::splice(near, plain, &counters);
    assert!(size_of_val(&splice) <= 900, "splice: {}", size_of_val(&splice));
    drop((splice, far));
    let (plain, _other) = (other, tcp().await);
    let (second, _) = tcp().await;
    let relay = copy::relay(plain, second, &counters);
    assert!(size_of_val(&relay) <= 700, "relay: {}", size_of_val(&relay));
}
