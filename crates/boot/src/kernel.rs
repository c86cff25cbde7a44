//! What every loader of kernels has in common: recognising the format, and placing the kernel's companions.

use std::ops::Range;

use skep_memory::GuestMemory;

use crate::error::BootError;
use crate::layout::FOUR_GIB;
use crate::space::{Clash, Space};
use crate::{Input, Loaded, Module, elf, linux, multiboot, pvh};

/// Where a multiboot header must be, and more than the other formats need to be recognised.
const HEAD: usize = 8192;
/// Longest command line for kernels that name no limit, without the NUL.
pub(crate) const MAX_CMDLINE: u64 = 0xffff;

/// A kernel on its way into memory.
pub(crate) struct Boot<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) space: Space,
    pub(crate) kernel: &'a Input,
    pub(crate) initrd: Option<&'a Input>,
    pub(crate) modules: &'a [Module],
    pub(crate) cmdline: &'a str,
    /// Address of the ACPI root pointer.
    pub(crate) rsdp: u64,
}

/// A file placed in guest memory, with the string that goes with it.
pub(crate) struct Placed {
    pub(crate) start: u64,
    pub(crate) size: u64,
    /// Address of a NUL-terminated string.
    pub(crate) cmdline: u64,
}

/// Recognises the kernel and loads it.
pub(crate) fn load(mut boot: Boot<'_>) -> Result<Loaded, BootError> {
    let kernel = boot.kernel;
    let head = kernel.head(HEAD)?;
    if let Some(header) = linux::Header::find(kernel, &head)? {
        return linux::load(boot, &header);
    }
    let multiboot = multiboot::Header::find(kernel, &head)?;
    if let Some(header) = multiboot.as_ref().filter(|h| h.addresses.is_some()) {
        return multiboot::load(boot, header, None);
    }
    if let Some(elf) = elf::Elf::parse(kernel, &head)? {
        if let Some(header) = multiboot {
            return multiboot::load(boot, &header, Some(&elf));
        }
        if let Some(entry) = pvh::Entry::find(kernel, &elf)? {
            return pvh::load(boot, &elf, &entry);
        }
        if !elf.is_64 {
            return Err(kernel.format(
                "is a 32-bit ELF without a multiboot header or a PVH note; it says no way to start it",
            ));
        }
        let entry = elf.entry(kernel)?;
        elf.load(&mut boot)?;
        return linux::start(boot, entry);
    }
    if multiboot.is_some() {
        return Err(kernel.format("has a multiboot header without load addresses and is not an ELF"));
    }
    Err(unknown(kernel, &head))
}

/// The error for contents of no format of ours, with the best guess at what they are.
fn unknown(kernel: &Input, head: &[u8]) -> BootError {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    let compressed = |how| format!("is compressed with {how}; decompress it and give the result");
    let image = |machine: &str| BootError::Machine {
        role: kernel.role(),
        name: kernel.name().into(),
        format: "a Linux image",
        machine: machine.into(),
    };
    kernel.format(match () {
        () if at(56, b"ARM\x64") => return image("AArch64"),
        () if at(56, b"RSC\x05") => return image("RISC-V"),
        () if at(36, &[0x18, 0x28, 0x6f, 0x01]) => return image("ARM"),
        () if at(0, &[0x1f, 0x8b]) => compressed("gzip"),
        () if at(0, &[0xfd, b'7', b'z', b'X', b'Z', 0]) => compressed("xz"),
        () if at(0, &[0x28, 0xb5, 0x2f, 0xfd]) => compressed("zstd"),
        () if at(0, &[0x02, 0x21, 0x4c, 0x18]) || at(0, &[0x04, 0x22, 0x4d, 0x18]) => compressed("lz4"),
        () if at(0, b"BZh") => compressed("bzip2"),
        () if at(0, b"07070") => "is a cpio archive; that belongs in boot.initrd".into(),
        () if at(0, b"QFI\xfb") => "is a qcow2 disk image, not a kernel".into(),
        () if at(0, b"#!") => "is a script, not a kernel".into(),
        () if at(0, b"MZ") => "is an EFI program that is no Linux kernel; give the kernel itself".into(),
        () if head.windows(4).step_by(8).any(|w| w == [0xd6, 0x50, 0x52, 0xe8]) => {
            "is a multiboot 2 kernel; only multiboot 1 is supported".into()
        }
        () if head.iter().all(|&b| b == 0) => "begins with nothing but zeros; it is no kernel".into(),
        () => "is neither a Linux bzImage, an ELF nor a multiboot kernel".into(),
    })
}

