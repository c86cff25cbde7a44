//! Where things are: guest physical addresses, I/O ports and interrupt lines, written once. The tables tell the
//! guest of them, the machine puts its devices there.

use skep_memory::{PAGE_SIZE, RegionKind, RegionSpec};

use crate::BootError;

/// Least guest RAM in bytes: the first MiB.
pub const MIN_MEMORY: u64 = 1 << 20;
/// Most guest RAM in bytes, 16 TiB: what stays addressable with 46 physical address bits, the narrowest that a
/// server processor of the last decade has, and leaves as much again for the I/O windows above RAM.
pub const MAX_MEMORY: u64 = 16 << 40;
/// Most bytes a ROM may have: it ends at 4 GiB and must stay clear of the local APIC.
pub const MAX_ROM: u64 = 16 << 20;

/// First byte of the window that legacy VGA owns: no RAM from here to [`VGA_END`].
pub const VGA_START: u64 = 0xa_0000;
/// End (exclusive) of the VGA window.
pub const VGA_END: u64 = 0xc_0000;
/// First byte of extended memory.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest; memory-mapped I/O begins. 32-bit BARs live from here to [`ECAM`].
pub const PCI_HOLE: u64 = 0xc000_0000;
/// PCI Express configuration space (256 MiB, 256 buses): reserved for it.
pub const ECAM: u64 = 0xe000_0000;
/// I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// High-precision event timer.
pub const HPET: u64 = 0xfed0_0000;
/// Local APIC of each processor.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// 4 GiB: where RAM that did not fit below goes on.
pub const FOUR_GIB: u64 = 1 << 32;

/// Extended BIOS data area; base memory ends here (639 KiB).
pub const EBDA: u64 = 0x9_fc00;
/// ACPI tables, the RSDP first; where operating systems search for it, ACPI 6.5 §5.2.5.1.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// SMBIOS entry point and structures; where operating systems search for it, SMBIOS 3.6 §5.2.2.
pub const SMBIOS_TABLES: u64 = 0xf_0000;
/// How much of the end of a ROM appears under 1 MiB, at [`ACPI_TABLES`].
pub const ROM_MIRROR: u64 = 0x2_0000;

/// Ports of the four 16550s, COM1 to COM4.
pub const COM_PORTS: [u16; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];
/// ISA interrupt lines of COM1 to COM4.
pub const COM_IRQS: [u8; 4] = [4, 3, 4, 3];
/// PS/2 keyboard line.
pub const KEYBOARD_IRQ: u8 = 1;
/// PS/2 mouse line.
pub const MOUSE_IRQ: u8 = 12;
/// Real-time clock line.
pub const RTC_IRQ: u8 = 8;
/// The line of the ACPI system control interrupt: level, active high.
pub const SCI_IRQ: u8 = 9;
/// I/O APIC input that the 8254 and the HPET's first timer drive (ISA line 0).
pub const PIT_GSI: u32 = 2;

/// PM1a event block: status word, enable word (ACPI 6.5 §4.8.3.1).
pub const PM1A_EVENT: u16 = 0x600;
/// PM1a control word (ACPI 6.5 §4.8.3.2).
pub const PM1A_CONTROL: u16 = 0x604;
/// Power management timer, 32 bits (ACPI 6.5 §4.8.3.3).
pub const PM_TIMER: u16 = 0x608;
/// General-purpose event block 0: two status bytes, two enable bytes.
pub const GPE0: u16 = 0x620;
/// Length of [`GPE0`] in bytes.
pub const GPE0_LEN: u8 = 4;
/// SMI command port, through which ACPI mode is turned on and off.
pub const SMI_COMMAND: u16 = 0xb2;
/// Value for [`SMI_COMMAND`] that sets SCI_EN.
pub const ACPI_ENABLE: u8 = 0xa1;
/// Value for [`SMI_COMMAND`] that clears SCI_EN.
pub const ACPI_DISABLE: u8 = 0xa0;
/// Reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// Value for [`RESET_PORT`] that resets the machine.
pub const RESET_VALUE: u8 = 0x06;
/// SLP_TYP of S5, soft-off: `SLP_TYP << 10 | SLP_EN` in [`PM1A_CONTROL`] turns the machine off.
pub const SLP_TYP_S5: u8 = 5;
/// CMOS register that holds the century.
pub const CMOS_CENTURY: u8 = 0x32;
/// Low half of the HPET's general capabilities (IA-PC HPET 1.0a §2.3.4): revision 1, three comparators, 64-bit
/// counter, legacy replacement, vendor 8086h.
pub const HPET_BLOCK_ID: u32 = 0x8086_a201;
/// ID of the only I/O APIC.
pub const IOAPIC_ID: u8 = 0;

/// Type of an address range, ACPI 6.5 §15, table 15.10.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable memory.
    Usable = 1,
    /// Not for the operating system.
    Reserved = 2,
}

/// One entry of the system address map (INT 15h AX=E820h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First guest physical address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// Type.
    pub kind: E820Kind,
}

/// How guest-physical memory is laid out: from a RAM size, and the size of a ROM where there is one.
///
/// RAM fills 0 to 640 KiB, 768 KiB to the lesser of its size and 3 GiB, and goes on from 4 GiB. As on a PC, the
/// bytes under the VGA window are lost to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLayout {
    size: u64,
    rom: u64,
}

