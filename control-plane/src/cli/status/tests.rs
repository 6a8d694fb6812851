use super::*;
use crate::cli::error::AskError;
use crate::cli::facts::{Client, ClientType, Mistake, Nack};
use crate::cli::testing::healthy;

/// The healthy mesh, whose proxies follow.
fn facts() -> Facts {
    let mut facts = healthy();
    let kind = ClientType { r#type: "x/istio.workload.Address".into(), sent: 3, acked: 3, ..ClientType::default() };
    let client = |node: &str| Client {
        node_id: format!("ztunnel~10.0.0.1~proxy-{node}.culvert-system~x"),
        connected_since: "2026-01-01T00:00:00Z".into(),
        types: vec![kind.clone()],
    };
    facts.culvertd[0].answer.as_mut().unwrap().clients = vec![client("a"), client("b")];
    facts
}

/// The only problem after a change.
fn only(change: impl FnOnce(&mut Facts)) -> Problem {
    let mut facts = facts();
    change(&mut facts);
    let status = Status::new(&facts, SystemTime::UNIX_EPOCH);
    assert!(!status.healthy && status.summary.starts_with("1 thing wrong"), "{status:#?}");
    let text = status.text(Style::default());
    assert!(text.contains(&status.problems[0].remedy), "{text}");
    status.problems[0].clone()
}

#[test]
fn a_healthy_mesh_is_said_in_one_line() {
    let status = Status::new(&facts(), SystemTime::UNIX_EPOCH);
    assert!(status.healthy && status.problems.is_empty(), "{status:#?}");
    assert_eq!(
        status.summary,
        "nothing is wrong: 2 of 2 enrolled pods captured, agents ready on 2 and proxies on 2 of 2 nodes"
    );
    let text = status.text(Style::default());
    assert!(text.starts_with("\u{2713} nothing is wrong"), "{text}");
    assert!(text.contains("a     6.12.1  1/1   ready  ready") && text.contains("shop       2"), "{text}");
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["pods"][0]["state"], "captured");
    assert_eq!(json["proxies"][1]["replica"], "culvertd-1");
}

#[test]
fn each_thing_that_is_wrong_is_said_with_its_remedy() {
    let not_captured = only(|facts| {
        let pod = &mut facts.agents[1].answer.as_mut().unwrap()[0];
        (pod.enrolled, pod.reason) = (false, "no rule".into());
    });
    assert_eq!(
        (not_captured.subject.as_str(), not_captured.problem.as_str()),
        ("pod shop/db", "not captured: no rule")
    );

    let proxy = only(|facts| facts.proxies[0].answer = Err(AskError::Timeout(Duration::from_secs(1))));
    assert!(proxy.subject == "proxy of node a" && proxy.remedy.contains("proxy-a"), "{proxy:?}");

    let refused = only(|facts| {
        let mistake = Mistake { field: "spec.x".into(), message: "is wrong".into(), fix: "make it right".into() };
        let refused = Refused { object: "Service shop/db".into(), problems: vec![mistake], keeps_last_good: true };
        facts.culvertd[0].answer.as_mut().unwrap().source.refused = vec![refused];
    });
    assert_eq!(refused.problem, "refused: spec.x: is wrong; its last good version stays in force");
    assert_eq!(refused.remedy, "make it right");

    let nack = only(|facts| {
        let types = &mut facts.culvertd[0].answer.as_mut().unwrap().clients[1].types;
        types[0].nacks.push(Nack { resource: "shop/db".into(), reason: "no address".into(), at: String::new() });
    });
    assert!(nack.problem == "refused shop/db: no address" && nack.subject.contains("proxy-b"), "{nack:?}");

    let lost = only(|facts| drop(facts.culvertd[0].answer.as_mut().unwrap().clients.remove(0)));
    assert_eq!(lost.problem, "follows no replica of culvertd that answers");
    let alone = only(|facts| {
        facts.culvertd[0].answer.as_mut().unwrap().clients.remove(0);
        let discovery = &mut facts.proxies[0].answer.as_mut().unwrap().discovery;
        (discovery.connected_since, discovery.disconnected_since) = (None, Some("2026-01-02T00:00:00Z".into()));
        discovery.last_error = Some("no route".into());
    });
    assert_eq!(
        alone.problem,
        "follows no replica of culvertd that answers, by its own words since 2026-01-02T00:00:00Z; it goes on with what it \
         knows: no route"
    );

    let certificate = only(|facts| {
        let certificate = Certificate {
            identity: "spiffe://x".into(),
            state: "Pending".into(),
            last_error: Some("refused by culvertd".into()),
            ..Certificate::default()
        };
        facts.proxies[0].answer.as_mut().unwrap().certificates.push(certificate);
    });
    assert_eq!(certificate.problem, "not there: refused by culvertd");

    let unsynced = only(|facts| facts.culvertd[0].answer.as_mut().unwrap().synced = false);
    assert!(unsynced.problem.contains("not read everything"));
}

#[test]
fn a_mesh_that_is_not_installed_is_said_once_for_each_part() {
    let mut facts = facts();
    facts.desired = Component::ALL.into_iter().map(|component| (component, None)).collect();
    (facts.culvertd, facts.agents, facts.proxies) = Default::default();
    facts.namespaces.clear();
    let status = Status::new(&facts, SystemTime::UNIX_EPOCH);
    assert_eq!(status.problems.len(), 3, "{:#?}", status.problems);
    assert!(status.problems.iter().all(|one| one.problem.contains("not installed")));
}

#[test]
fn an_agent_that_is_away_costs_what_it_alone_knows() {
    let mut facts = facts();
    facts.agents.remove(0);
    let status = Status::new(&facts, SystemTime::UNIX_EPOCH);
    let subjects: Vec<_> = status.problems.iter().map(|one| one.subject.as_str()).collect();
    assert_eq!(subjects, ["agent of node a", "pod shop/web"]);
    assert_eq!(status.pods[1].state, "captured", "the other node's");
}

#[test]
fn a_response_on_its_way_a_note_and_an_old_root_are_nothing_wrong() {
    let mut facts = facts();
    let replica = facts.culvertd[0].answer.as_mut().unwrap();
    replica.clients[0].types[0].in_flight = true;
    replica.notes.push(Note { object: "Pod shop/db".into(), reason: "waits".into() });
    let root = Root { fingerprint: "f".repeat(64), subject: "CN=r".into(), expires: "1970-01-20T00:00:00Z".into() };
    facts.roots = Some(Ok(vec![root]));
    facts.unknown.insert("events".into(), "forbidden".into());
    let status = Status::new(&facts, SystemTime::UNIX_EPOCH);
    assert!(status.healthy && status.notes.len() == 3, "{status:#?}");
    assert!(status.text(Style::default()).contains("! root CN=r: ends at 1970-01-20"));
}
