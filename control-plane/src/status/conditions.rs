//! What the status of an object is to say. Pure: what became of objects and what proxies refused in, conditions out.
//!
//! Types and reasons are those that Istio writes, or Gateway API has, so that what waits for them goes on working.

mod binding;
mod entries;
mod gateways;

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_xds::server::ClientStatus;
use mesh_xds::{AUTHORIZATION_TYPE, WORKLOAD_TYPE};
use serde_json::{Value, json};

use crate::api::{AuthorizationPolicy, GatewayClass, Kind, Object, ObjectId, PolicyTarget};
use crate::ca::{Caller, ServiceAccount};
use crate::index::{self, Note};
use crate::ingest::kubernetes::{Outcome, Verdict};

/// Of a policy or an entry: whether the nodes' proxies put it in force.
const ZTUNNEL_ACCEPTED: &str = "ZtunnelAccepted";
/// Of a policy that names what it is attached to: whether a waypoint puts it in force.
const WAYPOINT_ACCEPTED: &str = "WaypointAccepted";
/// Of a service or a ServiceEntry: whether its traffic goes through a waypoint.
const WAYPOINT_BOUND: &str = "istio.io/WaypointBound";
/// Longest message, in bytes.
const MAX_MESSAGE: usize = 4096;
/// Proxies that are named in a message, at most.
const MAX_NAMED: usize = 3;

/// Objects by name.
pub(super) type All = BTreeMap<ObjectId, Arc<Verdict>>;

/// What proxies refused: by the primary name of a policy, or the key of what an entry became, which proxy and why.
pub(super) type Nacks = BTreeMap<String, Vec<(String, String)>>;

/// What the mesh says of objects.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// What proxies refused.
    pub(super) nacks: Nacks,
    /// By object, as people write it: how its effect differs from what its author may expect.
    pub(super) notes: BTreeMap<String, Vec<String>>,
}

impl Told {
    /// With these notes.
    pub(super) fn new(nacks: Nacks, all: &[Note]) -> Self {
        let mut notes: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for Note { object, reason } in all {
            notes.entry(object.clone()).or_default().push(reason.clone());
        }
        Self { nacks, notes }
    }
}

/// What a condition says: type, whether it holds, reason, message.
type Said = (&'static str, bool, &'static str, String);

/// A condition, without its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    kind: &'static str,
    holds: bool,
    reason: &'static str,
    message: String,
    /// The generation that it is about; 0 for kinds that do not count.
    generation: i64,
}

/// What the proxies that are connected to this replica refuse now. Whoever has a token may be connected; only what runs as
/// one of `accounts` is a node's proxy.
pub(super) fn nacks(clients: &[ClientStatus], accounts: &[ServiceAccount]) -> Nacks {
    let mut nacks = Nacks::new();
    for client in clients {
        let Some(who) = accounts.iter().find_map(|account| Caller::beside(&client.client, account)) else { continue };
        for of in &client.types {
            let key = |resource: &str| match &*of.type_url {
                AUTHORIZATION_TYPE => Some(resource.to_owned()),
                WORKLOAD_TYPE => entries::key(resource),
                _ => None,
            };
            for (key, nack) in of.nacks.iter().filter_map(|nack| Some((key(&nack.resource)?, nack))) {
                nacks.entry(key).or_default().push((who.to_owned(), nack.reason.clone()));
            }
        }
    }
    for refusals in nacks.values_mut() {
        refusals.sort();
    }
    nacks
}

/// Types of conditions that are written of the kind.
fn types(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::AuthorizationPolicy | Kind::PeerAuthentication => &[ZTUNNEL_ACCEPTED, WAYPOINT_ACCEPTED],
        Kind::ServiceEntry => &[ZTUNNEL_ACCEPTED, WAYPOINT_BOUND],
        Kind::WorkloadEntry => &[ZTUNNEL_ACCEPTED],
        Kind::Service => &[WAYPOINT_BOUND],
        Kind::Gateway => &[gateways::ACCEPTED, gateways::PROGRAMMED],
        Kind::GatewayClass => &[gateways::ACCEPTED],
        Kind::Namespace | Kind::Node | Kind::ServiceAccount | Kind::Deployment | Kind::EndpointSlice | Kind::Pod => &[],
    }
}

