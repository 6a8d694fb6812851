//! What the allocator does with memory that was freed. Allocators other than glibc's are left to themselves.

#![expect(unsafe_code, reason = "mallopt and malloc_trim have no safe wrapper")]

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

/// Gives all memory that was freed back to the kernel, also what lies between things that are in use. Takes a millisecond or
/// so, in which other threads may wait for the allocator: for when something large is over.
pub fn return_freed() {
    // SAFETY: takes an integer, touches only the allocator's own state, and may be called at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

#[cfg(target_env = "gnu")]
#[cfg(test)]
mod tests {
    use super::*;

    /// Resident memory of this process in bytes.
    fn resident() -> usize {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

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
}
