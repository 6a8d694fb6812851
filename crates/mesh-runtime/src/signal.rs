//! What ends the process: SIGTERM, SIGINT, or a request from inside (the admin page).

use std::io;
use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

/// Waits for the first SIGTERM or SIGINT. Fails if the handlers cannot be installed.
pub async fn shutdown() -> io::Result<Reason> {
    Ok(Shutdown::new()?.wait().await)
}

/// Why the process should end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// SIGTERM, from whoever supervises the process.
    Terminate,
    /// SIGINT, from the terminal.
    Interrupt,
    /// A [`Requester`].
    Requested,
}

/// The process's end, from the moment it is made: a signal that comes before [`Shutdown::wait`] is not lost.
#[derive(Debug)]
pub struct Shutdown {
    terminate: Signal,
    interrupt: Signal,
    requester: Requester,
}

impl Shutdown {
    /// Installs the handlers. Needs a tokio runtime; fails if the kernel refuses a handler.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            requester: Requester::default(),
        })
    }

    /// A handle that ends the process from inside.
    pub fn requester(&self) -> Requester {
        self.requester.clone()
    }

    /// Waits for the next reason to end. May be called again, to let a second signal cut a drain short.
    pub async fn wait(&mut self) -> Reason {
        tokio::select! {
            _ = self.terminate.recv() => Reason::Terminate,
            _ = self.interrupt.recv() => Reason::Interrupt,
            () = self.requester.0.notified() => Reason::Requested,
        }
    }
}

/// Asks the process to end.
#[derive(Clone, Debug, Default)]
pub struct Requester(Arc<Notify>);

impl Requester {
    /// Makes [`Shutdown::wait`] return, now or when it is next called.
    pub fn request(&self) {
        self.0.notify_one();
    }

    /// Resolves once asked. For servers that have no [`Shutdown`], such as tests.
    pub async fn requested(&self) {
        self.0.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal, raise};

    use super::*;

    // One test, because signals are the process's, not the test's.
    #[tokio::test]
    async fn every_reason_is_told() {
        let mut shutdown = Shutdown::new().unwrap();
        raise(Signal::SIGTERM).unwrap();
        assert_eq!(shutdown.wait().await, Reason::Terminate);
        raise(Signal::SIGINT).unwrap();
        assert_eq!(shutdown.wait().await, Reason::Interrupt);
        shutdown.requester().request();
        assert_eq!(shutdown.wait().await, Reason::Requested);
    }
}
