//! The Linux/x86 boot protocol (`Documentation/arch/x86/boot.rst`): bzImage by its 64-bit entry, or by its 32-bit
//! entry where it has no other, and ELF64 kernels, which are entered as the former.

use std::ops::Range;

use crate::bytes::{array, u16_at, u32_at, u64_at};
use crate::entry;
use crate::error::BootError;
use crate::kernel::Boot;
use crate::layout::{FOUR_GIB, HIGH_MEMORY};
use crate::zero_page::ZeroPage;
use crate::{BootKind, Input, Loaded};

const SECTOR: u64 = 512;
/// Offset of the setup header in the file.
const HEADER: usize = 0x1f1;
/// The header ends this far behind the byte at 0x201 at the latest (it is a byte).
const HEADER_MAX: usize = 0x202 + 0xff;
/// `LOADED_HIGH` in loadflags: the protected-mode part belongs at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// `XLF_KERNEL_64` in xloadflags: there is a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `XLF_CAN_BE_LOADED_ABOVE_4G` in xloadflags: so can its initial RAM disk.
const XLF_ABOVE_4G: u16 = 1 << 1;
/// The 64-bit entry point, from the start of the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// Highest initial RAM disk address of protocols before 2.03.
const OLD_INITRD_MAX: u32 = 0x37ff_ffff;
/// `COMMAND_LINE_SIZE` of Linux/x86, without the NUL: what an ELF kernel takes.
const ELF_CMDLINE: u64 = 2047;

/// What the setup header of a bzImage says.
pub(crate) struct Header {
    /// The header itself, from [`HEADER`], as it goes to the zero page.
    bytes: Vec<u8>,
    /// Where the protected-mode part is in the file.
    offset: u64,
    /// Bytes of it to load.
    len: u64,
    /// Whether the 64-bit entry is there.
    is_64: bool,
    above_4g: bool,
    relocatable: bool,
    alignment: u64,
    preferred: u64,
    /// Bytes that it needs from where it runs until it has looked at the memory map.
    footprint: u64,
    initrd_max: u32,
    cmdline_limit: u64,
}

impl Header {
    /// Reads the setup header; `None` if the file is no Linux kernel.
    pub(crate) fn find(input: &Input, head: &[u8]) -> Result<Option<Self>, BootError> {
        if u16_at(head, 0x1fe) != Some(0xaa55) || array(head, 0x202) != Some(*b"HdrS") {
            return Ok(None);
        }
        let cut = |need| input.truncated("the setup header", need);
        let fixed = head.get(..0x280).ok_or_else(|| cut(0x280))?;
        let word = |at| u16_at(fixed, at).unwrap_or(0);
        let long = |at| u32_at(fixed, at).unwrap_or(0);
        let version = word(0x206);
        // Fields beyond the version's end are not the header's.
        let since = |first, value: u32, or: u32| if version >= first { value } else { or };
        if version < 0x202 || fixed[0x211] & LOADED_HIGH == 0 {
            return Err(input.format(format!(
                "is a Linux zImage of boot protocol {}.{:02}; only bzImages of 2.02 or later are supported",
                version >> 8,
                version & 0xff
            )));
        }
        let sectors = if fixed[HEADER] == 0 { 4 } else { u64::from(fixed[HEADER]) };
        let offset = (sectors + 1) * SECTOR;
        let claimed = u64::from(since(0x204, long(0x1f4), 0)) * 16;
        let have = input.size().saturating_sub(offset);
        // The size counts paragraphs, and the last one need not be complete.
        if have == 0 || have.saturating_add(15) < claimed {
            return Err(input.truncated("the kernel", offset + claimed.max(1)));
        }
        let len = if claimed == 0 { have } else { have.min(claimed) };
        let relocatable = version >= 0x205 && fixed[0x234] != 0;
        let alignment = u64::from(since(0x205, long(0x230), 0x1000)).max(0x1000);
        let preferred = if version >= 0x20a { u64_at(fixed, 0x258).unwrap_or(0) } else { HIGH_MEMORY };
        if !alignment.is_power_of_two() || !(HIGH_MEMORY..FOUR_GIB).contains(&preferred) {
            return Err(input.format(format!(
                "wants to be at {preferred:#x}, aligned to {alignment:#x}, which cannot be; it is damaged"
            )));
        }
        let xloadflags = since(0x20c, word(0x236).into(), 0) as u16;
        let is_64 = xloadflags & XLF_KERNEL_64 != 0;
        if is_64 && len <= ENTRY_64 {
            return Err(input.truncated("the 64-bit entry point", offset + ENTRY_64 + 1));
        }
        let end = (0x202 + usize::from(fixed[0x201])).clamp(0x220, HEADER_MAX);
        let bytes = head.get(HEADER..end).ok_or_else(|| cut(end as u64))?.to_vec();
        Ok(Some(Self {
            bytes,
            offset,
            len,
            is_64,
            above_4g: is_64 && xloadflags & XLF_ABOVE_4G != 0,
            relocatable,
            alignment,
            preferred,
            footprint: len.max(since(0x20a, long(0x260), 0).into()),
            initrd_max: since(0x203, long(0x22c), OLD_INITRD_MAX),
            cmdline_limit: match since(0x206, long(0x238), 255) {
                0 => 255,
                limit => limit.into(),
            },
        }))
    }

