//! What the status of an object is to say. Pure: what became of objects and what proxies refused in, conditions out.
//!
//! Types and reasons are those that Istio writes, so that what waits for them goes on working.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_xds::AUTHORIZATION_TYPE;
use mesh_xds::server::ClientStatus;
use serde_json::{Value, json};

use crate::api::{
    AuthorizationPolicy, Kind, Name, Object, ObjectId, PolicyTarget, Service, WaypointBinding, WaypointFor,
};
use crate::ca::{Caller, ServiceAccount};
use crate::index;
use crate::ingest::kubernetes::{Outcome, Verdict};

/// Of a policy: whether the nodes' proxies put it in force.
const ZTUNNEL_ACCEPTED: &str = "ZtunnelAccepted";
/// Of a policy that names what it is attached to: whether a waypoint puts it in force.
const WAYPOINT_ACCEPTED: &str = "WaypointAccepted";
/// Of a service: whether its traffic goes through a waypoint.
const WAYPOINT_BOUND: &str = "istio.io/WaypointBound";
/// Every type that is written here.
const TYPES: [&str; 3] = [ZTUNNEL_ACCEPTED, WAYPOINT_ACCEPTED, WAYPOINT_BOUND];
/// Longest message, in bytes.
const MAX_MESSAGE: usize = 4096;
/// Proxies that are named in a message, at most.
const MAX_NAMED: usize = 3;

/// Objects by name.
pub(super) type All = BTreeMap<ObjectId, Arc<Verdict>>;

/// What proxies refused: by the primary name of the resource, which proxy and why.
pub(super) type Nacks = BTreeMap<String, Vec<(String, String)>>;

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
        let types = client.types.iter().filter(|of| &*of.type_url == AUTHORIZATION_TYPE);
        for nack in types.flat_map(|of| &of.nacks) {
            nacks.entry(nack.resource.clone()).or_default().push((who.to_owned(), nack.reason.clone()));
        }
    }
    for refusals in nacks.values_mut() {
        refusals.sort();
    }
    nacks
}

