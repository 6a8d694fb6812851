//! The little of ELF that a linked eBPF object needs: dropping what is only for debuggers, and comparing two by
//! sections.
//!
//! Done here rather than by a tool, so that the bytes do not depend on which one a machine has.

use std::collections::BTreeMap;
use std::fmt;

const HEADER: usize = 64;
const SECTION: usize = 64;
const SYMBOL: usize = 24;
const RELOCATION: usize = 16;

const SYMTAB: u32 = 2;
const STRTAB: u32 = 3;
const REL: u32 = 9;
/// Section indices from here on are no indices.
const RESERVED: u16 = 0xff00;
/// Type of a symbol that names a source file.
const FILE: u8 = 4;

/// Why a file is not an object that can be stripped.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed(&'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not an eBPF object: {}", self.0)
    }
}

/// The object without debugging sections and their relocations, symbols of files, and names of local functions, which
/// carry a hash of the place where they were built. Stripping twice changes nothing.
///
/// # Errors
/// When it is no little-endian ELF64 object.
pub fn strip(object: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut sections = parse(object)?;
    let kept: Vec<usize> = (0..sections.len()).filter(|index| is_kept(&sections[*index])).collect();
    let new_index: BTreeMap<usize, usize> = kept.iter().enumerate().map(|(new, old)| (*old, new)).collect();

    let symtab = sections.iter().position(|section| section.kind == SYMTAB).ok_or(Malformed("no symbol table"))?;
    let strings = link(&sections, symtab)?;
    let (symbols, names, locals, moved) = symbols(&sections[symtab].data, &sections[strings].data, &new_index)?;
    sections[symtab].data = symbols;
    sections[symtab].info = locals;
    let mut names = names;
    for section in &mut sections {
        if section.kind == REL {
            section.data = relocations(&section.data, &moved)?;
        }
    }
    // One table holds the names of symbols and of sections.
    let mut name_offsets = vec![0_u32; sections.len()];
    for index in &kept {
        name_offsets[*index] = add_name(&mut names, &sections[*index].name)?;
    }
    sections[strings].data = names;
    write(object, &sections, &kept, &new_index, &name_offsets, strings)
}

/// The names of the sections in which two objects differ.
///
/// # Errors
/// When one is no object.
pub fn difference(one: &[u8], other: &[u8]) -> Result<String, Malformed> {
    let by_name = |object: &[u8]| -> Result<BTreeMap<String, Vec<u8>>, Malformed> {
        Ok(parse(object)?.into_iter().map(|section| (section.name, section.data)).collect())
    };
    let (one, other) = (by_name(one)?, by_name(other)?);
    let names = one.keys().chain(other.keys().filter(|name| !one.contains_key(*name)));
    let differing: Vec<&str> = names.filter(|name| one.get(*name) != other.get(*name)).map(String::as_str).collect();
    Ok(if differing.is_empty() { String::from("layout only") } else { format!("sections {}", differing.join(", ")) })
}

struct Section {
    name: String,
    kind: u32,
    flags: u64,
    link: u32,
    info: u32,
    align: u64,
    entry: u64,
    data: Vec<u8>,
}

fn is_kept(section: &Section) -> bool {
    let name = section.name.strip_prefix(".rel").unwrap_or(&section.name);
    // The loader fixes BTF by itself.
    let is_relocation_of_btf = section.kind == REL && name.starts_with(".BTF");
    !name.starts_with(".debug") && !is_relocation_of_btf && name != ".llvm_addrsig"
}

