//! Makes runs of instructions that mostly do not fault, and the many states that each of them meets.
//!
//! A run grows by one instruction at a time, which is tried in the interpreter from the state that the run has reached.
//! Registers that no instruction before has touched are given what its operand in memory needs. Which registers hold
//! addresses is remembered: they stay what they are, mostly, when everything else becomes another.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register, UsedMemory,
};

use super::case::{CODE, FS_BASE, GS_BASE, Patch, State, WINDOW, WINDOW_SIZE};
use super::generate::{self, Generator};
use super::random::Random;
use super::shapes::{Shape, Unit};
use super::subject::{Subject, SubjectError};
use super::values;

/// Instructions tried for one place in a run.
const TRIES: usize = 16;
/// Operands in memory that are given values in each state.
const OPERANDS: usize = 8;
const RCX: usize = 1;
const RDX: usize = 2;
const RSP: usize = 4;

/// What a run meets: registers, and contents of the window beside the pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Situation {
    /// State before.
    pub state: State,
    /// Contents of the window.
    pub patches: [Patch; OPERANDS],
}

/// Instructions in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    /// Where the first stands.
    pub(super) rip: u64,
    /// The instructions; a jump comes with what it jumps over or back to.
    pub(super) units: Vec<Vec<u8>>,
}

impl Run {
    /// The bytes, UD2 behind them.
    pub(super) fn code(&self) -> Vec<u8> {
        let mut code = self.units.concat();
        code.extend([0x0f, 0x0b]);
        code
    }

    /// Where UD2 stands.
    pub(super) fn end(&self) -> u64 {
        self.rip + self.units.iter().map(|unit| unit.len() as u64).sum::<u64>()
    }
}

/// A set of registers, by number.
#[derive(Debug, Default, Clone, Copy)]
struct Set(u32);

impl Set {
    fn has(self, number: usize) -> bool {
        self.0 >> number & 1 != 0
    }

    fn add(&mut self, number: usize) {
        self.0 |= 1 << number;
    }
}

/// What is to stand where an operand in memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    Any,
    /// A value for MXCSR.
    Mxcsr,
    /// The beginning of an FXSAVE area.
    Image,
}

#[derive(Debug, Clone, Copy)]
struct Operand {
    at: u16,
    len: u16,
    contents: Contents,
}

impl Operand {
    fn patch(self, random: &mut Random) -> Patch {
        let mut patch = Patch { at: self.at, len: self.len, bytes: [0; 64] };
        match self.contents {
            Contents::Any => values::fill(random, &mut patch.bytes[..self.len as usize]),
            Contents::Mxcsr => patch.bytes[..4].copy_from_slice(&values::mxcsr(random).to_le_bytes()),
            Contents::Image => patch.bytes = generate::image(random),
        }
        patch
    }
}

/// A run and what its states have in common.
pub(super) struct Plan {
    pub(super) run: Run,
    /// The state that it was made for.
    state: State,
    /// Registers that operands in memory need, general and vector registers.
    pinned: [Set; 2],
    operands: Vec<Operand>,
    divides: bool,
}

/// How far the making of a run has come.
struct Progress {
    plan: Plan,
    /// Where the run has got to.
    now: State,
    /// Instructions left to add.
    left: usize,
    /// Registers that have been read or written: their initial values are settled.
    touched: [Set; 2],
    /// Registers that depend on the run.
    written: [Set; 2],
}

/// Makes runs.
pub(super) struct Maker {
    trial: Subject,
    generator: Generator,
    random: Random,
    factory: InstructionInfoFactory,
    most: usize,
}

impl Maker {
    /// Of up to `most` instructions, from a seed.
    pub(super) fn new(seed: u64, only: Option<&str>, most: usize) -> Result<Self, SubjectError> {
        Ok(Self {
            trial: Subject::new()?,
            generator: Generator::new(seed, only),
            random: Random::new(!seed),
            factory: InstructionInfoFactory::new(),
            most: most.max(1),
        })
    }

