//! Pods that are gone and that nobody withdrew, and pods that take their time to leave.

use std::thread;

use super::adoption::stranded;
use super::*;

/// A pod with a path, of which a proxy holds sockets: they keep its namespace alive. The agent is ended.
fn named_and_served(scratch: &Scratch, a: &TestPod) -> (PathBuf, Vec<OwnedFd>) {
    let path = scratch.name(a, "cni-a");
    let agent = Agent::start(scratch);
    agent.announcer().enrol(UID, a, path.to_str().unwrap()).unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    (path, listeners)
}

#[test]
fn pod_whose_path_was_removed_while_no_agent_ran_is_gone_though_sockets_keep_its_namespace() {
    let scratch = Scratch::new();
    let (a, _b) = pair();
    let (path, listeners) = named_and_served(&scratch, &a);
    unname(&path);
    let agent = Agent::start(&scratch);
    assert_eq!(agent.announcer().list(), []);
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
    assert!(agent.host.capture.held().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(agent.run.join("pods")).unwrap().count(), 0);
    // The proxy lets go of it: it is not among what it is told.
    let kept = listeners.iter().map(|socket| socket.try_clone().unwrap()).collect();
    agent.proxy(vec![(UID, kept)]).snapshot();
}

#[test]
fn pod_whose_path_was_removed_is_adopted_while_a_process_lives_in_it_and_goes_with_that() {
    let scratch = Scratch::new();
    let (a, _b) = pair();
    let (path, listeners) = named_and_served(&scratch, &a);
    let inside = process_in(&a);
    unname(&path);
    // Twice: an agent that never saw the namespace at its path hands on what it knows of it.
    for _ in 0..2 {
        let agent = Agent::start(&scratch);
        let reason = agent.announcer().list().remove(0).1;
        assert!(reason.contains("has not returned"), "adopted: {reason}");
    }
    let agent = Agent::start(&scratch);
    drop(inside);
    eventually(|| agent.announcer().list().is_empty().then_some(())).expect("withdrawn");
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
    drop(listeners);
}

#[test]
fn absence_of_a_path_says_nothing_where_the_folder_is_not_the_one_it_was_in() {
    let scratch = Scratch::new();
    let (a, _b) = pair();
    let (path, listeners) = named_and_served(&scratch, &a);
    let (folder, elsewhere) = (path.parent().unwrap(), scratch.path("elsewhere"));
    let stranded = || {
        let agent = Agent::start(&scratch);
        let reason = agent.announcer().list().remove(0).1;
        assert!(reason.contains("not found"), "{reason}");
        assert_eq!(agent.host.capture.cookies().unwrap(), [a.netns.cookie()]);
    };
    unname(&path);
    std::fs::rename(folder, &elsewhere).unwrap();
    stranded();
    std::fs::create_dir(folder).unwrap();
    stranded();
    // What stands at the path may be a name of the namespace that this agent cannot look through.
    std::fs::remove_dir(folder).unwrap();
    std::fs::rename(&elsewhere, folder).unwrap();
    std::fs::write(&path, "").unwrap();
    stranded();
    // A former version did not write down which folder it was.
    std::fs::remove_file(&path).unwrap();
    let file = std::fs::read_dir(scratch.path("run/pods")).unwrap().next().unwrap().unwrap().path();
    let with = std::fs::read_to_string(&file).unwrap();
    let mut without: serde_json::Value = serde_json::from_str(&with).unwrap();
    without.as_object_mut().unwrap().remove("netns_folder").unwrap();
    std::fs::write(&file, without.to_string()).unwrap();
    stranded();
    std::fs::write(&file, with).unwrap();
    assert_eq!(Agent::start(&scratch).announcer().list(), []);
    drop(listeners);
}

#[test]
fn pod_that_a_list_does_not_show_any_more_is_gone_when_nothing_of_it_runs() {
    let scratch = Scratch::new();
    let (a, _b) = pair();
    // Without a path: nothing else tells of its end.
    let (agent, listeners) = stranded(&scratch, &a);
    let announcer = agent.announcer();
    agent.listed(&["another", UID]);
    assert_eq!(announcer.list().len(), 1);
    let inside = process_in(&a);
    agent.listed(&["another"]);
    assert_eq!(announcer.list().len(), 1, "deleted by force it may run on");
    drop(inside);
    let gone = || {
        agent.listed(&["another"]);
        announcer.list().is_empty().then_some(())
    };
    eventually(gone).expect("withdrawn");
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
    drop(listeners);
}

