//! Runs of 32-bit instructions, in compatibility mode, on the translator and in the interpreter: as [`super::blocks`] does
//! for 64-bit code. Segments vary, and what the upper halves of the registers hold.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use skep_hv::state::Segment;

use super::blocks::Level;
use super::case::{CODE, Case, Outcome, Patch, State, WINDOW, WRITABLE};
use super::generate::Generator;
use super::random::Random;
use super::subject::{Subject, SubjectError};
use super::{EMPTY, compare};

/// Instructions and what they meet.
#[derive(Debug, Clone)]
struct Run {
    state: State,
    insns: Vec<Vec<u8>>,
    patches: [Patch; 3],
}

/// A run that came out differently, with as few instructions as show it.
#[derive(Debug, Clone)]
pub struct Found {
    run: Run,
    /// What differs, for people.
    pub text: String,
}

/// Instructions tried for one place in a run.
const TRIES: usize = 16;

/// What the segments of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Segments {
    /// All of them flat, but for the bases of FS and GS.
    Flat,
    /// The same, but GS ends at 64 KiB, and FS must not be used.
    Narrow,
    /// DS has a base.
    Based,
}

/// One byte opcodes that have no meaning in 64-bit code, or another, and those that go on with an address.
const SHORT: [u8; 34] = [
    0x40, 0x41, 0x42, 0x43, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x4b, 0x4d, 0x4e, 0x4f, 0x06, 0x07, 0x0e,
    0x16, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x60, 0x61, 0xa0, 0xa1, 0xa2, 0xa3, 0x44, 0x4c, 0xc9, 0xd6,
];
const PREFIXES: [u8; 7] = [0x66, 0x67, 0x2e, 0x3e, 0x64, 0x65, 0x26];

/// Compares runs of 32-bit instructions.
pub struct SmallBlocks {
    interpreter: Subject,
    translator: Subject,
    generator: Generator,
    random: Random,
    most: usize,
}

impl SmallBlocks {
    /// Runs of up to `most` instructions, from a seed.
    pub fn new(seed: u64, most: usize, level: Level) -> Result<Self, SubjectError> {
        Ok(Self {
            interpreter: Subject::new()?,
            translator: Subject::translator_at(level)?,
            generator: Generator::new(seed, None),
            random: Random::new(!seed),
            most: most.max(1),
        })
    }

    /// Makes and compares `count` runs: the first that comes out differently, with as few instructions as show it.
    pub fn run_many(&mut self, count: u64) -> Result<Option<Found>, SubjectError> {
        for _ in 0..count {
            let segments =
                self.random.pick(&[Segments::Flat, Segments::Flat, Segments::Narrow, Segments::Based]);
            let run = self.make(segments)?;
            if let Some(found) = self.compare(&run, segments)? {
                return self.minimize(found, segments).map(Some);
            }
        }
        Ok(None)
    }

