//! Multiboot 1 (Multiboot Specification 0.6.96): ELF and a.out kernels in 32-bit protected mode, with modules, a
//! command line and a memory map.

use crate::bytes::{Writer, u32_at};
use crate::elf::Elf;
use crate::entry;
use crate::error::BootError;
use crate::kernel::{Boot, MAX_CMDLINE};
use crate::layout::{EBDA, FOUR_GIB, HIGH_MEMORY};
use crate::{BootKind, Input, Loaded};

/// Magic number of the header, §3.1.2.
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at the entry point, §3.2.
const BOOT_MAGIC: u64 = 0x2bad_b002;
/// Requirements (bits 0-15) that are met: page-aligned modules, memory information. A video mode (bit 2) is a wish;
/// this machine has no video, and says so by leaving the fields out.
const KNOWN_FLAGS: u32 = 0b111;
/// Header flag 16: the address fields are valid.
const HAS_ADDRESSES: u32 = 1 << 16;
/// Information flags, §3.3: mem_*, cmdline, mods_*, mmap_*, boot_loader_name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const LOADER_NAME: &[u8] = b"skep\0";

/// The address fields of the header, §3.1.3: where an image that is not an ELF (or says it is not) goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

/// A multiboot header.
#[derive(Debug)]
pub(crate) struct Header {
    /// Where it is in the file.
    offset: u32,
    pub(crate) addresses: Option<Addresses>,
}

impl Header {
    /// Searches the start of the file, §3.1; `None` if there is no header.
    pub(crate) fn find(input: &Input, head: &[u8]) -> Result<Option<Self>, BootError> {
        let fields = |at: usize| Some((u32_at(head, at)?, u32_at(head, at + 4)?, u32_at(head, at + 8)?));
        let found = (0..head.len()).step_by(4).find_map(|at| match fields(at)? {
            (HEADER_MAGIC, flags, sum) if HEADER_MAGIC.wrapping_add(flags).wrapping_add(sum) == 0 => {
                Some((at, flags))
            }
            _ => None,
        });
        let Some((at, flags)) = found else { return Ok(None) };
        let unknown = flags & 0xffff & !KNOWN_FLAGS;
        if unknown != 0 {
            return Err(
                input.format(format!("asks for multiboot features that do not exist (flags {unknown:#x})"))
            );
        }
        let mut addresses = None;
        if flags & HAS_ADDRESSES != 0 {
            let field = |n: usize| {
                u32_at(head, at + 12 + 4 * n)
                    .ok_or_else(|| input.truncated("the multiboot header", at as u64 + 32))
            };
            addresses = Some(Addresses {
                header: field(0)?,
                load: field(1)?,
                load_end: field(2)?,
                bss_end: field(3)?,
                entry: field(4)?,
            });
        }
        Ok(Some(Self { offset: at as u32, addresses }))
    }
}

impl Addresses {
    /// Loads the image as the fields say; returns entry address and end of the kernel.
    fn load(&self, boot: &mut Boot<'_>, header_offset: u32) -> Result<(u64, u64), BootError> {
        let input = boot.kernel;
        let damaged = || input.format("has multiboot load addresses that contradict each other");
        let before = self.header.checked_sub(self.load).ok_or_else(damaged)?;
        let offset = u64::from(header_offset.checked_sub(before).ok_or_else(damaged)?);
        let start = u64::from(self.load);
        let len = match self.load_end {
            0 => input.size() - offset,
            end => u64::from(end.checked_sub(self.load).ok_or_else(damaged)?),
        };
        if offset + len > input.size() {
            return Err(input.truncated("the kernel", offset + len));
        }
        let end = start + len;
        let bss_end = match self.bss_end {
            0 => end,
            bss => u64::from(bss),
        };
        let inside = (start..bss_end.max(end)).contains(&self.entry.into());
        if bss_end < end || !inside {
            return Err(damaged());
        }
        boot.claim(start..bss_end, "image")?;
        input.copy_to(boot.memory, start, offset, len, "the kernel")?;
        boot.memory.zero(end, bss_end - end)?;
        Ok((self.entry.into(), bss_end))
    }
}

