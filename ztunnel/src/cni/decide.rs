//! Whether a pod may start, must be enrolled first, or cannot be told: the order of decisions, as a pure function.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The label of a pod or a namespace that asks for the mesh.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Namespace of the mesh's own pods unless the configuration names another.
pub const SYSTEM_NAMESPACE: &str = "culvert-system";
/// The mesh's own DaemonSets, by name, in the system namespace. Their pods must start before there is an agent.
const OWN: [&str; 2] = ["culvert-node", "ztunnel"];

/// What [`DATAPLANE_MODE`] of a pod or a namespace asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// No label.
    #[default]
    Unset,
    /// `ambient`: enrolled.
    Ambient,
    /// `none`: opted out.
    None,
}

/// The label has a value that means nothing; what its author wanted cannot be guessed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("label {DATAPLANE_MODE}={0:?} is not a mode; use \"ambient\" to enrol or \"none\" to opt out")]
pub struct UnknownMode(String);

impl Mode {
    /// Reads the label's value.
    ///
    /// # Errors
    /// When it is neither `ambient` nor `none`.
    pub fn read(value: Option<&str>) -> Result<Self, UnknownMode> {
        match value {
            None => Ok(Self::Unset),
            Some("ambient") => Ok(Self::Ambient),
            Some("none") => Ok(Self::None),
            Some(other) => Err(UnknownMode(other.to_owned())),
        }
    }
}

/// Which pods pass whatever their labels say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Where the mesh's own pods run; empty: nowhere.
    pub system_namespace: String,
    /// Namespaces whose pods always pass.
    pub namespaces: Vec<String>,
}

impl Exclusions {
    /// These namespaces; if none are named, `kube-system` and the mesh's own.
    #[must_use]
    pub fn or_default(system_namespace: String, namespaces: Option<Vec<String>>) -> Self {
        let namespaces = namespaces.unwrap_or_else(|| vec![String::from("kube-system"), system_namespace.clone()]);
        Self { system_namespace, namespaces }
    }
}

/// What a pod's own object says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Its label.
    pub mode: Mode,
    /// It shares the node's network.
    pub host_network: bool,
}

/// What a decision is made from.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The pod's name.
    pub name: &'a str,
    /// Which pods pass unseen.
    pub exclusions: &'a Exclusions,
    /// The pod's object; `None` if it is not known.
    pub pod: Option<PodFacts>,
    /// The namespace's label; `None` if the namespace is not known.
    pub namespace_mode: Option<Mode>,
}

/// What is to be done before a container of the pod starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Pass(Pass),
    /// Enrol it, or do not let it start.
    Enrol(Why),
}

/// Why a pod may start without the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// It is the mesh's own.
    Own,
    /// Its namespace is excluded.
    ExcludedNamespace,
    /// It shares the node's network.
    HostNetwork,
    /// Its own label says `none`.
    OptedOut,
    /// Its namespace's label says `none`, its own nothing.
    NamespaceOptedOut,
    /// Neither it nor its namespace asks for the mesh.
    NotLabelled,
}

/// Why a pod has to be enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Its own label.
    PodLabel,
    /// The label of its namespace.
    NamespaceLabel,
    /// Its object is not known: it may have the label.
    UnknownPod,
    /// It has no label of its own, and its namespace is not known.
    UnknownNamespace,
}

impl Why {
    /// The labels are known and ask for it.
    #[must_use]
    pub const fn is_certain(self) -> bool {
        match self {
            Self::PodLabel | Self::NamespaceLabel => true,
            Self::UnknownPod | Self::UnknownNamespace => false,
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Own => "it is one of the mesh's own pods",
            Self::ExcludedNamespace => "its namespace is excluded",
            Self::HostNetwork => "it shares the node's network",
            Self::OptedOut => "its label opts out",
            Self::NamespaceOptedOut => "its namespace's label opts out",
            Self::NotLabelled => "neither it nor its namespace is labelled",
        })
    }
}

impl fmt::Display for Why {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::PodLabel => "its label asks for the mesh",
            Self::NamespaceLabel => "its namespace's label asks for the mesh",
            Self::UnknownPod => "its labels are not known, so it may be one that has to be enrolled",
            Self::UnknownNamespace => "its namespace's labels are not known, so it may be one that has to be enrolled",
        })
    }
}

/// Decides. What is not known counts as a label that asks for the mesh.
#[must_use]
pub fn decide(facts: &Facts<'_>) -> Decision {
    if is_own(facts) {
        return Decision::Pass(Pass::Own);
    }
    if facts.exclusions.namespaces.iter().any(|excluded| excluded == facts.namespace) {
        return Decision::Pass(Pass::ExcludedNamespace);
    }
    let Some(pod) = facts.pod else { return Decision::Enrol(Why::UnknownPod) };
    if pod.host_network {
        return Decision::Pass(Pass::HostNetwork);
    }
    match (pod.mode, facts.namespace_mode) {
        (Mode::Ambient, _) => Decision::Enrol(Why::PodLabel),
        (Mode::None, _) => Decision::Pass(Pass::OptedOut),
        (Mode::Unset, Some(Mode::Ambient)) => Decision::Enrol(Why::NamespaceLabel),
        (Mode::Unset, Some(Mode::None)) => Decision::Pass(Pass::NamespaceOptedOut),
        (Mode::Unset, Some(Mode::Unset)) => Decision::Pass(Pass::NotLabelled),
        (Mode::Unset, None) => Decision::Enrol(Why::UnknownNamespace),
    }
}

