//! What is set in a namespace follows what is needed, on the real kernel. Needs root.

use std::net::IpAddr;
use std::os::fd::AsFd as _;

use super::*;
use crate::agent::testing::{A, A6, configure, index_of, pair};

/// Everything of the mesh's that is in a namespace: how many rules, and how many routes in its table.
fn ours(netns: &Netns) -> (usize, usize) {
    let mut netlink = netns.route();
    let rules = rules::our_rules(rules::list_rules(&mut netlink).unwrap()).count();
    (rules, rules::list_routes(&mut netlink, ROUTE_TABLE).unwrap().len())
}

#[test]
fn what_is_not_needed_any_more_is_removed() {
    let (a, _b) = pair();
    let both: &[IpAddr] = &[A.into(), A6.into()];
    let with_dns = Needs { addresses: both, dns: true };
    prepare(&a.netns, &with_dns).unwrap();
    assert_eq!(ours(&a.netns), (12, 2));

    let without = Needs { addresses: both, dns: false };
    let error = verify(&a.netns, &without).unwrap_err();
    assert!(error.to_string().ends_with("has policy rules of the mesh that it must not have (4)"), "{error}");
    let mended = mend(&a.netns, &without).unwrap();
    assert_eq!((mended.rules.len(), mended.surplus_rules.len(), mended.surplus_routes.len()), (0, 4, 0));
    verify(&a.netns, &without).unwrap();
    assert_eq!(ours(&a.netns), (8, 2));
    assert!(mend(&a.netns, &without).unwrap().is_empty());

    let of_one = Needs { addresses: &[A.into()], dns: true };
    let mended = mend(&a.netns, &of_one).unwrap();
    assert_eq!((mended.rules.len(), mended.surplus_rules.len(), mended.surplus_routes.len()), (2, 4, 1));
    verify(&a.netns, &of_one).unwrap();
    assert_eq!(ours(&a.netns), (6, 1));

    mend(&a.netns, &with_dns).unwrap();
    verify(&a.netns, &with_dns).unwrap();
    assert_eq!(ours(&a.netns), (12, 2));
}

#[test]
fn address_that_was_just_added_is_waited_for_where_nobody_else_has_to_wait() {
    let (a, _b) = pair();
    let added: IpAddr = "fd00:244:1::77".parse().unwrap();
    configure(&a.netns, async |handle| {
        let index = index_of(&handle, "eth0").await;
        handle.address().add(index, added, 64).execute().await.unwrap();
    });
    assert!(interface::is_settling(&a.netns, &[added]).unwrap(), "the kernel asks the link first");
    assert!(!interface::is_settling(&a.netns, &[A.into(), A6.into()]).unwrap());
    let needs = Needs { addresses: &[added], dns: false };
    prepare(&a.netns, &needs).expect_err("it does not wait");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let fd = a.netns.as_fd().try_clone_to_owned().unwrap();
    runtime.block_on(settle(&fd, &[added]));
    prepare(&a.netns, &needs).unwrap();
    verify(&a.netns, &needs).unwrap();
}
