//! From steps to batches.

use std::sync::Arc;

use futures_util::stream;
use serde_json::json;
use tokio::sync::mpsc;

use super::watch::Step;
use super::{Gathered, gather};
use crate::api::Kind;
use crate::index::Event;

fn present(name: &str, version: u32, mode: &str) -> Step {
    let labels = json!({ "istio.io/dataplane-mode": mode });
    let metadata = json!({ "name": name, "resourceVersion": version.to_string(), "labels": labels });
    Step::Present(serde_json::from_value(json!({ "metadata": metadata })).unwrap())
}

/// `+name` for what applies, `-name` for what is gone.
fn summary(events: &[Event]) -> String {
    let word = |event: &Event| match event {
        Event::Apply(object) => format!("+{}", object.id().name),
        Event::Delete(id) => format!("-{}", id.name),
    };
    events.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn nothing_is_told_before_every_kind_is_listed() {
    let mut gathered = Gathered::new([Kind::Namespace, Kind::Node, Kind::Pod]);
    assert!(!gathered.take(Kind::Namespace, &Step::Listing));
    assert!(!gathered.take(Kind::Namespace, &present("a", 1, "none")));
    assert!(!gathered.take(Kind::Namespace, &Step::Listed));
    // A change of a kind that is listed waits for the others.
    assert!(!gathered.take(Kind::Namespace, &present("b", 2, "none")));
    // A kind that the cluster does not have is not waited for.
    assert!(!gathered.take(Kind::Pod, &Step::Absent));
    assert!(!gathered.take(Kind::Node, &Step::Listing));
    assert!(!gathered.take(Kind::Node, &present("n", 3, "none")));
    assert!(gathered.take(Kind::Node, &Step::Listed));
    let first = summary(&gathered.batch().unwrap().events);
    assert!(["+a +b +n", "+b +a +n"].contains(&first.as_str()), "{first}");
    assert!(gathered.batch().is_none());
    assert!(gathered.take(Kind::Namespace, &present("a", 4, "ambient")));
    assert_eq!(summary(&gathered.batch().unwrap().events), "+a");
}

#[test]
fn what_changes_before_the_first_batch_takes_no_room() {
    let mut gathered = Gathered::new([Kind::Namespace, Kind::Node]);
    gathered.take(Kind::Namespace, &Step::Listing);
    for version in 1..100 {
        gathered.take(Kind::Namespace, &present("a", version, if version % 2 == 0 { "none" } else { "ambient" }));
    }
    gathered.take(Kind::Namespace, &Step::Listed);
    assert!(gathered.pending.is_empty());
    assert!(gathered.take(Kind::Node, &Step::Absent));
    assert_eq!(summary(&gathered.batch().unwrap().events), "+a");
}

#[test]
fn a_report_is_made_anew_only_as_far_as_it_changed() {
    let mut gathered = Gathered::new([Kind::Namespace]);
    for step in [Step::Listing, present("a", 1, "x"), Step::Listed] {
        gathered.take(Kind::Namespace, &step);
    }
    let first = gathered.batch().unwrap().report;
    gathered.take(Kind::Namespace, &present("b", 2, "none"));
    let second = gathered.batch().unwrap().report;
    assert_eq!(second.accepted, 1);
    assert!(Arc::ptr_eq(&first.refused, &second.refused));
    gathered.take(Kind::Namespace, &present("b", 3, "ambient"));
    assert!(Arc::ptr_eq(&second, &gathered.batch().unwrap().report));
    gathered.take(Kind::Namespace, &present("a", 4, "none"));
    assert!(gathered.batch().unwrap().report.refused.is_empty());
}

#[test]
fn a_kind_may_come_later_and_go_again() {
    let mut gathered = Gathered::new([Kind::Namespace]);
    assert!(gathered.take(Kind::Namespace, &Step::Absent));
    let first = gathered.batch().unwrap();
    assert!(first.events.is_empty());
    for step in [Step::Listing, present("a", 1, "none"), Step::Listed, present("b", 2, "none")] {
        gathered.take(Kind::Namespace, &step);
    }
    assert_eq!(summary(&gathered.batch().unwrap().events), "+a +b");
    gathered.take(Kind::Namespace, &Step::Absent);
    let mut gone = summary(&gathered.batch().unwrap().events).split(' ').map(str::to_owned).collect::<Vec<_>>();
    gone.sort();
    assert_eq!(gone, ["-a", "-b"]);
}

#[test]
fn what_is_refused_is_told_without_an_event() {
    let mut gathered = Gathered::new([Kind::Namespace]);
    for step in [Step::Listing, present("a", 1, "none"), Step::Listed] {
        gathered.take(Kind::Namespace, &step);
    }
    assert!(gathered.batch().unwrap().report.refused.is_empty());
    assert!(gathered.take(Kind::Namespace, &present("a", 2, "x")));
    let batch = gathered.batch().unwrap();
    assert!(batch.events.is_empty());
    let text = batch.report.refused[0].to_string();
    assert!(text.starts_with("Namespace a: metadata.labels[istio.io/dataplane-mode]: "), "{text}");
    assert!(batch.report.refused[0].keeps_last_good);
    assert_eq!(batch.report.accepted, 1);
}

#[tokio::test]
async fn a_slow_receiver_gets_at_once_what_came_meanwhile_and_nothing_is_lost() {
    let (batches, mut received) = mpsc::channel(1);
    let (steps, source) = mpsc::channel(1);
    let source = stream::unfold(source, |mut source| async move { source.recv().await.map(|step| (step, source)) });
    let gathered = Gathered::new([Kind::Namespace]);
    let task = tokio::spawn(async move { gather(Box::pin(source), gathered, &batches).await });
    let send = async |step| steps.send((Kind::Namespace, step)).await.unwrap();
    for step in [Step::Listing, present("a", 1, "none"), Step::Listed] {
        send(step).await;
    }
    assert_eq!(summary(&received.recv().await.unwrap().events), "+a");
    for number in 2..102 {
        send(present(&format!("n{number}"), number, "none")).await;
    }
    // There is room again: the last one was taken.
    drop(steps.reserve().await.unwrap());
    let mut count = received.recv().await.unwrap().events.len();
    // The first batch waited in the channel; behind it everything else had gathered.
    if count < 100 {
        count += received.recv().await.unwrap().events.len();
    }
    assert_eq!(count, 100);
    drop(received);
    task.await.unwrap();
}
