//! Proxies that do not read, or not yet.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;

/// Most descriptors that may be on their way: one more message is sent while there are not yet 1024.
const MOST: usize = 1023 + 253;

fn ask(proxy: &Proxy, count: u32) {
    let kind = SocketKind::UpstreamV4.into();
    let request = node::SocketRequest { pod_uid: UID.into(), kind, count, address: Vec::new() };
    proxy.say(proxy_message::Kind::SocketRequest(request), &[]);
}

/// Waits until the agent has ended the connection, without reading what it has sent.
fn wait_for_the_end(proxy: &Proxy) {
    let mut ended = [PollFd::new(proxy.0.as_fd(), PollFlags::empty())];
    let patience = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut ended, patience).unwrap(), 1, "the agent waits for ever");
    assert!(ended[0].revents().unwrap().contains(PollFlags::POLLHUP));
}

#[test]
fn proxy_that_does_not_read_has_few_sockets_on_the_way_and_is_cut_off() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    proxy.added();
    proxy.snapshot();
    for _ in 0..9 {
        ask(&proxy, 253);
    }
    wait_for_the_end(&proxy);
    let mut on_the_way = 0;
    while let Ok((_, sockets)) = proxy.0.recv(64 << 10) {
        on_the_way += sockets.len();
    }
    assert!((1..=MOST).contains(&on_the_way), "{on_the_way}");
    // Another one has what it asks for.
    let other = agent.proxy(Vec::new());
    other.added();
    other.snapshot();
    assert_eq!(other.sockets(UID, SocketKind::UpstreamV4, 253).unwrap().len(), 253);
}

#[test]
fn proxy_that_asks_for_much_before_it_reads_gets_all_of_it() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    proxy.added();
    proxy.snapshot();
    // More than the kernel keeps, both ways together.
    let kept = std::fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen").unwrap();
    let many = 2 * kept.trim().parse::<usize>().unwrap() + 10;
    for _ in 0..many {
        ask(&proxy, 1);
    }
    for _ in 0..many {
        assert!(matches!(proxy.hear(), (agent_message::Kind::Sockets(_), sockets) if sockets.len() == 1));
    }
}

#[test]
fn proxy_that_asks_without_end_and_does_not_read_is_cut_off() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    proxy.added();
    proxy.snapshot();
    let kind = SocketKind::UpstreamV4.into();
    let request = node::SocketRequest { pod_uid: UID.into(), kind, count: 1, address: Vec::new() };
    let request = node::ProxyMessage { kind: Some(proxy_message::Kind::SocketRequest(request)) }.encode_to_vec();
    while proxy.0.send(&request, &[]).is_ok() {}
    wait_for_the_end(&proxy);
}
