//! What is known of labels: kept by the agent, and left by it on disk for the plugin that finds no agent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::decide::{DATAPLANE_MODE, Decision, Exclusions, Facts, Mode, PodFacts, decide};
use super::files::{self, FileError};

/// Version of the file's layout.
const VERSION: u32 = 1;
/// Largest file: some 100,000 pods.
const MAX_FILE: u64 = 16 << 20;

/// One pod's object, as far as it matters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownPod {
    /// The UIDs by which a runtime may name it: its own and, of a static pod, that of its manifest. None: any.
    pub uids: Vec<String>,
    /// Its label.
    pub mode: Mode,
    /// It shares the node's network.
    pub host_network: bool,
    /// The service account it runs as.
    pub service_account: String,
    /// Its `spec.runtimeClassName`; empty: the node's own runtime.
    #[serde(default)]
    pub runtime_class: String,
}

/// What the names of runtime classes have in them that run pods on a kernel of their own: gVisor's and Kata Containers'.
const FOREIGN_KERNELS: [&str; 3] = ["gvisor", "runsc", "kata"];

/// A pod's connections never reach the kernel of its node, so that nobody can capture them there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "its runtime class {0:?} runs it on a kernel of its own, where connections cannot be captured; take another one \
     (spec.runtimeClassName), or label the pod {DATAPLANE_MODE}=none"
)]
pub struct ForeignKernel(String);

/// Labels of namespaces and pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Knowledge {
    /// Namespaces by name.
    pub namespaces: BTreeMap<String, Mode>,
    /// Pods by namespace, then by name.
    pub pods: BTreeMap<String, BTreeMap<String, KnownPod>>,
}

/// A pod as a runtime names it.
#[derive(Clone, Copy, Debug)]
pub struct PodName<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its UID, if the runtime gave one.
    pub uid: Option<&'a str>,
}

impl Knowledge {
    /// The object of this very pod. One of the same name and another UID is another pod, with labels of its own.
    #[must_use]
    pub fn pod(&self, pod: PodName<'_>) -> Option<&KnownPod> {
        let found = self.pods.get(pod.namespace)?.get(pod.name)?;
        let same = found.uids.is_empty() || pod.uid.is_some_and(|uid| found.uids.iter().any(|known| known == uid));
        same.then_some(found)
    }

    /// What the pod with this UID is called.
    #[must_use]
    pub fn name_of<'a>(&'a self, uid: &'a str) -> Option<PodName<'a>> {
        self.pods.iter().find_map(|(namespace, pods)| {
            let (name, _) = pods.iter().find(|(_, pod)| pod.uids.iter().any(|known| known == uid))?;
            Some(PodName { namespace, name, uid: Some(uid) })
        })
    }

    /// Whether this pod is known to run on a kernel of its own, by the name of its runtime class.
    #[must_use]
    pub fn foreign_kernel(&self, pod: PodName<'_>) -> Option<ForeignKernel> {
        let class = &self.pod(pod)?.runtime_class;
        let lower = class.to_ascii_lowercase();
        FOREIGN_KERNELS.iter().any(|kernel| lower.contains(kernel)).then(|| ForeignKernel(class.clone()))
    }

    /// Decides by what is known.
    #[must_use]
    pub fn decide(&self, pod: PodName<'_>, exclusions: &Exclusions) -> Decision {
        let facts = self.pod(pod).map(|known| PodFacts { mode: known.mode, host_network: known.host_network });
        decide(&Facts {
            namespace: pod.namespace,
            name: pod.name,
            exclusions,
            pod: facts,
            namespace_mode: self.namespaces.get(pod.namespace).copied(),
        })
    }
}

#[derive(Serialize)]
struct Saved<'a> {
    version: u32,
    /// Seconds since 1970.
    written: u64,
    #[serde(flatten)]
    knowledge: &'a Knowledge,
}

#[derive(Deserialize)]
struct Loaded {
    written: u64,
    #[serde(flatten)]
    knowledge: Knowledge,
}

/// Where the knowledge lies in the agent's folder.
#[must_use]
pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("enrolment.json")
}

/// Writes it.
///
/// # Errors
/// When it cannot be written.
pub fn save(path: &Path, knowledge: &Knowledge) -> Result<(), FileError> {
    files::write(path, &Saved { version: VERSION, written: now(), knowledge })
}

