//! Load from one pod on others, counted at both ends.

use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;
use std::time::Duration;

use tests::Error;
use tests::app::numbered::{Counts, QUERY};
use tests::app::storm::Report;
use tests::pod::{Pod, Running};
use tests::process::Signal;

/// A storm in progress.
pub struct Storm {
    running: Running,
    servers: Vec<Arc<Pod>>,
    before: Counts,
}

impl Storm {
    /// `culvert-app storm` in the client's pod against port 7000 of every address of the servers.
    pub fn start(client: &Arc<Pod>, servers: &[Arc<Pod>]) -> Result<Self, Error> {
        let mut args = vec!["storm".to_owned()];
        for ip in servers.iter().flat_map(|server| server.ips()) {
            let target = std::net::SocketAddr::new(ip, 7000).to_string();
            super::until_connected_only(client, &target);
            args.extend(["--to".to_owned(), target]);
        }
        let before = counts(servers);
        let running = client.spawn(args)?;
        running.wait_for("started", Duration::from_secs(10))?;
        Ok(Self { running, servers: servers.to_vec(), before })
    }

    /// Ends it in order; what the client counted, and what the servers did in the same time.
    pub fn finish(self) -> Result<(Report, Counts), Error> {
        self.running.process.signal(Signal::SIGTERM)?;
        let report = self.running.finish(Duration::from_secs(30))?.json()?;
        let (after, before) = (counts(&self.servers), self.before);
        let counts = Counts {
            requests: after.requests - before.requests,
            duplicates: after.duplicates - before.duplicates,
            streams: after.streams - before.streams,
            ended_streams: after.ended_streams - before.ended_streams,
            messages: after.messages - before.messages,
            gaps: after.gaps - before.gaps,
        };
        Ok((report, counts))
    }
}

/// Lets the load go on for a while: the load is what is tested, not the moment.
pub fn settled(time: Duration) {
    std::thread::sleep(time);
}

/// The sum over the servers, asked of each over its own loopback.
fn counts(servers: &[Arc<Pod>]) -> Counts {
    let mut sum = Counts::default();
    for server in servers {
        let mut stream = server.network().connect(([127, 0, 0, 1], 7000).into(), Duration::from_secs(5)).unwrap();
        stream.write_all(&[QUERY]).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        let one: Counts = serde_json::from_str(&line).unwrap();
        sum.requests += one.requests;
        sum.duplicates += one.duplicates;
        sum.streams += one.streams;
        sum.ended_streams += one.ended_streams;
        sum.messages += one.messages;
        sum.gaps += one.gaps;
    }
    sum
}
