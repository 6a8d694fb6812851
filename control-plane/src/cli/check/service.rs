//! Whether the parts that run do what they are for: follow culvertd, hold certificates, take what they are told. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::{Line, doubtful, failed, good, names};
use crate::cli::facts::{Certificate, Facts};
use crate::cli::text::count;

/// The lines.
pub(super) fn lines(facts: &Facts) -> Vec<Line> {
    [following(facts), certificates(facts), refusals(facts)].into_iter().flatten().collect()
}

/// Whether every proxy that answers is connected to culvertd.
fn following(facts: &Facts) -> Option<Line> {
    let answers = facts.proxies.iter().filter_map(|one| Some((&one.part.node, &one.answer.as_ref().ok()?.discovery)));
    let (mut cut_off, mut all) = (Vec::new(), 0);
    for (node, discovery) in answers {
        all += 1;
        if discovery.connected_since.is_none() {
            let since = discovery.disconnected_since.as_deref().unwrap_or("its start");
            let why = discovery.last_error.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
            cut_off.push(format!("{node} (since {since}{why})"));
        }
    }
    if cut_off.is_empty() {
        return (all > 0).then(|| good(format!("{} culvertd", subject(all, "proxy follows", "proxies follow"))));
    }
    Some(failed(
        format!("cut off from culvertd: the proxy of {}", names(cut_off.iter().map(String::as_str))),
        "what they were told stays in force; look whether culvertd runs, and what is between it and these nodes",
    ))
}

/// Whether certificates are valid and can be renewed.
fn certificates(facts: &Facts) -> Option<Line> {
    let of_all = facts.proxies.iter().filter_map(|one| Some((&one.part.node, &one.answer.as_ref().ok()?.certificates)));
    let (mut missing, mut stale, mut valid) = (BTreeSet::new(), BTreeSet::new(), 0);
    for (node, certificate) in of_all.flat_map(|(node, all)| all.iter().map(move |one| (node, one))) {
        let Certificate { identity, state, last_error, .. } = certificate;
        let why = last_error.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
        let told = format!("{identity} on {node}{why}");
        match (state.as_str(), last_error) {
            ("Valid", None) => valid += 1,
            ("Valid", Some(_)) => drop(stale.insert(told)),
            // One that was asked for a moment ago is on its way.
            ("Pending", None) => {}
            _ => drop(missing.insert(told)),
        }
    }
    let named = |set: &BTreeSet<String>| names(set.iter().map(String::as_str));
    if !missing.is_empty() {
        let what = format!("no valid certificate for {}", named(&missing));
        return Some(failed(
            what,
            "their connections are refused; culvertd's log names what it does not sign, and why",
        ));
    }
    if !stale.is_empty() {
        let what = format!("not renewed yet: the certificate for {}", named(&stale));
        return Some(doubtful(what, "it is valid until its end, and tried again; culvertd's log may say why"));
    }
    (valid > 0).then(|| good(format!("{} valid", subject(valid, "certificate is", "certificates are"))))
}

/// Whether the proxies take what culvertd sends.
fn refusals(facts: &Facts) -> Option<Line> {
    let clients = facts.culvertd.iter().filter_map(|one| one.answer.as_ref().ok()).flat_map(|status| &status.clients);
    let (mut refused, mut all): (BTreeMap<(&str, &str), usize>, _) = (BTreeMap::new(), 0);
    for client in clients {
        all += 1;
        for nack in client.types.iter().flat_map(|one| &one.nacks) {
            *refused.entry((&nack.resource, &nack.reason)).or_default() += 1;
        }
    }
    if refused.is_empty() {
        return (all > 0).then(|| good(format!("nothing is refused by the {} of culvertd", count(all, "client"))));
    }
    let told: Vec<String> = refused
        .iter()
        .map(|((resource, reason), by)| {
            let resource = if resource.is_empty() { "a response" } else { resource };
            format!("{resource} by {}: {reason}", count(*by, "client"))
        })
        .collect();
    Some(failed(
        format!("refused (NACK): {}", names(told.iter().map(String::as_str))),
        "what these clients took before stays in force; is their version the same as culvertd's? `culvert proxy-status` names them",
    ))
}

fn subject(count: usize, one: &str, many: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {many}") }
}
