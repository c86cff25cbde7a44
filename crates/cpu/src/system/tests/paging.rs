//! Page walks against a straightforward reading of SDM vol. 3A §4.6 and §4.7.

use super::*;
use crate::fault::{Abort, Raised};
use crate::mmu::Access;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;
const LINEAR: u64 = 0x0040_3000;
const PAGE: u64 = 0x5_4000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bits32,
    Bits32Large,
    Pae,
    PaeLarge,
    Four,
    Four2M,
    Four1G,
    Five,
}

impl Kind {
    fn long(self) -> bool {
        matches!(self, Self::Four | Self::Four2M | Self::Four1G | Self::Five)
    }
    fn narrow(self) -> bool {
        matches!(self, Self::Bits32 | Self::Bits32Large)
    }
    fn large(self) -> bool {
        matches!(self, Self::Bits32Large | Self::PaeLarge | Self::Four2M | Self::Four1G)
    }
}

/// Sets up the mode, and returns the addresses of the last two entries of the walk of `LINEAR` (of the one, if a large page
/// leaves but one) and the physical address of the page.
fn set_up(cpu: &mut Cpu, kind: Kind) -> (u64, u64, u64) {
    let t = |n: u64| PAGE_TABLES + n * 0x1000;
    let index = |level: u64| LINEAR >> (12 + 9 * (level - 1)) & 511;
    let put = |cpu: &Cpu, at: u64, value: u64| cpu.memory.write_u64(at, value).unwrap();
    cpu.cr0 = cr0::PE | cr0::PG | cr0::ET;
    cpu.cr4 = if kind.narrow() { cr4::PSE } else { cr4::PAE };
    cpu.efer = if kind.long() { efer::LME | efer::LMA } else { 0 };
    cpu.cr3 = t(0);
    let all = P | W | U;
    match kind {
        Kind::Bits32 => (t(0) + (LINEAR >> 22) * 4, t(1) + (LINEAR >> 12 & 1023) * 4, PAGE),
        Kind::Bits32Large => (0, t(0) + (LINEAR >> 22) * 4, LINEAR & 0x3f_ffff),
        Kind::Pae => {
            cpu.pdpte[0] = t(1) | P;
            (t(1) + index(2) * 8, t(2) + index(1) * 8, PAGE)
        }
        Kind::PaeLarge => {
            cpu.pdpte[0] = t(1) | P;
            (0, t(1) + index(2) * 8, LINEAR & 0x1f_ffff)
        }
        Kind::Four => {
            put(cpu, t(0), t(1) | all);
            put(cpu, t(1), t(2) | all);
            (t(2) + index(2) * 8, t(3) + index(1) * 8, PAGE)
        }
        Kind::Four2M => {
            put(cpu, t(0), t(1) | all);
            (t(1), t(2) + index(2) * 8, LINEAR & 0x1f_ffff)
        }
        Kind::Four1G => (t(0), t(1), LINEAR & 0x3fff_ffff),
        Kind::Five => {
            cpu.cr4 |= cr4::LA57;
            put(cpu, t(0), t(1) | all);
            put(cpu, t(1), t(2) | all);
            put(cpu, t(2), t(3) | all);
            (t(3) + index(2) * 8, t(4) + index(1) * 8, PAGE)
        }
    }
}

/// The table that the entry before the leaf points to.
fn leaf_table(leaf_at: u64) -> u64 {
    leaf_at & !0xfff
}

#[derive(Debug, Clone, Copy)]
struct Attempt {
    user: bool,
    access: Access,
    wp: bool,
    smep: bool,
    smap: bool,
    nxe: bool,
}

/// §4.6.1 and §4.7, in their own words. `entries` from the root on; `reserved` are the bits that must be zero in each.
fn specification(entries: &[u64], reserved: &[u64], narrow: bool, a: Attempt) -> Result<(), u32> {
    let nxe = a.nxe && !narrow;
    let mut error = u32::from(a.user) << 2 | u32::from(a.access == Access::Write) << 1;
    if a.access == Access::Fetch && (nxe || a.smep) {
        error |= 1 << 4;
    }
    for (entry, reserved) in entries.iter().zip(reserved) {
        if entry & P == 0 {
            return Err(error);
        }
        if entry & reserved != 0 || !narrow && !nxe && entry & NX != 0 {
            return Err(error | 1 | 1 << 3);
        }
    }
    let user_address = entries.iter().all(|e| e & U != 0);
    let read_write = entries.iter().all(|e| e & W != 0);
    let execute_disabled = nxe && entries.iter().any(|e| e & NX != 0);
    let allowed = if a.user {
        user_address
            && match a.access {
                Access::Read => true,
                Access::Write => read_write,
                Access::Fetch => !execute_disabled,
            }
    } else {
        match (a.access, user_address) {
            (Access::Read, true) => !a.smap,
            (Access::Read, false) => true,
            (Access::Write, true) => !a.smap && (!a.wp || read_write),
            (Access::Write, false) => !a.wp || read_write,
            (Access::Fetch, true) => !a.smep && !execute_disabled,
            (Access::Fetch, false) => !execute_disabled,
        }
    };
    if allowed { Ok(()) } else { Err(error | 1) }
}

