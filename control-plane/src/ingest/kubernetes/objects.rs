//! Which objects of one kind are in force. Pure: what the watch says in, events out.
//!
//! - An object that is not valid keeps its last good version, if it still is the same one: not after another of its name
//!   took its place, nor a pod that has ended. Where a pod is, that it is being deleted, or captured, is known of any version.
//! - One that is not valid and has no good version to keep is stood in for, where it would be less safe to do without.
//! - A version that is known already, as most of a repeated list are, is not even looked at.
//! - After a repeated list, whatever it did not show is gone.

use std::collections::{BTreeMap, HashMap};

use super::raw::Raw;
use super::verdicts::{Outcome, Verdict, is_told};
use crate::api::{self, Kind, Object, ObjectId, Problem};
use crate::index::Event;
use crate::ingest::Refusal;

/// The objects of one kind.
#[derive(Debug)]
pub(super) struct Objects {
    kind: Kind,
    known: HashMap<ObjectId, Known>,
    /// What is wrong with the newest version of objects that are not valid.
    refused: BTreeMap<ObjectId, Refused>,
    /// `refused` is not as it was when it was last asked.
    is_refused_changed: bool,
    /// What there is to tell of objects since it was last asked; none for those of which there is nothing any more.
    verdicts: Vec<(ObjectId, Option<Verdict>)>,
    /// How many objects are in force.
    accepted: usize,
    /// Number of the list that is being read, or was last.
    list: u64,
}

#[derive(Debug)]
struct Known {
    /// The newest version, valid or not.
    version: Box<str>,
    /// The unique id of the object in force.
    uid: Box<str>,
    /// What is in force: a valid version, or what stands in for one.
    object: Option<Object>,
    /// What is in force is no valid version.
    is_stand_in: bool,
    /// The last list that showed it.
    list: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct Refused {
    problems: Vec<Problem>,
    keeps_last_good: bool,
}

impl Objects {
    pub(super) fn new(kind: Kind) -> Self {
        let (known, refused) = (HashMap::new(), BTreeMap::new());
        Self { kind, known, refused, is_refused_changed: false, verdicts: Vec::new(), accepted: 0, list: 0 }
    }

    /// A list begins. What it does not show by its end is gone.
    pub(super) fn begin_list(&mut self) {
        self.list += 1;
    }

    /// The list is complete.
    pub(super) fn end_list(&mut self) -> Vec<Event> {
        let list = self.list;
        let gone: Vec<(ObjectId, Known)> = self.known.extract_if(|_, known| known.list != list).collect();
        gone.into_iter().filter_map(|(id, known)| self.forget(id, &known)).collect()
    }

    /// The object is there, listed or changed.
    pub(super) fn apply(&mut self, raw: &Raw) -> Option<Event> {
        let id = raw.id(self.kind)?;
        let known = self.known.entry(id.clone()).or_insert_with(|| Known {
            version: Box::default(),
            uid: Box::default(),
            object: None,
            is_stand_in: false,
            list: 0,
        });
        known.list = self.list;
        // A version is never empty.
        if *known.version == *raw.version() {
            return None;
        }
        known.version = raw.version().into();
        match api::validate_served(self.kind, &raw.value) {
            Ok(object) => {
                let was_refused = self.refused.remove(&id).is_some();
                self.is_refused_changed |= was_refused;
                if was_refused || is_told(self.kind) {
                    let outcome = Outcome::Valid(object.clone());
                    self.verdicts.push((id.clone(), Verdict::new(self.kind, raw, outcome)));
                }
                self.accepted += usize::from(known.object.is_none() || known.is_stand_in);
                known.uid = raw.uid().into();
                known.is_stand_in = false;
                let is_news = known.object.as_ref() != Some(&object);
                known.object = Some(object.clone());
                is_news.then_some(Event::Apply(object))
            }
            Err(problems) => {
                let last = known.object.take();
                let was_good = last.is_some() && !known.is_stand_in;
                let stand_in = api::stand_in(&id, &raw.value);
                let is_same = was_good && *known.uid == *raw.uid();
                let kept = last.as_ref().filter(|_| is_same).and_then(|last| api::keep(last, stand_in.as_ref()));
                let keeps_last_good = kept.is_some();
                self.accepted -= usize::from(was_good && !keeps_last_good);
                known.object = kept.or(stand_in);
                known.is_stand_in = known.object.is_some() && !keeps_last_good;
                let outcome = Outcome::Refused { problems: problems.clone(), keeps_last_good };
                self.verdicts.push((id.clone(), Verdict::new(self.kind, raw, outcome)));
                let refused = Refused { problems, keeps_last_good };
                if self.refused.get(&id) != Some(&refused) {
                    self.refused.insert(id.clone(), refused);
                    self.is_refused_changed = true;
                }
                match &known.object {
                    Some(now) => (last.as_ref() != Some(now)).then(|| Event::Apply(now.clone())),
                    None => last.map(|_| Event::Delete(id)),
                }
            }
        }
    }

