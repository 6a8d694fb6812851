//! The CNI plugin on its node: this program's own file in the runtime's folder of plugins, and its place in the network's
//! configuration. Both are written whole or not at all. CNIs write their configuration anew as they please, so the folder
//! is watched, and what they took out is put back.
//!
//! It stays when the agent ends: pods that start meanwhile are decided by what the agent left word of, or wait.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_runtime::ready::Pending;
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::cni::chain::{self, ChainError, TYPE};

/// The folder is looked through this often, told or not.
const POLL: Duration = Duration::from_secs(5);
/// Shortest time between two looks.
const PAUSE: Duration = Duration::from_millis(200);
/// Largest network configuration, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// What is behind the name of a configuration with a single plugin while a list stands in its place.
const ORIGINAL: &str = ".culvert-original";

/// Where the plugin is installed, and how it is configured.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// The runtime's folder of plugins, usually `/opt/cni/bin`.
    pub bin_dir: PathBuf,
    /// The runtime's folder of network configurations, usually `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// The field `culvert` of its configuration.
    pub own: Value,
}

/// Why the plugin could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The configuration cannot be chained to.
    #[error("{}: {source}", path.display())]
    Chain {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ChainError,
    },
    /// There is none yet: the node's CNI has still to write it.
    #[error("{} holds no network configuration; the plugin waits for the node's CNI to write one", .0.display())]
    NoNetwork(PathBuf),
    /// It is too large to be one.
    #[error("{} is larger than {MAX_BYTES} bytes", .0.display())]
    TooLarge(PathBuf),
}

/// What [`Plugin::install`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// The program's file was written.
    pub program: bool,
    /// This configuration was changed.
    pub configuration: Option<PathBuf>,
}

impl Plugin {
    /// Puts the plugin in its place, whatever is missing of it. Blocks.
    ///
    /// # Errors
    /// When a file cannot be read or written, or there is no network to chain to. The program comes first: a configuration
    /// that names a plugin which is not there would keep every pod from starting.
    pub fn install(&self) -> Result<Installed, PluginError> {
        let program = self.copy_program()?;
        let names = names(&self.conf_dir)?;
        let name = chain::chosen(names.iter().map(String::as_str));
        let name = name.ok_or_else(|| PluginError::NoNetwork(self.conf_dir.clone()))?;
        let path = self.conf_dir.join(name);
        let (text, mode) = read(&path)?;
        let chained =
            chain::chained(&text, &self.own).map_err(|source| PluginError::Chain { path: path.clone(), source })?;
        let Some(chained) = chained else { return Ok(Installed { program, configuration: None }) };
        if chain::is_single(&text) {
            // Runtimes take a list only from a file of this ending; the original must not come before it.
            let list = path.with_extension("conflist");
            write(&list, &chained, mode)?;
            let kept = self.conf_dir.join(format!("{name}{ORIGINAL}"));
            fs::rename(&path, &kept).map_err(at(&path))?;
            return Ok(Installed { program, configuration: Some(list) });
        }
        write(&path, &chained, mode)?;
        Ok(Installed { program, configuration: Some(path) })
    }

    /// Takes the plugin out of every configuration, then its program away. Blocks.
    ///
    /// # Errors
    /// When a file cannot be read or written; what comes after it is not tried.
    pub fn remove(&self) -> Result<(), PluginError> {
        let names = names(&self.conf_dir)?;
        for name in &names {
            let path = self.conf_dir.join(name);
            if let Some(original) = name.strip_suffix(ORIGINAL) {
                let list = self.conf_dir.join(original).with_extension("conflist");
                fs::rename(&path, self.conf_dir.join(original)).map_err(at(&path))?;
                remove(&list)?;
            } else if chain::chosen([name.as_str()]).is_some() && path.exists() {
                let (text, mode) = read(&path)?;
                // What is no list is none of ours.
                if let Ok(Some(text)) = chain::unchained(&text) {
                    write(&path, &text, mode)?;
                }
            }
        }
        remove(&self.bin_dir.join(TYPE))
    }