#[test]
fn permissions_and_error_codes_in_every_mode() {
    for kind in [
        Kind::Bits32,
        Kind::Bits32Large,
        Kind::Pae,
        Kind::PaeLarge,
        Kind::Four,
        Kind::Four2M,
        Kind::Four1G,
        Kind::Five,
    ] {
        let mut cpu = cpu();
        let (upper_at, leaf_at, page) = set_up(&mut cpu, kind);
        let narrow = kind.narrow();
        let get = |cpu: &Cpu, at| {
            if narrow {
                u64::from(cpu.memory.read_u32(at).unwrap())
            } else {
                cpu.memory.read_u64(at).unwrap()
            }
        };
        let put = |cpu: &Cpu, at, value| {
            if narrow {
                cpu.memory.write_u32(at, value as u32).unwrap()
            } else {
                cpu.memory.write_u64(at, value).unwrap()
            }
        };
        // One reserved bit of each: above MAXPHYADDR, or inside a large page's address.
        let leaf_reserved = match kind {
            Kind::Bits32 => 0,
            Kind::Bits32Large => 1 << 21,
            Kind::PaeLarge | Kind::Four2M => 1 << 13,
            Kind::Four1G => 1 << 29,
            _ => 1 << 46,
        };
        let upper_reserved = if narrow { 0 } else { 1 << 51 };
        let flags = [P, W, U, if narrow { 0 } else { NX }];
        let combine = |bits: u64, reserved: u64| {
            (0..4).filter(|i| bits & 1 << i != 0).fold(0, |all, i| all | flags[i as usize])
                | if bits & 16 != 0 { reserved } else { 0 }
        };
        let leaf_base = if kind.large() { PS } else { PAGE };
        for bits in 0..1024u64 {
            let leaf = leaf_base | combine(bits & 31, leaf_reserved);
            let upper = leaf_table(leaf_at) | combine(bits >> 5, upper_reserved);
            let entries = [upper, leaf];
            let reserved = [upper_reserved, leaf_reserved];
            let from = usize::from(upper_at == 0);
            if upper_at == 0 && bits >> 5 != 0 {
                continue;
            }
            for how in 0..16u64 {
                let on = |bit: u64| how & 1 << bit != 0;
                cpu.cr0 = if on(0) { cpu.cr0 | cr0::WP } else { cpu.cr0 & !cr0::WP };
                cpu.cr4 = if on(1) { cpu.cr4 | cr4::SMEP } else { cpu.cr4 & !cr4::SMEP };
                cpu.efer = if on(2) { cpu.efer | efer::NXE } else { cpu.efer & !efer::NXE };
                for (user, access) in [
                    (false, Access::Read),
                    (false, Access::Write),
                    (false, Access::Fetch),
                    (true, Access::Read),
                    (true, Access::Write),
                    (true, Access::Fetch),
                ] {
                    let smap = !user && on(3);
                    let a = Attempt { user, access, wp: on(0), smep: on(1), smap, nxe: on(2) };
                    if from == 0 {
                        put(&cpu, upper_at, upper);
                    }
                    put(&cpu, leaf_at, leaf);
                    let wanted = specification(&entries[from..], &reserved[from..], narrow, a);
                    let found = cpu.walk(LINEAR, access, user, smap);
                    let what = || format!("{kind:?} {a:?} {upper:#x} {leaf:#x}");
                    match (wanted, found) {
                        (Ok(()), Ok(t)) => {
                            assert_eq!(t.gpa, page & !0xfff, "{}", what());
                            let write = Attempt { access: Access::Write, ..a };
                            let writable =
                                specification(&entries[from..], &reserved[from..], narrow, write).is_ok();
                            assert_eq!(t.writable, writable && access == Access::Write, "{}", what());
                            let marks = if access == Access::Write { A | D } else { A };
                            assert_eq!(get(&cpu, leaf_at), leaf | marks, "{}", what());
                            if from == 0 {
                                assert_eq!(get(&cpu, upper_at), upper | A, "{}", what());
                            }
                        }
                        (Err(code), Err(Abort)) => {
                            let fault = Exception { vector: vector::PF, error: Some(code) };
                            assert_eq!(cpu.raised, Raised::Exception(fault), "{}", what());
                            assert_eq!(cpu.cr2, LINEAR);
                            assert_eq!(get(&cpu, leaf_at), leaf, "{}", what());
                        }
                        (wanted, found) => panic!("{}: {wanted:?}, found {found:?}", what()),
                    }
                }
            }
        }
    }
}