/// Loads the kernel, by the address fields of the header or as an ELF, and its companions.
pub(crate) fn load(mut boot: Boot<'_>, header: &Header, elf: Option<&Elf>) -> Result<Loaded, BootError> {
    let kernel = boot.kernel;
    let (entry, end) = match (&header.addresses, elf) {
        (Some(addresses), _) => addresses.load(&mut boot, header.offset)?,
        (None, Some(elf)) => {
            elf.load(&mut boot)?;
            (elf.entry(kernel)?, elf.end())
        }
        (None, None) => return Err(kernel.format("has no load addresses")),
    };
    let entry = u32::try_from(entry)
        .map_err(|_| kernel.format(format!("has its entry point {entry:#x} above 4 GiB")))?;
    let modules = boot.place_modules(end.clamp(HIGH_MEMORY, FOUR_GIB))?;
    let cmdline = boot.place_cmdline(MAX_CMDLINE)?;
    let list = modules
        .iter()
        .fold(Writer::default(), |w, m| {
            w.u32(m.start as u32).u32((m.start + m.size) as u32).u32(m.cmdline as u32).u32(0)
        })
        .finish();
    let list_at = if list.is_empty() { 0 } else { boot.structure(&list, "module list")? };
    // The size field of an entry does not count itself, §3.3.
    let map = boot
        .space
        .layout()
        .e820()
        .iter()
        .fold(Writer::default(), |w, e| w.u32(20).u64(e.start).u64(e.size).u32(e.kind as u32))
        .finish();
    let map_at = boot.structure(&map, "memory map")?;
    let loader = boot.structure(LOADER_NAME, "boot loader name")?;
    let upper = boot.space.layout().low_end() - HIGH_MEMORY;
    let info = Writer::default()
        .u32(INFO_FLAGS)
        .u32((EBDA / 1024) as u32)
        .u32((upper / 1024) as u32)
        .u32(0) // boot_device
        .u32(cmdline as u32)
        .u32(modules.len() as u32)
        .u32(list_at as u32)
        .zeros(16) // syms
        .u32(map.len() as u32)
        .u32(map_at as u32)
        .zeros(12) // drives, config_table
        .u32(loader as u32)
        .zeros(52) // apm_table, vbe_*, framebuffer_*
        .finish();
    let info = boot.structure(&info, "multiboot information")?;
    let mut gpr = [0; 16];
    gpr[0] = BOOT_MAGIC;
    gpr[3] = info;
    Ok(Loaded {
        kind: BootKind::Multiboot,
        boot_state: Some(entry::protected(boot.memory, &mut boot.space, entry, gpr)?),
        entry: entry.into(),
        rsdp: Some(boot.rsdp),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::{elf32, elf64, load_part};
    use crate::testing::{Booted, Machine, Random, boot, failure, kernel, with_initrd};
    use crate::{Module, Payload, Role};

    fn header(flags: u32) -> Writer {
        let sum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        Writer::default().u32(HEADER_MAGIC).u32(flags).u32(sum)
    }

    /// An image with address fields, whose header is at offset 8.
    fn kludge(edit: impl Fn(&mut [u32; 5])) -> Vec<u8> {
        let mut fields = [0x10_0008, 0x10_0000, 0x10_0100, 0x10_0200, 0x10_0040];
        edit(&mut fields);
        let header = fields.iter().fold(header(HAS_ADDRESSES | 3), |w, &f| w.u32(f)).finish();
        let image = Writer::default().zeros(8).bytes(&header).zeros(32).finish();
        Writer::default().bytes(&image).bytes(&vec![0x90; 0x200 - image.len()]).finish()
    }

    fn info(booted: &Booted, at: u64) -> u32 {
        booted.memory.read_u32(booted.general().gpr[3] + at).unwrap()
    }

    #[test]
    fn elf_kernels_of_both_classes_get_modules_and_strings() {
        let code = header(3).bytes(&[0xf4; 64]).finish();
        let parts = [load_part(0x10_0000, &code, 0x2345)];
        for image in [elf32(0x10_000c, &parts), elf64(62, 0xffff_ffff_8010_000c, &parts)] {
            let mut payload = with_initrd(kernel(&image, "a=b c"), b"first");
            if let Payload::Kernel { modules, .. } = &mut payload {
                let input = Input::bytes(Role::Module(0), "m", vec![7; 5000]).unwrap();
                modules.push(Module { input, cmdline: "second x".into() });
            }
            let booted = boot(payload, 32 << 20).unwrap();
            assert_eq!((booted.loaded.kind, booted.loaded.entry), (BootKind::Multiboot, 0x10_000c));
            assert_eq!(booted.general().gpr[0], BOOT_MAGIC);
            assert_eq!(info(&booted, 0), INFO_FLAGS);
            assert_eq!((info(&booted, 4), info(&booted, 8)), (639, 31 * 1024));
            assert_eq!(booted.string(info(&booted, 16).into()), "a=b c");
            assert_eq!(booted.string(info(&booted, 64).into()), "skep");
            assert_eq!(info(&booted, 20), 2);
            let module = |n: u64, field: u64| {
                let list = u64::from(info(&booted, 24));
                u64::from(booted.memory.read_u32(list + n * 16 + field * 4).unwrap())
            };
            assert_eq!(booted.bytes(module(0, 0), 5), b"first");
            assert_eq!(module(0, 0), 0x10_3000, "page-aligned behind the kernel");
            assert_eq!(module(0, 1) - module(0, 0), 5);
            assert_eq!(booted.string(module(0, 2)), "");
            assert_eq!(booted.bytes(module(1, 0), 5000), [7; 5000]);
            assert_eq!(booted.string(module(1, 2)), "second x");
            assert_eq!(booted.bytes(0x10_0000 + code.len() as u64, 8), [0; 8], "bss is cleared");
            assert_eq!(info(&booted, 44) % 24, 0);
            assert_eq!(booted.memory.read_u32(info(&booted, 48).into()).unwrap(), 20);
        }
    }

    #[test]
    fn address_fields_place_what_is_no_elf() {
        let booted = boot(kernel(&kludge(|_| ()), ""), 2 << 20).unwrap();
        assert_eq!(booted.loaded.entry, 0x10_0040);
        assert_eq!(booted.bytes(0x10_0000, 0x100), kludge(|_| ())[..0x100]);
        assert_eq!(booted.bytes(0x10_0100, 0x100), [0; 0x100]);
        assert_eq!(booted.bytes(0x10_0200, 1), [0xcc], "not ours");
        let booted = boot(kernel(&kludge(|f| (f[2], f[3]) = (0, 0)), ""), 2 << 20).unwrap();
        assert_eq!(booted.bytes(0x10_0100, 0x100), [0x90; 0x100], "to the end of the file");
    }

    #[test]
    fn fields_that_contradict_each_other_are_refused() {
        let code = |edit: fn(&mut [u32; 5])| failure(kernel(&kludge(edit), ""), 2 << 20).code();
        assert_eq!(code(|f| f[0] = 0xf_ffff), "ERR_KERNEL_FORMAT");
        assert_eq!(code(|f| f[0] = 0x10_0010), "ERR_KERNEL_FORMAT");
        assert_eq!(code(|f| f[2] = 0xf_ffff), "ERR_KERNEL_FORMAT");
        assert_eq!(code(|f| f[2] = 0x10_0201), "ERR_KERNEL_TRUNCATED");
        assert_eq!(code(|f| f[3] = 0x10_00ff), "ERR_KERNEL_FORMAT");
        assert_eq!(code(|f| f[4] = 0x10_0200), "ERR_KERNEL_FORMAT");
        assert_eq!(code(|f| f[3] = 0x1000_0000), "ERR_MEMORY_TOO_SMALL");
        let unknown = header(1 << 5).zeros(20).finish();
        assert_eq!(failure(kernel(&unknown, ""), 2 << 20).code(), "ERR_KERNEL_FORMAT");
        let bare = header(3).zeros(20).finish();
        assert_eq!(failure(kernel(&bare, ""), 2 << 20).code(), "ERR_KERNEL_FORMAT");
        let cut = &kludge(|_| ())[..30];
        assert_eq!(failure(kernel(cut, ""), 2 << 20).code(), "ERR_KERNEL_TRUNCATED");
    }

    #[test]
    fn damage_never_panics() {
        let machine = Machine::new(2 << 20, 0).unwrap();
        let mut random = Random(3);
        for _ in 0..4000 {
            let mut image = kludge(|f| {
                let (field, value) = (f.len() as u64, f[1]);
                f[(value as u64 % field) as usize] = value;
            });
            for _ in 0..=random.below(3) {
                let at = 20 + random.below(20) as usize;
                image[at] ^= 1 << random.below(8);
            }
            image.truncate(40 + random.below(500) as usize);
            drop(machine.load(with_initrd(kernel(&image, "x"), b"m")));
        }
    }
}
