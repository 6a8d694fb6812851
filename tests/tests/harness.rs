//! The harness alone, without the mesh: namespaces, links, capture, resolver, applications, clean-up.

#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tests::app::clients::connect::Report;
use tests::cleanup;
use tests::cluster::{Cluster, Mesh};
use tests::process::Spec;
use tests::{Error, http, wait};

const BOOKINFO: &str = include_str!("bookinfo.yaml");

fn plain() -> tests::cluster::Builder {
    Cluster::builder().mesh(Mesh::Off)
}

#[test]
fn pods_reach_each_other_on_one_node_and_across_and_see_true_addresses() -> Result<(), Error> {
    let cluster = plain().start()?;
    let server =
        cluster.pod("server").node(2).command(["echo", "--mode", "banner", "--listen", "0.0.0.0:7000"]).start()?;
    let far = cluster.pod("far").node(1).start()?;
    let near = cluster.pod("near").node(2).start()?;
    for client in [&far, &near] {
        let report: Report = client.run_json(["connect", "--to", &server.at(7000).to_string(), "--read-line"])?;
        assert!(report.ok, "{report:?}");
        assert_eq!(report.peer, Some(server.at(7000)));
        assert_eq!(report.local.map(|l| l.ip()), Some(client.ip()));
        let banner: Value = serde_json::from_str(&report.received).expect("a banner");
        assert_eq!(banner["peer"].as_str(), report.local.map(|l| l.to_string()).as_deref(), "what the server saw");
        assert_eq!(banner["local"], server.at(7000).to_string());
    }
    let report: Report = far.run_json(["connect", "--to", &server.at(7001).to_string()])?;
    assert_eq!((report.failed.as_deref(), report.error.as_deref()), (Some("connect"), Some("refused")));
    Ok(())
}

