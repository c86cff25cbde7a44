//! The boot processor's state at the first instruction, and the descriptor and page tables that go with it.

use skep_hv::state::{CpuState, DescriptorTable, General, Segment, System};
use skep_memory::GuestMemory;

use crate::BootError;
use crate::layout::LOCAL_APIC;
use crate::space::Space;

/// Selector of the flat code segment: Linux's `__BOOT_CS`, which the others take as well.
const CODE: u16 = 0x10;
/// Selector of the flat data segment, `__BOOT_DS`.
const DATA: u16 = 0x18;
/// Selector of the task state segment, `__BOOT_TSS`.
const TASK: u16 = 0x20;

/// Access rights as [`Segment::access`] has them: code, readable, accessed, present, 4 KiB granularity.
const CODE_32: u32 = 0xc09b;
/// The same in 64-bit mode: L set, D clear.
const CODE_64: u32 = 0xa09b;
/// Data, writable, accessed, present, 32-bit, 4 KiB granularity.
const DATA_32: u32 = 0xc093;
/// Busy 32-bit (or 64-bit) TSS, present.
const TASK_BUSY: u32 = 0x8b;
/// Local descriptor table, present, as after reset.
const LDT: u32 = 0x82;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

/// A segment descriptor, SDM vol. 3A §3.4.5.
fn descriptor(base: u32, limit: u32, access: u32) -> u64 {
    let (base, access) = (u64::from(base), u64::from(access));
    let limit = u64::from(if access & 0x8000 != 0 { limit >> 12 } else { limit });
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (access & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (access >> 12 & 0xf) << 52
        | (base >> 24) << 56
}

fn flat(selector: u16, access: u32) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, access }
}

/// Writes the descriptor table and builds the state that both modes share.
fn state(
    memory: &GuestMemory,
    space: &mut Space,
    code: u32,
    general: General,
    system: System,
) -> Result<CpuState, BootError> {
    // The sixth entry is the upper half of the task descriptor in 64-bit mode.
    let table = [
        0,
        0,
        descriptor(0, u32::MAX, code),
        descriptor(0, u32::MAX, DATA_32),
        descriptor(0, 0x67, TASK_BUSY),
        0,
    ];
    let bytes: Vec<u8> = table.iter().flat_map(|d| d.to_le_bytes()).collect();
    let gdt = space.structure(bytes.len() as u64, "descriptor table")?;
    memory.write(gdt, &bytes)?;
    let data = flat(DATA, DATA_32);
    let system = System {
        segments: [data, flat(CODE, code), data, data, data, data],
        tr: Segment { selector: TASK, base: 0, limit: 0x67, access: TASK_BUSY },
        ldtr: Segment { selector: 0, base: 0, limit: 0xffff, access: LDT },
        gdtr: DescriptorTable { base: gdt, limit: bytes.len() as u16 - 1 },
        idtr: DescriptorTable { base: 0, limit: 0 },
        xcr0: 1,
        // Enabled, boot processor.
        apic_base: LOCAL_APIC | 1 << 11 | 1 << 8,
        ..system
    };
    // As firmware leaves them: on, write-back by default. Without that Linux gives up the page attribute table too.
    let msrs = vec![(MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)];
    Ok(CpuState { general: Some(general), system: Some(system), msrs: Some(msrs), ..CpuState::default() })
}

/// IA32_MTRR_DEF_TYPE, SDM vol. 3A §12.11.2.1.
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Its E flag: memory type range registers are on.
const MTRR_ENABLE: u64 = 1 << 11;
/// Memory type 6.
const MTRR_WRITE_BACK: u64 = 6;

