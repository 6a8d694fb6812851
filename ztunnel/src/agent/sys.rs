//! What the tests ask the kernel about eBPF objects, by bpf(2): by their pins and their numbers, whoever holds them.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_GET_NEXT_ID: libc::c_long = 11;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_LINK_GET_NEXT_ID: libc::c_long = 31;
const BPF_LINK_DETACH: libc::c_long = 34;

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
    open(object).is_some()
}

fn open(object: &Object) -> Option<OwnedFd> {
    let command = match object.0 {
        "prog_id" => BPF_PROG_GET_FD_BY_ID,
        "map_id" => BPF_MAP_GET_FD_BY_ID,
        _ => BPF_LINK_GET_FD_BY_ID,
    };
    let found = bpf(command, &mut [object.1, 0, 0]);
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    found.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).ok()
}

/// Objects of a whole machine that belong to somebody: what is pinned below a folder, what this process holds by descriptors,
/// the programs of the machine that use one of these maps, and the links and maps of those. What other agents of the machine
/// have is none of it, since every program of an agent uses the maps of its node.
pub fn objects_of(folder: &Path) -> BTreeSet<Object> {
    let mut found: BTreeSet<Object> = pinned_objects(folder).into_iter().collect();
    for entry in fs::read_dir("/proc/self/fdinfo").unwrap().flatten() {
        // Closed meanwhile, or this listing's own.
        found.extend(fs::read_to_string(entry.path()).map(|text| described(&text)).unwrap_or_default());
    }
    for program in ids(BPF_PROG_GET_NEXT_ID) {
        let maps: Vec<Object> = maps_of(program).into_iter().map(|map| ("map_id", map)).collect();
        if maps.iter().any(|map| found.contains(map)) {
            found.insert(("prog_id", program));
            found.extend(maps);
        }
    }
    for link in ids(BPF_LINK_GET_NEXT_ID) {
        let Some(fd) = open(&("link_id", link)) else { continue };
        found.extend(objects(&fd).into_iter().any(|object| found.contains(&object)).then_some(("link_id", link)));
    }
    found
}

/// The numbers of all objects of a kind.
fn ids(next: libc::c_long) -> Vec<u32> {
    let mut found = Vec::new();
    let mut attr = [0_u32; 3];
    while bpf(next, &mut attr).is_ok() {
        found.push(attr[1]);
        attr = [attr[1], 0, 0];
    }
    found
}

/// The maps that a program uses; none if it is gone.
fn maps_of(program: u32) -> Vec<u32> {
    let Some(fd) = open(&("prog_id", program)) else { return Vec::new() };
    let mut maps = [0_u32; 64];
    // `struct bpf_prog_info`: the count of maps is its 14th word, their address the two behind it.
    let mut info = [0_u32; 32];
    let address = maps.as_mut_ptr() as u64;
    (info[13], info[14], info[15]) = (64, (address & 0xffff_ffff) as u32, (address >> 32) as u32);
    let address = info.as_mut_ptr() as u64;
    let mut attr = [fd.as_raw_fd().cast_unsigned(), 128, (address & 0xffff_ffff) as u32, (address >> 32) as u32];
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).unwrap();
    maps[..info[13].min(64) as usize].to_vec()
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

/// Puts a socket into a socket map, or takes out what is there.
pub fn put_socket(map: &Path, key: u32, socket: Option<BorrowedFd<'_>>) {
    let map = pin(map).unwrap();
    let value = socket.map_or(0, |socket| u64::try_from(socket.as_raw_fd()).unwrap());
    let halves = |pointer: u64| [(pointer & 0xffff_ffff) as u32, (pointer >> 32) as u32];
    let [key_low, key_high] = halves(std::ptr::from_ref(&key) as u64);
    let [low, high] = if socket.is_some() { halves(std::ptr::from_ref(&value) as u64) } else { [0, 0] };
    let mut attr = [map.as_raw_fd().cast_unsigned(), 0, key_low, key_high, low, high, 0, 0];
    match (bpf(if socket.is_some() { BPF_MAP_UPDATE_ELEM } else { BPF_MAP_DELETE_ELEM }, &mut attr), socket) {
        (Ok(_), _) => {}
        // There is none.
        (Err(error), None) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {}
        (Err(error), _) => panic!("{error}"),
    }
}

/// Takes the program of a pinned link off its hook; the pin stays.
pub fn detach(link: &Path) {
    let link = pin(link).unwrap();
    bpf(BPF_LINK_DETACH, &mut [link.as_raw_fd().cast_unsigned()]).unwrap();
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
    described(&fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap())
}

fn described(text: &str) -> Vec<Object> {
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.trim().parse().ok())
    };
    ["prog_id", "map_id", "link_id"].into_iter().filter_map(|name| Some((name, number(name)?))).collect()
}

fn bpf<const WORDS: usize>(command: libc::c_long, attr: &mut [u32; WORDS]) -> io::Result<i32> {
    // SAFETY: `attr` is a live array of the given size; pointers in it point to what the caller holds: a C string, a key,
    // a value.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(done).map_err(io::Error::other) }
}
