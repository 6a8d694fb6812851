//! Whether there is a control plane. Without one the proxy goes on with what it knows; that it does is said in the log once,
//! and once more when there is one again. The numbers are [`super::discovery::DiscoveryMetrics`].

use std::time::{Duration, SystemTime};

use mesh_xds::client::{Handle, Status};
use tokio::time::sleep;

/// Time without discovery after which it is said. Replicas of the control plane that are replaced are away for less.
const PATIENCE: Duration = Duration::from_secs(30);

/// What there is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    /// There has been no discovery for this long.
    Away(Duration),
    /// There is again, after this long.
    Back(Duration),
}

/// What was said.
#[derive(Debug, Default)]
struct Contact {
    /// Since when there has been none, if it was said.
    missed_since: Option<SystemTime>,
}

impl Contact {
    /// What there is to say at `now`, and after how long to judge again though nothing has changed.
    fn judge(&mut self, status: &Status, now: SystemTime) -> (Option<News>, Option<Duration>) {
        // A clock that was set back makes it a little longer.
        let since = |then: SystemTime| now.duration_since(then).unwrap_or_default();
        match (status.disconnected_since, self.missed_since) {
            (Some(lost), None) => match PATIENCE.checked_sub(since(lost)) {
                Some(left) if !left.is_zero() => (None, Some(left)),
                Some(_) | None => {
                    self.missed_since = Some(lost);
                    (Some(News::Away(since(lost))), None)
                }
            },
            (None, Some(lost)) => {
                self.missed_since = None;
                (Some(News::Back(since(lost))), None)
            }
            (Some(_), Some(_)) | (None, None) => (None, None),
        }
    }
}

/// Follows the client of discovery until it ends.
pub async fn watch(discovery: Handle) {
    let mut status = discovery.status();
    let mut contact = Contact::default();
    loop {
        let again = {
            let status = status.borrow_and_update();
            let (news, again) = contact.judge(&status, SystemTime::now());
            if let Some(news) = news {
                tell(news, &status);
            }
            again
        };
        let judged_again = async {
            match again {
                Some(again) => sleep(again).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return },
            () = judged_again => {}
        }
    }
}

fn tell(news: News, status: &Status) {
    let error = status.last_error.as_deref().unwrap_or_default();
    match news {
        News::Away(time) if status.synced => tracing::warn!(
            seconds = time.as_secs(),
            error,
            "the control plane is away; going on with what it said last, and trying again"
        ),
        News::Away(time) => tracing::warn!(
            seconds = time.as_secs(),
            error,
            "the control plane has not answered yet; no connection is carried before it has, trying again"
        ),
        News::Back(time) => tracing::info!(seconds = time.as_secs(), "the control plane is there again"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    fn lost(seconds: u64) -> Status {
        Status { disconnected_since: Some(at(seconds)), ..Status::default() }
    }

    #[test]
    fn what_is_away_for_long_is_said_once_and_its_return_once() {
        let there = Status { connected_since: Some(at(0)), ..Status::default() };
        let mut contact = Contact::default();
        let seconds = |seconds| Duration::from_secs(seconds);
        assert_eq!(contact.judge(&there, at(1000)), (None, None));
        // Away for a moment, twice.
        assert_eq!(contact.judge(&lost(1000), at(1000)), (None, Some(PATIENCE)));
        assert_eq!(contact.judge(&lost(1000), at(1029)), (None, Some(seconds(1))));
        assert_eq!(contact.judge(&there, at(1029)), (None, None));
        assert_eq!(contact.judge(&lost(1030), at(1031)), (None, Some(seconds(29))));
        // For long, however often it is tried.
        assert_eq!(contact.judge(&lost(1030), at(1060)), (Some(News::Away(seconds(30))), None));
        for later in [1061, 5000] {
            assert_eq!(contact.judge(&lost(1030), at(later)), (None, None));
        }
        assert_eq!(contact.judge(&there, at(5030)), (Some(News::Back(seconds(4000))), None));
        assert_eq!(contact.judge(&there, at(5031)), (None, None));
        // Judged late; and by a clock that was set back.
        assert_eq!(contact.judge(&lost(6000), at(7000)), (Some(News::Away(seconds(1000))), None));
        assert_eq!(contact.judge(&there, at(10)), (Some(News::Back(seconds(0))), None));
        assert_eq!(contact.judge(&lost(6000), at(10)), (None, Some(PATIENCE)));
    }
}
