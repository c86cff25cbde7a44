//! Where stepping ends: what the interpreter does not know, and what belongs to the back end.

use iced_x86::{CpuidFeature, Mnemonic, Register};
use skep_hv::cpuid::{CpuidLeaf, CpuidTable};
use skep_hv::state::System;

use crate::cpu::Cpu;
use crate::decode::{Fresh, Room};
use crate::native::component;

/// CR4 bits that change nothing about the instructions which are executed here: VMXE, SMXE.
pub(super) const PASSIVE_CR4: u64 = 1 << 13 | 1 << 14;
/// EFER bits likewise: SVME, TCE, AIBRSE.
pub(super) const PASSIVE_EFER: u64 = 1 << 12 | 1 << 15 | 1 << 21;

/// Whether CPUID announces protection keys for user pages.
pub(super) fn has_protection_keys(cpuid: &CpuidTable) -> bool {
    leaf(cpuid, 7, 0).ecx >> 3 & 1 != 0
}

fn leaf(cpuid: &CpuidTable, function: u32, index: u32) -> CpuidLeaf {
    cpuid.get(function, index).unwrap_or_default()
}

/// Why an instruction cannot be executed here, although the guest's processor may have it.
pub(super) fn refusal(cpu: &Cpu, fresh: &Fresh, cpuid: &CpuidTable, system: &System) -> Option<&'static str> {
    use Mnemonic as M;
    let insn = &fresh.insn;
    // Above level 0 these are refused by the processor itself.
    let supervisor = cpu.mode.cpl == 0;
    match insn.mnemonic() {
        M::Rdmsr | M::Wrmsr if supervisor => Some("model-specific registers are the back end's own"),
        M::Vmcall | M::Vmmcall if supervisor => Some("hypercalls are the back end's own"),
        M::Mov
            if system.cr4 & PASSIVE_CR4 != 0
                && (insn.op0_register() == Register::CR4 || insn.op1_register() == Register::CR4) =>
        {
            Some("CR4 holds bits (VMXE, SMXE) that the interpreter does not know")
        }
        M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xrstor
        | M::Xrstor64
            if cpu.edx_eax() & system.xcr0 & !component::ALL != 0 =>
        {
            Some(
                "XSAVE and XRSTOR of more than x87, SSE, AVX and AVX-512 state are not known to the interpreter: hide PKU and \
                 the like from the guest",
            )
        }
        _ if fresh.by == Room::Undefined
            && !insn.is_invalid()
            && insn.cpuid_features().iter().any(|&f| announced(f, cpuid)) =>
        {
            Some("the guest's CPUID announces this instruction, which the interpreter does not know")
        }
        _ => None,
    }
}

/// Whether CPUID announces a feature whose instructions a guest may have, and the interpreter has not.
fn announced(feature: CpuidFeature, cpuid: &CpuidTable) -> bool {
    use CpuidFeature as F;
    let seven = leaf(cpuid, 7, 0);
    let bit = |register: u32, bit: u32| register >> bit & 1 != 0;
    match feature {
        F::AVX512F
        | F::AVX512BW
        | F::AVX512CD
        | F::AVX512DQ
        | F::AVX512VL
        | F::AVX512_VBMI
        | F::AVX512_VBMI2
        | F::AVX512_IFMA
        | F::AVX512_VNNI
        | F::AVX512_BITALG
        | F::AVX512_VPOPCNTDQ
        | F::AVX512_BF16
        | F::AVX512_FP16
        | F::AVX512_VP2INTERSECT => bit(seven.ebx, 16),
        F::AMX_TILE | F::AMX_INT8 | F::AMX_BF16 => bit(seven.edx, 24),
        F::RTM => bit(seven.ebx, 11),
        F::PKU => bit(seven.ecx, 3),
        F::WAITPKG => bit(seven.ecx, 5),
        F::CET_SS => bit(seven.ecx, 7),
        F::MOVDIRI => bit(seven.ecx, 27),
        F::MOVDIR64B => bit(seven.ecx, 28),
        F::ENQCMD => bit(seven.ecx, 29),
        F::MONITOR => bit(leaf(cpuid, 1, 0).ecx, 3),
        F::VMX => bit(leaf(cpuid, 1, 0).ecx, 5),
        F::XSAVES => bit(leaf(cpuid, 0xd, 1).eax, 3),
        F::SVM => bit(leaf(cpuid, 0x8000_0001, 0).ecx, 2),
        F::XOP => bit(leaf(cpuid, 0x8000_0001, 0).ecx, 11),
        F::FMA4 => bit(leaf(cpuid, 0x8000_0001, 0).ecx, 16),
        F::TBM => bit(leaf(cpuid, 0x8000_0001, 0).ecx, 21),
        F::MONITORX => bit(leaf(cpuid, 0x8000_0001, 0).ecx, 29),
        F::D3NOW | F::D3NOWEXT => bit(leaf(cpuid, 0x8000_0001, 0).edx, 31),
        F::CLZERO => bit(leaf(cpuid, 0x8000_0008, 0).ebx, 0),
        F::RDPRU => bit(leaf(cpuid, 0x8000_0008, 0).ebx, 4),
        _ => false,
    }
}
