//! What can be wrong with a boot: each with a stable code, the place in the configuration, and a remedy.

use std::fmt;
use std::io;

use skep_memory::MemoryError;

/// Which input file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// A boot module, by its place in the list.
    Module(usize),
    /// The ROM image.
    Rom,
}

/// Shows the place in the configuration: `boot.kernel`.
impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => f.write_str("boot.kernel"),
            Self::Initrd => f.write_str("boot.initrd"),
            Self::Module(at) => write!(f, "boot.modules[{at}]"),
            Self::Rom => f.write_str("boot.rom"),
        }
    }
}

/// Bytes as a person reads them.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in UNITS {
            if self.0 >> shift >= 1 {
                let tenths = ((u128::from(self.0) * 10) >> shift) as u64;
                return match tenths % 10 {
                    0 => write!(f, "{} {unit}", tenths / 10),
                    rest => write!(f, "{}.{rest} {unit}", tenths / 10),
                };
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// A boot that cannot be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// Neither kernel nor ROM.
    #[error("boot: there is nothing to boot; give boot.kernel or boot.rom")]
    Nothing,
    /// Two settings exclude each other.
    #[error("{path}: {why}")]
    Conflict {
        /// The setting to remove.
        path: &'static str,
        /// What it clashes with.
        why: &'static str,
    },
    /// The file is not there.
    #[error("{role}: {name} does not exist; check the path")]
    Missing {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
    },
    /// The file is a directory.
    #[error("{role}: {name} is a directory; name the file in it")]
    IsDirectory {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
    },
    /// A device, pipe or socket.
    #[error("{role}: {name} is a {kind}, not a regular file; copy its contents to a file and name that")]
    NotAFile {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
        /// What it is.
        kind: &'static str,
    },
    /// No permission to read.
    #[error("{role}: {name} may not be read by this user; give it read permission")]
    Permission {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
    },
    /// Opening or reading failed otherwise.
    #[error("{role}: reading {name} failed: {source}")]
    Read {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
        /// The error.
        source: io::Error,
    },
    /// The file has no bytes.
    #[error("{role}: {name} is empty; was it downloaded or built completely?")]
    Empty {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
    },
    /// The file ends before what its header promises.
    #[error(
        "{role}: {name} is truncated: {what} ends at byte {need}, the file at byte {have}; \
         fetch or build it again"
    )]
    Truncated {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
        /// What is cut off.
        what: &'static str,
        /// Bytes needed.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The contents are of no known or a broken format.
    #[error("{role}: {name} {why}")]
    Format {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
        /// What it looks like and what to give instead, as the rest of a sentence.
        why: String,
    },
    /// A kernel for another processor.
    #[error(
        "{role}: {name} is {format} for {machine}, this machine is x86-64; give a kernel built for x86-64"
    )]
    Machine {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
        /// Its format with article: `an ELF`.
        format: &'static str,
        /// The processor it is for.
        machine: String,
    },
    /// A part of the kernel wants an address that it cannot have.
    #[error("{role}: {name} wants its {what} at {start:#x}-{end:#x}, {why}")]
    Placement {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
        /// Which part.
        what: &'static str,
        /// First guest physical address.
        start: u64,
        /// End, exclusive.
        end: u64,
        /// Why not, and the remedy.
        why: String,
    },
    /// An initial RAM disk or module that finds no room.
    #[error(
        "{role}: {name} ({}) does not fit: the largest free range {what} has {}; \
         give the machine more memory or shrink the file",
        Bytes(*.size), Bytes(*.room)
    )]
    TooLarge {
        /// Which input.
        role: Role,
        /// Its path as given.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// The largest free range in bytes.
        room: u64,
        /// Which range: `below 2 GiB, where this kernel can read it`.
        what: String,
    },
    /// The command line is longer than the kernel takes.
    #[error("boot.cmdline: {length} bytes, but {name} takes at most {limit}; shorten it")]
    CmdlineTooLong {
        /// The kernel's path.
        name: String,
        /// Length in bytes.
        length: u64,
        /// Most bytes the kernel takes.
        limit: u64,
    },
    /// A command line with a NUL in it, which would end it for the kernel.
    #[error("{path}: holds a NUL character, which would end it early; remove it")]
    CmdlineNul {
        /// `boot.cmdline` or `boot.modules[n].cmdline`.
        path: String,
    },
    /// Modules for a kernel that takes none.
    #[error("boot.modules: {name} is booted by {protocol}, which has no modules; pack them into boot.initrd")]
    ModulesUnsupported {
        /// The kernel's path.
        name: String,
        /// How it is booted.
        protocol: &'static str,
    },
    /// Too little RAM.
    #[error(
        "memory: {} is too small for {what}, which needs {}; give the machine more memory",
        Bytes(*.size), Bytes(*.need)
    )]
    MemoryTooSmall {
        /// Bytes of RAM.
        size: u64,
        /// Bytes needed.
        need: u64,
        /// What needs them.
        what: String,
    },
    /// Too much RAM.
    #[error("memory: {} is more than this machine can have; give at most {}", Bytes(*.size), Bytes(*.limit))]
    MemoryTooLarge {
        /// Bytes of RAM.
        size: u64,
        /// Most bytes.
        limit: u64,
    },
    /// RAM that does not end at a page boundary.
    #[error("memory: {size} bytes is not a multiple of 4096; round it to a whole number of MiB")]
    MemoryAlignment {
        /// Bytes of RAM.
        size: u64,
    },
    /// A ROM of impossible size.
    #[error(
        "boot.rom: {name} has {size} bytes; a ROM has a multiple of 4096 bytes, at most 16 MiB: \
         pad it at its start (it ends at 4 GiB)"
    )]
    RomSize {
        /// Its path.
        name: String,
        /// Bytes.
        size: u64,
    },
    /// No processor, or more than the firmware tables can hold.
    #[error("cpus: {count} processors cannot be; give 1 to {limit}")]
    Cpus {
        /// Processors asked for.
        count: u64,
        /// Most that fit.
        limit: u32,
    },
    /// Guest memory was not made from the layout that is being booted.
    #[error("boot: guest memory does not match the layout: {0}")]
    Memory(#[from] MemoryError),
}

