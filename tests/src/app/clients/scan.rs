//! Every port of an address.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::Args;
use futures_util::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;

use super::bound;
use crate::app::net;

/// `culvert-app scan`.
#[derive(Debug, Args)]
pub struct Options {
    /// The address.
    #[arg(long)]
    to: IpAddr,
    /// The first port.
    #[arg(long, default_value_t = 1)]
    from: u16,
    /// Connections that are tried at a time.
    #[arg(long, default_value_t = 1024)]
    at_a_time: usize,
    /// Bound of each connect in milliseconds.
    #[arg(long, default_value_t = 15_000)]
    timeout: u64,
    /// How long what is connected must say nothing, in milliseconds, to count as open.
    #[arg(long, default_value_t = 3000)]
    silence: u64,
}

/// What `culvert-app scan` prints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Ports that took a connection and kept it, or said something.
    pub open: Vec<u16>,
    /// How many did not take one, by the kind of failure as [`net::kind`] names it.
    pub failed: BTreeMap<String, usize>,
    /// How many took one and ended it without a word.
    pub ended: usize,
}

impl Report {
    /// How many ports were tried.
    pub fn tried(&self) -> usize {
        self.open.len() + self.ended + self.failed.values().sum::<usize>()
    }
}

/// What came of one port.
enum Outcome {
    Failed(&'static str),
    Ended,
    Open,
}

/// Tries each port once, and those that seem open once more, one after the other: where all of them are answered by a proxy, a
/// busy one takes its time to end what leads nowhere.
///
/// # Errors
/// None: failures are part of the report.
pub async fn run(options: Options) -> io::Result<bool> {
    let time = (bound(options.timeout), bound(options.silence));
    let attempts =
        (options.from..=u16::MAX).map(|port| async move { (port, one((options.to, port).into(), time).await) });
    let mut outcomes: Vec<_> = stream::iter(attempts).buffer_unordered(options.at_a_time.max(1)).collect().await;
    for (port, outcome) in &mut outcomes {
        if matches!(outcome, Outcome::Open) {
            *outcome = one((options.to, *port).into(), time).await;
        }
    }
    let mut report = Report::default();
    for (port, outcome) in outcomes {
        match outcome {
            Outcome::Failed(kind) => *report.failed.entry(kind.to_owned()).or_default() += 1,
            Outcome::Ended => report.ended += 1,
            Outcome::Open => report.open.push(port),
        }
    }
    report.open.sort_unstable();
    net::emit(&report);
    Ok(true)
}

async fn one(to: SocketAddr, (connecting, silence): (Duration, Duration)) -> Outcome {
    let mut stream = match net::connect(to, connecting).await {
        Ok(stream) => stream,
        Err(error) => return Outcome::Failed(net::kind(&error)),
    };
    match tokio::time::timeout(silence, stream.read(&mut [0])).await {
        Ok(Ok(0) | Err(_)) => Outcome::Ended,
        Ok(Ok(_)) | Err(_) => Outcome::Open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_listens_is_open_and_who_hangs_up_has_ended() {
        let time = (Duration::from_secs(20), Duration::from_millis(100));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        assert!(matches!(one(to, time).await, Outcome::Open), "the kernel takes it");
        listener.accept().await.unwrap();
        let hang_up = async { drop(listener.accept().await) };
        let (outcome, ()) = tokio::join!(one(to, (time.0, Duration::from_secs(20))), hang_up);
        assert!(matches!(outcome, Outcome::Ended));
        drop(listener);
        assert!(matches!(one(to, time).await, Outcome::Failed("refused")));
    }
}
