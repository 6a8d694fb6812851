//! Which objects are in force, and a real directory followed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio::sync::mpsc;

use super::{Batch, Directory, DirectoryError, Files, Limits, Timing};
use crate::api::{self, Object};
use crate::index::Event;

fn namespace(name: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n")
}

fn enrolled(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio.io/dataplane-mode: ambient}}}}\n"
    )
}

fn broken(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio.io/dataplane-mode: x}}}}\n"
    )
}

/// `+name` for an object in force (`+name!` if it is an enrolled namespace), `-name` for one that is gone.
fn summary(events: &[Event]) -> String {
    let mut words: Vec<String> = events
        .iter()
        .map(|event| match event {
            Event::Apply(Object::Namespace(namespace)) if namespace.mode == api::DataplaneMode::Ambient => {
                format!("+{}!", namespace.name)
            }
            Event::Apply(object) => format!("+{}", object.id().name),
            Event::Delete(id) => format!("-{}", id.name),
        })
        .collect();
    words.sort();
    words.join(" ")
}

fn update(files: &mut Files, path: &str, text: &str) -> String {
    summary(&files.update(path, api::parse(text)))
}

fn refusals(files: &Files) -> Vec<String> {
    files.report().refused.iter().map(|refusal| format!("{} {}", refusal.file, refusal.object)).collect()
}

#[test]
fn a_policy_that_is_not_valid_is_stood_in_for_only_without_an_earlier_version() {
    let policy = |action: &str| {
        format!(
            "---\n{{apiVersion: security.istio.io/v1beta1, kind: AuthorizationPolicy, metadata: {{name: p}}, spec: {{action: {action}}}}}\n"
        )
    };
    let mut files = Files::default();
    assert_eq!(update(&mut files, "a.yaml", &(namespace("x") + &policy("PERHAPS"))), "+p +x");
    assert_eq!((files.report().accepted, files.report().refused[0].keeps_last_good), (1, false));
    assert_eq!(update(&mut files, "a.yaml", &(policy("MAYBE") + &namespace("x"))), "");
    assert!(!files.report().refused[0].keeps_last_good);
    assert_eq!(update(&mut files, "a.yaml", &policy("DENY")), "+p -x");
    assert_eq!(files.report().accepted, 1);
    assert_eq!(update(&mut files, "a.yaml", &policy("MAYBE")), "");
    assert!(files.report().refused[0].keeps_last_good);
    // A file that breaks keeps what stands in as well.
    assert_eq!(summary(&files.remove("a.yaml")), "-p");
    assert_eq!(update(&mut files, "a.yaml", &policy("MAYBE")), "+p");
    assert_eq!(update(&mut files, "a.yaml", "{ broken"), "");
    assert_eq!(files.report().accepted, 0);
    assert_eq!(update(&mut files, "a.yaml", "# nothing any more\n"), "");
    assert_eq!(summary(&files.remove("a.yaml")), "-p");
}

#[test]
fn only_what_changed_is_told() {
    let mut files = Files::default();
    assert_eq!(update(&mut files, "a.yaml", &(namespace("x") + &namespace("y"))), "+x +y");
    assert_eq!(update(&mut files, "a.yaml", &(namespace("y") + &namespace("x"))), "");
    assert_eq!(update(&mut files, "a.yaml", &(enrolled("x") + &namespace("z"))), "+x! +z -y");
    assert_eq!(summary(&files.remove("a.yaml")), "-x -z");
    assert_eq!(files.report().accepted, 0);
}

#[test]
fn a_bad_object_keeps_its_last_good_version_and_its_neighbours_go_on() {
    let mut files = Files::default();
    assert_eq!(update(&mut files, "a.yaml", &(enrolled("x") + &namespace("y"))), "+x! +y");
    assert_eq!(update(&mut files, "a.yaml", &(broken("x") + &enrolled("y"))), "+y!");
    assert_eq!(refusals(&files), ["a.yaml Namespace x"]);
    assert!(files.report().refused[0].keeps_last_good);
    assert_eq!(files.report().accepted, 2);
    // A second mistake does not lose the version either, and taking the object out does.
    assert_eq!(update(&mut files, "a.yaml", &(broken("x") + &enrolled("y") + "\n# edited\n")), "");
    assert_eq!(update(&mut files, "a.yaml", &enrolled("y")), "-x");
    assert!(refusals(&files).is_empty());
}

