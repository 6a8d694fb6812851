//! The webhook's registrations: they must name the roots under which the webhook's certificate verifies.

use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::ca::Authorities;
use crate::ingest::Cluster;
use crate::ingest::kubernetes::describe;

/// The registrations, which are installed with the manifests; without them nobody asks. The first is for Kubernetes' own
/// kinds, the second is installed with the definitions of the others.
const REGISTRATIONS: [&str; 2] = ["culvertd", "culvertd-custom-kinds"];
/// How often they are looked at.
const LOOK: Duration = Duration::from_secs(15);
/// Time for one request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps the registrations' roots as they should be.
#[derive(Debug)]
pub struct Bundle {
    registrations: Api<ValidatingWebhookConfiguration>,
    authorities: Authorities,
}

impl Bundle {
    /// For the registrations in `cluster`, with the roots of the newest of `authorities`.
    pub fn new(cluster: &Cluster, authorities: Authorities) -> Self {
        Self { registrations: Api::all(cluster.client()), authorities }
    }

    /// Looks again and again, and at once when the authority changes, for ever. Trouble is logged when it begins.
    pub async fn run(mut self) {
        let mut trouble = None;
        loop {
            let roots = self.authorities.borrow_and_update().roots_pem();
            let now = match tokio::time::timeout(TIMEOUT, self.look(&roots)).await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(describe(&error)),
                Err(_) => Some(format!("no answer within {TIMEOUT:?}")),
            };
            if let Some(error) = now.as_ref().filter(|_| trouble.is_none()) {
                tracing::warn!(error, "cannot keep the webhook's roots up to date");
            }
            trouble = now;
            let changed = tokio::time::timeout(LOOK, self.authorities.changed()).await;
            if matches!(changed, Ok(Err(_))) {
                // The authority never changes any more; the registration may.
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    async fn look(&self, roots: &str) -> kube::Result<()> {
        for registration in REGISTRATIONS {
            self.look_at(registration, roots).await?;
        }
        Ok(())
    }

    async fn look_at(&self, registration: &str, roots: &str) -> kube::Result<()> {
        let Some(found) = self.registrations.get_opt(registration).await? else { return Ok(()) };
        let roots = ByteString(roots.as_bytes().to_vec());
        let others =
            found.webhooks.iter().flatten().filter(|hook| hook.client_config.ca_bundle.as_ref() != Some(&roots));
        let hooks: Vec<_> =
            others.map(|hook| json!({"name": hook.name, "clientConfig": {"caBundle": roots}})).collect();
        if hooks.is_empty() {
            return Ok(());
        }
        // Webhooks are merged by name; everything else of them is the installer's.
        let patch = Patch::Strategic(json!({ "webhooks": hooks }));
        self.registrations.patch(registration, &PatchParams::default(), &patch).await?;
        tracing::info!(registration, "the webhook's roots are written");
        Ok(())
    }
}
