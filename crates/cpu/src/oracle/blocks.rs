//! Runs of several instructions on the translator, as one block, and in the interpreter, one by one: for what the translator
//! makes of instructions that stand side by side, and of the flags between them.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic, OpKind, Register};

use super::case::{CODE, Case, Outcome, Patch, State, WINDOW, WRITABLE};
use super::generate::Generator;
use super::random::Random;
use super::subject::{Subject, SubjectError};
use super::{EMPTY, compare};

/// What the translator may do with a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Each instruction is a block.
    Alone,
    /// Blocks end with the first jump.
    Straight,
    /// Blocks go on behind jumps.
    Extended,
    /// Everything: blocks lead to one another.
    Chained,
}

impl Level {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Alone, Self::Straight, Self::Extended, Self::Chained];
}

/// A run of instructions and what it meets. UD2 stands behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// State before.
    pub state: State,
    /// The instructions; a conditional jump comes with what it may jump over.
    pub insns: Vec<Vec<u8>>,
    /// Contents of the window beside the pattern.
    pub patches: [Patch; 3],
}

impl Run {
    fn code(&self) -> Vec<u8> {
        let mut code = self.insns.concat();
        code.extend([0x0f, 0x0b]);
        code
    }

    /// The first of its instructions as a case.
    fn case(&self) -> Case {
        Case { state: self.state, code: [0x90; 16], len: 1, steps: false, patches: self.patches }
    }
}

/// A run that came out differently, as small as it could be made.
#[derive(Debug, Clone)]
pub struct Found {
    /// The run.
    pub run: Run,
    /// What differs, for people; the interpreter is on the side of the hardware.
    pub text: String,
}

/// Compares runs.
pub struct Blocks {
    interpreter: Subject,
    translator: Subject,
    generator: Generator,
    random: Random,
    most: usize,
}

/// Instructions tried for one place in a run.
const TRIES: usize = 16;

impl Blocks {
    /// Runs of up to `most` instructions, from a seed.
    pub fn new(seed: u64, only: Option<&str>, most: usize, level: Level) -> Result<Self, SubjectError> {
        Ok(Self {
            interpreter: Subject::new()?,
            translator: Subject::translator_at(level)?,
            generator: Generator::new(seed, only),
            random: Random::new(!seed),
            most: most.max(1),
        })
    }

    /// Makes and compares `count` runs until `keep_going` says no to what was found; how many there were.
    pub fn run_many(
        &mut self,
        count: u64,
        mut progress: impl FnMut(u64),
        mut keep_going: impl FnMut(Found) -> bool,
    ) -> Result<u64, SubjectError> {
        for done in 0..count {
            let run = self.make()?;
            if let Some(found) = self.compare(&run)? {
                let found = self.minimize(found)?;
                if !keep_going(found) {
                    return Ok(done + 1);
                }
            }
            if done % 1024 == 0 {
                progress(done);
            }
        }
        Ok(count)
    }

    /// A run whose instructions mostly do not fault: each is tried in the interpreter.
    fn make(&mut self) -> Result<Run, SubjectError> {
        let first = self.generator.next_case();
        let mut run = Run { state: first.state, insns: Vec::new(), patches: first.patches };
        run.state.rip = CODE + 0x200 + self.random.below(0x800);
        for register in &mut run.state.gpr {
            if self.random.one_in(2) {
                *register = WINDOW + 0x400 + 8 * self.random.below(0x180);
            }
        }
        let wanted = 1 + self.random.below(self.most as u64) as usize;
        let mut state = run.state;
        while run.insns.len() < wanted {
            let before = run.insns.len();
            for _ in 0..TRIES {
                let Some(bytes) = self.instruction(&state) else { continue };
                run.insns.push(bytes);
                let end = run.state.rip + run.code().len() as u64 - 2;
                let after = self.interpreter.after(&run)?;
                if after.rip == end {
                    state = after;
                    break;
                }
                if self.random.one_in(40) {
                    return Ok(run);
                }
                run.insns.pop();
            }
            if run.insns.len() == before {
                break;
            }
        }
        Ok(run)
    }

    /// One instruction that mostly makes sense in a state.
    fn instruction(&mut self, state: &State) -> Option<Vec<u8>> {
        if self.random.one_in(8) {
            return Some(self.jump());
        }
        let mut bytes = self.generator.next_case().bytes().to_vec();
        let mut decoder = Decoder::with_ip(64, &bytes, state.rip, DecoderOptions::NONE);
        let insn = decoder.decode();
        let flags = matches!(insn.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq);
        if insn.is_invalid() || insn.flow_control() != FlowControl::Next || flags {
            return None;
        }
        let at = decoder.get_constant_offsets(&insn);
        if insn.op_kinds().any(|k| k == OpKind::Memory) && at.displacement_size() == 4 {
            let value = |register: Register| match register {
                Register::RIP | Register::EIP => state.rip.wrapping_add(insn.len() as u64),
                r if r.is_gpr() => state.gpr[r.full_register().number() & 15],
                _ => 0,
            };
            let index = value(insn.memory_index()).wrapping_mul(u64::from(insn.memory_index_scale()));
            let target = WINDOW + 0x200 + self.random.below(WRITABLE as u64 - 0x400);
            let displacement = target.wrapping_sub(value(insn.memory_base())).wrapping_sub(index);
            bytes[at.displacement_offset()..][..4].copy_from_slice(&(displacement as u32).to_le_bytes());
        }
        Some(bytes)
    }

