//! Runs of several instructions on the translator, as one block, and in the interpreter, one by one: for what the translator
//! makes of instructions that stand side by side, and of the flags between them.
//!
//! [`super::runs`] makes the runs. Each meets many states, so that it is decoded and translated once for all of them, and code
//! that leads to other code by now runs as it does in a guest.

use super::case::{Outcome, Patch, State};
use super::runs::{Maker, Plan, Run, Situation};
use super::subject::{Subject, SubjectError};
use super::{EMPTY, compare};

/// States that each run meets.
const STATES: u64 = 32;

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

/// A run that came out differently, as small as it could be made.
#[derive(Debug, Clone)]
pub struct Found {
    run: Run,
    /// What it met before, for what the translator made of that, and last what it came out differently from.
    met: Vec<Situation>,
    /// What differs, for people; the interpreter is on the side of the hardware.
    pub text: String,
}

/// How much was compared.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Cases: a run and a state that it met.
    pub cases: u64,
    /// Runs.
    pub runs: u64,
    /// Cases in which an exception came before the end.
    pub faults: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.cases += other.cases;
        self.runs += other.runs;
        self.faults += other.faults;
    }
}

/// Compares runs.
pub struct Blocks {
    interpreter: Side,
    translator: Side,
    maker: Maker,
}

impl Blocks {
    /// Runs of up to `most` instructions, from a seed.
    pub fn new(seed: u64, only: Option<&str>, most: usize, level: Level) -> Result<Self, SubjectError> {
        Ok(Self {
            interpreter: Side::new(Subject::new()?),
            translator: Side::new(Subject::translator_at(level)?),
            maker: Maker::new(seed.wrapping_add((level as u64) << 56), only, most)?,
        })
    }

    /// Makes runs and compares `count` cases of them until `keep_going` says no to what was found.
    pub fn run_many(
        &mut self,
        count: u64,
        mut keep_going: impl FnMut(Found) -> bool,
    ) -> Result<Counts, SubjectError> {
        let mut counts = Counts::default();
        while counts.cases < count {
            let plan = self.maker.make()?;
            let states = STATES.min(count - counts.cases);
            if let Some(found) = self.compare_plan(&plan, states, &mut counts)? {
                let found = self.minimize(found)?;
                if !keep_going(found) {
                    break;
                }
            }
        }
        Ok(counts)
    }

    /// Lets a run meet many states, until one comes out differently.
    fn compare_plan(
        &mut self,
        plan: &Plan,
        states: u64,
        counts: &mut Counts,
    ) -> Result<Option<Found>, SubjectError> {
        self.place(&plan.run)?;
        counts.runs += 1;
        let mut met = Vec::with_capacity(states as usize);
        for _ in 0..states {
            met.push(self.maker.situation(plan));
            let Some(last) = met.last() else { continue };
            let same = self.same(&plan.run, last)?;
            counts.cases += 1;
            counts.faults += u64::from(self.interpreter.outcome.state.rip != plan.run.end());
            if !same {
                let text = self.describe(&plan.run, &met);
                return Ok(Some(Found { run: plan.run.clone(), met, text }));
            }
        }
        Ok(None)
    }

    /// Puts a run in the place of what was there, on both sides.
    fn place(&mut self, run: &Run) -> Result<(), SubjectError> {
        let code = run.code();
        self.interpreter.place(run.rip, &code)?;
        self.translator.place(run.rip, &code)
    }

    /// Runs both from one state; whether they end alike.
    fn same(&mut self, run: &Run, met: &Situation) -> Result<bool, SubjectError> {
        self.interpreter.run(met)?;
        self.translator.run(met)?;
        let (wanted, given) = (&self.interpreter.outcome, &mut self.translator.outcome);
        if wanted.state.rip != run.end() {
            // Which flags a fault shows that nobody needs any more is left open.
            const STATUS: u64 = 0x8d5;
            given.state.rflags = given.state.rflags & !STATUS | wanted.state.rflags & STATUS;
        }
        Ok(wanted.state == given.state
            && wanted.event == given.event
            && wanted.changed == given.changed
            && wanted.changes() == given.changes())
    }