    /// A run whose instructions mostly do not fault: each is tried in the interpreter.
    fn make(&mut self, segments: Segments) -> Result<Run, SubjectError> {
        let first = self.generator.next_case();
        let mut run = Run { state: first.state, insns: Vec::new(), patches: first.patches };
        run.state.rip = CODE + 0x200 + self.random.below(0x800);
        for register in &mut run.state.gpr {
            if self.random.one_in(2) {
                *register = WINDOW + 0x400 + 4 * self.random.below(0x300);
            }
            if self.random.one_in(4) {
                *register |= self.random.next() << 32;
            }
        }
        let wanted = 1 + self.random.below(self.most as u64) as usize;
        let mut state = run.state;
        while run.insns.len() < wanted {
            let before = run.insns.len();
            for _ in 0..TRIES {
                let Some(bytes) = self.instruction(&state) else { continue };
                run.insns.push(bytes);
                let after = self.interpreter.run_small(&run, segments)?.state;
                if after.rip == end(&run) {
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

    /// One instruction that mostly makes sense in a state, or a few that belong together.
    fn instruction(&mut self, state: &State) -> Option<Vec<u8>> {
        if self.random.one_in(6) {
            return Some(self.transfer());
        }
        let mut bytes = if self.random.one_in(4) {
            self.short()
        } else {
            // As 64-bit code has it, without REX.
            let bytes = self.generator.next_case().bytes().to_vec();
            let rex = bytes.iter().position(|&b| !matches!(b, 0x66 | 0xf2 | 0xf3 | 0xf0 | 0x64 | 0x65))?;
            let skip = usize::from(bytes[rex] & 0xf0 == 0x40);
            [&bytes[..rex], &bytes[rex + skip..]].concat()
        };
        bytes.resize(15, 0);
        let mut decoder = Decoder::with_ip(32, &bytes, state.rip, DecoderOptions::NONE);
        let insn = decoder.decode();
        if insn.is_invalid() || insn.flow_control() != FlowControl::Next || is_unwanted(&insn) {
            return None;
        }
        let at = decoder.get_constant_offsets(&insn);
        if insn.op_kinds().any(|k| k == OpKind::Memory) && at.displacement_size() == 4 {
            let value = |register: Register| match register {
                r if r.is_gpr() => state.gpr[r.full_register().number() & 15],
                _ => 0,
            };
            let index = value(insn.memory_index()).wrapping_mul(u64::from(insn.memory_index_scale()));
            let target = WINDOW + 0x200 + self.random.below(WRITABLE as u64 - 0x400);
            let displacement = target.wrapping_sub(value(insn.memory_base())).wrapping_sub(index);
            bytes[at.displacement_offset()..][..4].copy_from_slice(&(displacement as u32).to_le_bytes());
        }
        bytes.truncate(insn.len());
        Some(bytes)
    }

    /// An instruction that only 32-bit code has, or with an absolute address, or one on the stack.
    fn short(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.random.one_in(4) {
            bytes.push(self.random.pick(&PREFIXES));
        }
        let register = self.random.below(8) as u8;
        match self.random.below(6) {
            0 => bytes.push(0x50 | register),
            1 => bytes.push(0x58 | register),
            2 => bytes.extend([0x68 | self.random.below(2) as u8 * 2]),
            // An operation on an absolute address.
            3 => bytes
                .extend([self.random.pick(&[0x01, 0x03, 0x8b, 0x89, 0x39, 0x8d, 0xff]), register << 3 | 5]),
            // On the stack.
            4 => bytes.extend([
                self.random.pick(&[0x01, 0x03, 0x8b, 0x89, 0x39, 0x8d]),
                0x44 | register << 3,
                0x24,
            ]),
            _ => bytes.push(self.random.pick(&SHORT)),
        }
        bytes.extend(self.random.next().to_le_bytes());
        bytes
    }

    /// Jumps, calls and returns that come out behind themselves.
    fn transfer(&mut self) -> Vec<u8> {
        let register = self.random.pick(&[0u8, 1, 2, 3, 5, 6, 7]);
        let condition = self.random.below(16) as u8;
        let over: [u8; 5] = {
            let [a, b, c, d, ..] = self.random.next().to_le_bytes();
            [self.random.pick(&[0x05, 0x15, 0x1d, 0x3d, 0xa9, 0xb8, 0xbe]), a, b, c, d]
        };
        match self.random.below(8) {
            0 => [&[0x70 | condition, 5][..], &over].concat(),
            1 => [&[0x0f, 0x80 | condition, 5, 0, 0, 0][..], &over].concat(),
            2 => [&[0xe8, 5, 0, 0, 0][..], &over, &[0x58 | register]].concat(),
            // A call to ADD [ESP], 5; RET.
            3 => vec![0xe8, 0, 0, 0, 0, 0x83, 0x04, 0x24, 5, 0xc3],
            // POP, ADD, JMP.
            4 => vec![0xe8, 0, 0, 0, 0, 0x58 | register, 0x83, 0xc0 | register, 6, 0xff, 0xe0 | register],
            // MOV ECX, 3; INC EAX; DEC ECX; JNE.
            5 => vec![0xb9, 3, 0, 0, 0, 0x40, 0x49, 0x75, 0xfc],
            // MOV ECX, 3; INC EAX; LOOP.
            6 => vec![0xb9, 3, 0, 0, 0, 0x40, 0xe2, 0xfd],
            _ => [&[0xe3, 5][..], &over].concat(),
        }
    }

    /// Runs both; what differs.
    fn compare(&mut self, run: &Run, segments: Segments) -> Result<Option<Found>, SubjectError> {
        let wanted = self.interpreter.run_small(run, segments)?;
        let mut given = self.translator.run_small(run, segments)?;
        if wanted.state.rip != end(run) {
            // Which flags a fault shows that nobody needs any more is left open.
            const STATUS: u64 = 0x8d5;
            given.state.rflags = given.state.rflags & !STATUS | wanted.state.rflags & STATUS;
        }
        if wanted.state == given.state
            && wanted.event == given.event
            && wanted.changed == given.changed
            && wanted.changes() == given.changes()
        {
            return Ok(None);
        }
        let case = case(run);
        let mut text = format!("{segments:?} {}", compare::describe(&case));
        for bytes in &run.insns {
            let insn = Decoder::with_ip(32, bytes, 0, DecoderOptions::NONE).decode();
            let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
            text += &format!("  [{}] {:?}\n", hex.join(" "), insn.code());
        }
        for difference in compare::differences(&case, &wanted, &given) {
            let (interpreter, translator) = (&difference.hardware, &difference.interpreter);
            text +=
                &format!("  != {}: interpreter {interpreter}, translator {translator}\n", difference.what);
        }
        Ok(Some(Found { run: run.clone(), text }))
    }

    /// Takes away instructions that do not matter to what differs.
    fn minimize(&mut self, found: Found, segments: Segments) -> Result<Found, SubjectError> {
        let mut best = found;
        let mut at = 0;
        while at < best.run.insns.len() {
            let mut run = best.run.clone();
            run.insns.remove(at);
            match self.compare(&run, segments)? {
                Some(found) => best = found,
                None => at += 1,
            }
        }
        Ok(best)
    }
}

/// What would differ each time, or leave the mode.
fn is_unwanted(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Popf
            | M::Popfd
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdrand
            | M::Rdseed
            | M::Rdpid
            | M::Rdpmc
            | M::Sysenter
            | M::Hlt
    )
}

fn case(run: &Run) -> Case {
    Case { state: run.state, code: [0x90; 16], len: 0, steps: false, patches: run.patches }
}

/// Where UD2 stands behind a run.
fn end(run: &Run) -> u64 {
    run.state.rip + run.insns.iter().map(|insn| insn.len() as u64).sum::<u64>()
}

impl Subject {
    /// Runs to the first exception, which may be that of UD2 behind the run.
    fn run_small(&mut self, run: &Run, segments: Segments) -> Result<Outcome, SubjectError> {
        let mut outcome = EMPTY;
        let code = [&run.insns.concat()[..], &[0x0f, 0x0b]].concat();
        self.write_code(run.state.rip, &code)?;
        self.write_patches(&run.patches)?;
        self.load(&run.state);
        self.set_small_segments(segments);
        outcome.event = self.until_exception()?;
        self.store(&mut outcome.state);
        self.erase_code(run.state.rip, code.len())?;
        self.look_at_window(&mut outcome)?;
        Ok(outcome)
    }
}

/// A segment of level 3 that spans everything.
pub(super) fn flat(kind: u32) -> Segment {
    const PRESENT_32_BIT: u32 = 1 << 7 | 3 << 5 | 1 << 4 | 3 << 14;
    Segment { selector: 0x2b, base: 0, limit: u32::MAX, access: PRESENT_32_BIT | kind }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For runs that are made by hand.
    const NO_PATCHES: [Patch; 3] = [Patch::NONE; 3];

    #[test]
    fn random_runs_come_out_the_same() {
        for (level, seed) in Level::ALL.into_iter().zip(1..) {
            for most in [1, 8] {
                let mut blocks = SmallBlocks::new(seed, most, level).expect("a processor");
                if let Some(found) = blocks.run_many(1500).expect("it goes on") {
                    panic!("{level:?}: {}", found.text);
                }
                // Three in four of them are of flat code.
                assert!(blocks.translator.translated() > 1000);
            }
        }
    }

    fn both(state: State, insns: &[&[u8]], segments: Segments) -> Outcome {
        let run = Run { state, insns: insns.iter().map(|i| i.to_vec()).collect(), patches: NO_PATCHES };
        let mut outcome = None;
        for level in Level::ALL {
            let mut blocks = SmallBlocks::new(1, 1, level).expect("a processor");
            // The second time it is there already.
            for _ in 0..2 {
                if let Some(found) = blocks.compare(&run, segments).expect("it runs") {
                    panic!("{level:?}: {}", found.text);
                }
            }
            outcome = Some(blocks.translator.run_small(&run, segments).expect("it runs"));
        }
        outcome.expect("there are levels")
    }

    fn at_start() -> State {
        let mut state = State::initial();
        state.rip = CODE + 0x100;
        state.gpr[4] = WINDOW + 0x800;
        state
    }

    #[test]
    fn addresses_wrap_and_upper_halves_do_not_count() {
        let mut state = at_start();
        state.gpr[3] = 0x5555_5555_ffff_fff0;
        let disp = (WINDOW as u32 + 0x110).to_le_bytes();
        // MOV EAX, [EBX + disp]; MOV [ESP - 4], EAX
        let load = [0x8b, 0x83, disp[0], disp[1], disp[2], disp[3]];
        let outcome = both(state, &[&load, &[0x89, 0x44, 0x24, 0xfc]], Segments::Flat);
        assert_eq!(outcome.event.vector, 6);
        assert_eq!(outcome.changes()[0].0, 0x7f8);
    }

    #[test]
    fn a_stack_at_zero_wraps() {
        let mut state = at_start();
        state.gpr[4] = 0x7777_7777_0000_0000;
        // PUSH EAX
        let outcome = both(state, &[&[0x50]], Segments::Flat);
        assert_eq!((outcome.event.vector, outcome.event.cr2), (14, 0xffff_fffc));
        assert_eq!(outcome.state.gpr[4], state.gpr[4]);
    }

    #[test]
    fn what_straddles_the_end_of_a_segment_is_at_fault() {
        let mut state = at_start();
        state.gpr[3] = 0xffff_fffe;
        // MOV EAX, [EBX]; MOV EAX, GS:[EBX], which would lie in one page; MOV EAX, GS:[-4]
        for (insn, vector) in
            [(&[0x8b, 0x03][..], 13), (&[0x65, 0x8b, 0x03], 13), (&[0x65, 0xa1, 0xfc, 0xff, 0xff, 0xff], 6)]
        {
            assert_eq!(both(state, &[insn], Segments::Flat).event.vector, vector);
        }
        assert_eq!(both(state, &[&[0x65, 0xa1, 0xfc, 0xff, 0xff, 0xff]], Segments::Narrow).event.vector, 13);
    }

    #[test]
    fn a_segment_that_changes_leaves_no_stale_code() {
        let mut blocks = SmallBlocks::new(1, 1, Level::Chained).expect("a processor");
        let at = (WINDOW as u32 + 0x100).to_le_bytes();
        // MOV EAX, [at]
        let run = Run {
            state: at_start(),
            insns: vec![vec![0xa1, at[0], at[1], at[2], at[3]]],
            patches: NO_PATCHES,
        };
        let mut seen = Vec::new();
        for segments in [Segments::Flat, Segments::Based, Segments::Flat] {
            let outcome = blocks.translator.run_small(&run, segments).expect("it runs");
            seen.push(outcome.state.gpr[0]);
            assert_eq!(outcome, blocks.interpreter.run_small(&run, segments).expect("it runs"));
        }
        assert!(seen[0] == seen[2] && seen[0] != seen[1]);
    }
}
