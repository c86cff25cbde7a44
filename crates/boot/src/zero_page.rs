//! The zero page of the Linux boot protocol, `struct boot_params` (`Documentation/arch/x86/zero-page.rst`).

use crate::bytes::{Writer, put};
use crate::layout::E820Entry;

const SIZE: usize = 4096;
const ACPI_RSDP: usize = 0x70;
const EXT_RAMDISK_IMAGE: usize = 0xc0;
const EXT_RAMDISK_SIZE: usize = 0xc4;
const EXT_CMD_LINE: usize = 0xc8;
const E820_ENTRIES: usize = 0x1e8;
const HEADER: usize = 0x1f1;
const VID_MODE: usize = 0x1fa;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const CMDLINE_SIZE: usize = 0x238;
const SETUP_DATA: usize = 0x250;
const E820_TABLE: usize = 0x2d0;
/// Entries that fit into the page; more go into a list of `setup_data`.
const E820_MAX: usize = 128;
const E820_SIZE: usize = 20;
/// `SETUP_E820_EXT`.
const SETUP_E820_EXT: u32 = 1;

/// A zero page being filled.
pub(crate) struct ZeroPage(Vec<u8>);

impl ZeroPage {
    /// With the setup header of a bzImage, which begins at offset 0x1f1 in its file and here.
    pub(crate) fn from_header(header: &[u8]) -> Self {
        let mut page = Self(vec![0; SIZE]);
        // The header is shorter than the space to the memory map; what is longer would not be a header.
        let len = header.len().min(E820_TABLE - HEADER);
        page.0[HEADER..HEADER + len].copy_from_slice(&header[..len]);
        page.common();
        page
    }

    /// With the header that a boot loader makes up for an ELF kernel.
    pub(crate) fn for_elf(cmdline_size: u32) -> Self {
        let mut page = Self(vec![0; SIZE]);
        put(&mut page.0, BOOT_FLAG, 0xaa55u16.to_le_bytes());
        put(&mut page.0, MAGIC, *b"HdrS");
        put(&mut page.0, VERSION, 0x020cu16.to_le_bytes());
        put(&mut page.0, LOADFLAGS, [1]);
        put(&mut page.0, KERNEL_ALIGNMENT, 0x100_0000u32.to_le_bytes());
        put(&mut page.0, CMDLINE_SIZE, cmdline_size.to_le_bytes());
        page.common();
        page
    }

    fn common(&mut self) {
        // A boot loader without an assigned number; the video mode is left as it is.
        put(&mut self.0, LOADER, [0xff]);
        put(&mut self.0, VID_MODE, 0xffffu16.to_le_bytes());
        put(&mut self.0, SETUP_DATA, 0u64.to_le_bytes());
        put(&mut self.0, RAMDISK_IMAGE, 0u64.to_le_bytes());
    }

    /// Where the protected-mode part is.
    pub(crate) fn set_code32_start(&mut self, start: u32) {
        put(&mut self.0, CODE32_START, start.to_le_bytes());
    }

    /// The initial RAM disk, at any address.
    pub(crate) fn set_ramdisk(&mut self, start: u64, size: u64) {
        put(&mut self.0, RAMDISK_IMAGE, (start as u32).to_le_bytes());
        put(&mut self.0, RAMDISK_SIZE, (size as u32).to_le_bytes());
        put(&mut self.0, EXT_RAMDISK_IMAGE, ((start >> 32) as u32).to_le_bytes());
        put(&mut self.0, EXT_RAMDISK_SIZE, ((size >> 32) as u32).to_le_bytes());
    }

    /// The command line.
    pub(crate) fn set_cmdline(&mut self, address: u64) {
        put(&mut self.0, CMD_LINE, (address as u32).to_le_bytes());
        put(&mut self.0, EXT_CMD_LINE, ((address >> 32) as u32).to_le_bytes());
    }

    /// The ACPI root pointer.
    pub(crate) fn set_rsdp(&mut self, address: u64) {
        put(&mut self.0, ACPI_RSDP, address.to_le_bytes());
    }

    /// The head of the list of `setup_data`.
    pub(crate) fn set_data(&mut self, address: u64) {
        put(&mut self.0, SETUP_DATA, address.to_le_bytes());
    }

    /// The memory map. Entries that do not fit come back as a `setup_data` element, to be put into memory and
    /// named by [`ZeroPage::set_data`]; else nothing does.
    #[must_use]
    pub(crate) fn set_e820(&mut self, map: &[E820Entry]) -> Vec<u8> {
        let list = |entries: &[E820Entry]| {
            let fields = |w: Writer, e: &E820Entry| w.u64(e.start).u64(e.size).u32(e.kind as u32);
            entries.iter().fold(Writer::default(), fields).finish()
        };
        let (page, rest) = map.split_at(map.len().min(E820_MAX));
        let bytes = list(page);
        self.0[E820_TABLE..E820_TABLE + bytes.len()].copy_from_slice(&bytes);
        self.0[E820_ENTRIES] = page.len() as u8;
        if rest.is_empty() {
            return Vec::new();
        }
        let bytes = list(rest);
        Writer::default().u64(0).u32(SETUP_E820_EXT).u32(bytes.len() as u32).bytes(&bytes).finish()
    }

    /// The finished page.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

const _: () = assert!(E820_TABLE + E820_MAX * E820_SIZE <= SIZE);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u32_at, u64_at};
    use crate::layout::E820Kind;

    #[test]
    fn a_long_memory_map_goes_on_in_setup_data() {
        let map: Vec<_> =
            (0..200).map(|n| E820Entry { start: n << 12, size: 0x1000, kind: E820Kind::Usable }).collect();
        let mut page = ZeroPage::for_elf(2047);
        let rest = page.set_e820(&map);
        assert_eq!(page.bytes()[E820_ENTRIES], 128);
        assert_eq!(u64_at(page.bytes(), E820_TABLE + 127 * E820_SIZE), Some(127 << 12));
        assert_eq!((u64_at(&rest, 0), u32_at(&rest, 8)), (Some(0), Some(SETUP_E820_EXT)));
        assert_eq!(u32_at(&rest, 12), Some(72 * 20));
        assert_eq!(rest.len(), 16 + 72 * 20);
        assert_eq!(u64_at(&rest, 16), Some(128 << 12));
        assert!(page.set_e820(&map[..128]).is_empty());
    }

    #[test]
    fn a_header_of_any_length_fits() {
        for len in [0, 1, 0x11, 0x77, 0x110] {
            let page = ZeroPage::from_header(&vec![0xee; len]);
            assert_eq!(page.bytes()[LOADER], 0xff);
            assert_eq!(page.bytes()[E820_TABLE], 0, "{len:#x}");
        }
    }
}
