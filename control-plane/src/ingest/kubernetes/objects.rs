//! Which objects of one kind are in force. Pure: what the watch says in, events out.
//!
//! - An object that is not valid keeps its last good version.
//! - A version that is known already, as most of a repeated list are, is not even looked at.
//! - After a repeated list, whatever it did not show is gone.

use std::collections::{BTreeMap, HashMap};

use super::raw::Raw;
use crate::api::{self, Kind, Object, ObjectId, Problem};
use crate::index::Event;
use crate::ingest::Refusal;

/// The objects of one kind.
#[derive(Debug)]
pub(super) struct Objects {
    kind: Kind,
    known: HashMap<ObjectId, Known>,
    /// What is wrong with the newest version of objects that are not valid.
    refused: BTreeMap<ObjectId, Vec<Problem>>,
    /// How many objects are in force.
    accepted: usize,
    /// Number of the list that is being read, or was last.
    list: u64,
}

#[derive(Debug)]
struct Known {
    /// The newest version, valid or not.
    version: Box<str>,
    /// The version in force; none if there never was a valid one.
    object: Option<Object>,
    /// The last list that showed it.
    list: u64,
}

impl Objects {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, known: HashMap::new(), refused: BTreeMap::new(), accepted: 0, list: 0 }
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
        let known =
            self.known.entry(id.clone()).or_insert_with(|| Known { version: Box::default(), object: None, list: 0 });
        known.list = self.list;
        // A version is never empty.
        if *known.version == *raw.version() {
            return None;
        }
        known.version = raw.version().into();
        match api::validate_served(self.kind, &raw.value) {
            Ok(object) => {
                self.refused.remove(&id);
                self.accepted += usize::from(known.object.is_none());
                let is_news = known.object.as_ref() != Some(&object);
                known.object = Some(object.clone());
                is_news.then_some(Event::Apply(object))
            }
            Err(problems) => {
                self.refused.insert(id, problems);
                None
            }
        }
    }

    /// The object is gone.
    pub(super) fn delete(&mut self, raw: &Raw) -> Option<Event> {
        let (id, known) = self.known.remove_entry(&raw.id(self.kind)?)?;
        self.forget(id, &known)
    }

    /// How many objects are in force.
    pub(super) fn accepted(&self) -> usize {
        self.accepted
    }

    /// What is not accepted, by name.
    pub(super) fn refusals(&self) -> impl Iterator<Item = Refusal> {
        self.refused.iter().map(|(id, problems)| Refusal {
            file: String::new(),
            line: 0,
            object: id.to_string(),
            problems: problems.clone(),
            keeps_last_good: self.known.get(id).is_some_and(|known| known.object.is_some()),
        })
    }

    fn forget(&mut self, id: ObjectId, known: &Known) -> Option<Event> {
        self.refused.remove(&id);
        known.object.as_ref()?;
        self.accepted -= 1;
        Some(Event::Delete(id))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn namespace(name: &str, version: u32, mode: &str) -> Raw {
        let labels = json!({ "istio.io/dataplane-mode": mode });
        let metadata = json!({ "name": name, "resourceVersion": version.to_string(), "labels": labels });
        serde_json::from_value(json!({ "metadata": metadata })).unwrap()
    }

    fn is_applied(event: Option<&Event>, name: &str) -> bool {
        matches!(event, Some(Event::Apply(object)) if &*object.id().name == name)
    }

    fn deleted(events: &[Event]) -> Vec<&str> {
        let name = |event| match event {
            &Event::Delete(ref id) => Some(&*id.name),
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
        assert!(objects.apply(&namespace("b", 2, "x")).is_none());
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

    #[test]
    fn a_field_that_is_newer_than_this_program_is_no_mistake() {
        let object = json!({
            "metadata": {"name": "a", "resourceVersion": "1", "novelty": {"a": 1}}, "status": {"phase": "Active", "mood": "good"},
        });
        let mut objects = Objects::new(Kind::Namespace);
        assert!(objects.apply(&serde_json::from_value(object).unwrap()).is_some());
    }
}
