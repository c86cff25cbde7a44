//! The PVH direct boot protocol of Xen (`docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`):
//! an ELF note names a 32-bit entry point, EBX points to `hvm_start_info`.

use crate::bytes::{Writer, u32_at, u64_at};
use crate::elf::Elf;
use crate::entry;
use crate::error::BootError;
use crate::kernel::{Boot, MAX_CMDLINE, Placed};
use crate::layout::{FOUR_GIB, HIGH_MEMORY};
use crate::{BootKind, Input, Loaded};

/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;
/// `XEN_ELFNOTE_GUEST_OS`.
const GUEST_OS: u32 = 6;
/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
/// Version of the structure: the first with a memory map.
const START_VERSION: u32 = 1;
/// Linux copies this many bytes of a command line, whatever is there.
const LINUX_CMDLINE: u64 = 2047;

/// What the notes say.
pub(crate) struct Entry {
    address: u64,
    cmdline_limit: u64,
}

impl Entry {
    /// Looks for the entry note; `None` if the kernel has none.
    pub(crate) fn find(input: &Input, elf: &Elf) -> Result<Option<Self>, BootError> {
        let mut address = None;
        let mut cmdline_limit = MAX_CMDLINE;
        for note in elf.notes(input)?.iter().filter(|n| n.owner == b"Xen") {
            match note.kind {
                PHYS32_ENTRY => {
                    let value = match note.contents.len() {
                        4 => u32_at(&note.contents, 0).map(u64::from),
                        8 => u64_at(&note.contents, 0),
                        _ => None,
                    };
                    address = Some(value.ok_or_else(|| {
                        input.format("has a PVH note that is neither 4 nor 8 bytes long; it is damaged")
                    })?);
                }
                GUEST_OS if note.contents.starts_with(b"linux") => cmdline_limit = LINUX_CMDLINE,
                _ => {}
            }
        }
        Ok(address.map(|address| Self { address, cmdline_limit }))
    }
}

/// Loads the kernel and its companions.
pub(crate) fn load(mut boot: Boot<'_>, elf: &Elf, entry: &Entry) -> Result<Loaded, BootError> {
    elf.load(&mut boot)?;
    let address = elf.locate(boot.kernel, entry.address, "PVH entry point")?;
    let address = u32::try_from(address)
        .map_err(|_| boot.kernel.format(format!("has its PVH entry point {address:#x} above 4 GiB")))?;
    let cmdline = boot.place_cmdline(entry.cmdline_limit)?;
    let modules = place_high(&mut boot)?;
    let list = modules
        .iter()
        .fold(Writer::default(), |w, m| w.u64(m.start).u64(m.size).u64(m.cmdline).u64(0))
        .finish();
    let list = if list.is_empty() { 0 } else { boot.structure(&list, "module list")? };
    let map = boot.space.layout().e820();
    let entries = map
        .iter()
        .fold(Writer::default(), |w, e| w.u64(e.start).u64(e.size).u32(e.kind as u32).u32(0))
        .finish();
    let entries = boot.structure(&entries, "memory map")?;
    let info = Writer::default()
        .u32(START_MAGIC)
        .u32(START_VERSION)
        .u32(0)
        .u32(modules.len() as u32)
        .u64(list)
        .u64(cmdline)
        .u64(boot.rsdp)
        .u64(entries)
        .u32(map.len() as u32)
        .u32(0)
        .finish();
    let info = boot.structure(&info, "start information")?;
    let mut gpr = [0; 16];
    gpr[3] = info;
    Ok(Loaded {
        kind: BootKind::Pvh,
        boot_state: Some(entry::protected(boot.memory, &mut boot.space, address, gpr)?),
        entry: address.into(),
        rsdp: Some(boot.rsdp),
    })
}

