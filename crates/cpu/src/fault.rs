//! The one way to an exception: a handler raises it on the processor and gives up with [`Abort`].

use crate::cpu::Cpu;

/// The instruction was abandoned; [`Cpu::raised`] says why. Zero-sized, so that results travel in registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abort;

/// What a handler returns.
pub(crate) type Exec<T = ()> = Result<T, Abort>;

/// Why an instruction was abandoned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Raised {
    /// Nothing.
    None,
    /// A processor exception, to be delivered with RIP at the instruction (or behind it, for traps).
    Exception(Exception),
    /// The instruction is about to write to code in its own block: run it again, alone.
    Restart,
    /// A data access to a non-canonical address: #SS(0) if its segment is SS, else #GP(0); the run loop knows.
    NonCanonical,
    /// The back end cannot go on.
    Failed(&'static str),
}

/// An exception as it is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exception {
    pub(crate) vector: u8,
    pub(crate) error: Option<u32>,
}

/// Vectors, SDM vol. 3A table 6-1.
#[allow(dead_code, reason = "a complete list reads better than a partial one")]
pub(crate) mod vector {
    pub(crate) const DE: u8 = 0;
    pub(crate) const DB: u8 = 1;
    pub(crate) const NMI: u8 = 2;
    pub(crate) const BP: u8 = 3;
    pub(crate) const OF: u8 = 4;
    pub(crate) const BR: u8 = 5;
    pub(crate) const UD: u8 = 6;
    pub(crate) const NM: u8 = 7;
    pub(crate) const DF: u8 = 8;
    pub(crate) const TS: u8 = 10;
    pub(crate) const NP: u8 = 11;
    pub(crate) const SS: u8 = 12;
    pub(crate) const GP: u8 = 13;
    pub(crate) const PF: u8 = 14;
    pub(crate) const MF: u8 = 16;
    pub(crate) const AC: u8 = 17;
    pub(crate) const XM: u8 = 19;
}

impl Cpu {
    /// Raises an exception with an error code.
    #[cold]
    pub(crate) fn fault(&mut self, vector: u8, error: u32) -> Abort {
        self.raised = Raised::Exception(Exception { vector, error: Some(error) });
        Abort
    }

    /// Raises an exception without an error code.
    #[cold]
    pub(crate) fn trap(&mut self, vector: u8) -> Abort {
        self.raised = Raised::Exception(Exception { vector, error: None });
        Abort
    }

    /// #GP(code).
    #[cold]
    pub(crate) fn gp(&mut self, error: u32) -> Abort {
        self.fault(vector::GP, error)
    }

    /// #UD.
    #[cold]
    pub(crate) fn ud(&mut self) -> Abort {
        self.trap(vector::UD)
    }

    /// #PF: sets CR2. `error`: bit 0 P, 1 W/R, 2 U/S, 3 RSVD, 4 I/D, 5 PK (SDM vol. 3A §4.7).
    #[cold]
    pub(crate) fn page_fault(&mut self, linear: u64, error: u32) -> Abort {
        self.cr2 = linear;
        self.fault(vector::PF, error)
    }
}
