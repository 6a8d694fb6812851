//! The process's own pages: HTTP/1.1 from anybody who reaches the port.

use std::sync::Arc;
use std::time::Duration;

use mesh_runtime::http::{Limits, Reply, Router, connection};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

/// Sends the input to a server with a page and a form, and ends when the input does.
pub fn run(input: &[u8]) {
    crate::on_runtime(async {
        let mut router = Router::new();
        router.get("/", "a page", |_| async { Reply::text("hello\n") });
        router.post("/logging", "a form", |request| async move {
            assert!(request.body.len() <= 1 << 10, "bodies are bounded");
            Reply::text(request.parameter("level").unwrap_or_default())
        });
        let limits = Limits {
            max_body: 1 << 10,
            head_timeout: Duration::from_secs(5),
            body_timeout: Duration::from_secs(5),
            ..Limits::default()
        };
        let (near, far) = duplex(64 << 10);
        let (mut read, mut write) = tokio::io::split(far);
        let sent = async {
            let _ = write.write_all(input).await;
            let _ = write.shutdown().await;
        };
        let received = async {
            let mut answers = Vec::new();
            let _ = read.read_to_end(&mut answers).await;
            assert!(answers.is_empty() || answers.starts_with(b"HTTP/1."), "{answers:?}");
        };
        tokio::join!(sent, received, connection(near, Arc::new(router), limits, true));
    });
}
