//! A long-running part of the cluster (agent, proxy, culvertd, an application) that tests start, kill and restart.

use std::process::ExitStatus;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::process::{Process, Signal, Spec};
use crate::{Error, wait};

type Ready = dyn Fn() -> Result<bool, Error> + Send + Sync;

/// One part: how it is started, when it is ready, and its process while there is one.
pub struct Component {
    spec: Spec,
    ready: Box<Ready>,
    bound: Duration,
    running: Mutex<Option<Process>>,
}

impl std::fmt::Debug for Component {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Component").field("name", &self.spec.name).field("pid", &self.pid()).finish_non_exhaustive()
    }
}

impl Component {
    pub(crate) fn new(spec: Spec, ready: impl Fn() -> Result<bool, Error> + Send + Sync + 'static) -> Self {
        Self { spec, ready: Box::new(ready), bound: wait::READY, running: Mutex::new(None) }
    }

    /// Gives it so long to become ready, instead of [`wait::READY`].
    #[must_use]
    pub(crate) fn ready_within(mut self, bound: Duration) -> Self {
        self.bound = bound;
        self
    }

    /// Starts it and waits until it is ready ([`wait::READY`] unless it was given another bound).
    ///
    /// # Errors
    /// It cannot be started, ends early, or is not ready in time.
    pub fn start(&self) -> Result<(), Error> {
        self.launch()?;
        self.wait_ready()
    }

    /// Starts it without waiting. A process of this part that still runs is killed.
    ///
    /// # Errors
    /// The program is missing, or its surroundings cannot be entered.
    pub fn launch(&self) -> Result<(), Error> {
        let mut running = self.lock();
        *running = None;
        *running = Some(self.spec.start()?);
        Ok(())
    }

    /// A second process of this part beside the first, as during a rolling update; the caller owns it.
    ///
    /// # Errors
    /// As [`Component::launch`].
    pub fn start_another(&self) -> Result<Process, Error> {
        self.spec.start()
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// It is not running, ends early, or is not ready in time.
    pub fn wait_ready(&self) -> Result<(), Error> {
        self.with(|process| process.wait_ready(self.bound, || (self.ready)()))?
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// It is not running.
    pub fn kill(&self) -> Result<ExitStatus, Error> {
        self.with(Process::kill)?
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// It is not running, or does not end in time.
    pub fn terminate(&self, bound: Duration) -> Result<ExitStatus, Error> {
        self.with(|process| process.terminate(bound))?
    }

    /// Sends any signal.
    ///
    /// # Errors
    /// It is not running.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        self.with(|process| process.signal(signal))?
    }

    /// `kill -9`, then [`Component::start`].
    ///
    /// # Errors
    /// As those.
    pub fn restart(&self) -> Result<(), Error> {
        self.launch()?;
        self.wait_ready()
    }

    /// Replaces it in order: the new process is started at once and waits for whatever the old one holds, the old one gets
    /// SIGTERM and has `bound` to end.
    ///
    /// # Errors
    /// The new one cannot be started or does not become ready, or the old one does not end.
    pub fn supersede(&self, bound: Duration) -> Result<ExitStatus, Error> {
        let next = self.spec.start()?;
        let ended = self.terminate(bound)?;
        *self.lock() = Some(next);
        self.wait_ready()?;
        Ok(ended)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It was not started, or does not end in time.
    pub fn wait(&self, bound: Duration) -> Result<ExitStatus, Error> {
        self.with(|process| process.wait(bound))?
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.lock().as_ref().filter(|p| p.running()).map(Process::pid)
    }

    /// The last lines of its log.
    pub fn log_tail(&self, lines: usize) -> String {
        crate::process::tail(&self.spec.log, lines)
    }

    /// How it is started: program, arguments, environment, log file.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    fn with<T>(&self, work: impl FnOnce(&Process) -> T) -> Result<T, Error> {
        match self.lock().as_ref() {
            Some(process) => Ok(work(process)),
            None => Err(Error::Absent(format!("{} was not started", self.spec.name))),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
