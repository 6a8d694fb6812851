//! Tells the Kubernetes API what became of this node's pods: the annotation `ambient.istio.io/redirection: enabled` on
//! those whose capture was checked in the kernel, until they are enrolled no more, and an event where a pod is not as its labels
//! say.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, Pod as ApiPod};
use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::{ENABLED, Kubernetes, REDIRECTION};
use crate::agent::enrolment::{Known, NOBODY, Origin, Problems, Running};
use crate::agent::manager::Manager;
use crate::cni::decide::Decision;
use crate::cni::knowledge::PodName;

/// How often the kernel is asked although nothing is known to have changed.
const ROUND: Duration = Duration::from_secs(5);
/// Shortest time between two looks.
const PAUSE: Duration = Duration::from_millis(50);
/// Longest that one call of the API may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// After how long something is said again that still holds: API servers keep events for an hour (`--event-ttl`).
const REPEAT: Duration = Duration::from_mins(30);
/// Longest text of an event's note, in bytes (events.k8s.io/v1).
const MAX_NOTE: usize = 1000;

/// Name of this component in events.
const COMPONENT: &str = "culvert-node";

/// The task's parts.
pub struct Report {
    /// The API, and which node this is.
    pub kubernetes: Kubernetes,
    /// Which pods run, and which of them are confirmed.
    pub known: watch::Receiver<Arc<Known>>,
    /// Which pods are enrolled.
    pub manager: Manager,
    /// Which pods are not as their labels say, by UID.
    pub problems: watch::Receiver<Problems>,
    /// Told after every change of a pod.
    pub changed: Arc<Notify>,
}

/// What is to be written.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan<'a> {
    /// Pods to be confirmed.
    confirm: Vec<&'a Running>,
    /// Pods whose confirmation does not hold any more.
    revoke: Vec<&'a Running>,
    /// Pods that are not as their labels say, and why.
    complain: Vec<(&'a Running, &'a str)>,
}

impl Report {
    /// Runs until the agent ends.
    pub async fn run(mut self) {
        let reporter =
            Reporter { controller: COMPONENT.into(), instance: Some(format!("{COMPONENT}-{}", self.kubernetes.node)) };
        let recorder = Recorder::new(self.kubernetes.client.clone(), reporter);
        // What was said of whom and when, so that it is said once as long as it can be read.
        let mut said: HashMap<String, (String, Instant)> = HashMap::new();
        loop {
            let Ok(listed) = self.manager.list().await else { return };
            let reasons: BTreeMap<&str, &str> =
                listed.iter().map(|listed| (listed.info.uid.as_str(), listed.reason.as_str())).collect();
            let known = Arc::clone(&self.known.borrow_and_update());
            let problems = self.problems.borrow_and_update().clone();
            if known.origin == Origin::Source {
                let is_wanted = |pod: &Running| {
                    let named = PodName { namespace: &pod.namespace, name: &pod.name, uid: Some(&pod.uid) };
                    matches!(known.knowledge.decide(named, &NOBODY), Decision::Enrol(_))
                };
                let plan = plan(&known.running, &reasons, &problems, is_wanted);
                // What cannot be said of a capture that is gone matters more than what can of one that is there.
                for pod in plan.revoke {
                    self.annotate(pod, Value::Null).await;
                }
                for pod in plan.confirm {
                    self.annotate(pod, Value::String(ENABLED.to_owned())).await;
                }
                said.retain(|uid, _| plan.complain.iter().any(|(pod, _)| pod.uid == *uid));
                for (pod, reason) in plan.complain {
                    let before = said.get(&pod.uid);
                    let is_due = before.is_none_or(|(before, at)| before != reason || at.elapsed() > REPEAT);
                    if is_due && publish(&recorder, pod, reason).await {
                        said.insert(pod.uid.clone(), (reason.to_owned(), Instant::now()));
                    }
                }
            }
            tokio::time::sleep(PAUSE).await;
            let next = async {
                tokio::select! {
                    () = self.changed.notified() => {}
                    Ok(()) = self.known.changed() => {}
                    Ok(()) = self.problems.changed() => {}
                }
            };
            // Either way it is time to look again.
            let _ = timeout_at(Instant::now() + ROUND, next).await;
        }
    }

    /// What fails is tried again in the next round: the pod's object still says otherwise then.
    async fn annotate(&self, pod: &Running, value: Value) {
        let api: Api<ApiPod> = Api::namespaced(self.kubernetes.client.clone(), &pod.namespace);
        let is_confirmed = !value.is_null();
        // With the UID the API refuses it for another pod of the same name.
        let patch = json!({ "metadata": { "uid": pod.uid, "annotations": { REDIRECTION: value } } });
        let patch = Patch::Merge(&patch);
        let parameters = PatchParams::default();
        // Of the status, where the API server takes no change of the pod's specification.
        let patched = timeout(PATIENCE, api.patch_status(&pod.name, &parameters, &patch)).await;
        let (namespace, name) = (&pod.namespace, &pod.name);
        match patched {
            Ok(Ok(_)) => tracing::info!(namespace, name, is_confirmed, "its annotation says whether it is captured"),
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409 | 422) => {}
            Ok(Err(error)) => tracing::warn!(namespace, name, %error, "its annotation cannot be written; trying again"),
            Err(_) => tracing::warn!(namespace, name, "its annotation cannot be written: no answer; trying again"),
        }
    }
}