impl Boot<'_> {
    /// Takes a fixed range for a part of the kernel.
    pub(crate) fn claim(&mut self, range: Range<u64>, what: &'static str) -> Result<(), BootError> {
        let size = self.space.layout().size();
        let name = self.kernel.name();
        self.space.claim(range.clone(), what).map_err(|clash| BootError::Placement {
            role: self.kernel.role(),
            name: name.into(),
            what,
            start: range.start,
            end: range.end,
            why: match clash {
                Clash::NeedsMemory(need) => {
                    let need = need.next_multiple_of(1 << 20);
                    return BootError::MemoryTooSmall { size, need, what: name.into() };
                }
                Clash::NotUsable => {
                    "which is not usable RAM of this machine; link it to addresses from 1 MiB on".into()
                }
                Clash::Taken(other) => format!("where its {other} already is; link it to other addresses"),
            },
        })
    }

    /// Puts a structure as low as possible; returns its address.
    pub(crate) fn structure(&mut self, bytes: &[u8], what: &'static str) -> Result<u64, BootError> {
        let gpa = self.space.structure(bytes.len() as u64, what)?;
        self.memory.write(gpa, bytes)?;
        Ok(gpa)
    }

    /// Puts the command line, which may have `limit` bytes without its NUL; returns its address.
    pub(crate) fn place_cmdline(&mut self, limit: u64) -> Result<u64, BootError> {
        let length = self.cmdline.len() as u64;
        if length > limit {
            return Err(BootError::CmdlineTooLong { name: self.kernel.name().into(), length, limit });
        }
        self.string(self.cmdline, || "boot.cmdline".into())
    }

    fn string(&mut self, text: &str, path: impl Fn() -> String) -> Result<u64, BootError> {
        if text.contains('\0') {
            return Err(BootError::CmdlineNul { path: path() });
        }
        self.structure(&[text.as_bytes(), &[0]].concat(), "command line")
    }

    /// Copies a whole file to `start`, which has been taken for it.
    pub(crate) fn copy(&self, input: &Input, start: u64) -> Result<(), BootError> {
        input.copy_to(self.memory, start, 0, input.size(), "the file")
    }

    /// The error for a file that found no room in `within`.
    pub(crate) fn too_large(&self, input: &Input, within: Range<u64>, what: String) -> BootError {
        BootError::TooLarge {
            role: input.role(),
            name: input.name().into(),
            size: input.size(),
            room: self.space.largest(within),
            what,
        }
    }

    /// Puts the initial RAM disk and the modules, in this order, page-aligned, each as low as possible at or above
    /// `from`, with their strings.
    pub(crate) fn place_modules(&mut self, from: u64) -> Result<Vec<Placed>, BootError> {
        let inputs = self.initrd.map(|i| (i, "")).into_iter();
        let inputs = inputs.chain(self.modules.iter().map(|m| (&m.input, m.cmdline.as_str())));
        let mut placed = Vec::new();
        for (input, text) in inputs {
            let start = self
                .space
                .lowest(input.size(), 0x1000, from..FOUR_GIB, "module")
                .ok_or_else(|| self.too_large(input, from..FOUR_GIB, "below 4 GiB".into()))?;
            self.copy(input, start)?;
            let cmdline = self.string(text, || format!("{}.cmdline", input.role()))?;
            placed.push(Placed { start, size: input.size(), cmdline });
        }
        Ok(placed)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{failure, kernel};

    #[test]
    fn what_is_no_kernel_is_named() {
        let code = |bytes: &[u8]| failure(kernel(bytes, ""), 16 << 20);
        assert_eq!(code(b"garbage").code(), "ERR_KERNEL_FORMAT");
        assert!(code(b"\x1f\x8b\x08").to_string().contains("gzip"));
        assert!(code(b"070701").to_string().contains("boot.initrd"));
        assert!(code(&[0; 9000]).to_string().contains("zeros"));
        let mut arm = [1u8; 64];
        arm[56..60].copy_from_slice(b"ARM\x64");
        assert_eq!(code(&arm).code(), "ERR_KERNEL_MACHINE");
        let mut multiboot_2 = vec![1u8; 100];
        multiboot_2[32..36].copy_from_slice(&0xe852_50d6u32.to_le_bytes());
        assert!(code(&multiboot_2).to_string().contains("multiboot 2"));
    }
}