    /// Keeps the plugin in its place until the agent ends; never returns by itself. `ready` is done when it is there for
    /// the first time: before that pods could start without it.
    pub async fn keep(self, ready: Pending) {
        let mut ready = Some(ready);
        let changed = Arc::new(Notify::new());
        let _watcher = watch(&self.conf_dir, Arc::clone(&changed));
        let plugin = Arc::new(self);
        let mut complaint = String::new();
        loop {
            let installing = Arc::clone(&plugin);
            // The runtime ends.
            let Ok(done) = tokio::task::spawn_blocking(move || installing.install()).await else { return };
            match done {
                Ok(Installed { program, configuration }) => {
                    complaint.clear();
                    if let Some(ready) = ready.take() {
                        ready.done();
                    }
                    if let Some(path) = configuration {
                        tracing::info!(configuration = %path.display(), "the CNI plugin is chained");
                    }
                    if program {
                        tracing::info!(folder = %plugin.bin_dir.display(), "the CNI plugin's program is in place");
                    }
                }
                Err(error) => {
                    let text = error.to_string();
                    if text != complaint {
                        tracing::warn!(%error, "the CNI plugin is not installed; trying again");
                    }
                    complaint = text;
                }
            }
            // What cannot be written, or is fought over with somebody, must not keep the node busy.
            tokio::time::sleep(PAUSE).await;
            // Either way it is time to look again.
            let _ = timeout_at(Instant::now() + POLL, changed.notified()).await;
        }
    }

    /// Whether the file had to be written.
    fn copy_program(&self) -> Result<bool, PluginError> {
        let source = Path::new("/proc/self/exe");
        let target = self.bin_dir.join(TYPE);
        if is_same(source, &target).map_err(at(&target))? {
            return Ok(false);
        }
        let partial = partial(&target);
        // Not written through: a runtime may be running the old one.
        let copied = create(&partial, 0o755).and_then(|mut file| {
            io::copy(&mut File::open(source)?, &mut file)?;
            file.set_permissions(Permissions::from_mode(0o755))?;
            file.sync_all()?;
            fs::rename(&partial, &target)
        });
        if copied.is_err() {
            // The first error is the one that matters.
            let _ = fs::remove_file(&partial);
        }
        copied.map_err(at(&target))?;
        Ok(true)
    }
}

/// Compared by content: a copy keeps neither time nor inode.
fn is_same(source: &Path, target: &Path) -> io::Result<bool> {
    let (a, b) = match (fs::metadata(source)?, fs::metadata(target)) {
        (a, Ok(b)) => (a, b),
        (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        (_, Err(error)) => return Err(error),
    };
    if a.size() != b.size() || !b.is_file() || b.mode() & 0o777 != 0o755 {
        return Ok(false);
    }
    let (mut a, mut b) = (File::open(source)?, File::open(target)?);
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let n = io::Read::read(&mut a, &mut left)?;
        let (Some(left), Some(right)) = (left.get(..n), right.get_mut(..n)) else { return Ok(false) };
        if n == 0 {
            return Ok(true);
        }
        if io::Read::read_exact(&mut b, right).is_err() || left != right {
            return Ok(false);
        }
    }
}

fn names(folder: &Path) -> Result<Vec<String>, PluginError> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    // A name that is not UTF-8 is no runtime's.
    let mut names: Vec<_> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort_unstable();
    Ok(names)
}

/// The text and the file's mode.
fn read(path: &Path) -> Result<(Vec<u8>, u32), PluginError> {
    let file = File::open(path).map_err(at(path))?;
    let mode = file.metadata().map_err(at(path))?.mode() & 0o777;
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, MAX_BYTES + 1), &mut text).map_err(at(path))?;
    if text.len() as u64 > MAX_BYTES { Err(PluginError::TooLarge(path.to_owned())) } else { Ok((text, mode)) }
}

fn write(path: &Path, text: &[u8], mode: u32) -> Result<(), PluginError> {
    let partial = partial(path);
    let written = create(&partial, mode).and_then(|mut file| {
        file.write_all(text)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&partial, path)
    });
    if written.is_err() {
        // The first error is the one that matters.
        let _ = fs::remove_file(&partial);
    }
    written.map_err(at(path))
}

fn remove(path: &Path) -> Result<(), PluginError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Beside the file, with a name that no runtime takes.
fn partial(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.culvert-{}", std::process::id()))
}

