//! What there is in a network namespace and in folders, as text: to say what something has left behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use futures_util::TryStreamExt;
use rtnetlink::IpVersion;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::RouteMessage;

use crate::Error;
use crate::netns::NetNs;

/// Lines of text by place.
pub type Picture = BTreeMap<String, Vec<String>>;

/// Rules, routes, queueing disciplines, sysctls and sockets of a network namespace that is called `name`.
///
/// # Errors
/// When it cannot be entered, or the kernel does not answer.
pub fn of_network(name: &str, network: &NetNs) -> Result<Picture, Error> {
    Ok(Picture::from([
        (format!("rules and routes of {name}"), rules_and_routes(network)?),
        (format!("sysctls of {name}"), network.run(sysctls)?),
        (format!("sockets of {name}"), network.run(sockets)?),
    ]))
}

/// Everything below a folder, by path; nothing if it is not there.
pub fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut next = vec![folder.to_path_buf()];
    while let Some(folder) = next.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            found.push(entry.path().display().to_string());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                next.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

/// The lines that only one of the two has. Both are of the same places.
///
/// # Panics
/// When a place of the first is none of the second.
pub fn differences(before: &Picture, after: &Picture) -> Vec<String> {
    let mut found = Vec::new();
    for (place, lines) in before {
        let now = &after[place];
        found.extend(lines.iter().filter(|line| !now.contains(line)).map(|line| format!("{place}: gone: {line}")));
        found.extend(now.iter().filter(|line| !lines.contains(line)).map(|line| format!("{place}: new: {line}")));
        if lines.len() != now.len() {
            found.push(format!("{place}: {} lines, were {}", now.len(), lines.len()));
        }
    }
    found
}

fn rules_and_routes(network: &NetNs) -> Result<Vec<String>, Error> {
    let failed = |e: rtnetlink::Error| Error::Absent(e.to_string());
    network.netlink(|handle| async move {
        let mut found = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let rules: Vec<_> = handle.rule().get(version).execute().try_collect().await.map_err(failed)?;
            found.extend(rules.iter().map(|rule| format!("{rule:?}")));
        }
        let mut v4 = RouteMessage::default();
        v4.header.address_family = AddressFamily::Inet;
        let mut v6 = RouteMessage::default();
        v6.header.address_family = AddressFamily::Inet6;
        for ask in [v4, v6] {
            let routes: Vec<_> = handle.route().get(ask).execute().try_collect().await.map_err(failed)?;
            // What the kernel learnt by itself comes and goes.
            let lasting = routes.iter().filter(|route| !format!("{route:?}").contains("Cloned"));
            found.extend(lasting.map(|route| format!("{:?} {:?}", route.header, route.attributes)));
        }
        let queues: Vec<_> = handle.qdisc().get().execute().try_collect().await.map_err(failed)?;
        found.extend(queues.iter().map(|queue| format!("{:?}", queue.header)));
        found.sort();
        Ok(found.into_iter().map(|line| without_times(&line)).collect())
    })
}

/// Cache figures of a route change with every packet.
fn without_times(line: &str) -> String {
    line.split_once("CacheInfo").map_or(line, |(before, _)| before).to_owned()
}

fn sysctls() -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["ipv4", "ipv4/conf/all", "ipv4/conf/lo", "ipv4/conf/eth0", "ipv6", "ipv6/conf/all", "ipv6/conf/eth0"]
    {
        for entry in fs::read_dir(Path::new("/proc/sys/net").join(folder)).into_iter().flatten().flatten() {
            if let Ok(value) = fs::read_to_string(entry.path()) {
                found.push(format!("{} = {}", entry.path().display(), value.trim()));
            }
        }
    }
    found.sort();
    found
}

/// Sockets by protocol, address, port and state, but for those that only wait for their time to end.
fn sockets() -> Vec<String> {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let Some([local, remote, state]) = words.get(1..4).and_then(|w| <[&str; 3]>::try_from(w).ok())
                && state != "06"
            {
                found.push(format!("{table} {local} {remote} {state}"));
            }
        }
    }
    found.sort();
    found
}
