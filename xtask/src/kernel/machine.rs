//! One run of a virtual machine: QEMU without KVM, so that it runs anywhere, judged by what it writes to its console.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::debian::failed;
use super::judge::{Judge, News};
use crate::Failure;

/// Lines of the console that are shown when a run fails.
const SHOWN: usize = 60;

/// What to boot.
pub struct Machine {
    /// Folder with the emulator's packages unpacked.
    pub tools: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// Its first file system.
    pub initramfs: PathBuf,
    /// Where the console is written to.
    pub console: PathBuf,
    /// How long it may take, all in all.
    pub limit: Duration,
}

impl Machine {
    /// Boots it and waits for its end.
    ///
    /// # Errors
    /// QEMU could not be started; a part failed; the kernel complained, fell or took too long. What the console
    /// says about it has been printed then.
    pub fn run(&self, judge: &mut Judge) -> Result<(), Failure> {
        let mut last = VecDeque::new();
        let verdict = self.watch(judge, &mut last);
        if verdict.is_err() {
            // What failed tests wrote says more than the end of a run that went on after them.
            let quotes = judge.quotes();
            let lines: Vec<&String> = if quotes.is_empty() { last.iter().collect() } else { quotes.iter().collect() };
            println!("--- from the console ---");
            for line in lines {
                println!("{line}");
            }
            println!("--- all of it is in {} ---", self.console.display());
        }
        verdict
    }

    fn watch(&self, judge: &mut Judge, last: &mut VecDeque<String>) -> Result<(), Failure> {
        let mut log = fs::File::create(&self.console).map_err(|error| failed(&self.console, &error))?;
        let started = Instant::now();
        let mut emulator = Ended(self.start()?);
        let lines = emulator.console();
        loop {
            match lines.recv_timeout(self.limit.saturating_sub(started.elapsed())) {
                Ok(line) => {
                    let _ = writeln!(log, "{:7.2} {line}", started.elapsed().as_secs_f32());
                    match judge.read(&line) {
                        Some(News::Part(news)) => println!("  {news}"),
                        Some(News::Fallen) => {
                            // What it says about it comes within a moment.
                            while let Ok(line) = lines.recv_timeout(Duration::from_secs(3)) {
                                let _ = writeln!(log, "{:7.2} {line}", started.elapsed().as_secs_f32());
                                keep(last, line);
                            }
                            return Err(Failure(String::from("the kernel fell")));
                        }
                        None => {}
                    }
                    keep(last, line);
                    if judge.ended() {
                        return judge.verdict().map_err(Failure);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return judge.verdict().map_err(Failure),
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = self.limit.as_secs();
                    return Err(Failure(format!("not done after {seconds} s, during {}", judge.during())));
                }
            }
        }
    }

    fn start(&self) -> Result<Child, Failure> {
        let usr = self.tools.join("usr");
        // The unpacked emulator brings its own libc: it runs on a machine that has another.
        let mut command = Command::new(usr.join("lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(usr.join("lib/x86_64-linux-gnu")).arg(usr.join("bin/qemu-system-x86_64"));
        command.arg("-L").arg(usr.join("share/qemu")).arg("-L").arg(usr.join("share/seabios"));
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024"]);
        command.args(["-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initramfs);
        command.args(["-append", "console=ttyS0 loglevel=4 panic=-1"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        command.spawn().map_err(|error| Failure(format!("QEMU: {error}")))
    }
}

fn keep(last: &mut VecDeque<String>, line: String) {
    if last.len() == SHOWN {
        last.pop_front();
    }
    last.push_back(line);
}

/// A process that does not outlive this value.
struct Ended(Child);

impl Ended {
    /// The lines that it writes.
    fn console(&mut self) -> Receiver<String> {
        let (sender, receiver) = channel();
        if let Some(output) = self.0.stdout.take() {
            std::thread::spawn(move || {
                let mut lines = BufReader::new(output);
                let mut line = Vec::new();
                while matches!(lines.read_until(b'\n', &mut line), Ok(length) if length > 0) {
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    line.clear();
                    if sender.send(text).is_err() {
                        break;
                    }
                }
            });
        }
        receiver
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
