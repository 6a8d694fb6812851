//! System calls that `nix` has no safe form of, each wrapped once.

#![expect(unsafe_code, reason = "capset, the capability prctls and connect(2) to no address have no safe wrapper")]

use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};

/// `struct __user_cap_header_struct` of capset(2).
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct` of capset(2); version 3 takes two of them.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Removes one capability from the bounding set of this thread.
///
/// # Errors
/// `EINVAL` for a number the kernel does not know, `EPERM` without CAP_SETPCAP.
pub fn drop_bounding(capability: u32) -> Result<(), Errno> {
    // SAFETY: PR_CAPBSET_DROP takes integers only.
    let done = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
    Errno::result(done).map(drop)
}

/// Empties the ambient capability set of this thread.
///
/// # Errors
/// What prctl(2) says.
pub fn clear_ambient() -> Result<(), Errno> {
    // SAFETY: PR_CAP_AMBIENT takes integers only.
    let done = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    Errno::result(done).map(drop)
}

/// Empties the effective, permitted and inheritable sets of this thread.
///
/// # Errors
/// What capset(2) says.
pub fn clear_capabilities() -> Result<(), Errno> {
    let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let data = [CapabilityData::default(); 2];
    // SAFETY: both pointers are to live values of the layout that capset(2) states for version 3.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(done).map(drop)
}

/// Ends what a socket does, for whoever has it open: a TCP connection is reset, and what it still had to send or to be read is gone;
/// a UDP socket has no peer any more. After this nothing can be sent or received. The descriptor stays open.
///
/// # Errors
/// What connect(2) says of a descriptor that is no such socket.
pub fn abort(fd: RawFd) -> Result<(), Errno> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: the kernel reads as many bytes as are stated of an address that lives through the call.
    let done = unsafe { libc::connect(fd, &raw const nowhere, size_of_val(&nowhere) as libc::socklen_t) };
    Errno::result(done)?;
    match shutdown(fd, Shutdown::Both) {
        // Said of what is not connected, and done all the same.
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(errno) => Err(errno),
    }
}