    /// The object is gone.
    pub(super) fn delete(&mut self, raw: &Raw) -> Option<Event> {
        let (id, known) = self.known.remove_entry(&raw.id(self.kind)?)?;
        self.forget(id, &known)
    }

    /// How many valid objects are in force.
    pub(super) fn accepted(&self) -> usize {
        self.accepted
    }

    /// The objects in force.
    pub(super) fn in_force(&self) -> impl Iterator<Item = &Object> {
        self.known.values().filter_map(|known| known.object.as_ref())
    }

    /// Whether something else is refused than when this was asked before.
    pub(super) fn take_refused_changed(&mut self) -> bool {
        std::mem::take(&mut self.is_refused_changed)
    }

    /// What there is to tell of objects that has changed since this was asked before.
    pub(super) fn take_verdicts(&mut self) -> Vec<(ObjectId, Option<Verdict>)> {
        std::mem::take(&mut self.verdicts)
    }

    /// What is not accepted, by name.
    pub(super) fn refusals(&self) -> impl Iterator<Item = Refusal> {
        self.refused.iter().map(|(id, refused)| Refusal {
            file: String::new(),
            line: 0,
            object: id.to_string(),
            problems: refused.problems.clone(),
            keeps_last_good: refused.keeps_last_good,
        })
    }