    /// Another run.
    pub(super) fn make(&mut self) -> Result<Plan, SubjectError> {
        let mut state = self.generator.next_state();
        state.rip = CODE + 0x200 + self.random.below(0x800);
        for register in &mut state.gpr {
            if self.random.one_in(4) {
                *register = WINDOW + 0x400 + 8 * self.random.below(0x180);
            }
        }
        let run = Run { rip: state.rip, units: Vec::new() };
        let mut pinned = [Set::default(); 2];
        pinned[0].add(RSP);
        let plan = Plan { run, state, pinned, operands: Vec::new(), divides: false };
        let left = 1 + self.random.below(self.most as u64) as usize;
        let mut progress = Progress { plan, now: state, left, touched: pinned, written: Default::default() };
        self.trial.restore_window()?;
        self.trial.load(&state);
        while progress.left > 0 && self.add(&mut progress)? {}
        Ok(progress.plan)
    }

    /// Adds an instruction to a run. False: that was the last.
    fn add(&mut self, progress: &mut Progress) -> Result<bool, SubjectError> {
        for _ in 0..TRIES {
            let Some((bytes, insn)) = self.candidate() else { continue };
            let shape = self.shape(&insn, progress.left);
            let mut unit = Unit::new(&mut self.random, shape, bytes);
            let (state, now) = (progress.plan.state, progress.now);
            let Some(operand) = self.aim(progress, &insn, &mut unit) else { continue };
            let code = unit.trial();
            self.trial.write_code(progress.now.rip, &code)?;
            if let Some(operand) = operand {
                self.trial.write_patches(&[operand.patch(&mut self.random)])?;
            }
            self.trial.load(&progress.now);
            let well = self.trial.reaches(progress.now.rip + code.len() as u64)?;
            if well || self.random.one_in(40) {
                self.note(progress, &insn, &unit, operand);
                self.trial.store(&mut progress.now);
                return Ok(well);
            }
            (progress.plan.state, progress.now) = (state, now);
        }
        Ok(false)
    }

    /// An instruction after which the next one follows. POPF may set what runs cannot have.
    fn candidate(&mut self) -> Option<(Vec<u8>, Instruction)> {
        let (bytes, insn) = self.generator.next_instruction();
        let flags = matches!(insn.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq);
        let follows = !insn.is_invalid() && insn.flow_control() == FlowControl::Next && !flags;
        follows.then_some((bytes, insn))
    }

    /// How it is to stand, with so many instructions left to add.
    fn shape(&mut self, insn: &Instruction, left: usize) -> Shape {
        let used = self.factory.info(insn).used_registers();
        let uses = |number: &usize| used.iter().any(|u| general(u.register()) == Some(*number));
        let shape = match self.random.below(32) {
            0..=4 => Shape::Skipped,
            5 => Shape::Called,
            6 => Shape::Misled,
            7 => Shape::Pointed,
            8 => Shape::CalledPointed,
            9 => Shape::Repeated,
            _ => Shape::Plain,
        };
        let fits = shape.count() <= left && !shape.forbids().iter().any(uses);
        if fits { shape } else { Shape::Plain }
    }

    /// Makes what an instruction accesses lie in the window, by its displacement or by registers that nothing has touched:
    /// where that is. `None`: it had better not be tried.
    fn aim(
        &mut self,
        progress: &mut Progress,
        insn: &Instruction,
        unit: &mut Unit,
    ) -> Option<Option<Operand>> {
        if insn.is_string_instruction() && !progress.touched[0].has(RCX) {
            progress.set(RCX, self.random.below(40));
        }
        let accesses = self.factory.info(insn).used_memory().to_vec();
        let mut operand = None;
        for access in &accesses {
            let registers = [access.base(), access.index()];
            let depends = |r: Register| general(r).is_some_and(|n| progress.written[0].has(n));
            if registers.into_iter().any(depends) && !self.random.one_in(4) {
                return None;
            }
            let size = access.memory_size().size() as u64;
            let target = generate::target(&mut self.random, size);
            let explicit = access.base() == insn.memory_base() || access.base() != Register::RSP;
            if self.aim_registers(progress, access, target)
                || explicit && self.displace(progress, insn, unit, target)
            {
                operand = operand.or(place(insn, target, size));
            }
        }
        Some(operand)
    }

