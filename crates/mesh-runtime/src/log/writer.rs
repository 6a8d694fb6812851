//! The thread that writes the log: a bounded queue of whole lines in front of one writer, written in batches.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait to be written.
const QUEUE: usize = 8192;
/// Bytes after which a batch is written even if more lines wait.
const BATCH: usize = 64 << 10;
/// Rest of the writer after each batch. While it rests nobody has to wake it: a busy process would otherwise pay two system
/// calls and a context switch for each line.
const REST: Duration = Duration::from_millis(5);
/// Longest line; the rest of a longer one is cut.
const MAX_LINE: usize = 16 << 10;

enum Message {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// The queue's entrance. Cheap to clone.
#[derive(Clone)]
pub(super) struct Sink {
    queue: Sender<Message>,
    dropped: Arc<AtomicU64>,
}

impl Sink {
    /// Starts the thread.
    pub(super) fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        // Of the bounded queues this one takes memory only for what waits in it: the standard library's would take 300 KiB.
        let (queue, lines) = mpsc::channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&dropped);
        std::thread::Builder::new().name("log".into()).spawn(move || write_all(out, lines, &counted))?;
        Ok(Self { queue, dropped })
    }

    /// A writer for one event; the line is queued when it is dropped.
    pub(super) fn line(&self) -> Line<'_> {
        Line { sink: self, bytes: Vec::with_capacity(256) }
    }

    /// Waits until the lines queued before are written, at most `timeout`.
    pub(super) fn flush(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let (done, written) = sync_channel(1);
        let mut message = Message::Flush(done);
        // A full queue has room again as soon as the writer has rested, unless its reader is stuck.
        while let Err(TrySendError::Full(back)) = self.queue.try_send(message) {
            if Instant::now() >= deadline {
                return;
            }
            message = back;
            std::thread::sleep(REST);
        }
        // Late or never: then what is left is lost, which nobody can be told.
        let _ = written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        self.line()
    }
}

/// One line being made.
pub(super) struct Line<'a> {
    sink: &'a Sink,
    bytes: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        if bytes.len() > MAX_LINE {
            bytes.truncate(MAX_LINE);
            bytes.push(b'\n');
        }
        if !bytes.is_empty() && self.sink.queue.try_send(Message::Line(bytes)).is_err() {
            self.sink.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn write_all(mut out: impl Write, mut lines: Receiver<Message>, dropped: &AtomicU64) {
    let mut batch = Vec::with_capacity(BATCH);
    while let Some(first) = lines.blocking_recv() {
        let mut flushes = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Line(line) => batch.extend_from_slice(&line),
                Message::Flush(done) => flushes.push(done),
            }
            next = if batch.len() < BATCH { lines.try_recv().ok() } else { None };
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            batch.extend_from_slice(format!("{lost} log lines were dropped: the log is read too slowly\n").as_bytes());
        }
        // Where the log itself cannot be written there is nowhere to say so.
        let _ = out.write_all(&batch).and_then(|()| out.flush());
        if flushes.is_empty() && batch.len() < BATCH {
            std::thread::sleep(REST);
        }
        batch.clear();
        for done in flushes {
            let _ = done.try_send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_stay_whole_and_in_order() {
        let out = Shared::default();
        let sink = Sink::start(out.clone()).unwrap();
        for n in 0..100 {
            let mut line = sink.line();
            write!(line, "line ").unwrap();
            writeln!(line, "{n}").unwrap();
        }
        sink.flush(Duration::from_secs(10));
        let expected: String = (0..100).map(|n| format!("line {n}\n")).collect();
        assert_eq!(String::from_utf8(out.0.lock().unwrap().clone()).unwrap(), expected);
    }

    #[test]
    fn a_reader_that_stops_loses_lines_and_learns_how_many() {
        let out = Shared::default();
        let sink = Sink::start(out.clone()).unwrap();
        let stuck = out.0.lock().unwrap();
        // More than the queue, plus what the thread may have taken out in one batch already.
        let count = QUEUE + BATCH + 10;
        for _ in 0..count {
            sink.line().write_all(b"x").unwrap();
        }
        // How many were lost is in the counter, or already in the batch that cannot be written.
        drop(stuck);
        let text = || String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !text().contains(" log lines were dropped") {
            assert!(std::time::Instant::now() < deadline, "the loss was never told");
            std::thread::sleep(Duration::from_millis(1));
        }
        // What is still queued must be out first, or there may be no room.
        sink.flush(Duration::from_secs(10));
        sink.line().write_all(b"\nend").unwrap();
        sink.flush(Duration::from_secs(10));
        assert!(text().ends_with("\nend"));
    }
}
