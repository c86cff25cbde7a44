//! Walks of the guest's page tables: SDM vol. 3A chapter 4, every paging mode.

use skep_memory::GuestMemory;

use super::{Access, Stretch, Translation};
use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::fault::Exec;

/// Bits of a paging-structure entry (tables 4-5, 4-6, 4-11, 4-20).
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// Physical address of a page or table in a 64-bit entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a page-fault error code (§4.7).
mod code {
    pub(super) const PRESENT: u32 = 1 << 0;
    pub(super) const WRITE: u32 = 1 << 1;
    pub(super) const USER: u32 = 1 << 2;
    pub(super) const RESERVED: u32 = 1 << 3;
    pub(super) const FETCH: u32 = 1 << 4;
    pub(super) const KEY: u32 = 1 << 5;
}

/// The shape of a paging mode's lower levels.
#[derive(Clone, Copy)]
struct Format {
    /// Levels from the table that the walk begins with.
    levels: u32,
    /// log2 of the size of an entry.
    entry_shift: u32,
    /// Bits that are zero in every entry.
    reserved: u64,
    /// The lowest level above 1 at which an entry may map a page; 1 if none.
    large_up_to: u32,
}

/// An entry that was used: where it lies and what it held.
#[derive(Clone, Copy, Default)]
struct Used {
    at: u64,
    entry: u64,
}

/// Why a walk gave up.
enum Stop {
    /// #PF with these bits beside those of the access.
    Fault(u32),
    /// An entry changed while it was used.
    Changed,
}

impl Cpu {
    /// Translates a linear address (canonical; 32 bits outside of IA-32e mode). `user` is an access of user mode; `smap`
    /// forbids a supervisor's data access to user pages. Sets accessed and dirty flags if the access is allowed.
    pub(crate) fn walk(&mut self, linear: u64, access: Access, user: bool, smap: bool) -> Exec<Translation> {
        if self.cr0 & cr0::PG == 0 {
            return Ok(Translation { gpa: linear & ADDRESS, writable: true, shift: 12, global: false });
        }
        loop {
            match self.walk_once(linear, access, user, smap) {
                Ok(translation) => return Ok(translation),
                Err(Stop::Changed) => {}
                Err(Stop::Fault(why)) => {
                    let mut error = why;
                    if access == Access::Write {
                        error |= code::WRITE;
                    }
                    if user {
                        error |= code::USER;
                    }
                    let fetches_differ = self.no_execute() || self.cr4 & cr4::SMEP != 0;
                    if access == Access::Fetch && fetches_differ {
                        error |= code::FETCH;
                    }
                    return Err(self.page_fault(linear, error));
                }
            }
        }
    }

    /// EFER.NXE, which 32-bit paging does not know.
    fn no_execute(&self) -> bool {
        self.efer & efer::NXE != 0 && self.cr4 & cr4::PAE != 0
    }

