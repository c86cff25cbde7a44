//! The interpreter as the oracle drives it: one processor in 64-bit user mode, its page tables mapping the same pages at
//! the same addresses as the child process of [`super::hardware`].

use std::sync::Arc;

use skep_hv::VmOptions;
use skep_hv::cpuid::CpuidTable;
use skep_hv::state::Segment;
use skep_memory::{GuestMemory, MemoryError, RegionKind, RegionSpec};

use super::case::{
    CODE, Case, Event, FS_BASE, GS_BASE, LONGEST, Outcome, Patch, State, WINDOW, WINDOW_SIZE, WRITABLE,
    has_avx512, pattern,
};
use crate::cpu::{Cpu, cr0, cr4, efer, seg};
use crate::native::component;
use crate::run::Step;
use crate::system::Tsc;
use crate::vm::{Mailbox, Shared};

const PAGE: u64 = 4096;
/// Guest physical addresses.
const TABLES: u64 = 0x1000;
const CODE_AT: u64 = 0x10000;
const WINDOW_AT: u64 = 0x20000;
const TASK_AT: u64 = 0x30000;
/// Linear address of the task state segment, which only the supervisor may read.
const TASK: u64 = 0xffff_8000_0000_0000;
const MEMORY: u64 = 1 << 20;
/// What the code page holds where no instruction stands.
const BREAKPOINT: u8 = 0xcc;
/// More instructions than a short run executes, its loops and the pauses of its string instructions included.
const MANY: usize = 64;

/// Selectors as Linux has them.
const CODE_SELECTOR: u16 = 0x33;
const STACK_SELECTOR: u16 = 0x2b;

/// The interpreter under test.
pub struct Subject {
    cpu: Box<Cpu>,
    translates: bool,
    /// What the window holds between two cases.
    pattern: Vec<u8>,
}

