use super::*;

fn wire() -> node::Pod {
    node::Pod {
        uid: String::from("Kubernetes//Pod/shop/web-1"),
        name: String::from("web-1"),
        namespace: String::from("shop"),
        service_account: String::from("web"),
        addresses: vec![vec![10, 244, 1, 5], vec![0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]],
    }
}

#[test]
fn announced_pod_round_trips() {
    let info = PodInfo::try_from(Some(wire())).unwrap();
    assert_eq!(info.primary(), Ok(IpAddr::from([10, 244, 1, 5])));
    assert_eq!(info.to_wire(), wire());
}

#[test]
fn what_is_not_acceptable_says_why() {
    let refused = |change: fn(&mut node::Pod)| {
        let mut pod = wire();
        change(&mut pod);
        PodInfo::try_from(Some(pod)).unwrap_err()
    };
    assert_eq!(PodInfo::try_from(None), Err(InvalidPod::None));
    assert_eq!(refused(|pod| pod.uid.clear()), InvalidPod::Text("uid"));
    assert_eq!(refused(|pod| pod.uid = "a b".into()), InvalidPod::Text("uid"));
    assert_eq!(refused(|pod| pod.uid = "a".repeat(254)), InvalidPod::Text("uid"));
    assert_eq!(refused(|pod| pod.name = "../x".into()), InvalidPod::Text("name"));
    assert_eq!(refused(|pod| pod.namespace = "a\n".into()), InvalidPod::Text("namespace"));
    assert_eq!(refused(|pod| pod.service_account.clear()), InvalidPod::Text("service account"));
    assert_eq!(refused(|pod| pod.service_account = "a:b".into()), InvalidPod::Text("service account"));
    assert_eq!(refused(|pod| pod.namespace = "a:b".into()), InvalidPod::Text("namespace"));
    assert!(matches!(refused(|pod| pod.namespace = "..".into()), InvalidPod::Identity(_)));
    assert_eq!(refused(|pod| pod.addresses.clear()), InvalidPod::Addresses);
    assert_eq!(refused(|pod| pod.addresses = vec![vec![10, 0, 0, 1]; 5]), InvalidPod::Addresses);
    assert_eq!(refused(|pod| pod.addresses = vec![vec![0xfd; 16]; 5]), InvalidPod::Addresses);
    let mapped =
        |pod: &mut node::Pod| pod.addresses = vec![Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets().to_vec()];
    assert_eq!(refused(mapped), InvalidPod::Address);
    for bad in [vec![], vec![1, 2, 3], vec![127, 0, 0, 1], vec![0; 4], vec![255; 4], vec![224, 0, 0, 1], vec![0; 16]] {
        let mut pod = wire();
        pod.addresses.push(bad);
        assert_eq!(PodInfo::try_from(Some(pod)), Err(InvalidPod::Address));
    }
}

#[test]
fn one_address_of_either_family_is_enough_and_each_may_have_several() {
    for addresses in
        [vec![vec![10, 0, 0, 1]], vec![vec![0xfd; 16]], [vec![vec![10, 0, 0, 1]; 4], vec![vec![0xfd; 16]; 4]].concat()]
    {
        PodInfo::try_from(Some(node::Pod { addresses, ..wire() })).unwrap();
    }
}