/// What the status of the object is to say; none where that cannot be told, and stays as it is.
pub(super) fn desired(id: &ObjectId, verdict: &Verdict, all: &All, nacks: &Nacks) -> Option<Vec<Condition>> {
    let condition = |kind, holds, reason, message: String| {
        vec![Condition { kind, holds, reason, message: bounded(message, MAX_MESSAGE), generation: verdict.generation }]
    };
    match (&verdict.outcome, id.kind) {
        (Outcome::Refused { .. }, Kind::AuthorizationPolicy | Kind::PeerAuthentication) => {
            let message = mistakes(id.kind, verdict).unwrap_or_default();
            Some(condition(ZTUNNEL_ACCEPTED, false, "Invalid", message))
        }
        (Outcome::Refused { .. }, _) => None,
        (Outcome::Valid(Object::AuthorizationPolicy(policy)), _) => {
            let (kind, holds, reason, message) = of_policy(policy);
            let refused = refusal(nacks, &index::policy_key(&policy.name)).filter(|_| kind == ZTUNNEL_ACCEPTED);
            Some(match refused {
                Some(message) => condition(kind, false, "RefusedByProxy", message),
                None => condition(kind, holds, reason, message),
            })
        }
        (Outcome::Valid(Object::PeerAuthentication(policy)), _) => {
            Some(match refusal(nacks, &index::authentication_key(&policy.name)) {
                Some(message) => condition(ZTUNNEL_ACCEPTED, false, "RefusedByProxy", message),
                None => condition(ZTUNNEL_ACCEPTED, true, "Accepted", ACCEPTED.to_owned()),
            })
        }
        (Outcome::Valid(Object::Service(service)), _) => {
            let bound = waypoint(service, all)?.filter(|waypoint| *waypoint != service.name);
            let Some(bound) = bound else { return Some(Vec::new()) };
            let (holds, reason, message) = binding(service, &bound, all)?;
            Some(condition(WAYPOINT_BOUND, holds, reason, message))
        }
        (Outcome::Valid(_), _) => None,
    }
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

/// The waypoint that the service is bound to. The outer none: its namespace decides, and cannot be read.
fn waypoint(service: &Service, all: &All) -> Option<Option<Name>> {
    let namespace = &service.name.namespace;
    let binding = match &service.waypoint {
        WaypointBinding::Unset => match all.get(&ObjectId::cluster(Kind::Namespace, namespace.clone())) {
            None => WaypointBinding::Unset,
            Some(verdict) => match &verdict.outcome {
                Outcome::Valid(Object::Namespace(namespace)) => namespace.waypoint.clone(),
                Outcome::Valid(_) | Outcome::Refused { .. } => return None,
            },
        },
        own => own.clone(),
    };
    Some(match binding {
        WaypointBinding::Unset | WaypointBinding::Off => None,
        WaypointBinding::Waypoint(waypoint) => {
            Some(Name::new(waypoint.namespace.as_deref().unwrap_or(namespace), waypoint.name))
        }
    })
}

/// What becomes of traffic to the service, which is bound to that waypoint; none where nobody can tell.
fn binding(service: &Service, waypoint: &Name, all: &All) -> Option<(bool, &'static str, String)> {
    let valid = |id: &ObjectId| match all.get(id).map(|verdict| &verdict.outcome) {
        Some(Outcome::Valid(object)) => Some(object),
        Some(Outcome::Refused { .. }) | None => None,
    };
    let id = ObjectId::namespaced(Kind::Gateway, waypoint);
    let Some(Object::Gateway(gateway)) = valid(&id) else {
        if all.contains_key(&id) {
            return None;
        }
        return Some(if valid(&ObjectId::namespaced(Kind::Service, waypoint)).is_some() {
            (true, "WaypointAccepted", format!("bound to the waypoint {waypoint}"))
        } else {
            let fix = "make it, or take away the label istio.io/use-waypoint";
            (false, "WaypointIsNotReady", format!("there is no waypoint {waypoint}: connections are refused; {fix}"))
        });
    };
    let class = valid(&ObjectId::cluster(Kind::GatewayClass, gateway.class.as_str().into()));
    let class = match class {
        Some(Object::GatewayClass(class)) => Some(class.as_ref()),
        Some(_) | None => None,
    };
    let Some(listener) = gateway.hbone.as_ref().filter(|_| gateway.is_waypoint(class)) else {
        let fix = "give it a listener for HBONE and a class of waypoints";
        let message = format!("the Gateway {waypoint} is no waypoint: connections are refused; {fix}");
        return Some((false, "WaypointIsNotReady", message));
    };
    if !listener.allows_all && waypoint.namespace != service.name.namespace {
        let fix = "set allowedRoutes.namespaces.from to All at its listener for HBONE";
        let message = format!("the waypoint {waypoint} is for its own namespace: connections are refused; {fix}");
        return Some((false, "AttachmentDenied", message));
    }
    Some(match gateway.waypoint_for {
        WaypointFor::Service | WaypointFor::All => {
            (true, "WaypointAccepted", format!("bound to the waypoint {waypoint}"))
        }
        WaypointFor::Workload | WaypointFor::Nothing => {
            let fix = "label it istio.io/waypoint-for: service or all";
            let message = format!("the waypoint {waypoint} is not for services: connections pass it by; {fix}");
            (false, "UnsupportedTrafficType", message)
        }
    })
}

/// The conditions as they are to be written in place of `current`, those of the object's status; none if that says the same
/// already. A condition that has not turned keeps the time at which it did.
pub(super) fn change(current: &[Value], desired: &[Condition], now: &str) -> Option<Vec<Value>> {
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
    if TYPES.iter().all(is_same) {
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
pub(super) mod tests;
