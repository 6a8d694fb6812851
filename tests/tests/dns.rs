//! Names as pods look them up: with the programs of the system, by `/etc/resolv.conf` as the kubelet writes it, and message
//! by message. The mesh answers for services, everything else goes to the resolver that was asked, from the pod.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use common::echo_any;
use serde_json::Value;
use tests::Error;
use tests::cluster::Cluster;
use tests::families::Families;
use tests::kube::Directory;
use tests::links;
use tests::pod::Pod;
use tests::resolver::{self, Resolver};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const SERVICES: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default}\n\
                        spec: {selector: {app: web}, ports: [{port: 80, targetPort: 7000}]}\n\
                        ---\napiVersion: v1\nkind: Service\nmetadata: {name: old, namespace: default}\n\
                        spec: {ipFamilies: [IPv4], selector: {app: web}, ports: [{port: 80, targetPort: 7000}]}\n\
                        ---\napiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: default}\n\
                        spec: {clusterIP: None, selector: {app: db-0}, ports: [{name: sql, port: 5432, targetPort: 7000}]}\n\
                        ---\napiVersion: v1\nkind: Service\nmetadata: {name: shop, namespace: default}\n\
                        spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 7000}, \
                        {name: grpc, port: 81, targetPort: 7001}]}\n";

