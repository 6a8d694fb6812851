//! Keys, certificates, and what a peer's certificate proves.
//!
//! [`Store`] keeps one key and one certificate per identity, fetched before first use from an [`Issuer`] (over gRPC:
//! [`CaClient`]) and renewed at about half of its life. A [`Credential`] is one such certificate with its key, ready as
//! rustls configurations; [`handshake`] runs them over a stream and says who the peer is, or why it was refused.
//! [`authority`] is the other end: it signs.
//!
//! A private key is made in this process, is never printed, and never leaves it. The one exception is the key of an
//! [`Authority`], which its owner has to keep somewhere.

pub mod authority;
pub mod ca_client;
pub mod clock;
pub mod connector;
pub mod credential;
pub mod handshake;
pub mod issuer;
pub mod key;
pub mod peer;
pub mod roots;
pub mod store;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod token;

pub use authority::{Authority, CsrPublicKey};
pub use ca_client::CaClient;
pub use clock::Clock;
pub use connector::Connector;
pub use credential::{Credential, CredentialError};
pub use handshake::HandshakeError;
pub use issuer::{IssueError, IssuedCertificate, Issuer};
pub use peer::{PeerIdError, Refusal, peer_id};
pub use store::{CertificateError, Options, Retained, Store};
pub use token::{BearerToken, FileToken, TokenError, TokenSource};