/// What the status of the object is to say; none where that cannot be told, and stays as it is.
pub(super) fn desired(id: &ObjectId, verdict: &Verdict, all: &All, told: &Told) -> Option<Vec<Condition>> {
    let said = match &verdict.outcome {
        Outcome::Valid(object) => of_valid(object, all, told)?,
        Outcome::Refused { .. } => of_refused(id.kind, verdict, all)?,
    };
    let condition = |(kind, holds, reason, message)| Condition {
        kind,
        holds,
        reason,
        message: bounded(message, MAX_MESSAGE),
        generation: verdict.generation,
    };
    Some(said.into_iter().map(condition).collect())
}

fn of_refused(kind: Kind, verdict: &Verdict, all: &All) -> Option<Vec<Said>> {
    let mistakes = || mistakes(kind, verdict).unwrap_or_default();
    match kind {
        Kind::AuthorizationPolicy | Kind::PeerAuthentication | Kind::ServiceEntry | Kind::WorkloadEntry => {
            Some(vec![(ZTUNNEL_ACCEPTED, false, "Invalid", mistakes())])
        }
        Kind::Gateway => gateways::of_bad_gateway(&verdict.belongs_to, &mistakes(), all),
        Kind::GatewayClass => gateways::of_bad_class(&verdict.belongs_to, mistakes()).map(|said| vec![said]),
        _ => None,
    }
}

fn of_valid(object: &Object, all: &All, told: &Told) -> Option<Vec<Said>> {
    let Told { nacks, notes } = told;
    let notes = || notes.get(&object.id().to_string()).map(Vec::as_slice).unwrap_or_default();
    Some(match object {
        Object::AuthorizationPolicy(policy) => {
            let (kind, holds, reason, message) = of_policy(policy);
            let refused = refusal(nacks, &index::policy_key(&policy.name)).filter(|_| kind == ZTUNNEL_ACCEPTED);
            vec![match refused {
                Some(message) => (kind, false, "RefusedByProxy", message),
                None => (kind, holds, reason, message),
            }]
        }
        Object::PeerAuthentication(policy) => {
            vec![match refusal(nacks, &index::authentication_key(&policy.name)) {
                Some(message) => (ZTUNNEL_ACCEPTED, false, "RefusedByProxy", message),
                None => (ZTUNNEL_ACCEPTED, true, "Accepted", ACCEPTED.to_owned()),
            }]
        }
        Object::Service(service) => {
            let namespace = &service.name.namespace;
            let bound = binding::waypoint(namespace, &service.waypoint, all)?;
            // A waypoint's own service is not bound to it.
            let Some(bound) = bound.filter(|waypoint| *waypoint != service.name) else { return Some(Vec::new()) };
            let (holds, reason, message) = binding::binding(namespace, &bound, all)?;
            vec![(WAYPOINT_BOUND, holds, reason, message)]
        }
        Object::ServiceEntry(entry) => entries::of_service_entry(entry, all, nacks, notes())?,
        Object::WorkloadEntry(entry) => vec![entries::of_workload_entry(entry, nacks, notes())],
        Object::Gateway(gateway) => gateways::of_gateway(gateway, all)?,
        Object::GatewayClass(class) => vec![gateways::of_class(class)?],
        Object::Namespace(_)
        | Object::Node(_)
        | Object::ServiceAccount(_)
        | Object::Deployment(_)
        | Object::EndpointSlice(_)
        | Object::Pod(_) => return None,
    })
}

const ACCEPTED: &str = "told to the proxies of all nodes";

fn of_policy(policy: &AuthorizationPolicy) -> (&'static str, bool, &'static str, String) {
    if let PolicyTarget::Objects(_) = policy.target {
        let message = "is for waypoints, which this version does not have: it is not in force".to_owned();
        return (WAYPOINT_ACCEPTED, false, "AncestorNotBound", message);
    }
    match index::policy_note(policy) {
        Some(note) => (ZTUNNEL_ACCEPTED, true, "UnsupportedValue", note),
        None if policy.dry_run => {
            let message =
                "told to the proxies of all nodes, which only note what it would do, as istio.io/dry-run asks";
            (ZTUNNEL_ACCEPTED, true, "Accepted", message.to_owned())
        }
        None => (ZTUNNEL_ACCEPTED, true, "Accepted", ACCEPTED.to_owned()),
    }
}

