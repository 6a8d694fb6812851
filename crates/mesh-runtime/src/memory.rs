//! Memory that is given back: what was freed (allocators other than glibc's are left to themselves), and pages of files.

#![expect(unsafe_code, reason = "mallopt, malloc_trim and madvise have no safe wrapper")]

use std::ops::Range;
use std::{fs, io};

/// Allocations from this size on, in bytes, are mapped of their own and unmapped when they are freed: more than the largest
/// HTTP/2 frame and TLS buffer, so that bulk data does not have every page of it mapped anew.
#[cfg(target_env = "gnu")]
const MMAP_FROM: libc::c_int = 2 << 20;

/// Freed memory at the end of a heap that is kept, in bytes; there is a heap for each thread.
#[cfg(target_env = "gnu")]
const KEEP_FREE: libc::c_int = 4 << 20;

/// Makes the allocator keep some of what is freed. By default it returns it to the kernel at once, which clears and maps each
/// page anew when the next frame comes: a fifth to a third of the time per byte of bulk data. Of use before there is a
/// second thread.
pub fn keep_freed() {
    #[cfg(target_env = "gnu")]
    for (option, bytes) in [(libc::M_MMAP_THRESHOLD, MMAP_FROM), (libc::M_TRIM_THRESHOLD, KEEP_FREE)] {
        // SAFETY: mallopt takes integers only. One that is refused changes nothing.
        let _ = unsafe { libc::mallopt(option, bytes) };
    }
}

/// Gives back what starting, or a burst, needed and rest does not: memory that was freed, and pages of the program. Takes a few
/// milliseconds.
pub fn rest() {
    return_freed();
    match unmap_program() {
        Ok(bytes) => tracing::debug!(bytes, "the program's pages are taken out; they come back when they are needed"),
        Err(error) => tracing::debug!(%error, "cannot tell which of the program's pages are mapped"),
    }
}

/// Gives all memory that was freed back to the kernel, also what lies between things that are in use. Takes a millisecond or
/// so, in which other threads may wait for the allocator: for when something large is over.
pub fn return_freed() {
    // SAFETY: takes an integer, touches only the allocator's own state, and may be called at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Takes the pages of the program's own file out of this process, where it only reads them: code and constants that starting
/// or a burst has touched, and that may not be needed for long. They stay in the kernel's page cache, which the kernel can
/// take from now on when it needs the memory; what is needed again is mapped again when it is touched, some pages around it
/// with it. So this is for when something is over, not for while it lasts. Returns how many bytes were mapped before.
///
/// # Errors
/// When the kernel does not say what is mapped.
pub fn unmap_program() -> io::Result<usize> {
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    let mut unmapped = 0;
    for (range, resident) in unchanged(&smaps, unmap_program as fn() -> io::Result<usize> as usize) {
        let start = std::ptr::with_exposed_provenance_mut(range.start);
        // SAFETY: the mapping is the program's own, which is there as long as the process. It is private, of a file, not
        // writable, and no page of it differs from the file's, so that each is found again as it was. None can come to
        // differ meanwhile: the loader has done its work, and nobody else makes a part of the program writable.
        if unsafe { libc::madvise(start, range.len(), libc::MADV_DONTNEED) } == 0 {
            unmapped += resident;
        }
    }
    Ok(unmapped)
}

/// One mapping of a `/proc/<pid>/smaps` (proc(5)).
struct Mapping<'a> {
    range: Range<usize>,
    is_read_only: bool,
    path: &'a str,
    /// In bytes.
    resident: usize,
    /// Whether a page of it is another than the file's.
    differs: bool,
}

/// Where the file that holds the code at an address is mapped so that it is only read and no page differs from the file's,
/// with how many bytes of each are resident.
fn unchanged(smaps: &str, code: usize) -> Vec<(Range<usize>, usize)> {
    let all = mappings(smaps);
    let Some(program) = all.iter().find(|one| one.range.contains(&code)).map(|one| one.path) else { return Vec::new() };
    let wanted = |one: &&Mapping<'_>| one.path == program && one.is_read_only && !one.differs && one.resident > 0;
    all.iter().filter(wanted).map(|one| (one.range.clone(), one.resident)).collect()
}

fn mappings(smaps: &str) -> Vec<Mapping<'_>> {
    let mut all: Vec<Mapping<'_>> = Vec::new();
    for line in smaps.lines() {
        if let Some(mapping) = mapping(line) {
            all.push(mapping);
        } else if let (Some(last), Some((name, bytes))) = (all.last_mut(), field(line)) {
            match name {
                "Rss" => last.resident = bytes,
                // Dirty pages may be the file's own, not written to disk yet; those of this process are anonymous.
                "Anonymous" | "Swap" => last.differs |= bytes > 0,
                _ => {}
            }
        }
    }
    all
}

