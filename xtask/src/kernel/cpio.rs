//! Writes an archive in the format that the kernel unpacks as its first file system ("newc", as
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes it).

use std::io::{self, Write};

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive in the making. Parents must be added before what is in them.
pub struct Archive<W: Write> {
    out: W,
    written: usize,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    /// A folder that everybody may enter. `path` has no leading slash.
    ///
    /// # Errors
    /// Writing failed.
    pub fn folder(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, FOLDER | 0o755, &[])
    }

    /// A file, executable or not.
    ///
    /// # Errors
    /// Writing failed, or the file has 4 GiB or more.
    pub fn file(&mut self, path: &str, executable: bool, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | if executable { 0o755 } else { 0o644 }, content)
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// Writing failed.
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, LINK | 0o777, target.as_bytes())
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// Writing failed.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| io::Error::other(format!("{path} is too large")))?;
        self.inode += 1;
        // Magic, inode, mode, uid, gid, links, mtime, size, device (2), device of a node (2), name with its NUL, checksum.
        let name = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08x}");
        }
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.align()?;
        self.put(content)?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    /// Header with name, and content, each end at a multiple of four.
    fn align(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_laid_out_as_the_kernel_reads_them() {
        let mut archive = Archive::new(Vec::new());
        archive.folder("bin").unwrap();
        archive.file("bin/a", true, b"12345").unwrap();
        archive.link("sh", "bin/a").unwrap();
        let bytes = archive.finish().unwrap();
        let mut at = 0;
        let mut seen = Vec::new();
        loop {
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + index * 8..at + 14 + index * 8]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (mode, size, name) = (field(1), field(6), field(11));
            let path = std::str::from_utf8(&bytes[at + 110..at + 110 + name - 1]).unwrap().to_owned();
            assert_eq!(bytes[at + 110 + name - 1], 0);
            let start = (at + 110 + name).next_multiple_of(4);
            at = (start + size).next_multiple_of(4);
            if path == "TRAILER!!!" {
                break;
            }
            seen.push((path, mode, String::from_utf8(bytes[start..start + size].to_vec()).unwrap()));
        }
        assert_eq!(at, bytes.len());
        let seen: Vec<_> = seen.iter().map(|(p, m, c)| (p.as_str(), *m, c.as_str())).collect();
        assert_eq!(seen, [("bin", 0o040_755, ""), ("bin/a", 0o100_755, "12345"), ("sh", 0o120_777, "bin/a")]);
    }
}