    /// A conditional jump over an instruction.
    fn jump(&mut self) -> Vec<u8> {
        // ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST of EAX with a constant, which are as long as MOV.
        let over =
            self.random.pick(&[0x05, 0x0d, 0x15, 0x1d, 0x25, 0x2d, 0x35, 0x3d, 0xa9, 0xb8, 0xb9, 0xbe]);
        let condition = self.random.below(16) as u8;
        let mut bytes = if self.random.one_in(2) {
            vec![0x70 | condition, 5]
        } else {
            vec![0x0f, 0x80 | condition, 5, 0, 0, 0]
        };
        bytes.push(over);
        bytes.extend(&self.random.next().to_le_bytes()[..4]);
        bytes
    }

    /// Runs both; what differs.
    fn compare(&mut self, run: &Run) -> Result<Option<Found>, SubjectError> {
        let mut wanted = EMPTY;
        let mut given = EMPTY;
        self.interpreter.run_whole(run, &mut wanted)?;
        self.translator.run_whole(run, &mut given)?;
        let end = run.state.rip + run.code().len() as u64 - 2;
        if wanted.state.rip != end {
            // Which flags a fault shows that nobody needs any more is left open.
            const STATUS: u64 = 0x8d5;
            given.state.rflags = given.state.rflags & !STATUS | wanted.state.rflags & STATUS;
        }
        let case = run.case();
        if same(&wanted, &given) {
            return Ok(None);
        }
        let mut text = compare::describe(&case);
        for bytes in &run.insns {
            let insn = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
            let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
            text += &format!("  [{}] {:?}\n", hex.join(" "), insn.code());
        }
        for mut difference in compare::differences(&case, &wanted, &given) {
            (difference.hardware, difference.interpreter) = (
                format!("(interpreter) {}", difference.hardware),
                format!("(translator) {}", difference.interpreter),
            );
            text += &format!("  != {difference}\n");
        }
        Ok(Some(Found { run: run.clone(), text }))
    }

    /// Takes away from a run whatever does not matter to its difference.
    fn minimize(&mut self, found: Found) -> Result<Found, SubjectError> {
        let mut best = found;
        let mut at = 0;
        while at < best.run.insns.len() {
            let mut run = best.run.clone();
            run.insns.remove(at);
            match self.compare(&run)? {
                Some(found) => best = found,
                None => at += 1,
            }
        }
        for part in 0..21 {
            let mut run = best.run.clone();
            match part {
                0 => run.state.vector = [[0; 8]; 32],
                1 => {
                    let mxcsr = run.state.mxcsr();
                    run.state.x87 = State::initial().x87;
                    run.state.set_mxcsr(mxcsr);
                }
                2 => run.state.set_mxcsr(0x1f80),
                3 => run.state.rflags = 0x202,
                4 => run.patches = [Patch::NONE; 3],
                n => run.state.gpr[n - 5] = 0,
            }
            if let Some(found) = self.compare(&run)? {
                best = found;
            }
        }
        Ok(best)
    }
}

fn same(a: &Outcome, b: &Outcome) -> bool {
    a.state == b.state && a.event == b.event && a.changed == b.changed && a.changes() == b.changes()
}

impl Subject {
    fn begin(&mut self, run: &Run) -> Result<(), SubjectError> {
        self.write_code(run.state.rip, &run.code())?;
        self.write_memory(&Case { len: 0, ..run.case() })?;
        self.load(&run.case());
        Ok(())
    }

    fn end(&mut self, run: &Run, outcome: &mut Outcome) -> Result<(), SubjectError> {
        self.store(outcome);
        self.erase_code(run.state.rip, run.code().len())?;
        self.look_at_window(outcome)?;
        Ok(())
    }

    /// The state behind a run in the interpreter, RIP at what it stops at.
    fn after(&mut self, run: &Run) -> Result<State, SubjectError> {
        let mut outcome = EMPTY;
        self.run_whole(run, &mut outcome)?;
        Ok(outcome.state)
    }

    /// Runs to the first exception, which may be UD2's.
    fn run_whole(&mut self, run: &Run, outcome: &mut Outcome) -> Result<(), SubjectError> {
        self.begin(run)?;
        outcome.event = self.until_exception()?;
        self.end(run, outcome)
    }
}
