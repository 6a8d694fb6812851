//! Why a connection failed, and what follows from it: the text for operators, the label for dashboards, the cause for our
//! own metric, the status for the peer. Each is a total function of the error.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_hbone::copy::CopyError;
use mesh_hbone::server::GivenUp;
use mesh_hbone::{OpenError, ResetReason, StreamError};
use mesh_identity::{CertificateError, HandshakeError};
use mesh_model::HBONE_PORT;

use super::admit::{Denial, DenialReason};
use super::live::CloseReason;
use super::lookup::LookupError;
use super::metrics::ResponseFlags;
use super::plan::Refusal;
use super::sockets::TakeError;

/// What may be tried after a failure, before any byte of the application was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Nothing: another attempt would fail as well, or must not be made.
    Never,
    /// Another endpoint of the service: this one cannot take the connection now.
    Elsewhere,
    /// Another endpoint, or this one once more: a tunnel to it was lost, and nobody has looked at the connection.
    Again,
}

/// Why a connection failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// Where it goes could not be decided.
    #[error("not carried: {0}")]
    Refused(#[from] Refusal),
    /// Discovery did not tell what the decision needs.
    #[error("not carried: {0}")]
    Lookup(#[from] LookupError),
    /// It may not come in.
    #[error("not let in: {0}")]
    Denied(#[from] Denial),
    /// There is no socket to carry it.
    #[error(transparent)]
    NoSocket(#[from] TakeError),
    /// The proxy has no certificate to show.
    #[error("{0}; see /config_dump on the admin port for the state of all certificates")]
    Certificate(#[from] CertificateError),
    /// The next hop or the application does not take the connection.
    #[error("cannot connect to {to}: {source}")]
    Connect {
        /// Where to.
        to: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// The next hop or the application does not answer.
    #[error("connecting to {0} timed out{hint}", hint = timeout_hint(*.0))]
    ConnectTimeout(SocketAddr),
    /// The pod has no address of this one's family.
    #[error("the pod has no address of the family of {0}")]
    Family(SocketAddr),
    /// The TLS handshake failed.
    #[error("{0}")]
    Tls(#[from] HandshakeError),
    /// The HTTP/2 handshake failed.
    #[error("HTTP/2 handshake failed: {0}")]
    Http2(mesh_hbone::ConnectionError),
    /// The tunnel that others wait for as well could not be made.
    #[error("{0}")]
    Dial(Arc<ConnectionError>),
    /// There is a tunnel, and no stream could be opened on it.
    #[error("no tunnel with room for the connection")]
    NoTunnel,
    /// The far side did not take the connection.
    #[error("{error}{hint}", hint = open_hint(.error))]
    Open {
        /// How.
        error: OpenError,
    },
    /// The peer gave up while its request was being looked at.
    #[error("the peer gave up before it was answered: {0}")]
    GaveUp(StreamError),
    /// The peer sent more than may wait while its request was being looked at.
    #[error("the peer sent too much before it was answered")]
    TooEarly,
    /// The connection was carried, and broke.
    #[error("{0}")]
    Copy(#[from] CopyError),
    /// The pod has too many connections.
    #[error("the pod has as many connections as it may; see --max-connections-per-pod")]
    TooManyConnections,
    /// The pod has too many sockets, for how many descriptors the process has left.
    #[error(
        "the pod has as many sockets as the proxy has descriptors left; see process_open_fds and process_max_fds, and raise \
         the limit of open files"
    )]
    TooManySockets,
    /// The pod has too many tunnels.
    #[error("peers have as many tunnels to the pod as they may")]
    TooManyTunnels,
    /// The peer's address has too many tunnels to the pod, or too many that it does not go on with.
    #[error("the peer has as many tunnels to the pod, or begun ones, as one address may")]
    TooManyFromPeer,
    /// The handshakes of other peers go on for so long that this one's was not begun.
    #[error("peers have as many handshakes under way with the pod as they may")]
    TooManyHandshakes,
    /// The peer connected and did not begin a TLS handshake.
    #[error("the peer did not begin a TLS handshake in time")]
    Silent,
    /// The pod went away.
    #[error("the pod is gone")]
    PodGone,
    /// A policy that was changed while the connection lived does not allow it.
    #[error("closed because policy changed{}", .0.as_ref().map(|policy| format!(": {policy} decides")).unwrap_or_default())]
    PolicyChanged(Option<Arc<str>>),
    /// The pod's connections hold more than they may, and this one had waited longest for its receiver.
    #[error("closed because its receiver takes nothing and the pod holds too much memory; see --max-held-memory")]
    TooMuchHeld,
    /// The proxy ended before the connection did.
    #[error("closed because the proxy ends; see --drain-deadline")]
    Drained,
    /// The connection's task was dropped; the tunnel under it was lost, or the proxy ends.
    #[error("cut off")]
    Dropped,
}

impl ConnectionError {
    /// The label `response_flags`.
    pub fn flags(&self) -> ResponseFlags {
        match self {
            Self::Denied(denial) => match denial.why {
                DenialReason::Policy(_) => ResponseFlags::Deny,
                DenialReason::NotAnAddress { .. }
                | DenialReason::OtherAddress { .. }
                | DenialReason::ForbiddenPort { .. }
                | DenialReason::UnknownDestination
                | DenialReason::InvalidDestination { .. }
                | DenialReason::ApplicationTunnel => ResponseFlags::Connect,
            },
            Self::PolicyChanged(_) => ResponseFlags::Deny,
            Self::Certificate(_) => ResponseFlags::IdentityError,
            Self::ConnectTimeout(to) if to.port() == HBONE_PORT => ResponseFlags::NetworkPolicy,
            Self::Tls(_) | Self::Silent => ResponseFlags::TlsFailure,
            Self::Http2(_) => ResponseFlags::H2HandshakeFailure,
            Self::Dial(error) => error.flags(),
            // What the far side's policy refused.
            Self::Open { error: OpenError::Refused { status: 401 | 403, .. } } => ResponseFlags::Deny,
            Self::Refused(_)
            | Self::Lookup(_)
            | Self::NoSocket(_)
            | Self::Connect { .. }
            | Self::ConnectTimeout(_)
            | Self::Family(_)
            | Self::NoTunnel
            | Self::Open { .. }
            | Self::TooEarly
            | Self::TooManyConnections
            | Self::TooManySockets
            | Self::TooManyTunnels
            | Self::TooManyFromPeer
            | Self::TooManyHandshakes => ResponseFlags::Connect,
            Self::GaveUp(_) | Self::Copy(_) | Self::PodGone | Self::TooMuchHeld | Self::Drained | Self::Dropped => {
                ResponseFlags::None
            }
        }
    }

    /// The cause, one word, for logs and our own metric.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused(refusal) => refusal.reason(),
            Self::Lookup(error) => error.reason(),
            Self::Denied(denial) => denial.reason(),
            Self::NoSocket(TakeError::Empty) => "no_socket",
            Self::NoSocket(TakeError::PodGone) | Self::PodGone => "pod_gone",
            Self::Certificate(_) => "no_certificate",
            Self::Connect { .. } => "connect",
            Self::ConnectTimeout(_) => "connect_timeout",
            Self::Family(_) => "address_family",
            Self::Tls(_) => "tls_handshake",
            Self::Http2(_) => "http2_handshake",
            Self::Dial(error) => error.reason(),
            Self::NoTunnel => "no_tunnel",
            Self::Open { error } => match error {
                OpenError::Refused { status: 401 | 403, .. } => "denied_by_peer",
                OpenError::Refused { .. } => "refused_by_peer",
                OpenError::Timeout => "peer_timeout",
                OpenError::Full | OpenError::GoAway | OpenError::Closed | OpenError::Reset(_) => "tunnel_lost",
                OpenError::Protocol(_) => "protocol",
            },
            Self::GaveUp(_) => "gave_up",
            Self::TooEarly => "too_early",
            Self::Copy(_) => "broken",
            Self::TooManyConnections => "too_many_connections",
            Self::TooManySockets => "too_many_sockets",
            Self::TooManyTunnels => "too_many_tunnels",
            Self::TooManyFromPeer => "too_many_from_peer",
            Self::TooManyHandshakes => "too_many_handshakes",
            Self::Silent => "silent",
            Self::PolicyChanged(_) => "policy_changed",
            Self::TooMuchHeld => "too_much_held",
            Self::Drained => "drained",
            Self::Dropped => "cut_off",
        }
    }

    /// The status that the peer's CONNECT gets.
    pub fn reply(&self) -> u16 {
        match self {
            Self::Denied(denial) => denial.reply(),
            Self::PolicyChanged(_) => 401,
            Self::TooEarly => 400,
            Self::Refused(_)
            | Self::Lookup(_)
            | Self::NoSocket(_)
            | Self::Certificate(_)
            | Self::Connect { .. }
            | Self::ConnectTimeout(_)
            | Self::Family(_)
            | Self::Tls(_)
            | Self::Http2(_)
            | Self::Dial(_)
            | Self::NoTunnel
            | Self::Open { .. }
            | Self::GaveUp(_)
            | Self::Copy(_)
            | Self::TooManyConnections
            | Self::TooManySockets
            | Self::TooManyTunnels
            | Self::TooManyFromPeer
            | Self::TooManyHandshakes
            | Self::Silent
            | Self::PodGone
            | Self::TooMuchHeld
            | Self::Drained
            | Self::Dropped => 503,
        }
    }

    /// Whether the connection was never carried, rather than carried and broken.
    pub fn is_failure_to_connect(&self) -> bool {
        match self {
            Self::Refused(_)
            | Self::Lookup(_)
            | Self::Denied(_)
            | Self::NoSocket(_)
            | Self::Certificate(_)
            | Self::Connect { .. }
            | Self::ConnectTimeout(_)
            | Self::Family(_)
            | Self::Tls(_)
            | Self::Http2(_)
            | Self::Dial(_)
            | Self::NoTunnel
            | Self::Open { .. }
            | Self::TooEarly
            | Self::TooManyConnections
            | Self::TooManySockets
            | Self::TooManyTunnels
            | Self::TooManyFromPeer
            | Self::TooManyHandshakes
            | Self::Silent => true,
            Self::GaveUp(_)
            | Self::Copy(_)
            | Self::PodGone
            | Self::PolicyChanged(_)
            | Self::TooMuchHeld
            | Self::Drained
            | Self::Dropped => false,
        }
    }
}

impl ConnectionError {
    /// What may be tried after an attempt to reach an endpoint has failed like this.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Dial(error) => error.retry(),
            Self::Connect { .. } | Self::ConnectTimeout(_) => Retry::Elsewhere,
            Self::Tls(error) => match error {
                // A proxy that is killed takes the handshakes with it.
                HandshakeError::Io(_) => Retry::Again,
                HandshakeError::Timeout
                | HandshakeError::Refused(_)
                | HandshakeError::RefusedByPeer(_)
                | HandshakeError::NoHttp2
                | HandshakeError::Tls(_) => Retry::Elsewhere,
            },
            Self::Http2(error) => match error {
                mesh_hbone::ConnectionError::Io(_) => Retry::Again,
                mesh_hbone::ConnectionError::HandshakeTimeout
                | mesh_hbone::ConnectionError::KeepaliveTimeout
                | mesh_hbone::ConnectionError::Protocol(_) => Retry::Elsewhere,
            },
            Self::NoTunnel => Retry::Again,
            Self::Open { error } if error.is_retryable() => Retry::Again,
            Self::Open { error } => match error {
                // The far side has not reached its application: no byte of ours was delivered.
                OpenError::Refused { status: 503, .. } => Retry::Elsewhere,
                OpenError::Refused { .. } => Retry::Never,
                OpenError::Full
                | OpenError::GoAway
                | OpenError::Closed
                | OpenError::Reset(_)
                | OpenError::Timeout
                | OpenError::Protocol(_) => Retry::Elsewhere,
            },
            Self::Refused(_)
            | Self::Lookup(_)
            | Self::Denied(_)
            | Self::NoSocket(_)
            | Self::Certificate(_)
            | Self::Family(_)
            | Self::GaveUp(_)
            | Self::TooEarly
            | Self::Copy(_)
            | Self::TooManyConnections
            | Self::TooManySockets
            | Self::TooManyTunnels
            | Self::TooManyFromPeer
            | Self::TooManyHandshakes
            | Self::Silent
            | Self::PodGone
            | Self::PolicyChanged(_)
            | Self::TooMuchHeld
            | Self::Drained
            | Self::Dropped => Retry::Never,
        }
    }
}

impl From<CloseReason> for ConnectionError {
    fn from(reason: CloseReason) -> Self {
        match reason {
            CloseReason::PodGone => Self::PodGone,
            CloseReason::Denied(policy) => Self::PolicyChanged(policy),
            CloseReason::TooMuchHeld => Self::TooMuchHeld,
            CloseReason::Drained => Self::Drained,
        }
    }
}

impl From<GivenUp> for ConnectionError {
    fn from(given_up: GivenUp) -> Self {
        match given_up {
            GivenUp::ByPeer => Self::GaveUp(StreamError::Reset(ResetReason::Cancel)),
            GivenUp::TooEarly => Self::TooEarly,
        }
    }
}

fn timeout_hint(to: SocketAddr) -> &'static str {
    if to.port() == HBONE_PORT { "; a NetworkPolicy or firewall may drop port 15008 (HBONE)" } else { "" }
}

