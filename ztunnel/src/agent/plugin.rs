//! The CNI plugin on its node: this program's own file in the runtime's folder of plugins, and a network configuration that
//! calls it. Both are written whole or not at all.
//!
//! The configuration is a file of its own which the runtime takes before all others: what the node's CNI configured, and
//! behind that the plugin. The CNI's file is never touched, since most write it anew whenever they start. After a reboot that
//! is before any agent runs, and pods that start meanwhile would pass without the plugin. The folder is watched, and the
//! copy follows what the CNI writes.
//!
//! It stays when the agent ends, and while the CNI's file is away: pods that start meanwhile are decided by what the agent
//! left word of, or wait.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_runtime::ready::{Pending, Readiness};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::cni::chain::{self, ChainError, FILE, TYPE};

/// The folder is looked through this often, told or not.
const POLL: Duration = Duration::from_secs(5);
/// What the agent's readiness waits for.
pub const CHAINED: &str = "the CNI plugin is chained";
/// Shortest time between two looks.
const PAUSE: Duration = Duration::from_millis(200);
/// Largest network configuration, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// What agents that edited the CNI's own files put behind the name of one with a single plugin, while a list stood in its
/// place.
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

/// Plugins of Multus, which delegates to other configurations.
const MULTUS: [&str; 2] = ["multus", "multus-shim"];

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
    /// The runtime would not take ours.
    #[error(
        "{name:?} in {} comes before {FILE}, and the runtime takes the first: give it a name that comes after",
        folder.display()
    )]
    NotFirst {
        /// The folder of configurations.
        folder: PathBuf,
        /// What comes first.
        name: String,
    },
    /// What the runtime calls is not in the folder where the plugin is: it would not be found there either.
    #[error(
        "none of the plugins of {} ({}) is in {}: name the folder in which the runtime looks for plugins (--cni-bin-dir)",
        path.display(), types.join(", "), folder.display()
    )]
    OtherFolder {
        /// The CNI's configuration.
        path: PathBuf,
        /// Its plugins.
        types: Vec<String>,
        /// The folder that was looked through.
        folder: PathBuf,
    },
    /// Multus takes the first configuration that is not its own for that of the default network: it and the plugin would copy
    /// each other without end.
    #[error(
        "{} is that of Multus, which is not supported: take Multus off the nodes of the mesh, or keep the agent off nodes with \
         Multus (nodeAffinity of the DaemonSet culvert-node)",
        .0.display()
    )]
    Multus(PathBuf),
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
    /// The configuration was written.
    pub configuration: bool,
    /// The CNI's own is not there; the copy of it stays.
    pub is_alone: bool,
}

