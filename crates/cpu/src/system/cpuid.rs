//! CPUID, and the instructions that go with it: XGETBV, XSETBV.

use iced_x86::{Instruction, Mnemonic};
use skep_hv::cpuid::Processor;

use crate::cpu::{Cpu, cr4};
use crate::fault::Exec;
use crate::native::component;
use crate::op::{Handler, Op};
use crate::regs::at;

pub(crate) use skep_hv::cpuid::ARCH_CAPABILITIES;

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Cpuid => cpuid,
        Mnemonic::Xgetbv => xgetbv,
        Mnemonic::Xsetbv => xsetbv,
        _ => return None,
    })
}

fn cpuid(cpu: &mut Cpu, _: &Op) -> Exec {
    let (function, index) = (cpu.regs.get::<u32>(at::RAX), cpu.regs.get::<u32>(at::RCX));
    let processor = Processor { apic_id: cpu.id, osxsave: cpu.cr4 & cr4::OSXSAVE != 0, xcr0: cpu.xcr0 };
    let leaf = cpu.msrs.model.cpuid.lookup(function, index, &processor);
    cpu.regs.set(at::RAX, leaf.eax);
    cpu.regs.set(at::RBX, leaf.ebx);
    cpu.regs.set(at::RCX, leaf.ecx);
    cpu.regs.set(at::RDX, leaf.edx);
    Ok(())
}

/// XCR0, or with ECX = 1 XCR0 & XINUSE (SDM vol. 1 §13.2).
fn xgetbv(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    let xgetbv1 = cpu.msrs.model.cpuid.get(0xd, 1).is_some_and(|leaf| leaf.eax & 4 != 0);
    let value = match cpu.regs.get::<u32>(at::RCX) {
        0 => cpu.xcr0,
        1 if xgetbv1 => cpu.fpu.xinuse(cpu.xcr0),
        _ => return Err(cpu.gp(0)),
    };
    cpu.set_edx_eax(value);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    cpu.supervisor()?;
    let value = cpu.edx_eax();
    if cpu.regs.get::<u32>(at::RCX) != 0 || !xcr0_valid(value, cpu.msrs.model.xcr0) {
        return Err(cpu.gp(0));
    }
    cpu.xcr0 = value;
    Ok(())
}

/// SDM vol. 1 §13.3: x87 always; AVX needs SSE; AVX-512 needs AVX, and comes whole or not at all.
pub(crate) fn xcr0_valid(value: u64, supported: u64) -> bool {
    let wide = value & component::AVX512;
    value & component::X87 != 0
        && value & !supported == 0
        && (value & component::AVX == 0 || value & component::SSE != 0)
        && (wide == 0 || wide == component::AVX512 && value & component::AVX != 0)
}