#[test]
fn the_applications_keep_their_promises() -> Result<(), Error> {
    let cluster = plain().nodes(2).start()?;
    let server = |name: &str, mode: &str| {
        cluster.pod(name).node(2).command(["echo", "--mode", mode, "--listen", "0.0.0.0:7000"]).start()
    };
    let client = cluster.pod("client").node(1).start()?;
    let (echo, sink, closes) = (server("echo", "echo")?, server("sink", "sink")?, server("closes", "close-first")?);
    let (transfer, resets, answers) =
        (server("transfer", "transfer")?, server("resets", "reset")?, server("answers", "answer")?);
    let at = |pod: &tests::pod::Pod| pod.at(7000).to_string();

    let done = client.run(["half-close", "--sink", &at(&sink), "--close-first", &at(&closes), "--bytes", "100000"])?;
    assert!(done.status.success(), "{done:?}");
    wait::until("the server's report", Duration::from_secs(5), || {
        closes.application().log_tail(50).contains(r#""received":100000"#).then_some(())
    })?;

    let moved: Value = client.run_json([
        "transfer",
        "--to",
        &at(&transfer),
        "--send",
        "5000001",
        "--receive",
        "3000001",
        "--streams",
        "3",
    ])?;
    assert_eq!(
        (&moved["ok"], &moved["sent"], &moved["received"]),
        (&true.into(), &15_000_003.into(), &9_000_003.into()),
        "{moved}"
    );
    let wrong = client.run(["transfer", "--to", &at(&echo), "--send", "2000", "--receive", "1000"])?;
    assert!(!wrong.status.success(), "an echo is not the known stream: {wrong:?}");
    let timed: Value =
        client.run_json(["transfer", "--to", &at(&transfer), "--receive", "1", "--seconds", "0.2", "--no-checksum"])?;
    assert!(timed["received"].as_u64().is_some_and(|b| b > 1 << 20), "{timed}");

    let many: Value = client.run_json(["parallel", "--to", &at(&echo), "--connections", "500"])?;
    assert_eq!((&many["ok"], &many["succeeded"]), (&true.into(), &500.into()), "{many}");

    let reset: Report = client.run_json(["connect", "--to", &at(&resets), "--send", "x", "--read", "1"])?;
    assert_eq!((reset.failed.as_deref(), reset.error.as_deref()), (Some("read"), Some("reset")));

    let load: tests::app::load::Report = client.run_json([
        "load",
        "--to",
        &at(&answers),
        "--kind",
        "connections",
        "--clients",
        "8",
        "--seconds",
        "0.5",
    ])?;
    assert!(load.ok && load.operations > 100 && load.p50_us > 0 && load.p99_us >= load.p50_us, "{load:?}");

    let held = client.spawn(["hold", "--to", &at(&echo), "--interval", "5"])?;
    held.wait_for(r#""event":"alive""#, Duration::from_secs(5))?;
    echo.application().kill()?;
    let ended = held.finish(Duration::from_secs(5))?;
    let end: Value = ended.json()?;
    assert_eq!((ended.status.success(), &end["event"], &end["ok"]), (false, &"end".into(), &false.into()), "{end}");
    Ok(())
}

#[test]
fn a_capture_finds_the_marker_on_every_link_it_passes_and_nowhere_else() -> Result<(), Error> {
    let marker = "marker-that-only-this-test-sends";
    let cluster = plain().capture(marker).also_look_for("never-sent").start()?;
    let server = cluster.pod("server").node(2).command(["echo", "--listen", "0.0.0.0:7000"]).start()?;
    let client = cluster.pod("client").node(1).start()?;
    let other = cluster.pod("other").node(2).start()?;
    let to = server.at(7000).to_string();
    let with = client.run(["connect", "--to", &to, "--send", "a MARKER b", "--read", "20"])?;
    let without = other.run(["connect", "--to", &to, "--send", "nothing special", "--read", "15"])?;
    assert!(with.status.success() && without.status.success(), "{with:?} {without:?}");

    let report = cluster.finish_capture()?;
    // Out and back on: client's link, both nodes' links to the fabric, server's link.
    assert_eq!(report.marked(marker).count(), 8, "{:#?}", report.marked(marker).collect::<Vec<_>>());
    assert_eq!(report.marked("never-sent").count(), 0);
    let ends = [client.ip(), server.ip()];
    assert!(report.marked(marker).all(|(_, f)| ends.contains(&f.source.ip()) && ends.contains(&f.destination.ip())));
    assert!(report.marked(marker).all(|(_, f)| !f.is_tls() && f.connections == 1 && f.first.starts_with(b"a marker")));
    let quiet = [other.ip()];
    let seen = report.between(&quiet, &ends).count();
    assert_eq!(seen, 4, "the conversation on one node passes two links, twice");
    assert!(report.fabric().all(|(_, f)| f.source.ip() != quiet[0]), "and never the fabric");
    Ok(())
}

#[test]
fn a_capture_keeps_up_with_bulk() -> Result<(), Error> {
    let cluster = plain().capture("at-the-very-end").start()?;
    let server =
        cluster.pod("server").node(2).command(["echo", "--mode", "transfer", "--listen", "0.0.0.0:7000"]).start()?;
    let client = cluster.pod("client").node(1).start()?;
    let bytes = (256_u64 << 20).to_string();
    let to = server.at(7000).to_string();
    let moved: Value =
        client.run_json(["transfer", "--to", &to, "--send", &bytes, "--receive", &bytes, "--no-checksum"])?;
    assert_eq!(moved["ok"], true, "{moved}");
    let report = cluster.finish_capture()?;
    let payload: u64 = report.fabric().filter(|(_, f)| f.source.port() == 7000).map(|(_, f)| f.payload).sum();
    assert!(payload >= 2 * (256 << 20), "both nodes' links saw all of it: {payload}");
    Ok(())
}

#[test]
fn bookinfo_serves_pages_to_the_machine_and_names_resolve() -> Result<(), Error> {
    let cluster = plain().capture("bookinfo-marker").start()?;
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("bookinfo.yaml"), BOOKINFO).expect("written");
    let pods = cluster.deploy(folder.path())?;
    assert_eq!(pods.len(), 6);
    assert_eq!(pods.iter().map(|p| p.node()).collect::<BTreeSet<_>>(), BTreeSet::from([1, 2]));
    let page = pods.iter().find(|p| p.name().starts_with("productpage")).expect("a product page");
    let forward = cluster.forward(0, page.at(9080))?;

    let mut versions = BTreeSet::new();
    for _ in 0..60 {
        let stream = std::net::TcpStream::connect(forward.local()).expect("the port-forward");
        let answer = http::exchange(stream, "GET", "bookinfo", "/productpage")?;
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.contains("William Shakespeare"), "{}", answer.body);
        versions.extend(["v1", "v2", "v3"].into_iter().filter(|v| answer.body.contains(&format!("reviews {v}"))));
    }
    assert_eq!(versions.len(), 3, "{versions:?}");

    // Outside the mesh a name gives the pods, whichever way it is written; a service without ready pods gives none.
    let addresses = |asked: &str| -> Result<BTreeSet<String>, Error> {
        let answer: Value = page.run_json(["resolve", asked])?;
        Ok(answer["addresses"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect())
    };
    let reviews: BTreeSet<String> =
        pods.iter().filter(|p| p.name().starts_with("reviews")).map(|p| p.ip().to_string()).collect();
    for name in ["reviews", "reviews.bookinfo", "reviews.bookinfo.svc", "reviews.bookinfo.svc.cluster.local"] {
        assert_eq!(addresses(name)?, reviews, "{name}");
    }
    assert_eq!(addresses("reviews.elsewhere")?.len(), 0);
    let unready = pods.iter().find(|p| p.name().starts_with("reviews-v1")).expect("reviews v1");
    unready.set_ready(false)?;
    assert_eq!(addresses("reviews")?.len(), 2);

    let report = cluster.finish_capture()?;
    assert!(report.fabric().any(|(_, f)| f.markers == ["bookinfo-marker"]), "the services talk in clear");
    Ok(())
}

#[test]
fn the_folder_shows_the_cluster_as_the_api_server_would() -> Result<(), Error> {
    let cluster = plain().nodes(1).start()?;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {app: web}\n  ports: [{port: 80, targetPort: 8080}]\n";
    cluster.apply("web.yaml", service)?;
    let ip = cluster.directory().cluster_ip("default", "web").expect("a ClusterIP");
    cluster.apply("web.yaml", service)?;
    assert_eq!(cluster.directory().cluster_ip("default", "web"), Some(ip), "kept when applied again");
    let pod = cluster.pod("web").label("app", "web").service_account("web-account").enrolled(true).start()?;
    let text = std::fs::read_to_string(cluster.directory().folder().join("pod-default-web.yaml")).expect("the pod");
    let object = &tests::kube::parse("pod", &text)?[0];
    assert_eq!(object["status"]["podIP"], pod.ip().to_string());
    assert_eq!(object["status"]["conditions"][0]["status"], "True");
    assert_eq!(object["spec"]["nodeName"], "node1");
    assert_eq!(object["metadata"]["labels"]["istio.io/dataplane-mode"], "ambient");
    assert_eq!(object["metadata"]["annotations"].get(tests::kube::REDIRECTION), None, "nobody confirmed it");
    assert!(cluster.directory().folder().join("serviceaccount-default-web-account.yaml").exists());
    assert_eq!(cluster.directory().endpoints("default", "web").len(), 1);
    let dotted = std::fs::read_dir(cluster.directory().folder()).expect("folder").flatten();
    assert!(
        dotted.map(|e| e.file_name().into_string().expect("text")).all(|n| !n.starts_with('.')),
        "nothing half written"
    );

    let held = pod.spawn(["echo", "--listen", "0.0.0.0:1"])?;
    assert!(pod.group()?.processes().contains(&held.process.pid().cast_signed()));
    assert!(pod.group()?.resident() > 0 && pod.group()?.cpu().is_some());
    cluster.delete(&pod)?;
    assert!(!held.process.running(), "its processes are gone");
    assert!(!cluster.directory().folder().join("pod-default-web.yaml").exists());
    Ok(())
}

/// What a cluster could leave behind on the machine.
fn traces(id: &str) -> Vec<PathBuf> {
    let hierarchy = tests::cgroup::Hierarchy::detect().expect("cgroup v2");
    let group = format!("{}{id}", cleanup::GROUP_PREFIX);
    let groups = std::iter::once(hierarchy.unified).chain(hierarchy.memory).map(|m| m.join(&group));
    groups.chain([Path::new(cleanup::ROOT).join(id)]).filter(|p| p.exists()).collect()
}

/// True unless there is no such process or it only waits to be reaped.
fn alive(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

fn machine() -> (String, Vec<String>, String) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    let links = std::fs::read_dir("/sys/class/net").expect("links").flatten();
    let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("sysctl");
    (mounts, links.map(|l| l.file_name().into_string().expect("text")).collect(), forwarding)
}

#[test]
fn nothing_is_left_and_the_machine_is_never_touched() -> Result<(), Error> {
    let before = machine();
    let cluster = plain().start()?;
    let pod = cluster.pod("server").command(["echo", "--listen", "0.0.0.0:7000"]).start()?;
    let id = cluster.id();
    assert!(traces(&id).len() >= 2, "{:?}", traces(&id));
    assert_eq!(machine(), before, "while it runs");
    let seen = cluster.mounts().run(|| std::fs::read_to_string("/proc/thread-self/mounts").expect("mounts"))?;
    assert!(
        seen.contains(&cluster.node(1)?.bpffs().display().to_string()),
        "the cluster itself sees its BPF filesystem"
    );
    let pid = pod.application().pid().expect("running");
    drop(cluster);
    assert_eq!(traces(&id), Vec::<PathBuf>::new());
    assert!(!alive(pid.into()));
    assert_eq!(machine(), before, "afterwards");
    Ok(())
}

/// Not a test of its own: the harness that the next one kills. Without the variable it does nothing.
#[test]
fn victim() -> Result<(), Error> {
    let Some(report) = std::env::var_os("CULVERT_TEST_VICTIM") else { return Ok(()) };
    let cluster = plain().start()?;
    let pod = cluster.pod("server").command(["echo", "--listen", "0.0.0.0:7000"]).start()?;
    // One that outlives the harness's death, as a process does that changed its user.
    let script = r#"trap "" HUP; setpriv --pdeathsig clear sleep 600"#;
    let stubborn = pod.spawn_program("/bin/sh", ["-c", script])?;
    wait::until("a child of its own", wait::READY, || {
        let pids = pod.group().ok()?.processes();
        (pids.len() >= 3).then(|| {
            let text = serde_json::json!({"id": cluster.id(), "pids": pids});
            std::fs::write(&report, text.to_string()).expect("reported");
        })
    })?;
    stubborn.process.wait(Duration::from_secs(600))?;
    Ok(())
}

#[test]
fn a_killed_harness_is_cleaned_up_after() -> Result<(), Error> {
    let folder = tempfile::tempdir().expect("a folder");
    let report = folder.path().join("report");
    let own = std::env::current_exe().expect("own path");
    let victim = Spec::new("victim", own, folder.path().join("log")).args(["--exact", "victim"]);
    let victim = victim.env("CULVERT_TEST_VICTIM", &report).start()?;
    let text = wait::until("the victim's report", wait::READY, || {
        std::fs::read_to_string(&report).ok().filter(|t| t.ends_with('}'))
    })?;
    let told: Value = serde_json::from_str(&text).expect("a report");
    let id = told["id"].as_str().expect("an id").to_owned();
    assert!(!cleanup::sweep()?.contains(&id), "a living cluster is left alone");
    assert!(traces(&id).len() >= 2);
    victim.kill()?;
    let alive = |pid: &Value| pid.as_u64().is_some_and(alive);
    let pids = told["pids"].as_array().expect("pids");
    assert!(pids.iter().any(alive), "one outlives its harness, or this test shows nothing");
    // Another test of this program may sweep at the same moment: what counts is that nothing is left.
    cleanup::sweep()?;
    wait::until("nothing left", Duration::from_secs(10), || traces(&id).is_empty().then_some(()))?;
    assert!(!pids.iter().any(alive));
    Ok(())
}
