//! What proxies refuse, from every replica to the one that leads: a ConfigMap with an entry for each replica whose clients
//! refuse something. The leader writes it into the status of objects.
//!
//! A replica that dies leaves its entry behind: the leader believes one as long as it is renewed, judged by its own clock,
//! and takes it away after that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

use super::conditions::{Nacks, bounded, nacks};
use super::objects::Facts;
use crate::ingest::Cluster;
use crate::ingest::kubernetes::describe;

/// The ConfigMap.
const BOARD: &str = "culvertd-refusals";
/// Who writes, for the API server.
const MANAGER: &str = "culvertd-refusals";
/// Pause between two looks at what clients refuse.
const LOOK: Duration = Duration::from_secs(5);
/// How often an entry is written anew that has not changed.
const RENEWAL: Duration = Duration::from_secs(30);
/// How long an entry is believed that is not.
const TERM: Duration = Duration::from_secs(90);
/// Time for one request.
const TIMEOUT: Duration = Duration::from_secs(4);
/// Time to take the own entry away when the process ends.
const WITHDRAWAL: Duration = Duration::from_secs(1);
/// Refusals of one entry, and bytes of a name and of a reason in it: 20 replicas together stay below the most that a
/// ConfigMap holds, 1 MiB.
const MAX_REFUSALS: usize = 100;
const MAX_NAME: usize = 128;
const MAX_REASON: usize = 256;
/// Entries that are read.
const MAX_ENTRIES: usize = 64;

/// What the clients of one replica refuse.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// Goes up with each renewal.
    renewed: u64,
    refusals: Vec<Refused>,
}

/// That one proxy refuses one policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Refused {
    /// Primary name of the resource.
    resource: String,
    /// Who.
    proxy: String,
    /// Why.
    reason: String,
}

/// As much of it as an entry holds.
fn refused(nacks: &Nacks) -> Vec<Refused> {
    let all = nacks.iter().flat_map(|(resource, by)| {
        by.iter().map(move |(proxy, reason)| Refused {
            resource: resource.clone(),
            proxy: bounded(proxy.clone(), MAX_NAME),
            reason: bounded(reason.clone(), MAX_REASON),
        })
    });
    // A name that is cut is another name.
    all.filter(|one| one.resource.len() <= 2 * MAX_NAME).take(MAX_REFUSALS).collect()
}

/// What of this replica's entry is to be written.
#[derive(Debug, Default)]
struct Own {
    /// What the entry holds, and when it was written; none if there is no entry.
    written: Option<(Vec<Refused>, Instant)>,
    renewed: u64,
}

impl Own {
    /// The entry that is to be written `now`, or that it is to be taken away (the inner none); none if it is as it should be.
    fn due(&mut self, refused: &[Refused], now: Instant) -> Option<Option<String>> {
        match &self.written {
            None if refused.is_empty() => return None,
            Some(_) if refused.is_empty() => return Some(None),
            Some((written, at)) if written == refused && now.saturating_duration_since(*at) < RENEWAL => return None,
            Some(_) | None => {}
        }
        self.renewed += 1;
        let entry = Entry { renewed: self.renewed, refusals: refused.to_vec() };
        // Text and numbers can always be written.
        serde_json::to_string(&entry).ok().map(Some)
    }

    fn done(&mut self, refused: Vec<Refused>, now: Instant) {
        self.written = (!refused.is_empty()).then_some((refused, now));
    }
}

/// What the other replicas say, for the one that leads.
#[derive(Debug, Default)]
pub(super) struct Others {
    /// By replica: its entry, and since when it is as it is.
    seen: BTreeMap<String, (String, Instant)>,
}

impl Others {
    /// Takes in all entries but that of `me`. Returns those that are not renewed any more.
    fn take(&mut self, entries: BTreeMap<String, String>, me: &str, now: Instant) -> Vec<String> {
        let mut seen = BTreeMap::new();
        for (replica, entry) in entries.into_iter().filter(|(replica, _)| replica != me).take(MAX_ENTRIES) {
            let since = match self.seen.remove(&replica) {
                Some((before, since)) if before == entry => since,
                Some(_) | None => now,
            };
            seen.insert(replica, (entry, since));
        }
        self.seen = seen;
        let is_over = |since: &Instant| now.saturating_duration_since(*since) >= TERM;
        self.seen.iter().filter(|(_, (_, since))| is_over(since)).map(|(replica, _)| replica.clone()).collect()
    }

