//! Executables in the Executable and Linkable Format, 32 and 64 bits: segments into memory, notes out of the file.

use crate::Input;
use crate::bytes::{array, u16_at, u32_at, u64_at};
use crate::error::BootError;
use crate::kernel::Boot;

/// More program headers than any kernel has, and few enough that hostile ones cost nothing.
const MAX_SEGMENTS: u16 = 256;
/// More bytes of notes in one segment than any kernel has.
const MAX_NOTES: u64 = 1 << 16;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const ET_REL: u16 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const ET_CORE: u16 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;

/// A part of the file that goes to memory.
#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_size: u64,
    memory_size: u64,
}

/// A parsed executable for this machine.
#[derive(Debug)]
pub(crate) struct Elf {
    /// ELFCLASS64.
    pub(crate) is_64: bool,
    entry: u64,
    segments: Vec<Segment>,
}

/// A note: owner without its NUL, type, contents.
pub(crate) struct Note {
    pub(crate) owner: Vec<u8>,
    pub(crate) kind: u32,
    pub(crate) contents: Vec<u8>,
}

/// What an ELF for another machine is for (the e_machine registry of the System V ABI).
fn machine_name(machine: u16) -> String {
    let name = match machine {
        2 | 18 | 43 => "SPARC",
        4 => "Motorola 68000",
        8 | 10 => "MIPS",
        15 => "PA-RISC",
        20 => "PowerPC",
        21 => "PowerPC64",
        22 => "IBM S/390",
        40 => "ARM",
        42 => "SuperH",
        50 => "IA-64",
        183 => "AArch64",
        243 => "RISC-V",
        247 => "BPF",
        258 => "LoongArch",
        _ => return format!("machine type {machine}"),
    };
    name.into()
}

impl Elf {
    /// Parses the headers; `None` if the file is no ELF at all.
    pub(crate) fn parse(input: &Input, head: &[u8]) -> Result<Option<Self>, BootError> {
        if !head.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        let cut = || input.truncated("the ELF header", 64);
        let [class, data] = array(head, 4).ok_or_else(cut)?;
        let is_64 = match class {
            1 => false,
            2 => true,
            _ => return Err(input.format(format!("is an ELF of unknown class {class}"))),
        };
        let kind = array(head, 16).ok_or_else(cut)?;
        let machine = array(head, 18).ok_or_else(cut)?;
        let (kind, machine) = match data {
            1 => (u16::from_le_bytes(kind), u16::from_le_bytes(machine)),
            2 => (u16::from_be_bytes(kind), u16::from_be_bytes(machine)),
            _ => return Err(input.format(format!("is an ELF of unknown byte order {data}"))),
        };
        if !matches!(machine, EM_386 | EM_X86_64) || data != 1 {
            return Err(BootError::Machine {
                role: input.role(),
                name: input.name().into(),
                format: "an ELF",
                machine: machine_name(machine),
            });
        }
        if !matches!(kind, ET_EXEC | ET_DYN) {
            return Err(input.format(match kind {
                ET_REL => "is an object file; link it into an executable".into(),
                ET_CORE => "is a core dump, not a kernel".into(),
                _ => format!("is an ELF of type {kind}, not an executable"),
            }));
        }
        let fields = if is_64 {
            (u64_at(head, 24), u64_at(head, 32), u16_at(head, 54), u16_at(head, 56))
        } else {
            let wide = |at| u32_at(head, at).map(u64::from);
            (wide(24), wide(28), u16_at(head, 42), u16_at(head, 44))
        };
        let (Some(entry), Some(table), Some(entry_size), Some(count)) = fields else {
            return Err(cut());
        };
        if count > MAX_SEGMENTS {
            return Err(input.format(format!("has {count} program headers; at most {MAX_SEGMENTS} are read")));
        }
        if entry_size != if is_64 { 56 } else { 32 } {
            return Err(input.format(format!("has program headers of {entry_size} bytes; it is damaged")));
        }
        let mut headers = vec![0; usize::from(count) * usize::from(entry_size)];
        let what = "the program header table";
        let need = table.checked_add(headers.len() as u64);
        if need.is_none_or(|need| need > input.size()) {
            return Err(input.truncated(what, need.unwrap_or(u64::MAX)));
        }
        input.read(table, &mut headers, what)?;
        let segments =
            headers.chunks_exact(usize::from(entry_size)).filter_map(|h| segment(h, is_64)).collect();
        Ok(Some(Self { is_64, entry, segments }))
    }