    fn forget(&mut self, id: ObjectId, known: &Known) -> Option<Event> {
        let was_refused = self.refused.remove(&id).is_some();
        self.is_refused_changed |= was_refused;
        if was_refused || is_told(self.kind) {
            self.verdicts.push((id.clone(), None));
        }
        known.object.as_ref()?;
        self.accepted -= usize::from(!known.is_stand_in);
        Some(Event::Delete(id))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn namespace(name: &str, version: u32, mode: &str) -> Raw {
        let labels = json!({ "istio.io/dataplane-mode": mode });
        let metadata = json!({ "name": name, "resourceVersion": version.to_string(), "labels": labels });
        serde_json::from_value(json!({ "metadata": metadata })).unwrap()
    }

    fn is_applied(event: Option<&Event>, name: &str) -> bool {
        matches!(event, Some(Event::Apply(object)) if &*object.id().name == name)
    }

    fn deleted<'a>(events: &'a [Event]) -> Vec<&'a str> {
        let name = |event: &'a Event| match event {
            Event::Delete(id) => Some(&*id.name),
            Event::Apply(_) => None,
        };
        events.iter().filter_map(name).collect()
    }

    #[test]
    fn a_repeated_list_yields_what_changed_and_what_vanished() {
        let mut objects = Objects::new(Kind::Namespace);
        objects.begin_list();
        for name in ["a", "b", "c"] {
            assert!(is_applied(objects.apply(&namespace(name, 1, "none")).as_ref(), name));
        }
        assert!(objects.end_list().is_empty());
        // A list that breaks off removes nothing.
        objects.begin_list();
        assert!(objects.apply(&namespace("a", 1, "none")).is_none());
        objects.begin_list();
        assert!(objects.apply(&namespace("a", 1, "none")).is_none());
        assert!(is_applied(objects.apply(&namespace("c", 2, "ambient")).as_ref(), "c"));
        assert!(is_applied(objects.apply(&namespace("d", 3, "none")).as_ref(), "d"));
        assert_eq!(deleted(&objects.end_list()), ["b"]);
        assert_eq!(objects.accepted(), 3);
        assert_eq!(deleted(objects.delete(&namespace("a", 4, "none")).as_slice()), ["a"]);
        assert!(objects.delete(&namespace("a", 4, "none")).is_none());
    }

    #[test]
    fn a_bad_version_keeps_the_last_good_one_and_is_reported_until_it_is_mended() {
        let mut objects = Objects::new(Kind::Namespace);
        objects.begin_list();
        objects.apply(&namespace("a", 1, "ambient"));
        // Without a good one it is stood in for.
        assert!(is_applied(objects.apply(&namespace("b", 2, "x")).as_ref(), "b"));
        assert_eq!((objects.accepted(), objects.in_force().count()), (1, 2));
        assert!(objects.end_list().is_empty());
        assert!(objects.apply(&namespace("a", 3, "y")).is_none());
        let refused: Vec<_> = objects.refusals().map(|refusal| (refusal.object, refusal.keeps_last_good)).collect();
        assert_eq!(refused, [("Namespace a".to_owned(), true), ("Namespace b".to_owned(), false)]);
        // The same state again is no news; a new one is.
        assert!(objects.apply(&namespace("a", 4, "ambient")).is_none());
        assert!(is_applied(objects.apply(&namespace("b", 5, "none")).as_ref(), "b"));
        assert!(objects.refusals().next().is_none());
        // Gone while its newest version was not valid: the last good one goes as well.
        objects.apply(&namespace("a", 6, "z"));
        objects.begin_list();
        objects.apply(&namespace("b", 5, "none"));
        assert_eq!(deleted(&objects.end_list()), ["a"]);
        assert!(objects.refusals().next().is_none());
    }

    /// A pod whose port is valid or not.
    fn pod(uid: &str, version: u32, is_valid: bool) -> Value {
        let port = if is_valid { 80 } else { 70_000 };
        json!({
            "metadata": {
                "name": "a", "namespace": "shop", "uid": uid, "resourceVersion": version.to_string(),
                "annotations": {"ambient.istio.io/redirection": "enabled"},
            },
            "spec": {"nodeName": "n", "containers": [{"name": "a", "ports": [{"name": "p", "containerPort": port}]}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1"},
        })
    }

    fn apply(objects: &mut Objects, object: Value) -> Option<Event> {
        objects.apply(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn a_pod_that_is_another_or_has_ended_is_not_kept() {
        let mut ended = pod("u1", 2, false);
        ended["status"]["phase"] = json!("Failed");
        let what = |event| match event {
            Some(Event::Apply(Object::Pod(pod))) => Some((pod.is_stand_in, pod.uid.to_string(), pod.phase.is_over())),
            Some(_) | None => None,
        };
        for (bad, uid, is_over) in [(pod("u2", 2, false), "u2", false), (ended, "u1", true)] {
            let mut objects = Objects::new(Kind::Pod);
            assert!(is_applied(apply(&mut objects, pod("u1", 1, true)).as_ref(), "a"));
            assert_eq!(what(apply(&mut objects, bad)), Some((true, uid.to_owned(), is_over)));
            assert_eq!((objects.accepted(), objects.in_force().count()), (0, 1));
            assert!(objects.refusals().all(|refusal| !refusal.keeps_last_good));
            // What stands in is no earlier version, and the next good one counts again.
            let now = what(apply(&mut objects, pod("u2", 3, false)));
            assert_eq!(now, is_over.then(|| (true, "u2".to_owned(), false)));
            assert_eq!(what(apply(&mut objects, pod("u2", 4, true))), Some((false, "u2".to_owned(), false)));
            assert_eq!(objects.accepted(), 1);
        }
    }

    #[test]
    fn a_kept_pod_is_where_it_has_come_to_be() {
        let mut objects = Objects::new(Kind::Pod);
        let mut starts = pod("u1", 1, true);
        starts["status"] = json!({"phase": "Pending"});
        apply(&mut objects, starts);
        let addresses = match apply(&mut objects, pod("u1", 2, false)) {
            Some(Event::Apply(Object::Pod(pod))) => pod.addresses.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!((addresses.len(), objects.accepted()), (1, 1));
        assert!(objects.refusals().all(|refusal| refusal.keeps_last_good));
    }

    #[test]
    fn what_is_refused_of_pods_and_services_is_stood_in_for() {
        let service = json!({
            "metadata": {"name": "a", "namespace": "shop", "uid": "u1", "resourceVersion": "1"},
            "spec": {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"], "ports": [{"port": 80}], "trafficDistribution": "Far"},
        });
        for (kind, object) in [(Kind::Service, service), (Kind::Pod, pod("u1", 1, false))] {
            let mut objects = Objects::new(kind);
            assert!(is_applied(apply(&mut objects, object.clone()).as_ref(), "a"), "{kind}");
            assert_eq!((objects.accepted(), objects.in_force().count()), (0, 1));
            let gone = objects.delete(&serde_json::from_value(object).unwrap());
            assert_eq!(deleted(gone.as_slice()), ["a"]);
            assert_eq!((objects.accepted(), objects.in_force().count()), (0, 0));
        }
    }

    #[test]
    fn a_kept_pod_is_known_to_be_going_and_whether_it_is_captured() {
        let mut objects = Objects::new(Kind::Pod);
        apply(&mut objects, pod("u1", 1, true));
        assert!(apply(&mut objects, pod("u1", 2, false)).is_none());
        let mut going = pod("u1", 3, false);
        going["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:04:05Z");
        let flags = |event| match event {
            Some(Event::Apply(Object::Pod(pod))) => Some((pod.terminating, pod.captured)),
            Some(_) | None => None,
        };
        assert_eq!(flags(apply(&mut objects, going.clone())), Some((true, true)));
        going["metadata"]["resourceVersion"] = json!("4");
        going["metadata"]["annotations"] = json!({});
        assert_eq!(flags(apply(&mut objects, going)), Some((true, false)));
        assert_eq!(objects.accepted(), 1);
    }

    #[test]
    fn a_kept_pod_that_is_going_serves_while_it_says_so() {
        let ready = |mut pod: Value, ready: &str| {
            pod["status"]["conditions"] = json!([{"type": "Ready", "status": ready}]);
            pod
        };
        let mut objects = Objects::new(Kind::Pod);
        apply(&mut objects, ready(pod("u1", 1, true), "True"));
        let mut going = pod("u1", 2, false);
        going["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:04:05Z");
        let is_ready = |event| match event {
            Some(Event::Apply(Object::Pod(pod))) => Some(pod.ready),
            Some(_) | None => None,
        };
        assert_eq!(is_ready(apply(&mut objects, ready(going.clone(), "True"))), Some(true));
        going["metadata"]["resourceVersion"] = json!("3");
        assert_eq!(is_ready(apply(&mut objects, ready(going, "False"))), Some(false));
    }

    #[test]
    fn what_is_refused_counts_as_changed_only_when_it_is() {
        let mut objects = Objects::new(Kind::Namespace);
        objects.apply(&namespace("a", 1, "none"));
        assert!(!objects.take_refused_changed());
        objects.apply(&namespace("a", 2, "x"));
        assert!(objects.take_refused_changed() && !objects.take_refused_changed());
        objects.apply(&namespace("a", 3, "x"));
        assert!(!objects.take_refused_changed());
        objects.delete(&namespace("a", 4, "x"));
        assert!(objects.take_refused_changed());
    }

    #[test]
    fn what_becomes_of_objects_is_told_once() {
        let told = |objects: &mut Objects| -> Vec<_> {
            let verdicts = objects.take_verdicts().into_iter();
            verdicts.map(|(id, verdict)| (id.name.to_string(), verdict.map(|verdict| verdict.outcome))).collect()
        };
        let is_kept = |outcome: &Option<Outcome>| match outcome {
            Some(Outcome::Refused { keeps_last_good, problems }) => problems.first().map(|_| *keeps_last_good),
            Some(Outcome::Valid(_)) | None => None,
        };
        let mut objects = Objects::new(Kind::Namespace);
        objects.begin_list();
        objects.apply(&namespace("a", 1, "none"));
        let first = told(&mut objects);
        assert!(matches!(&first[..], [(name, Some(Outcome::Valid(_)))] if name == "a"), "{first:?}");
        objects.apply(&namespace("a", 1, "none"));
        assert!(told(&mut objects).is_empty());
        objects.apply(&namespace("a", 2, "x"));
        assert_eq!(is_kept(&told(&mut objects)[0].1), Some(true));
        objects.begin_list();
        objects.end_list();
        assert_eq!(told(&mut objects), [("a".to_owned(), None)]);
        // Of what nothing is written about, mistakes alone.
        let mut objects = Objects::new(Kind::Pod);
        apply(&mut objects, pod("u1", 1, true));
        assert!(told(&mut objects).is_empty());
        apply(&mut objects, pod("u1", 2, false));
        assert_eq!(is_kept(&told(&mut objects)[0].1), Some(true));
        apply(&mut objects, pod("u1", 3, true));
        assert_eq!(told(&mut objects), [("a".to_owned(), None)]);
        objects.delete(&serde_json::from_value(pod("u1", 4, true)).unwrap());
        assert!(told(&mut objects).is_empty());
    }

    #[test]
    fn a_policy_that_is_not_valid_is_stood_in_for_only_without_an_earlier_version() {
        let policy = |version: u32, uid: &str, action: &str| {
            json!({
                "metadata": {"name": "p", "namespace": "shop", "uid": uid, "resourceVersion": version.to_string()},
                "spec": {"action": action},
            })
        };
        let stands_in = |event: Option<Event>| match event {
            Some(Event::Apply(Object::AuthorizationPolicy(policy))) => Some(policy.is_stand_in),
            Some(_) | None => None,
        };
        let mut objects = Objects::new(Kind::AuthorizationPolicy);
        assert_eq!(stands_in(apply(&mut objects, policy(1, "u1", "PERHAPS"))), Some(true));
        assert_eq!((objects.accepted(), objects.in_force().count()), (0, 1));
        // What stands in is no last good version.
        assert_eq!(stands_in(apply(&mut objects, policy(2, "u1", "MAYBE"))), None);
        assert!(objects.refusals().all(|refusal| !refusal.keeps_last_good));
        assert_eq!(stands_in(apply(&mut objects, policy(3, "u1", "DENY"))), Some(false));
        assert_eq!(stands_in(apply(&mut objects, policy(4, "u1", "MAYBE"))), None);
        assert!(objects.refusals().all(|refusal| refusal.keeps_last_good));
        assert_eq!(objects.accepted(), 1);
        // Another one of the name.
        assert_eq!(stands_in(apply(&mut objects, policy(5, "u2", "MAYBE"))), Some(true));
        assert_eq!(objects.accepted(), 0);
        assert_eq!(
            deleted(objects.delete(&serde_json::from_value(policy(6, "u2", "MAYBE")).unwrap()).as_slice()),
            ["p"]
        );
        assert_eq!((objects.accepted(), objects.in_force().count()), (0, 0));
    }

    #[test]
    fn a_field_of_a_policy_that_is_newer_than_this_program_is_a_mistake() {
        let object = json!({
            "metadata": {"name": "p", "namespace": "shop", "resourceVersion": "1", "novelty": 1},
            "spec": {"rules": [{"from": [{"source": {"principals": ["a"], "moods": ["good"]}}]}]}, "status": {"a": "b"},
        });
        let mut objects = Objects::new(Kind::AuthorizationPolicy);
        apply(&mut objects, object);
        let fields: Vec<_> =
            objects.refusals().flat_map(|refusal| refusal.problems).map(|problem| problem.field).collect();
        assert_eq!(fields, ["spec.rules[0].from[0].source.moods"]);
    }

    #[test]
    fn a_field_that_is_newer_than_this_program_is_no_mistake() {
        let object = json!({
            "metadata": {"name": "a", "resourceVersion": "1", "novelty": {"a": 1}}, "status": {"phase": "Active", "mood": "good"},
        });
        let mut objects = Objects::new(Kind::Namespace);
        assert!(objects.apply(&serde_json::from_value(object).unwrap()).is_some());
    }
}