    /// Makes an access lie at `target` by its base register, or else by its index; false if they are not free.
    fn aim_registers(&mut self, progress: &mut Progress, access: &UsedMemory, target: u64) -> bool {
        let (base, index) = (access.base(), access.index());
        if index.is_vector_register() {
            self.aim_vector(progress, index);
        }
        if let (Some(number), true) = (general(index), index.full_register() != base.full_register())
            && !progress.touched[0].has(number)
        {
            progress.set(number, self.random.below(0x100).wrapping_sub(0x40));
        }
        let Some(base) = general(base) else { return false };
        if progress.touched[0].has(base) || index.full_register() == access.base().full_register() {
            return false;
        }
        let scaled = general(index).map_or(0, |n| progress.now.gpr[n].wrapping_mul(access.scale() as u64));
        let offset = target.wrapping_sub(segment(access.segment()));
        progress.set(base, offset.wrapping_sub(access.displacement()).wrapping_sub(scaled));
        true
    }

    /// Small indices.
    fn aim_vector(&mut self, progress: &mut Progress, index: Register) {
        let number = index.number() & 31;
        if progress.touched[1].has(number) {
            return;
        }
        let mut small = || self.random.below(0x80).wrapping_sub(0x20);
        let narrow = small() & 1 != 0;
        for lane in 0..8 {
            let value = if narrow { small() & 0xffff_ffff | small() << 32 } else { small() };
            progress.plan.state.vector[number][lane] = value;
            progress.now.vector[number][lane] = value;
        }
    }

    /// Makes an operand lie at `target` by its displacement; false if it has none.
    fn displace(&mut self, progress: &Progress, insn: &Instruction, unit: &mut Unit, target: u64) -> bool {
        if !insn.op_kinds().any(|kind| kind == OpKind::Memory) || insn.memory_index().is_vector_register() {
            return false;
        }
        let mut decoder = Decoder::with_ip(64, &unit.insn, 0, DecoderOptions::NONE);
        let at = decoder.decode();
        let at = decoder.get_constant_offsets(&at);
        if at.displacement_size() != 4 {
            return false;
        }
        let behind = progress.now.rip + (unit.before.len() + unit.insn.len()) as u64;
        let value = |register: Register| match register {
            Register::RIP | Register::EIP => behind,
            r => general(r).map_or(0, |n| progress.now.gpr[n]),
        };
        let index = value(insn.memory_index()).wrapping_mul(u64::from(insn.memory_index_scale()));
        let offset = target.wrapping_sub(segment(insn.memory_segment()));
        let displacement = offset.wrapping_sub(value(insn.memory_base())).wrapping_sub(index);
        unit.insn[at.displacement_offset()..][..4].copy_from_slice(&(displacement as u32).to_le_bytes());
        true
    }

    /// Takes a unit into a run.
    fn note(&mut self, progress: &mut Progress, insn: &Instruction, unit: &Unit, operand: Option<Operand>) {
        let info = self.factory.info(insn);
        for access in info.used_memory() {
            for register in [access.base(), access.index()] {
                if let Some((kind, number)) = numbered(register)
                    && !progress.written[kind].has(number)
                {
                    progress.plan.pinned[kind].add(number);
                }
            }
        }
        // String instructions leave pointers that are near enough, and so do pushes and pops.
        let near = insn.is_string_instruction() || insn.is_stack_instruction();
        for used in info.used_registers() {
            let Some((kind, number)) = numbered(used.register()) else { continue };
            progress.touched[kind].add(number);
            let writes =
                !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
            let stays = near && kind == 0 && progress.plan.pinned[0].has(number);
            if writes && !stays {
                progress.written[kind].add(number);
            }
        }
        if let Some(own) = unit.shape.own() {
            progress.touched[0].add(own);
            progress.written[0].add(own);
        }
        if insn.is_string_instruction() && !progress.written[0].has(RCX) {
            progress.plan.pinned[0].add(RCX);
        }
        let plan = &mut progress.plan;
        plan.divides |= matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        if plan.operands.len() < OPERANDS {
            plan.operands.extend(operand);
        }
        plan.run.units.push(unit.bytes());
        progress.left -= unit.shape.count();
    }

