//! One kind of objects, followed for ever: the library's watcher, with what to do about its errors.
//!
//! That a kind's path is not there does not mean yet that the kind is not: its objects may be policies that deny, and without
//! them connections would be let through. So it is asked for by discovery, twice with a pause between; until both say that
//! no version of it is served, what is known stays in force, and before the first list nothing is served. A kind that is
//! gone indeed is gone with its objects: its definition is removed only after they are.

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
/// Times in a row that discovery must not know a kind, and the pause between two of them.
const DENIALS: u32 = 2;
const DENIAL_PAUSE: Duration = Duration::from_secs(2);
/// Time for discovery to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A kind as the API's paths name it in one of its versions.
pub(crate) fn resource(kind: Kind, version: &str) -> ApiResource {
    ApiResource {
        group: kind.group().to_owned(),
        version: version.to_owned(),
        api_version: api_version(kind, version),
        kind: kind.as_str().to_owned(),
        plural: kind.plural().to_owned(),
    }
}

fn api_version(kind: Kind, version: &str) -> String {
    match kind.group() {
        "" => version.to_owned(),
        group => format!("{group}/{version}"),
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
    /// The kind does not seem to exist; ask discovery.
    Discover,
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
    /// The version of its group in which it is followed.
    version: &'static str,
    status: Arc<KindStatus>,
    streams_lists: bool,
    /// Times in a row that discovery did not know the kind.
    denials: u32,
    stream: BoxStream<'static, watcher::Result<Event<Raw>>>,
    pause: Duration,
    /// To wait before the next attempt.
    wait: Option<Duration>,
}

impl Follower {
    fn new(client: kube::Client, kind: Kind, status: Arc<KindStatus>) -> Self {
        let version = kind.version();
        let stream = open(&client, kind, version, true);
        Self { client, kind, version, status, streams_lists: true, denials: 0, stream, pause: FIRST_PAUSE, wait: None }
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
                        self.denials = 0;
                        if self.status.heard(SystemTime::now()) {
                            info!(kind = %self.kind, "the watch goes on");
                        }
                    }
                    return self.step(event);
                }
                Some(Err(error)) => {
                    if let Some(step) = self.failed(&error).await {
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

    async fn failed(&mut self, error: &Error) -> Option<Step> {
        let kind = self.kind;
        match reaction(error, kind.is_built_in(), self.streams_lists) {
            Reaction::UsePages => {
                info!(%kind, %error, "the API server does not stream lists; asking for pages");
                self.streams_lists = false;
                self.restart();
                return None;
            }
            Reaction::Discover => return self.discover(error).await,
            Reaction::Restart => self.restart(),
            Reaction::Resume => {}
        }
        self.trouble(&describe(error));
        None
    }

    /// Asks whether the kind exists, which was not found where it is looked for. Either way it begins with a list when it is.
    async fn discover(&mut self, error: &Error) -> Option<Step> {
        let kind = self.kind;
        let asked = tokio::time::timeout(TIMEOUT, served_version(&self.client, kind)).await;
        let found = match asked {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => Err(describe(&error)),
            Err(_) => Err(format!("no answer from discovery within {TIMEOUT:?}")),
        };
        let before = self.version;
        if let Ok(found) = &found {
            self.version = found.unwrap_or(kind.version());
        }
        self.restart();
        self.denials = if found == Ok(None) { self.denials.saturating_add(1) } else { 0 };
        match found {
            Ok(None) if self.denials >= DENIALS => {
                self.wait = Some(ABSENT_PAUSE);
                if self.status.is_missing() {
                    info!(%kind, "the cluster does not have this kind");
                }
                return Some(Step::Absent);
            }
            Ok(None) => {
                self.status.failed(&describe(error));
                self.wait = Some(DENIAL_PAUSE);
            }
            Ok(Some(version)) if version != before => info!(%kind, version, "the kind is there in another version"),
            Ok(Some(_)) => self.trouble(&describe(error)),
            Err(error) => self.trouble(&error),
        }
        None
    }

    /// Something is wrong; go on after a pause.
    fn trouble(&mut self, error: &str) {
        let kind = self.kind;
        if self.status.failed(error) {
            warn!(%kind, error, "watch failed; what is known stays in force");
        } else {
            debug!(%kind, error, "watch failed again");
        }
        self.wait = Some(self.pause.mul_f64(1.0 - 0.5 * fastrand::f64()));
        self.pause = (self.pause * 2).min(LAST_PAUSE);
    }

    fn restart(&mut self) {
        self.stream = open(&self.client, self.kind, self.version, self.streams_lists);
    }
}

/// The first of the kind's versions that the API server serves; none if it serves none of them.
async fn served_version(client: &kube::Client, kind: Kind) -> kube::Result<Option<&'static str>> {
    for version in kind.versions() {
        match client.list_api_group_resources(&api_version(kind, version)).await {
            Ok(list) if list.resources.iter().any(|resource| resource.name == kind.plural()) => {
                return Ok(Some(version));
            }
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn open(
    client: &kube::Client,
    kind: Kind,
    version: &str,
    streams_lists: bool,
) -> BoxStream<'static, watcher::Result<Event<Raw>>> {
    let api: Api<Raw> = Api::all_with(client.clone(), &resource(kind, version));
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
        404 if !is_built_in => Reaction::Discover,
        // A version that is too old, or from the future (after a restore of etcd), is no place to resume at.
        410 | 504 => Reaction::Restart,
        _ => Reaction::Resume,
    }
}

#[cfg(test)]
mod tests;