/// 32-bit protected mode, flat segments, paging and interrupts off: what PVH, multiboot and the 32-bit Linux boot
/// protocol want. `gpr` as in [`General::gpr`].
pub(crate) fn protected(
    memory: &GuestMemory,
    space: &mut Space,
    entry: u32,
    gpr: [u64; 16],
) -> Result<CpuState, BootError> {
    let general = General { gpr, rip: entry.into(), rflags: 2 };
    let system = System { cr0: CR0_PE | CR0_ET, ..System::default() };
    state(memory, space, CODE_32, general, system)
}

/// 64-bit mode, the low 4 GiB mapped one to one, interrupts off: what the 64-bit Linux boot protocol wants.
pub(crate) fn long(
    memory: &GuestMemory,
    space: &mut Space,
    entry: u64,
    mut gpr: [u64; 16],
) -> Result<CpuState, BootError> {
    let root = space.structure(0x6000, "page tables")?;
    let mut tables = vec![0u64; 0x6000 / 8];
    tables[0] = (root + 0x1000) | PRESENT_WRITABLE;
    for gib in 0..4 {
        tables[0x200 + gib] = (root + 0x2000 + gib as u64 * 0x1000) | PRESENT_WRITABLE;
    }
    for (page, entry) in (0u64..).zip(&mut tables[0x400..]) {
        *entry = page << 21 | LARGE_PAGE | PRESENT_WRITABLE;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|e| e.to_le_bytes()).collect();
    memory.write(root, &bytes)?;
    let stack = space.structure(0x1000, "boot stack")?;
    gpr[4] = stack + 0x1000;
    let general = General { gpr, rip: entry, rflags: 2 };
    let system = System {
        cr0: CR0_PE | CR0_ET | CR0_PG,
        cr3: root,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..System::default()
    };
    state(memory, space, CODE_64, general, system)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryLayout;

    fn memory() -> (GuestMemory, Space) {
        let layout = MemoryLayout::new(2 << 20, 0).unwrap();
        (GuestMemory::new(&layout.regions()).unwrap(), Space::new(&layout))
    }

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(0, u32::MAX, CODE_32), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(0, u32::MAX, CODE_64), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(0, u32::MAX, DATA_32), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(0x1234_5678, 0x67, TASK_BUSY), 0x1200_8b34_5678_0067);
    }

    /// Walks the tables as a processor would.
    fn translate(memory: &GuestMemory, cr3: u64, address: u64) -> Option<u64> {
        let mut table = cr3;
        for level in (1..=3).rev() {
            let index = address >> (12 + 9 * level) & 0x1ff;
            let entry = memory.read_u64(table + index * 8).unwrap();
            if entry & 1 == 0 {
                return None;
            }
            if entry & LARGE_PAGE != 0 {
                return Some((entry & !0xfff) + (address & 0x1f_ffff));
            }
            table = entry & !0xfff;
        }
        None
    }

    #[test]
    fn long_mode_maps_four_gib_one_to_one() {
        let (memory, mut space) = memory();
        let state = long(&memory, &mut space, 0x10_0200, [0; 16]).unwrap();
        let system = state.system.unwrap();
        for address in [0, 0x10_0000, 0x7fff_ffff, 0xfee0_0030, 0xffff_ffff] {
            assert_eq!(translate(&memory, system.cr3, address), Some(address));
        }
        assert_eq!(translate(&memory, system.cr3, 1 << 32), None);
        assert_eq!(system.segments[1].access & 0x6000, 0x2000, "L set, D clear");
    }

    #[test]
    fn segment_registers_agree_with_the_descriptor_table() {
        let (memory, mut space) = memory();
        let state = protected(&memory, &mut space, 0x10_0000, [0; 16]).unwrap();
        let system = state.system.unwrap();
        for segment in system.segments.iter().chain([&system.tr]) {
            let stored = memory.read_u64(system.gdtr.base + u64::from(segment.selector)).unwrap();
            assert_eq!(stored, descriptor(segment.base as u32, segment.limit, segment.access));
            assert!(segment.selector + 7 <= system.gdtr.limit);
        }
        assert_eq!(system.cr0, 0x11);
    }
}
