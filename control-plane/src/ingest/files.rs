//! Which object of which file is in force. Pure: file contents in, events out.
//!
//! - An object that is not valid keeps its last good version from the same file, unless it is a pod that is another one or
//!   has ended; its neighbours take effect.
//! - One that is not valid and has no good version is stood in for, where it would be less safe to do without.
//! - A file in which some document cannot even be identified, or that cannot be read at all, removes nothing.
//! - A file that became empty removes nothing: half of a write looks just like that. Removing the file removes its
//!   objects.
//! - Where two files hold the same object, the one whose path comes first wins, and the other is reported.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::api::{self, Document, Object, ObjectId, Outcome, Problem};
use crate::index::Event;

/// The files of a source.
#[derive(Debug, Default)]
pub struct Files {
    files: BTreeMap<Arc<str>, File>,
    /// The files that hold an object, the winner first.
    holders: HashMap<ObjectId, BTreeSet<Arc<str>>>,
    /// Objects that several files hold.
    contested: BTreeSet<ObjectId>,
}

#[derive(Debug, Default)]
struct File {
    objects: BTreeMap<ObjectId, Object>,
    /// Those of `objects` that are no valid versions, but stand in for them.
    stand_ins: BTreeSet<ObjectId>,
    refused: Vec<Refusal>,
    ignored: usize,
}

/// Something that was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Refusal {
    /// The file, relative to the source's root; empty for an object of a cluster.
    pub file: String,
    /// The line on which the document begins, from 1; 0 when the whole file is meant.
    pub line: usize,
    /// The object, as `Kind namespace/name`; empty when the whole file is meant.
    pub object: String,
    /// Every mistake found.
    pub problems: Vec<Problem>,
    /// An earlier version of it stays in force.
    pub keeps_last_good: bool,
}

/// A source's account of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Files read; 0 for a cluster.
    pub files: usize,
    /// Objects in force.
    pub accepted: usize,
    /// Objects of kinds that have nothing to do with the mesh.
    pub ignored: usize,
    /// What was not accepted, by file and line. Shared by the reports between which it does not change.
    #[serde(serialize_with = "list")]
    pub refused: Arc<Vec<Refusal>>,
}

/// Without the feature of serde that serializes any Arc, and what is shared as if it were not.
fn list<S: Serializer>(refused: &Arc<Vec<Refusal>>, serializer: S) -> Result<S::Ok, S::Error> {
    refused.as_slice().serialize(serializer)
}

impl Files {
    /// The file has been read. Returns what changes.
    pub fn update(&mut self, path: &str, documents: Vec<Document>) -> Vec<Event> {
        let path: Arc<str> = path.into();
        let File { objects: mut previous, stand_ins: stood_in, .. } = self.files.remove(&path).unwrap_or_default();
        let before: BTreeSet<ObjectId> = previous.keys().cloned().collect();
        let winners = self.winners(&before, Some((&path, &previous)));
        let mut file = File::default();
        let mut lines: HashMap<ObjectId, usize> = HashMap::new();
        let mut is_incomplete = false;
        if documents.is_empty() && !previous.is_empty() {
            is_incomplete = true;
            file.refuse_whole(
                &path,
                Problem::new("", "the file is empty, but had objects before", "remove the file to remove its objects"),
            );
        }
        for Document { line, outcome } in documents {
            let mut refuse = |object: String, problems: Vec<Problem>, keeps_last_good: bool| {
                file.refused.push(Refusal { file: path.to_string(), line, object, problems, keeps_last_good });
            };
            match outcome {
                Outcome::Object(object) => {
                    let id = object.id();
                    if let Some(first) = lines.get(&id) {
                        let message = format!("is already at line {first} of this file, which counts");
                        refuse(id.to_string(), vec![Problem::new("", message, "keep one of the two")], false);
                        continue;
                    }
                    lines.insert(id.clone(), line);
                    previous.remove(&id);
                    file.objects.insert(id, object);
                }
                Outcome::Refused { id: Some(id), label, problems, stand_in } => {
                    let last = previous.remove(&id).filter(|_| !stood_in.contains(&id));
                    let kept = last.and_then(|last| api::keep(&last, stand_in.as_ref()));
                    refuse(label, problems, kept.is_some());
                    // The first of a name in a file counts, valid or not.
                    if lines.contains_key(&id) {
                        continue;
                    }
                    let is_stand_in = kept.is_none();
                    if let Some(object) = kept.or(stand_in) {
                        lines.insert(id.clone(), line);
                        if is_stand_in {
                            file.stand_ins.insert(id.clone());
                        }
                        file.objects.insert(id, object);
                    }
                }
                Outcome::Refused { id: None, label, problems, .. } => {
                    is_incomplete = true;
                    refuse(label, problems, !previous.is_empty());
                }
                Outcome::Unsupported { label, problem } => refuse(label, vec![problem], false),
                Outcome::Ignored { .. } => file.ignored += 1,
            }
        }
        if is_incomplete {
            file.stand_ins.extend(stood_in.into_iter().filter(|id| previous.contains_key(id)));
            file.objects.extend(previous);
        }
        self.replace(path, file, before, &winners)
    }

    /// The file is there, but cannot be read. Nothing changes, except that it is reported.
    pub fn unreadable(&mut self, path: &str, reason: String) {
        let path: Arc<str> = path.into();
        let file = self.files.entry(path.clone()).or_default();
        file.refused.clear();
        file.refuse_whole(&path, Problem::new("", reason, "make the file readable, or remove it"));
    }

