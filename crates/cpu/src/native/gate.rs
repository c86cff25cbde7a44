//! Which instructions the processor offers, and when they are available: CPUID, CR0.EM, TS and MP, CR4.OSFXSR and
//! OSXSAVE, XCR0 (SDM vol. 2A §2.4, vol. 3A §13.1 and §14.1).

use std::sync::LazyLock;

use iced_x86::{CpuidFeature, EncodingKind, FlowControl, Instruction};
use skep_hv::cpuid::{CpuidLeaf, CpuidTable};

use super::fpu::component;
use crate::cpu::{Cpu, cr0, cr4};
use crate::fault::{Abort, Exec, vector};

/// A CPUID register.
#[derive(Clone, Copy)]
enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// CPUID leaf, subleaf, register and bit that announce a feature whose instructions may run on the host's own units.
fn announced_by(feature: CpuidFeature) -> Option<(u32, u32, Reg, u32)> {
    use CpuidFeature as F;
    Some(match feature {
        F::FPU | F::FPU287 | F::FPU387 => (1, 0, Reg::Edx, 0),
        F::CMOV => (1, 0, Reg::Edx, 15),
        F::CLFSH => (1, 0, Reg::Edx, 19),
        F::MMX => (1, 0, Reg::Edx, 23),
        F::FXSR => (1, 0, Reg::Edx, 24),
        F::SSE => (1, 0, Reg::Edx, 25),
        F::SSE2 | F::PAUSE => (1, 0, Reg::Edx, 26),
        F::SSE3 => (1, 0, Reg::Ecx, 0),
        F::PCLMULQDQ => (1, 0, Reg::Ecx, 1),
        F::SSSE3 => (1, 0, Reg::Ecx, 9),
        F::FMA => (1, 0, Reg::Ecx, 12),
        F::SSE4_1 => (1, 0, Reg::Ecx, 19),
        F::SSE4_2 => (1, 0, Reg::Ecx, 20),
        F::MOVBE => (1, 0, Reg::Ecx, 22),
        F::POPCNT => (1, 0, Reg::Ecx, 23),
        F::AES => (1, 0, Reg::Ecx, 25),
        F::XSAVE => (1, 0, Reg::Ecx, 26),
        F::AVX => (1, 0, Reg::Ecx, 28),
        F::F16C => (1, 0, Reg::Ecx, 29),
        F::RDRAND => (1, 0, Reg::Ecx, 30),
        F::AVX512F => (7, 0, Reg::Ebx, 16),
        F::AVX512DQ => (7, 0, Reg::Ebx, 17),
        F::AVX512CD => (7, 0, Reg::Ebx, 28),
        F::AVX512BW => (7, 0, Reg::Ebx, 30),
        F::AVX512VL => (7, 0, Reg::Ebx, 31),
        F::AVX512_VNNI => (7, 0, Reg::Ecx, 11),
        F::BMI1 => (7, 0, Reg::Ebx, 3),
        F::AVX2 => (7, 0, Reg::Ebx, 5),
        F::BMI2 => (7, 0, Reg::Ebx, 8),
        F::RDSEED => (7, 0, Reg::Ebx, 18),
        F::ADX => (7, 0, Reg::Ebx, 19),
        F::CLFLUSHOPT => (7, 0, Reg::Ebx, 23),
        F::CLWB => (7, 0, Reg::Ebx, 24),
        F::SHA => (7, 0, Reg::Ebx, 29),
        F::GFNI => (7, 0, Reg::Ecx, 8),
        F::VAES => (7, 0, Reg::Ecx, 9),
        F::VPCLMULQDQ => (7, 0, Reg::Ecx, 10),
        F::CLDEMOTE => (7, 0, Reg::Ecx, 25),
        F::SERIALIZE => (7, 0, Reg::Edx, 14),
        F::SHA512 => (7, 1, Reg::Eax, 0),
        F::SM3 => (7, 1, Reg::Eax, 1),
        F::SM4 => (7, 1, Reg::Eax, 2),
        F::AVX_VNNI => (7, 1, Reg::Eax, 4),
        F::AVX_IFMA => (7, 1, Reg::Eax, 23),
        F::AVX_VNNI_INT8 => (7, 1, Reg::Edx, 4),
        F::AVX_NE_CONVERT => (7, 1, Reg::Edx, 5),
        F::AVX_VNNI_INT16 => (7, 1, Reg::Edx, 10),
        F::XSAVEOPT => (0xd, 1, Reg::Eax, 0),
        F::XSAVEC => (0xd, 1, Reg::Eax, 1),
        F::LZCNT => (0x8000_0001, 0, Reg::Ecx, 5),
        F::SSE4A => (0x8000_0001, 0, Reg::Ecx, 6),
        F::PREFETCHW => (0x8000_0001, 0, Reg::Ecx, 8),
        _ => return None,
    })
}