/// What getaddrinfo of an ordinary program gives.
fn getent(pod: &Pod, database: &str, name: &str) -> BTreeSet<IpAddr> {
    let done = pod.exec("/usr/bin/getent", Duration::from_secs(30), [database, name]).unwrap();
    done.stdout.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

fn resolve(pod: &Pod, name: &str, more: &[&str]) -> Value {
    pod.run_json(["resolve", name].iter().chain(more)).unwrap()
}

fn set<A: Into<IpAddr>>(addresses: impl IntoIterator<Item = A>) -> BTreeSet<IpAddr> {
    addresses.into_iter().map(Into::into).collect()
}

struct Stage {
    cluster: Cluster,
    client: Arc<Pod>,
}

impl Stage {
    fn start() -> Result<Self, Error> {
        let cluster = Cluster::builder().families(Families::Dual).start()?;
        cluster.apply("services.yaml", SERVICES)?;
        cluster.resolver().add("outside.example", &[OUTSIDE.into(), "2001:db8::9".parse().expect("an address")]);
        let many: Vec<IpAddr> = (1..=100).map(|n| Ipv4Addr::new(203, 0, 113, n).into()).collect();
        cluster.resolver().add("many.example", &many);
        echo_any(&cluster, "web", 2).enrolled(true).start()?;
        echo_any(&cluster, "db-0", 2).enrolled(true).start()?;
        let client = cluster.pod("client").node(1).enrolled(true).resolver(resolver::ADDRESS.into()).start()?;
        let stage = Self { cluster, client };
        let expected = set(stage.cluster.directory().cluster_ips("default", "web"));
        tests::wait::until("the service is known", Duration::from_secs(20), || {
            (getent(&stage.client, "ahosts", "web") == expected).then_some(())
        })?;
        Ok(stage)
    }

    /// Names that the client asked the resolver outside the mesh for, in the order of asking.
    fn asked(&self) -> Vec<String> {
        let own = self.client.ips();
        let all = self.cluster.resolver().asked();
        all.into_iter().filter(|asked| own.contains(&asked.client.ip())).map(|asked| asked.name).collect()
    }
}

#[test]
fn services_are_answered_by_the_mesh_in_every_form() -> Result<(), Error> {
    let stage = Stage::start()?;
    let (client, directory) = (&stage.client, stage.cluster.directory());
    let ips = directory.cluster_ips("default", "web");
    assert_eq!(ips.len(), 2);
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = ips.iter().partition(|ip| ip.is_ipv4());
    let before = stage.asked().len();
    for name in ["web", "web.default", "web.default.svc", "web.default.svc.cluster.local", "WeB.DeFaulT"] {
        assert_eq!(getent(client, "ahostsv4", name), set(v4.clone()), "{name}");
        assert_eq!(getent(client, "ahostsv6", name), set(v6.clone()), "{name}");
    }
    // A service of one family has no address of the other, and is there all the same.
    let old = resolve(client, "old.default.svc.cluster.local", &["--kind", "28"]);
    assert_eq!((old["code"].as_str(), old["addresses"].as_array().map(Vec::len)), (Some("NoError"), Some(0)), "{old}");
    // Headless: the pods themselves, and each by its own name.
    let pods = stage.cluster.pods();
    let db = pods.iter().find(|pod| pod.name() == "db-0").expect("db-0");
    assert_eq!(getent(client, "ahosts", "db"), set(db.ips()));
    for more in [&[][..], &["--tcp"]] {
        let answer = resolve(client, "web.default.svc.cluster.local", more);
        assert_eq!(answer["addresses"][0], v4[0].to_string(), "{more:?}: {answer}");
    }
    let asked: Vec<String> = stage.asked().split_off(before);
    let of_ours = asked.iter().filter(|name| ["web", "old", "db"].contains(&name.split('.').next().unwrap_or("")));
    assert_eq!(of_ours.collect::<Vec<_>>(), Vec::<&String>::new(), "the mesh itself knows them");
    Ok(())
}

#[test]
fn the_pod_of_a_stateful_set_has_a_name() -> Result<(), Error> {
    let stage = Stage::start()?;
    let pods = stage.cluster.pods();
    let db = pods.iter().find(|pod| pod.name() == "db-0").expect("db-0");
    assert_eq!(getent(&stage.client, "ahosts", "db-0.db"), set(db.ips()));
    Ok(())
}

#[test]
fn ports_are_found_by_their_names() -> Result<(), Error> {
    let stage = Stage::start()?;
    let srv = |name: &str, more: &[&str]| {
        let answer = resolve(&stage.client, name, &[&["--kind", "33"], more].concat());
        answer["targets"].as_array().unwrap().iter().map(|one| one.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (domain, before) = ("default.svc.cluster.local", stage.asked().len());
    for more in [&[][..], &["--tcp"]] {
        assert_eq!(srv(&format!("_grpc._tcp.shop.{domain}"), more), [format!("shop.{domain}:81")], "{more:?}");
        // Headless: the pod, and the port that it listens on.
        assert_eq!(srv(&format!("_sql._tcp.db.{domain}"), more), [format!("db-0.db.{domain}:7000")], "{more:?}");
    }
    assert_eq!(stage.asked().len(), before, "the mesh itself knows them");
    // What the mesh is not told is the resolver's business: this one has no such names.
    for name in ["_grpc._udp.shop", "_http._tcp.web"] {
        assert_eq!(srv(&format!("{name}.{domain}"), &[]), Vec::<String>::new(), "{name}");
    }
    assert_eq!(stage.asked().split_off(before), ["_grpc._udp.shop", "_http._tcp.web"].map(|n| format!("{n}.{domain}")));
    Ok(())
}

#[test]
fn everything_else_is_asked_of_the_resolver_from_the_pod() -> Result<(), Error> {
    let stage = Stage::start()?;
    let client = &stage.client;
    assert_eq!(getent(client, "ahostsv4", "outside.example"), set([OUTSIDE]));
    assert_eq!(getent(client, "ahostsv6", "outside.example"), set(["2001:db8::9".parse::<IpAddr>().expect("one")]));
    assert!(stage.asked().iter().any(|name| name == "outside.example"), "with the pod's own address");
    assert!(getent(client, "ahosts", "nowhere.example").is_empty());
    let nowhere = resolve(client, "nowhere.example", &[]);
    assert_eq!(nowhere["code"], "NxDomain", "{nowhere}");
    let cut = resolve(client, "many.example", &[]);
    assert_eq!(cut["truncated"], true, "{cut}");
    let whole = resolve(client, "many.example", &["--tcp"]);
    assert_eq!(whole["addresses"].as_array().map(Vec::len), Some(100), "{whole}");
    let server = format!("[{}]:53", resolver::ADDRESS_V6);
    let by_v6 = resolve(client, "outside.example", &["--server", &server, "--kind", "1"]);
    assert_eq!(by_v6["addresses"][0], OUTSIDE.to_string(), "{by_v6}");
    Ok(())
}

/// Resolvers in the pod and on the node answer in their own words.
#[test]
fn resolvers_on_loopback_and_on_the_node_keep_working() -> Result<(), Error> {
    let stage = Stage::start()?;
    let folder = tempfile::tempdir().expect("a folder");
    let nothing = Arc::new(Directory::create(folder.path(), Families::V4)?);
    let local: IpAddr = [127, 0, 0, 53].into();
    let in_pod = Resolver::start(stage.client.network(), &[local], nothing.clone())?;
    in_pod.add("outside.example", &[[192, 0, 2, 1].into()]);
    in_pod.add("web.default.svc.cluster.local", &[[192, 0, 2, 2].into()]);
    for (name, expected) in [("outside.example", "192.0.2.1"), ("web.default.svc.cluster.local", "192.0.2.2")] {
        for more in [&["--server", "127.0.0.53:53"][..], &["--server", "127.0.0.53:53", "--tcp"]] {
            let answer = resolve(&stage.client, name, more);
            assert_eq!(answer["addresses"][0], expected, "{more:?}: {answer}");
        }
    }
    let node_local: IpAddr = [169, 254, 20, 10].into();
    let node = stage.cluster.node(1)?;
    node.network().netlink(|handle| async move { links::address(&handle, "lo", node_local, 32).await })?;
    let on_node = Resolver::start(node.network(), &[node_local], nothing)?;
    on_node.add("outside.example", &[[192, 0, 2, 3].into()]);
    for more in [&["--server", "169.254.20.10:53"][..], &["--server", "169.254.20.10:53", "--tcp"]] {
        let answer = resolve(&stage.client, "outside.example", more);
        assert_eq!(answer["addresses"][0], "192.0.2.3", "{more:?}: {answer}");
    }
    let own = stage.client.ips();
    assert!(on_node.asked().iter().all(|asked| own.contains(&asked.client.ip())), "{:?}", on_node.asked());
    Ok(())
}

#[test]
fn a_pod_outside_the_mesh_asks_for_itself() -> Result<(), Error> {
    let stage = Stage::start()?;
    let outside = stage.cluster.pod("outside").node(1).enrolled(false).resolver(resolver::ADDRESS.into()).start()?;
    let web = stage.cluster.pods().into_iter().find(|pod| pod.name() == "web").expect("web");
    assert_eq!(getent(&outside, "ahosts", "web"), set(web.ips()), "as the cluster's own DNS has it for them");
    Ok(())
}