    fn walk_once(&self, linear: u64, access: Access, user: bool, smap: bool) -> Result<Translation, Stop> {
        let (root, format) = self.format(linear)?;
        let mut used = [Used::default(); 5];
        let mut table = root;
        let mut level = format.levels;
        let (mut writable, mut for_user, mut executable) = (true, true, true);
        let (leaf, size_shift) = loop {
            let bits = 12 - format.entry_shift;
            let shift = 12 + bits * (level - 1);
            let index = linear >> shift & ((1 << bits) - 1);
            let at = table + (index << format.entry_shift);
            let entry = load(&self.memory, at, format.entry_shift);
            // Levels count from 5 at most.
            used[level as usize - 1] = Used { at, entry };
            if entry & PRESENT == 0 {
                return Err(Stop::Fault(0));
            }
            let large = level > 1 && entry & LARGE != 0 && self.large_known(format);
            if entry & self.reserved(format, level, large) != 0 {
                return Err(Stop::Fault(code::PRESENT | code::RESERVED));
            }
            writable &= entry & WRITABLE != 0;
            for_user &= entry & USER != 0;
            executable &= entry & NO_EXECUTE == 0;
            if level == 1 || large {
                break (entry, shift);
            }
            table = entry & ADDRESS;
            level -= 1;
        };

        let may = |access| {
            let privileged = !user;
            match access {
                Access::Read | Access::Write if privileged && for_user && smap => false,
                Access::Read => privileged || for_user,
                Access::Write => {
                    (privileged || for_user) && (writable || privileged && self.cr0 & cr0::WP == 0)
                }
                Access::Fetch if privileged => executable && !(for_user && self.cr4 & cr4::SMEP != 0),
                Access::Fetch => executable && for_user,
            }
        };
        if !may(access) {
            return Err(Stop::Fault(code::PRESENT));
        }
        let key_lets = |access| !for_user || self.key_permits(leaf, access, user);
        if !key_lets(access) {
            return Err(Stop::Fault(code::PRESENT | code::KEY));
        }

        let marks = if access == Access::Write { ACCESSED | DIRTY } else { ACCESSED };
        for above in used[level as usize..format.levels as usize].iter().rev() {
            mark(&self.memory, above, ACCESSED, format.entry_shift)?;
        }
        mark(&self.memory, &used[level as usize - 1], marks, format.entry_shift)?;

        let within = (1u64 << size_shift) - 1;
        let base = if format.entry_shift == 2 && size_shift == 22 {
            // PSE-36: bits 20:13 are bits 39:32 of the address (table 4-4).
            leaf & 0xffc0_0000 | (leaf >> 13 & 0xff) << 32
        } else {
            leaf & ADDRESS & !within
        };
        Ok(Translation {
            gpa: base | linear & within & !0xfff,
            writable: may(Access::Write) && key_lets(Access::Write) && (leaf | marks) & DIRTY != 0,
            shift: size_shift as u8,
            global: leaf & GLOBAL != 0 && self.cr4 & cr4::PGE != 0,
        })
    }

    /// How far global pages of a supervisor reach around `linear`, which a walk has just found in a large one of them, without a
    /// hole, and in one piece in the host. All of them have been accessed, as nothing that has not may be cached.
    pub(super) fn stretch_around(&self, linear: u64) -> Option<Stretch> {
        let (mut table, format) = self.format(linear).ok().filter(|_| self.mode.long)?;
        let mut level = format.levels;
        let at = |level: u32| linear >> (3 + 9 * level) & 511;
        loop {
            let entry = load(&self.memory, table + 8 * at(level), format.entry_shift);
            if level > 1 && entry & LARGE != 0 {
                break;
            }
            level = level.checked_sub(1).filter(|&level| level > 1 && entry & PRESENT != 0)?;
            table = entry & ADDRESS;
        }
        let (shift, here) = (3 + 9 * level, at(level));
        let begins = |i: u64| self.piece_begins(format, table + 8 * i, level);
        let first = begins(here)?;
        let follows = |&i: &u64| begins(i) == Some(first.wrapping_add(i.wrapping_sub(here) << shift));
        let low = (0..here).rev().take_while(follows).last().unwrap_or(here);
        let high = (here..512).take_while(follows).last()?;

        let page = linear >> shift << shift;
        let (before, behind) = ((here - low) << shift, (high + 1 - here) << shift);
        // The top of the address space is nobody's memory.
        let (from, to) = (page.wrapping_sub(before), page.checked_add(behind)?);
        let region = self.memory.regions().find(|r| (r.start..r.start + r.size).contains(&first))?;
        let from = from.max(page.saturating_sub(first - region.start));
        let to = to.min(page.saturating_add(region.start + region.size - first));
        let delta = (region.host.as_ptr() as u64).wrapping_add(first - region.start).wrapping_sub(page);
        (from < to).then_some(Stretch { from, to, delta, shift: shift as u8 })
    }

    /// The guest physical address from which on an entry of a table at this level maps a piece of a stretch: by one page, or by
    /// many of 4 KiB.
    fn piece_begins(&self, format: Format, at: u64, level: u32) -> Option<u64> {
        const WANTED: u64 = PRESENT | ACCESSED | GLOBAL;
        let entry = load(&self.memory, at, format.entry_shift);
        let large = level > 1 && entry & LARGE != 0;
        if entry & (PRESENT | ACCESSED) != PRESENT | ACCESSED
            || entry & self.reserved(format, level, large) != 0
        {
            return None;
        }
        if level == 1 || large {
            let within = (1 << (3 + 9 * level)) - 1;
            return (entry & (WANTED | USER) == WANTED).then_some(entry & ADDRESS & !within);
        }
        if level > 2 {
            return None;
        }
        let table = entry & ADDRESS;
        let first = self.piece_begins(format, table, 1)?;
        let follows = |i: u64| self.piece_begins(format, table + 8 * i, 1) == Some(first + (i << 12));
        (1..512).all(follows).then_some(first)
    }

