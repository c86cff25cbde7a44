//! Counters of a vCPU.

use std::collections::BTreeMap;

/// Counters of one vCPU since its creation.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VcpuStats {
    /// Guest instructions retired, where the back end can count them, else 0.
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
    /// Blocks decoded or translated.
    pub blocks: u64,
    /// Soft-TLB misses.
    pub tlb_misses: u64,
    /// Instructions that the back end could not execute and the software CPU's interpreter did.
    pub emulated: u64,
    /// Returns from the guest to this process, by reason; empty where the guest runs inside of it.
    pub exits: BTreeMap<&'static str, u64>,
    /// What the host's kernel has counted of this vCPU, under its own names; empty where it does not.
    pub kernel: BTreeMap<String, u64>,
}