#[test]
fn what_cannot_be_identified_removes_nothing() {
    let mut files = Files::default();
    assert_eq!(update(&mut files, "a.yaml", &(namespace("x") + &namespace("y"))), "+x +y");
    assert_eq!(update(&mut files, "a.yaml", &(enrolled("x") + "---\n{{{ no yaml\n")), "+x!");
    assert_eq!(update(&mut files, "a.yaml", ""), "");
    assert_eq!(refusals(&files), ["a.yaml "]);
    files.unreadable("a.yaml", "cannot be read".to_owned());
    assert_eq!(files.report().accepted, 2);
    // A mesh object of an unsupported kind is identified well enough: it does not hold the others.
    let unsupported = "---\n{apiVersion: security.istio.io/v1, kind: RequestAuthentication, metadata: {name: p}}\n";
    assert_eq!(update(&mut files, "a.yaml", &(enrolled("x") + unsupported)), "-y");
    assert_eq!(refusals(&files), ["a.yaml RequestAuthentication p"]);
}

#[test]
fn the_first_file_wins_a_duplicate_and_both_are_named() {
    let mut files = Files::default();
    assert_eq!(update(&mut files, "b.yaml", &namespace("x")), "+x");
    assert_eq!(update(&mut files, "c.yaml", &enrolled("x")), "");
    assert_eq!(update(&mut files, "a.yaml", &enrolled("x")), "+x!");
    let report = files.report();
    assert_eq!(report.accepted, 1);
    let text: Vec<String> = report.refused.iter().map(ToString::to_string).collect();
    assert_eq!(
        text,
        [
            "b.yaml: Namespace x: is also in a.yaml, which comes first and counts; remove it from a.yaml or from b.yaml",
            "c.yaml: Namespace x: is also in a.yaml, which comes first and counts; remove it from a.yaml or from c.yaml",
        ]
    );
    assert_eq!(summary(&files.remove("a.yaml")), "+x");
    assert_eq!(summary(&files.remove("b.yaml")), "+x!");
    assert_eq!(update(&mut files, "c.yaml", &(enrolled("x") + &namespace("x"))), "");
    assert_eq!(refusals(&files), ["c.yaml Namespace x"]);
    assert_eq!(summary(&files.remove("c.yaml")), "-x");
}

/// Files are written as tools should: whole, under another name, then renamed.
fn write(root: &Path, name: &str, text: &str) {
    let temporary = root.join(format!(".{}.tmp", name.replace('/', "_")));
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, root.join(name)).unwrap();
}

async fn next(batches: &mut mpsc::Receiver<Batch>) -> Batch {
    tokio::time::timeout(Duration::from_secs(10), batches.recv()).await.expect("a batch in time").expect("a batch")
}

async fn next_events(batches: &mut mpsc::Receiver<Batch>) -> String {
    loop {
        let batch = next(batches).await;
        if !batch.events.is_empty() {
            return summary(&batch.events);
        }
    }
}

fn start(root: &Path, timing: Timing) -> mpsc::Receiver<Batch> {
    let (sender, receiver) = mpsc::channel(4);
    let directory = Directory::new(root, Limits::default(), timing);
    tokio::spawn(async move { directory.run(sender).await.unwrap() });
    receiver
}

