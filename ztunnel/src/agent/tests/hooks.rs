//! The node's own programs, taken off behind the agent's back.

use super::drift::Drift;
use super::drifting::{enrolled, mended};
use super::testing::Cgroup;
use super::*;

/// Where a program of the node is pinned.
fn node_pin(scratch: &Scratch, program: &str) -> std::path::PathBuf {
    scratch.bpffs().join(format!("v{}/node/{program}", ztunnel_ebpf::LAYOUT_VERSION))
}

#[test]
fn connect_hooks_that_were_taken_off_are_attached_again() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    super::families::announce(&agent, &a, &[A.into(), A6.into()]).unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    let cases = [(ztunnel_ebpf::PROGRAM_CONNECT4, at(B, PORT)), (ztunnel_ebpf::PROGRAM_CONNECT6, (B6, PORT).into())];
    let mut found = 0;
    for (program, to) in cases {
        let pin = node_pin(&scratch, program);
        for take_off in [|pin: &Path| std::fs::remove_file(pin).unwrap(), sys::detach] {
            take_off(&pin);
            found += 1;
            let is_found = || (agent.host.drift.get(Drift::Hooks) == found).then_some(());
            eventually(is_found).unwrap_or_else(|| panic!("{program}: {found}"));
            mended(&agent, &[Drift::Hooks]);
            connect(&a, to).unwrap();
            assert_eq!(accept(&listeners[0]).unwrap().0, to, "{program}");
        }
    }
}

#[test]
fn observer_of_the_kubelet_that_was_taken_off_is_attached_again() {
    let scratch = Scratch::new();
    let kubelet = Cgroup::new("drifting");
    let agent =
        Agent::start_with(&scratch, Choices { kubelet: vec!["/nowhere".into(), kubelet.0.clone()], ..choices() });
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    let pin = node_pin(&scratch, ztunnel_ebpf::PROGRAM_PROBES);
    eventually(|| pin.exists().then_some(())).expect("it is there");
    let attached = || sys::pinned_objects(pin.parent().unwrap()).len();
    let before = attached();
    for (found, take_off) in (1..).zip([|pin: &Path| std::fs::remove_file(pin).unwrap(), sys::detach]) {
        take_off(&pin);
        eventually(|| (agent.host.drift.get(Drift::Hooks) == found).then_some(())).expect("found");
        mended(&agent, &[Drift::Hooks]);
        assert_eq!(attached(), before);
    }
}

#[test]
fn no_pod_is_said_to_be_enrolled_while_the_nodes_programs_cannot_be_put_back() {
    let scratch = Scratch::new();
    let (agent, _a, _b) = enrolled(&scratch);
    let pin = node_pin(&scratch, ztunnel_ebpf::PROGRAM_CONNECT4);
    // A folder in the place of the pin: nothing can be pinned there.
    std::fs::remove_file(&pin).unwrap();
    std::fs::create_dir(&pin).unwrap();
    let announcer = agent.announcer();
    let said = |wanted: &str| announcer.list().into_iter().find(|(_, reason)| reason.contains(wanted));
    eventually(|| said("cannot be put back")).expect("the pod is reported, with the reason");
    std::fs::remove_dir(&pin).unwrap();
    mended(&agent, &[Drift::Hooks]);
}