/// The first module (Linux's initial RAM disk) goes to the top of RAM below 4 GiB, out of the way of a kernel that
/// moves itself; the others follow from the bottom.
fn place_high(boot: &mut Boot<'_>) -> Result<Vec<Placed>, BootError> {
    let Some(initrd) = boot.initrd.take() else {
        return boot.place_modules(HIGH_MEMORY);
    };
    let within = HIGH_MEMORY..FOUR_GIB;
    let start = boot
        .space
        .highest(initrd.size(), 0x1000, within.clone(), "initrd")
        .ok_or_else(|| boot.too_large(initrd, within, "below 4 GiB".into()))?;
    boot.copy(initrd, start)?;
    let mut placed = vec![Placed { start, size: initrd.size(), cmdline: 0 }];
    placed.extend(boot.place_modules(HIGH_MEMORY)?);
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::{elf32, elf64, load_part, note_part};
    use crate::testing::{boot, failure, kernel, with_initrd};
    use crate::{Module, Payload, Role};

    fn parts(entry: &[u8]) -> [crate::elf::tests::Part; 2] {
        [load_part(0x10_0000, &[0xf4; 64], 0x3000), note_part("Xen", PHYS32_ENTRY, entry)]
    }

    #[test]
    fn start_info_says_it_all() {
        for image in
            [elf64(62, 0, &parts(&0x10_0010u64.to_le_bytes())), elf32(0, &parts(&0x10_0010u32.to_le_bytes()))]
        {
            let mut payload = with_initrd(kernel(&image, "console=hvc0"), b"ramdisk");
            if let Payload::Kernel { modules, .. } = &mut payload {
                let input = Input::bytes(Role::Module(0), "m", *b"module!").unwrap();
                modules.push(Module { input, cmdline: "x=1".into() });
            }
            let booted = boot(payload, 64 << 20).unwrap();
            assert_eq!(booted.loaded.kind, BootKind::Pvh);
            assert_eq!((booted.loaded.entry, booted.general().rip), (0x10_0010, 0x10_0010));
            let info = booted.bytes(booted.general().gpr[3], 56);
            let (word, long) = (|at| u32_at(&info, at).unwrap(), |at| u64_at(&info, at).unwrap());
            assert_eq!((word(0), word(4), word(8), word(12)), (START_MAGIC, 1, 0, 2));
            assert_eq!(booted.string(long(24)), "console=hvc0");
            assert_eq!(Some(long(32)), booted.loaded.rsdp);
            let module = |n: u64, at| booted.memory.read_u64(long(16) + n * 32 + at).unwrap();
            assert_eq!(booted.bytes(module(0, 0), 7), b"ramdisk");
            assert_eq!((module(0, 8), module(0, 16)), (7, 0));
            assert_eq!(booted.bytes(module(1, 0), 7), b"module!");
            assert_eq!(booted.string(module(1, 16)), "x=1");
            let map = booted.bytes(long(40), word(48) as usize * 24);
            let usable: u64 =
                map.chunks(24).filter(|e| u32_at(e, 16) == Some(1)).map(|e| u64_at(e, 8).unwrap()).sum();
            assert_eq!(usable, (63 << 20) + crate::layout::EBDA);
        }
    }

    #[test]
    fn wrong_notes_are_refused() {
        let code = |entry: &[u8]| failure(kernel(&elf64(62, 0x10_0000, &parts(entry)), ""), 16 << 20).code();
        assert_eq!(code(&[1, 2]), "ERR_KERNEL_FORMAT");
        assert_eq!(code(&0x20_0000u64.to_le_bytes()), "ERR_KERNEL_FORMAT");
    }

    #[test]
    fn linux_takes_no_more_than_it_copies() {
        let image = |os: &[u8]| {
            let [load, entry] = parts(&0x10_0000u32.to_le_bytes());
            elf64(62, 0x10_0000, &[load, entry, note_part("Xen", GUEST_OS, os)])
        };
        let long = "x".repeat(2048);
        assert_eq!(failure(kernel(&image(b"linux\0"), &long), 16 << 20).code(), "ERR_CMDLINE_TOO_LONG");
        boot(kernel(&image(b"linux\0"), &long[1..]), 16 << 20).unwrap();
        boot(kernel(&image(b"other\0"), &long), 16 << 20).unwrap();
        assert_eq!(failure(kernel(&image(b"x"), "a\0b"), 16 << 20).code(), "ERR_CMDLINE_NUL");
    }
}
