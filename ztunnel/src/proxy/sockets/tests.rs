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
        assert!(socket.keepalive().unwrap());
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
async fn sockets_for_resolvers_are_asked_for_one_by_one() {
    let mut b = bench(100);
    let udp = || OwnedFd::from(std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let (a, other): (IpAddr, IpAddr) = ("10.96.0.10".parse().unwrap(), "2001:db8::10".parse().unwrap());
    let waits = [b.stock.reply(a), b.stock.reply(other), b.stock.reply(a)];
    for resolver in [a, other, a] {
        assert_eq!(b.notices.try_recv().unwrap().want, Want::Reply(resolver));
    }
    b.stock.fill_reply(a, Some(udp()));
    b.stock.fill_reply(other, None);
    b.stock.fill_reply(a, Some(sockets(1).remove(0)));
    b.stock.fill_reply(a, Some(udp()));
    let started = Instant::now();
    let [first, refused, no_udp] = waits;
    assert!(first.await.is_ok());
    assert_eq!(refused.await.unwrap_err(), TakeError::Empty);
    assert_eq!(no_udp.await.unwrap_err(), TakeError::Empty);
    assert_eq!(started.elapsed(), Duration::ZERO, "who cannot be served is told at once");
    let waits: Vec<_> = (0..REPLIES_CAP).map(|_| b.stock.reply(a)).collect();
    assert_eq!(b.stock.reply(other).await.unwrap_err(), TakeError::Empty, "too many at once");
    drop(waits);
    b.stock.close();
    assert_eq!(b.stock.reply(a).await.unwrap_err(), TakeError::PodGone);
}
