//! The XSAVE area of a back end whose guest may have more state than the interpreter knows (AVX-512, PKRU): what is not
//! known stays as it is, but for what a known instruction does to it.

use iced_x86::{EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess};
use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{Fpu, StateError};

use crate::cpu::{CodeSize, Cpu};

/// State components (SDM vol. 1 §13.1).
const ZMM_HIGH: u32 = 6;
const PKRU: u32 = 9;
/// Where XSTATE_BV stands.
const HEADER: usize = 512;
/// Bytes of a ZMM register above its YMM register.
const ZMM_HIGH_SIZE: usize = 32;

/// The area of one step.
pub(super) struct Vectors {
    area: Vec<u8>,
    /// Where the upper halves of the first 16 ZMM registers stand, if they are not in their initial state.
    zmm: Option<usize>,
    changed: bool,
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
        let zmm = component_at(area, ZMM_HIGH, 16 * ZMM_HIGH_SIZE, cpuid);
        Ok(Self { area: area.to_vec(), zmm, changed: false })
    }

    /// To be called after an instruction on vector registers: with VEX it clears all of those it writes, as far up as
    /// they go (SDM vol. 2A §2.3.10.1).
    pub(super) fn executed(&mut self, cpu: &Cpu, insn: &Instruction) {
        let Some(at) = self.zmm.filter(|_| insn.code().encoding() == EncodingKind::VEX) else { return };
        let written: u32 = match insn.mnemonic() {
            Mnemonic::Vzeroall | Mnemonic::Vzeroupper if cpu.mode.code == CodeSize::Bits64 => 0xffff,
            Mnemonic::Vzeroall | Mnemonic::Vzeroupper => 0xff,
            _ => {
                let mut factory = InstructionInfoFactory::new();
                let writes = |access| {
                    matches!(
                        access,
                        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
                    )
                };
                let used = factory.info(insn).used_registers().iter();
                used.filter(|r| r.register().is_vector_register() && writes(r.access()))
                    .fold(0, |set, r| set | 1 << (r.register().number() & 15))
            }
        };
        for n in (0..16).filter(|n| written >> n & 1 != 0) {
            self.area[at + n * ZMM_HIGH_SIZE..][..ZMM_HIGH_SIZE].fill(0);
        }
        self.changed |= written != 0;
    }

    /// The area afterwards, if anything in it has changed.
    pub(super) fn store(mut self, cpu: &Cpu) -> Option<Fpu> {
        self.changed |= cpu.fpu.store_known(&mut self.area);
        self.changed.then_some(Fpu { xsave: self.area })
    }
}
