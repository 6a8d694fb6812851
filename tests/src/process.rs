//! Child processes: where they run, their logs, and their end.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

pub use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::cgroup::Cgroup;
use crate::error::Context;
use crate::mounts::MountNs;
use crate::netns::NetNs;
use crate::spawn::{self, Surroundings};
use crate::{Error, wait};

/// How to start a process. Standard input is empty; it leads a process group of its own, so that Ctrl-C at the
/// terminal reaches the harness alone; it dies with the harness.
#[derive(Debug, Clone)]
pub struct Spec {
    /// What messages call it.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Added to the harness's environment.
    pub env: Vec<(OsString, OsString)>,
    /// Standard output and error are appended here.
    pub log: PathBuf,
    /// Standard output alone goes here instead, if set.
    pub stdout: Option<PathBuf>,
    /// Network namespace; the harness's own if none.
    pub network: Option<Arc<NetNs>>,
    /// Mount namespace; the harness's own if none.
    pub mounts: Option<Arc<MountNs>>,
    /// Control group; the harness's own if none.
    pub group: Option<Cgroup>,
    /// Bind mounts (from, to) that this process alone sees.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Mount points that this process does not see.
    pub hidden: Vec<PathBuf>,
}

impl Spec {
    /// A process in the harness's own surroundings.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            log: log.into(),
            stdout: None,
            network: None,
            mounts: None,
            group: None,
            binds: Vec::new(),
            hidden: Vec::new(),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable to the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// The program is missing, or its surroundings cannot be entered.
    pub fn start(&self) -> Result<Process, Error> {
        if self.program.components().count() > 1 && !self.program.exists() {
            return Err(Error::MissingProgram(self.program.clone()));
        }
        let log = append(&self.log)?;
        let stdout = match &self.stdout {
            Some(path) => File::create(path).during(|| format!("making {}", path.display()))?,
            None => log.try_clone().during(|| "duplicating a log".to_owned())?,
        };
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.env.iter().map(|(n, v)| (n, v)));
        command.stdin(Stdio::null()).stdout(stdout).stderr(log).process_group(0);
        let mut surroundings =
            Surroundings { network: self.network.clone(), mounts: self.mounts.clone(), ..Surroundings::default() };
        for entrance in self.group.iter().flat_map(Cgroup::entrances) {
            let file = OpenOptions::new().write(true).open(&entrance);
            surroundings.groups.push(file.during(|| format!("opening {}", entrance.display()))?);
        }
        let named = |path: &PathBuf| spawn::c_path(path).during(|| format!("the path {}", path.display()));
        for (from, to) in &self.binds {
            surroundings.binds.push((named(from)?, named(to)?));
        }
        surroundings.hidden = self.hidden.iter().map(named).collect::<Result<_, _>>()?;
        spawn::prepare(&mut command, surroundings);
        let child = start(command).during(|| format!("starting {} ({})", self.name, self.program.display()))?;
        Ok(Process { name: self.name.clone(), pid: child.id(), child: Mutex::new(child), log: self.log.clone() })
    }
}

fn append(path: &Path) -> Result<File, Error> {
    OpenOptions::new().create(true).append(true).open(path).during(|| format!("opening {}", path.display()))
}

/// Starts a child from a thread that lives as long as the process: the kernel's "kill on parent's death" means the
/// thread that forked, and a test's thread ends with its test.
fn start(command: Command) -> std::io::Result<Child> {
    type Job = (Command, Sender<std::io::Result<Child>>);
    static STARTER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let gone = || std::io::Error::other("the thread that starts processes is gone");
    let starter = STARTER.get_or_init(|| {
        let (send, receive) = channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in receive {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(send)
    });
    let (answer, child) = channel();
    starter.lock().unwrap_or_else(PoisonError::into_inner).send((command, answer)).map_err(|_gone| gone())?;
    child.recv().map_err(|_gone| gone())?
}

/// A running (or ended) child. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: u32,
    child: Mutex<Child>,
    log: PathBuf,
}

impl Process {
    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last `lines` lines of its log.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }

    /// How it ended; None while it runs.
    pub fn status(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait().ok().flatten()
    }

    /// True while it runs.
    pub fn running(&self) -> bool {
        self.status().is_none()
    }

    /// Sends a signal. A process that has ended is left alone.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        // The id cannot be reused while the child has not been waited for, which only `status` does.
        if self.running() {
            let pid = Pid::from_raw(self.pid.cast_signed());
            nix::sys::signal::kill(pid, signal).during(|| format!("sending {signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`Error::Timeout`], with the tail of its log.
    pub fn wait(&self, bound: Duration) -> Result<ExitStatus, Error> {
        wait::until(&format!("{} to end", self.name), bound, || self.status()).map_err(|e| self.with_log(e))
    }

    /// `kill -9`, and waits for its end.
    ///
    /// # Errors
    /// As [`Process::wait`].
    pub fn kill(&self) -> Result<ExitStatus, Error> {
        self.signal(Signal::SIGKILL)?;
        self.wait(Duration::from_secs(10))
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// As [`Process::wait`].
    pub fn terminate(&self, bound: Duration) -> Result<ExitStatus, Error> {
        self.signal(Signal::SIGTERM)?;
        self.wait(bound)
    }

    /// Waits until `ready` gives true, or the process ends.
    ///
    /// # Errors
    /// [`Error::Exited`] or [`Error::Timeout`], either with the tail of its log; or what `ready` says.
    pub fn wait_ready(&self, bound: Duration, mut ready: impl FnMut() -> Result<bool, Error>) -> Result<(), Error> {
        let done = wait::try_until(&format!("{} ready", self.name), bound, || {
            if ready()? {
                return Ok(Some(()));
            }
            match self.status() {
                Some(status) => {
                    Err(Error::Exited { name: self.name.clone(), status, log: format!("\n{}", self.log_tail(30)) })
                }
                None => Ok(None),
            }
        });
        done.map_err(|e| self.with_log(e))
    }

    fn with_log(&self, error: Error) -> Error {
        match error {
            Error::Timeout { what, waited, .. } => {
                Error::Timeout { what, waited, log: format!("; its log ends:\n{}", self.log_tail(30)) }
            }
            other => other,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The last `lines` lines of a file, of at most its last 64 KiB. Empty if it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(64 << 10)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        Ok(all[all.len().saturating_sub(lines)..].join("\n"))
    };
    read().unwrap_or_default()
}
