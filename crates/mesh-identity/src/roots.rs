//! Follows the roots that the mesh trusts while the process runs. The authority tells of them in a file (a mounted ConfigMap), of which
//! the first is the one that it signs under. When they change, certificates are renewed: they lead to the root that is
//! used now then, and the roots that come with them are the ones that are trusted now.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::time::{Instant, sleep};

use crate::connector::Connector;
use crate::issuer::certificates_from_pem;
use crate::store::Store;

/// Time between two looks. Whoever edits waits for kubelets, which take a minute.
const EVERY: Duration = Duration::from_secs(2);

/// In this time certificates are renewed. Nodes learn of a change at different times anyway; this spreads what one of them
/// asks for.
const WITHIN: Duration = Duration::from_secs(10);

/// A replica of the control plane may be asked that does not yet have the authority that another one has told of. So what does not
/// fit is renewed again after so long, and so many times: another authority may tell of other roots than the file has, for good.
const AGAIN: Duration = Duration::from_secs(15);
const TIMES: u32 = 5;

/// Renews what is in `store` when the roots in the connector's file change. Never ends by itself.
pub async fn follow(connector: Arc<Connector>, store: Store) {
    let mut known: Option<Vec<CertificateDer<'static>>> = None;
    let (mut left, mut next) = (0, Instant::now());
    loop {
        if let Some(roots) = read(&connector).await {
            if known.as_ref().is_some_and(|known| *known != roots) {
                (left, next) = (TIMES, Instant::now());
            }
            if left > 0 && Instant::now() >= next {
                (left, next) = (left - 1, Instant::now() + AGAIN);
                let count = store.renew(WITHIN, |credential| credential.roots() != roots);
                tracing::info!(count, roots = roots.len(), "the roots have changed; certificates are renewed");
            }
            known = Some(roots);
        }
        sleep(EVERY).await;
    }
}

/// What is in the file. None: who needs it says so, and until it is there all is as before.
async fn read(connector: &Connector) -> Option<Vec<CertificateDer<'static>>> {
    let text = connector.roots().await.ok()?;
    let roots = certificates_from_pem(std::str::from_utf8(&text).ok()?).ok()?;
    (!roots.is_empty()).then_some(roots)
}