fn open_hint(error: &OpenError) -> &'static str {
    match error {
        OpenError::Refused { status: 401 | 403, .. } => {
            "; a policy at the destination denies it, see the access log of its node"
        }
        OpenError::Refused { status: 503, .. } => "; the application does not listen there, or its pod is not known",
        OpenError::Refused { .. }
        | OpenError::Full
        | OpenError::GoAway
        | OpenError::Closed
        | OpenError::Reset(_)
        | OpenError::Timeout
        | OpenError::Protocol(_) => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_hbone::Headers;

    fn refused(status: u16) -> ConnectionError {
        ConnectionError::Open { error: OpenError::Refused { status, headers: Headers::new() } }
    }

    #[test]
    fn a_denial_by_the_far_side_is_a_denial() {
        assert_eq!(refused(401).flags(), ResponseFlags::Deny);
        assert_eq!(refused(503).flags(), ResponseFlags::Connect);
        assert_eq!(refused(401).reason(), "denied_by_peer");
        assert!(refused(401).to_string().contains("policy at the destination"), "{}", refused(401));
    }

    #[test]
    fn only_what_was_not_looked_at_is_tried_again() {
        let open = |error| ConnectionError::Open { error };
        let tls = |error| ConnectionError::Dial(Arc::new(ConnectionError::Tls(error)));
        let cut = || io::Error::from(io::ErrorKind::ConnectionReset);
        let to = "10.0.0.1:15008".parse().unwrap();
        let cases = [
            (refused(503), Retry::Elsewhere),
            (refused(401), Retry::Never),
            (refused(400), Retry::Never),
            (open(OpenError::Closed), Retry::Again),
            (open(OpenError::GoAway), Retry::Again),
            (open(OpenError::Reset(mesh_hbone::ResetReason::Refused)), Retry::Again),
            (open(OpenError::Reset(mesh_hbone::ResetReason::Internal)), Retry::Elsewhere),
            (open(OpenError::Timeout), Retry::Elsewhere),
            (ConnectionError::ConnectTimeout(to), Retry::Elsewhere),
            (ConnectionError::Connect { to, source: cut() }, Retry::Elsewhere),
            (tls(HandshakeError::Io(cut())), Retry::Again),
            (tls(HandshakeError::NoHttp2), Retry::Elsewhere),
            (ConnectionError::NoSocket(TakeError::Empty), Retry::Never),
            (ConnectionError::PodGone, Retry::Never),
        ];
        for (error, expected) in cases {
            assert_eq!(error.retry(), expected, "{error}");
        }
    }

    #[test]
    fn a_silent_hbone_port_points_at_network_policy() {
        let tunnel = ConnectionError::ConnectTimeout("10.0.0.1:15008".parse().unwrap());
        assert_eq!(tunnel.flags(), ResponseFlags::NetworkPolicy);
        assert!(tunnel.to_string().contains("NetworkPolicy"), "{tunnel}");
        let plain = ConnectionError::ConnectTimeout("10.0.0.1:80".parse().unwrap());
        assert_eq!(plain.flags(), ResponseFlags::Connect);
        assert!(!plain.to_string().contains("NetworkPolicy"), "{plain}");
    }

    #[test]
    fn a_shared_dial_fails_for_its_own_reason() {
        let dial =
            ConnectionError::Dial(Arc::new(ConnectionError::Http2(mesh_hbone::ConnectionError::HandshakeTimeout)));
        assert_eq!((dial.flags(), dial.reason()), (ResponseFlags::H2HandshakeFailure, "http2_handshake"));
    }

    #[test]
    fn what_broke_under_way_is_no_failure_to_connect() {
        let broke = [ConnectionError::Drained, ConnectionError::Dropped, ConnectionError::PodGone];
        for error in broke.into_iter().chain([ConnectionError::TooMuchHeld]) {
            assert!(!error.is_failure_to_connect());
            assert_eq!(error.flags(), ResponseFlags::None);
        }
        assert!(refused(503).is_failure_to_connect());
    }
}