fn parse(object: &[u8]) -> Result<Vec<Section>, Malformed> {
    // Magic, 64 bits, little endian.
    if object.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(Malformed("no ELF64 header"));
    }
    let table = usize(u64_at(object, 40)?)?;
    let count = usize::from(u16_at(object, 60)?);
    let names_index = usize::from(u16_at(object, 62)?);
    let header = |index: usize| {
        let start = index.checked_mul(SECTION).and_then(|offset| table.checked_add(offset));
        let start = start.ok_or(Malformed("section headers"))?;
        slice(object, start, SECTION)
    };
    let data = |header: &[u8]| slice(object, usize(u64_at(header, 24)?)?, usize(u64_at(header, 32)?)?);
    let names = data(header(names_index)?)?;
    let mut sections = Vec::with_capacity(count);
    for index in 0..count {
        let header = header(index)?;
        let kind = u32_at(header, 4)?;
        sections.push(Section {
            name: text(names, u32_at(header, 0)?)?,
            kind,
            flags: u64_at(header, 8)?,
            link: u32_at(header, 40)?,
            info: u32_at(header, 44)?,
            align: u64_at(header, 48)?,
            entry: u64_at(header, 56)?,
            data: if kind == 0 { Vec::new() } else { data(header)?.to_vec() },
        });
    }
    Ok(sections)
}

fn link(sections: &[Section], index: usize) -> Result<usize, Malformed> {
    let linked = usize(sections[index].link.into())?;
    match sections.get(linked) {
        Some(section) if section.kind == STRTAB => Ok(linked),
        _ => Err(Malformed("no string table")),
    }
}

/// The symbols that stay, their names, how many are local, and where each old one went.
type Symbols = (Vec<u8>, Vec<u8>, u32, BTreeMap<u32, u32>);

fn symbols(table: &[u8], strings: &[u8], sections: &BTreeMap<usize, usize>) -> Result<Symbols, Malformed> {
    let (mut kept, mut names, mut locals) = (Vec::new(), vec![0], 0);
    let mut moved = BTreeMap::new();
    for (old, symbol) in (0_u32..).zip(table.chunks_exact(SYMBOL)) {
        let info = symbol[4];
        let section = u16_at(symbol, 6)?;
        let new_section = match section {
            0 => 0,
            RESERVED.. => section,
            index => match sections.get(&usize::from(index)) {
                Some(new) => u16::try_from(*new).map_err(|_| Malformed("too many sections"))?,
                None => continue,
            },
        };
        if info & 0xf == FILE {
            continue;
        }
        let new = u32::try_from(kept.len() / SYMBOL).map_err(|_| Malformed("too many symbols"))?;
        let is_local = info >> 4 == 0;
        locals += u32::from(is_local);
        let name = text(strings, u32_at(symbol, 0)?)?;
        // Mangled names of local functions; the programs themselves are global.
        let name = if is_local && name.starts_with("_R") { format!("local{new}") } else { name };
        kept.extend(add_name(&mut names, &name)?.to_le_bytes());
        kept.extend([info, symbol[5]]);
        kept.extend(new_section.to_le_bytes());
        kept.extend(&symbol[8..]);
        moved.insert(old, new);
    }
    Ok((kept, names, locals, moved))
}

fn relocations(table: &[u8], moved: &BTreeMap<u32, u32>) -> Result<Vec<u8>, Malformed> {
    let mut kept = Vec::with_capacity(table.len());
    for relocation in table.chunks_exact(RELOCATION) {
        // Those of dropped sections name dropped symbols; they are dropped with their section.
        let symbol = moved.get(&u32_at(relocation, 12)?).copied().unwrap_or(0);
        kept.extend(&relocation[..12]);
        kept.extend(symbol.to_le_bytes());
    }
    Ok(kept)
}