    /// The notes of the file, in order.
    pub(crate) fn notes(&self, input: &Input) -> Result<Vec<Note>, BootError> {
        let mut notes = Vec::new();
        for segment in self.segments.iter().filter(|s| s.kind == PT_NOTE) {
            let len = segment.file_size.min(MAX_NOTES);
            let end = segment.offset.saturating_add(len);
            if end > input.size() {
                return Err(input.truncated("a note segment", end));
            }
            let mut bytes = vec![0; len as usize];
            input.read(segment.offset, &mut bytes, "a note segment")?;
            let mut rest = bytes.as_slice();
            while let Some((note, next)) = note(rest) {
                notes.push(note);
                rest = next;
            }
        }
        Ok(notes)
    }

    /// Physical address of a virtual or physical address inside a segment.
    fn physical(&self, address: u64) -> Option<u64> {
        let mut loads = self.segments.iter().filter(|s| s.kind == PT_LOAD);
        if loads.clone().any(|s| address.checked_sub(s.paddr).is_some_and(|at| at < s.memory_size)) {
            return Some(address);
        }
        loads.find_map(|s| {
            let at = address.checked_sub(s.vaddr).filter(|&at| at < s.memory_size)?;
            s.paddr.checked_add(at)
        })
    }

    /// As [`Elf::physical`], or an error that names `what`.
    pub(crate) fn locate(&self, input: &Input, address: u64, what: &str) -> Result<u64, BootError> {
        self.physical(address)
            .ok_or_else(|| input.format(format!("has its {what} {address:#x} outside of what is loaded")))
    }

    /// The end of the highest segment, physical.
    pub(crate) fn end(&self) -> u64 {
        let loads = self.segments.iter().filter(|s| s.kind == PT_LOAD);
        loads.map(|s| s.paddr.saturating_add(s.memory_size)).max().unwrap_or(0)
    }

    /// The physical entry address.
    pub(crate) fn entry(&self, input: &Input) -> Result<u64, BootError> {
        self.locate(input, self.entry, "entry point")
    }

    /// Loads all segments at their physical addresses.
    pub(crate) fn load(&self, boot: &mut Boot<'_>) -> Result<(), BootError> {
        let input = boot.kernel;
        let loads = || self.segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_size > 0);
        if loads().next().is_none() {
            return Err(input.format("has no loadable segments; give the linked kernel"));
        }
        // First all checks and claims, then the copying, so that nothing is written twice.
        for s in loads() {
            if s.file_size > s.memory_size {
                return Err(input.format("has a segment larger in the file than in memory; it is damaged"));
            }
            let end = s.offset.saturating_add(s.file_size);
            if end > input.size() {
                return Err(input.truncated("a segment", end));
            }
            let end = s.paddr.checked_add(s.memory_size);
            let end =
                end.ok_or_else(|| input.format("has a segment that ends beyond 2^64; it is damaged"))?;
            boot.claim(s.paddr..end, "segment")?;
        }
        for s in loads() {
            input.copy_to(boot.memory, s.paddr, s.offset, s.file_size, "a segment")?;
            boot.memory.zero(s.paddr + s.file_size, s.memory_size - s.file_size)?;
        }
        Ok(())
    }
}

fn segment(header: &[u8], is_64: bool) -> Option<Segment> {
    let kind = u32_at(header, 0)?;
    if is_64 {
        return Some(Segment {
            kind,
            offset: u64_at(header, 8)?,
            vaddr: u64_at(header, 16)?,
            paddr: u64_at(header, 24)?,
            file_size: u64_at(header, 32)?,
            memory_size: u64_at(header, 40)?,
        });
    }
    let wide = |at| u32_at(header, at).map(u64::from);
    Some(Segment {
        kind,
        offset: wide(4)?,
        vaddr: wide(8)?,
        paddr: wide(12)?,
        file_size: wide(16)?,
        memory_size: wide(20)?,
    })
}

