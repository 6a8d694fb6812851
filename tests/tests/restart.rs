//! Any part may be killed and started again. While no proxy runs nothing leaves a pod in clear.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{connect, echo, until_connected};
use tests::Error;
use tests::cluster::Cluster;

const MARKER: &str = "marker-of-the-restart-test";
const BOUND: Duration = Duration::from_secs(20);

#[test]
fn the_agent_dies_and_comes_back() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = echo(&cluster, "server", 2).enrolled(true).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    let to = server.at(7000).to_string();
    let held = client.spawn(["hold", "--to", &to, "--for", "600000", "--interval", "20"])?;
    held.wait_for("\"event\":\"alive\"", BOUND)?;

    cluster.node(1)?.agent()?.kill()?;
    // No agent: what is captured stays captured and is carried.
    let ask = ["--send", "hello", "--read", "5"];
    for _ in 0..10 {
        let seen = connect(&client, &to, &ask);
        assert!(seen.ok, "{seen:?}");
    }
    cluster.node(1)?.agent()?.start()?;
    until_connected(&client, &to);
    let late = cluster.pod("late").node(1).enrolled(true).start()?;
    until_connected(&late, &to);
    assert!(!held.stdout().contains("\"event\":\"end\""), "{}", held.stdout());
    Ok(())
}

#[test]
fn the_proxy_dies_and_nothing_leaves_in_clear() -> Result<(), Error> {
    let cluster = Cluster::builder().capture(MARKER).start()?;
    let server = echo(&cluster, "server", 2).enrolled(true).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    let to = server.at(7000).to_string();
    until_connected(&client, &to);

    cluster.node(1)?.proxy()?.kill()?;
    let ask = ["--send", "MARKER", "--read", "5", "--timeout", "700"];
    for _ in 0..3 {
        let seen = connect(&client, &to, &ask);
        assert!(!seen.ok, "no proxy, yet it was answered: {seen:?}");
    }
    cluster.node(1)?.proxy()?.start()?;
    until_connected(&client, &to);
    let report = cluster.finish_capture()?;
    let leaked: Vec<_> = report.marked(MARKER).collect();
    assert!(leaked.is_empty(), "in clear: {leaked:?}");
    Ok(())
}

#[test]
fn the_control_plane_dies_and_traffic_goes_on() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let server = echo(&cluster, "server", 2).enrolled(true).start()?;
    let client = cluster.pod("client").node(1).enrolled(true).start()?;
    let to = server.at(7000).to_string();
    until_connected(&client, &to);
    let control = cluster.control()?;
    let is_connected = |expected: f64| {
        let shown = |index: usize| {
            let text = cluster.node(index).ok()?.metrics().ok()?;
            let gauge = |name: &str| tests::metrics::samples(&text, name).next().map(|sample| sample.value);
            Some((gauge("culvert_xds_connected")?, gauge("culvert_xds_disconnected_seconds")?))
        };
        tests::wait::until(&format!("both proxies say that connected is {expected}"), BOUND, || {
            let both = [shown(1)?, shown(2)?];
            both.iter()
                .all(|(connected, lost)| *connected == expected && (*lost == 0.0 || expected == 0.0))
                .then_some(())
        })
    };
    is_connected(1.0)?;
    control.component.kill()?;
    is_connected(0.0)?;
    for _ in 0..5 {
        let seen = connect(&client, &to, &["--send", "hello", "--read", "5"]);
        assert!(seen.ok, "{seen:?}");
    }
    control.component.start()?;
    is_connected(1.0)?;
    let late = echo(&cluster, "late", 2).enrolled(true).start()?;
    until_connected(&client, &late.at(7000).to_string());
    Ok(())
}