fn write(
    object: &[u8],
    sections: &[Section],
    kept: &[usize],
    new_index: &BTreeMap<usize, usize>,
    name_offsets: &[u32],
    strings: usize,
) -> Result<Vec<u8>, Malformed> {
    let mapped = |old: u32| -> Result<u32, Malformed> {
        let new = new_index.get(&usize(old.into())?).copied().unwrap_or(0);
        u32::try_from(new).map_err(|_| Malformed("too many sections"))
    };
    let mut out = slice(object, 0, HEADER)?.to_vec();
    let mut headers = Vec::with_capacity(kept.len() * SECTION);
    for index in kept {
        let section = &sections[*index];
        while !(out.len() as u64).is_multiple_of(section.align.max(1)) {
            out.push(0);
        }
        let offset = if section.kind == 0 { 0 } else { out.len() as u64 };
        let info = if section.kind == REL { mapped(section.info)? } else { section.info };
        headers.extend(name_offsets[*index].to_le_bytes());
        headers.extend(section.kind.to_le_bytes());
        headers.extend(section.flags.to_le_bytes());
        headers.extend(0_u64.to_le_bytes());
        headers.extend(offset.to_le_bytes());
        headers.extend((section.data.len() as u64).to_le_bytes());
        headers.extend(mapped(section.link)?.to_le_bytes());
        headers.extend(info.to_le_bytes());
        headers.extend(section.align.to_le_bytes());
        headers.extend(section.entry.to_le_bytes());
        out.extend(&section.data);
    }
    while !out.len().is_multiple_of(8) {
        out.push(0);
    }
    let table = (out.len() as u64).to_le_bytes();
    let count = u16::try_from(kept.len()).map_err(|_| Malformed("too many sections"))?;
    let names = new_index.get(&strings).ok_or(Malformed("no string table"))?;
    let names = u16::try_from(*names).map_err(|_| Malformed("too many sections"))?;
    out.extend(headers);
    out[40..48].copy_from_slice(&table);
    out[60..62].copy_from_slice(&count.to_le_bytes());
    out[62..64].copy_from_slice(&names.to_le_bytes());
    Ok(out)
}

/// Adds a name to a string table, once.
fn add_name(names: &mut Vec<u8>, name: &str) -> Result<u32, Malformed> {
    if name.is_empty() {
        return Ok(0);
    }
    let mut wanted = Vec::with_capacity(name.len() + 2);
    wanted.push(0);
    wanted.extend(name.as_bytes());
    wanted.push(0);
    let offset = names.windows(wanted.len()).position(|found| found == wanted).map(|position| position + 1);
    let offset = offset.unwrap_or_else(|| {
        let offset = names.len();
        names.extend(&wanted[1..]);
        offset
    });
    u32::try_from(offset).map_err(|_| Malformed("string table too long"))
}

fn text(strings: &[u8], offset: u32) -> Result<String, Malformed> {
    let rest = strings.get(usize(offset.into())?..).ok_or(Malformed("name outside of the string table"))?;
    let end = rest.iter().position(|byte| *byte == 0).ok_or(Malformed("name without an end"))?;
    Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
}

fn slice(bytes: &[u8], start: usize, length: usize) -> Result<&[u8], Malformed> {
    let end = start.checked_add(length).ok_or(Malformed("cut short"))?;
    bytes.get(start..end).ok_or(Malformed("cut short"))
}

fn usize(value: u64) -> Result<usize, Malformed> {
    usize::try_from(value).map_err(|_| Malformed("cut short"))
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, Malformed> {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map(|chunk| u16::from_le_bytes(*chunk)).ok_or(Malformed("cut short"))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Malformed> {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map(|chunk| u32::from_le_bytes(*chunk)).ok_or(Malformed("cut short"))
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, Malformed> {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map(|chunk| u64::from_le_bytes(*chunk)).ok_or(Malformed("cut short"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn committed() -> Vec<u8> {
        std::fs::read(crate::root().join(super::super::OBJECT)).unwrap()
    }

    #[test]
    fn committed_object_is_stripped() {
        let object = committed();
        assert_eq!(strip(&object).unwrap(), object);
        assert!(object.len() < 96 << 10, "{} bytes", object.len());
        let names: Vec<String> = parse(&object).unwrap().into_iter().map(|section| section.name).collect();
        for wanted in ["cgroup/connect4", "cgroup/connect6", "sk_lookup", ".BTF", ".BTF.ext", ".maps", "license"] {
            assert!(names.iter().any(|name| name == wanted), "{wanted} in {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains(".debug")), "{names:?}");
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let object = committed();
        for length in (0..object.len()).step_by(101) {
            assert!(strip(&object[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn difference_names_the_section() {
        let object = committed();
        let mut changed = object.clone();
        let at = object.windows(12).position(|found| found == b"Dual MIT/GPL").unwrap();
        changed[at] = b'd';
        assert_eq!(difference(&object, &changed).unwrap(), "sections license");
        assert_eq!(difference(&object, &object).unwrap(), "layout only");
    }
}