    /// Lets a run meet states anew; a difference in the last.
    fn again(&mut self, run: Run, met: Vec<Situation>) -> Result<Option<Found>, SubjectError> {
        self.place(&run)?;
        let mut same = true;
        for met in &met {
            same = self.same(&run, met)?;
        }
        if same {
            return Ok(None);
        }
        let text = self.describe(&run, &met);
        Ok(Some(Found { run, met, text }))
    }

    /// What has just come out differently.
    fn describe(&self, run: &Run, met: &[Situation]) -> String {
        let Some((last, before)) = met.split_last() else { return String::new() };
        let mut text = String::new();
        let mut rip = run.rip;
        for unit in &run.units {
            text += &compare::unit(unit, rip);
            rip += unit.len() as u64;
        }
        text += &compare::situation(&last.state, &last.patches);
        if !before.is_empty() {
            text += &format!("  after {} other states\n", before.len());
        }
        let case = super::nop_at(run.rip);
        let (wanted, given) = (&self.interpreter.outcome, &self.translator.outcome);
        for difference in compare::differences(&case, wanted, given) {
            let compare::Difference { what, hardware, interpreter } = difference;
            text += &format!("  != {what:<10} interpreter {hardware}  translator {interpreter}\n");
        }
        text
    }

    /// Takes away from a run whatever does not matter to its difference.
    fn minimize(&mut self, found: Found) -> Result<Found, SubjectError> {
        let mut best = found;
        if let Some(last) = best.met.last().cloned()
            && let Some(found) = self.again(best.run.clone(), vec![last])?
        {
            best = found;
        }
        let mut at = 0;
        while at + 1 < best.met.len() {
            let mut met = best.met.clone();
            met.remove(at);
            match self.again(best.run.clone(), met)? {
                Some(found) => best = found,
                None => at += 1,
            }
        }
        at = 0;
        while at < best.run.units.len() {
            let mut run = best.run.clone();
            run.units.remove(at);
            match self.again(run, best.met.clone())? {
                Some(found) => best = found,
                None => at += 1,
            }
        }
        for part in 0..21 {
            let mut met = best.met.clone();
            met.iter_mut().for_each(|met| simplify(met, part));
            if let Some(found) = self.again(best.run.clone(), met)? {
                best = found;
            }
        }
        Ok(best)
    }
}

/// Makes one of 21 parts of a situation what it is initially.
fn simplify(met: &mut Situation, part: usize) {
    let state = &mut met.state;
    match part {
        0 => (state.vector, state.opmask) = ([[0; 8]; 32], [0; 8]),
        1 => {
            let mxcsr = state.mxcsr();
            state.x87 = State::initial().x87;
            state.set_mxcsr(mxcsr);
        }
        2 => state.set_mxcsr(0x1f80),
        3 => state.rflags = 0x202,
        4 => met.patches.fill(Patch::NONE),
        n => state.gpr[(n - 5) & 15] = 0,
    }
}

/// A processor that runs them, the code that it has now, and what came out last.
struct Side {
    subject: Subject,
    rip: u64,
    len: usize,
    outcome: Box<Outcome>,
}

impl Side {
    fn new(subject: Subject) -> Self {
        Self { subject, rip: super::case::CODE, len: 0, outcome: Box::new(EMPTY) }
    }

    fn place(&mut self, rip: u64, code: &[u8]) -> Result<(), SubjectError> {
        self.subject.erase_code(self.rip, self.len)?;
        self.subject.write_code(rip, code)?;
        (self.rip, self.len) = (rip, code.len());
        Ok(())
    }

