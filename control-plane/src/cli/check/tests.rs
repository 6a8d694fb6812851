use super::*;
use crate::cli::facts::{Certificate, Client, ClientType, Nack, Root};
use crate::cli::testing::healthy;

fn around() -> Surroundings {
    Surroundings {
        rights: [("create DaemonSets".to_owned(), Ok(true))].into(),
        pod_security: Some(Some("privileged".into())),
        own_webhooks: REGISTRATIONS.map(|(name, ..)| (name, true)).into(),
        workloads: vec!["kube-system/kindnet".into()],
        ..Surroundings::default()
    }
}

/// The one line that is not good after a change.
fn only(after: bool, change: impl FnOnce(&mut Facts, &mut Surroundings)) -> Line {
    let (mut facts, mut around) = (facts(), around());
    change(&mut facts, &mut around);
    let check = Check::new(&facts, &around, after);
    let mut wrong: Vec<Line> = check.lines.iter().filter(|line| line.verdict != Verdict::Good).cloned().collect();
    assert_eq!(wrong.len(), 1, "{check:#?}");
    let line = wrong.remove(0);
    assert!(line.remedy.is_some(), "{line:?}");
    assert_eq!(check.healthy, line.verdict == Verdict::Doubtful);
    line
}

fn facts() -> Facts {
    let mut facts = healthy();
    facts.desired.insert(Component::Culvertd, Some(1));
    facts
}

#[test]
fn all_is_well() {
    for after in [false, true] {
        let check = Check::new(&facts(), &around(), after);
        assert!(check.healthy && check.lines.iter().all(|line| line.verdict == Verdict::Good), "{check:#?}");
    }
    let text = Check::new(&facts(), &around(), true).text(Style::default());
    assert!(text.contains("\u{2713} Linux 6.1 or newer on 2 nodes\n") && text.ends_with("All is well.\n"), "{text}");
}

#[test]
fn what_is_missing_before_the_mesh_is_named() {
    let old = only(false, |facts, _| facts.nodes[1].kernel = "5.15.0-100-generic".into());
    assert!(old.verdict == Verdict::Failed && old.what.contains("b (5.15.0-100-generic)"), "{old:?}");
    assert_eq!(only(false, |facts, _| facts.nodes[1].kernel = "?".into()).verdict, Verdict::Failed);
    assert_eq!(only(false, |facts, _| facts.kubernetes = "v1.30.1".into()).verdict, Verdict::Doubtful);
    let right = only(false, |_, around| drop(around.rights.insert("create CRDs".into(), Ok(false))));
    assert!(right.verdict == Verdict::Failed && right.what.contains("create CRDs"), "{right:?}");
    let unknown = only(false, |_, around| drop(around.rights.insert("create CRDs".into(), Err("no answer".into()))));
    assert_eq!(unknown.verdict, Verdict::Doubtful);
    let grant = only(false, |_, around| drop(around.grants.insert("escalate roles".into(), Ok(false))));
    assert!(grant.verdict == Verdict::Doubtful && grant.what.contains("may not escalate roles"), "{grant:?}");
    let programs = only(false, |_, around| around.programs.push("kube-system/tetragon".into()));
    assert!(programs.verdict == Verdict::Doubtful && programs.what.contains("kube-system/tetragon"), "{programs:?}");
    let mesh = only(false, |_, around| around.workloads.push("istio-system/istiod".into()));
    assert!(mesh.what.contains("istio-system/istiod"), "{mesh:?}");
    let cilium = only(false, |_, around| around.workloads = vec!["kube-system/cilium".into()]);
    let settings = ["socketLB.hostNamespaceOnly=true", "cni.exclusive=false"];
    assert!(cilium.remedy.is_some_and(|remedy| settings.iter().all(|setting| remedy.contains(setting))));
    let level = only(false, |_, around| around.pod_security = Some(Some("restricted".into())));
    assert_eq!(level.verdict, Verdict::Failed);
    let unasked = only(false, |_, around| drop(around.unknown.insert(WEBHOOKS, "forbidden".into())));
    assert_eq!(unasked.verdict, Verdict::Doubtful);
}