impl Plugin {
    /// Puts the plugin in its place, whatever is missing of it. Blocks.
    ///
    /// # Errors
    /// When a file cannot be read or written, or there is no network to chain to. The program comes first: a configuration
    /// that names a plugin which is not there would keep every pod from starting.
    pub fn install(&self) -> Result<Installed, PluginError> {
        let ours = self.conf_dir.join(FILE);
        let names = names(&self.conf_dir)?;
        let source = chain::chosen(names.iter().map(String::as_str).filter(|name| *name != FILE));
        let Some(source) = source else {
            // Without the copy there would be no plugin from when the CNI writes its own until this agent has seen it.
            if !names.iter().any(|name| name == FILE) {
                return Err(PluginError::NoNetwork(self.conf_dir.clone()));
            }
            return Ok(Installed { program: self.copy_program()?, configuration: false, is_alone: true });
        };
        if source < FILE {
            return Err(PluginError::NotFirst { folder: self.conf_dir.clone(), name: source.to_owned() });
        }
        let path = self.conf_dir.join(source);
        let (text, mode) = read(&path)?;
        let bad = |source| PluginError::Chain { path: path.clone(), source };
        let wanted = chain::chained(&text, &self.own).map_err(bad)?;
        if wanted.types.iter().any(|kind| MULTUS.contains(&kind.as_str())) {
            return Err(PluginError::Multus(path));
        }
        self.check_folder(&path, &wanted.types)?;
        let program = self.copy_program()?;
        let is_same = match read(&ours) {
            Ok(there) => there == (wanted.text.clone(), mode),
            Err(PluginError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        if !is_same {
            write(&ours, &wanted.text, mode)?;
        }
        self.leave_others(&names)?;
        Ok(Installed { program, configuration: !is_same, is_alone: false })
    }

    /// Takes the plugin's configuration away, then its program. Blocks.
    ///
    /// # Errors
    /// When a file cannot be read or written; what comes after it is not tried.
    pub fn remove(&self) -> Result<(), PluginError> {
        let (list, program) = (self.conf_dir.join(FILE), self.bin_dir.join(TYPE));
        remove(&list)?;
        self.leave_others(&names(&self.conf_dir)?)?;
        remove(&program)?;
        [&self.conf_dir, &self.bin_dir].into_iter().try_for_each(|folder| {
            // A folder that is not there holds none.
            let all = names(folder).unwrap_or_default();
            let halves = all.into_iter().filter(|name| name.starts_with('.') && name.contains(".culvert-"));
            halves.map(|name| folder.join(name)).try_for_each(|path| remove(&path))
        })
    }

    /// One of the CNI's plugins is where ours is put. Not all need be: some runtimes look through several folders.
    fn check_folder(&self, path: &Path, types: &[String]) -> Result<(), PluginError> {
        // A link counts: it may lead to what only the host sees.
        let is_there = |kind: &String| self.bin_dir.join(kind).symlink_metadata().is_ok();
        if types.iter().any(is_there) {
            return Ok(());
        }
        let (path, types, folder) = (path.to_owned(), types.to_vec(), self.bin_dir.clone());
        Err(PluginError::OtherFolder { path, types, folder })
    }

    /// Takes the plugin out of the CNI's own files, as agents of former versions edited them.
    fn leave_others(&self, names: &[String]) -> Result<(), PluginError> {
        for name in names.iter().filter(|name| *name != FILE) {
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
        Ok(())
    }

    /// Keeps the plugin in its place until the agent ends; never returns by itself. `waiting` is done when it is there for
    /// the first time, and the agent is not ready again while it is not: pods would start without it.
    pub async fn keep(self, readiness: Readiness, waiting: Pending) {
        let mut waiting = Some(waiting);
        let changed = Arc::new(Notify::new());
        let mut watched = None;
        let plugin = Arc::new(self);
        let mut last = String::new();
        loop {
            watched = follow(watched, &plugin.conf_dir, &changed);
            let installing = Arc::clone(&plugin);
            // The runtime ends.
            let Ok(done) = tokio::task::spawn_blocking(move || installing.install()).await else { return };
            let said = match &done {
                Ok(installed) => {
                    if let Some(waiting) = waiting.take() {
                        waiting.done();
                    }
                    plugin.tell(installed);
                    let alone = "the node's CNI took its configuration away; the plugin's copy of it stays";
                    if installed.is_alone { alone.to_owned() } else { String::new() }
                }
                Err(error) => {
                    waiting.get_or_insert_with(|| readiness.register(CHAINED));
                    format!("the CNI plugin is not installed; trying again: {error}")
                }
            };
            if said != last && !said.is_empty() {
                tracing::warn!("{said}");
            }
            last = said;
            // What cannot be written, or is fought over with somebody, must not keep the node busy.
            tokio::time::sleep(PAUSE).await;
            // Either way it is time to look again.
            let _ = timeout_at(Instant::now() + POLL, changed.notified()).await;
        }
    }

    fn tell(&self, installed: &Installed) {
        if installed.configuration {
            tracing::info!(configuration = %self.conf_dir.join(FILE).display(), "the CNI plugin is chained");
        }
        if installed.program {
            tracing::info!(folder = %self.bin_dir.display(), "the CNI plugin's program is in place");
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

/// Beside the file, with a name that no runtime takes; always the same, so that a half that a killed agent left is written over.
/// There is one agent on a node at a time.
fn partial(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.culvert-part"))
}

fn create(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(true).write(true).mode(mode).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// The folder that is watched, by device and inode.
struct Watched {
    folder: (u64, u64),
    _watcher: Option<RecommendedWatcher>,
}

/// Watches the folder, anew where another took its place.
fn follow(watched: Option<Watched>, folder: &Path, changed: &Arc<Notify>) -> Option<Watched> {
    let now = fs::metadata(folder).map(|now| (now.dev(), now.ino())).ok()?;
    match watched {
        Some(watched) if watched.folder == now => Some(watched),
        Some(_) | None => Some(Watched { folder: now, _watcher: watch(folder, Arc::clone(changed)) }),
    }
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
            fs::write(bin_dir.join("bridge"), "").unwrap();
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
        node.write("99-other.conflist", &json!({ "cniVersion": "1.0.0", "name": "x", "plugins": [{ "type": "x" }] }));
        let done = node.plugin.install().unwrap();
        assert_eq!(done, Installed { program: true, configuration: true, is_alone: false });
        assert_eq!(node.plugins(FILE), ["bridge", TYPE], "a runtime takes the first");
        assert_eq!(node.plugins("10-net.conflist"), ["bridge"], "what is the CNI's stays so");
        assert_eq!(read(&node.plugin.conf_dir.join(FILE)).unwrap().1, 0o600);
        assert_eq!(node.plugin.install().unwrap(), Installed::default(), "nothing is left to do");
        let program = node.plugin.bin_dir.join(TYPE);
        assert_eq!(fs::read(&program).unwrap(), fs::read("/proc/self/exe").unwrap());
        assert_eq!(fs::metadata(&program).unwrap().mode() & 0o777, 0o755);
        fs::write(&program, "an older one").unwrap();
        assert!(node.plugin.install().unwrap().program, "another version is replaced");
        node.plugin.remove().unwrap();
        assert_eq!(node.plugins("10-net.conflist"), ["bridge"]);
        assert!(!program.exists());
        for (folder, name) in [("bin", format!(".{TYPE}.culvert-part")), ("net.d", format!(".{FILE}.culvert-part"))] {
            fs::write(node.folder.path().join(folder).join(name), "half, of an agent that was killed").unwrap();
            let former = format!(".{TYPE}.culvert-4711");
            fs::write(node.folder.path().join(folder).join(former), "of one of before").unwrap();
        }
        node.plugin.remove().unwrap();
        assert_eq!(fs::read_dir(node.folder.path().join("net.d")).unwrap().count(), 2, "nothing half-written stays");
        node.plugin.remove().unwrap();
    }

    #[test]
    fn multus_is_refused_with_the_way_out() {
        let node = Node::new();
        let delegates = json!([{ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "bridge" }] }]);
        node.write(
            "00-multus.conf",
            &json!({ "cniVersion": "0.3.1", "name": "m", "type": "multus", "delegates": delegates }),
        );
        node.write("10-net.conflist", &network());
        let error = node.plugin.install().unwrap_err();
        assert!(matches!(error, PluginError::Multus(_)) && error.to_string().contains("take Multus off"), "{error}");
        assert!(node.plugins(FILE).is_empty());
        fs::remove_file(node.plugin.conf_dir.join("00-multus.conf")).unwrap();
        node.plugin.install().unwrap();
        assert_eq!(node.plugins(FILE), ["bridge", TYPE]);
    }

    #[test]
    fn copy_follows_the_cni_and_stays_without_it() {
        let node = Node::new();
        node.write("10-net.conf", &json!({ "cniVersion": "0.3.1", "name": "net", "type": "bridge" }));
        node.plugin.install().unwrap();
        assert_eq!(node.plugins(FILE), ["bridge", TYPE], "a single plugin becomes a list");
        let mut other = network();
        other["plugins"].as_array_mut().unwrap().push(json!({ "type": "portmap" }));
        node.write("05-net.conflist", &other);
        assert!(node.plugin.install().unwrap().configuration);
        assert_eq!(node.plugins(FILE), ["bridge", "portmap", TYPE], "another comes first now");
        for name in ["05-net.conflist", "10-net.conf"] {
            fs::remove_file(node.plugin.conf_dir.join(name)).unwrap();
        }
        assert!(node.plugin.install().unwrap().is_alone);
        assert_eq!(node.plugins(FILE), ["bridge", "portmap", TYPE], "pods that start meanwhile do not pass");
    }

    #[test]
    fn files_that_former_agents_edited_are_the_cnis_again() {
        let node = Node::new();
        let mut edited = network();
        edited["plugins"].as_array_mut().unwrap().push(json!({ "type": TYPE, "culvert": {} }));
        node.write("10-net.conflist", &edited);
        let single = json!({ "cniVersion": "0.3.1", "name": "net", "type": "bridge" });
        node.write("20-single.conf.culvert-original", &single);
        node.write("20-single.conflist", &edited);
        node.plugin.install().unwrap();
        assert_eq!(node.plugins(FILE), ["bridge", TYPE]);
        assert_eq!(node.plugins("10-net.conflist"), ["bridge"]);
        let text = fs::read(node.plugin.conf_dir.join("20-single.conf")).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), single);
        assert!(!node.plugin.conf_dir.join("20-single.conflist").exists());
    }

    #[test]
    fn what_the_runtime_would_not_find_is_not_named_to_it() {
        let node = Node::new();
        node.write("10-net.conflist", &network());
        fs::remove_file(node.plugin.bin_dir.join("bridge")).unwrap();
        let error = node.plugin.install().unwrap_err().to_string();
        assert!(error.contains("(bridge)") && error.contains("--cni-bin-dir"), "{error}");
        assert!(!node.plugin.conf_dir.join(FILE).exists());
        fs::write(node.plugin.bin_dir.join("bridge"), "").unwrap();
        node.write("00-a.conflist", &network());
        let error = node.plugin.install().unwrap_err().to_string();
        assert!(error.contains("\"00-a.conflist\"") && !node.plugin.conf_dir.join(FILE).exists(), "{error}");
    }

    #[tokio::test]
    async fn what_others_do_to_it_is_undone_and_the_agent_is_not_ready_without_it() {
        let node = Node::new();
        let readiness = Readiness::new();
        let waiting = readiness.register(CHAINED);
        let keeping = tokio::spawn(node.plugin.clone().keep(readiness.clone(), waiting));
        assert!(!readiness.is_ready(), "pods would start without it");
        let until = async |what: &str, so: &dyn Fn() -> bool| {
            let wait = async {
                while !so() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap_or_else(|_| panic!("{what}"));
        };
        // First the CNI's is not there.
        node.write("10-net.conflist", &network());
        until("chained", &|| node.plugins(FILE) == ["bridge", TYPE] && readiness.is_ready()).await;
        fs::remove_file(node.plugin.conf_dir.join(FILE)).unwrap();
        until("put back", &|| node.plugins(FILE) == ["bridge", TYPE]).await;
        node.write(FILE, &network());
        until("put right", &|| node.plugins(FILE) == ["bridge", TYPE]).await;
        let broken = json!({ "cniVersion": "9.0.0" });
        node.write("10-net.conflist", &broken);
        until("not ready", &|| readiness.pending() == [CHAINED]).await;
        // Another folder in the place of the first.
        fs::rename(&node.plugin.conf_dir, node.folder.path().join("former")).unwrap();
        fs::create_dir(&node.plugin.conf_dir).unwrap();
        node.write("10-net.conflist", &network());
        until("ready again", &|| node.plugins(FILE) == ["bridge", TYPE] && readiness.is_ready()).await;
        fs::remove_file(node.plugin.conf_dir.join(FILE)).unwrap();
        until("put back there", &|| node.plugins(FILE) == ["bridge", TYPE]).await;
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