    /// Runs to the first exception, which may be UD2's.
    fn run(&mut self, met: &Situation) -> Result<(), SubjectError> {
        self.subject.write_patches(&met.patches)?;
        self.subject.load(&met.state);
        self.outcome.event = self.subject.until_exception()?;
        self.subject.store(&mut self.outcome.state);
        self.subject.look_at_window(&mut self.outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes NEG of NOT.
    fn spoil(code: &mut [u8]) {
        use iced_x86::{Decoder, DecoderOptions, Mnemonic};
        let whole = code.to_vec();
        let mut decoder = Decoder::new(64, &whole, DecoderOptions::NONE);
        while decoder.can_decode() {
            let start = decoder.position();
            if decoder.decode().mnemonic() == Mnemonic::Not {
                let opcode = code[start..].iter().position(|byte| *byte == 0xf7).expect("it has one");
                code[start + opcode + 1] |= 8;
            }
        }
    }

    #[test]
    fn a_wrong_translation_is_found_and_cut_down() {
        for level in Level::ALL {
            let mut blocks = Blocks::new(1, Some("Not_rm32"), 8, level).expect("both sides start");
            blocks.translator.subject.spoil(spoil);
            let mut found = None;
            let keep = |difference| {
                found = Some(difference);
                false
            };
            let counts = blocks.run_many(10_000, keep).expect("both sides go on");
            let found = found.expect("it is wrong");
            assert!(counts.cases < 10_000, "{counts:?}");
            assert_eq!((found.run.units.len(), found.met.len()), (1, 1), "{}", found.text);
        }
    }

    #[test]
    fn flags_that_changed_code_reads_are_there() {
        use super::super::case::CODE;
        // CMP EAX, EBX; JE to a TEST, which is replaced by SETE CL before it is reached; TEST; UD2.
        let code = [0x39, 0xd8, 0x0f, 0x84, 0x78, 0, 0, 0, 0x85, 0xc0, 0x0f, 0x0b];
        let mut subject = Subject::translator_at(Level::Chained).expect("it starts");
        subject.write_code(CODE + 0x180, &[0x85, 0xc0, 0x90, 0x0f, 0x0b]).expect("it fits");
        let mut run = |at: u64, code: &[u8], equal: bool| {
            subject.write_code(at, code).expect("it fits");
            let mut state = State::initial();
            (state.rip, state.gpr[0], state.gpr[1], state.gpr[3]) = (CODE + 0x100, 1, 0, u64::from(equal));
            subject.load(&state);
            subject.until_exception().expect("it goes on");
            subject.store(&mut state);
            state.gpr[1]
        };
        assert_eq!(run(CODE + 0x100, &code, false), 0);
        assert_eq!(run(CODE + 0x180, &[0x0f, 0x94, 0xc1], true), 1);
    }

    /// Runs that came out differently once, with RFLAGS.
    const ONCE_WRONG: [(&[u8], u64); 2] = [
        // SAHF, ROL R9, 9: the rotate leaves OF alone.
        (&[0x9e, 0x49, 0xc1, 0xc1, 9], 0xa02),
        // SAHF, ROR R9, 9.
        (&[0x9e, 0x49, 0xc1, 0xc9, 9], 0xa02),
    ];

    #[test]
    fn what_was_wrong_once_is_right() {
        for level in Level::ALL {
            let mut blocks = Blocks::new(1, None, 8, level).expect("both sides start");
            for (code, rflags) in ONCE_WRONG {
                let rip = crate::oracle::case::CODE + 0x300;
                let run = Run { rip, units: vec![code.to_vec()] };
                let state = State { rip, rflags, ..State::initial() };
                let patches = std::array::from_fn(|_| Patch::NONE);
                let found = blocks.again(run, vec![Situation { state, patches }]).expect("both go on");
                assert!(found.is_none(), "{level:?}: {}", found.map(|f| f.text).unwrap_or_default());
            }
        }
    }

    #[test]
    fn most_cases_come_to_their_end() {
        let mut blocks = Blocks::new(2, None, 8, Level::Straight).expect("both sides start");
        let counts = blocks.run_many(6400, |_| true).expect("both sides go on");
        assert_eq!((counts.cases, counts.runs), (6400, 200));
        assert!((1..2000).contains(&counts.faults), "{counts:?}");
    }
}
