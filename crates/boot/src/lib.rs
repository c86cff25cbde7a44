//! What is in guest memory and in the boot processor's registers before the first instruction.
//!
//! [`MemoryLayout`] says where RAM is and holds every fixed address, port and line of the machine ([`layout`]).
//! [`Payload::open`] opens and checks what is to be booted. [`load`] recognises it by its contents, puts it and all
//! it wants to know into guest memory, writes the firmware tables (ACPI, SMBIOS), and returns the state of the boot
//! processor. Nothing here knows of a running machine: a machine that resets calls [`load`] again.
//!
//! Input files are hostile: every offset and size is checked, nothing is allocated by what a file says, and no two
//! things are put into the same place.
#![forbid(unsafe_code)]

mod acpi;
mod bytes;
mod elf;
mod entry;
mod error;
mod firmware;
mod input;
mod kernel;
pub mod layout;
mod linux;
mod multiboot;
mod platform;
mod pvh;
mod rom;
mod smbios;
mod space;
#[cfg(test)]
mod testing;
mod zero_page;

use std::path::PathBuf;

use skep_hv::state::CpuState;
use skep_memory::{GuestMemory, PAGE_SIZE};

pub use error::{BootError, Role};
pub use input::{Input, Source};
pub use layout::MemoryLayout;
pub use platform::{MAX_CPUS, Platform};

/// What is to be booted, by file names: the `boot` part of a machine's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootPaths {
    /// Linux bzImage, ELF (Linux, PVH, multiboot) or multiboot a.out; told apart by content.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk; for multiboot the first module.
    pub initrd: Option<PathBuf>,
    /// Further modules and their command lines, for multiboot and PVH.
    pub modules: Vec<(PathBuf, String)>,
    /// Command line.
    pub cmdline: String,
    /// A ROM image that ends at 4 GiB, instead of a kernel.
    pub rom: Option<PathBuf>,
}

/// A module and its command line.
#[derive(Debug, Clone)]
pub struct Module {
    /// The file.
    pub input: Input,
    /// The string that the kernel is given with it.
    pub cmdline: String,
}

/// What is to be booted, opened.
#[derive(Debug, Clone)]
pub enum Payload {
    /// A kernel and what goes with it.
    Kernel {
        /// The kernel.
        kernel: Input,
        /// Initial RAM disk.
        initrd: Option<Input>,
        /// Further modules.
        modules: Vec<Module>,
        /// Command line.
        cmdline: String,
    },
    /// A ROM image: the processor starts at the reset vector in real mode.
    Rom(Input),
}

impl Payload {
    /// Opens the files.
    ///
    /// # Errors
    /// Nothing to boot, settings that exclude each other, a file that cannot be used.
    pub fn open(paths: &BootPaths) -> Result<Self, BootError> {
        let open = |role, path: &Option<PathBuf>| path.as_ref().map(|p| Input::open(role, p)).transpose();
        let conflict = |path, why| Err(BootError::Conflict { path, why });
        if let Some(rom) = &paths.rom {
            if paths.kernel.is_some() {
                return conflict("boot.rom", "cannot be had together with boot.kernel; remove one of them");
            }
            if paths.initrd.is_some() || !paths.modules.is_empty() || !paths.cmdline.is_empty() {
                return conflict("boot.rom", "takes no initrd, modules or command line; remove them");
            }
            let rom = Input::open(Role::Rom, rom)?;
            if rom.size() > layout::MAX_ROM || !rom.size().is_multiple_of(PAGE_SIZE) {
                return Err(BootError::RomSize { name: rom.name().into(), size: rom.size() });
            }
            return Ok(Self::Rom(rom));
        }
        let Some(kernel) = open(Role::Kernel, &paths.kernel)? else {
            if paths.initrd.is_some() {
                return conflict("boot.initrd", "is of no use without boot.kernel; give a kernel");
            }
            return Err(BootError::Nothing);
        };
        let initrd = open(Role::Initrd, &paths.initrd)?;
        let modules = paths
            .modules
            .iter()
            .enumerate()
            .map(|(at, (path, cmdline))| {
                Ok(Module { input: Input::open(Role::Module(at), path)?, cmdline: cmdline.clone() })
            })
            .collect::<Result<_, BootError>>()?;
        Ok(Self::Kernel { kernel, initrd, modules, cmdline: paths.cmdline.clone() })
    }

    /// Bytes of ROM that the memory layout must provide; 0 for a kernel.
    pub fn rom_size(&self) -> u64 {
        match self {
            Self::Rom(rom) => rom.size(),
            Self::Kernel { .. } => 0,
        }
    }
}

/// Everything that [`load`] needs to know.
#[derive(Debug, Clone)]
pub struct BootOptions {
    /// What is booted.
    pub payload: Payload,
    /// The layout that guest memory was made from.
    pub layout: MemoryLayout,
    /// What the firmware tables describe.
    pub platform: Platform,
}

/// How a payload is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootKind {
    /// Linux bzImage, 64-bit entry.
    Linux64,
    /// Linux bzImage, 32-bit entry.
    Linux32,
    /// ELF64, entered as a Linux kernel: 64-bit mode, zero page in RSI.
    Elf64,
    /// ELF with a PVH entry point: 32-bit protected mode, `hvm_start_info` in EBX.
    Pvh,
    /// Multiboot 1: 32-bit protected mode, information in EBX.
    Multiboot,
    /// ROM: real mode at the reset vector.
    Rom,
}

/// What [`load`] has done.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// How the payload is started.
    pub kind: BootKind,
    /// General and system registers of the boot processor; `None` for the power-on state.
    pub boot_state: Option<CpuState>,
    /// Guest physical address of the first instruction.
    pub entry: u64,
    /// Guest physical address of the ACPI root pointer; `None` where the payload is the firmware.
    pub rsdp: Option<u64>,
}

/// Loads the payload and everything it wants to know into `memory`, which was made from
/// [`MemoryLayout::regions`] of `options.layout`. Can be called again after the guest has run: all that the
/// payload relies on is written anew.
///
/// # Errors
/// The payload is broken, of an unknown format or for another processor, or does not fit.
pub fn load(memory: &GuestMemory, options: &BootOptions) -> Result<Loaded, BootError> {
    let layout = &options.layout;
    match &options.payload {
        Payload::Rom(rom) => rom::load(memory, layout, rom),
        Payload::Kernel { kernel, initrd, modules, cmdline } => {
            let rsdp = firmware::write(memory, layout, &options.platform)?;
            kernel::load(kernel::Boot {
                memory,
                space: space::Space::new(layout),
                kernel,
                initrd: initrd.as_ref(),
                modules,
                cmdline,
                rsdp,
            })
        }
    }
}

/// As [`load`], of a kernel and an initial RAM disk held in memory: what tests and fuzzers call.
///
/// # Errors
/// As [`load`].
pub fn load_bytes(
    memory: &GuestMemory,
    layout: MemoryLayout,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
) -> Result<Loaded, BootError> {
    let payload = Payload::Kernel {
        kernel: Input::bytes(Role::Kernel, "kernel", kernel)?,
        initrd: initrd.map(|bytes| Input::bytes(Role::Initrd, "initrd", bytes)).transpose()?,
        modules: Vec::new(),
        cmdline: cmdline.into(),
    };
    load(memory, &BootOptions { payload, layout, platform: Platform::new(1) })
}
