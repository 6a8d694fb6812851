//! The server over real sockets, and helpers for the other modules' pages.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;

use tokio::net::TcpStream;

use super::*;

const BOUND: Duration = Duration::from_secs(10);

/// What `GET path` answers, without a socket.
pub(crate) async fn get(router: &Router, path: &str) -> (u16, String) {
    ask(router, Method::GET, path, "").await
}

/// What `POST path?query` answers, without a socket.
pub(crate) async fn post(router: &Router, path: &str, query: &str) -> (u16, String) {
    ask(router, Method::POST, path, query).await
}

async fn ask(router: &Router, method: Method, path: &str, query: &str) -> (u16, String) {
    let headers = HeaderMap::new();
    let request = Request { method, path: path.into(), query: query.into(), headers, body: Bytes::new() };
    let reply = router.reply(request).await;
    (reply.status.as_u16(), String::from_utf8(reply.body.to_vec()).unwrap())
}

struct Running {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

async fn start(limits: Limits, local_only: bool) -> Running {
    start_with(Router::new(), limits, local_only).await
}

async fn start_with(mut router: Router, limits: Limits, local_only: bool) -> Running {
    router.get("/hello", "", |request| async move { Reply::text(format!("hello {}", request.query)) });
    router.post("/echo", "", |request| async move { Reply::text(request.body) });
    let mut server = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap().with_limits(limits);
    if local_only {
        server = server.local_only();
    }
    let address = server.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(server.serve(router, async {
        let _ = stopped.await;
    }));
    Running { address, stop, task }
}

/// Sends raw bytes and reads until the server closes.
async fn raw(address: SocketAddr, bytes: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A reset after the answer is an end, too.
    let _ = tokio::time::timeout(BOUND, stream.read_to_end(&mut answer)).await.expect("the server closes");
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn answers_over_a_socket_and_stops() {
    let server = start(Limits::default(), false).await;
    let answer = raw(server.address, "GET /hello?x=1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("hello x=1"), "{answer}");
    let answer =
        raw(server.address, "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
            .await;
    assert!(answer.ends_with("\r\n\r\nabc"), "{answer}");
    server.stop.send(()).unwrap();
    tokio::time::timeout(BOUND, server.task).await.unwrap().unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn large_bodies_and_heads_are_refused() {
    let server = start(Limits { max_body: 8, max_head: 8192, ..Limits::default() }, false).await;
    let request = "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nConnection: close\r\n\r\n123456789";
    assert!(raw(server.address, request).await.starts_with("HTTP/1.1 413 "));
    let head = format!("GET /hello HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(9000));
    assert!(raw(server.address, &head).await.starts_with("HTTP/1.1 431 "));
}

#[tokio::test]
async fn slow_heads_are_cut_and_make_room() {
    let limits = Limits { max_connections: 1, head_timeout: Duration::from_millis(50), ..Limits::default() };
    let server = start(limits, false).await;
    let slow = tokio::spawn(raw(server.address, "GET /hello HTTP/1.1\r\nHo"));
    let answer = raw(server.address, "GET /hello HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(!slow.await.unwrap().starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_request_without_a_turn_is_not_read() {
    let limits = Limits { body_timeout: Duration::from_millis(50), ..Limits::default() };
    let request = "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\n";
    let server = start_with(Router::new().at_most(0), limits, false).await;
    assert!(raw(server.address, request).await.starts_with("HTTP/1.1 503 "));
    // A turn ends with its request, also with one whose body never comes.
    let server = start_with(Router::new().at_most(1), limits, false).await;
    assert!(raw(server.address, request).await.starts_with("HTTP/1.1 408 "));
    for _ in 0..2 {
        assert!(raw(server.address, &format!("{request}abc")).await.starts_with("HTTP/1.1 200 "));
    }
}

#[tokio::test]
async fn pages_for_this_machine_refuse_browsers() {
    let server = start(Limits::default(), true).await;
    for (host, origin, status) in [
        ("localhost:15000", "", "200"),
        ("127.0.0.1:15000", "", "200"),
        ("127.0.0.1", "", "200"),
        ("[::1]:15000", "", "200"),
        ("[::1]", "", "200"),
        ("evil.example", "", "403"),
        ("localhost.evil.example", "", "403"),
        ("10.0.0.1", "", "403"),
        ("localhost", "Origin: http://evil.example\r\n", "403"),
    ] {
        let request =
            format!("POST /echo HTTP/1.1\r\nHost: {host}\r\n{origin}Content-Length: 0\r\nConnection: close\r\n\r\n");
        let answer = raw(server.address, &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{host} {origin}: {answer}");
    }
}

#[test]
fn parameters() {
    let request = |query: &str| Request {
        method: Method::GET,
        path: "/".into(),
        query: query.into(),
        headers: HeaderMap::new(),
        body: Bytes::new(),
    };
    assert_eq!(request("a=1&level=h2%3Adebug").parameter("level").as_deref(), Some("h2:debug"));
    assert_eq!(request("level").parameter("level").as_deref(), Some(""));
    assert_eq!(request("levels=1").parameter("level"), None);
}
