//! HTTP/2 as a peer sends it to the client of a tunnel, inside its TLS.

use std::time::Duration;

use bytes::Bytes;
use mesh_hbone::{Connect, Headers, Options, Tunnel, client};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

/// Longest wait for the answer to a CONNECT; most inputs end the connection before.
const WITHIN: Duration = Duration::from_millis(50);

/// Answers two CONNECTs with the input.
pub fn run(input: &[u8]) {
    crate::on_runtime(async {
        let (near, far) = duplex(64 << 10);
        let options = Options { max_header_list: 4 << 10, ..Options::default() };
        let (mut read, mut write) = tokio::io::split(far);
        let peer = async {
            let _ = write.write_all(input).await;
            let mut requests = vec![0; 16 << 10];
            // Both requests come before the end does.
            let _ = read.read(&mut requests).await;
            let _ = write.shutdown().await;
            while read.read(&mut requests).await.is_ok_and(|n| n > 0) {}
        };
        let client = async {
            let Ok((tunnel, driver)) = client::handshake(near, &options).await else { return };
            let driver = tokio::spawn(driver);
            tokio::join!(exchange(&tunnel), exchange(&tunnel));
            drop(tunnel);
            let _ = driver.await.expect("the client must not panic");
        };
        tokio::join!(peer, client);
    });
}

async fn exchange(tunnel: &Tunnel) {
    let connect = Connect { authority: "10.0.0.1:80".parse().unwrap(), headers: Headers::new() };
    let Ok((accepted, mut stream)) = tunnel.open(connect, WITHIN).await else { return };
    assert!(accepted.headers.len() <= mesh_hbone::headers::MAX_FIELDS);
    let _ = tokio::time::timeout(WITHIN, stream.write(Bytes::from_static(b"ping"))).await;
    let reading = async { while let Ok(Some(_)) = stream.read().await {} };
    let _ = tokio::time::timeout(WITHIN, reading).await;
}