#[test]
fn pod_that_starts_is_not_gone_because_a_list_does_not_show_it_yet() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    let agent = Agent::start(&scratch);
    let announcer = agent.announcer();
    let path = scratch.name(&b, "cni-b");
    announcer.enrol(UID, &a, "").unwrap();
    announcer.enrol_in("sandbox-b", &b, path.to_str().unwrap(), "sandbox-b").unwrap();
    let uids = || announcer.list().into_iter().map(|(uid, _)| uid).collect::<std::collections::BTreeSet<_>>();
    let both = [UID.to_owned(), String::from("sandbox-b")].into();
    agent.listed(&[]);
    assert_eq!(uids(), both);
    agent.listed(&[UID]);
    agent.listed(&[]);
    eventually(|| (!uids().contains(UID)).then_some(())).expect("withdrawn");
    // A runtime that gives no UID: no list ever shows it.
    agent.listed(&["sandbox-b"]);
    agent.listed(&[]);
    assert!(uids().contains("sandbox-b"));
    announcer.withdraw("sandbox-b").unwrap();
    // The path is there: its runtime has not given it up.
    announcer.enrol("uid-b", &b, path.to_str().unwrap()).unwrap();
    agent.listed(&["uid-b"]);
    agent.listed(&[]);
    assert!(uids().contains("uid-b"));
}

#[test]
fn pod_that_takes_its_time_to_leave_holds_up_no_other() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    let agent = Agent::start(&scratch);
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    drop(proxy.added());
    proxy.snapshot();
    thread::scope(|scope| {
        let first = scope.spawn(|| agent.announcer().withdraw(UID));
        assert!(matches!(proxy.hear().0, agent_message::Kind::PodRemoved(removed) if removed.pod_uid == UID));
        // The proxy does not acknowledge it. Were the others held up, it would be cut off before it hears of them.
        assert_eq!(agent.announcer().list(), [(UID.into(), "it is being withdrawn".into())]);
        agent.announcer().admit("uid-b", &b, "sandbox-b").unwrap();
        assert!(matches!(proxy.hear().0, agent_message::Kind::PodAdded(_)));
        let second = scope.spawn(|| agent.announcer().withdraw("uid-b"));
        assert!(matches!(proxy.hear().0, agent_message::Kind::PodRemoved(removed) if removed.pod_uid == "uid-b"));
        [UID, "uid-b", "uid-b"].into_iter().for_each(|uid| proxy.ack(uid));
        first.join().unwrap().unwrap();
        second.join().unwrap().unwrap();
    });
    assert_eq!(agent.announcer().list(), []);
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
    assert!(unprepared(&a));
}

#[test]
fn what_is_asked_of_a_pod_that_leaves_waits_until_it_has_left() {
    let scratch = Scratch::new();
    let (a, _b) = pair();
    let agent = Agent::start(&scratch);
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    drop(proxy.added());
    proxy.snapshot();
    // Under another UID too: what is taken down in its namespace must not be the other's.
    for (leaving, coming) in [(UID, UID), (UID, "uid-x"), ("uid-x", UID)] {
        thread::scope(|scope| {
            let withdrawn = scope.spawn(|| agent.announcer().withdraw(leaving));
            assert!(matches!(proxy.hear().0, agent_message::Kind::PodRemoved(removed) if removed.pod_uid == leaving));
            let enrolled = scope.spawn(|| agent.announcer().admit(coming, &a, "sandbox-a"));
            proxy.ack(leaving);
            let (added, listeners) = proxy.added();
            assert_eq!(added, coming);
            withdrawn.join().unwrap().unwrap();
            enrolled.join().unwrap().unwrap();
            assert_eq!(agent.announcer().list(), [(coming.into(), String::new())]);
            connect(&a, at(B, PORT)).unwrap();
            assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
        });
    }
}

#[test]
fn what_a_proxy_has_not_closed_of_a_pod_is_ended_without_it_and_nothing_else() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    let application = listen(&b, PORT);
    // Older than the enrolment, and none of the proxy's.
    let mut own = connect(&a, at(B, PORT)).unwrap();
    let (mut own_peer, _) = application.accept().unwrap();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();

    let mut sockets = proxy.sockets(UID, SocketKind::UpstreamV4, 3).unwrap().into_iter();
    let mut out_of = || {
        let socket = Socket::from(sockets.next().unwrap());
        socket.set_nonblocking(false).unwrap();
        socket.connect_timeout(&at(B, PORT).into(), PATIENCE).unwrap();
        (socket, application.accept().unwrap().0)
    };
    let (held, upstream) = out_of();
    // Closed in order: its last bytes are the kernel's.
    let (finished, mut finishing) = out_of();
    (&finished).write_all(b"the last").unwrap();
    drop(finished);
    let hbone = connect(&b, at(A, 15008)).unwrap();
    let taken = TcpListener::from(listeners[2].try_clone().unwrap());
    let taken = eventually(|| taken.accept().ok()).unwrap();
    let plaintext = connect(&b, at(A, PORT)).unwrap();
    let waiting = connect(&b, at(A, 15008)).unwrap();

    let withdrawing = std::thread::spawn(move || announcer.withdraw(UID));
    assert!(matches!(proxy.hear().0, agent_message::Kind::PodRemoved(_)));
    // What it says is not so.
    proxy.ack(UID);
    withdrawing.join().unwrap().unwrap();
    for mut peer in [upstream, hbone, plaintext, waiting] {
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
    (&held).write_all(b"more").unwrap_err();
    let mut last = String::new();
    finishing.read_to_string(&mut last).unwrap();
    assert_eq!(last, "the last");
    own.write_all(b"x").unwrap();
    own_peer.read_exact(&mut [0]).unwrap();
    drop((taken, listeners));
}