/// Reads it, unless it is older than this, or from the future of this clock.
///
/// # Errors
/// When it cannot be read, or nobody but root can be trusted to have written it.
pub fn load(path: &Path, max_age: Duration) -> Result<Option<Knowledge>, FileError> {
    let loaded: Loaded = files::read(path, MAX_FILE, VERSION)?;
    let age = now().checked_sub(loaded.written);
    Ok(age.is_some_and(|age| age <= max_age.as_secs()).then_some(loaded.knowledge))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use serde_json::json;

    use super::super::decide::{Pass, Why};
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn known() -> Knowledge {
        let pod = |uids: &[&str], mode| KnownPod {
            uids: uids.iter().map(|uid| (*uid).to_owned()).collect(),
            mode,
            service_account: "web".into(),
            ..KnownPod::default()
        };
        let pods = [
            (String::from("web-1"), pod(&["u1", "hash"], Mode::Unset)),
            (String::from("web-2"), pod(&[], Mode::Ambient)),
        ];
        Knowledge {
            namespaces: [(String::from("shop"), Mode::Unset)].into(),
            pods: [(String::from("shop"), pods.into())].into(),
        }
    }

    #[test]
    fn pod_of_the_same_name_and_another_uid_is_unknown() {
        let known = known();
        let of = |name, uid| known.decide(PodName { namespace: "shop", name, uid }, &Exclusions::default());
        assert_eq!(of("web-1", Some("u1")), Decision::Pass(Pass::NotLabelled));
        assert_eq!(of("web-1", Some("hash")), Decision::Pass(Pass::NotLabelled), "a static pod's other name");
        assert_eq!(of("web-1", Some("u2")), Decision::Enrol(Why::UnknownPod));
        assert_eq!(of("web-1", None), Decision::Enrol(Why::UnknownPod));
        assert_eq!(of("web-2", Some("any")), Decision::Enrol(Why::PodLabel));
        assert_eq!(of("web-3", Some("u1")), Decision::Enrol(Why::UnknownPod));
    }

    #[test]
    fn pods_on_kernels_of_their_own_are_known_by_their_runtime_class() {
        let of = |class: &str| {
            let pod = KnownPod { runtime_class: class.into(), ..KnownPod::default() };
            let known =
                Knowledge { pods: [("shop".into(), [("web".into(), pod)].into())].into(), ..Knowledge::default() };
            known.foreign_kernel(PodName { namespace: "shop", name: "web", uid: None })
        };
        for class in ["gvisor", "runsc", "kata", "kata-qemu", "kata-mshv-vm-isolation", "my-Kata"] {
            let refused = of(class).unwrap().to_string();
            assert!(refused.contains(class) && refused.contains("istio.io/dataplane-mode=none"), "{refused}");
        }
        for class in ["", "runc", "crun", "nvidia", "wasmtime"] {
            assert_eq!(of(class), None, "{class}");
        }
    }

    #[test]
    fn file_comes_back_as_it_was_written_for_root_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path());
        save(&path, &known()).unwrap();
        assert_eq!(load(&path, DAY).unwrap(), Some(known()));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing half-written stays");
    }

    #[test]
    fn file_that_cannot_be_trusted_or_understood_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path());
        assert!(load(&path, DAY).unwrap_err().is_absence());
        let good = json!({ "version": 1, "written": now(), "namespaces": {}, "pods": {} });
        let write = |text: &str, mode: u32| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            load(&path, DAY)
        };
        assert_eq!(write(&good.to_string(), 0o600).unwrap(), Some(Knowledge::default()));
        assert!(matches!(write(&good.to_string(), 0o620).unwrap_err(), FileError::Unsafe(_)));
        assert!(matches!(write(&good.to_string(), 0o602).unwrap_err(), FileError::Unsafe(_)));
        for text in ["", "{", "null", "[]", "{}", r#"{"version":1}"#, r#"{"version":"1"}"#] {
            assert!(matches!(write(text, 0o600).unwrap_err(), FileError::Content { .. }), "{text}");
        }
        let mut later = good.clone();
        later["version"] = json!(2);
        assert!(matches!(write(&later.to_string(), 0o600).unwrap_err(), FileError::Version { version: 2, .. }));
        let long = format!("{good}{}", " ".repeat(MAX_FILE as usize));
        assert!(matches!(write(&long, 0o600).unwrap_err(), FileError::TooLarge { .. }));
        for written in [now() - 2 * DAY.as_secs(), now() + 1000] {
            let mut other = good.clone();
            other["written"] = json!(written);
            assert_eq!(write(&other.to_string(), 0o600).unwrap(), None, "too old, or not yet written");
        }
        fs::remove_file(&path).unwrap();
        let elsewhere = folder.path().join("elsewhere");
        fs::write(&elsewhere, good.to_string()).unwrap();
        symlink(&elsewhere, &path).unwrap();
        load(&path, DAY).unwrap_err();
    }
}
