//! One kind of objects, followed for ever: the library's watcher, with what to do about its errors.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::stream::{BoxStream, Stream, StreamExt, unfold};
use kube::Api;
use kube::api::ApiResource;
use kube::runtime::watcher::{self, Config, Error, Event, watcher};
use tracing::{debug, info, warn};

use super::cluster::describe;
use super::raw::Raw;
use super::status::KindStatus;
use crate::api::Kind;

/// Objects of one page of a list, where the API server does not stream them.
const PAGE: u32 = 500;
/// Pauses after errors: doubled from the first to the last, less up to half, so that not all come back at once.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// How often it is looked whether a kind has come to exist.
const ABSENT_PAUSE: Duration = Duration::from_secs(15);

/// A kind as the API's paths name it.
fn resource(kind: Kind) -> ApiResource {
    ApiResource {
        group: kind.group().to_owned(),
        version: kind.version().to_owned(),
        api_version: kind.api_version().to_owned(),
        kind: kind.as_str().to_owned(),
        plural: kind.plural().to_owned(),
    }
}

/// What has happened.
#[derive(Debug)]
pub(super) enum Step {
    /// A list begins.
    Listing,
    /// The object is there.
    Present(Raw),
    /// The object is gone.
    Gone(Raw),
    /// The list is complete.
    Listed,
    /// The cluster does not have this kind: a list that is complete and empty.
    Absent,
}

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reaction {
    /// Go on, after a pause.
    Resume,
    /// List everything anew, after a pause.
    Restart,
    /// The server does not stream lists: ask for pages.
    UsePages,
    /// The kind does not exist; look again later.
    Absent,
}

/// Follows a kind. The stream never ends.
pub(super) fn follow(
    client: kube::Client,
    kind: Kind,
    status: Arc<KindStatus>,
) -> impl Stream<Item = Step> + Send + 'static {
    let follower = Follower::new(client, kind, status);
    unfold(follower, |mut follower| async move {
        let step = follower.next().await;
        Some((step, follower))
    })
}

struct Follower {
    client: kube::Client,
    kind: Kind,
    status: Arc<KindStatus>,
    streams_lists: bool,
    stream: BoxStream<'static, watcher::Result<Event<Raw>>>,
    pause: Duration,
    /// To wait before the next attempt.
    wait: Option<Duration>,
}

impl Follower {
    fn new(client: kube::Client, kind: Kind, status: Arc<KindStatus>) -> Self {
        let stream = open(&client, kind, true);
        Self { client, kind, status, streams_lists: true, stream, pause: FIRST_PAUSE, wait: None }
    }

    async fn next(&mut self) -> Step {
        loop {
            if let Some(wait) = self.wait.take() {
                tokio::time::sleep(wait).await;
            }
            match self.stream.next().await {
                Some(Ok(event)) => {
                    // A list that only begins is no success: the next thing may be its error.
                    if !matches!(event, Event::Init) {
                        self.pause = FIRST_PAUSE;
                        if self.status.heard(SystemTime::now()) {
                            info!(kind = %self.kind, "the watch goes on");
                        }
                    }
                    return self.step(event);
                }
                Some(Err(error)) => {
                    if let Some(step) = self.failed(&error) {
                        return step;
                    }
                }
                // The watcher never ends; if it did, it would be begun anew.
                None => self.restart(),
            }
        }
    }

    fn step(&self, event: Event<Raw>) -> Step {
        match event {
            Event::Init => {
                self.status.list_began();
                Step::Listing
            }
            Event::InitApply(raw) | Event::Apply(raw) => Step::Present(raw),
            Event::Delete(raw) => Step::Gone(raw),
            Event::InitDone => {
                if self.status.list_ended() {
                    info!(kind = %self.kind, "listed");
                }
                Step::Listed
            }
        }
    }

