//! A server of gRPC's health protocol, for the kubelet's probes
//! (<https://github.com/grpc/grpc/blob/master/doc/health-checking.md>).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::net::TcpStream;

use super::net;

/// `culvert-app health`.
#[derive(Debug, Args)]
pub struct Options {
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
}

/// The one method that probes call.
const CHECK: &str = "/grpc.health.v1.Health/Check";
/// A message of gRPC (not compressed, 2 bytes): `HealthCheckResponse { status: SERVING }`.
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 0x08, 0x01];
/// Statuses of gRPC.
const OK: &str = "0";
const UNIMPLEMENTED: &str = "12";

/// Says to whoever asks that it is well, until killed.
///
/// # Errors
/// The port cannot be had.
pub async fn run(options: Options) -> io::Result<bool> {
    let listener = net::listen(options.listen)?;
    net::emit(&serde_json::json!({"event": "listening", "local": listener.local_addr()?}));
    loop {
        match listener.accept().await {
            // A client that breaks off concerns nobody else.
            Ok((stream, _)) => drop(tokio::spawn(serve(stream))),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

async fn serve(stream: TcpStream) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(call) = connection.accept().await {
        let (request, respond) = call?;
        answer(&request, respond)?;
    }
    Ok(())
}

fn answer<B>(request: &Request<B>, mut respond: SendResponse<Bytes>) -> Result<(), h2::Error> {
    let known = request.uri().path() == CHECK;
    let mut head = Response::new(());
    head.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    let mut body = respond.send_response(head, false)?;
    if known {
        body.send_data(Bytes::from_static(SERVING), false)?;
    }
    let status = HeaderValue::from_static(if known { OK } else { UNIMPLEMENTED });
    body.send_trailers(HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), status)]))
}
