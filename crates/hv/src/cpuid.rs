//! CPUID: a table of leaves, and the policy that builds it from the host's by an allow-list.

/// One CPUID answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidLeaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// What CPUID shows: leaves sorted by (function, index).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuidTable {
    leaves: Vec<((u32, u32), CpuidLeaf)>,
}

impl CpuidTable {
    /// Sets one leaf. `index` is 0 for functions that ignore ECX.
    pub fn set(&mut self, function: u32, index: u32, leaf: CpuidLeaf) {
        match self.leaves.binary_search_by_key(&(function, index), |l| l.0) {
            Ok(at) => self.leaves[at].1 = leaf,
            Err(at) => self.leaves.insert(at, ((function, index), leaf)),
        }
    }

    /// The leaf as stored, without the out-of-range rule.
    pub fn get(&self, function: u32, index: u32) -> Option<CpuidLeaf> {
        self.leaves.binary_search_by_key(&(function, index), |l| l.0).ok().map(|at| self.leaves[at].1)
    }

    /// All leaves in order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32, CpuidLeaf)> + '_ {
        self.leaves.iter().map(|&((function, index), leaf)| (function, index, leaf))
    }
}
