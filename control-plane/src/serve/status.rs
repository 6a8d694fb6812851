//! The admin pages that tell an operator what is accepted, what is refused and why, and who follows.

use std::sync::Arc;
use std::time::SystemTime;

use mesh_runtime::http::{Reply, Router};
use mesh_xds::server::{Catalog, ClientStatus, Service, Snapshot};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use super::dump;
use super::metrics::pending;
use super::pipeline::View;
use crate::api::Kind;
use crate::ingest::Watches;
use crate::ingest::kubernetes::KindReport;
use crate::status::{Leadership, Leading};

/// Adds `/status` and `/config_dump`. `leading` is who leads the replicas of a cluster.
pub fn mount(
    router: &mut Router,
    view: watch::Receiver<Arc<View>>,
    catalog: Arc<Catalog>,
    discovery: Service,
    watches: Watches,
    leading: Option<Leading>,
) {
    let versions = catalog.clone();
    router.get("/status", "objects accepted and refused, clients and their NACKs", move |_| {
        let view = view.borrow().clone();
        let leader = leading.as_ref().map(Leading::now);
        let reply = Reply::json(&status(&view, &versions, &discovery, &watches, leader.as_ref()));
        async move { reply }
    });
    router.get("/config_dump", "everything that is served", move |_| {
        let snapshot = catalog.snapshot();
        async move {
            // A large mesh takes a while to write out.
            let dumped = tokio::task::spawn_blocking(move || Reply::json(&dump::dump(&snapshot))).await;
            dumped.unwrap_or_else(|_| {
                Reply::text("the dump failed\n").with_status(http::StatusCode::INTERNAL_SERVER_ERROR)
            })
        }
    });
}

fn status(
    view: &View,
    catalog: &Catalog,
    discovery: &Service,
    watches: &Watches,
    leader: Option<&Leadership>,
) -> Value {
    let snapshot = catalog.snapshot();
    let (clients, refused) = (discovery.clients(), discovery.nacks());
    let types: Vec<Value> = snapshot
        .versions()
        .map(|(type_url, version)| {
            json!({ "type": &**type_url, "resources": snapshot.len(type_url), "version": version })
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "synced": view.synced,
        "leader": leader.map(|known| json!({ "me": &*known.me, "leads": known.leads(), "holder": known.holder })),
        "objects": view.counts.iter().map(|(kind, count)| (kind.as_str(), *count)).collect::<std::collections::BTreeMap<_, _>>(),
        "source": *view.report,
        "watches": watches.reports().into_iter().map(watch_report).collect::<serde_json::Map<_, _>>(),
        "notes": view.notes,
        "resources": types,
        "refused_responses": refused,
        "clients": clients.iter().map(|known| client(known, &snapshot)).collect::<Vec<_>>(),
    })
}

fn watch_report((kind, report): (Kind, KindReport)) -> (String, Value) {
    let value = json!({
        "state": report.state.as_str(),
        "lists": report.lists,
        "failures": report.failures,
        "last_event": report.last_event.map(rfc3339),
        "trouble": report.trouble,
    });
    (kind.as_str().to_owned(), value)
}

fn client(client: &ClientStatus, snapshot: &Snapshot) -> Value {
    let types = client.types.iter().map(|kind| {
        json!({
            "type": &*kind.type_url,
            "wildcard": kind.wildcard,
            "names": kind.names,
            "sent": kind.sent,
            "acked": kind.acked,
            "in_flight": kind.in_flight,
            "nacks": kind.nacks.iter().map(|nack| {
                json!({ "resource": nack.resource, "reason": nack.reason, "at": rfc3339(nack.at) })
            }).collect::<Vec<_>>(),
        })
    });
    json!({
        "id": client.id,
        "client": client.client,
        "node_id": client.node_id,
        "address": client.address.map(|address| address.to_string()),
        "connected_since": rfc3339(client.connected_since),
        "pending_changes": pending(client, snapshot),
        "refused_responses": client.nacks,
        "types": types.collect::<Vec<_>>(),
    })
}

fn rfc3339(at: SystemTime) -> String {
    OffsetDateTime::from(at).format(&Rfc3339).unwrap_or_default()
}