    /// Adds what they say `now` to what this replica knows itself.
    pub(super) fn add_to(&self, nacks: &mut Nacks, now: Instant) {
        let entries = self.seen.values().filter(|(_, since)| now.saturating_duration_since(*since) < TERM);
        // What is no entry says nothing.
        let entries = entries.filter_map(|(entry, _)| serde_json::from_str::<Entry>(entry).ok());
        for Refused { resource, proxy, reason } in
            entries.flat_map(|entry| entry.refusals).take(MAX_ENTRIES * MAX_REFUSALS)
        {
            let by = nacks.entry(resource).or_default();
            // A proxy that has changed the replica may still be in the entry of the one before.
            if !by.iter().any(|(known, _)| *known == proxy) {
                by.push((proxy, reason));
            }
        }
        nacks.values_mut().for_each(|by| by.sort());
    }
}

/// The ConfigMap, as one replica uses it.
#[derive(Debug)]
pub(super) struct Board {
    maps: Api<ConfigMap>,
    /// The key of this replica's entry.
    me: String,
    own: Own,
    /// What is wrong now, so that it is said once.
    trouble: Option<String>,
}

impl Board {
    /// Of the replicas in `namespace`, for the one that is called `me`.
    pub(super) fn new(cluster: &Cluster, namespace: &str, me: &Arc<str>) -> Self {
        Self { maps: Api::namespaced(cluster.client(), namespace), me: key(me), own: Own::default(), trouble: None }
    }

    /// Publishes what the clients of this replica refuse, for ever.
    pub(super) async fn publish(&mut self, facts: &Facts) {
        loop {
            let refused = refused(&nacks(&facts.clients(), facts.node_proxies()));
            let now = Instant::now();
            if let Some(entry) = self.own.due(&refused, now)
                && self.write(&[(self.me.clone(), entry)]).await
            {
                self.own.done(refused, now);
            }
            sleep(LOOK).await;
        }
    }

    /// Takes in what the other replicas say. What cannot be read stays as it was, and is over after its term.
    pub(super) async fn read(&mut self, others: &mut Others) {
        let entries = match timeout(TIMEOUT, self.maps.get_opt(BOARD)).await {
            Ok(Ok(map)) => {
                self.trouble = None;
                map.and_then(|map| map.data).unwrap_or_default()
            }
            Ok(Err(error)) => return self.complain(describe(&error)),
            Err(_) => return self.complain(format!("no answer within {TIMEOUT:?}")),
        };
        let over: Vec<_> =
            others.take(entries, &self.me, Instant::now()).into_iter().map(|replica| (replica, None)).collect();
        if !over.is_empty() {
            // Whoever lives writes its own anew.
            self.write(&over).await;
        }
    }

    /// Takes the own entry away, if there is one. To be called when nothing is published any more.
    pub(super) async fn withdraw(mut self) {
        if self.own.written.is_some() {
            let gone = (self.me.clone(), None);
            // Otherwise the leader takes it away.
            let _ = timeout(WITHDRAWAL, self.write(&[gone])).await;
        }
    }

    /// Writes entries, or takes them away. Returns whether that is done.
    async fn write(&mut self, entries: &[(String, Option<String>)]) -> bool {
        match timeout(TIMEOUT, put(&self.maps, entries)).await {
            Ok(Ok(())) => {
                self.trouble = None;
                true
            }
            Ok(Err(error)) => {
                self.complain(describe(&error));
                false
            }
            Err(_) => {
                self.complain(format!("no answer within {TIMEOUT:?}"));
                false
            }
        }
    }

    fn complain(&mut self, error: String) {
        if self.trouble.is_none() {
            tracing::warn!(
                config_map = BOARD,
                error,
                "what proxies refuse does not reach the leading replica; trying again"
            );
        }
        self.trouble = Some(error);
    }
}

async fn put(maps: &Api<ConfigMap>, entries: &[(String, Option<String>)]) -> kube::Result<()> {
    let data: BTreeMap<&str, Option<&str>> =
        entries.iter().map(|(replica, entry)| (replica.as_str(), entry.as_deref())).collect();
    let patching = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    let patch = Patch::Merge(json!({ "data": data }));
    let Err(error) = maps.patch(BOARD, &patching, &patch).await else { return Ok(()) };
    if !matches!(&error, kube::Error::Api(status) if status.code == 404) {
        return Err(error);
    }
    let data: BTreeMap<String, String> =
        entries.iter().filter_map(|(replica, entry)| Some((replica.clone(), entry.clone()?))).collect();
    if data.is_empty() {
        return Ok(());
    }
    let metadata = ObjectMeta { name: Some(BOARD.to_owned()), ..ObjectMeta::default() };
    let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
    match maps.create(&params, &ConfigMap { metadata, data: Some(data), ..ConfigMap::default() }).await {
        // Another replica was faster.
        Err(kube::Error::Api(status)) if status.code == 409 => maps.patch(BOARD, &patching, &patch).await.map(drop),
        created => created.map(drop),
    }
}

