//! Whether each pod is where its labels say. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use super::error::AskError;
use super::facts::{AgentPod, Asked, Facts, MODE, Pod};

/// Where a pod stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capture {
    /// Its labels do not ask for the mesh, or it never is in it.
    Outside(Outside),
    /// The kernel says that it is captured.
    Captured,
    /// Its network is not made yet.
    Starting,
    /// It is to be captured, and is not.
    NotCaptured(String),
    /// Its node's agent cannot be asked.
    Unknown(String),
}

/// Why a pod is not in the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    /// It has ended, or is being deleted.
    Over,
    /// Its namespace is excluded.
    ExcludedNamespace,
    /// It shares the node's network.
    HostNetwork,
    /// A label says `none`.
    OptedOut,
    /// No label asks for the mesh.
    NotLabelled,
}

impl Capture {
    /// The word for it in JSON and tables.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Outside(_) => "outside",
            Self::Captured => "captured",
            Self::Starting => "starting",
            Self::NotCaptured(_) => "not captured",
            Self::Unknown(_) => "unknown",
        }
    }
}

/// A pod that its labels put into the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Enrolled {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node; empty until it is scheduled.
    pub node: String,
    /// `captured`, `not captured`, `starting`, or `unknown` where its node's agent cannot be asked.
    pub state: &'static str,
    /// Why it is not captured, or not known to be; none if it is.
    pub reason: Option<String>,
    /// Why it is captured less firmly than others are; none if it is not.
    pub weaker: Option<String>,
    /// Its annotation `ambient.istio.io/redirection` says that it is captured.
    pub annotated: bool,
}

/// Every pod that its labels put into the mesh, in the order of the pods.
pub fn enrolled(facts: &Facts) -> Vec<Enrolled> {
    let agents = answers(facts);
    let weaker = |pod: &Pod| {
        let agent = agents.get(pod.node.as_str())?.as_ref().ok()?;
        let listed = pod.uids.iter().find_map(|uid| agent.get(uid.as_str()))?;
        (!listed.weaker.is_empty()).then(|| listed.weaker.clone())
    };
    let judged = facts.pods.iter().map(|pod| (pod, judge(facts, &agents, pod)));
    judged
        .filter(|(_, capture)| !matches!(capture, Capture::Outside(_)))
        .map(|(pod, capture)| Enrolled {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            node: pod.node.clone(),
            state: capture.as_str(),
            annotated: pod.annotated,
            weaker: weaker(pod).filter(|_| capture == Capture::Captured),
            reason: match capture {
                Capture::NotCaptured(why) | Capture::Unknown(why) => Some(why),
                Capture::Outside(_) | Capture::Captured | Capture::Starting => None,
            },
        })
        .collect()
}

/// What the agents said, by node, and of each by UID.
type Answers<'f> = BTreeMap<&'f str, Result<BTreeMap<&'f str, &'f AgentPod>, &'f AskError>>;

fn answers(facts: &Facts) -> Answers<'_> {
    let mut answers = Answers::new();
    for Asked { part, answer } in &facts.agents {
        let answer = answer.as_ref().map(|pods| pods.iter().map(|pod| (pod.uid.as_str(), pod)).collect());
        // While one replaces another, the one that answers counts.
        match answers.get(part.node.as_str()) {
            Some(Ok(_)) => {}
            _ => drop(answers.insert(&part.node, answer)),
        }
    }
    answers
}

fn judge(facts: &Facts, agents: &Answers<'_>, pod: &Pod) -> Capture {
    let doubt = match wanted(facts, pod) {
        Ok(None) => None,
        Ok(Some(outside)) => return Capture::Outside(outside),
        // What was its last good label, the agent alone knows.
        Err(why) => Some(why),
    };
    let said = || pod.uids.iter().find_map(|uid| facts.complaints.get(uid)).cloned();
    let refused = || pod.uids.iter().find_map(|uid| facts.refused_starts.get(uid));
    let agent = match agents.get(pod.node.as_str()) {
        Some(Ok(agent)) => agent,
        _ if pod.node.is_empty() => return Capture::Starting,
        Some(Err(AskError::Forbidden { .. })) => {
            return Capture::Unknown("this user may not ask its node's agent".to_owned());
        }
        Some(Err(_)) | None => {
            let annotated = if pod.annotated { "; its annotation says that it was captured" } else { "" };
            let why = said().map(|said| format!("; it said last: {said}")).unwrap_or_default();
            let refused = refused().filter(|_| !pod.has_address);
            let why = refused.map_or(why, |refused| format!("; it is not started: {refused}"));
            return Capture::Unknown(format!("its node's agent does not answer{annotated}{why}"));
        }
    };
    match pod.uids.iter().find_map(|uid| agent.get(uid.as_str())) {
        Some(listed) if listed.enrolled => Capture::Captured,
        Some(listed) => Capture::NotCaptured(doubt.unwrap_or_else(|| listed.reason.clone())),
        None => match doubt.or_else(said) {
            Some(why) => Capture::NotCaptured(why),
            None if !pod.has_address => match refused() {
                Some(why) => Capture::NotCaptured(format!("it is not started, and tried again: {why}")),
                None => Capture::Starting,
            },
            None => Capture::NotCaptured(unknown_to_agent(pod)),
        },
    }
}

