//! Streams of one tunnel: ends, resets, refusals, backpressure, GOAWAY, dead peers.

use std::time::Duration;

use bytes::Bytes;
use mesh_hbone::headers::BAGGAGE;
use mesh_hbone::{Connect, ConnectionError, Headers, OpenError, Options, ResetReason, StreamError, client};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout};

use crate::support::{SOON, connect, pair, pair_with, pipe, receive_all, send_all, soon, tcp_pair, until};

#[tokio::test]
async fn request_carries_authority_and_headers_both_ways() {
    let mut pair = pair().await;
    let mut headers = Headers::new();
    headers.add(BAGGAGE, "k8s.namespace.name=default").unwrap();
    headers.add("x-unknown", "kept").unwrap();
    let request = Connect { authority: "10.1.2.3:8080".parse().unwrap(), headers: headers.clone() };
    let opening = tokio::spawn({
        let tunnel = pair.tunnel.clone();
        async move { tunnel.open(request, SOON).await }
    });
    let got = soon(pair.requests.recv()).await.unwrap();
    assert_eq!(got.authority.as_str(), "10.1.2.3:8080");
    assert_eq!(got.authority.socket_addr(), Some("10.1.2.3:8080".parse().unwrap()));
    assert_eq!(got.headers.get(BAGGAGE), Some("k8s.namespace.name=default"));
    assert_eq!(got.headers.get("x-unknown"), Some("kept"));
    let mut answer = Headers::new();
    answer.add(BAGGAGE, "service.name=reviews").unwrap();
    let _far = got.accept(&answer).unwrap();
    let (accepted, _near) = soon(opening).await.unwrap().unwrap();
    assert_eq!(accepted.headers.get(BAGGAGE), Some("service.name=reviews"));
}

#[tokio::test]
async fn half_close_survives_in_both_directions() {
    let mut pair = pair().await;
    for client_first in [true, false] {
        let (near, far) = pair.stream().await;
        let (mut a, mut b) = if client_first { (near, far) } else { (far, near) };
        a.write(Bytes::from_static(b"question")).await.unwrap();
        a.finish().await.unwrap();
        assert_eq!(soon(b.read()).await.unwrap().unwrap(), "question");
        assert_eq!(soon(b.read()).await.unwrap(), None);
        b.write(Bytes::from_static(b"answer")).await.unwrap();
        assert_eq!(soon(a.read()).await.unwrap().unwrap(), "answer");
        b.finish().await.unwrap();
        assert_eq!(soon(a.read()).await.unwrap(), None);
        assert_eq!(a.write(Bytes::from_static(b"late")).await, Err(StreamError::Finished));
    }
    until(|| pair.tunnel.streams() == 0).await;
}

#[tokio::test]
async fn reset_is_seen_by_reader_and_writer_of_the_other_side() {
    let mut pair = pair().await;
    for client_resets in [true, false] {
        let (near, far) = pair.stream().await;
        let (mut a, b) = if client_resets { (near, far) } else { (far, near) };
        let (mut read, mut write) = b.split();
        a.reset(ResetReason::Connect);
        assert_eq!(soon(read.read()).await, Err(StreamError::Reset(ResetReason::Connect)));
        assert_eq!(
            write.write(Bytes::from_static(b"x")).await,
            Err(StreamError::Reset(ResetReason::Connect)),
            "client resets: {client_resets}"
        );
    }
}

#[tokio::test]
async fn dropped_without_finish_is_a_reset_and_never_an_end() {
    let mut pair = pair().await;
    let (mut near, far) = pair.stream().await;
    let (read, write) = far.split();
    drop(write);
    assert_eq!(soon(near.read()).await, Err(StreamError::Reset(ResetReason::Cancel)));
    drop(read);
    let (near, mut far) = pair.stream().await;
    drop(near);
    assert_eq!(soon(far.read()).await, Err(StreamError::Reset(ResetReason::Cancel)));
}

#[tokio::test]
async fn writer_with_nothing_to_write_sees_a_reset() {
    let mut pair = pair().await;
    let (mut near, mut far) = pair.stream().await;
    near.finish().await.unwrap();
    assert_eq!(soon(far.read()).await.unwrap(), None);
    let (_read, mut write) = far.split();
    near.reset(ResetReason::Cancel);
    let error = soon(std::future::poll_fn(|cx| write.poll_reset(cx))).await;
    assert_eq!(error, StreamError::Reset(ResetReason::Cancel));
}

#[tokio::test]
async fn server_speaks_first() {
    let mut pair = pair().await;
    let (mut near, mut far) = pair.stream().await;
    far.write(Bytes::from_static(b"220 ready")).await.unwrap();
    assert_eq!(soon(near.read()).await.unwrap().unwrap(), "220 ready");
}