/// Takes one note off the front.
fn note(bytes: &[u8]) -> Option<(Note, &[u8])> {
    let owner_size = u32_at(bytes, 0)? as usize;
    let size = u32_at(bytes, 4)? as usize;
    let kind = u32_at(bytes, 8)?;
    let contents_at = 12usize.checked_add(owner_size)?.checked_next_multiple_of(4)?;
    let end = contents_at.checked_add(size)?;
    let owner = bytes.get(12..12 + owner_size)?;
    let owner = owner.strip_suffix(&[0]).unwrap_or(owner).to_vec();
    let contents = bytes.get(contents_at..end)?.to_vec();
    let rest = end.checked_next_multiple_of(4).and_then(|at| bytes.get(at..)).unwrap_or_default();
    Some((Note { owner, kind, contents }, rest))
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::BootKind;
    use crate::bytes::Writer;
    use crate::testing::{Machine, Random, boot, failure, kernel, with_initrd};

    /// One segment of an image to build.
    pub(crate) struct Part {
        pub(crate) kind: u32,
        pub(crate) address: u64,
        pub(crate) contents: Vec<u8>,
        pub(crate) memory_size: u64,
    }

    pub(crate) fn load_part(address: u64, contents: &[u8], memory_size: u64) -> Part {
        Part { kind: super::PT_LOAD, address, contents: contents.into(), memory_size }
    }

    pub(crate) fn note_part(owner: &str, kind: u32, contents: &[u8]) -> Part {
        let note = Writer::default()
            .u32(owner.len() as u32 + 1)
            .u32(contents.len() as u32)
            .u32(kind)
            .bytes(owner.as_bytes())
            .zeros(4 - owner.len() % 4)
            .bytes(contents)
            .zeros(contents.len().next_multiple_of(4) - contents.len())
            .finish();
        Part { kind: super::PT_NOTE, address: 0, memory_size: note.len() as u64, contents: note }
    }

    /// Builds an executable whose virtual addresses are 0xffffffff80000000 above the physical ones.
    pub(crate) fn elf64(machine: u16, entry: u64, parts: &[Part]) -> Vec<u8> {
        let mut image = Writer::default()
            .bytes(b"\x7fELF\x02\x01\x01")
            .zeros(9)
            .u16(super::ET_EXEC)
            .u16(machine)
            .u32(1)
            .u64(entry)
            .u64(64)
            .u64(0)
            .u32(0)
            .u16(64)
            .u16(56)
            .u16(parts.len() as u16)
            .zeros(6);
        let mut offset = 64 + 56 * parts.len() as u64;
        for part in parts {
            let size = part.contents.len() as u64;
            image = image
                .u32(part.kind)
                .u32(7)
                .u64(offset)
                .u64(part.address.wrapping_add(0xffff_ffff_8000_0000))
                .u64(part.address)
                .u64(size)
                .u64(part.memory_size)
                .u64(1);
            offset += size;
        }
        parts.iter().fold(image, |image, part| image.bytes(&part.contents)).finish()
    }

    /// The same with 32 bits; virtual addresses are the physical ones.
    pub(crate) fn elf32(entry: u32, parts: &[Part]) -> Vec<u8> {
        let mut image = Writer::default()
            .bytes(b"\x7fELF\x01\x01\x01")
            .zeros(9)
            .u16(super::ET_EXEC)
            .u16(super::EM_386)
            .u32(1)
            .u32(entry)
            .u32(52)
            .u32(0)
            .u32(0)
            .u16(52)
            .u16(32)
            .u16(parts.len() as u16)
            .zeros(6);
        let mut offset = 52 + 32 * parts.len() as u32;
        for part in parts {
            let size = part.contents.len() as u32;
            let address = part.address as u32;
            image = image
                .u32(part.kind)
                .u32(offset)
                .u32(address)
                .u32(address)
                .u32(size)
                .u32(part.memory_size as u32)
                .u32(7)
                .u32(1);
            offset += size;
        }
        parts.iter().fold(image, |image, part| image.bytes(&part.contents)).finish()
    }

    fn plain() -> Vec<u8> {
        elf64(
            62,
            0xffff_ffff_8020_0004,
            &[load_part(0x20_0000, &[0x90; 0x1234], 0x4000), load_part(0x20_4000, &[0xf4; 16], 16)],
        )
    }

    #[test]
    fn a_plain_elf64_starts_as_a_linux_kernel_does() {
        let booted = boot(with_initrd(kernel(&plain(), "quiet"), b"rd"), 16 << 20).unwrap();
        assert_eq!(booted.loaded.kind, BootKind::Elf64);
        assert_eq!(booted.loaded.entry, 0x20_0004, "virtual entry made physical");
        assert_eq!(booted.bytes(0x20_0000, 0x1234), [0x90; 0x1234]);
        assert_eq!(booted.bytes(0x20_1234, 0x4000 - 0x1234), [0; 0x4000 - 0x1234], "bss is cleared");
        assert_eq!(booted.bytes(0x20_4000, 16), [0xf4; 16]);
        let zero_page = booted.general().gpr[6];
        let u32_at = |at| booted.memory.read_u32(zero_page + at).unwrap();
        assert_eq!(u32_at(0x202), u32::from_le_bytes(*b"HdrS"));
        assert_eq!(booted.string(u32_at(0x228).into()), "quiet");
        assert_eq!(booted.bytes(u32_at(0x218).into(), 2), b"rd");
        assert_eq!(u32_at(0x21c), 2);
    }

    #[test]
    fn an_elf_that_cannot_be_is_refused() {
        let code = |image: &[u8]| failure(kernel(image, ""), 16 << 20).code();
        let one = |entry, part| code(&elf64(62, entry, &[part]));
        assert_eq!(code(&elf64(183, 0, &[])), "ERR_KERNEL_MACHINE");
        assert_eq!(code(&elf64(62, 0, &[])), "ERR_KERNEL_FORMAT");
        assert_eq!(code(&elf32(0x10_0000, &[load_part(0x10_0000, &[1], 1)])), "ERR_KERNEL_FORMAT");
        assert_eq!(one(0x10_0000, load_part(0x10_0000, &[1; 8], 4)), "ERR_KERNEL_FORMAT");
        assert_eq!(one(0x10_0001, load_part(0x10_0000, &[1], 1)), "ERR_KERNEL_FORMAT", "entry outside");
        assert_eq!(one(0xa_0000, load_part(0xa_0000, &[1], 1)), "ERR_KERNEL_PLACEMENT");
        assert_eq!(one(0x10_0000, load_part(0x10_0000, &[1], 1 << 30)), "ERR_MEMORY_TOO_SMALL");
        assert_eq!(one(u64::MAX, load_part(u64::MAX, &[1], 2)), "ERR_KERNEL_FORMAT");
        let twice = [load_part(0x10_0000, &[1; 8], 8), load_part(0x10_0007, &[1], 1)];
        assert_eq!(code(&elf64(62, 0x10_0000, &twice)), "ERR_KERNEL_PLACEMENT");
        let mut object = plain();
        object[16] = 1;
        assert!(failure(kernel(&object, ""), 16 << 20).to_string().contains("object file"));
        let mut other = plain();
        other[5] = 2;
        assert_eq!(code(&other), "ERR_KERNEL_MACHINE", "big-endian");
    }

    #[test]
    fn every_truncation_is_noticed() {
        let image = plain();
        let machine = Machine::new(16 << 20, 0).unwrap();
        for len in 4..image.len() {
            let error = machine.load(kernel(&image[..len], "")).unwrap_err();
            assert_eq!(error.code(), "ERR_KERNEL_TRUNCATED", "cut to {len} of {}", image.len());
        }
    }

    #[test]
    fn damage_never_panics() {
        let machine = Machine::new(8 << 20, 0).unwrap();
        let mut random = Random(11);
        let images =
            [plain(), elf64(62, 0x10_0000, &[load_part(0x10_0000, &[1], 1), note_part("Xen", 18, &[0; 4])])];
        for _ in 0..4000 {
            let mut image = images[random.below(2) as usize].clone();
            for _ in 0..=random.below(4) {
                let at = random.below(200.min(image.len() as u64)) as usize;
                image[at] = if random.below(2) == 0 {
                    random.next() as u8
                } else {
                    image[at] ^ (1 << random.below(8))
                };
            }
            image.truncate(random.below(image.len() as u64).max(1) as usize * 2);
            drop(machine.load(kernel(&image, "")));
        }
    }
}