/// A replica's name as a key of a ConfigMap.
fn key(name: &str) -> String {
    const MOST: usize = 253;
    let is_usual = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    // The end of it is what makes it unique.
    let kept = name.len().saturating_sub(MOST);
    name.bytes().skip(kept).map(|byte| if is_usual(byte) { char::from(byte) } else { '-' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nacks_of(all: &[(&str, &str, &str)]) -> Nacks {
        let mut nacks = Nacks::new();
        for (resource, proxy, reason) in all {
            nacks.entry((*resource).to_owned()).or_default().push(((*proxy).to_owned(), (*reason).to_owned()));
        }
        nacks
    }

    #[test]
    fn an_entry_is_there_while_something_is_refused_and_is_renewed() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let odd = refused(&nacks_of(&[("ns/p", "pod a", "too odd")]));
        let mut own = Own::default();
        assert_eq!(own.due(&[], at(0)), None);
        let first = own.due(&odd, at(0)).unwrap().unwrap();
        // It could not be written.
        assert!(own.due(&odd, at(5)).is_some());
        own.done(odd.clone(), at(5));
        assert_eq!(own.due(&odd, at(34)), None);
        let renewed = own.due(&odd, at(35)).unwrap().unwrap();
        assert_ne!(renewed, first);
        own.done(odd, at(35));
        let other = refused(&nacks_of(&[("ns/p", "pod a", "odder")]));
        assert!(own.due(&other, at(36)).is_some_and(|entry| entry.is_some()));
        own.done(other, at(36));
        assert_eq!(own.due(&[], at(37)), Some(None));
        own.done(Vec::new(), at(37));
        assert_eq!(own.due(&[], at(1000)), None);
        assert!(RENEWAL + LOOK < TERM);
    }

    #[test]
    fn what_other_replicas_say_is_believed_while_they_renew_it() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let entry = |renewed, all: &[(&str, &str, &str)]| {
            serde_json::to_string(&Entry { renewed, refusals: refused(&nacks_of(all)) }).unwrap()
        };
        let entries = |renewed| {
            BTreeMap::from([
                ("me".to_owned(), entry(1, &[("ns/own", "pod x", "mine")])),
                ("one".to_owned(), entry(renewed, &[("ns/p", "pod a", "too odd"), ("ns/q", "pod a", "odd")])),
                ("two".to_owned(), entry(1, &[("ns/p", "pod b", "odd too")])),
                ("three".to_owned(), "nonsense".to_owned()),
            ])
        };
        let said = |others: &Others, now| {
            let mut nacks = nacks_of(&[("ns/p", "pod a", "as it says here")]);
            others.add_to(&mut nacks, now);
            let all = nacks
                .into_iter()
                .flat_map(|(resource, by)| by.into_iter().map(move |(who, why)| (resource.clone(), who, why)));
            all.map(|(resource, who, why)| format!("{resource} {who}: {why}")).collect::<Vec<_>>()
        };
        let mut others = Others::default();
        assert_eq!(others.take(entries(1), "me", at(0)), [""; 0]);
        assert_eq!(said(&others, at(0)), ["ns/p pod a: as it says here", "ns/p pod b: odd too", "ns/q pod a: odd"]);
        assert_eq!(others.take(entries(2), "me", at(60)), [""; 0]);
        // One is not renewed any more; nor is what is no entry.
        assert_eq!(others.take(entries(2), "me", at(90)), ["three", "two"]);
        assert_eq!(said(&others, at(90)), ["ns/p pod a: as it says here", "ns/q pod a: odd"]);
        // Nothing can be read for long.
        assert_eq!(said(&others, at(150)), ["ns/p pod a: as it says here"]);
        assert_eq!(others.take(BTreeMap::new(), "me", at(151)), [""; 0]);
        assert!(others.seen.is_empty());
    }

    #[test]
    fn entries_are_bounded_and_keys_are_valid() {
        let resources: Vec<String> = (0..1000).map(|number| format!("ns/p{number}")).collect();
        let reason = "\u{1f600}".repeat(1000);
        let mut all: Vec<_> = resources.iter().map(|resource| (resource.as_str(), "pod a", reason.as_str())).collect();
        let long = "n".repeat(10_000);
        all.push((&long, "pod a", "odd"));
        let refused = refused(&nacks_of(&all));
        assert_eq!(refused.len(), MAX_REFUSALS);
        let entry = serde_json::to_string(&Entry { renewed: u64::MAX, refusals: refused }).unwrap();
        assert!(entry.len() < 50 << 10, "{}", entry.len());
        assert_eq!(key("culvertd-5d9-x_00ff"), "culvertd-5d9-x_00ff");
        assert_eq!(key("a/b c"), "a-b-c");
        assert_eq!(key(&"k".repeat(300)).len(), 253);
    }
}
