//! What stands round an instruction in a run: jumps, a call, a loop.

use super::random::Random;

const RAX: usize = 0;
const RCX: usize = 1;
const RSP: usize = 4;

/// How an instruction stands in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Alone.
    Plain,
    /// A conditional jump over it is in front.
    Skipped,
    /// It is a function.
    Called,
    /// It is a function that returns to elsewhere.
    Misled,
    /// A jump through RAX leads to it.
    Pointed,
    /// It is a function, called through RAX.
    CalledPointed,
    /// It is the body of a loop.
    Repeated,
}

impl Shape {
    /// Instructions that it takes.
    pub(super) fn count(self) -> usize {
        match self {
            Self::Plain => 1,
            Self::Skipped => 2,
            Self::Pointed => 3,
            Self::Called | Self::Repeated => 4,
            Self::CalledPointed => 5,
            Self::Misled => 6,
        }
    }

    /// The general register that it needs for itself.
    pub(super) fn own(self) -> Option<usize> {
        match self {
            Self::Repeated => Some(RCX),
            Self::Pointed | Self::CalledPointed => Some(RAX),
            _ => None,
        }
    }

    /// The general registers that its instruction must not use.
    pub(super) fn forbids(self) -> &'static [usize] {
        match self {
            Self::Plain | Self::Skipped => &[],
            Self::Called | Self::Misled => &[RSP],
            Self::Pointed => &[RAX],
            Self::CalledPointed => &[RAX, RSP],
            Self::Repeated => &[RCX],
        }
    }
}

/// An instruction with what stands round it.
pub(super) struct Unit {
    pub(super) before: Vec<u8>,
    pub(super) insn: Vec<u8>,
    after: Vec<u8>,
    pub(super) shape: Shape,
}

impl Unit {
    /// An instruction in a shape, jumps and counts at random.
    pub(super) fn new(random: &mut Random, shape: Shape, insn: Vec<u8>) -> Self {
        let len = insn.len() as u8;
        let condition = random.below(16) as u8;
        let (before, after) = match shape {
            Shape::Plain => (vec![], vec![]),
            Shape::Skipped if random.one_in(2) => (vec![0x70 | condition, len], vec![]),
            Shape::Skipped => (vec![0x0f, 0x80 | condition, len, 0, 0, 0], vec![]),
            // CALL over a JMP over what is called and its RET.
            Shape::Called => (vec![0xe8, 2, 0, 0, 0, 0xeb, len + 1], vec![0xc3]),
            // CALL over a NOP and a JMP, ADD to the return address, RET to the JMP.
            Shape::Misled => {
                (vec![0xe8, 5, 0, 0, 0, 0x0f, 0x1f, 0, 0xeb, len + 6], vec![0x48, 0x83, 4, 0x24, 3, 0xc3])
            }
            // LEA RAX of what stands behind JMP RAX.
            Shape::Pointed => (vec![0x48, 0x8d, 5, 2, 0, 0, 0, 0xff, 0xe0], vec![]),
            // LEA RAX of what stands behind CALL RAX and a JMP over that and its RET.
            Shape::CalledPointed => (vec![0x48, 0x8d, 5, 4, 0, 0, 0, 0xff, 0xd0, 0xeb, len + 1], vec![0xc3]),
            // MOV ECX; DEC ECX and JNZ, or LOOP.
            Shape::Repeated => {
                let before = vec![0xb9, 1 + random.below(4) as u8, 0, 0, 0];
                let back = |own: u8| (len + own).wrapping_neg();
                let after =
                    if random.one_in(4) { vec![0xe2, back(2)] } else { vec![0xff, 0xc9, 0x75, back(4)] };
                (before, after)
            }
        };
        Self { before, insn, after, shape }
    }

    /// The bytes as they stand in the run.
    pub(super) fn bytes(&self) -> Vec<u8> {
        [&self.before[..], &self.insn, &self.after].concat()
    }

    /// The bytes as they are tried, as long as the others: the instruction is not skipped.
    pub(super) fn trial(&self) -> Vec<u8> {
        let nops = vec![0x90; self.before.len()];
        let before = if self.shape == Shape::Skipped { &nops } else { &self.before };
        [&before[..], &self.insn, &self.after].concat()
    }
}
