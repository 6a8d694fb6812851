//! The plugin's log: a file of bounded size beside the agent's socket, since standard output is the runtime's.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Size at which a new file is begun. One old file is kept.
const MAX_FILE: u64 = 1 << 20;
/// Longest line.
const MAX_LINE: usize = 2048;

/// Where the plugin writes what it did. What cannot be written is lost: no pod waits for a log.
#[derive(Debug)]
pub struct Log(PathBuf);

impl Log {
    /// A log in this file.
    #[must_use]
    pub const fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Writes one line.
    pub fn write(&self, text: &str) {
        let _ = append(&self.0, text);
    }
}

fn append(path: &Path, text: &str) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let open = || OpenOptions::new().create(true).append(true).mode(0o600).custom_flags(flags).open(path);
    let mut file = open()?;
    let found = file.metadata()?;
    if !found.is_file() || found.uid() != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    if found.len() > MAX_FILE {
        fs::rename(path, path.with_extension("log.1"))?;
        file = open()?;
    }
    let time = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
    // One line each, whatever a name or an error holds, and in one call: others append too.
    let text: String =
        text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).take(MAX_LINE).collect();
    file.write_all(format!("{time} {} {text}\n", std::process::id()).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_is_bounded_and_a_line_is_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cni.log");
        let log = Log::new(path.clone());
        log.write("one\ntwo");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.ends_with(" one two\n"), "{text}");
        let line = "x".repeat(3000);
        for _ in 0..1500 {
            log.write(&line);
        }
        let all: u64 = fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(all < 2 * (MAX_FILE + 4096), "{all}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        Log::new("/nonexistent/log".into()).write("lost");
    }
}
