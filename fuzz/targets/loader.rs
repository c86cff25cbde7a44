//! Kernels, initial RAM disks, modules and ROMs of any content: an error or a machine that can start, and nothing
//! written where it does not belong. The first bytes choose the format, so that few inputs are lost on magic numbers.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use skep_boot::{BootOptions, Input, MemoryLayout, Module, Payload, Platform, Role, load};
use skep_memory::GuestMemory;

#[derive(Debug, Arbitrary)]
struct Case<'a> {
    format: Format,
    kernel: &'a [u8],
    initrd: Option<&'a [u8]>,
    modules: Vec<(&'a [u8], &'a str)>,
    cmdline: &'a str,
}

#[derive(Debug, Arbitrary, PartialEq, Eq)]
enum Format {
    AsItIs,
    Linux,
    Elf,
    Multiboot,
    Rom,
}

const MEMORY: u64 = 32 << 20;
const SECTOR: usize = 512;

/// Puts the format's magic numbers where they belong.
fn dress(format: &Format, image: &mut Vec<u8>) {
    let mut put = |at: usize, bytes: &[u8]| {
        if image.len() < at + bytes.len() {
            image.resize(at + bytes.len(), 0);
        }
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    match format {
        Format::AsItIs => {}
        Format::Linux => {
            put(0x1fe, &[0x55, 0xaa]);
            put(0x202, b"HdrS");
        }
        Format::Elf => {
            put(0, b"\x7fELF");
            put(6, &[1]);
            put(18, &[62, 0]);
        }
        Format::Multiboot => {
            let flags =
                image.get(4..8).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])) & 0x1_0007;
            let magic = 0x1bad_b002u32;
            let mut put = |at: usize, value: u32| {
                if image.len() < at + 4 {
                    image.resize(at + 4, 0);
                }
                image[at..at + 4].copy_from_slice(&value.to_le_bytes());
            };
            put(0, magic);
            put(4, flags);
            put(8, 0u32.wrapping_sub(magic).wrapping_sub(flags));
        }
        Format::Rom => image.resize(image.len().next_multiple_of(8 * SECTOR), 0xf4),
    }
}

thread_local! {
    // One memory for all cases of a format: making one costs more than a case.
    static KERNEL_MEMORY: RefCell<Option<(MemoryLayout, GuestMemory)>> = const { RefCell::new(None) };
}

fn run(case: &Case) -> Option<()> {
    let mut image = case.kernel.to_vec();
    dress(&case.format, &mut image);
    let payload = if case.format == Format::Rom {
        Payload::Rom(Input::bytes(Role::Rom, "rom", image).ok()?)
    } else {
        let modules = case.modules.iter().take(8).enumerate().map(|(at, (bytes, cmdline))| {
            Some(Module {
                input: Input::bytes(Role::Module(at), "module", *bytes).ok()?,
                cmdline: (*cmdline).into(),
            })
        });
        Payload::Kernel {
            kernel: Input::bytes(Role::Kernel, "kernel", image).ok()?,
            initrd: case.initrd.and_then(|bytes| Input::bytes(Role::Initrd, "initrd", bytes).ok()),
            modules: modules.collect::<Option<_>>()?,
            cmdline: case.cmdline.into(),
        }
    };
    let try_load = |layout: MemoryLayout, memory: &GuestMemory| {
        let loaded =
            load(memory, &BootOptions { payload: payload.clone(), layout, platform: Platform::new(2) })
                .ok()?;
        if loaded.boot_state.is_some() {
            let mut first = [0];
            memory.read(loaded.entry, &mut first).expect("the first instruction is in memory");
        }
        Some(())
    };
    if payload.rom_size() > 0 {
        let layout = MemoryLayout::new(MEMORY, payload.rom_size()).ok()?;
        let memory = GuestMemory::new(&layout.regions()).expect("the host gives 32 MiB");
        return try_load(layout, &memory);
    }
    KERNEL_MEMORY.with_borrow_mut(|kept| {
        let (layout, memory) = kept.get_or_insert_with(|| {
            let layout = MemoryLayout::new(MEMORY, 0).expect("32 MiB is a memory size");
            let memory = GuestMemory::new(&layout.regions()).expect("the host gives 32 MiB");
            (layout, memory)
        });
        try_load(layout.clone(), memory)
    })
}

fuzz_target!(|case: Case| {
    let _ = run(&case);
});
