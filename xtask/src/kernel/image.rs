//! The first file system of the virtual machine: busybox, the modules of its kernel, and programs of this checkout as
//! they are in the target folder, with the libraries that they are linked with.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Archive;
use super::debian::{failed, output};
use crate::Failure;

/// Small files that libraries look for.
const SMALL: [(&str, &str); 5] = [
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
    ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("etc/nsswitch.conf", "hosts: files dns\n"),
    ("etc/protocols", "ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\n"),
];

/// What goes into it.
pub struct Image<'a> {
    /// Folder with the emulator's packages, which has busybox.
    pub tools: &'a Path,
    /// Folder of the kernel.
    pub kernel: &'a Path,
    /// Programs, each with its place.
    pub programs: &'a [(String, PathBuf)],
    /// The script that is the first process.
    pub init: &'a Path,
    /// Files of the suite, each with its place.
    pub texts: &'a [(&'a str, String)],
    /// Where programs without their debug information are put.
    pub scratch: &'a Path,
}

impl Image<'_> {
    /// Writes it to `path` and gives its size in bytes.
    ///
    /// # Errors
    /// Something is missing or cannot be read or written.
    pub fn write(&self, path: &Path) -> Result<u64, Failure> {
        let file = fs::File::create(path).map_err(|error| failed(path, &error))?;
        let mut tree = Tree { archive: Archive::new(BufWriter::new(file)), folders: BTreeSet::new() };
        tree.fill(self)?;
        tree.archive.finish().map_err(|error| failed(path, &error))?;
        fs::metadata(path).map(|made| made.len()).map_err(|error| failed(path, &error))
    }
}

struct Tree<W: Write> {
    archive: Archive<W>,
    folders: BTreeSet<String>,
}

impl<W: Write> Tree<W> {
    fn fill(&mut self, image: &Image<'_>) -> Result<(), Failure> {
        for folder in ["proc", "sys", "dev", "tmp", "run", "root", "sbin"] {
            self.folder(folder).map_err(|error| failed(Path::new(folder), &error))?;
        }
        self.copy("bin/busybox", &image.tools.join("usr/bin/busybox"))?;
        self.copy("init", image.init)?;
        let link =
            self.archive.link("bin/sh", "busybox").and_then(|()| self.archive.link("sbin/modprobe", "../bin/busybox"));
        link.map_err(|error| failed(Path::new("bin/sh"), &error))?;
        for (place, text) in
            SMALL.iter().copied().chain(image.texts.iter().map(|(place, text)| (*place, text.as_str())))
        {
            self.put(place, false, text.as_bytes()).map_err(|error| failed(Path::new(place), &error))?;
        }
        let modules = image.kernel.join("lib/modules");
        self.copy_all("lib/modules", &modules)?;
        let mut libraries = BTreeSet::new();
        for (place, program) in image.programs {
            libraries.extend(libraries_of(program)?);
            let stripped = image.scratch.join(program.file_name().unwrap_or_default());
            // Without symbols an image is a fourth of its size; a machine without `strip` boots the large one.
            let done = Command::new("strip").arg("-s").arg("-o").arg(&stripped).arg(program).status();
            let stripped_well = done.is_ok_and(|status| status.success());
            self.copy(place, if stripped_well { &stripped } else { program })?;
            let _ = fs::remove_file(&stripped);
        }
        for library in libraries {
            self.copy(library.trim_start_matches('/'), Path::new(&library))?;
        }
        Ok(())
    }

    /// Adds a folder and those that it is in.
    fn folder(&mut self, path: &str) -> io::Result<()> {
        if path.is_empty() || !self.folders.insert(path.to_owned()) {
            return Ok(());
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.folder(parent)?;
        }
        self.archive.folder(path)
    }

    fn put(&mut self, place: &str, executable: bool, content: &[u8]) -> io::Result<()> {
        self.folder(place.rsplit_once('/').map_or("", |(parent, _)| parent))?;
        self.archive.file(place, executable, content)
    }

    fn copy(&mut self, place: &str, from: &Path) -> Result<(), Failure> {
        let content = fs::read(from).map_err(|error| failed(from, &error))?;
        self.put(place, true, &content).map_err(|error| failed(from, &error))
    }

    fn copy_all(&mut self, place: &str, from: &Path) -> Result<(), Failure> {
        let mut entries =
            fs::read_dir(from).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(|e| failed(from, &e))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let place = format!("{place}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                self.copy_all(&place, &entry.path())?;
            } else {
                self.copy(&place, &entry.path())?;
            }
        }
        Ok(())
    }
}

/// The shared libraries of a program and its loader, as this machine finds them.
fn libraries_of(program: &Path) -> Result<Vec<String>, Failure> {
    let listed = output(Command::new("ldd").arg(program).env("LC_ALL", "C"))?;
    if let Some(line) = listed.lines().find(|line| line.contains("not found")) {
        return Err(Failure(format!("{}: {}", program.display(), line.trim())));
    }
    Ok(parse(&listed))
}

/// Lines are `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f..)`, the loader's begins with its path.
fn parse(listed: &str) -> Vec<String> {
    let paths = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    paths.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found() {
        let listed = "\tlinux-vdso.so.1 (0x00007)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007)\n";
        assert_eq!(parse(listed), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        let own = std::env::current_exe().unwrap();
        assert!(libraries_of(&own).unwrap().iter().any(|path| path.contains("libc.so")));
    }
}