    /// Chooses where the kernel goes and takes all that it needs there.
    fn place(&self, boot: &mut Boot<'_>) -> Result<u64, BootError> {
        if self.relocatable {
            // Below its preferred address a kernel only moves up again.
            let within = self.preferred..boot.space.layout().low_end().max(self.preferred);
            if let Some(start) = boot.space.lowest(self.footprint, self.alignment, within, "kernel") {
                return Ok(start);
            }
        }
        boot.claim(self.preferred..self.preferred + self.footprint, "kernel").map(|()| self.preferred)
    }

    /// Puts the initial RAM disk as high as the kernel can read it; returns where.
    fn place_initrd(&self, boot: &mut Boot<'_>, initrd: &Input) -> Result<u64, BootError> {
        let below = HIGH_MEMORY..(u64::from(self.initrd_max) + 1).max(HIGH_MEMORY);
        let anywhere = HIGH_MEMORY..u64::MAX;
        let mut highest =
            |within: &Range<u64>| boot.space.highest(initrd.size(), 0x1000, within.clone(), "initrd");
        let start = highest(&below).or_else(|| self.above_4g.then(|| highest(&anywhere)).flatten());
        start.ok_or_else(|| {
            if self.above_4g {
                boot.too_large(initrd, anywhere, "left by the kernel".into())
            } else {
                let what = format!("below {:#x}, where this kernel can read it,", below.end);
                boot.too_large(initrd, below, what)
            }
        })
    }
}

/// Loads a bzImage.
pub(crate) fn load(mut boot: Boot<'_>, header: &Header) -> Result<Loaded, BootError> {
    no_modules(&boot)?;
    let start = header.place(&mut boot)?;
    boot.kernel.copy_to(boot.memory, start, header.offset, header.len, "the kernel")?;
    let initrd = match boot.initrd {
        Some(initrd) => Some((header.place_initrd(&mut boot, initrd)?, initrd)),
        None => None,
    };
    let mut page = ZeroPage::from_header(&header.bytes);
    if !header.is_64 {
        page.set_code32_start(start as u32);
    }
    let page = companions(&mut boot, page, initrd, header.cmdline_limit)?;
    let mut gpr = [0; 16];
    gpr[6] = page;
    let (kind, entry, state) = if header.is_64 {
        let entry = start + ENTRY_64;
        (BootKind::Linux64, entry, entry::long(boot.memory, &mut boot.space, entry, gpr)?)
    } else {
        (BootKind::Linux32, start, entry::protected(boot.memory, &mut boot.space, start as u32, gpr)?)
    };
    Ok(Loaded { kind, boot_state: Some(state), entry, rsdp: Some(boot.rsdp) })
}

