//! Aliases that change hands while both who had it and who has it now go on, told to a client that gets one resource at a time.

use super::tests::{Peer, ack, having, on_demand, referring, subscribe, thing};
use super::*;
use crate::Resource;
use crate::server::Entry;

const NOTHING: [&str; 0] = [];

fn drain(peer: &mut Peer) {
    while let Some((nonce, _)) = peer.next() {
        peer.send(ack(&nonce)).unwrap();
    }
}

fn slow() -> Peer {
    Peer::with(Limits { max_response: 1, ..Limits::default() })
}

#[test]
fn who_gives_up_an_alias_is_told_with_the_one_that_has_it_now() {
    let mut peer = slow();
    peer.set(&[thing("a", &["x", "y"], "1"), thing("b", &["z"], "1"), thing("c", &[], "1")]);
    peer.send(subscribe(&[])).unwrap();
    peer.take();
    peer.set(&[thing("a", &["y"], "2"), thing("b", &["z", "x"], "2"), thing("c", &[], "2")]);
    assert_eq!(peer.take(), ["a=2", "b=2"]);
    // That it was told before its turn is not noted.
    assert_eq!([peer.take(), peer.take()], [["b=2"], ["c=2"]]);
    // The other way round each in its turn: who has it now comes first.
    peer.set(&[thing("c", &["x"], "3"), thing("b", &["z"], "3")]);
    assert_eq!([peer.take(), peer.take()], [["c=3"], ["b=3"]]);
    assert_eq!(peer.next(), None);
    assert_eq!(peer.machine.status()[0].acked, peer.catalog.snapshot().version(WORKLOAD_TYPE));
}

#[test]
fn two_that_change_places_are_told_at_once_whatever_they_refer_to() {
    let mut peer = slow();
    peer.set(&[thing("a", &["x"], "1"), thing("b", &["y"], "1"), thing("c", &["z"], "1")]);
    peer.send(subscribe(&[])).unwrap();
    peer.take();
    let at = |entry: Entry, alias: &str| {
        let resource = Resource { aliases: vec![alias.into()], ..entry.resource };
        Entry { resource, ..entry }
    };
    // In a ring, and one of them refers to something.
    let entries = [thing("a", &["y"], "2").into(), at(referring("b", "2"), "z"), thing("c", &["x"], "2").into()];
    peer.catalog.update(WORKLOAD_TYPE, entries, NOTHING);
    let mut told = peer.take();
    told.sort();
    assert_eq!(told, ["a=2", "b=2", "c=2"]);
}

#[test]
fn a_change_that_comes_after_does_not_part_them() {
    let mut peer = slow();
    peer.set(&[thing("a", &["x"], "1"), thing("b", &[], "1")]);
    peer.send(subscribe(&[])).unwrap();
    peer.take();
    peer.set(&[thing("a", &["y"], "2"), thing("b", &["x"], "2")]);
    // The one that has it now is further behind than the other; and again, after one of them was gone.
    peer.catalog.update(WORKLOAD_TYPE, [referring("c", "1")], NOTHING);
    peer.catalog.update(WORKLOAD_TYPE, [Entry { refers: true, ..thing("b", &["x"], "3").into() }], NOTHING);
    assert_eq!(peer.take(), ["a=2", "b=3"]);
    drain(&mut peer);
    peer.catalog.update(WORKLOAD_TYPE, [thing("c", &["y"], "2")], ["a"]);
    peer.set(&[thing("a", &[], "3"), thing("c", &["y"], "3")]);
    assert_eq!(peer.take(), ["a=3", "c=3"]);
}

#[test]
fn on_demand_and_after_a_pause_they_are_told_at_once_too() {
    let mut peer = slow();
    peer.set(&[thing("a", &["x"], "1"), thing("b", &["y"], "1")]);
    peer.send(on_demand(&["x", "y"])).unwrap();
    drain(&mut peer);
    peer.set(&[thing("a", &["y"], "2"), thing("b", &["x"], "2")]);
    assert_eq!(peer.take(), ["a=2", "b=2"]);

    let mut back = Peer { machine: slow().machine, ..peer };
    back.send(having(subscribe(&[]), &[("a", "v-1"), ("b", "v-1")])).unwrap();
    assert_eq!(back.take(), ["a=2", "b=2"]);
    // One that has changed since it came back is told before its turn.
    let mut back = Peer { machine: slow().machine, ..back };
    back.set(&[thing("c", &["v"], "1")]);
    back.send(having(subscribe(&[]), &[("a", "v-1"), ("b", "v-1")])).unwrap();
    back.set(&[thing("b", &["x"], "3")]);
    assert_eq!(back.take(), ["a=2", "b=3"]);
    assert_eq!([back.take(), back.take()], [["c=1"], ["b=3"]]);
}

#[test]
fn what_is_remembered_of_one_is_bounded() {
    let mut peer = slow();
    peer.set(&[thing("b", &[], "1")]);
    for number in 0..100 {
        peer.set(&[thing("a", &[&format!("x{number}")], &number.to_string())]);
    }
    peer.send(having(subscribe(&[]), &[("a", "v-0"), ("b", "v-1")])).unwrap();
    peer.set(&[thing("b", &["x98"], "2")]);
    assert_eq!(peer.take(), ["a=99", "b=2"]);
    drain(&mut peer);
    peer.set(&[thing("a", &["x99"], "100"), thing("b", &["x1"], "3")]);
    assert_eq!(peer.take(), ["a=100"]);
}
