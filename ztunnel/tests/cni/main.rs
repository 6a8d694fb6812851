//! The CNI plugin and the agent as two processes, over real sockets, namespaces and files: pods that start, change their
//! labels, get new sandboxes and end, while the agent comes and goes. Needs root.

#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod rig;

use std::thread;
use std::time::{Duration, Instant};

use rig::{PodNet, Rig};

#[test]
fn labels_are_followed_of_pods_of_which_nothing_is_written_down() {
    let rig = Rig::new();
    rig.namespace("shop", "ambient");
    for (name, uid) in [("web-1", "u1"), ("web-2", "u2")] {
        rig.pod("shop", name, uid, "");
    }
    let agent = rig.agent();
    let (web, other) = (PodNet::new(&rig), PodNet::new(&rig));
    rig.add("shop", "web-1", "u1", "box-1", &web).ok();
    rig.add("shop", "web-2", "u2", "box-2", &other).ok();
    drop(agent);
    // While no agent runs, the word of one is lost, and both opt out.
    rig.lose("u1");
    rig.pod("shop", "web-1", "u1", "none");
    rig.pod("shop", "web-2", "u2", "none");
    let agent = rig.agent();
    web.wait(false, "it opted out, as its object says");
    other.wait(false, "so did the other");
    assert_eq!(rig.captured(), 0);

    // One is captured again, and lost again, when the mesh is taken off.
    rig.pod("shop", "web-2", "u2", "");
    other.wait(true, "its namespace's label counts again");
    drop(agent);
    rig.lose("u2");
    rig.uninstall();
    other.wait(false, "nothing of it is left, file or no file");
}

#[test]
fn labels_decide_and_are_followed_while_the_pod_runs() {
    let rig = Rig::new();
    rig.namespace("shop", "ambient");
    rig.namespace("plain", "");
    rig.pod("shop", "web-1", "u1", "");
    rig.pod("plain", "db-1", "u2", "");
    let agent = rig.agent();
    let (web, db) = (PodNet::new(&rig), PodNet::new(&rig));

    let added = rig.add("shop", "web-1", "u1", "box-1", &web);
    assert_eq!(added.ok(), rig.previous(&web), "the result of the plugins before is passed on");
    assert!(web.is_captured());
    assert_eq!(rig.enrolled(), [(String::from("u1"), String::from("web-1-account"))]);
    rig.check("shop", "web-1", "u1", "box-1", &web).ok();

    rig.add("plain", "db-1", "u2", "box-2", &db).ok();
    assert!(!db.is_captured());
    rig.check("plain", "db-1", "u2", "box-2", &db).ok();

    rig.namespace("plain", "ambient");
    db.wait(true, "its namespace got the label");
    rig.check("plain", "db-1", "u2", "box-2", &db).ok();
    rig.pod("plain", "db-1", "u2", "none");
    db.wait(false, "the pod itself opted out");
    rig.pod("plain", "db-1", "u2", "typo");
    rig.pod("shop", "web-1", "u1", "none");
    web.wait(false, "it opted out");
    assert!(!db.is_captured(), "a label that means nothing changes nothing");

    // What is to be followed survives the agent.
    drop(agent);
    let _agent = rig.agent();
    rig.pod("plain", "db-1", "u2", "ambient");
    db.wait(true, "opted in after the agent was replaced");
    rig.pod("shop", "web-1", "u1", "");
    web.wait(true, "its namespace's label counts again");

    for _ in 0..2 {
        rig.delete("plain", "db-1", "u2", "box-2", &db).ok();
        assert!(!db.is_captured());
    }
    rig.pod("plain", "db-1", "u2", "none");
    rig.pod("plain", "db-1", "u2", "ambient");
    assert_eq!(rig.enrolled().len(), 1);
}

#[test]
fn pod_on_a_kernel_of_its_own_does_not_start_unless_it_opts_out() {
    let rig = Rig::new();
    rig.namespace("shop", "ambient");
    rig.namespace("plain", "");
    let kata = "kata-qemu".into();
    rig.pod_of_class("shop", "web-1", "u1", "", &kata);
    rig.pod_of_class("plain", "db-1", "u2", "", &kata);
    rig.pod_of_class("shop", "db-2", "u3", "none", &kata);
    let _agent = rig.agent();
    let (web, db, out) = (PodNet::new(&rig), PodNet::new(&rig), PodNet::new(&rig));

    let refused = rig.add("shop", "web-1", "u1", "box-1", &web).text();
    assert!(refused.contains("kata-qemu") && refused.contains("dataplane-mode=none"), "{refused}");
    rig.add("shop", "db-2", "u3", "box-3", &out).ok();
    rig.add("plain", "db-1", "u2", "box-2", &db).ok();
    rig.namespace("plain", "ambient");
    rig.wait_for_log("u2", "kernel of its own");
    assert_eq!(rig.enrolled(), []);
    assert!(!db.is_captured() && !web.is_captured());
}

