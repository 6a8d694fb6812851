use super::conditions::tests::{known, policy};
use super::*;
use crate::api::Kind;

fn written(tasks: &[Task]) -> Vec<(&'static str, String)> {
    let told = |task: &Task| match task {
        Task::Conditions(id, _) => ("conditions", id.to_string()),
        Task::Event(id, _) => ("event", id.to_string()),
    };
    tasks.iter().map(told).collect()
}

fn all_done(done: &mut Done, all: &All, tasks: Vec<Task>) {
    for task in tasks {
        let verdict = all[task.id()].clone();
        done.add(task, &verdict);
    }
}

#[test]
fn each_is_written_once_until_something_else_is_to_be_said() {
    let namespace = |mode: &str| {
        json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "ns", "resourceVersion": "5", "labels": {"istio.io/dataplane-mode": mode}},
        })
    };
    let bad = policy("AuthorizationPolicy", json!({"action": "X"}));
    let all = known(&[bad.clone(), policy("PeerAuthentication", json!({})), namespace("sideways")]);
    let mut done = Done::default();
    let tasks = done.tasks(&all, &Told::default());
    let (policy_name, authentication) = ("AuthorizationPolicy ns/p".to_owned(), "PeerAuthentication ns/p".to_owned());
    assert_eq!(
        written(&tasks),
        [
            ("event", "Namespace ns".to_owned()),
            ("conditions", policy_name.clone()),
            ("event", policy_name.clone()),
            ("conditions", authentication),
        ]
    );
    // The objects do not say it yet, or never will.
    all_done(&mut done, &all, tasks);
    assert_eq!(done.tasks(&all, &Told::default()), []);

    // A newer version does not say it either: another's word, perhaps. Its author was told already.
    let mut newer = bad.clone();
    newer["metadata"]["resourceVersion"] = json!("8");
    let all = known(&[newer, policy("PeerAuthentication", json!({})), namespace("sideways")]);
    assert_eq!(written(&done.tasks(&all, &Told::default())), [("conditions", policy_name.clone())]);
    // Mended, and broken again.
    let all = known(&[policy("AuthorizationPolicy", json!({})), policy("PeerAuthentication", json!({}))]);
    let tasks = done.tasks(&all, &Told::default());
    assert_eq!(written(&tasks), [("conditions", policy_name.clone())]);
    all_done(&mut done, &all, tasks);
    let all = known(&[bad, policy("PeerAuthentication", json!({})), namespace("sideways")]);
    let tasks = done.tasks(&all, &Told::default());
    assert_eq!(
        written(&tasks),
        [("event", "Namespace ns".to_owned()), ("conditions", policy_name.clone()), ("event", policy_name)]
    );
    // What cannot be written holds up nothing else.
    done.failed.insert(tasks[1].id().clone(), Instant::now() + RETRY);
    assert_eq!(written(&done.tasks(&all, &Told::default())), [("event", "Namespace ns".to_owned())]);
}

#[test]
fn a_new_leader_does_not_tell_again_what_a_status_says() {
    let mut bad = policy("AuthorizationPolicy", json!({"action": "X"}));
    let all = known(&[bad.clone()]);
    let Some(Task::Conditions(_, conditions)) = Done::default().tasks(&all, &Told::default()).into_iter().next() else {
        panic!("nothing to say")
    };
    bad["status"]["conditions"] = Value::Array(conditions);
    assert_eq!(Done::default().tasks(&known(&[bad]), &Told::default()), []);
}

#[test]
fn no_more_is_written_at_once_than_may_be() {
    let mut all = All::new();
    for at in 0..2 * BURST {
        let mut bad = policy("AuthorizationPolicy", json!({"action": "X"}));
        bad["metadata"]["name"] = json!(format!("p{at}"));
        all.append(&mut known(&[bad]));
    }
    let mut done = Done::default();
    for _ in 0..4 {
        let tasks = done.tasks(&all, &Told::default());
        assert!((BURST as usize..=BURST as usize + 1).contains(&tasks.len()), "{}", tasks.len());
        all_done(&mut done, &all, tasks);
    }
    assert_eq!(done.tasks(&all, &Told::default()), []);
    // Those that come first change all the time: the others have their turn all the same.
    let mut done = Done::default();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..6 {
        for task in done.tasks(&all, &Told::default()) {
            seen.insert(task.id().clone());
        }
    }
    assert_eq!(seen.len(), all.len());
    assert_eq!(Kind::AuthorizationPolicy.version(), version("security.istio.io/v1"));
    assert_eq!(version("v1"), "v1");
}