    /// Whether PKRU permits a data access to a user page that `leaf` maps (§4.6.2).
    fn key_permits(&self, leaf: u64, access: Access, user: bool) -> bool {
        if self.cr4 & cr4::PKE == 0 || self.efer & efer::LMA == 0 || access == Access::Fetch {
            return true;
        }
        let rights = self.pkru >> (2 * (leaf >> 59 & 0xf));
        let (no_access, no_write) = (rights & 1 != 0, rights & 2 != 0);
        let guarded = user || self.cr0 & cr0::WP != 0;
        !(no_access || access == Access::Write && no_write && guarded)
    }

    /// Where the walk begins, and how its entries look.
    fn format(&self, linear: u64) -> Result<(u64, Format), Stop> {
        if self.cr4 & cr4::PAE == 0 {
            let root = self.cr3 & 0xffff_f000;
            return Ok((root, Format { levels: 2, entry_shift: 2, reserved: 0, large_up_to: 2 }));
        }
        let execute = if self.no_execute() { 0 } else { NO_EXECUTE };
        let reserved = self.msrs.model.reserved_address() | execute;
        if self.efer & efer::LMA == 0 {
            // PDPTEs were loaded, and checked, with CR3 (§4.4.1).
            let pdpte = self.pdpte[(linear >> 30 & 3) as usize];
            if pdpte & PRESENT == 0 {
                return Err(Stop::Fault(0));
            }
            let reserved = reserved | 0x7ff0_0000_0000_0000;
            return Ok((pdpte & ADDRESS, Format { levels: 2, entry_shift: 3, reserved, large_up_to: 2 }));
        }
        let levels = if self.cr4 & cr4::LA57 != 0 { 5 } else { 4 };
        let large_up_to = if self.msrs.model.gib_pages { 3 } else { 2 };
        Ok((self.cr3 & ADDRESS, Format { levels, entry_shift: 3, reserved, large_up_to }))
    }

    /// Whether bit 7 of an upper entry means anything: in 32-bit paging only with CR4.PSE.
    fn large_known(&self, format: Format) -> bool {
        format.entry_shift == 3 || self.cr4 & cr4::PSE != 0
    }

    fn reserved(&self, format: Format, level: u32, large: bool) -> u64 {
        if !large {
            return format.reserved;
        }
        if format.entry_shift == 2 {
            // With M = min(40, MAXPHYADDR), bits 21:M-19 of a 4 MiB page's entry are reserved.
            let width = u32::from(self.msrs.model.physical_bits).min(40);
            return (1 << 22) - (1 << (width - 19));
        }
        if level > format.large_up_to {
            return format.reserved | LARGE;
        }
        // Address bits below the page's size, but for bit 12, which selects a memory type.
        format.reserved | ((1 << (12 + 9 * (level - 1))) - 1) & ADDRESS & !(1 << 12)
    }
}

/// An entry; one outside of memory is not present.
fn load(memory: &GuestMemory, at: u64, entry_shift: u32) -> u64 {
    if entry_shift == 2 { memory.load_u32(at).map_or(0, u64::from) } else { memory.load_u64(at).unwrap_or(0) }
}

/// Sets flags in an entry that still is what it was. In read-only memory they stay as they are.
fn mark(memory: &GuestMemory, used: &Used, flags: u64, entry_shift: u32) -> Result<(), Stop> {
    if used.entry & flags == flags {
        return Ok(());
    }
    let new = used.entry | flags;
    let changed = if entry_shift == 2 {
        matches!(memory.compare_exchange_u32(used.at, used.entry as u32, new as u32), Ok(Err(_)))
    } else {
        matches!(memory.compare_exchange_u64(used.at, used.entry, new), Ok(Err(_)))
    };
    if changed { Err(Stop::Changed) } else { Ok(()) }
}
