//! Making a tunnel to a peer.

use std::sync::Arc;

use mesh_hbone::Tunnel;
use mesh_identity::{HandshakeError, handshake};
use mesh_model::SpiffeId;

use crate::proxy::dial;
use crate::proxy::error::ConnectionError;
use crate::proxy::pods::Pod;
use crate::proxy::record::Direction;
use crate::proxy::tunnels::Negotiated;
use crate::proxy::worker::{TunnelKey, Worker};

/// Makes a tunnel, and says who is at its far end. Each of its steps bounds its own time; the pod's end cuts all of them
/// short.
///
/// # Errors
/// Which step failed, and how.
pub async fn dial_tunnel(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    key: TunnelKey,
) -> Result<(Tunnel, SpiffeId), ConnectionError> {
    let token = pod.live.token();
    let shared = &worker.shared;
    let options = shared.hbone_of(&pod);
    let handshakes = async {
        // First what may take seconds, so that no socket waits for it.
        let credential = shared.certificates.certificate(&key.source).await?;
        let tcp = dial::upstream(&pod, key.next_hop).await?;
        let io = shared.tunnels.list(Direction::Outbound, &pod, key.next_hop, tcp, &options.backlog);
        let (tls, peer) = handshake::connect(io, &credential, key.next_hop.ip(), &key.expected).await?;
        let (io, connection) = tls.get_ref();
        // Set once, here.
        let _ = io.facts().negotiated.set(Negotiated::of(peer.clone(), connection));
        let facts = Arc::clone(io.facts());
        let made = mesh_hbone::client::handshake(tls, &options).await.map_err(ConnectionError::Http2)?;
        Ok::<_, ConnectionError>((made, peer, facts))
    };
    let ((tunnel, driver), peer, facts) = tokio::select! {
        made = handshakes => made?,
        () = pod.live.closed() => return Err(ConnectionError::PodGone),
    };
    let (worker, turn) = (Arc::clone(&worker), worker.turns.of(&pod.uid));
    tokio::spawn(turn.run(async move {
        let _token = token;
        let ended = tokio::select! {
            ended = driver => ended,
            () = pod.live.closed() => Ok(()),
            () = facts.told_to_close() => Ok(()),
        };
        let Err(error) = ended else { return };
        tracing::debug!(%error, peer = %key.next_hop, "tunnel ended");
        if let mesh_hbone::ConnectionError::Io(error) = error
            && let error @ (HandshakeError::RefusedByPeer(_) | HandshakeError::Refused(_)) = HandshakeError::from(error)
        {
            worker.refusals.note(key, error.into());
        }
    }));
    Ok((tunnel, peer))
}
