//! Metrics: one registry per process, served as OpenMetrics text.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use ::http::StatusCode;
use prometheus_client::encoding::text::encode;

use crate::http::{Reply, Router};

/// The Content-Type of [`Registry::encode`]'s text (OpenMetrics 1.0).
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The process's metrics. Cheap to clone; clones share the metrics.
#[derive(Clone, Default)]
pub struct Registry(Arc<RwLock<prometheus_client::registry::Registry>>);

impl Registry {
    /// No metrics.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the caller register its metrics, and returns what it returns: usually the struct that holds them.
    pub fn register<T>(&self, register: impl FnOnce(&mut prometheus_client::registry::Registry) -> T) -> T {
        register(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// All metrics as text, of type [`CONTENT_TYPE`]. Fails if a metric's own encoder does.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.0.read().unwrap_or_else(PoisonError::into_inner))?;
        Ok(text)
    }

    /// Adds `GET /metrics` and `GET /stats/prometheus`.
    pub fn mount(&self, router: &mut Router) {
        for path in ["/metrics", "/stats/prometheus"] {
            let registry = self.clone();
            router.get(path, "metrics", move |_| {
                let reply = match registry.encode() {
                    Ok(text) => Reply::text(text).with_content_type(CONTENT_TYPE),
                    Err(error) => Reply::text(format!("{error}\n")).with_status(StatusCode::INTERNAL_SERVER_ERROR),
                };
                async move { reply }
            });
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registry")
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::http::tests::get;

    #[tokio::test]
    async fn both_paths_show_the_metrics() {
        let registry = Registry::new();
        let opened: Counter = registry.register(|registry| {
            let opened = Counter::default();
            registry.register("connections_opened", "Connections opened", opened.clone());
            opened
        });
        opened.inc_by(3);
        let mut router = Router::new();
        registry.mount(&mut router);
        for path in ["/metrics", "/stats/prometheus"] {
            let (status, body) = get(&router, path).await;
            assert_eq!(status, 200);
            assert!(body.contains("\nconnections_opened_total 3\n"), "{body}");
            assert!(body.ends_with("# EOF\n"), "{body}");
        }
    }
}
