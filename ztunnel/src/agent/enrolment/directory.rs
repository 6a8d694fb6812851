//! A directory of YAML as a source of labels, the same one that the control plane takes. It is followed by inotify, and by
//! looking again every few seconds for what inotify does not tell.
//!
//! What is not valid keeps its last good version and is reported; without one it asks for the mesh where its label may. A file
//! that became empty removes nothing, since half of a write looks just like that. Of two files with the same object the one
//! whose path comes first counts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::objects::{Document, Id, Object, parse};
use super::{Known, Origin, Source};
use crate::cni::knowledge::Knowledge;

/// A change is read once nothing more has happened for this long,
const QUIET: Duration = Duration::from_millis(25);
/// but no later than this after it.
const LATEST: Duration = Duration::from_millis(250);
/// The directory is looked through this often, told or not.
const POLL: Duration = Duration::from_secs(5);
/// Most manifests.
const MAX_FILES: usize = 50_000;
/// Largest manifest, in bytes.
const MAX_BYTES: u64 = 16 << 20;
/// Deepest nesting of folders.
const MAX_DEPTH: usize = 16;
/// Most complaints that are logged of one look.
const MAX_COMPLAINTS: usize = 50;

/// Why a directory cannot be a source, or could not be looked through.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// It is not there, or no directory.
    #[error("{} (--source-dir) is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// A folder cannot be listed.
    #[error("cannot list {}: {source}", path.display())]
    List {
        /// The folder.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// It holds too much.
    #[error("{} holds more than {MAX_FILES} manifests, or folders nested more than {MAX_DEPTH} deep", .0.display())]
    TooMuch(PathBuf),
}

/// The source.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    node: Option<String>,
}

impl Directory {
    /// A source that reads the manifests below `root`; Pods that run on another node than this one are left out.
    ///
    /// # Errors
    /// When it is not a directory.
    pub fn open(root: PathBuf, node: Option<String>) -> Result<Self, DirectoryError> {
        if root.is_dir() { Ok(Self { root, node }) } else { Err(DirectoryError::NotADirectory(root)) }
    }
}

impl Source for Directory {
    async fn run(self, knowledge: watch::Sender<Arc<Known>>) {
        // Watch first, look second: nothing that happens between the two is missed.
        let changed = Arc::new(Notify::new());
        let _watcher = watch(&self.root, Arc::clone(&changed));
        let mut files = Files::default();
        let mut last: Option<Knowledge> = None;
        loop {
            let (root, node) = (self.root.clone(), self.node.clone());
            let looked = tokio::task::spawn_blocking(move || {
                let looked = files.look(&root);
                let knowledge = looked.is_ok().then(|| files.knowledge(node.as_deref()));
                (files, knowledge, looked)
            });
            // The runtime ends.
            let Ok((back, found, looked)) = looked.await else { return };
            files = back;
            if let Err(error) = looked {
                files.complain(error.to_string());
            }
            if let Some(found) = found
                && last.as_ref() != Some(&found)
            {
                last = Some(found.clone());
                let pods: usize = found.pods.values().map(BTreeMap::len).sum();
                tracing::info!(namespaces = found.namespaces.len(), pods, "labels read");
                if knowledge
                    .send(Arc::new(Known {
                        knowledge: found,
                        origin: Origin::Source,
                        running: Vec::new(),
                        lists_pods: false,
                    }))
                    .is_err()
                {
                    return;
                }
            }
            tokio::select! {
                () = next(&changed) => {}
                () = knowledge.closed() => return,
            }
        }
    }
}

/// Waits until the directory should be looked at again.
async fn next(changed: &Notify) {
    if timeout_at(Instant::now() + POLL, changed.notified()).await.is_err() {
        return;
    }
    // A file is being written, perhaps with several calls, perhaps with its neighbours.
    let latest = Instant::now() + LATEST;
    loop {
        tokio::select! {
            () = changed.notified() => {}
            () = sleep_until((Instant::now() + QUIET).min(latest)) => return,
        }
    }
}