    /// Another state for a run to meet.
    pub(super) fn situation(&mut self, plan: &Plan) -> Situation {
        let mut state = self.generator.next_state();
        let random = &mut self.random;
        state.rip = plan.state.rip;
        if plan.divides && !random.one_in(4) {
            // Quotients that fit are rare among random dividends.
            state.gpr[RDX] = random.pick(&[0, 0, u64::MAX, 1]);
        }
        for number in 0..16 {
            if plan.pinned[0].has(number) {
                state.gpr[number] = near(random, plan.state.gpr[number], number == RCX);
            }
        }
        for number in (0..32).filter(|&number| plan.pinned[1].has(number)) {
            state.vector[number] = plan.state.vector[number];
        }
        let mut patches = [Patch::NONE; OPERANDS];
        for (patch, operand) in patches.iter_mut().zip(&plan.operands) {
            if operand.contents != Contents::Any || !random.one_in(4) {
                *patch = operand.patch(random);
            }
        }
        Situation { state, patches }
    }
}

impl Progress {
    /// Gives a register another value from the beginning.
    fn set(&mut self, number: usize, value: u64) {
        self.plan.state.gpr[number] = value;
        self.now.gpr[number] = value;
    }
}

/// A value that mostly serves as address as the given one does, or as count.
fn near(random: &mut Random, value: u64, count: bool) -> u64 {
    match random.below(64) {
        0 => values::integer(random),
        1 => value.wrapping_add(random.below(64)),
        2..=9 if !count => value.wrapping_add(64 * random.below(8)).wrapping_sub(256),
        _ => value,
    }
}

/// What to put where an instruction's operand lies, if that is in the window.
fn place(insn: &Instruction, target: u64, size: u64) -> Option<Operand> {
    let at = target.wrapping_sub(WINDOW);
    let (contents, len) = match insn.mnemonic() {
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => (Contents::Mxcsr, 4),
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => (Contents::Image, 32),
        _ => (Contents::Any, size.clamp(1, 64) as u16),
    };
    (at < WINDOW_SIZE as u64).then_some(Operand { at: at as u16, len, contents })
}

fn segment(register: Register) -> u64 {
    match register {
        Register::FS => FS_BASE,
        Register::GS => GS_BASE,
        _ => 0,
    }
}

/// The number of a general register.
fn general(register: Register) -> Option<usize> {
    register.is_gpr().then(|| generate::number(register))
}

/// The set that a register belongs to, and its number.
fn numbered(register: Register) -> Option<(usize, usize)> {
    match general(register) {
        Some(number) => Some((0, number)),
        None => register.is_vector_register().then(|| (1, register.number() & 31)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 8;

    #[test]
    fn a_seed_names_the_same_runs_and_states_each_time() {
        let mut makers = [(); 2].map(|()| Maker::new(7, None, MOST).expect("an interpreter"));
        for _ in 0..100 {
            let [a, b] = makers.each_mut().map(|maker| {
                let plan = maker.make().expect("a run");
                (plan.run.clone(), maker.situation(&plan))
            });
            assert_eq!(a, b);
        }
    }

    #[test]
    fn runs_are_of_all_shapes_and_no_longer_than_asked_for() {
        let mut maker = Maker::new(8, None, MOST).expect("an interpreter");
        let mut longest = 0;
        let mut seen = std::collections::HashSet::new();
        for _ in 0..1000 {
            let plan = maker.make().expect("a run");
            let code = plan.run.units.concat();
            let decoder = Decoder::with_ip(64, &code, plan.run.rip, DecoderOptions::NONE);
            let flow: Vec<_> = decoder.into_iter().map(|insn| insn.flow_control()).collect();
            longest = longest.max(flow.len());
            seen.extend(flow);
        }
        assert_eq!(longest, MOST);
        use FlowControl as F;
        for flow in [F::Next, F::ConditionalBranch, F::Call, F::Return, F::IndirectBranch, F::IndirectCall] {
            assert!(seen.contains(&flow), "{flow:?}");
        }
    }
}