#[test]
fn what_could_not_be_asked_is_neither_there_nor_missing() {
    let all = [DAEMONSETS, DEPLOYMENTS, WEBHOOKS, OWN_WEBHOOK, OWN_NAMESPACE];
    let around =
        Surroundings { unknown: all.map(|what| (what, "forbidden".to_owned())).into(), ..Surroundings::default() };
    let check = Check::new(&facts(), &around, true);
    assert!(check.healthy, "{check:#?}");
    let text = check.text(Style::default());
    assert!(all.iter().all(|what| text.contains(&format!("! {what} could not be asked for: forbidden"))), "{text}");
    for claim in ["no other mesh", "there is no namespace", "not registered", "none that is known"] {
        assert!(!text.contains(claim), "{claim}: {text}");
    }
}

#[test]
fn what_the_mesh_does_not_hold_is_named() {
    let silent = only(true, |facts, _| facts.proxies[0].answer = Err(AskError::NotRunning("gone".into())));
    assert!(silent.what == "ztunnel: 1 of 2 ready" && silent.remedy.is_some_and(|why| why.contains("gone")));
    let missing = only(true, |facts, _| drop(facts.proxies.remove(0)));
    assert_eq!(missing.verdict, Verdict::Failed);
    let skew = only(true, |facts, _| facts.proxies[0].answer.as_mut().unwrap().version = "0.0.9".into());
    assert!(skew.verdict == Verdict::Doubtful && skew.what.contains("0.0.9: proxy-a"), "{skew:?}");
    let late = only(true, |facts, _| facts.pods[0].annotated = false);
    assert!(late.verdict == Verdict::Doubtful && late.what.contains("shop/web"), "{late:?}");
    let weaker = only(true, |facts, _| facts.agents[0].answer.as_mut().unwrap()[0].weaker = "no guard".into());
    assert!(weaker.verdict == Verdict::Doubtful && weaker.what.ends_with("than others: no guard"), "{weaker:?}");
    for (name, what, file) in REGISTRATIONS {
        let hook = only(true, |_, around| around.own_webhooks.extend([(name, false)]));
        assert!(hook.verdict == Verdict::Failed && hook.what.contains(what), "{hook:?}");
        let hook = only(true, |_, around| around.own_webhooks.retain(|known, _| *known != name));
        assert!(hook.verdict == Verdict::Doubtful && hook.remedy.is_some_and(|remedy| remedy.contains(file)));
    }
    let strange = only(true, |facts, _| {
        facts.roots = Some(Ok(vec![Root { fingerprint: "aa".into(), ..Root::default() }]));
        let under = |roots: &[&str]| Certificate {
            state: "Valid".into(),
            roots: Some(roots.iter().map(|&root| root.to_owned()).collect()),
            ..Certificate::default()
        };
        // While a root is replaced there are two, and one of them suffices.
        facts.proxies[0].answer.as_mut().unwrap().certificates = vec![under(&["aa", "bb"])];
        facts.proxies[1].answer.as_mut().unwrap().certificates = vec![under(&["bb"])];
    });
    assert!(strange.verdict == Verdict::Failed && strange.what.ends_with("on b"), "{strange:?}");
}

#[test]
fn a_pod_that_is_not_captured_fails_the_check_although_its_annotation_says_so() {
    let mut facts = facts();
    let pod = &mut facts.agents[0].answer.as_mut().unwrap()[0];
    (pod.enrolled, pod.reason) = (false, "no rule".into());
    let check = Check::new(&facts, &around(), true);
    assert!(!check.healthy);
    let text = check.text(Style::default());
    assert!(text.contains("\u{2717} pod shop/web: not captured, although its annotation says so: no rule"), "{text}");
    assert!(text.contains("\u{2717} 1 of 2 enrolled pods captured") && text.ends_with("2 failed, 0 may be wrong.\n"));
}