/// Whether a pod passes whatever its labels say.
#[must_use]
pub fn is_excluded(namespace: &str, name: &str, exclusions: &Exclusions) -> bool {
    let facts = Facts { namespace, name, exclusions, pod: None, namespace_mode: None };
    matches!(decide(&facts), Decision::Pass(Pass::Own | Pass::ExcludedNamespace))
}

/// By name: a DaemonSet's pod is called as it, with five characters behind.
fn is_own(facts: &Facts<'_>) -> bool {
    let suffix = |name: &str| facts.name.strip_prefix(name)?.strip_prefix('-');
    let of_daemon_set = |name| {
        suffix(name).is_some_and(|rest| {
            rest.len() == 5 && rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        })
    };
    !facts.exclusions.system_namespace.is_empty()
        && facts.namespace == facts.exclusions.system_namespace
        && OWN.into_iter().any(of_daemon_set)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str = "shop";

    fn exclusions() -> Exclusions {
        Exclusions { system_namespace: SYSTEM_NAMESPACE.into(), namespaces: vec!["kube-system".into()] }
    }

    fn of(namespace: &str, name: &str, pod: Option<(Mode, bool)>, namespace_mode: Option<Mode>) -> Decision {
        let pod = pod.map(|(mode, host_network)| PodFacts { mode, host_network });
        decide(&Facts { namespace, name, exclusions: &exclusions(), pod, namespace_mode })
    }

    #[test]
    fn labels_decide_and_the_pods_own_wins() {
        use Mode::{Ambient, None as Off, Unset};
        let table = [
            (Unset, Some(Unset), Decision::Pass(Pass::NotLabelled)),
            (Unset, Some(Ambient), Decision::Enrol(Why::NamespaceLabel)),
            (Unset, Some(Off), Decision::Pass(Pass::NamespaceOptedOut)),
            (Unset, None, Decision::Enrol(Why::UnknownNamespace)),
            (Ambient, Some(Unset), Decision::Enrol(Why::PodLabel)),
            (Ambient, Some(Ambient), Decision::Enrol(Why::PodLabel)),
            (Ambient, Some(Off), Decision::Enrol(Why::PodLabel)),
            (Ambient, None, Decision::Enrol(Why::PodLabel)),
            (Off, Some(Unset), Decision::Pass(Pass::OptedOut)),
            (Off, Some(Ambient), Decision::Pass(Pass::OptedOut)),
            (Off, Some(Off), Decision::Pass(Pass::OptedOut)),
            (Off, None, Decision::Pass(Pass::OptedOut)),
        ];
        for (pod, namespace, wanted) in table {
            assert_eq!(of(SHOP, "web", Some((pod, false)), namespace), wanted, "{pod:?} {namespace:?}");
            let on_host = of(SHOP, "web", Some((pod, true)), namespace);
            assert_eq!(on_host, Decision::Pass(Pass::HostNetwork), "{pod:?} {namespace:?}");
        }
    }

    #[test]
    fn unknown_pod_is_treated_as_enrolled_whatever_its_namespace_says() {
        for namespace in [None, Some(Mode::Unset), Some(Mode::None), Some(Mode::Ambient)] {
            assert_eq!(of(SHOP, "web", None, namespace), Decision::Enrol(Why::UnknownPod));
        }
    }

    #[test]
    fn own_pods_and_excluded_namespaces_pass_before_labels_are_looked_at() {
        let ambient = Some((Mode::Ambient, false));
        for name in ["ztunnel-x2v9k", "culvert-node-00000"] {
            for pod in [None, ambient] {
                assert_eq!(of(SYSTEM_NAMESPACE, name, pod, None), Decision::Pass(Pass::Own), "{name}");
            }
            assert_eq!(of(SHOP, name, None, None), Decision::Enrol(Why::UnknownPod), "another namespace's {name}");
        }
        for name in ["ztunnel", "ztunnel-", "ztunnel-x2v9", "ztunnel-x2v9kk", "ztunnel-X2v9k", "myztunnel-x2v9k", ""] {
            assert_eq!(of(SYSTEM_NAMESPACE, name, None, None), Decision::Enrol(Why::UnknownPod), "{name}");
        }
        for pod in [None, ambient] {
            assert_eq!(of("kube-system", "dns", pod, None), Decision::Pass(Pass::ExcludedNamespace));
        }
        let nothing = Exclusions::default();
        let facts =
            Facts { namespace: "", name: "ztunnel-x2v9k", exclusions: &nothing, pod: None, namespace_mode: None };
        assert_eq!(decide(&facts), Decision::Enrol(Why::UnknownPod), "no system namespace, no own pods");
    }

    #[test]
    fn label_with_another_value_is_refused() {
        assert_eq!(Mode::read(None), Ok(Mode::Unset));
        assert_eq!(Mode::read(Some("ambient")), Ok(Mode::Ambient));
        assert_eq!(Mode::read(Some("none")), Ok(Mode::None));
        for other in ["", "Ambient", "sidecar", "none "] {
            Mode::read(Some(other)).unwrap_err();
        }
    }
}