    fn failed(&mut self, error: &Error) -> Option<Step> {
        let kind = self.kind;
        match reaction(error, kind.is_built_in(), self.streams_lists) {
            Reaction::UsePages => {
                info!(%kind, %error, "the API server does not stream lists; asking for pages");
                self.streams_lists = false;
                self.restart();
                return None;
            }
            Reaction::Absent => {
                self.wait = Some(ABSENT_PAUSE);
                // Whatever it was at, it begins with a list once the kind is there.
                self.restart();
                if self.status.is_missing() {
                    info!(%kind, "the cluster does not have this kind");
                }
                return Some(Step::Absent);
            }
            Reaction::Restart => self.restart(),
            Reaction::Resume => {}
        }
        let text = describe(error);
        if self.status.failed(&text) {
            warn!(%kind, error = text, "watch failed; what is known stays in force");
        } else {
            debug!(%kind, error = text, "watch failed again");
        }
        self.wait = Some(self.pause.mul_f64(1.0 - 0.5 * fastrand::f64()));
        self.pause = (self.pause * 2).min(LAST_PAUSE);
        None
    }

    fn restart(&mut self) {
        self.stream = open(&self.client, self.kind, self.streams_lists);
    }
}

fn open(client: &kube::Client, kind: Kind, streams_lists: bool) -> BoxStream<'static, watcher::Result<Event<Raw>>> {
    let api: Api<Raw> = Api::all_with(client.clone(), &resource(kind));
    let config = Config::default().page_size(PAGE);
    watcher(api, if streams_lists { config.streaming_lists() } else { config }).boxed()
}

fn reaction(error: &Error, is_built_in: bool, streams_lists: bool) -> Reaction {
    let code = match error {
        Error::InitialListFailed(kube::Error::Api(status)) | Error::WatchStartFailed(kube::Error::Api(status)) => {
            status.code
        }
        // The event cannot be read, and is lost; only a list tells what it said.
        Error::WatchFailed(kube::Error::SerdeError(_)) | Error::NoResourceVersion => return Reaction::Restart,
        Error::InitialListFailed(_) | Error::WatchStartFailed(_) | Error::WatchError(_) | Error::WatchFailed(_) => 0,
    };
    match code {
        // 422 and 400: the parameter is forbidden, or not known.
        400 | 422 if streams_lists && matches!(error, Error::WatchStartFailed(_)) => Reaction::UsePages,
        404 if !is_built_in => Reaction::Absent,
        // A version that is too old, or from the future (after a restore of etcd), is no place to resume at.
        410 | 504 => Reaction::Restart,
        _ => Reaction::Resume,
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn refused(code: u16) -> kube::Error {
        let status = Status { code, reason: "Reason".to_owned(), message: "told so".to_owned(), ..Status::default() };
        kube::Error::Api(Box::new(status))
    }

    #[test]
    fn errors_are_answered_by_what_they_mean() {
        let start = |code| Error::WatchStartFailed(refused(code));
        let list = |code| Error::InitialListFailed(refused(code));
        assert_eq!(reaction(&start(422), true, true), Reaction::UsePages);
        assert_eq!(reaction(&start(400), true, false), Reaction::Resume);
        assert_eq!(reaction(&start(410), true, false), Reaction::Restart);
        assert_eq!(reaction(&start(404), false, true), Reaction::Absent);
        assert_eq!(reaction(&list(404), false, false), Reaction::Absent);
        for code in [401, 403, 429, 500, 503] {
            assert_eq!(reaction(&list(code), false, false), Reaction::Resume, "{code}");
        }
        assert_eq!(reaction(&list(404), true, false), Reaction::Resume);
        let unreadable = serde_json::from_str::<u8>("x").unwrap_err();
        assert_eq!(reaction(&Error::WatchFailed(kube::Error::SerdeError(unreadable)), true, true), Reaction::Restart);
        assert!(describe(&list(403)).contains("told so"));
    }

    #[test]
    fn groups_are_those_of_the_kind() {
        let slices = resource(Kind::EndpointSlice);
        assert_eq!((slices.group.as_str(), slices.version.as_str()), ("discovery.k8s.io", "v1"));
        let pods = resource(Kind::Pod);
        assert_eq!((pods.group.as_str(), pods.version.as_str(), pods.api_version.as_str()), ("", "v1", "v1"));
        let policies = resource(Kind::AuthorizationPolicy);
        assert_eq!((policies.group.as_str(), policies.plural.as_str()), ("security.istio.io", "authorizationpolicies"));
    }
}
