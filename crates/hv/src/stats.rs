//! Counters of a vCPU.

use std::collections::BTreeMap;

/// Counters of one vCPU since its creation.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VcpuStats {
    /// Guest instructions retired, where the back end can count them, else 0. The software CPU's JIT counts none of those
    /// that run translated: with it these are the interpreted ones.
    pub instructions: u64,
    /// Port reads and writes.
    pub port_io: u64,
    /// Memory-mapped reads and writes.
    pub memory_io: u64,
    /// Interrupts delivered, NMIs included.
    pub interrupts: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// Times the vCPU halted.
    pub halts: u64,
    /// Time spent halted, ns.
    pub halted_ns: u64,
    /// Blocks decoded for the interpreter.
    pub blocks: u64,
    /// Soft-TLB misses.
    pub tlb_misses: u64,
    /// What the software CPU's JIT has translated; all 0 where there is none.
    pub translations: Translations,
    /// Instructions that the back end could not execute and the software CPU's interpreter did.
    pub emulated: u64,
    /// Returns from the guest to this process, by reason; empty where the guest runs inside of it.
    pub exits: BTreeMap<&'static str, u64>,
    /// What the host's kernel has counted of this vCPU, under its own names; empty where it does not.
    pub kernel: BTreeMap<String, u64>,
}

/// What a JIT has translated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Translations {
    /// Blocks translated, again after an eviction included.
    pub blocks: u64,
    /// Guest instructions in them.
    pub instructions: u64,
    /// Bytes of host code made of them.
    pub bytes: u64,
    /// Times the oldest eighth of the code cache was dropped to make room.
    pub evictions: u64,
    /// What was compared with the interpreter, in lockstep.
    pub compared: Compared,
}

/// What lockstep has compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Compared {
    /// Blocks in which nothing differed.
    pub blocks: u64,
    /// Guest instructions in them, as far as they were executed.
    pub instructions: u64,
    /// Blocks and single instructions that the interpreter executed alone.
    pub alone: u64,
    /// Blocks that differed once and not again.
    pub passing: u64,
}

impl std::iter::Sum for Translations {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            blocks: sum.blocks.saturating_add(one.blocks),
            instructions: sum.instructions.saturating_add(one.instructions),
            bytes: sum.bytes.saturating_add(one.bytes),
            evictions: sum.evictions.saturating_add(one.evictions),
            compared: Compared {
                blocks: sum.compared.blocks.saturating_add(one.compared.blocks),
                instructions: sum.compared.instructions.saturating_add(one.compared.instructions),
                alone: sum.compared.alone.saturating_add(one.compared.alone),
                passing: sum.compared.passing.saturating_add(one.compared.passing),
            },
        })
    }
}
