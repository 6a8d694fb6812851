//! The stock: what is ordered, who gets what, what is closed.

use std::net::TcpListener;

use super::*;

struct Bench {
    stock: Arc<Stock>,
    node: Arc<NodeCap>,
    notices: mpsc::UnboundedReceiver<Notice>,
}

fn bench(cap: usize) -> Bench {
    let (sender, notices) = mpsc::unbounded_channel();
    let node = NodeCap::new(cap);
    Bench { stock: Stock::new("pod".into(), &["10.0.0.1".parse().unwrap()], Arc::clone(&node), sender), node, notices }
}

/// Any descriptors do: the stock never looks at them.
fn sockets(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap().into()).collect()
}

const UP: SocketKind = SocketKind::Upstream(Family::V4);
const DELIVERY: SocketKind = SocketKind::Delivery(Family::V4);

#[tokio::test(start_paused = true)]
async fn a_new_pod_gets_a_warm_stock_and_an_unused_one_loses_it() {
    let mut b = bench(100);
    b.stock.prime();
    assert_eq!(b.notices.recv().await.unwrap(), Notice { pod_uid: "pod".into(), want: Want::Shelf(UP) });
    assert_eq!(b.stock.next_order(UP), Some(2));
    assert_eq!(b.stock.next_order(UP), None, "what is on its way is not ordered again");
    b.stock.fill(UP, sockets(2));
    assert_eq!((b.stock.idle(UP), b.node.idle()), (2, 2));
    for _ in 0..WARM_SWEEPS + 2 {
        b.stock.sweep();
    }
    assert_eq!((b.stock.idle(UP), b.node.idle()), (0, 0), "an idle pod must hold no socket");
}

#[tokio::test(start_paused = true)]
async fn taking_from_stock_needs_no_wait_and_orders_more() {
    let mut b = bench(100);
    b.stock.prime();
    b.stock.next_order(UP);
    b.stock.fill(UP, sockets(2));
    while b.notices.try_recv().is_ok() {}
    let started = Instant::now();
    b.stock.take(UP).await.unwrap();
    b.stock.take(UP).await.unwrap();
    assert_eq!(started.elapsed(), Duration::ZERO);
    assert_eq!(b.notices.try_recv().map(|notice| notice.want), Ok(Want::Shelf(UP)));
    assert!(b.notices.try_recv().is_err(), "one notice is enough");
    assert_eq!(b.stock.next_order(UP), Some(2));
}

