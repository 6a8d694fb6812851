//! System calls that neither aya nor nix offers: what a link is attached to, what else is attached, the cookie of a
//! namespace.
#![expect(unsafe_code, reason = "bpf(2) and SO_NETNS_COOKIE have no safe wrapper")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `bpf_attach_type` of the connect hook for IPv4.
pub const ATTACH_CONNECT4: u32 = 10;
/// `bpf_attach_type` of the connect hook for IPv6.
pub const ATTACH_CONNECT6: u32 = 11;
/// `bpf_attach_type` of socket look-up.
pub const ATTACH_SK_LOOKUP: u32 = 36;
/// `bpf_attach_type` of a traffic classifier for what a device receives.
pub const ATTACH_TCX_INGRESS: u32 = 46;
/// `bpf_attach_type` of a traffic classifier for what a device sends.
pub const ATTACH_TCX_EGRESS: u32 = 47;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_DETACH: libc::c_long = 34;

/// What a link in the kernel is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkTarget {
    /// The program that runs.
    pub program_id: u32,
    /// The hook.
    pub attach_type: u32,
    /// Id of the cgroup, inode of the network namespace, or index of the device; 0: the target is gone and the link does
    /// nothing.
    pub target: u64,
}

/// Opens what is pinned at a path.
///
/// # Errors
/// As `bpf(BPF_OBJ_GET)`; `NotFound` when nothing is pinned there.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Attr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    let fd = bpf(BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes a link's program off its hook, now. Without this it stays there for a moment after its pin is gone: the kernel puts
/// off what an unlinked pin leaves to do.
///
/// # Errors
/// As `bpf(BPF_LINK_DETACH)`, Linux 5.9.
pub fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        fd: u32,
    }
    let mut attr = Attr { fd: u32::try_from(link.as_raw_fd()).map_err(io::Error::other)? };
    bpf(BPF_LINK_DETACH, &mut attr).map(drop)
}

/// Asks the kernel about a link on a cgroup, a network namespace or a device.
///
/// # Errors
/// As `bpf(BPF_OBJ_GET_INFO_BY_FD)`.
pub fn link_target(link: BorrowedFd<'_>) -> io::Result<LinkTarget> {
    /// The head of `struct bpf_link_info`, and both shapes of its union as bytes.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program_id: u32,
        padding: u32,
        union: [u32; 4],
    }
    const LINK_CGROUP: u32 = 3;
    const LINK_NETNS: u32 = 5;
    const LINK_TCX: u32 = 11;

    let mut info = Info::default();
    object_info(link, &mut info)?;
    let [first, second, third, _] = info.union;
    match info.kind {
        // cgroup_id: u64, attach_type: u32
        LINK_CGROUP => Ok(LinkTarget {
            program_id: info.program_id,
            attach_type: third,
            target: u64::from(first) | u64::from(second) << 32,
        }),
        // netns_ino or ifindex: u32, attach_type: u32
        LINK_NETNS | LINK_TCX => {
            Ok(LinkTarget { program_id: info.program_id, attach_type: second, target: u64::from(first) })
        }
        other => Err(io::Error::other(format!("the link is of another kind ({other})"))),
    }
}

/// Ids of the programs attached to a hook of a cgroup.
///
/// # Errors
/// As `bpf(BPF_PROG_QUERY)`.
pub fn attached_programs(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Attr {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
        // Later kernels write more here.
        rest: [u64; 4],
    }
    let mut ids = [0_u32; 64];
    let mut attr = Attr {
        target: u32::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?,
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: 64,
        padding: 0,
        rest: [0; 4],
    };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    let count = usize::try_from(attr.count).map_err(io::Error::other)?.min(ids.len());
    Ok(ids.into_iter().take(count).collect())
}

/// The tag of a program, a hash of its instructions, and its name, empty if it has none; `None` if there is no such
/// program.
///
/// # Errors
/// As `bpf(BPF_PROG_GET_FD_BY_ID)`.
pub fn program_name(id: u32) -> io::Result<Option<([u8; 8], String)>> {
    let Some(program) = open_program(id)? else { return Ok(None) };
    let mut info = ProgramInfo::default();
    object_info(program.as_fd(), &mut info)?;
    let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(Some((info.tag, String::from_utf8_lossy(name).into_owned())))
}

/// Ids of the maps that a program uses; none if there is no such program.
///
/// # Errors
/// As `bpf(BPF_PROG_GET_FD_BY_ID)` and `bpf(BPF_OBJ_GET_INFO_BY_FD)`.
pub fn program_maps(id: u32) -> io::Result<Vec<u32>> {
    let Some(program) = open_program(id)? else { return Ok(Vec::new()) };
    // A program of this agent has less than ten.
    let mut ids = [0_u32; 64];
    let mut info = ProgramInfo { map_count: 64, maps: ids.as_mut_ptr() as u64, ..ProgramInfo::default() };
    object_info(program.as_fd(), &mut info)?;
    let count = usize::try_from(info.map_count).map_err(io::Error::other)?.min(ids.len());
    Ok(ids.into_iter().take(count).collect())
}

/// The head of `struct bpf_prog_info`, up to the name.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    translated_length: u32,
    jited: u64,
    translated: u64,
    load_time: u64,
    uid: u32,
    map_count: u32,
    maps: u64,
    name: [u8; 16],
}