/// What is wrong with an object and what that means, for its author; none where nothing is.
pub(super) fn mistakes(kind: Kind, verdict: &Verdict) -> Option<String> {
    let Outcome::Refused { problems, keeps_last_good } = &verdict.outcome else { return None };
    let mut lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    let effect = match kind {
        _ if *keeps_last_good => "the last good version stays in force",
        Kind::AuthorizationPolicy => "what it may be for is denied until this is mended",
        Kind::PeerAuthentication => "what it may be for takes no plaintext until this is mended",
        Kind::Service => "connections to its addresses are refused until this is mended",
        Kind::ServiceEntry => {
            "connections to those of its hosts and addresses that can be read are refused until this is mended"
        }
        Kind::WorkloadEntry => "connections to its address, if it can be read, are refused until this is mended",
        Kind::Pod => "it counts as enrolled unless it or its namespace says otherwise, until this is mended",
        Kind::Namespace => "its pods count as enrolled, and are not reached in plaintext, until this is mended",
        _ => "it does not take effect",
    };
    lines.push(effect.to_owned());
    Some(lines.join("\n"))
}

/// Who refused the resource, if anybody did.
fn refusal(nacks: &Nacks, resource: &str) -> Option<String> {
    let refusals = nacks.get(resource)?;
    let (_, reason) = refusals.first()?;
    let mut named: Vec<&str> = refusals.iter().map(|(who, _)| who.as_str()).take(MAX_NAMED).collect();
    let others = format!("{} others", refusals.len().saturating_sub(MAX_NAMED));
    if refusals.len() > MAX_NAMED {
        named.push(&others);
    }
    let who = named.join(", ");
    Some(format!("refused by proxies ({who}): {reason}"))
}

/// The object, if it is valid.
fn valid<'a>(id: &ObjectId, all: &'a All) -> Option<&'a Object> {
    match all.get(id).map(|verdict| &verdict.outcome) {
        Some(Outcome::Valid(object)) => Some(object),
        Some(Outcome::Refused { .. }) | None => None,
    }
}

/// The class of that name, if it is valid.
fn class<'a>(name: &str, all: &'a All) -> Option<&'a GatewayClass> {
    match valid(&ObjectId::cluster(Kind::GatewayClass, name.into()), all) {
        Some(Object::GatewayClass(class)) => Some(class),
        Some(_) | None => None,
    }
}

/// The conditions as they are to be written in place of `current`, those of the status of an object of the kind; none if that
/// says the same already. A condition that has not turned keeps the time at which it did.
pub(super) fn change(kind: Kind, current: &[Value], desired: &[Condition], now: &str) -> Option<Vec<Value>> {
    let text = |condition: &Value, key: &str| condition.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let find = |kind: &str| current.iter().find(|condition| text(condition, "type") == kind);
    let is_same = |kind: &&str| match (find(kind), desired.iter().find(|condition| condition.kind == *kind)) {
        (None, None) => true,
        (Some(current), Some(desired)) => {
            // Istio writes the number as text.
            let generation = current.get("observedGeneration");
            let generation =
                generation.and_then(|number| number.as_i64().or_else(|| number.as_str()?.parse::<i64>().ok()));
            text(current, "status") == truth(desired.holds)
                && text(current, "reason") == desired.reason
                && text(current, "message") == desired.message
                && generation.unwrap_or_default() == desired.generation
        }
        (Some(_), None) | (None, Some(_)) => false,
    };
    if types(kind).iter().all(is_same) {
        return None;
    }
    let write = |condition: &Condition| {
        let since = find(condition.kind).filter(|current| text(current, "status") == truth(condition.holds));
        let since = since.map(|current| text(current, "lastTransitionTime")).filter(|since| !since.is_empty());
        let mut value = json!({
            "type": condition.kind,
            "status": truth(condition.holds),
            "reason": condition.reason,
            "message": condition.message,
            "lastTransitionTime": since.as_deref().unwrap_or(now),
        });
        if condition.generation > 0 {
            value["observedGeneration"] = condition.generation.into();
        }
        value
    };
    Some(desired.iter().map(write).collect())
}

fn truth(holds: bool) -> &'static str {
    if holds { "True" } else { "False" }
}

/// The text, cut to that many bytes.
pub(super) fn bounded(mut text: String, most: usize) -> String {
    const CUT: &str = " [...]";
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most.saturating_sub(CUT.len())));
        text.push_str(CUT);
    }
    text
}

#[cfg(test)]
mod entry_tests;
#[cfg(test)]
pub(super) mod tests;