/// Starts an ELF64 kernel that has been loaded, at its physical entry address.
pub(crate) fn start(mut boot: Boot<'_>, entry: u64) -> Result<Loaded, BootError> {
    no_modules(&boot)?;
    if entry >= FOUR_GIB {
        return Err(boot.kernel.format(format!("has its entry point {entry:#x} above 4 GiB")));
    }
    let within = HIGH_MEMORY..FOUR_GIB;
    let initrd = boot
        .initrd
        .map(|initrd| {
            boot.space
                .highest(initrd.size(), 0x1000, within.clone(), "initrd")
                .map(|start| (start, initrd))
                .ok_or_else(|| boot.too_large(initrd, within, "below 4 GiB".into()))
        })
        .transpose()?;
    let page = companions(&mut boot, ZeroPage::for_elf(ELF_CMDLINE as u32), initrd, ELF_CMDLINE)?;
    let mut gpr = [0; 16];
    gpr[6] = page;
    let state = entry::long(boot.memory, &mut boot.space, entry, gpr)?;
    Ok(Loaded { kind: BootKind::Elf64, boot_state: Some(state), entry, rsdp: Some(boot.rsdp) })
}

fn no_modules(boot: &Boot<'_>) -> Result<(), BootError> {
    if boot.modules.is_empty() {
        return Ok(());
    }
    let name = boot.kernel.name().into();
    Err(BootError::ModulesUnsupported { name, protocol: "the Linux boot protocol" })
}