/// Pure.
fn plan<'a>(
    running: &'a [Running],
    reasons: &BTreeMap<&str, &'a str>,
    problems: &'a Problems,
    is_wanted: impl Fn(&Running) -> bool,
) -> Plan<'a> {
    let mut plan = Plan::default();
    for pod in running {
        let reason = pod.uids.iter().find_map(|uid| reasons.get(uid.as_str()));
        let is_captured = reason.is_some_and(|reason| reason.is_empty());
        if is_captured && !pod.is_confirmed && !pod.ends {
            plan.confirm.push(pod);
        } else if reason.is_none() && pod.is_confirmed && !is_wanted(pod) {
            // Not where something of an enrolled pod is amiss, or it is not known to this agent yet: without the annotation peers
            // would send it plaintext.
            plan.revoke.push(pod);
        }
        let not_wholly = reason.copied().filter(|reason| !reason.is_empty());
        let problem = || pod.uids.iter().find_map(|uid| problems.get(uid)).map(String::as_str);
        if let Some(why) = not_wholly.or_else(problem) {
            plan.complain.push((pod, why));
        }
    }
    plan
}

/// Whether the API took it.
async fn publish(recorder: &Recorder, pod: &Running, reason: &str) -> bool {
    let mut note = format!("not captured by the mesh: {reason}");
    note.truncate(note.floor_char_boundary(MAX_NOTE));
    let regarding = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: Some(pod.name.clone()),
        namespace: Some(pod.namespace.clone()),
        uid: Some(pod.uid.clone()),
        ..ObjectReference::default()
    };
    let owner = pod.owner.as_ref().map(|owner| ObjectReference {
        api_version: Some(owner.api_version.clone()),
        kind: Some(owner.kind.clone()),
        name: Some(owner.name.clone()),
        namespace: Some(pod.namespace.clone()),
        uid: Some(owner.uid.clone()),
        ..ObjectReference::default()
    });
    let event = |secondary| Event {
        type_: EventType::Warning,
        reason: "NotEnrolled".into(),
        note: Some(note.clone()),
        action: "Enrol".into(),
        secondary,
    };
    let on_pod = timeout(PATIENCE, recorder.publish(&event(owner.clone()), &regarding)).await;
    if let (Some(owner), Ok(Ok(()))) = (owner, &on_pod) {
        // Whoever looks at the workload finds it too; the pod's own is the one that counts.
        let _ = timeout(PATIENCE, recorder.publish(&event(Some(regarding)), &owner)).await;
    }
    match on_pod {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            tracing::warn!(namespace = pod.namespace, name = pod.name, %error, "no event can be written; trying again");
            false
        }
        Err(_) => false,
    }
}

impl std::fmt::Debug for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Report").field("kubernetes", &self.kubernetes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, is_confirmed: bool) -> Running {
        Running { uid: uid.into(), uids: vec![uid.into()], is_confirmed, ..Running::default() }
    }

    fn names<'a>(pods: &[&'a Running]) -> Vec<&'a str> {
        pods.iter().map(|pod| pod.uid.as_str()).collect()
    }

    #[test]
    fn annotation_says_what_the_kernel_was_asked() {
        let running = [
            pod("captured", false),
            pod("captured, confirmed", true),
            pod("broken", false),
            pod("broken, confirmed", true),
            pod("not enrolled", false),
            pod("not enrolled, confirmed", true),
            pod("wanted, confirmed", true),
            Running { ends: true, ..pod("captured, ends", false) },
        ];
        let reasons = [
            ("captured", ""),
            ("captured, confirmed", ""),
            ("captured, ends", ""),
            ("broken", "no rule"),
            ("broken, confirmed", "no rule"),
        ];
        let problems = Problems::from([(String::from("not enrolled"), String::from("no namespace"))]);
        let plan = plan(&running, &reasons.into(), &problems, |pod| pod.uid.starts_with("wanted"));
        assert_eq!(names(&plan.confirm), ["captured"]);
        assert_eq!(names(&plan.revoke), ["not enrolled, confirmed"], "peers would send plaintext to the others");
        let complaints: Vec<_> = plan.complain.iter().map(|(pod, why)| (pod.uid.as_str(), *why)).collect();
        assert_eq!(
            complaints,
            [("broken", "no rule"), ("broken, confirmed", "no rule"), ("not enrolled", "no namespace")]
        );
    }

    #[test]
    fn static_pod_is_known_by_its_other_uid() {
        let running = [Running { uids: vec!["mirror".into(), "hash".into()], ..pod("mirror", false) }];
        let problems = Problems::new();
        let plan = plan(&running, &[("hash", "")].into(), &problems, |_| true);
        assert_eq!(names(&plan.confirm), ["mirror"]);
    }
}