fn unknown_to_agent(pod: &Pod) -> String {
    match &pod.runtime_class {
        Some(class) => {
            format!("its node's agent does not know it; its runtime class {class} may have a kernel of its own")
        }
        None => "its node's agent does not know it (yet)".to_owned(),
    }
}

/// Whether the labels ask for the mesh: none if they do, or why not.
fn wanted(facts: &Facts, pod: &Pod) -> Result<Option<Outside>, String> {
    if pod.ends || matches!(pod.phase.as_str(), "Succeeded" | "Failed") {
        return Ok(Some(Outside::Over));
    }
    if pod.namespace == facts.system_namespace || pod.namespace == "kube-system" {
        return Ok(Some(Outside::ExcludedNamespace));
    }
    if pod.host_network {
        return Ok(Some(Outside::HostNetwork));
    }
    let namespace = facts.namespaces.get(&pod.namespace).and_then(Option::as_deref);
    match (pod.mode.as_deref(), namespace) {
        (Some("ambient"), _) | (None, Some("ambient")) => Ok(None),
        (Some("none"), _) | (None, Some("none")) => Ok(Some(Outside::OptedOut)),
        (None, None) => Ok(Some(Outside::NotLabelled)),
        (Some(other), _) => Err(unknown_mode("its", other)),
        (None, Some(other)) => Err(unknown_mode("its namespace's", other)),
    }
}

fn unknown_mode(whose: &str, mode: &str) -> String {
    format!("{whose} label {MODE}={mode:?} is not a mode; use \"ambient\" to enrol or \"none\" to opt out")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::testing::healthy;

    /// What becomes of the pod `web` on node `a` in the healthy mesh after this change.
    fn after(change: impl FnOnce(&mut Facts)) -> Capture {
        let mut facts = healthy();
        change(&mut facts);
        judge(&facts, &answers(&facts), &facts.pods[0])
    }

    #[test]
    fn labels_decide_who_is_in_the_mesh() {
        let outside = |change: fn(&mut Facts)| match after(change) {
            Capture::Outside(outside) => outside,
            other => panic!("{other:?}"),
        };
        assert_eq!(outside(|facts| facts.pods[0].mode = Some("none".into())), Outside::OptedOut);
        assert_eq!(outside(|facts| facts.pods[0].host_network = true), Outside::HostNetwork);
        assert_eq!(outside(|facts| facts.pods[0].ends = true), Outside::Over);
        assert_eq!(outside(|facts| facts.pods[0].phase = "Succeeded".into()), Outside::Over);
        assert_eq!(outside(|facts| facts.pods[0].namespace = "kube-system".into()), Outside::ExcludedNamespace);
        assert_eq!(outside(|facts| facts.pods[0].namespace = "default".into()), Outside::NotLabelled);
        let own = |facts: &mut Facts| {
            facts.namespaces.clear();
            facts.pods[0].mode = Some("ambient".into());
        };
        assert_eq!(after(own), Capture::Captured);
        let wrong = |facts: &mut Facts| facts.pods[0].mode = Some("ambien".into());
        assert_eq!(after(wrong), Capture::Captured, "the agent takes it for one that asks for the mesh");
        let passed = after(|facts| {
            wrong(facts);
            facts.agents[0].answer = Ok(Vec::new());
        });
        assert!(matches!(&passed, Capture::NotCaptured(why) if why.contains("\"ambien\"")), "{passed:?}");
    }

    #[test]
    fn the_kernel_decides_who_is_captured_and_the_agent_says_why_not() {
        assert_eq!(after(|_| {}), Capture::Captured);
        let refused = |facts: &mut Facts| {
            facts.agents[0].answer.as_mut().unwrap()[0].enrolled = false;
            facts.agents[0].answer.as_mut().unwrap()[0].reason = "no rule".into();
        };
        assert_eq!(after(refused), Capture::NotCaptured("no rule".into()), "whatever its annotation says");
        let forgotten = |facts: &mut Facts| facts.agents[0].answer = Ok(Vec::new());
        assert!(matches!(after(forgotten), Capture::NotCaptured(_)));
        let complained = |facts: &mut Facts| {
            facts.agents[0].answer = Ok(Vec::new());
            facts.complaints.insert("uid-web".into(), "a foreign program".into());
        };
        assert_eq!(after(complained), Capture::NotCaptured("a foreign program".into()));
        let early = |facts: &mut Facts| {
            facts.agents[0].answer = Ok(Vec::new());
            facts.pods[0].has_address = false;
        };
        assert_eq!(after(early), Capture::Starting);
        let refused = after(|facts| {
            early(facts);
            facts.refused_starts.insert("uid-web".into(), "a kernel of its own".into());
        });
        assert!(matches!(&refused, Capture::NotCaptured(why) if why.ends_with("a kernel of its own")), "{refused:?}");
        let static_pod = |facts: &mut Facts| facts.pods[0].uids = vec!["mirror".into(), "uid-web".into()];
        assert_eq!(after(static_pod), Capture::Captured);
    }

    #[test]
    fn an_agent_that_does_not_answer_proves_nothing() {
        let silent = |facts: &mut Facts| facts.agents[0].answer = Err(AskError::NotRunning("gone".into()));
        assert!(matches!(after(silent), Capture::Unknown(why) if why.contains("annotation")));
        assert!(matches!(after(|facts| drop(facts.agents.remove(0))), Capture::Unknown(_)));
        assert_eq!(after(|facts| facts.pods[0].node.clear()), Capture::Starting);
    }
}