/// Copies the initial RAM disk, puts the command line and the finished zero page; returns the latter's address.
fn companions(
    boot: &mut Boot<'_>,
    mut page: ZeroPage,
    initrd: Option<(u64, &Input)>,
    cmdline_limit: u64,
) -> Result<u64, BootError> {
    if let Some((start, initrd)) = initrd {
        boot.copy(initrd, start)?;
        page.set_ramdisk(start, initrd.size());
    }
    let cmdline = boot.place_cmdline(cmdline_limit)?;
    page.set_cmdline(cmdline);
    page.set_rsdp(boot.rsdp);
    let rest = page.set_e820(&boot.space.layout().e820());
    if !rest.is_empty() {
        page.set_data(boot.structure(&rest, "memory map")?);
    }
    boot.structure(page.bytes(), "zero page")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::put;
    use crate::testing::{Booted, Machine, Random, boot, failure, kernel, with_initrd};
    use crate::{Module, Payload, Role};

    /// A bzImage of three setup sectors.
    fn image(edit: impl Fn(&mut [u8])) -> Vec<u8> {
        let mut image = vec![0; 4 * 512];
        image[0x1f1] = 3;
        put(&mut image, 0x1f4, 0x100u32.to_le_bytes());
        put(&mut image, 0x1fe, 0xaa55u16.to_le_bytes());
        put(&mut image, 0x200, [0xeb, 0x66]);
        put(&mut image, 0x202, *b"HdrS");
        put(&mut image, 0x206, 0x020fu16.to_le_bytes());
        image[0x211] = LOADED_HIGH;
        put(&mut image, 0x214, 0x10_0000u32.to_le_bytes());
        put(&mut image, 0x22c, 0x7fff_ffffu32.to_le_bytes());
        put(&mut image, 0x230, 0x20_0000u32.to_le_bytes());
        image[0x234] = 1;
        put(&mut image, 0x236, 0x3u16.to_le_bytes());
        put(&mut image, 0x238, 2047u32.to_le_bytes());
        put(&mut image, 0x258, 0x100_0000u64.to_le_bytes());
        put(&mut image, 0x260, 0x40_0000u32.to_le_bytes());
        edit(&mut image);
        image.extend((0..0x1000u32).map(|i| (i / 7) as u8));
        image
    }

    fn field(booted: &Booted, at: u64) -> u32 {
        booted.memory.read_u32(booted.general().gpr[6] + at).unwrap()
    }

    #[test]
    fn the_64_bit_entry_is_taken_where_there_is_one() {
        let file = image(|_| ());
        let booted = boot(with_initrd(kernel(&file, "console=ttyS0"), b"archive"), 64 << 20).unwrap();
        assert_eq!((booted.loaded.kind, booted.loaded.entry), (BootKind::Linux64, 0x100_0200));
        assert_eq!(booted.bytes(0x100_0000, 0x1000), file[2048..]);
        assert_eq!(booted.general().rip, 0x100_0200);
        assert_eq!(booted.general().rflags, 2, "interrupts are off");
        assert_eq!(booted.system().efer, 0x500);
        assert_eq!(booted.string(field(&booted, 0x228).into()), "console=ttyS0");
        assert_eq!(booted.bytes(field(&booted, 0x218).into(), 7), b"archive");
        assert_eq!(field(&booted, 0x21c), 7);
        assert_eq!(field(&booted, 0x210) & 0xff, 0xff, "undefined boot loader");
        assert_eq!(u64::from(field(&booted, 0x70)), booted.loaded.rsdp.unwrap());
        assert_eq!(field(&booted, 0), 0, "screen_info");
        assert_eq!(field(&booted, 0x202), u32::from_le_bytes(*b"HdrS"));
        assert_eq!(field(&booted, 0x258), 0x100_0000);
        assert_eq!(field(&booted, 0x270), 0, "nothing behind the header");
    }

    #[test]
    fn without_it_the_32_bit_entry_is() {
        let file = image(|h| {
            put(h, 0x236, [0, 0]);
            h[0x234] = 0;
            put(h, 0x258, 0x10_0000u64.to_le_bytes());
        });
        let booted = boot(kernel(&file, ""), 8 << 20).unwrap();
        assert_eq!((booted.loaded.kind, booted.loaded.entry), (BootKind::Linux32, 0x10_0000));
        assert_eq!(booted.system().cr0, 0x11);
        assert_eq!(booted.system().segments[1].selector, 0x10);
        assert_eq!(booted.system().segments[3].selector, 0x18);
        assert_eq!(field(&booted, 0x214), 0x10_0000);
        let old = image(|h| put(h, 0x206, 0x0202u16.to_le_bytes()));
        assert_eq!(boot(kernel(&old, ""), 8 << 20).unwrap().loaded.kind, BootKind::Linux32);
    }

    #[test]
    fn the_memory_map_is_the_layouts() {
        let booted = boot(kernel(&image(|_| ()), ""), 64 << 20).unwrap();
        let page = booted.general().gpr[6];
        let map = MemoryMap::read(&booted, page);
        let expected = crate::MemoryLayout::new(64 << 20, 0).unwrap().e820();
        assert_eq!(map.0, expected.iter().map(|e| (e.start, e.size, e.kind as u32)).collect::<Vec<_>>());
    }

    struct MemoryMap(Vec<(u64, u64, u32)>);

    impl MemoryMap {
        fn read(booted: &Booted, page: u64) -> Self {
            let count = booted.memory.read_u8(page + 0x1e8).unwrap();
            let at = |n: u8| page + 0x2d0 + u64::from(n) * 20;
            let m = &booted.memory;
            let entry = |n| {
                (m.read_u64(at(n)).unwrap(), m.read_u64(at(n) + 8).unwrap(), m.read_u32(at(n) + 16).unwrap())
            };
            Self((0..count).map(entry).collect())
        }
    }

    #[test]
    fn the_initrd_stays_where_the_kernel_can_read_it() {
        let low = |flags: u16| {
            image(|h| {
                put(h, 0x22c, 0x1ff_ffffu32.to_le_bytes());
                put(h, 0x236, flags.to_le_bytes());
            })
        };
        let start = |file: &[u8], len: usize| {
            let payload = with_initrd(kernel(file, ""), &vec![0x5a; len]);
            boot(payload, 64 << 20).map(|b| {
                assert_eq!(b.bytes(u64::from(field(&b, 0x218)) + len as u64 - 1, 1), [0x5a]);
                (field(&b, 0x218), field(&b, 0xc0))
            })
        };
        assert_eq!(start(&low(1), 0x1001).unwrap(), (0x1ff_e000, 0));
        assert_eq!(start(&low(1), 16 << 20).unwrap_err().code(), "ERR_INITRD_TOO_LARGE");
        assert_eq!(start(&low(3), 16 << 20).unwrap(), (0x300_0000, 0), "it can read all memory");
        assert_eq!(start(&low(3), 60 << 20).unwrap_err().code(), "ERR_INITRD_TOO_LARGE");
    }

    #[test]
    fn an_initrd_above_4_gib_is_told_in_full() {
        let payload = with_initrd(kernel(&image(|h| put(h, 0x22c, [0; 4])), ""), b"high");
        let booted = boot(payload, 5 << 30).unwrap();
        let start = u64::from(field(&booted, 0x218)) | u64::from(field(&booted, 0xc0)) << 32;
        assert_eq!(start, (6 << 30) - 0x1000);
        assert_eq!(booted.bytes(start, 4), b"high");
    }

    #[test]
    fn limits_of_the_header_are_kept() {
        let short = image(|h| put(h, 0x238, 5u32.to_le_bytes()));
        boot(kernel(&short, "12345"), 64 << 20).unwrap();
        let code = |file: &[u8], cmdline: &str, mib: u64| failure(kernel(file, cmdline), mib << 20).code();
        assert_eq!(code(&short, "123456", 64), "ERR_CMDLINE_TOO_LONG");
        assert_eq!(code(&image(|_| ()), "", 16), "ERR_MEMORY_TOO_SMALL");
        assert_eq!(code(&image(|h| h[0x211] = 0), "", 64), "ERR_KERNEL_FORMAT");
        assert_eq!(code(&image(|h| put(h, 0x230, [3, 0, 1, 0])), "", 64), "ERR_KERNEL_FORMAT");
        assert_eq!(code(&image(|h| put(h, 0x258, u64::MAX.to_le_bytes())), "", 64), "ERR_KERNEL_FORMAT");
        assert_eq!(code(&image(|h| put(h, 0x260, [0xff; 4])), "", 64), "ERR_KERNEL_PLACEMENT");
        let mut modules = kernel(&image(|_| ()), "");
        if let Payload::Kernel { modules, .. } = &mut modules {
            let input = Input::bytes(Role::Module(0), "m", [1]).unwrap();
            modules.push(Module { input, cmdline: String::new() });
        }
        assert_eq!(failure(modules, 64 << 20).code(), "ERR_MODULES_UNSUPPORTED");
    }

    #[test]
    fn every_truncation_is_noticed() {
        let file = image(|_| ());
        let machine = Machine::new(64 << 20, 0).unwrap();
        for len in 0x206..file.len() - 15 {
            let error = machine.load(kernel(&file[..len], "")).unwrap_err();
            assert_eq!(error.code(), "ERR_KERNEL_TRUNCATED", "cut to {len} of {}", file.len());
        }
        machine.load(kernel(&file[..file.len() - 15], "")).unwrap();
    }

    #[test]
    fn damage_never_panics() {
        let machine = Machine::new(64 << 20, 0).unwrap();
        let mut random = Random(5);
        let file = image(|_| ());
        for _ in 0..4000 {
            let mut file = file.clone();
            for _ in 0..=random.below(5) {
                let at = 0x1f1 + random.below(0x90) as usize;
                file[at] = if random.below(2) == 0 { random.next() as u8 } else { file[at] ^ 0x80 };
            }
            put(&mut file, 0x1fe, 0xaa55u16.to_le_bytes());
            put(&mut file, 0x202, *b"HdrS");
            drop(machine.load(with_initrd(kernel(&file, "x"), b"rd")));
        }
    }
}
