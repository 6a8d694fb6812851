//! What the server knows, and what it is told to do. Without I/O.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{Asked, Objects, Place};

/// Everything.
#[derive(Debug)]
pub(crate) struct State {
    /// Of the last change.
    version: u64,
    /// Of the last change that is forgotten.
    forgotten: u64,
    collections: BTreeMap<String, Objects>,
    history: Vec<Change>,
    pub(crate) asked: Vec<Asked>,
    pub(crate) refusals: Vec<Refusal>,
    pub(crate) holds: Vec<Held>,
    pub(crate) now: Moment,
    pub(crate) token: Option<String>,
    pub(crate) page: usize,
    pub(crate) streams_lists: bool,
    pub(crate) refuses_old_at_start: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            // A version of 0 means any to those who ask.
            version: 1,
            forgotten: 0,
            collections: BTreeMap::new(),
            history: Vec::new(),
            asked: Vec::new(),
            refusals: Vec::new(),
            holds: Vec::new(),
            now: Moment::default(),
            token: None,
            page: usize::MAX,
            streams_lists: true,
            refuses_old_at_start: false,
        }
    }
}

/// How often connections were broken, and answers let go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) cuts: u64,
    pub(crate) releases: u64,
}

/// What becomes of a question.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// This code, with these headers.
    Refuse(u16, String),
    /// It is answered, perhaps held up.
    Answer(Option<Place>),
}

#[derive(Debug)]
struct Change {
    version: u64,
    path: String,
    kind: &'static str,
    object: Value,
}

/// Questions that are told apart by collection and query, a number of times.
#[derive(Debug)]
struct Matcher {
    path: String,
    query: String,
    left: usize,
}

impl Matcher {
    fn takes(&mut self, asked: &Asked) -> bool {
        let is_it = self.left > 0 && asked.path == self.path && asked.query.contains(&self.query);
        self.left -= usize::from(is_it);
        is_it
    }
}

#[derive(Debug)]
pub(crate) struct Refusal {
    of: Matcher,
    code: u16,
    headers: String,
}

impl Refusal {
    pub(crate) fn new(path: &str, query: &str, left: usize, code: u16, headers: String) -> Self {
        Self { of: Matcher { path: path.to_owned(), query: query.to_owned(), left }, code, headers }
    }
}

#[derive(Debug)]
pub(crate) struct Held {
    of: Matcher,
    place: Place,
}

impl Held {
    pub(crate) fn new(path: &str, query: &str, left: usize, place: Place) -> Self {
        Self { of: Matcher { path: path.to_owned(), query: query.to_owned(), left }, place }
    }
}

/// What there is to tell a watch.
#[derive(Debug)]
pub(crate) enum Followed {
    /// The connection is to break.
    Cut,
    /// What it missed is forgotten.
    TooOld,
    /// These events, and the version that they lead to.
    Events(String, u64),
}

impl State {
    pub(crate) fn put(&mut self, path: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let before = self.collections.entry(path.to_owned()).or_default().insert(key(&object), object.clone());
        let kind = if before.is_some() { "MODIFIED" } else { "ADDED" };
        self.history.push(Change { version: self.version, path: path.to_owned(), kind, object });
    }

    pub(crate) fn delete(&mut self, path: &str, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        let Some(mut object) = self.collections.get_mut(path).and_then(|objects| objects.remove(&key)) else { return };
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.history.push(Change { version: self.version, path: path.to_owned(), kind: "DELETED", object });
    }

    pub(crate) fn forget(&mut self) {
        self.version += 1;
        self.forgotten = self.version;
        self.history.clear();
    }

    pub(crate) fn release(&mut self) {
        self.now.releases += 1;
        self.holds.clear();
    }

    pub(crate) fn moment(&self) -> Moment {
        self.now
    }

    /// Takes note of a question, and decides what becomes of it.
    pub(crate) fn judge(&mut self, asked: &Asked) -> (Verdict, Moment) {
        self.asked.push(asked.clone());
        if self.token.is_some() && asked.token != self.token {
            return (Verdict::Refuse(401, String::new()), self.now);
        }
        let refuse = |refusal: &mut Refusal| {
            refusal.of.takes(asked).then(|| Verdict::Refuse(refusal.code, refusal.headers.clone()))
        };
        let refused = self.refusals.iter_mut().find_map(refuse);
        let mut held = self.holds.iter_mut();
        let verdict = refused
            .unwrap_or_else(|| Verdict::Answer(held.find_map(|held| held.of.takes(asked).then_some(held.place))));
        (verdict, self.now)
    }

    /// A page of a list. The next one is asked for by version and number of the objects before it.
    pub(crate) fn list(&self, asked: &Asked) -> Result<Value, u16> {
        let (version, from) = match parameter(asked, "continue") {
            None => (self.version, 0),
            Some(token) => token
                .split_once('.')
                .and_then(|(version, from)| Some((version.parse().ok()?, from.parse().ok()?)))
                .ok_or(400_u16)?,
        };
        if version < self.forgotten {
            return Err(410);
        }
        let none = Objects::new();
        let all = self.collections.get(&asked.path).unwrap_or(&none);
        let limit = parameter(asked, "limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let count = self.page.min(limit);
        let items: Vec<&Value> = all.values().skip(from).take(count).collect();
        let next = from.saturating_add(items.len());
        let more = if next < all.len() { format!("{version}.{next}") } else { String::new() };
        let metadata = json!({"resourceVersion": version.to_string(), "continue": more});
        Ok(json!({"apiVersion": "v1", "kind": "List", "metadata": metadata, "items": items}))
    }

    /// A watch begins: the version that it has when it was told what is returned with it.
    pub(crate) fn start(&self, asked: &Asked) -> Result<(u64, String), u16> {
        if asked.says("sendInitialEvents=true") {
            if !self.streams_lists {
                return Err(422);
            }
            let all = self.collections.get(&asked.path).into_iter().flat_map(Objects::values);
            let mut text: String = all.map(|object| event("ADDED", object)).collect();
            let annotations = json!({"k8s.io/initial-events-end": "true"});
            let metadata = json!({"resourceVersion": self.version.to_string(), "annotations": annotations});
            text += &event("BOOKMARK", &json!({"apiVersion": "v1", "kind": "Any", "metadata": metadata}));
            return Ok((self.version, text));
        }
        let version = parameter(asked, "resourceVersion").and_then(|version| version.parse().ok()).ok_or(400_u16)?;
        if version < self.forgotten && self.refuses_old_at_start {
            return Err(410);
        }
        Ok((version, String::new()))
    }

    /// What happened since `from`, for a watch that was asked for at `moment`.
    pub(crate) fn follow(&self, path: &str, from: u64, moment: Moment) -> Followed {
        if moment.cuts != self.now.cuts {
            return Followed::Cut;
        }
        if from < self.forgotten {
            return Followed::TooOld;
        }
        let news = self.history.iter().filter(|change| change.version > from && change.path == path);
        Followed::Events(news.map(|change| event(change.kind, &change.object)).collect(), self.version)
    }
}

fn key(object: &Value) -> (String, String) {
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

fn event(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}

fn parameter<'a>(asked: &'a Asked, name: &str) -> Option<&'a str> {
    asked.query.split('&').find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name)).map(|(_, value)| value)
}
