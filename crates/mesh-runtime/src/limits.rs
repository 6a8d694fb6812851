//! Limits of the process, and how far it is from them.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit of open files to what the process may have (the hard limit). Returns it.
///
/// # Errors
/// When the kernel refuses; the limit stays as it was.
pub fn raise_open_files() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// How many files the process may have open.
///
/// # Errors
/// When the kernel does not say.
pub fn open_files_limit() -> io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}

/// How many files the process has open. Before Linux 6.2 each of them is looked at.
///
/// # Errors
/// When `/proc` is not there or not readable.
pub fn open_files() -> io::Result<usize> {
    let known = fs::metadata(OPEN_FILES)?.len();
    if known > 0 {
        return Ok(usize::try_from(known).unwrap_or(usize::MAX));
    }
    // One of them is what this is read by.
    Ok(fs::read_dir(OPEN_FILES)?.count().saturating_sub(1))
}

/// Has an entry for each open file; since Linux 6.2 its size says how many.
const OPEN_FILES: &str = "/proc/self/fd";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_those_that_are_listed() {
        // Tests beside this one open files too: until no one does in between.
        let (mut counted, mut listed) = (0, 1);
        while counted != listed {
            listed = fs::read_dir(OPEN_FILES).unwrap().count() - 1;
            counted = open_files().unwrap();
        }
        assert!(counted >= 3);
    }

    #[test]
    fn limit_is_the_hard_one() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard / 2, hard).unwrap();
        assert_eq!(raise_open_files().unwrap(), hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }
}
