//! The differential oracle: single instructions on the interpreter and on the processor underneath, compared in all that
//! a program can see. `docs/oracle.md` says how to run it.
//!
//! [`generate`] makes a [`case`] from a seed, [`hardware`] and [`subject`] run it, [`compare`] says what differs, and what
//! differs is cut down to its smallest form here. [`blocks`] compares the translator with the interpreter, by runs of several
//! instructions.

pub mod blocks;
pub mod case;
pub mod compare;
mod encodings;
pub mod generate;
pub mod hardware;
pub mod random;
mod runs;
mod shapes;
pub mod small;
pub mod subject;
mod values;

use std::io;

use case::{Case, Event, Outcome, State};
use compare::Difference;
use generate::Generator;
use hardware::{BATCH, Hardware};
use subject::{Subject, SubjectError};

/// The oracle could not go on.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The child process could not be started.
    #[error("cannot run instructions on this processor: {0}")]
    Hardware(#[from] io::Error),
    /// The interpreter could not be set up, or gave up.
    #[error("{0}")]
    Subject(#[from] SubjectError),
}

/// A case that came out differently, as small as it could be made.
#[derive(Debug, Clone)]
pub struct Finding {
    /// The case.
    pub case: Case,
    /// What differs.
    pub differences: Vec<Difference>,
}

impl Finding {
    /// The case and its differences for people.
    pub fn describe(&self) -> String {
        let mut text = compare::describe(&self.case);
        for difference in &self.differences {
            text += &format!("  != {difference}\n");
        }
        text
    }
}

/// Compares cases.
pub struct Oracle {
    hardware: Hardware,
    subject: Subject,
    outcomes: Vec<Outcome>,
}

const EMPTY: Outcome = Outcome {
    state: State { gpr: [0; 16], rip: 0, rflags: 0, vector: [[0; 8]; 32], opmask: [0; 8], x87: [0; 160] },
    event: Event::NONE,
    changed: 0,
    changes: [(0, 0); case::CHANGES],
};

impl Oracle {
    /// Starts both sides, on the interpreter.
    pub fn new() -> Result<Self, OracleError> {
        Self::with(Subject::new()?)
    }

    /// Starts both sides, on the translator.
    pub fn translator() -> Result<Self, OracleError> {
        Self::with(Subject::translator()?)
    }

    fn with(subject: Subject) -> Result<Self, OracleError> {
        let mut hardware = Hardware::new()?;
        // The first case meets the child in a state of its own making.
        hardware.post(&[nop_at(case::CODE)]);
        if hardware.collect().is_err() {
            return Err(OracleError::Hardware(io::Error::other("the child process died")));
        }
        Ok(Self { hardware, subject, outcomes: vec![EMPTY; BATCH] })
    }

    /// Runs cases on both sides (at most [`BATCH`]); those that differ, not minimized.
    pub fn run(&mut self, cases: &[Case]) -> Result<Vec<Finding>, OracleError> {
        self.hardware.post(cases);
        for (case, outcome) in cases.iter().zip(&mut self.outcomes) {
            self.subject.run(case, outcome)?;
        }
        let mut findings = Vec::new();
        match self.hardware.collect() {
            Ok(results) => {
                for ((case, ours), theirs) in cases.iter().zip(&self.outcomes).zip(results) {
                    if !compare::equal(case, theirs, ours) {
                        findings.push(Finding {
                            case: *case,
                            differences: compare::differences(case, theirs, ours),
                        });
                    }
                }
            }
            Err(lost) => {
                self.hardware.restart()?;
                let what = "the child process was lost".into();
                let hardware =
                    lost.signal.map_or("stuck".into(), |signal| format!("ended by signal {signal}"));
                let difference = Difference { what, hardware, interpreter: "-".into() };
                if let Some(case) = cases.get(lost.at) {
                    findings.push(Finding { case: *case, differences: vec![difference] });
                }
            }
        }
        Ok(findings)
    }

    /// Runs `count` cases of a generator until `keep_going` says no to a finding; how many were run.
    pub fn run_many(
        &mut self,
        generator: &mut Generator,
        count: u64,
        mut keep_going: impl FnMut(Finding) -> bool,
    ) -> Result<u64, OracleError> {
        let mut done = 0;
        while done < count {
            let size = (count - done).min(BATCH as u64);
            let cases: Vec<Case> = (0..size).map(|_| generator.next_case()).collect();
            let findings = self.run(&cases)?;
            done += size;
            for finding in findings {
                let small = self.minimize(finding)?;
                if !keep_going(small) {
                    return Ok(done);
                }
            }
        }
        Ok(done)
    }

    /// Takes away from a case whatever does not matter to its difference.
    pub fn minimize(&mut self, finding: Finding) -> Result<Finding, OracleError> {
        let mut best = finding;
        let same_kind = |finding: &Finding, best: &Finding| {
            finding.differences.iter().any(|d| d.what == best.differences[0].what)
        };
        for simplify in simplifications() {
            let mut case = best.case;
            simplify(&mut case);
            if case == best.case {
                continue;
            }
            if let Some(found) = self.run(&[case])?.pop()
                && same_kind(&found, &best)
            {
                best = found;
            }
        }
        Ok(best)
    }
}

/// A NOP in the code page.
fn nop_at(rip: u64) -> Case {
    let mut case = Case {
        state: State::initial(),
        code: [0x90; 16],
        len: 1,
        steps: false,
        patches: [case::Patch::NONE; 3],
    };
    case.state.rip = rip;
    case
}

type Simplify = Box<dyn Fn(&mut Case)>;

fn simplifications() -> Vec<Simplify> {
    let mut all: Vec<Simplify> = vec![
        Box::new(|c| {
            c.state.x87 = State { x87: State::initial().x87, ..c.state }.with_mxcsr(c.state.mxcsr())
        }),
        Box::new(|c| c.state.vector = [[0; 8]; 32]),
        Box::new(|c| c.state.vector[16..].fill([0; 8])),
        Box::new(|c| c.state.opmask = [0; 8]),
        Box::new(|c| c.state.set_mxcsr(0x1f80)),
        Box::new(|c| c.state.rflags = 0x202),
        Box::new(|c| c.patches = [case::Patch::NONE; 3]),
    ];
    for i in 0..3 {
        all.push(Box::new(move |c| c.patches[i] = case::Patch::NONE));
    }
    for i in 0..16 {
        all.push(Box::new(move |c| c.state.gpr[i] = 0));
    }
    for i in 0..32 {
        all.push(Box::new(move |c| c.state.vector[i] = [0; 8]));
        all.push(Box::new(move |c| c.state.vector[i][4..].fill(0)));
        all.push(Box::new(move |c| c.state.vector[i][2..].fill(0)));
        all.push(Box::new(move |c| c.state.opmask[i % 8] = 0));
    }
    for i in 0..8 {
        all.push(Box::new(move |c| c.state.x87[32 + 16 * i..42 + 16 * i].fill(0)));
    }
    all
}

impl State {
    fn with_mxcsr(mut self, mxcsr: u32) -> [u8; 160] {
        self.set_mxcsr(mxcsr);
        self.x87
    }
}