#[tokio::test]
async fn bulk_in_both_directions_at_once_arrives_whole() {
    const TOTAL: usize = 64 << 20;
    for over_tcp in [false, true] {
        let mut pair = if over_tcp { tcp_pair().await } else { pair().await };
        let (near, far) = pair.stream().await;
        let ((near_read, near_write), (far_read, far_write)) = (near.split(), far.split());
        let sent_out = tokio::spawn(send_all(near_write, 1, TOTAL));
        let sent_back = tokio::spawn(send_all(far_write, 2, TOTAL));
        let got_out = tokio::spawn(receive_all(far_read));
        let got_back = tokio::spawn(receive_all(near_read));
        let (out, back) = (sent_out.await.unwrap(), sent_back.await.unwrap());
        assert_eq!(got_out.await.unwrap(), (TOTAL, out));
        assert_eq!(got_back.await.unwrap(), (TOTAL, back));
    }
}

#[tokio::test(start_paused = true)]
async fn slow_reader_stops_the_writer() {
    let options = Options::default();
    let mut pair = pair_with(&options).await;
    let (near, mut far) = pair.stream().await;
    let (_near_read, mut write) = near.split();
    let chunk = Bytes::from(vec![7; 64 << 10]);
    let mut written = 0;
    // Time stands still while anything can go on: a timeout means that the writer waits.
    while timeout(Duration::from_secs(1), write.write(chunk.clone())).await.is_ok() {
        written += chunk.len();
    }
    let bound = options.stream_window as usize + options.send_buffer;
    assert!(written >= options.stream_window as usize, "{written}");
    assert!(written <= bound + chunk.len(), "{written} > {bound}");
    // Other streams of the tunnel go on, and reading lets the writer go on.
    let (mut other, mut other_far) = pair.stream().await;
    other.write(Bytes::from_static(b"still here")).await.unwrap();
    assert_eq!(other_far.read().await.unwrap().unwrap(), "still here");
    let mut read = 0;
    while read < written / 2 {
        read += far.read().await.unwrap().unwrap().len();
    }
    timeout(Duration::from_secs(1), write.write(chunk)).await.unwrap().unwrap();
}

#[tokio::test]
async fn refusals_carry_their_status() {
    let mut pair = pair().await;
    for status in [400, 401, 404, 503] {
        let opening = tokio::spawn({
            let tunnel = pair.tunnel.clone();
            async move { tunnel.open(connect("10.0.0.1:80"), SOON).await.map(|_| ()) }
        });
        soon(pair.requests.recv()).await.unwrap().refuse(status);
        let error = soon(opening).await.unwrap().unwrap_err();
        assert_eq!(error, OpenError::Refused { status, headers: Headers::new() });
        assert!(!error.is_retryable());
    }
    until(|| pair.tunnel.streams() == 0).await;
}

#[tokio::test]
async fn unanswered_request_is_reset() {
    let mut pair = pair().await;
    let tunnel = pair.tunnel.clone();
    let opening = tokio::spawn(async move { tunnel.open(connect("10.0.0.1:80"), SOON).await.map(|_| ()) });
    drop(soon(pair.requests.recv()).await.unwrap());
    assert_eq!(soon(opening).await.unwrap(), Err(OpenError::Reset(ResetReason::Internal)));

    let tunnel = pair.tunnel.clone();
    let opening = tokio::spawn(async move { tunnel.open(connect("10.0.0.1:80"), SOON).await.map(|_| ()) });
    soon(pair.requests.recv()).await.unwrap().reset(ResetReason::Refused);
    let error = soon(opening).await.unwrap().unwrap_err();
    assert_eq!(error, OpenError::Reset(ResetReason::Refused));
    assert!(error.is_retryable());
}

#[tokio::test]
async fn open_gives_up_in_time_and_tells_the_server() {
    let mut pair = pair().await;
    let error = pair.tunnel.open(connect("10.0.0.1:80"), Duration::from_millis(20)).await.map(|_| ()).unwrap_err();
    assert_eq!(error, OpenError::Timeout);
    assert_eq!(pair.tunnel.streams(), 0);
    let mut request = soon(pair.requests.recv()).await.unwrap();
    assert_eq!(soon(request.given_up()).await, mesh_hbone::server::GivenUp::ByPeer);
    assert!(request.accept(&Headers::new()).is_err());
}

#[tokio::test]
async fn full_tunnel_takes_no_more_streams() {
    let options = Options { client_streams: 2, ..Options::default() };
    let mut pair = pair_with(&options).await;
    let first = pair.stream().await;
    let _second = pair.stream().await;
    assert!(pair.tunnel.reserve().is_none());
    let error = pair.tunnel.open(connect("10.0.0.1:80"), SOON).await.map(|_| ()).unwrap_err();
    assert_eq!(error, OpenError::Full);
    assert!(error.is_retryable());
    drop(first);
    let _third = pair.stream().await;
}

#[tokio::test]
async fn peers_lower_stream_limit_is_kept() {
    let options = Options { server_streams: 3, ..Options::default() };
    let pair = pair_with(&options).await;
    until(|| pair.tunnel.limit() == 3).await;
}