fn bit(leaf: CpuidLeaf, register: Reg, bit: u32) -> bool {
    let value = match register {
        Reg::Eax => leaf.eax,
        Reg::Ebx => leaf.ebx,
        Reg::Ecx => leaf.ecx,
        Reg::Edx => leaf.edx,
    };
    value >> bit & 1 != 0
}

/// Whether the host has a feature. A table that promises more than the host has must not bring the host down.
fn on_host(feature: CpuidFeature) -> bool {
    static HOST: LazyLock<Vec<bool>> = LazyLock::new(|| CpuidFeature::values().map(ask_host).collect());
    HOST.get(feature as usize).is_some_and(|&has| has)
}

fn ask_host(feature: CpuidFeature) -> bool {
    use std::arch::x86_64::__cpuid_count;
    let Some((function, index, register, at)) = announced_by(feature) else { return false };
    let highest = __cpuid_count(function & 0x8000_0000, 0).eax;
    if function > highest || (function == 7 && index > __cpuid_count(7, 0).eax) {
        return false;
    }
    let wide = format!("{feature:?}").starts_with("AVX512");
    if wide && !std::arch::is_x86_feature_detected!("avx512bw") {
        // Not enabled by the kernel, or with opmasks of 16 bits only.
        return false;
    }
    let r = __cpuid_count(function, index);
    bit(CpuidLeaf { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }, register, at)
}

/// Whether a feature's instructions are of those that run on the host's own units.
pub(crate) fn runs_natively(feature: CpuidFeature) -> bool {
    announced_by(feature).is_some()
}

/// Whether an instruction of that kind would run here.
pub(crate) fn runs_here(insn: &Instruction) -> bool {
    insn.cpuid_features().iter().all(|&f| announced_by(f).is_none() || on_host(f))
}

/// Whether the VM's CPUID shows `feature` and the host has it.
pub(super) fn feature(feature: CpuidFeature, cpuid: &CpuidTable) -> bool {
    let Some((function, index, register, at)) = announced_by(feature) else { return false };
    on_host(feature) && cpuid.get(function, index).is_some_and(|leaf| bit(leaf, register, at))
}

/// Whether the instruction is of a kind that may run on the host, given that its features are there: nothing privileged,
/// nothing that transfers control, no stack.
pub(super) fn offered_by_kind(insn: &Instruction) -> bool {
    matches!(insn.code().encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX)
        && insn.flow_control() == FlowControl::Next
        && !insn.is_privileged()
        && !insn.is_stack_instruction()
        && !insn.cpuid_features().is_empty()
        && insn.cpuid_features().iter().all(|&f| announced_by(f).is_some())
}

/// Whether the processor offers the instruction.
pub(super) fn offered(insn: &Instruction, cpuid: &CpuidTable) -> bool {
    offered_by_kind(insn) && insn.cpuid_features().iter().all(|&f| feature(f, cpuid))
}

/// What must be enabled for an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Unit {
    /// Nothing: general registers only.
    General = 0,
    /// Protected mode: VEX-encoded, general registers only.
    GeneralVex = 1,
    /// SSE.
    Sse = 2,
    /// AVX.
    Avx = 3,
    /// x87.
    X87 = 4,
    /// MMX.
    Mmx = 5,
    /// Instructions on MMX and XMM registers.
    MmxSse = 6,
    /// AVX-512.
    Avx512 = 7,
}

impl Unit {
    pub(super) const GENERAL: u8 = Self::General as u8;
    pub(super) const GENERAL_VEX: u8 = Self::GeneralVex as u8;
    pub(super) const SSE: u8 = Self::Sse as u8;
    pub(super) const AVX: u8 = Self::Avx as u8;
    pub(super) const FLOAT: u8 = Self::X87 as u8;
    pub(super) const MMX: u8 = Self::Mmx as u8;
    pub(super) const MMX_SSE: u8 = Self::MmxSse as u8;
    pub(super) const AVX_512: u8 = Self::Avx512 as u8;
}

impl Cpu {
    /// #UD or #NM unless `UNIT` (a [`Unit`]) may be used.
    #[inline(always)]
    pub(super) fn unit<const UNIT: u8>(&mut self) -> Exec {
        match UNIT {
            Unit::GENERAL => Ok(()),
            Unit::GENERAL_VEX => self.vex_mode(),
            Unit::SSE => self.sse(),
            Unit::AVX => self.avx(),
            Unit::FLOAT => self.x87(),
            Unit::MMX => self.mmx(),
            Unit::AVX_512 => self.avx512(),
            _ => self.sse(),
        }
    }