#[test]
fn a_dirty_page_may_be_written_again_without_a_walk() {
    let mut cpu = cpu();
    let (upper, leaf, _) = set_up(&mut cpu, Kind::Four);
    cpu.memory.write_u64(upper, leaf_table(leaf) | P | W | U).unwrap();
    cpu.memory.write_u64(leaf, PAGE | P | W | U | D).unwrap();
    assert!(cpu.walk(LINEAR, Access::Read, true, false).unwrap().writable);
    cpu.memory.write_u64(leaf, PAGE | P | U | D).unwrap();
    assert!(!cpu.walk(LINEAR, Access::Read, true, false).unwrap().writable);
    assert!(cpu.walk(LINEAR, Access::Read, false, false).unwrap().writable, "a supervisor without WP");
}

#[test]
fn large_pages_of_32_bit_paging_reach_beyond_4_gib() {
    let mut cpu = cpu();
    let (_, leaf, _) = set_up(&mut cpu, Kind::Bits32Large);
    // Bits 20:13 are address bits 39:32, bit 12 is a memory type.
    cpu.memory.write_u32(leaf, (0x0080_0000 | 0xa5 << 13 | 1 << 12 | PS | P) as u32).unwrap();
    let found = cpu.walk(LINEAR, Access::Read, false, false).unwrap();
    assert_eq!((found.gpa, found.shift), (0xa5_0080_3000, 22));
    // Without PSE the same entry points to a table, which is not memory here.
    cpu.cr4 = 0;
    assert!(cpu.walk(LINEAR, Access::Read, false, false).is_err());
}

#[test]
fn tables_outside_of_memory_hold_nothing() {
    let mut cpu = cpu();
    set_up(&mut cpu, Kind::Four);
    cpu.memory.write_u64(PAGE_TABLES, 0x3f_ffff_f000 | P | W | U).unwrap();
    assert!(cpu.walk(LINEAR, Access::Read, false, false).is_err());
    assert_eq!(cpu.raised, Raised::Exception(Exception { vector: vector::PF, error: Some(0) }));
    assert_eq!(cpu.memory.read_u64(PAGE_TABLES).unwrap() & A, 0);
}

#[test]
fn bit_7_is_reserved_where_no_page_can_be() {
    let mut cpu = cpu();
    set_up(&mut cpu, Kind::Five);
    for table in 0..2 {
        let at = PAGE_TABLES + table * 0x1000;
        let entry = cpu.memory.read_u64(at).unwrap();
        cpu.memory.write_u64(at, entry | PS).unwrap();
        assert!(cpu.walk(LINEAR, Access::Read, false, false).is_err());
        assert_eq!(
            cpu.raised,
            Raised::Exception(Exception { vector: vector::PF, error: Some(9) }),
            "level {}",
            5 - table
        );
        cpu.memory.write_u64(at, entry).unwrap();
    }
}

#[test]
fn smap_follows_ac_and_spares_nothing_implicit() {
    let mut cpu = long(0);
    cpu.cr4 |= cr4::SMAP;
    cpu.refresh_mode();
    let Step::Raised(e) = execute(&mut cpu, &[0x8b, 0x04, 0x25, 0, 0x50, 0, 0]) else { panic!() };
    // The code page is a user page too, which is SMEP's affair and not SMAP's.
    assert_eq!((e.vector, e.error, cpu.cr2), (vector::PF, Some(1), 0x5000));
    assert_eq!(execute(&mut cpu, &[0x0f, 0x01, 0xcb]), Step::Done, "STAC");
    assert_eq!(execute(&mut cpu, &[0x8b, 0x04, 0x25, 0, 0x50, 0, 0]), Step::Done);
    assert!(matches!(execute(&mut cpu, &[0x8e, 0xd8]), Step::Done), "a null DS reads no table");
    cpu.regs.set64(at::RAX, u64::from(DATA0));
    let Step::Raised(e) = execute(&mut cpu, &[0x8e, 0xd8]) else { panic!() };
    assert_eq!(
        (e.vector, e.error, cpu.cr2),
        (vector::PF, Some(1), GDT + u64::from(DATA0)),
        "the GDT lies in a user page"
    );
}

#[test]
fn smep_stops_the_fetch_of_user_code() {
    let mut cpu = long(0);
    cpu.cr4 |= cr4::SMEP;
    cpu.refresh_mode();
    assert_eq!(execute(&mut cpu, &[0x90]), raised(vector::PF, 0x11));
    assert_eq!(cpu.cr2, CODE);
}
