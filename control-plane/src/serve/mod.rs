//! Everything that faces outwards: discovery and certificates over TLS, metrics, readiness, status.

mod dump;
mod listener;
mod metered;
pub mod metrics;
mod pipeline;
mod status;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_runtime::drain;
use mesh_xds::server::{self, Catalog, Client};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::transport::Error;

use crate::ca::{Authenticator, CaService};
use metered::Metered;

pub(crate) use listener::{Bounds, accept};
pub use metrics::Metrics;
pub use pipeline::{Pipeline, View};
pub use status::mount;

/// Connections at a time; a node proxy has two. Of one address as many as several nodes behind one that translates need.
const BOUNDS: Bounds = Bounds { all: 8192, of_one: 256, patience: Duration::from_secs(10) };
/// Time that open calls have to end when the process does.
const DRAIN: Duration = Duration::from_secs(5);

/// The discovery service over a catalog, for whoever has a valid token.
pub fn discovery(catalog: Arc<Catalog>, authenticator: Authenticator) -> server::Service {
    let authenticate = move |metadata: &tonic::metadata::MetadataMap, peer: Option<SocketAddr>| {
        let peer = peer.map(|peer| peer.ip());
        let (authenticator, metadata) = (authenticator.clone(), metadata.clone());
        async move { Ok(Client { name: authenticator.authenticate(&metadata, peer).await?.to_string() }) }
    };
    server::Service::new(catalog, authenticate, server::Options::default())
}

/// Serves discovery and certificates on `listener` until `watcher` drains; then ends the streams, so that clients
/// reconnect to another replica, and gives calls a moment to complete.
///
/// # Errors
/// The server failed.
pub async fn grpc(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    discovery: server::Service,
    authority: CaService,
    metrics: &Metrics,
    watcher: drain::Watcher,
) -> Result<(), Error> {
    let incoming = listener::accept(listener, acceptor, BOUNDS, watcher.clone());
    let served = server::transport()
        .add_service(discovery.clone())
        .add_service(Metered::new(authority.into_server(), metrics))
        .serve_with_incoming_shutdown(incoming, async {
            watcher.draining().await;
            discovery.close();
        });
    let deadline = async {
        watcher.draining().await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = served => result,
        () = deadline => Ok(()),
    }
}