    /// SSE instructions: SDM vol. 3A §13.1.2.
    #[inline(always)]
    pub(super) fn sse(&mut self) -> Exec {
        if self.cr0 & (cr0::EM | cr0::TS) == 0 && self.cr4 & cr4::OSFXSR != 0 {
            return Ok(());
        }
        let undefined = self.cr0 & cr0::EM != 0 || self.cr4 & cr4::OSFXSR == 0;
        Err(self.unavailable(undefined))
    }

    /// AVX instructions: SDM vol. 2A §2.4.
    #[inline(always)]
    pub(super) fn avx(&mut self) -> Exec {
        let enabled = self.cr4 & cr4::OSXSAVE != 0
            && self.xcr0 & (component::SSE | component::AVX) == component::SSE | component::AVX
            && self.mode.protected
            && !self.mode.v86;
        if enabled && self.cr0 & cr0::TS == 0 { Ok(()) } else { Err(self.unavailable(!enabled)) }
    }

    /// EVEX-encoded instructions, and those on opmask registers: SDM vol. 2A §2.7.11.
    #[inline(always)]
    pub(super) fn avx512(&mut self) -> Exec {
        let wanted = component::SSE | component::AVX | component::AVX512;
        let enabled = self.cr4 & cr4::OSXSAVE != 0
            && self.xcr0 & wanted == wanted
            && self.mode.protected
            && !self.mode.v86;
        if enabled && self.cr0 & cr0::TS == 0 { Ok(()) } else { Err(self.unavailable(!enabled)) }
    }

    /// VEX-encoded instructions exist in protected mode only.
    #[inline(always)]
    fn vex_mode(&mut self) -> Exec {
        if self.mode.protected && !self.mode.v86 { Ok(()) } else { Err(self.ud()) }
    }

    /// x87 instructions.
    #[inline(always)]
    pub(super) fn x87(&mut self) -> Exec {
        if self.cr0 & (cr0::EM | cr0::TS) == 0 { Ok(()) } else { Err(self.unavailable(false)) }
    }

    /// MMX instructions.
    #[inline(always)]
    pub(super) fn mmx(&mut self) -> Exec {
        if self.cr0 & (cr0::EM | cr0::TS) == 0 {
            Ok(())
        } else {
            Err(self.unavailable(self.cr0 & cr0::EM != 0))
        }
    }

    /// XSAVE and its family.
    pub(super) fn xsave_enabled(&mut self) -> Exec {
        let enabled = self.cr4 & cr4::OSXSAVE != 0;
        if enabled && self.cr0 & cr0::TS == 0 { Ok(()) } else { Err(self.unavailable(!enabled)) }
    }

    #[cold]
    #[inline(never)]
    fn unavailable(&mut self, undefined: bool) -> Abort {
        self.trap(if undefined { vector::UD } else { vector::NM })
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn kind(bytes: &[u8]) -> bool {
        offered_by_kind(&Decoder::new(64, bytes, DecoderOptions::NONE).decode())
    }

    #[test]
    fn nothing_that_reaches_the_host_system_is_offered() {
        for bytes in [
            &b"\x0f\x05"[..],
            b"\xcd\x80",
            b"\x0f\x34",
            b"\xf4",
            b"\x0f\x31",
            b"\x0f\xa2",
            b"\xc3",
            b"\x50",
            b"\xeb\x00",
            b"\x0f\x01\xc1",
            b"\x0f\xae\xc0",
            b"\xf3\x0f\xae\xf0",
            b"\x0f\x01\xef",
        ] {
            assert!(!kind(bytes), "{bytes:02x?}");
        }
        for bytes in [
            &b"\x0f\x58\xc0"[..],
            b"\xd9\xfe",
            b"\xc5\xfc\x58\xc0",
            b"\xf3\x0f\xb8\xc0",
            b"\x0f\x77",
            b"\x62\xf1\x7c\x48\x58\xc0",
        ] {
            assert!(kind(bytes), "{bytes:02x?}");
        }
    }

    #[test]
    fn hidden_features_are_not_offered() {
        let sse = Decoder::new(64, b"\x0f\x58\xc0", DecoderOptions::NONE).decode();
        let mut cpuid = CpuidTable::default();
        assert!(!offered(&sse, &cpuid));
        cpuid.set(1, 0, CpuidLeaf { edx: 1 << 25, ..CpuidLeaf::default() });
        assert!(offered(&sse, &cpuid));
    }
}
