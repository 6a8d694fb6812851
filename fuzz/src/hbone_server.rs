//! HTTP/2 as a peer sends it to the server of a tunnel, inside its TLS.

use std::future::pending;

use mesh_hbone::server::{Request, serve};
use mesh_hbone::{Headers, Options, ResetReason};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Sends the client's preface and then the input to a server that answers by the port it is asked for, and ends when the
/// input does.
pub fn run(input: &[u8]) {
    crate::on_runtime(async {
        let (near, far) = duplex(64 << 10);
        let options = Options { max_header_list: 4 << 10, server_streams: 8, ..Options::default() };
        let served = tokio::spawn(async move { serve(near, &options, pending(), answer).await });
        let (mut read, mut write) = tokio::io::split(far);
        let sent = async {
            let _ = write.write_all(PREFACE).await;
            let _ = write.write_all(input).await;
            let _ = write.shutdown().await;
        };
        let received = async {
            let mut answers = vec![0; 16 << 10];
            while read.read(&mut answers).await.is_ok_and(|n| n > 0) {}
        };
        tokio::join!(sent, received);
        // How it ended does not matter, only that it does.
        let _ = served.await.expect("the server must not panic");
    });
}

async fn answer(mut request: Request) {
    assert!(request.headers.len() <= mesh_hbone::headers::MAX_FIELDS);
    match request.authority.port() % 4 {
        0 => request.refuse(503),
        1 => request.reset(ResetReason::Refused),
        2 => {
            request.given_up().await;
        }
        _ => {
            let Ok(mut stream) = request.accept(&Headers::new()) else { return };
            while let Ok(Some(data)) = stream.read().await {
                if stream.write(data).await.is_err() {
                    return;
                }
            }
            let _ = stream.finish().await;
        }
    }
}