#[tokio::test]
async fn a_directory_is_followed_by_inotify() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    // With this poll interval only inotify can be what finds a change.
    let mut batches = start(root, Timing { poll: Duration::from_secs(3600), ..Timing::default() });
    assert!(next(&mut batches).await.events.is_empty(), "the first batch comes even from an empty directory");
    write(root, "a.yaml", &namespace("x"));
    assert_eq!(next_events(&mut batches).await, "+x");
    fs::create_dir(root.join("sub")).unwrap();
    write(root, "sub/b.yml", &namespace("y"));
    assert_eq!(next_events(&mut batches).await, "+y");
    write(root, "a.yaml", &enrolled("x"));
    assert_eq!(next_events(&mut batches).await, "+x!");
    // Writing in place works too.
    fs::write(root.join("a.yaml"), namespace("x")).unwrap();
    assert_eq!(next_events(&mut batches).await, "+x");
    write(root, "a.yaml", "{ broken");
    let batch = next(&mut batches).await;
    assert!(batch.events.is_empty() && batch.report.refused[0].keeps_last_good, "{batch:?}");
    assert_eq!(batch.report.accepted, 2);
    // Renaming a file moves its objects without anybody noticing; the broken file still holds x.
    fs::rename(root.join("sub/b.yml"), root.join("c.yaml")).unwrap();
    fs::remove_file(root.join("a.yaml")).unwrap();
    assert_eq!(next_events(&mut batches).await, "-x");
    fs::remove_file(root.join("c.yaml")).unwrap();
    assert_eq!(next_events(&mut batches).await, "-y");
}

#[tokio::test]
async fn a_directory_is_followed_by_polling_alone() {
    let root = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    write(outside.path(), "secret.yaml", &namespace("secret"));
    // A link out of the directory, a hidden file, and a file of another kind are not read.
    std::os::unix::fs::symlink(outside.path().join("secret.yaml"), root.path().join("link.yaml")).unwrap();
    fs::write(root.path().join(".hidden.yaml"), namespace("hidden")).unwrap();
    fs::write(root.path().join("notes.txt"), namespace("text")).unwrap();
    let mut batches = start(root.path(), Timing { poll: Duration::from_millis(20), ..Timing::default() });
    assert_eq!(next(&mut batches).await.report.files, 0);
    // Replacing the whole directory defeats inotify: the watch follows the old one.
    let moved = root.path().with_extension("moved");
    fs::rename(root.path(), &moved).unwrap();
    let batch = next(&mut batches).await;
    assert!(batch.events.is_empty() && batch.report.refused[0].file == ".", "{batch:?}");
    fs::create_dir(root.path()).unwrap();
    write(root.path(), "a.yaml", &namespace("x"));
    assert_eq!(next_events(&mut batches).await, "+x");
    // An unreadable directory removes nothing.
    fs::rename(root.path(), root.path().with_extension("gone")).unwrap();
    let batch = next(&mut batches).await;
    assert!(batch.events.is_empty() && batch.report.accepted == 1, "{batch:?}");
    fs::remove_dir_all(moved).unwrap();
    fs::remove_dir_all(root.path().with_extension("gone")).unwrap();
}

#[tokio::test]
async fn limits_and_missing_directories_are_errors() {
    let root = tempfile::tempdir().unwrap();
    let missing = root.path().join("missing");
    let (sender, _receiver) = mpsc::channel(1);
    let error = Directory::new(&missing, Limits::default(), Timing::default()).run(sender).await.unwrap_err();
    assert!(matches!(error, DirectoryError::NotADirectory(_)));
    write(root.path(), "a.yaml", &namespace("x"));
    write(root.path(), "b.yaml", &namespace("y"));
    let tight = |limits| Directory::new(root.path(), limits, Timing::default()).read_once();
    assert!(matches!(tight(Limits { files: 1, ..Limits::default() }), Err(DirectoryError::Scan(_))));
    let report = tight(Limits { file_bytes: 10, ..Limits::default() }).unwrap().report;
    assert_eq!((report.accepted, report.refused.len()), (0, 2));
    fs::create_dir_all(root.path().join("1/2/3")).unwrap();
    assert!(matches!(tight(Limits { depth: 2, ..Limits::default() }), Err(DirectoryError::Scan(_))));
}
