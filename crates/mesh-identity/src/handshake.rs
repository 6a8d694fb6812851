//! Handshakes over any stream, with every check that has to follow one.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use mesh_model::SpiffeId;
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CommonState};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::credential::Credential;
use crate::peer::{PeerIdError, Refusal, peer_id};
use crate::tls::ALPN;

/// Longest that a handshake may take.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no tunnel.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// The peer did not finish in time.
    #[error("no TLS handshake within {TIMEOUT:?}")]
    Timeout,
    /// We refused the peer's certificate.
    #[error("peer refused: {0}")]
    Refused(Refusal),
    /// The peer ended the handshake, as it does when it refuses ours.
    #[error("refused by the peer: TLS alert {0:?}")]
    RefusedByPeer(AlertDescription),
    /// The peer does not speak HTTP/2.
    #[error("the peer did not agree on HTTP/2 (ALPN h2)")]
    NoHttp2,
    /// The peer broke the protocol, or has no version, suite or group in common with us.
    #[error("TLS handshake failed: {0}")]
    Tls(rustls::Error),
    /// The connection failed.
    #[error("connection lost during the TLS handshake: {0}")]
    Io(io::Error),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) => Self::RefusedByPeer(*alert),
            Some(rustls::Error::NoApplicationProtocol) => Self::NoHttp2,
            Some(inner) => match Refusal::of(inner) {
                Some(refusal) => Self::Refused(refusal),
                None => Self::Tls(inner.clone()),
            },
            None => Self::Io(error),
        }
    }
}

/// Accepts a tunnel as `credential`, and says whose it is.
///
/// # Errors
/// When the peer has no acceptable certificate, does not speak HTTP/2 over TLS 1.3, or takes longer than [`TIMEOUT`].
pub async fn accept<S>(io: S, credential: &Credential) -> Result<(server::TlsStream<S>, SpiffeId), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let accepting = TlsAcceptor::from(credential.server_config()).accept(io);
    let stream = tokio::time::timeout(TIMEOUT, accepting).await.map_err(|_| HandshakeError::Timeout)??;
    let peer = finish(stream.get_ref().1)?;
    Ok((stream, peer))
}

/// Opens a tunnel as `credential` to a server at `address` that must be one of `expected`, and says which one it is.
///
/// # Errors
/// When the server is none of `expected`, does not speak HTTP/2 over TLS 1.3, refuses us, or takes longer than
/// [`TIMEOUT`]. A server that refuses our certificate may say so only after the handshake: then the first read fails
/// with an error that [`HandshakeError::from`] turns into [`HandshakeError::RefusedByPeer`].
pub async fn connect<S>(
    io: S,
    credential: &Credential,
    address: IpAddr,
    expected: &[SpiffeId],
) -> Result<(client::TlsStream<S>, SpiffeId), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Nothing is checked against it and no SNI is sent: rustls wants a name.
    let name = ServerName::IpAddress(address.into());
    let connecting = TlsConnector::from(credential.client_config(expected)).connect(name, io);
    let stream = tokio::time::timeout(TIMEOUT, connecting).await.map_err(|_| HandshakeError::Timeout)??;
    let peer = finish(stream.get_ref().1)?;
    Ok((stream, peer))
}

fn finish(connection: &CommonState) -> Result<SpiffeId, HandshakeError> {
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(HandshakeError::NoHttp2);
    }
    let chain = connection.peer_certificates().ok_or(PeerIdError::NoCertificate);
    chain.and_then(peer_id).map_err(|error| HandshakeError::Refused(error.into()))
}