fn create(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(true).write(true).mode(mode).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Starts inotify. Without it changes are still found, only later.
fn watch(folder: &Path, changed: Arc<Notify>) -> Option<RecommendedWatcher> {
    let told = move |event: notify::Result<notify::Event>| {
        // Files with a dot are half-written ones, of ours too.
        let is_hidden = |path: &PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let is_nothing = |event: &notify::Event| {
            event.kind.is_access() || (!event.paths.is_empty() && event.paths.iter().all(is_hidden))
        };
        if !matches!(&event, Ok(event) if is_nothing(event)) {
            changed.notify_one();
        }
    };
    let watcher = notify::recommended_watcher(told).and_then(|mut watcher| {
        watcher.watch(folder, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    watcher.inspect_err(|error| tracing::warn!(%error, "cannot watch the network configurations; looking often")).ok()
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PluginError {
    move |source| PluginError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    struct Node {
        folder: TempDir,
        plugin: Plugin,
    }

    impl Node {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let [bin_dir, conf_dir] = ["bin", "net.d"].map(|name| folder.path().join(name));
            fs::create_dir(&bin_dir).unwrap();
            fs::create_dir(&conf_dir).unwrap();
            Self { plugin: Plugin { bin_dir, conf_dir, own: json!({}) }, folder }
        }

        fn write(&self, name: &str, content: &Value) {
            fs::write(self.plugin.conf_dir.join(name), content.to_string()).unwrap();
        }

        fn plugins(&self, name: &str) -> Vec<String> {
            let Ok(text) = fs::read(self.plugin.conf_dir.join(name)) else { return Vec::new() };
            let all: Value = serde_json::from_slice(&text).unwrap();
            let plugins = all["plugins"].as_array().unwrap().iter();
            plugins.map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
        }
    }

    fn network() -> Value {
        json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "bridge" }] })
    }

    #[test]
    fn program_and_place_are_put_once_and_taken_away() {
        let node = Node::new();
        assert!(matches!(node.plugin.install(), Err(PluginError::NoNetwork(_))), "the CNI comes later");
        node.write("10-net.conflist", &network());
        fs::set_permissions(node.plugin.conf_dir.join("10-net.conflist"), Permissions::from_mode(0o600)).unwrap();
        node.write("99-other.conflist", &network());
        let done = node.plugin.install().unwrap();
        assert_eq!(done.configuration, Some(node.plugin.conf_dir.join("10-net.conflist")));
        assert_eq!(node.plugins("10-net.conflist"), ["bridge", TYPE]);
        assert_eq!(node.plugins("99-other.conflist"), ["bridge"], "a runtime takes the first");
        assert_eq!(read(&node.plugin.conf_dir.join("10-net.conflist")).unwrap().1, 0o600);
        assert_eq!(node.plugin.install().unwrap(), Installed::default(), "nothing is left to do");
        let program = node.plugin.bin_dir.join(TYPE);
        assert_eq!(fs::read(&program).unwrap(), fs::read("/proc/self/exe").unwrap());
        assert_eq!(fs::metadata(&program).unwrap().mode() & 0o777, 0o755);
        fs::write(&program, "an older one").unwrap();
        assert!(node.plugin.install().unwrap().program, "another version is replaced");
        node.plugin.remove().unwrap();
        assert_eq!(node.plugins("10-net.conflist"), ["bridge"]);
        assert!(!program.exists());
        assert_eq!(fs::read_dir(node.folder.path().join("net.d")).unwrap().count(), 2, "nothing half-written stays");
        node.plugin.remove().unwrap();
    }

    #[test]
    fn single_plugin_makes_way_for_a_list_and_comes_back() {
        let node = Node::new();
        let single = json!({ "cniVersion": "0.3.1", "name": "net", "type": "bridge" });
        node.write("10-net.conf", &single);
        node.plugin.install().unwrap();
        assert_eq!(node.plugins("10-net.conflist"), ["bridge", TYPE]);
        assert!(!node.plugin.conf_dir.join("10-net.conf").exists());
        assert_eq!(node.plugin.install().unwrap(), Installed::default());
        node.plugin.remove().unwrap();
        assert!(!node.plugin.conf_dir.join("10-net.conflist").exists());
        let text = fs::read(node.plugin.conf_dir.join("10-net.conf")).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), single);
    }

    #[tokio::test]
    async fn what_a_cni_takes_out_is_put_back() {
        let node = Node::new();
        let readiness = mesh_runtime::ready::Readiness::new();
        let keeping = tokio::spawn(node.plugin.clone().keep(readiness.register("plugin")));
        assert!(!readiness.is_ready(), "pods would start without it");
        for round in 0..3 {
            // First there is none, then it is written anew.
            node.write("10-net.conflist", &network());
            let chained = async {
                while node.plugins("10-net.conflist").len() < 2 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(30), chained).await.unwrap_or_else(|_| panic!("round {round}"));
        }
        assert!(readiness.is_ready());
        keeping.abort();
    }

    #[test]
    fn broken_configuration_stays_as_it_is() {
        let node = Node::new();
        let path = node.plugin.conf_dir.join("10-net.conflist");
        fs::write(&path, "{").unwrap();
        assert!(matches!(node.plugin.install(), Err(PluginError::Chain { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"{");
        node.plugin.remove().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{");
    }
}
