//! A door for fuzzing: arbitrary bytes as guest code, in each mode, with nothing behind the machine.

use std::sync::Arc;

use skep_hv::VmOptions;
use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{CpuState, General, StateGroups};
use skep_memory::{GuestMemory, RegionKind, RegionSpec};

use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::system::Tsc;
use crate::vm::{Mailbox, Shared};

/// Guest memory of a driven processor in bytes.
const MEMORY: u64 = 1 << 20;
/// Where the bytes are put, and where execution begins.
const CODE: u64 = 0x8000;
/// Instructions after which a run ends.
const STEPS: usize = 400;

/// Runs `data` as guest code for a bounded number of instructions. The first byte chooses the mode; the next 128 are the
/// general registers.
pub fn run(data: &[u8]) {
    let [mode, data @ ..] = data else { return };
    let Some((registers, code)) = data.split_at_checked(128) else { return };
    let Some(mut cpu) = processor() else { return };
    let code = &code[..code.len().min(0x4000)];
    if cpu.memory.write(CODE, code).is_err() {
        return;
    }
    match mode % 4 {
        0 => real_mode(&mut cpu),
        1 => protected_mode(&mut cpu),
        2 => long_mode(&mut cpu, 0),
        _ => long_mode(&mut cpu, 3),
    }
    for (i, chunk) in registers.chunks_exact(8).enumerate() {
        let mut value = [0; 8];
        value.copy_from_slice(chunk);
        cpu.regs.set_gpr(i, u64::from_le_bytes(value));
    }
    cpu.rip = if mode % 4 == 0 { CODE & 0xffff } else { CODE };
    for _ in 0..STEPS {
        if cpu.shutdown || cpu.halted {
            break;
        }
        cpu.step_and_deliver();
    }
    // Whatever the guest did, its state can be read and written back.
    if let Ok(state) = cpu.get_state(StateGroups::ALL) {
        let _ = cpu.set_state(&state);
    }
}

fn processor() -> Option<Box<Cpu>> {
    let ram = RegionSpec { start: 0, size: MEMORY, kind: RegionKind::Ram };
    let memory = GuestMemory::new(&[ram]).ok()?;
    let options = VmOptions { cpuid: table(), tsc_hz: Some(1_000_000_000), ..VmOptions::default() };
    let shared = Shared::new(options);
    let mailbox = Arc::new(Mailbox::new());
    let tsc = Tsc::new(shared.tsc_hz);
    Cpu::new(0, memory, shared, mailbox, tsc).ok()
}

/// The CPUID table that a one-processor machine gets here.
fn table() -> CpuidTable {
    skep_hv::cpuid::host()
}

fn real_mode(cpu: &mut Cpu) {
    let mut state = CpuState::default();
    if let Ok(now) = cpu.get_state(StateGroups { system: true, ..StateGroups::default() }) {
        state.system = now.system;
    }
    if let Some(system) = &mut state.system {
        for segment in &mut system.segments {
            segment.selector = 0;
            segment.base = 0;
        }
    }
    state.general = Some(General { rip: CODE, rflags: 2, ..General::default() });
    let _ = cpu.set_state(&state);
}

/// Flat segments: the selectors' hidden parts only, no tables behind them.
fn flat(cpu: &mut Cpu, dpl: u32, long: bool) {
    for (i, segment) in cpu.segs.iter_mut().enumerate() {
        let kind = if i == crate::cpu::seg::CS { 0xb } else { 0x3 };
        let size = if long && i == crate::cpu::seg::CS { 1 << 13 } else { 1 << 14 };
        segment.selector = 8 * (i as u16 + 1) | dpl as u16;
        segment.base = 0;
        segment.limit = u32::MAX;
        segment.access = kind | 1 << 4 | dpl << 5 | 1 << 7 | size | 1 << 15;
    }
}

fn protected_mode(cpu: &mut Cpu) {
    cpu.cr0 |= cr0::PE;
    flat(cpu, 0, false);
    cpu.refresh_mode();
}

/// Identity-mapped by 2 MiB pages, accessible from every level.
fn long_mode(cpu: &mut Cpu, cpl: u32) {
    const TABLES: u64 = 0x1000;
    let entry = 0x67;
    for (at, value) in [
        (TABLES, (TABLES + 0x1000) | entry),
        (TABLES + 0x1000, (TABLES + 0x2000) | entry),
        (TABLES + 0x2000, 0x80 | entry),
    ] {
        let _ = cpu.memory.write_u64(at, value);
    }
    cpu.cr3 = TABLES;
    cpu.cr4 |= cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    cpu.efer |= efer::LME | efer::LMA | efer::SCE | efer::NXE;
    cpu.cr0 |= cr0::PE | cr0::PG | cr0::NE | cr0::MP;
    cpu.xcr0 = 7;
    flat(cpu, cpl, true);
    cpu.refresh_mode();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_code_ends_in_every_mode() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        for round in 0..4000u32 {
            let mut data = vec![round as u8];
            for _ in 0..40 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                data.extend_from_slice(&seed.to_le_bytes());
            }
            run(&data);
        }
    }
}