/// The first line of a mapping: addresses, permissions, offset, device, inode, path.
fn mapping(line: &str) -> Option<Mapping<'_>> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
    let is_read_only = matches!(words.next()?.as_bytes(), [_, b'-', _, b'p']);
    // Blanks stand before it.
    let path = words.nth(3)?.trim_start();
    Some(Mapping { range, is_read_only: is_read_only && path.starts_with('/'), path, resident: 0, differs: false })
}

/// A line such as `Rss:    4 kB`: what, and how many bytes.
fn field(line: &str) -> Option<(&str, usize)> {
    let (name, value) = line.split_once(':')?;
    let kibibytes: usize = value.trim().strip_suffix(" kB")?.parse().ok()?;
    Some((name, kibibytes << 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident memory of this process in bytes.
    fn resident() -> usize {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[cfg(target_env = "gnu")]
    #[test]
    fn what_lies_between_things_in_use_is_returned() {
        keep_freed();
        let mut all: Vec<Vec<u8>> = (0..32_000).map(|_| vec![1; 1024]).collect();
        let full = resident();
        // One in a hundred stays in use, so that no end of a heap becomes free.
        all = all.into_iter().step_by(100).collect();
        return_freed();
        let left = resident();
        assert!(left + (16 << 20) < full, "{left} of {full} after {} blocks were kept", all.len());
    }
    /// Bytes of the file of this program's code that are resident.
    fn resident_of_program() -> usize {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        unchanged(&smaps, resident_of_program as fn() -> usize as usize).iter().map(|(_, resident)| resident).sum()
    }

    /// Constants enough to be a good part of the file, read below so that they are resident.
    static CONSTANTS: [u8; 1 << 20] = [7; 1 << 20];

    #[test]
    fn pages_of_the_program_are_taken_out_and_come_back_as_they_were() {
        let sum = || std::hint::black_box(&CONSTANTS).iter().map(|byte| u64::from(*byte)).sum::<u64>();
        let before = sum();
        let full = resident_of_program();
        assert!(full > CONSTANTS.len(), "{full}");
        let unmapped = unmap_program().unwrap();
        assert!(unmapped >= CONSTANTS.len(), "{unmapped}");
        // Other tests run beside this one, and need their code.
        let left = resident_of_program();
        assert!(left + CONSTANTS.len() / 2 < full, "{left} of {full}");
        assert_eq!(sum(), before);
    }

    #[test]
    fn only_what_is_read_from_the_programs_own_file_unchanged_is_found() {
        let entry = |first: &str, more: &str| format!("{first}\nSize: 8 kB\nRss: 8 kB\n{more}\nVmFlags: rd ex mr\n");
        let clean = "Private_Clean: 4 kB\nPrivate_Dirty: 4 kB\nAnonymous: 0 kB\nSwap: 0 kB";
        let own = "fd:00 42      /opt/with space";
        let smaps = [
            entry(&format!("1000-3000 r--p 00000000 {own}"), clean),
            entry(&format!("3000-5000 r-xp 00002000 {own}"), clean),
            entry(&format!("5000-7000 r--p 00004000 {own}"), "Anonymous: 4 kB"),
            entry(&format!("7000-9000 r--p 00006000 {own}"), "Swap: 4 kB"),
            entry(&format!("9000-b000 rw-p 00008000 {own}"), clean),
            entry(&format!("b000-d000 r--s 00008000 {own}"), clean),
            entry("d000-f000 r--p 00000000 fd:00 43      /opt/with", clean),
            entry("f000-11000 r-xp 00000000 00:00 0 ", clean),
            entry("11000-13000 r-xp 00000000 00:00 0      [vdso]", clean),
            format!("13000-15000 r-xp 00000000 {own}\nRss: 0 kB\n"),
        ]
        .concat();
        let found = vec![(0x1000..0x3000, 8 << 10), (0x3000..0x5000, 8 << 10)];
        assert_eq!(unchanged(&smaps, 0x3456), found);
        assert_eq!(unchanged(&smaps, 0x11000), [], "not of a file");
        assert_eq!(unchanged(&smaps, 0x99000), []);
        assert_eq!(unchanged("nonsense\n-: :\n1-2\n", 1), []);
    }
}