impl BootError {
    /// The stable code that programs match on.
    pub fn code(&self) -> &'static str {
        macro_rules! by_role {
            ($role:expr, $fault:literal) => {
                match $role {
                    Role::Kernel => concat!("ERR_KERNEL_", $fault),
                    Role::Initrd => concat!("ERR_INITRD_", $fault),
                    Role::Module(_) => concat!("ERR_MODULE_", $fault),
                    Role::Rom => concat!("ERR_ROM_", $fault),
                }
            };
        }
        match self {
            Self::Nothing => "ERR_BOOT_NOTHING",
            Self::Conflict { .. } => "ERR_BOOT_CONFLICT",
            Self::Missing { role, .. } => by_role!(role, "MISSING"),
            Self::IsDirectory { role, .. } => by_role!(role, "IS_DIRECTORY"),
            Self::NotAFile { role, .. } => by_role!(role, "NOT_A_FILE"),
            Self::Permission { role, .. } => by_role!(role, "PERMISSION"),
            Self::Read { role, .. } => by_role!(role, "READ"),
            Self::Empty { role, .. } => by_role!(role, "EMPTY"),
            Self::Truncated { role, .. } => by_role!(role, "TRUNCATED"),
            Self::Format { role, .. } => by_role!(role, "FORMAT"),
            Self::Machine { role, .. } => by_role!(role, "MACHINE"),
            Self::Placement { role, .. } => by_role!(role, "PLACEMENT"),
            Self::TooLarge { role, .. } => by_role!(role, "TOO_LARGE"),
            Self::CmdlineTooLong { .. } => "ERR_CMDLINE_TOO_LONG",
            Self::CmdlineNul { .. } => "ERR_CMDLINE_NUL",
            Self::ModulesUnsupported { .. } => "ERR_MODULES_UNSUPPORTED",
            Self::MemoryTooSmall { .. } => "ERR_MEMORY_TOO_SMALL",
            Self::MemoryTooLarge { .. } => "ERR_MEMORY_TOO_LARGE",
            Self::MemoryAlignment { .. } => "ERR_MEMORY_ALIGNMENT",
            Self::RomSize { .. } => "ERR_ROM_SIZE",
            Self::Cpus { .. } => "ERR_CPUS_RANGE",
            Self::Memory(_) => "ERR_BOOT_MEMORY",
        }
    }

    /// The place in the configuration that is to be changed.
    pub fn path(&self) -> String {
        match self {
            Self::Nothing | Self::Memory(_) => "boot".into(),
            Self::Conflict { path, .. } => (*path).into(),
            Self::Missing { role, .. }
            | Self::IsDirectory { role, .. }
            | Self::NotAFile { role, .. }
            | Self::Permission { role, .. }
            | Self::Read { role, .. }
            | Self::Empty { role, .. }
            | Self::Truncated { role, .. }
            | Self::Format { role, .. }
            | Self::Machine { role, .. }
            | Self::Placement { role, .. }
            | Self::TooLarge { role, .. } => role.to_string(),
            Self::CmdlineTooLong { .. } => "boot.cmdline".into(),
            Self::CmdlineNul { path } => path.clone(),
            Self::ModulesUnsupported { .. } => "boot.modules".into(),
            Self::MemoryTooSmall { .. } | Self::MemoryTooLarge { .. } | Self::MemoryAlignment { .. } => {
                "memory".into()
            }
            Self::RomSize { .. } => "boot.rom".into(),
            Self::Cpus { .. } => "cpus".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_file_place_and_remedy() {
        let error = BootError::Machine {
            role: Role::Kernel,
            name: "vmlinux".into(),
            format: "an ELF",
            machine: "AArch64".into(),
        };
        assert_eq!(error.code(), "ERR_KERNEL_MACHINE");
        assert_eq!(error.path(), "boot.kernel");
        assert!(
            error
                .to_string()
                .starts_with("boot.kernel: vmlinux is an ELF for AArch64, this machine is x86-64")
        );
        let error = BootError::Empty { role: Role::Module(2), name: "m".into() };
        assert_eq!((error.code(), error.path().as_str()), ("ERR_MODULE_EMPTY", "boot.modules[2]"));
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1 << 20, "1 MiB"),
            (3 << 29, "1.5 GiB"),
            (100 << 40, "100 TiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