/// `None`: there is no such program.
fn open_program(id: u32) -> io::Result<Option<OwnedFd>> {
    #[repr(C)]
    struct ById {
        id: u32,
        next: u32,
        flags: u32,
    }
    match bpf(BPF_PROG_GET_FD_BY_ID, &mut ById { id, next: 0, flags: 0 }) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // SAFETY: the kernel returned a new descriptor that nobody else owns.
        other => other.map(|fd| Some(unsafe { OwnedFd::from_raw_fd(fd) })),
    }
}

/// The id of a map.
///
/// # Errors
/// As `bpf(BPF_OBJ_GET_INFO_BY_FD)`.
pub fn map_id(map: BorrowedFd<'_>) -> io::Result<u32> {
    /// The head of `struct bpf_map_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
    }
    let mut info = Info::default();
    object_info(map, &mut info)?;
    Ok(info.id)
}

/// What a map whose keys have four bytes and whose values have eight holds under a key; of a socket map that is the
/// cookie of the socket.
///
/// # Errors
/// As `bpf(BPF_MAP_LOOKUP_ELEM)`; `NotFound` where there is nothing. A map of another shape is not asked: the caller knows
/// it.
pub fn map_read(map: BorrowedFd<'_>, key: u32) -> io::Result<u64> {
    let mut value = 0_u64;
    element(BPF_MAP_LOOKUP_ELEM, map, &key, Some(&mut value))?;
    Ok(value)
}

/// Writes to such a map; to a socket map the descriptor of a socket.
///
/// # Errors
/// As `bpf(BPF_MAP_UPDATE_ELEM)`.
pub fn map_write(map: BorrowedFd<'_>, key: u32, mut value: u64) -> io::Result<()> {
    element(BPF_MAP_UPDATE_ELEM, map, &key, Some(&mut value))
}

/// Takes out what such a map holds under a key.
///
/// # Errors
/// As `bpf(BPF_MAP_DELETE_ELEM)`.
pub fn map_delete(map: BorrowedFd<'_>, key: u32) -> io::Result<()> {
    element(BPF_MAP_DELETE_ELEM, map, &key, None)
}

fn element(command: libc::c_long, map: BorrowedFd<'_>, key: &u32, value: Option<&mut u64>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let map = u32::try_from(map.as_raw_fd()).map_err(io::Error::other)?;
    let value = value.map_or(0, |value| std::ptr::from_mut(value) as u64);
    let mut attr = Attr { map, padding: 0, key: std::ptr::from_ref(key) as u64, value, flags: 0 };
    bpf(command, &mut attr).map(drop)
}

/// The name of a device in the calling thread's network namespace.
///
/// # Errors
/// When there is no device with this index.
pub fn interface_name(index: u32) -> io::Result<String> {
    let mut name = [0_u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the length that the function wants.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) };
    if found.is_null() {
        return Err(io::Error::last_os_error());
    }
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// The cookie of a socket's network namespace: never reused while the machine is up.
///
/// # Errors
/// As `getsockopt(SO_NETNS_COOKIE)`; the option exists since Linux 5.14.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the kernel writes at most `length` bytes into `cookie`, which is that long.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if done == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Watches a descriptor's owner for input, with tokio.
///
/// # Errors
/// When the descriptor cannot be watched.
pub fn watch<T: AsFd + AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: an owner that lends its descriptor safely keeps it open while it lives, and the AsyncFd owns it.
    unsafe { AsyncFd::register_with_interest(owner, Interest::READABLE) }.map_err(Into::into)
}

/// Attaches a program that lets every connection pass to a connect hook, as long as the link is held.
///
/// # Errors
/// As `bpf(BPF_PROG_LOAD)` and `bpf(BPF_LINK_CREATE)`.
#[cfg(test)]
pub fn attach_stranger(name: &[u8], attach_type: u32, cgroup: &std::fs::File) -> io::Result<OwnedFd> {
    /// The head of the attributes of `BPF_PROG_LOAD`.
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u32; 4],
        version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        attach_type: u32,
    }
    #[repr(C)]
    struct Link {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    const PROG_LOAD: libc::c_long = 5;
    const LINK_CREATE: libc::c_long = 28;
    const CGROUP_SOCK_ADDR: u32 = 18;
    // r0 = 1; exit
    let instructions = [0x0000_0001_0000_00b7_u64, 0x95];
    let mut load = Load {
        kind: CGROUP_SOCK_ADDR,
        count: 2,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        attach_type,
        ..Load::default()
    };
    for (to, from) in load.name.iter_mut().zip(name) {
        *to = *from;
    }
    let program = bpf(PROG_LOAD, &mut load)?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let number = |fd| u32::try_from(fd).map_err(io::Error::other);
    let target = number(cgroup.as_raw_fd())?;
    let link = bpf(LINK_CREATE, &mut Link { program: number(program.as_raw_fd())?, target, attach_type, flags: 0 })?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// Fills in what the kernel says of a link or a program; `T` is the head of the kernel's structure.
fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        fd: u32,
        length: u32,
        info: u64,
    }
    let length = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let fd = u32::try_from(object.as_raw_fd()).map_err(io::Error::other)?;
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut Attr { fd, length, info: std::ptr::from_mut(info) as u64 }).map(drop)
}

/// One bpf(2) call with a command's own attributes.
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is a live #[repr(C)] value of the given size; the pointers in it point to live buffers of the
    // lengths beside them (each caller above).
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(done).map_err(io::Error::other) }
}
