//! What is set in a namespace follows what is needed, on the real kernel. Needs root.

use std::net::IpAddr;

use super::*;
use crate::agent::testing::{A, A6, pair};

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
