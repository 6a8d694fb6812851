//! Asking for names while traffic waits.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::machine::{Answer, Received, SubscribeError};

/// Questions that may wait for the driver to take them.
const QUEUE: usize = 1024;
/// Most callers that may wait for answers.
const MAX_WAITING: usize = 16_384;

/// Asks the server about names of on-demand types. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Demand(mpsc::Sender<Question>);

impl Demand {
    pub(super) fn new() -> (Self, mpsc::Receiver<Question>) {
        let (sender, questions) = mpsc::channel(QUEUE);
        (Self(sender), questions)
    }

    /// Subscribes to a name and waits for the first answer; returns at once if there was one before. When it returns,
    /// the sink has the resource. There is no time limit here: while the server is away it waits.
    pub async fn resolve(&self, type_url: &str, name: &str) -> Result<Answer, DemandError> {
        let (reply, answer) = oneshot::channel();
        let question = Question { type_url: type_url.into(), name: name.into(), reply };
        self.0.try_send(question).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => DemandError::Busy,
            mpsc::error::TrySendError::Closed(_) => DemandError::Closed,
        })?;
        answer.await.map_err(|_| DemandError::Closed)?
    }
}

/// Why a name got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DemandError {
    /// Too many questions are waiting.
    #[error("too many names are being asked for")]
    Busy,
    /// The client has ended.
    #[error("discovery has ended")]
    Closed,
    /// The name cannot be subscribed to.
    #[error(transparent)]
    Subscribe(#[from] SubscribeError),
}

type Reply = oneshot::Sender<Result<Answer, DemandError>>;

#[derive(Debug)]
pub(super) struct Question {
    pub(super) type_url: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) reply: Reply,
}

/// Callers that wait, by type and name.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    callers: HashMap<(Arc<str>, Arc<str>), Vec<Reply>>,
    count: usize,
}

impl Waiting {
    pub(super) fn add(&mut self, question: Question) {
        if self.count >= MAX_WAITING {
            self.prune();
        }
        if self.count >= MAX_WAITING {
            let _ = question.reply.send(Err(DemandError::Busy));
            return;
        }
        self.count += 1;
        self.callers.entry((question.type_url, question.name)).or_default().push(question.reply);
    }

    pub(super) fn resolve(&mut self, type_url: &Arc<str>, received: &Received) {
        for (name, answer) in &received.resolved {
            for caller in self.callers.remove(&(type_url.clone(), name.clone())).unwrap_or_default() {
                self.count -= 1;
                // Nobody there: the caller has given up.
                let _ = caller.send(Ok(*answer));
            }
        }
    }

    /// Forgets those who have given up.
    fn prune(&mut self) {
        self.callers.retain(|_, callers| {
            callers.retain(|caller| !caller.is_closed());
            !callers.is_empty()
        });
        self.count = self.callers.values().map(Vec::len).sum();
    }
}
