//! The XSAVE area of a back end whose guest may have more state than the interpreter knows (PKRU): what is not known stays as
//! it is.

use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{Fpu, StateError};

use crate::cpu::Cpu;

/// A state component (SDM vol. 1 §13.1).
const PKRU: u32 = 9;
/// Where XSTATE_BV stands.
const HEADER: usize = 512;

/// The area of one step.
pub(super) struct Vectors {
    area: Vec<u8>,
}

/// Where a component of `area` that is not in its initial state stands: `size` bytes.
fn component_at(area: &[u8], component: u32, size: usize, cpuid: &CpuidTable) -> Option<usize> {
    let present = area.get(HEADER..HEADER + 8)?.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    let at = cpuid.get(0xd, component)?.ebx as usize;
    let used = present >> component & 1 != 0 && at > HEADER && at.checked_add(size)? <= area.len();
    used.then_some(at)
}

impl Vectors {
    /// Loads what the interpreter knows.
    pub(super) fn load(cpu: &mut Cpu, area: &[u8], cpuid: &CpuidTable) -> Result<Self, StateError> {
        cpu.fpu.load_known(area)?;
        let pkru = component_at(area, PKRU, 4, cpuid).and_then(|at| area[at..].first_chunk());
        cpu.pkru = pkru.map_or(0, |bytes| u32::from_le_bytes(*bytes));
        Ok(Self { area: area.to_vec() })
    }

    /// The area afterwards, if anything in it has changed.
    pub(super) fn store(mut self, cpu: &Cpu) -> Option<Fpu> {
        cpu.fpu.store_known(&mut self.area).then_some(Fpu { xsave: self.area })
    }
}