/// The interpreter could not be set up, or gave up.
#[derive(Debug, thiserror::Error)]
pub enum SubjectError {
    /// Guest memory.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// The processor.
    #[error("processor: {0}")]
    Processor(#[from] skep_hv::HvError),
    /// The translator.
    #[error("executable memory: {0}")]
    Translator(#[from] std::io::Error),
    /// It stopped without an exception.
    #[error("the interpreter stopped: {0}")]
    Stopped(String),
}

/// The host's CPUID.
pub(super) fn cpuid() -> CpuidTable {
    skep_hv::cpuid::host()
}

impl Subject {
    /// The translator: each instruction a block of its own.
    pub fn translator() -> Result<Self, SubjectError> {
        let mut subject = Self::new()?;
        let mut jit = crate::jit::Jit::new()?;
        jit.set_alone(1);
        subject.cpu.jit = Some(Box::new(jit));
        subject.translates = true;
        Ok(subject)
    }

    /// The translator, for runs of instructions.
    pub(super) fn translator_at(level: super::blocks::Level) -> Result<Self, SubjectError> {
        use super::blocks::Level;
        let mut subject = Self::translator()?;
        if let Some(jit) = &mut subject.cpu.jit {
            match level {
                Level::Alone => {}
                Level::Straight => jit.set_alone(usize::MAX),
                Level::Extended => jit.set_extended(),
                Level::Chained => **jit = crate::jit::Jit::new()?,
            }
        }
        Ok(subject)
    }

    /// Puts code into memory.
    pub(super) fn write_code(&self, rip: u64, code: &[u8]) -> Result<(), MemoryError> {
        self.cpu.memory.write(CODE_AT + rip.wrapping_sub(CODE), code)
    }

    /// Puts breakpoints in its place.
    pub(super) fn erase_code(&self, rip: u64, len: usize) -> Result<(), MemoryError> {
        self.write_code(rip, &vec![BREAKPOINT; len])
    }

    /// How many blocks were translated.
    #[cfg(test)]
    pub(super) fn translated(&self) -> u64 {
        self.cpu.stats.translations.blocks
    }

    /// Goes on to the first exception.
    pub(super) fn until_exception(&mut self) -> Result<Event, SubjectError> {
        for _ in 0..1 << 16 {
            match self.step() {
                Step::Done => {}
                Step::Raised(e) => {
                    let cr2 = if e.vector == 14 { self.cpu.cr2 } else { 0 };
                    return Ok(Event { vector: e.vector.into(), error: e.error.unwrap_or(0), cr2 });
                }
                Step::Failed(why) => return Err(SubjectError::Stopped(why.into())),
            }
        }
        Err(SubjectError::Stopped("it goes on for ever".into()))
    }

    /// Goes on in the interpreter until RIP is `end`; false if an exception or too many instructions come before. What it
    /// decodes is not kept.
    pub(super) fn reaches(&mut self, end: u64) -> Result<bool, SubjectError> {
        let cpu = &mut self.cpu;
        for _ in 0..MANY {
            if cpu.rip == end {
                return Ok(true);
            }
            let step = match cpu.decode_fresh(cpu.rip, cpu.mode.code) {
                Ok(fresh) => cpu.step_fresh(&fresh),
                Err(crate::fault::Abort) => cpu.abandoned(None),
            };
            match step {
                Step::Done => {}
                Step::Raised(_) => return Ok(false),
                Step::Failed(why) => return Err(SubjectError::Stopped(why.into())),
            }
        }
        Ok(false)
    }

    /// Sets it up.
    pub fn new() -> Result<Self, SubjectError> {
        let ram = RegionSpec { start: 0, size: MEMORY, kind: RegionKind::Ram };
        let memory = GuestMemory::new(&[ram])?;
        let options = VmOptions { cpuid: cpuid(), tsc_hz: Some(1_000_000_000), ..VmOptions::default() };
        let shared = Shared::new(options);
        let tsc = Tsc::new(shared.tsc_hz);
        let mut cpu = Cpu::new(0, memory, shared, Arc::new(Mailbox::new()), tsc)?;
        map_pages(&cpu.memory)?;
        user_mode(&mut cpu);
        let pattern = pattern().iter().flat_map(|word| word.to_le_bytes()).collect();
        let subject = Self { cpu, translates: false, pattern };
        subject.restore_window()?;
        subject.cpu.memory.write(CODE_AT, &[BREAKPOINT; PAGE as usize])?;
        Ok(subject)
    }

    /// Makes the window as it was.
    pub(super) fn restore_window(&self) -> Result<(), MemoryError> {
        self.cpu.memory.write(WINDOW_AT, &self.pattern)
    }

    /// Puts a case's code and patches into memory.
    fn write_memory(&self, case: &Case) -> Result<(), MemoryError> {
        let offset = case.state.rip.wrapping_sub(CODE);
        let code_len = (case.bytes().len() as u64).min(PAGE.saturating_sub(offset));
        self.cpu.memory.write(CODE_AT + offset, &case.bytes()[..code_len as usize])?;
        self.write_patches(&case.patches)
    }

    /// Puts patches into the window.
    pub(super) fn write_patches(&self, patches: &[Patch]) -> Result<(), MemoryError> {
        for patch in patches.iter().filter(|patch| patch.len != 0) {
            let range = patch.range();
            self.cpu.memory.write(WINDOW_AT + range.start as u64, &patch.bytes[..range.len()])?;
        }
        Ok(())
    }

    /// Runs a case.
    pub fn run(&mut self, case: &Case, outcome: &mut Outcome) -> Result<(), SubjectError> {
        self.write_memory(case)?;
        self.load(&case.state);
        // A string instruction may pause, to be interruptible, with RIP where it was.
        let mut paused = false;
        outcome.event = loop {
            match self.step() {
                Step::Done if self.cpu.rip == case.state.rip && !case.steps => paused = true,
                Step::Done => break Event::NONE,
                Step::Raised(e) => {
                    // Pauses are as interrupts, which show the flags so far; the exception alone would not.
                    self.cpu.status = crate::alu::rflags_to_status(if paused {
                        case.state.rflags
                    } else {
                        self.cpu.rflags()
                    });
                    let cr2 = if e.vector == 14 { self.cpu.cr2 } else { 0 };
                    break Event { vector: e.vector.into(), error: e.error.unwrap_or(0), cr2 };
                }
                Step::Failed(why) => return Err(SubjectError::Stopped(why.into())),
            }
        };
        self.store(&mut outcome.state);
        let offset = case.state.rip.wrapping_sub(CODE);
        let code_len = LONGEST.min(PAGE.saturating_sub(offset) as usize);
        self.cpu.memory.write(CODE_AT + offset, &[BREAKPOINT; LONGEST][..code_len])?;
        self.look_at_window(outcome)
    }

    /// One instruction, on the engine under test where it can be.
    fn step(&mut self) -> Step {
        if self.translates && self.cpu.run_one_block() {
            return match std::mem::replace(&mut self.cpu.raised, crate::fault::Raised::None) {
                crate::fault::Raised::None => Step::Done,
                crate::fault::Raised::Exception(e) => Step::Raised(e),
                crate::fault::Raised::Failed(why) => Step::Failed(why),
                _ => Step::Failed("an instruction was abandoned without a reason"),
            };
        }
        self.cpu.step()
    }

    /// Spoils what is translated from now on.
    #[cfg(test)]
    pub(super) fn spoil(&mut self, spoil: fn(&mut [u8])) {
        if let Some(jit) = &mut self.cpu.jit {
            jit.spoil = Some(spoil);
        }
    }

    /// Gives exceptions and interrupts handlers in level 0, for comparisons of whole steps.
    #[cfg(test)]
    pub(crate) fn add_handlers(&mut self) -> Result<(), MemoryError> {
        const IDT_AT: u64 = 0x4_0000;
        const GDT_AT: u64 = IDT_AT + PAGE;
        const STACK_AT: u64 = IDT_AT + 2 * PAGE;
        let cpu = &mut self.cpu;
        for (n, at) in [IDT_AT, GDT_AT, STACK_AT].into_iter().enumerate() {
            cpu.memory.write_u64(TABLES + 7 * PAGE + 8 * (n as u64 + 1), at | 0x63)?;
        }
        cpu.memory.write_u64(GDT_AT + 8, 0x00af_9b00_0000_ffff)?;
        for vector in 0..256 {
            // A gate of level 3 to 8:0000:0000_00vv_0000.
            cpu.memory.write_u64(IDT_AT + 16 * vector, 0xee00 << 32 | 8 << 16 | vector << 48)?;
        }
        cpu.memory.write_u64(TASK_AT + 4, TASK + 4 * PAGE)?;
        cpu.idtr = crate::cpu::Table { base: TASK + PAGE, limit: 0xfff };
        cpu.gdtr = crate::cpu::Table { base: TASK + 2 * PAGE, limit: 0xf };
        Ok(())
    }

    /// The processor in front of a case, and everything it might write.
    #[cfg(test)]
    pub(crate) fn prepare(&mut self, case: &Case) -> Result<&mut Cpu, MemoryError> {
        self.cpu.memory.write(CODE_AT, &[BREAKPOINT; PAGE as usize])?;
        self.restore_window()?;
        self.cpu.memory.zero(TASK_AT + 0x1_2000, PAGE)?;
        self.write_memory(case)?;
        self.load(&case.state);
        Ok(&mut self.cpu)
    }

    /// Puts a state into the processor.
    pub(super) fn load(&mut self, state: &State) {
        let cpu = &mut self.cpu;
        for (i, &value) in state.gpr.iter().enumerate() {
            cpu.regs.set_gpr(i, value);
        }
        cpu.rip = state.rip;
        let checks = cpu.flag(crate::cpu::fl::AC);
        cpu.set_rflags(state.rflags);
        if checks != cpu.flag(crate::cpu::fl::AC) {
            cpu.refresh_mode();
        }
        cpu.segs[seg::FS].base = FS_BASE;
        cpu.segs[seg::GS].base = GS_BASE;
        let (mut vector, mut opmask) = (state.vector, state.opmask);
        if !has_avx512() {
            opmask.fill(0);
            vector[16..].fill([0; 8]);
            vector.iter_mut().for_each(|register| register[4..].fill(0));
        }
        cpu.fpu.set_visible(&state.x87, &vector, &opmask);
        // Nobody else wants attention.
        cpu.look = false;
    }

    /// Goes to compatibility mode, behind [`Subject::load`].
    pub(super) fn set_small_segments(&mut self, segments: super::small::Segments) {
        use super::small::{Segments, flat};
        let cpu = &mut self.cpu;
        let bases = cpu.segs.map(|segment| segment.base);
        cpu.segs = [flat(3); 6];
        cpu.segs[seg::CS] = Segment { selector: 0x23, ..flat(0xb) };
        for based in [seg::FS, seg::GS] {
            cpu.segs[based].base = bases[based];
        }
        match segments {
            Segments::Flat => {}
            Segments::Narrow => {
                cpu.segs[seg::GS].limit = 0xffff;
                cpu.segs[seg::FS].access |= Segment::UNUSABLE;
            }
            Segments::Based => cpu.segs[seg::DS].base = 0x10,
        }
        cpu.refresh_mode();
    }

    /// Takes the state out of the processor.
    pub(super) fn store(&self, state: &mut State) {
        let cpu = &self.cpu;
        for (i, value) in state.gpr.iter_mut().enumerate() {
            *value = cpu.regs.gpr(i);
        }
        state.rip = cpu.rip;
        state.rflags = cpu.rflags();
        cpu.fpu.visible(&mut state.x87, &mut state.vector, &mut state.opmask);
    }

    /// Records what has become of the window, and makes it as it was.
    pub(super) fn look_at_window(&mut self, outcome: &mut Outcome) -> Result<(), SubjectError> {
        let mut bytes = [0; WINDOW_SIZE];
        self.cpu.memory.read(WINDOW_AT, &mut bytes)?;
        outcome.record(&bytes, &self.pattern);
        if outcome.changes().len() < outcome.changed as usize {
            self.restore_window()?;
        }
        for &(at, _) in outcome.changes() {
            self.cpu.memory.write(WINDOW_AT + at, &self.pattern[at as usize..][..8])?;
        }
        Ok(())
    }
}

fn map_pages(memory: &GuestMemory) -> Result<(), MemoryError> {
    const USED: u64 = 0x67; // present, writable, user, accessed, dirty
    const READ_ONLY: u64 = 0x25;
    const SUPERVISOR: u64 = 0x63;
    const NO_EXECUTE: u64 = 1 << 63;
    let table = |n: u64| TABLES + n * PAGE;
    let index = |address: u64, level: u64| address >> (12 + 9 * level) & 511;
    memory.write_u64(table(0) + 8 * index(CODE, 3), table(1) | USED)?;
    memory.write_u64(table(1) + 8 * index(CODE, 2), table(2) | USED)?;
    memory.write_u64(table(2) + 8 * index(CODE, 1), table(3) | USED)?;
    memory.write_u64(table(3) + 8 * index(CODE, 0), CODE_AT | READ_ONLY)?;
    // A task state segment whose I/O permission map lies behind its end.
    for level in 1..3 {
        memory.write_u64(table(7 - level) + 8 * index(TASK, level), table(8 - level) | SUPERVISOR)?;
    }
    memory.write_u64(table(7) + 8 * index(TASK, 0), TASK_AT | SUPERVISOR)?;
    memory.write_u64(table(0) + 8 * index(TASK, 3), table(5) | SUPERVISOR)?;
    memory.write_u16(TASK_AT + 0x66, 0x68)?;
    for page in 0..WINDOW_SIZE as u64 / PAGE {
        let access = if page < WRITABLE as u64 / PAGE { USED } else { READ_ONLY };
        let entry = (WINDOW_AT + page * PAGE) | access | NO_EXECUTE;
        memory.write_u64(table(3) + 8 * index(WINDOW + page * PAGE, 0), entry)?;
    }
    Ok(())
}

fn user_mode(cpu: &mut Cpu) {
    cpu.cr3 = TABLES;
    cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
    cpu.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    cpu.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::MP | cr0::ET | cr0::WP | cr0::AM;
    cpu.xcr0 = if has_avx512() { component::ALL } else { component::BASIC };
    let present = 1 << 7 | 1 << 4 | 3 << 5;
    for segment in &mut cpu.segs {
        *segment = Segment { selector: 0, base: 0, limit: 0, access: Segment::UNUSABLE };
    }
    cpu.segs[seg::CS] = Segment {
        selector: CODE_SELECTOR,
        base: 0,
        limit: u32::MAX,
        access: present | 0xb | 1 << 13 | 1 << 15,
    };
    cpu.segs[seg::SS] =
        Segment { selector: STACK_SELECTOR, base: 0, limit: u32::MAX, access: present | 0x3 | 3 << 14 };
    cpu.tr = Segment { selector: 0x40, base: TASK, limit: 0x67, access: 1 << 7 | 0xb };
    cpu.set_rflags(0x202);
    cpu.refresh_mode();
}
