//! What the tests ask the kernel about eBPF objects, by bpf(2): by their pins and their numbers, whoever holds them.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;

/// `BPF_TCX_INGRESS`.
pub const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`.
pub const TCX_EGRESS: u32 = 47;

/// A program, map or link in the kernel: `prog_id`, `map_id` or `link_id`, and the number, which is never used twice soon.
pub type Object = (&'static str, u32);

/// What is pinned below a folder, and the programs of the links. Symbolic links in it are notes, not pins.
pub fn pinned_objects(folder: &Path) -> Vec<Object> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| !path.is_symlink());
    let objects =
        entries.flat_map(|path| if path.is_dir() { pinned_objects(&path) } else { objects(&pin(&path).unwrap()) });
    objects.collect()
}

/// Whether the kernel still has it.
pub fn exists(object: &Object) -> bool {
    let command = match object.0 {
        "prog_id" => BPF_PROG_GET_FD_BY_ID,
        "map_id" => BPF_MAP_GET_FD_BY_ID,
        _ => BPF_LINK_GET_FD_BY_ID,
    };
    let found = bpf(command, &mut [object.1, 0, 0]);
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    found.map(|fd| drop(unsafe { OwnedFd::from_raw_fd(fd) })).is_ok()
}

/// How many programs stand on one side of a device of the calling thread's namespace, by links: none before Linux 6.6,
/// which knows of no such links.
pub fn attached_to_device(index: u32, side: u32) -> u32 {
    let mut attr = [0_u32; 16];
    attr[0] = index;
    attr[1] = side;
    match bpf(BPF_PROG_QUERY, &mut attr) {
        // Target, attach type, two kinds of flags, a pointer (two words), the count.
        Ok(_) => attr[6],
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}");
            0
        }
    }
}

fn pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let pointer = path.as_ptr() as u64;
    let mut attr = [(pointer & 0xffff_ffff) as u32, (pointer >> 32) as u32, 0, 0];
    let fd = bpf(BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What the kernel tells of a descriptor.
fn objects(fd: &OwnedFd) -> Vec<Object> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.trim().parse().ok())
    };
    ["prog_id", "map_id", "link_id"].into_iter().filter_map(|name| Some((name, number(name)?))).collect()
}

fn bpf<const WORDS: usize>(command: libc::c_long, attr: &mut [u32; WORDS]) -> io::Result<i32> {
    // SAFETY: `attr` is a live array of the given size; a pointer in it points to a C string that the caller holds.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(done).map_err(io::Error::other) }
}