#[test]
fn parts_that_run_and_do_not_do_what_they_are_for_are_named() {
    let cut = only(true, |facts, _| {
        let discovery = &mut facts.proxies[1].answer.as_mut().unwrap().discovery;
        discovery.connected_since = None;
        discovery.disconnected_since = Some("2026-01-02T00:00:00Z".into());
        discovery.last_error = Some("no route".into());
    });
    assert!(cut.verdict == Verdict::Failed && cut.what.contains("b (since 2026-01-02T00:00:00Z: no route)"), "{cut:?}");
    let with = |state: &str, last_error: Option<&str>| Certificate {
        identity: "spiffe://a/ns/b/sa/c".into(),
        state: state.into(),
        last_error: last_error.map(str::to_owned),
        ..Certificate::default()
    };
    let certificate = |one: Certificate| {
        only(true, |facts, _| facts.proxies[0].answer.as_mut().unwrap().certificates = vec![with("Pending", None), one])
    };
    for (state, error) in [("Expired", None), ("Expired", Some("no answer")), ("Pending", Some("no answer"))] {
        let line = certificate(with(state, error));
        assert!(line.verdict == Verdict::Failed && line.what.contains("sa/c on a"), "{line:?}");
    }
    let stale = certificate(with("Valid", Some("no answer")));
    assert!(stale.verdict == Verdict::Doubtful && stale.what.contains("no answer"), "{stale:?}");
    let refused = only(true, |facts, _| {
        let nack = Nack { resource: "ns/policy".into(), reason: "too new".into(), ..Nack::default() };
        let types = vec![ClientType { nacks: vec![nack], ..ClientType::default() }];
        let clients = [(); 3].map(|()| Client { types: types.clone(), ..Client::default() });
        facts.culvertd[0].answer.as_mut().unwrap().clients = clients.into();
    });
    assert!(
        refused.verdict == Verdict::Failed && refused.what.contains("ns/policy by 3 clients: too new"),
        "{refused:?}"
    );
}

#[test]
fn what_this_user_may_not_ask_is_not_called_broken() {
    let forbidden = |resource| AskError::Forbidden { resource, reason: "403".to_owned() };
    let mut closed = facts();
    closed.proxies.iter_mut().for_each(|one| one.answer = Err(forbidden("pods/portforward")));
    closed.culvertd.iter_mut().for_each(|one| one.answer = Err(forbidden("pods/portforward")));
    closed.agents.iter_mut().for_each(|one| one.answer = Err(forbidden("pods/exec")));
    closed.roots = None;
    closed.unknown.insert("the ConfigMap culvert-ca-root-cert".into(), "403".into());
    let check = Check::new(&closed, &around(), true);
    assert!(check.healthy, "{check:#?}");
    let text = check.text(Style::default());
    for line in
        ["2 pods are captured is not known", "ztunnel: 2 pods may not be asked", "culvertd: 1 pod may not be asked"]
    {
        assert!(text.contains(line), "{line}: {text}");
    }
    for claim in ["one version", "every proxy trusts", "captured, as the kernel"] {
        assert!(!text.contains(claim), "{claim}: {text}");
    }
    // What is really amiss is said all the same.
    closed.proxies[0].part.ready = false;
    closed.proxies[0].answer = Err(AskError::NotRunning("gone".into()));
    assert!(!Check::new(&closed, &around(), true).healthy);
}

#[test]
fn nobody_enrolled_is_well_and_says_how_to_go_on() {
    let mut facts = facts();
    facts.namespaces.clear();
    let check = Check::new(&facts, &around(), true);
    assert!(check.healthy && check.lines.iter().any(|line| line.what.contains("no pod is enrolled")), "{check:#?}");
}

#[test]
fn versions_are_read_as_systems_write_them() {
    for (text, read) in [
        ("v1.36.2", Some((1, 36))),
        ("6.12.43+deb13-cloud-amd64", Some((6, 12))),
        ("6.1-rc1", Some((6, 1))),
        ("6", None),
        ("", None),
    ] {
        assert_eq!(version(text), read, "{text}");
    }
}