#[tokio::test(start_paused = true)]
async fn an_empty_stock_waits_its_time_then_fails_with_its_own_reason() {
    let b = bench(100);
    let started = Instant::now();
    assert_eq!(b.stock.take(UP).await.unwrap_err(), TakeError::Empty);
    assert_eq!(started.elapsed(), STOCK_WAIT);
    // The one that gave up is not counted any more, and gets nothing.
    assert_eq!(b.stock.next_order(UP), Some(2));
    b.stock.fill(UP, sockets(2));
    assert_eq!(b.stock.idle(UP), 2);
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_are_served_in_order_and_all_are_ordered_for() {
    let b = bench(100);
    let waits: Vec<_> = (0..300).map(|_| b.stock.take(UP)).collect();
    // 300 wait, and 300 taken in this second make a stock of 37 reasonable.
    assert_eq!(b.stock.next_order(UP), Some(253));
    assert_eq!(b.stock.next_order(UP), Some(300 + 37 - 253));
    assert_eq!(b.stock.next_order(UP), None);
    b.stock.fill(UP, sockets(253));
    b.stock.fill(UP, sockets(84));
    for wait in waits {
        wait.await.unwrap();
    }
    assert_eq!(b.stock.idle(UP), 37);
}

#[tokio::test(start_paused = true)]
async fn the_node_wide_cap_bounds_the_stock_but_not_the_connections() {
    let b = bench(1);
    b.stock.prime();
    assert_eq!(b.stock.next_order(UP), Some(1));
    assert_eq!(b.stock.next_order(DELIVERY), Some(1), "room is counted when the sockets arrive");
    b.stock.fill(UP, sockets(1));
    b.stock.fill(DELIVERY, sockets(1));
    assert_eq!(b.node.idle(), 1);
    assert_eq!(b.stock.idle(DELIVERY), 0);
    let waits = [b.stock.take(DELIVERY), b.stock.take(DELIVERY)];
    assert_eq!(b.stock.next_order(DELIVERY), Some(2));
    b.stock.fill(DELIVERY, sockets(2));
    for wait in waits {
        wait.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_order_that_is_never_answered_is_made_again() {
    let b = bench(100);
    b.stock.prime();
    assert_eq!(b.stock.next_order(UP), Some(2));
    tokio::time::advance(ORDER_LIFE + Duration::from_millis(1)).await;
    assert_eq!(b.stock.next_order(UP), Some(2));
    b.stock.prime();
    assert_eq!(b.stock.next_order(UP), Some(2), "a new agent knows nothing of orders to the last one");
}

#[tokio::test(start_paused = true)]
async fn a_removed_pod_holds_nothing_and_gives_nothing() {
    let b = bench(100);
    b.stock.prime();
    b.stock.next_order(UP);
    b.stock.fill(UP, sockets(2));
    let waiting = b.stock.take(DELIVERY);
    b.stock.close();
    assert_eq!(b.node.idle(), 0);
    assert_eq!(waiting.await.unwrap_err(), TakeError::PodGone);
    assert_eq!(b.stock.take(UP).await.unwrap_err(), TakeError::PodGone);
    assert_eq!(b.stock.next_order(UP), None);
    b.stock.fill(UP, sockets(2));
    assert_eq!(b.stock.idle(UP), 0);
}

#[test]
fn kinds_survive_the_wire() {
    for kind in SocketKind::ALL {
        assert_eq!(SocketKind::from_wire(kind.to_wire() as i32), Some(kind));
    }
    assert_eq!(SocketKind::from_wire(0), None);
    assert_eq!(SocketKind::from_wire(99), None);
}

#[test]
fn dead_peers_are_looked_for() {
    for kind in SocketKind::ALL.into_iter().filter(|kind| kind.is_stocked_early()) {
        let domain = if kind.family() == Family::V4 { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
        let socket = OwnedFd::from(socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap());
        prepare(kind, &socket).unwrap();
        let socket = SockRef::from(&socket);
        // What it delivers to is in the same kernel.
        assert_eq!(socket.keepalive().unwrap(), !matches!(kind, SocketKind::Delivery(_)), "{kind:?}");
        if !socket.keepalive().unwrap() {
            continue;
        }
        let bound = socket.tcp_keepalive_time().unwrap()
            + socket.tcp_keepalive_interval().unwrap() * socket.tcp_keepalive_retries().unwrap();
        assert_eq!(bound, Duration::from_secs(120), "{kind:?}");
    }
}

#[test]
fn a_socket_of_another_type_is_refused() {
    let udp = OwnedFd::from(std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let [tcp] = <[_; 1]>::try_from(sockets(1)).unwrap();
    for kind in SocketKind::ALL {
        let (good, bad) = if kind.is_stocked_early() { (&tcp, &udp) } else { (&udp, &tcp) };
        assert!(prepare(kind, good).is_ok() && prepare(kind, bad).is_err(), "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_stocked_with_what_its_addresses_need() {
    let mut b = bench(100);
    b.stock.prime();
    let mut wanted = Vec::new();
    while let Ok(notice) = b.notices.try_recv() {
        wanted.push(notice.want);
    }
    assert_eq!(wanted, [Want::Shelf(UP), Want::Shelf(DELIVERY)]);
    let v6 = SocketKind::Upstream(Family::V6);
    assert_eq!(b.stock.next_order(v6), None);
    let _wait = b.stock.take(v6);
    assert_eq!(b.notices.try_recv().unwrap().want, Want::Shelf(v6), "asked for all the same");
}

#[tokio::test(start_paused = true)]
async fn all_who_wait_for_a_resolver_share_one_socket() {
    let mut b = bench(100);
    let udp = || OwnedFd::from(std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let (a, other): (IpAddr, IpAddr) = ("10.96.0.10".parse().unwrap(), "2001:db8::10".parse().unwrap());
    let shared: Vec<_> = (0..REPLIES_CAP + 20).map(|_| b.stock.reply(a)).collect();
    let refused = b.stock.reply(other);
    for resolver in [a, other] {
        assert_eq!(b.notices.try_recv().unwrap().want, Want::Reply(resolver));
        assert!(b.stock.next_reply(resolver));
        assert!(!b.stock.next_reply(resolver), "it is on its way");
    }
    let late = b.stock.reply(a);
    assert!(b.notices.try_recv().is_err(), "one order for each");
    b.stock.fill_reply(a, Some(udp()));
    b.stock.fill_reply(other, None);
    let started = Instant::now();
    let first = late.await.unwrap();
    for wait in shared {
        assert!(Arc::ptr_eq(&wait.await.unwrap(), &first));
    }
    assert_eq!(refused.await.unwrap_err(), TakeError::Empty);
    let no_udp = b.stock.reply(a);
    b.stock.fill_reply(a, Some(sockets(1).remove(0)));
    assert_eq!(no_udp.await.unwrap_err(), TakeError::Empty);
    assert_eq!(started.elapsed(), Duration::ZERO, "who cannot be served is told at once");
    let cap = u8::try_from(REPLIES_CAP).unwrap();
    let waits: Vec<_> = (0..cap - 1).map(|i| b.stock.reply([10, 0, 0, i].into())).collect();
    assert_eq!(b.stock.reply(other).await.unwrap_err(), TakeError::Empty, "too many at once");
    drop(waits);
    b.stock.close();
    assert_eq!(b.stock.reply(a).await.unwrap_err(), TakeError::PodGone);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_came_back_is_asked_for_the_resolvers_that_somebody_waits_for() {
    let mut b = bench(100);
    let (a, other): (IpAddr, IpAddr) = ("10.96.0.10".parse().unwrap(), "10.96.0.11".parse().unwrap());
    let waits = [b.stock.reply(a), b.stock.reply(a)];
    drop(b.stock.reply(other));
    assert!(b.stock.next_reply(a));
    assert!(!b.stock.next_reply(other), "nobody waits any more");
    while b.notices.try_recv().is_ok() {}
    b.stock.prime();
    let mut wanted = Vec::new();
    while let Ok(notice) = b.notices.try_recv() {
        wanted.extend(matches!(notice.want, Want::Reply(_)).then_some(notice.want));
    }
    assert_eq!(wanted, [Want::Reply(a)]);
    assert!(b.stock.next_reply(a));
    // An order that is never answered is made again.
    for wait in waits {
        assert_eq!(wait.await.unwrap_err(), TakeError::Empty);
    }
    tokio::time::advance(ORDER_LIFE).await;
    let _wait = b.stock.reply(a);
    assert_eq!(b.notices.try_recv().unwrap().want, Want::Reply(a));
    assert!(b.stock.next_reply(a));
}