/// Starts inotify. Without it changes are still found, only later.
fn watch(root: &Path, changed: Arc<Notify>) -> Option<RecommendedWatcher> {
    use notify::event::{AccessKind, AccessMode, EventKind};
    let told = move |event: notify::Result<notify::Event>| {
        // Reading is not a change; and our own reading would wake us for ever.
        let closes_writing = EventKind::Access(AccessKind::Close(AccessMode::Write));
        let is_read = matches!(&event, Ok(event) if event.kind.is_access() && event.kind != closes_writing);
        if !is_read {
            changed.notify_one();
        }
    };
    let watcher = notify::recommended_watcher(told).and_then(|mut watcher| {
        watcher.watch(root, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    watcher
        .inspect_err(|error| tracing::warn!(%error, "cannot watch the directory; looking through it every few seconds"))
        .ok()
}

/// What tells one version of a file from the next, without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// What is known of the directory's files.
#[derive(Debug, Default)]
struct Files {
    objects: BTreeMap<String, BTreeMap<Id, Object>>,
    /// Those of them, with their files, that are no valid versions.
    stand_ins: BTreeSet<(String, Id)>,
    stamps: BTreeMap<String, Stamp>,
    /// What was complained of in the last look, so that it is said once.
    complaints: BTreeSet<String>,
}

impl Files {
    /// Reads what is new or different since the last look.
    fn look(&mut self, root: &Path) -> Result<(), DirectoryError> {
        let stamps = scan(root)?;
        for (name, stamp) in &stamps {
            if self.stamps.get(name) == Some(stamp) {
                continue;
            }
            match read(&root.join(name)) {
                Ok(text) => self.update(name, parse(&text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => self.complain(format!("{name}: {error}")),
            }
        }
        self.objects.retain(|name, _| stamps.contains_key(name));
        self.stand_ins.retain(|(name, _)| stamps.contains_key(name));
        self.complaints.retain(|text| text.split(": ").next().is_some_and(|name| stamps.contains_key(name)));
        self.stamps = stamps;
        Ok(())
    }

    /// A file has been read.
    fn update(&mut self, name: &str, documents: Vec<Document>) {
        let mut previous = self.objects.remove(name).unwrap_or_default();
        let mut objects = BTreeMap::new();
        let mut complaints = Vec::new();
        let mut stand_ins = BTreeSet::new();
        let mut is_incomplete = documents.is_empty() && !previous.is_empty();
        if is_incomplete {
            complaints.push(String::from("it is empty, but had objects before; remove the file to remove them"));
        }
        for document in documents {
            match document {
                Document::Object(id, object) => {
                    if let Some(first) = objects.get(&id) {
                        complaints.push(format!("{id:?} is in it twice; {first:?} counts"));
                    } else {
                        objects.insert(id, object);
                    }
                }
                Document::Refused { id: Some(id), reason, stand_in } => {
                    complaints.push(reason);
                    let at = (name.to_owned(), id);
                    let kept = previous.remove(&at.1).filter(|_| !self.stand_ins.contains(&at));
                    if objects.contains_key(&at.1) {
                        continue;
                    }
                    let is_kept = kept.is_some();
                    if let Some(object) = kept.or(stand_in) {
                        objects.insert(at.1.clone(), object);
                        if !is_kept {
                            stand_ins.insert(at);
                        }
                    }
                }
                Document::Refused { id: None, reason, .. } => {
                    is_incomplete = true;
                    complaints.push(reason);
                }
                Document::Ignored => {}
            }
        }
        if is_incomplete {
            for (id, object) in previous {
                let at = (name.to_owned(), id);
                if !objects.contains_key(&at.1) {
                    objects.insert(at.1.clone(), object);
                    stand_ins.extend(self.stand_ins.contains(&at).then_some(at));
                }
            }
        }
        self.stand_ins.retain(|(file, _)| file != name);
        self.stand_ins.extend(stand_ins);
        self.complaints.retain(|text| !text.starts_with(&format!("{name}: ")));
        for complaint in complaints.into_iter().take(MAX_COMPLAINTS) {
            self.complain(format!("{name}: {complaint}"));
        }
        self.objects.insert(name.to_owned(), objects);
    }

    fn complain(&mut self, text: String) {
        if !self.complaints.contains(&text) {
            tracing::warn!(
                "refused; what was read of it before stays in force, or else that it may ask for the mesh: {text}"
            );
            self.complaints.insert(text);
        }
    }

    /// All objects in force; of Pods those on this node, or on none yet.
    fn knowledge(&self, node: Option<&str>) -> Knowledge {
        let mut known = Knowledge::default();
        // The first of the same name counts, so the last is entered first.
        for (id, object) in self.objects.values().rev().flatten() {
            match (id, object) {
                (Id::Namespace(name), Object::Namespace(mode)) => {
                    known.namespaces.insert(name.clone(), *mode);
                }
                (Id::Pod(namespace, name), Object::Pod(pod, runs_on)) => {
                    let is_here = runs_on.is_empty() || node.is_none_or(|node| node == runs_on);
                    let pods = known.pods.entry(namespace.clone()).or_default();
                    if is_here {
                        pods.insert(name.clone(), pod.clone());
                    } else {
                        pods.remove(name);
                    }
                }
                (Id::Namespace(_), Object::Pod(..)) | (Id::Pod(..), Object::Namespace(_)) => {}
            }
        }
        known.pods.retain(|_, pods| !pods.is_empty());
        known
    }
}

/// The manifests below `root`, by path relative to it. Hidden files and folders are skipped, links to folders are not
/// followed, and links to files only where they stay below `root` (which is how Kubernetes mounts a ConfigMap).
fn scan(root: &Path) -> Result<BTreeMap<String, Stamp>, DirectoryError> {
    let mut found = BTreeMap::new();
    let mut folders = vec![(root.to_path_buf(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        let listed = |source| DirectoryError::List { path: folder.clone(), source };
        for entry in fs::read_dir(&folder).map_err(listed)? {
            let entry = entry.map_err(listed)?;
            let name = entry.file_name();
            // A name that is not UTF-8 could not be reported faithfully.
            let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
            let Ok(kind) = entry.file_type() else { continue };
            let relative = format!("{prefix}{name}");
            if kind.is_dir() {
                folders.push((entry.path(), format!("{relative}/"), depth + 1));
            } else if (name.ends_with(".yaml") || name.ends_with(".yml"))
                && let Some(stamp) = stamp(root, &entry.path(), kind.is_symlink())
            {
                found.insert(relative, stamp);
            }
            if found.len() > MAX_FILES || folders.len() > MAX_FILES || depth > MAX_DEPTH {
                return Err(DirectoryError::TooMuch(root.to_owned()));
            }
        }
    }
    Ok(found)
}

/// None for what is not a regular file, and for files that vanish while they are looked at.
fn stamp(root: &Path, path: &Path, is_link: bool) -> Option<Stamp> {
    if is_link && !path.canonicalize().ok()?.starts_with(root.canonicalize().ok()?) {
        return None;
    }
    let found = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    Some(Stamp {
        inode: found.ino(),
        size: found.size(),
        modified: (found.mtime(), found.mtime_nsec()),
        changed: (found.ctime(), found.ctime_nsec()),
    })
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_BYTES} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::decide::Mode;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn namespace(name: &str, mode: &str) -> String {
        format!(
            "---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {{istio.io/dataplane-mode: {mode}}}}}}}\n"
        )
    }

    fn pod(name: &str, node: &str) -> String {
        format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop}}, spec: {{nodeName: {node}}}}}\n"
        )
    }

    fn look(files: &mut Files, root: &Path) -> Knowledge {
        files.look(root).unwrap();
        files.knowledge(Some("here"))
    }

    #[test]
    fn what_is_not_valid_keeps_its_last_good_version() {
        let folder = tempfile::tempdir().unwrap();
        let (root, mut files) = (folder.path(), Files::default());
        let file = root.join("a.yaml");
        let mut after = |text: &str| {
            // Another inode: the clock of the file system may not have moved.
            fs::write(root.join("new"), text).unwrap();
            fs::rename(root.join("new"), &file).unwrap();
            look(&mut files, root).namespaces
        };
        let both = [(String::from("a"), Mode::Ambient), (String::from("b"), Mode::None)];
        assert_eq!(after(&(namespace("a", "ambient") + &namespace("b", "none"))), both.clone().into());
        assert_eq!(after(&(namespace("a", "typo") + &namespace("b", "none"))), both.clone().into(), "by object");
        assert_eq!(after("]"), both.clone().into(), "by file");
        assert_eq!(after(""), both.into(), "half of a write");
        assert_eq!(after(&namespace("b", "ambient")), [(String::from("b"), Mode::Ambient)].into());
        let mut c = |mode: &str| after(&namespace("c", mode)).get("c").copied();
        assert_eq!(c("typo"), Some(Mode::Ambient), "there is no good version of it");
        assert_eq!(c("none"), Some(Mode::None));
        assert_eq!(c("typo"), Some(Mode::None));
        assert_eq!(after(&namespace("b", "ambient")), [(String::from("b"), Mode::Ambient)].into());
        let complaints = files.complaints.len();
        assert_eq!(complaints, 0, "what was wrong is mended: {:?}", files.complaints);
        fs::remove_file(&file).unwrap();
        assert_eq!(look(&mut files, root), Knowledge::default());
    }

    #[test]
    fn first_file_counts_and_other_nodes_pods_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir(root.join("sub")).unwrap();
        fs::write(root.join("b.yml"), namespace("a", "none") + &pod("p", "here") + &pod("q", "there")).unwrap();
        fs::write(root.join("a.yaml"), namespace("a", "ambient")).unwrap();
        fs::write(root.join("sub/c.yaml"), namespace("c", "none")).unwrap();
        fs::write(root.join(".hidden.yaml"), namespace("d", "none")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("link.yaml")).unwrap();
        let mut files = Files::default();
        let known = look(&mut files, root);
        assert_eq!(known.namespaces, [(String::from("a"), Mode::Ambient), (String::from("c"), Mode::None)].into());
        assert_eq!(known.pods["shop"].keys().collect::<Vec<_>>(), ["p"]);
        assert_eq!(files.knowledge(None).pods["shop"].len(), 2);
    }

    #[test]
    fn too_large_file_is_refused_and_its_last_version_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (root, mut files) = (folder.path(), Files::default());
        fs::write(root.join("a.yaml"), namespace("a", "ambient")).unwrap();
        let before = look(&mut files, root);
        fs::write(root.join("a.yaml"), "#".repeat(MAX_BYTES as usize + 1)).unwrap();
        assert_eq!(look(&mut files, root), before);
        assert_eq!(files.complaints.len(), 1);
        fs::write(root.join("a.yaml"), b"\xff\xfe").unwrap();
        assert_eq!(look(&mut files, root), before);
    }

    #[tokio::test]
    async fn change_is_published() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.yaml"), namespace("a", "none")).unwrap();
        let (publish, mut known) = watch::channel(Arc::new(Known::default()));
        let source = Directory::open(folder.path().to_owned(), None).unwrap();
        let task = tokio::spawn(source.run(publish));
        let mut wait = async |mode| {
            let told = known.wait_for(|known| known.knowledge.namespaces.get("a") == Some(&mode));
            let told = tokio::time::timeout(PATIENCE, told).await.unwrap().unwrap();
            assert_eq!(told.origin, Origin::Source);
        };
        wait(Mode::None).await;
        fs::write(folder.path().join("a.yaml"), namespace("a", "ambient")).unwrap();
        wait(Mode::Ambient).await;
        drop(known);
        tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap();
        assert!(matches!(Directory::open(folder.path().join("a.yaml"), None), Err(DirectoryError::NotADirectory(_))));
    }
}