#[tokio::test]
async fn goaway_stops_new_streams_and_lets_old_ones_finish() {
    let mut pair = pair().await;
    let (mut near, mut far) = pair.stream().await;
    pair.drain.take().unwrap().send(()).unwrap();
    until(|| !pair.tunnel.is_usable()).await;
    let error = pair.tunnel.open(connect("10.0.0.1:80"), SOON).await.map(|_| ()).unwrap_err();
    assert_eq!(error, OpenError::GoAway);
    assert!(error.is_retryable());
    assert!(pair.tunnel.reserve().is_none());
    near.write(Bytes::from_static(b"still open")).await.unwrap();
    assert_eq!(soon(far.read()).await.unwrap().unwrap(), "still open");
    assert!(!pair.server.is_finished());
    near.finish().await.unwrap();
    far.finish().await.unwrap();
    assert_eq!(soon(far.read()).await.unwrap(), None);
    assert_eq!(soon(near.read()).await.unwrap(), None);
    drop((near, far));
    soon(pair.server).await.unwrap().unwrap();
    soon(pair.driver).await.unwrap().unwrap();
    let error = pair.tunnel.open(connect("10.0.0.1:80"), SOON).await.map(|_| ()).unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
}

#[tokio::test]
async fn idle_tunnel_that_drains_ends_at_once() {
    let mut pair = pair().await;
    pair.drain.take().unwrap().send(()).unwrap();
    soon(pair.server).await.unwrap().unwrap();
    soon(pair.driver).await.unwrap().unwrap();
    assert!(!pair.tunnel.is_usable());
}

#[tokio::test]
async fn last_tunnel_handle_dropped_ends_the_connection_after_its_streams() {
    let mut pair = pair().await;
    let (mut near, mut far) = pair.stream().await;
    drop(pair.tunnel);
    near.write(Bytes::from_static(b"goes on")).await.unwrap();
    near.finish().await.unwrap();
    assert_eq!(soon(far.read()).await.unwrap().unwrap(), "goes on");
    far.finish().await.unwrap();
    assert_eq!(soon(near.read()).await.unwrap(), None);
    assert_eq!(soon(far.read()).await.unwrap(), None);
    drop((near, far));
    soon(pair.driver).await.unwrap().unwrap();
    soon(pair.server).await.unwrap().unwrap();
}

#[tokio::test]
async fn streams_of_a_lost_connection_fail_as_tunnel_closed() {
    let mut pair = pair().await;
    let (near, mut far) = pair.stream().await;
    let (mut read, mut write) = near.split();
    let opening = tokio::spawn({
        let tunnel = pair.tunnel.clone();
        async move { tunnel.open(connect("10.0.0.1:80"), SOON).await.map(|_| ()) }
    });
    let _unanswered = soon(pair.requests.recv()).await.unwrap();
    pair.driver.abort();
    assert_eq!(soon(read.read()).await, Err(StreamError::TunnelClosed));
    assert_eq!(write.write(Bytes::from_static(b"x")).await, Err(StreamError::TunnelClosed));
    let error = soon(opening).await.unwrap().unwrap_err();
    assert_eq!(error, OpenError::Closed);
    assert!(error.is_retryable());
    assert!(!pair.tunnel.is_usable());
    assert_eq!(soon(far.read()).await, Err(StreamError::TunnelClosed));
}

#[tokio::test(start_paused = true)]
async fn silent_peer_is_noticed_by_ping() {
    let (near, _far) = pipe();
    let start = Instant::now();
    let (tunnel, driver) = client::handshake(near, &Options::default()).await.unwrap();
    let opening = tunnel.open(connect("10.0.0.1:80"), Duration::from_secs(60));
    let (opened, ended) = tokio::join!(opening, driver);
    assert!(matches!(ended, Err(ConnectionError::KeepaliveTimeout)), "{ended:?}");
    assert_eq!(opened.map(|_| ()), Err(OpenError::Closed));
    assert_eq!(start.elapsed().as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn silent_client_is_noticed_by_the_server() {
    let (mut near, far) = pipe();
    let serving = tokio::spawn(async move {
        mesh_hbone::server::serve(far, &Options::default(), std::future::pending(), |_| std::future::ready(())).await
    });
    near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let ended = serving.await.unwrap();
    assert!(matches!(ended, Err(ConnectionError::KeepaliveTimeout)), "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn client_that_sends_no_preface_is_closed() {
    let (_near, far) = pipe();
    let ended =
        mesh_hbone::server::serve(far, &Options::default(), std::future::pending(), |_| std::future::ready(())).await;
    assert!(matches!(ended, Err(ConnectionError::HandshakeTimeout)), "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn answering_peer_stays_connected() {
    let mut pair = pair().await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    let (mut near, mut far) = pair.stream().await;
    near.write(Bytes::from_static(b"alive")).await.unwrap();
    assert_eq!(far.read().await.unwrap().unwrap(), "alive");
}