impl MemoryLayout {
    /// Lays out `size` bytes of RAM, and `rom` bytes of ROM (0 for none) that end at 4 GiB.
    ///
    /// # Errors
    /// Sizes out of range or not a multiple of the page size.
    pub fn new(size: u64, rom: u64) -> Result<Self, BootError> {
        if size < MIN_MEMORY {
            return Err(BootError::MemoryTooSmall {
                size,
                need: MIN_MEMORY,
                what: "a machine of this kind".into(),
            });
        }
        if size > MAX_MEMORY {
            return Err(BootError::MemoryTooLarge { size, limit: MAX_MEMORY });
        }
        if !size.is_multiple_of(PAGE_SIZE) {
            return Err(BootError::MemoryAlignment { size });
        }
        if rom > MAX_ROM || !rom.is_multiple_of(PAGE_SIZE) {
            return Err(BootError::RomSize { name: "the ROM image".into(), size: rom });
        }
        Ok(Self { size, rom })
    }

    /// Bytes of RAM asked for.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of ROM, 0 for none.
    pub fn rom_size(&self) -> u64 {
        self.rom
    }

    /// First byte of the ROM (4 GiB if there is none).
    pub fn rom_start(&self) -> u64 {
        FOUR_GIB - self.rom
    }

    /// Where RAM below 4 GiB ends.
    pub fn low_end(&self) -> u64 {
        self.size.min(PCI_HOLE)
    }

    /// Where RAM above 4 GiB ends; 4 GiB if there is none.
    pub fn high_end(&self) -> u64 {
        FOUR_GIB + (self.size - self.low_end())
    }

    /// The regions to make guest memory of.
    pub fn regions(&self) -> Vec<RegionSpec> {
        let ram = |start, end| RegionSpec { start, size: end - start, kind: RegionKind::Ram };
        let mut regions = vec![ram(0, VGA_START), ram(VGA_END, self.low_end())];
        if self.rom > 0 {
            regions.push(RegionSpec { start: self.rom_start(), size: self.rom, kind: RegionKind::Rom });
        }
        if self.high_end() > FOUR_GIB {
            regions.push(ram(FOUR_GIB, self.high_end()));
        }
        regions
    }

    /// The address map that the guest is told: what it may use and what firmware keeps, in address order.
    pub fn e820(&self) -> Vec<E820Entry> {
        let range = |start, end, kind| E820Entry { start, size: end - start, kind };
        let mut map = vec![
            range(0, EBDA, E820Kind::Usable),
            range(EBDA, VGA_START, E820Kind::Reserved),
            range(ACPI_TABLES, HIGH_MEMORY, E820Kind::Reserved),
        ];
        if self.low_end() > HIGH_MEMORY {
            map.push(range(HIGH_MEMORY, self.low_end(), E820Kind::Usable));
        }
        if self.rom > 0 {
            map.push(range(self.rom_start(), FOUR_GIB, E820Kind::Reserved));
        }
        if self.high_end() > FOUR_GIB {
            map.push(range(FOUR_GIB, self.high_end(), E820Kind::Usable));
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use skep_memory::GuestMemory;

    use super::*;

    const SIZES: [u64; 8] =
        [MIN_MEMORY, 2 << 20, 512 << 20, PCI_HOLE - 4096, PCI_HOLE, PCI_HOLE + 4096, FOUR_GIB, 1 << 40];

    #[test]
    fn every_layout_can_be_made() {
        for size in SIZES {
            for rom in [0, 0x1000, 0x1_0000, MAX_ROM] {
                let layout = MemoryLayout::new(size, rom).unwrap();
                let total: u64 = layout.regions().iter().map(|r| r.size).sum();
                assert_eq!(total, size - (VGA_END - VGA_START) + rom, "{size:#x} {rom:#x}");
                if size <= FOUR_GIB {
                    GuestMemory::new(&layout.regions()).unwrap();
                }
            }
        }
    }

    #[test]
    fn usable_memory_is_ram_and_the_map_is_in_order() {
        for size in SIZES {
            let layout = MemoryLayout::new(size, 0x2_0000).unwrap();
            let (regions, map) = (layout.regions(), layout.e820());
            assert!(map.windows(2).all(|w| w[0].start + w[0].size <= w[1].start), "{map:x?}");
            for entry in map {
                let kind = if entry.start == layout.rom_start() { RegionKind::Rom } else { RegionKind::Ram };
                assert!(
                    regions.iter().any(|r| r.kind == kind
                        && r.start <= entry.start
                        && r.start + r.size >= entry.start + entry.size),
                    "{entry:x?} of {size:#x}"
                );
            }
        }
    }

    #[test]
    fn sizes_out_of_range_are_refused_by_name() {
        let code = |size, rom| MemoryLayout::new(size, rom).unwrap_err().code();
        assert_eq!(code(0, 0), "ERR_MEMORY_TOO_SMALL");
        assert_eq!(code(MIN_MEMORY - 4096, 0), "ERR_MEMORY_TOO_SMALL");
        assert_eq!(code(100 << 40, 0), "ERR_MEMORY_TOO_LARGE");
        assert_eq!(code(u64::MAX, 0), "ERR_MEMORY_TOO_LARGE");
        assert_eq!(code(MIN_MEMORY + 1, 0), "ERR_MEMORY_ALIGNMENT");
        assert_eq!(code(MIN_MEMORY, MAX_ROM + 4096), "ERR_ROM_SIZE");
        assert_eq!(code(MIN_MEMORY, 100), "ERR_ROM_SIZE");
    }
}