#[test]
fn without_an_agent_only_pods_that_are_known_to_need_none_start() {
    let rig = Rig::new();
    rig.namespace("shop", "ambient");
    rig.namespace("plain", "");
    rig.pod("plain", "db-1", "u2", "");
    rig.pod("shop", "web-1", "u1", "");
    drop(rig.agent_that_knows("plain/db-1"));
    let (web, db, other) = (PodNet::new(&rig), PodNet::new(&rig), PodNet::new(&rig));

    // The plugin that waits for an agent says so after as long as it has.
    let started = Instant::now();
    rig.add_patiently("plain", "db-1", "u2", "box-2", &db).ok();
    assert!(started.elapsed() < rig::PATIENT, "it is not waited for");
    assert_eq!(rig.add("plain", "db-1", "u3", "box-3", &other).code(), 11, "another pod of the same name");
    assert_eq!(rig.add("shop", "web-1", "u1", "box-1", &web).code(), 11);
    rig.add("kube-system", "dns-1", "u9", "box-9", &other).ok();
    rig.delete("shop", "web-1", "u1", "box-1", &web).ok();
    assert_eq!(rig.status().code(), 50);

    // The label comes while nobody looks; the pod that passed meanwhile is enrolled by the next agent.
    rig.namespace("plain", "ambient");
    let waiting = thread::scope(|scope| {
        let waiting = scope.spawn(|| rig.add("shop", "web-1", "u1", "box-1b", &web));
        let _agent = rig.agent();
        db.wait(true, "it passed without an agent, and is labelled");
        let waiting = waiting.join().unwrap();
        rig.status().ok();
        waiting
    });
    waiting.ok();
    assert!(web.is_captured(), "the agent came in time");
}

#[test]
fn pod_that_nobody_knows_is_waited_for_and_never_enrolled_under_a_guess() {
    let rig = Rig::new();
    rig.namespace("shop", "ambient");
    let _agent = rig.agent();
    let web = PodNet::new(&rig);
    let refused = rig.add("shop", "web-1", "u1", "box-1", &web);
    assert_eq!(refused.code(), 11);
    assert!(refused.text().contains("service account"), "{}", refused.text());
    assert!(!web.is_captured());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| rig.add("shop", "web-1", "u1", "box-1", &web));
        rig.pod("shop", "web-1", "u1", "");
        waiting.join().unwrap().ok();
    });
    assert!(web.is_captured());
}

#[test]
fn end_of_a_sandbox_overtakes_its_start() {
    let rig = Rig::new();
    rig.namespace("shop", "ambient");
    let _agent = rig.agent();
    let (web, other) = (PodNet::new(&rig), PodNet::new(&rig));
    let started = thread::scope(|scope| {
        // Asked, and not answered yet: nobody knows the pod.
        let waiting = scope.spawn(|| rig.add("shop", "web-1", "u1", "box-1", &web));
        rig.wait_for_log("box-1", "not admitted");
        rig.delete("shop", "web-1", "u1", "box-1", &web).ok();
        rig.pod("shop", "web-1", "u1", "");
        waiting.join().unwrap()
    });
    assert_eq!(started.code(), 100, "{}", started.text());
    assert!(!web.is_captured());
    rig.add("shop", "web-1", "u1", "box-1", &web).ok();
    assert!(web.is_captured(), "a start that was asked for later counts");

    // A new sandbox of the same pod; the end of the former comes late.
    rig.add("shop", "web-1", "u1", "box-2", &other).ok();
    assert!(other.is_captured() && !web.is_captured());
    rig.delete("shop", "web-1", "u1", "box-1", &web).ok();
    assert!(other.is_captured());
    rig.check("shop", "web-1", "u1", "box-2", &other).ok();
    assert_eq!(rig.check("shop", "web-1", "u1", "box-1", &web).code(), 101);
}

#[test]
fn garbage_collection_gives_up_what_has_ended_and_nothing_that_lives() {
    let rig = Rig::new();
    rig.namespace("shop", "ambient");
    rig.pod("shop", "web-1", "u1", "");
    rig.pod("shop", "web-2", "u2", "");
    rig.pod("shop", "web-3", "u3", "");
    let _agent = rig.agent();
    let (one, two, three) = (PodNet::new(&rig), PodNet::new(&rig), PodNet::new(&rig));
    rig.add("shop", "web-1", "u1", "box-1", &one).ok();
    rig.add("shop", "web-2", "u2", "box-2", &two).ok();
    rig.add("shop", "web-3", "u3", "box-3", &three).ok();
    let _alive = three.process();
    rig.gc(&["box-2"]).ok();
    assert!(!one.is_captured(), "not in the list, and nobody in it");
    assert!(two.is_captured(), "in the list");
    assert!(three.is_captured(), "not in the list, but a process runs in it");
}

#[test]
fn agent_killed_at_any_moment_lets_no_pod_start_uncaptured() {
    let rig = Rig::new();
    rig.namespace("shop", "ambient");
    let mut agent = Some(rig.agent());
    for round in 0..12_u64 {
        let (name, uid, sandbox) = (format!("web-{round}"), format!("u{round}"), format!("box-{round}"));
        let net = PodNet::new(&rig);
        rig.pod("shop", &name, &uid, "");
        let added = thread::scope(|scope| {
            let adding = scope.spawn(|| rig.add_patiently("shop", &name, &uid, &sandbox, &net));
            // From before the question to after the answer.
            thread::sleep(Duration::from_millis(round * 7));
            drop(agent.take());
            agent = Some(rig.agent());
            adding.join().unwrap()
        });
        added.ok();
        assert!(net.is_captured(), "round {round}");
        rig.check("shop", &name, &uid, &sandbox, &net).ok();
        rig.delete("shop", &name, &uid, &sandbox, &net).ok();
        assert!(!net.is_captured(), "round {round}");
    }
}
