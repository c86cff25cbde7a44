//! A door for fuzzing: arbitrary bytes as guest code, in each mode, with nothing behind the machine. And one for measuring
//! how fast code is translated.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{CpuState, General, PendingException, StateGroups};
use skep_hv::step::{Step, StepperFactory};
use skep_hv::{Translations, VmOptions};
use skep_memory::{GuestMemory, RegionKind, RegionSpec};

use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::run::Nowhere;
use crate::step::{self, Interpreter};
use crate::system::Tsc;
use crate::vm::{Mailbox, Shared};

/// Guest memory of a driven processor in bytes.
const MEMORY: u64 = 1 << 20;
/// Bytes that an entry of a page directory maps.
const LARGE_PAGE: u64 = 2 << 20;
/// Where the bytes are put, and where execution begins.
const CODE: u64 = 0x8000;
/// Instructions after which a run ends.
const STEPS: usize = 400;

/// Runs `data` as guest code for a bounded number of instructions. The first byte chooses the mode; the next 128 are the
/// general registers.
pub fn run(data: &[u8]) {
    let Some(mut cpu) = prepare(data) else { return };
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

/// A processor in front of the code that `data` holds.
fn prepare(data: &[u8]) -> Option<Box<Cpu>> {
    let [mode, data @ ..] = data else { return None };
    let (registers, code) = data.split_at_checked(128)?;
    let mut cpu = processor(MEMORY)?;
    let code = &code[..code.len().min(0x4000)];
    cpu.memory.write(CODE, code).ok()?;
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
    Some(cpu)
}

/// As [`run`], on two processors with memories of their own: one goes on by itself, the other's state goes from step to step
/// of a stepper. Panics where they part. How many steps were taken.
pub fn lockstep(data: &[u8]) -> usize {
    let (Some(mut alone), Some(mut stepped)) = (prepare(data), prepare(data)) else { return 0 };
    let everything = StateGroups { msrs: false, ..StateGroups::ALL };
    let Ok(mut stepper) = Interpreter.create(0, &stepped.memory, &table(), 1_000_000_000) else { return 0 };
    let Ok(mut state) = stepped.get_state(StateGroups::ALL) else { return 0 };
    let mut steps = 0;
    while steps < STEPS {
        if alone.shutdown || alone.halted || state.general.is_none() {
            break;
        }
        let before = state.clone();
        let fetched = stepper.fetch(&before);
        if differs_each_time(&fetched.bytes, alone.mode.code.bits()) {
            break;
        }
        let mut after = before.clone();
        let step = stepper.step(&mut after, &mut Nowhere);
        if matches!(step, Step::Failed(_)) {
            assert_eq!(after, before, "a step that fails changes nothing");
            break;
        }
        alone.look = false;
        alone.step_and_deliver();
        step::deliver_trap(&mut alone);
        update(&mut state, after);
        let Ok(wanted) = alone.get_state(everything) else { break };
        let given = CpuState { msrs: None, ..state.clone() };
        assert_eq!(normal(given), normal(wanted), "after {:02x?} ({step:?}) from {before:x?}", fetched.bytes);
        assert_eq!(step == Step::TripleFault, alone.shutdown);
        steps += 1;
    }
    let (mut a, mut b) = (vec![0; MEMORY as usize], vec![0; MEMORY as usize]);
    if alone.memory.read(0, &mut a).is_ok() && stepped.memory.read(0, &mut b).is_ok() {
        assert!(a == b, "memory differs at {:#x}", a.iter().zip(&b).take_while(|(a, b)| a == b).count());
    }
    let watched =
        (0..MEMORY / 4096).any(|page| stepped.memory.watch(page as usize).load(Ordering::SeqCst) != 0);
    assert!(!watched, "a stepper watches nothing");
    steps
}

/// What is the same state in other words: the vector state with components in their initial configuration marked as such.
fn normal(mut state: CpuState) -> CpuState {
    if let Some(fpu) = &mut state.fpu
        && let Some(mark) = fpu.xsave.get_mut(512)
    {
        *mark = 7;
    }
    state
}

/// Takes over the groups that a step has changed.
pub(crate) fn update(state: &mut CpuState, after: CpuState) {
    state.general = after.general;
    state.system = after.system.or(state.system);
    state.fpu = after.fpu.or(state.fpu.take());
    state.debug = after.debug.or(state.debug);
    state.events = after.events.or(state.events);
    for (msr, value) in after.msrs.into_iter().flatten() {
        if let Some(known) = state.msrs.iter_mut().flatten().find(|known| known.0 == msr) {
            known.1 = value;
        }
    }
}

/// Whether an instruction's result is another each time it is run: time, chance.
fn differs_each_time(bytes: &[u8], bits: u32) -> bool {
    let insn = Decoder::new(bits, bytes, DecoderOptions::NONE).decode();
    matches!(insn.mnemonic(), Mnemonic::Rdtsc | Mnemonic::Rdtscp | Mnemonic::Rdrand | Mnemonic::Rdseed)
}

/// Steps from a state that `data` is: nothing in it need make sense. Panics if a step that fails changes it.
pub fn hostile_state(data: &[u8]) {
    let ram = RegionSpec { start: 0, size: MEMORY, kind: RegionKind::Ram };
    let Ok(memory) = GuestMemory::new(&[ram]) else { return };
    let Some((state, code)) = data.split_at_checked(800) else { return };
    if memory.write(0, &code[..code.len().min(0x1_0000)]).is_err() {
        return;
    }
    let Ok(mut stepper) = Interpreter.create(0, &memory, &table(), 1_000_000_000) else { return };
    let mut state = scrambled(state, code);
    for _ in 0..8 {
        let before = state.clone();
        let _ = stepper.fetch(&before);
        let mut after = before.clone();
        if let Step::Failed(why) = stepper.step(&mut after, &mut Nowhere) {
            assert!(after == before && !why.is_empty(), "a step that fails changes nothing, and says why");
            return;
        }
        update(&mut state, after);
    }
}

/// A processor whose memory holds a program that is translated and does not run.
pub struct Translating {
    cpu: Box<Cpu>,
}

impl Translating {
    /// Where the program lies.
    const AT: u64 = LARGE_PAGE;

    /// As a user's program in 64-bit mode, of less than 1 GiB. `None`: not possible here.
    pub fn new(program: &[u8]) -> Option<Self> {
        let mut cpu = processor((Self::AT + program.len() as u64).next_multiple_of(LARGE_PAGE))?;
        cpu.memory.write(Self::AT, program).ok()?;
        long_mode(&mut cpu, 3);
        cpu.jit = Some(Box::new(crate::jit::Jit::new().ok()?));
        Some(Self { cpu })
    }

    /// Translates the block at an offset of the program: whether it could.
    pub fn translate(&mut self, at: u64) -> bool {
        self.cpu.rip = Self::AT + at;
        self.cpu.translate_block()
    }

    /// What was translated.
    pub fn stats(&self) -> Translations {
        self.cpu.stats.translations
    }
}

/// A state made of bytes. Its first byte says which parts are to be left as they are after reset, so that what is behind the
/// checks is reached too.
fn scrambled(data: &[u8], rest: &[u8]) -> CpuState {
    let mut state =
        processor(MEMORY).and_then(|mut cpu| cpu.get_state(StateGroups::ALL).ok()).unwrap_or_default();
    let mut bytes = data.iter().copied();
    let keep = bytes.next().unwrap_or(0);
    let mut word = || (0..8).fold(0, |v, _| v << 8 | u64::from(bytes.next().unwrap_or(0)));
    if let Some(general) = &mut state.general {
        general.gpr = std::array::from_fn(|_| word());
        general.rip = word() & if keep & 1 != 0 { 0xffff } else { u64::MAX };
        general.rflags = word() & if keep & 2 != 0 { 0x24_0ed5 } else { u64::MAX } | u64::from(keep & 2);
    }
    if let (Some(system), false) = (&mut state.system, keep & 4 != 0) {
        for segment in system.segments.iter_mut().chain([&mut system.tr, &mut system.ldtr]) {
            let attributes = word();
            (segment.selector, segment.limit) = (attributes as u16, (attributes >> 32) as u32);
            (segment.base, segment.access) = (word(), word() as u32);
        }
        for register in [
            &mut system.cr0,
            &mut system.cr2,
            &mut system.cr3,
            &mut system.cr4,
            &mut system.cr8,
            &mut system.xcr0,
            &mut system.efer,
            &mut system.gdtr.base,
            &mut system.idtr.base,
        ] {
            *register = word();
        }
    }
    if let (Some(debug), false) = (&mut state.debug, keep & 8 != 0) {
        debug.address = std::array::from_fn(|_| word());
        (debug.dr6, debug.dr7) = (word(), word());
    }
    if let (Some(events), false) = (&mut state.events, keep & 16 != 0) {
        let bits = word();
        (events.sti_shadow, events.mov_ss_shadow, events.nmi_blocked) =
            (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
        let error_code = (bits & 8 != 0).then_some((bits >> 32) as u32);
        events.exception =
            (bits & 16 != 0).then_some(PendingException { vector: (bits >> 8) as u8, error_code });
    }
    if let (Some(fpu), false) = (&mut state.fpu, keep & 32 != 0) {
        fpu.xsave = rest[..rest.len().min(1100)].to_vec();
    }
    if let (Some(msrs), false) = (&mut state.msrs, keep & 64 != 0) {
        msrs.iter_mut().for_each(|msr| msr.1 = word());
    }
    if keep & 128 != 0 {
        state.fpu = None;
        state.msrs = None;
    }
    state
}

pub(crate) fn processor(memory: u64) -> Option<Box<Cpu>> {
    let ram = RegionSpec { start: 0, size: memory, kind: RegionKind::Ram };
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
pub(crate) fn long_mode(cpu: &mut Cpu, cpl: u32) {
    const TABLES: u64 = 0x1000;
    let entry = 0x67;
    let pages = (4096 * cpu.memory.page_count() as u64).div_ceil(LARGE_PAGE).min(512);
    let tables = [(TABLES, (TABLES + 0x1000) | entry), (TABLES + 0x1000, (TABLES + 0x2000) | entry)];
    let large = (0..pages).map(|page| (TABLES + 0x2000 + 8 * page, page * LARGE_PAGE | 0x80 | entry));
    for (at, value) in tables.into_iter().chain(large) {
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

    /// `rounds` inputs of `words` random words behind a byte that counts.
    fn inputs(rounds: u32, words: usize, mut seed: u64) -> impl Iterator<Item = Vec<u8>> {
        (0..rounds).map(move |round| {
            let mut data = vec![round as u8];
            for _ in 0..words {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                data.extend_from_slice(&seed.to_le_bytes());
            }
            data
        })
    }

    #[test]
    fn random_code_ends_in_every_mode() {
        inputs(4000, 40, 0x9e37_79b9_7f4a_7c15).for_each(|data| run(&data));
    }

    #[test]
    fn random_code_does_the_same_step_by_step() {
        let steps: usize = inputs(2000, 40, 0x1234_5678_9abc_def1).map(|data| lockstep(&data)).sum();
        assert!(steps > 10_000, "{steps} steps: most ended at once");
    }

    #[test]
    fn no_state_is_too_hostile_for_a_step() {
        inputs(4000, 300, 0xfedc_ba98_7654_3211).for_each(|data| hostile_state(&data));
    }
}
