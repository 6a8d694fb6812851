//! The system-call filters of a live process, as the kernel holds them.

#![expect(unsafe_code, reason = "nix has no call for PTRACE_SECCOMP_GET_FILTER")]

use std::ptr;

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::Error;

/// `PTRACE_SECCOMP_GET_FILTER` of `linux/ptrace.h`, Linux 4.4, with `CONFIG_CHECKPOINT_RESTORE`.
const GET_FILTER: libc::c_uint = 0x420c;

/// One filter: its instructions.
pub type Filter = Vec<Instruction>;

/// `struct sock_filter` of `linux/filter.h`: code, jump if true, jump if false, operand.
pub type Instruction = (u16, u8, u8, u32);

/// All filters of the process, the one that was installed last first. The process is stopped for a moment.
///
/// # Errors
/// No such process, not root, or a kernel without `CONFIG_CHECKPOINT_RESTORE`.
pub fn filters(pid: u32) -> Result<Vec<Filter>, Error> {
    let pid = Pid::from_raw(i32::try_from(pid).map_err(|_| Error::Absent(format!("process {pid}")))?);
    let failed = |what: &str| {
        let what = format!("{what} process {pid}");
        move |errno: Errno| Error::io(what, errno)
    };
    ptrace::attach(pid).map_err(failed("attaching to"))?;
    waitpid(pid, None).map_err(failed("waiting for"))?;
    let mut found = Vec::new();
    let ended = loop {
        match filter(pid, found.len()) {
            Ok(filter) => found.push(filter),
            // One past the last.
            Err(Errno::ENOENT) => break Ok(()),
            Err(errno) => break Err(errno),
        }
    };
    ptrace::detach(pid, None).map_err(failed("detaching from"))?;
    ended.map_err(failed("reading the filters of"))?;
    Ok(found)
}

fn filter(pid: Pid, index: usize) -> Result<Filter, Errno> {
    // SAFETY: with a null buffer the kernel only says how many instructions there are.
    let length = unsafe { libc::ptrace(GET_FILTER, pid.as_raw(), index, ptr::null_mut::<libc::c_void>()) };
    let length = usize::try_from(Errno::result(length)?).map_err(|_| Errno::EINVAL)?;
    let mut buffer = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; length];
    // SAFETY: the buffer has room for the number of instructions that the kernel just named; a filter never changes.
    Errno::result(unsafe { libc::ptrace(GET_FILTER, pid.as_raw(), index, buffer.as_mut_ptr()) })?;
    Ok(buffer.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect())
}