    /// The file is gone. Returns what changes.
    pub fn remove(&mut self, path: &str) -> Vec<Event> {
        let Some((path, file)) = self.files.remove_entry(path) else { return Vec::new() };
        let before: BTreeSet<ObjectId> = file.objects.keys().cloned().collect();
        let winners = self.winners(&before, Some((&path, &file.objects)));
        for id in &before {
            self.release(id, &path);
        }
        self.differences(before, &winners)
    }

    /// The files known, by path.
    pub fn paths(&self) -> impl Iterator<Item = &Arc<str>> {
        self.files.keys()
    }

    /// The source's account of itself.
    pub fn report(&self) -> Report {
        let is_stood_in = |(path, id): &(&Arc<str>, &ObjectId)| {
            self.holders.get(*id).and_then(BTreeSet::first).is_some_and(|winner| winner == *path)
        };
        let stand_ins = self.files.iter().flat_map(|(path, file)| file.stand_ins.iter().map(move |id| (path, id)));
        let accepted = self.holders.len() - stand_ins.filter(is_stood_in).count();
        let mut report = Report { files: self.files.len(), accepted, ..Report::default() };
        let mut refused = Vec::new();
        for file in self.files.values() {
            report.ignored += file.ignored;
            refused.extend(file.refused.iter().cloned());
        }
        for id in &self.contested {
            let mut holders = self.holders.get(id).into_iter().flatten();
            let Some(winner) = holders.next() else { continue };
            for path in holders {
                let message = format!("is also in {winner}, which comes first and counts");
                refused.push(Refusal {
                    file: path.to_string(),
                    line: 0,
                    object: id.to_string(),
                    problems: vec![Problem::new("", message, format!("remove it from {winner} or from {path}"))],
                    keeps_last_good: false,
                });
            }
        }
        refused.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
        report.refused = Arc::new(refused);
        report
    }

    fn replace(
        &mut self,
        path: Arc<str>,
        file: File,
        before: BTreeSet<ObjectId>,
        winners: &BTreeMap<ObjectId, Object>,
    ) -> Vec<Event> {
        let mut touched = before;
        for id in touched.iter().filter(|id| !file.objects.contains_key(*id)).cloned().collect::<Vec<_>>() {
            self.release(&id, &path);
        }
        let mut winners = winners.clone();
        for id in file.objects.keys() {
            if touched.insert(id.clone())
                && let Some(winner) = self.winner(id)
            {
                winners.insert(id.clone(), winner.clone());
            }
        }
        for id in file.objects.keys() {
            let holders = self.holders.entry(id.clone()).or_default();
            holders.insert(path.clone());
            if holders.len() > 1 {
                self.contested.insert(id.clone());
            }
        }
        self.files.insert(path, file);
        self.differences(touched, &winners)
    }

    fn release(&mut self, id: &ObjectId, path: &str) {
        if let Some(holders) = self.holders.get_mut(id) {
            holders.remove(path);
            if holders.len() < 2 {
                self.contested.remove(id);
            }
            if holders.is_empty() {
                self.holders.remove(id);
            }
        }
    }

    fn winner(&self, id: &ObjectId) -> Option<&Object> {
        let path = self.holders.get(id)?.first()?;
        self.files.get(path)?.objects.get(id)
    }

    /// The objects in force now, among `ids`; `taken` is a file that has been taken out for the moment.
    fn winners(
        &self,
        ids: &BTreeSet<ObjectId>,
        taken: Option<(&Arc<str>, &BTreeMap<ObjectId, Object>)>,
    ) -> BTreeMap<ObjectId, Object> {
        let find = |id: &ObjectId| {
            let path = self.holders.get(id)?.first()?;
            match taken {
                Some((taken, objects)) if taken == path => objects.get(id),
                Some(_) | None => self.files.get(path)?.objects.get(id),
            }
        };
        ids.iter().filter_map(|id| Some((id.clone(), find(id)?.clone()))).collect()
    }

    /// What changed for `touched`, compared with the winners before.
    fn differences(&self, touched: BTreeSet<ObjectId>, before: &BTreeMap<ObjectId, Object>) -> Vec<Event> {
        let mut events = Vec::new();
        for id in touched {
            match (self.winner(&id), before.get(&id)) {
                (Some(now), Some(then)) if now == then => {}
                (Some(now), _) => events.push(Event::Apply(now.clone())),
                (None, Some(_)) => events.push(Event::Delete(id)),
                (None, None) => {}
            }
        }
        events
    }
}

impl File {
    fn refuse_whole(&mut self, path: &str, problem: Problem) {
        self.refused.push(Refusal {
            file: path.to_owned(),
            line: 0,
            object: String::new(),
            problems: vec![problem],
            keeps_last_good: !self.objects.is_empty(),
        });
    }
}

impl std::fmt::Display for Refusal {
    /// One line per mistake: `file:line: Kind namespace/name: field: message; fix`; without a file where there is none.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            match (self.file.as_str(), self.line) {
                ("", _) => {}
                (file, 0) => write!(f, "{file}: ")?,
                (file, line) => write!(f, "{file}:{line}: ")?,
            }
            if !self.object.is_empty() {
                write!(f, "{}: ", self.object)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}
