//! MXCSR, VZEROUPPER, and hints that are no-operations.

use iced_x86::{Instruction, Mnemonic};
use skep_hv::cpuid::CpuidTable;

use super::fpu::MXCSR_MASK;
use super::gate;
use crate::cpu::{CodeSize, Cpu};
use crate::fault::Exec;
use crate::mmu::Access;
use crate::op::{Handler, Op};

/// Handlers of this module's instructions.
pub(super) fn select(insn: &Instruction, cpuid: &CpuidTable) -> Option<Handler> {
    use Mnemonic as M;
    let handler: Handler = match insn.mnemonic() {
        // Memory protection extensions are the no-operations that their encodings were before.
        M::Cldemote
        | M::Bndcl
        | M::Bndcn
        | M::Bndcu
        | M::Bndldx
        | M::Bndmk
        | M::Bndmov
        | M::Bndstx
        | M::Reservednop => {
            return Some(nothing);
        }
        M::Ldmxcsr => load_mxcsr::<false>,
        M::Vldmxcsr => load_mxcsr::<true>,
        M::Stmxcsr => store_mxcsr::<false>,
        M::Vstmxcsr => store_mxcsr::<true>,
        M::Vzeroupper => zero::<2>,
        M::Vzeroall => zero::<0>,
        _ => return None,
    };
    gate::offered(insn, cpuid).then_some(handler)
}

fn nothing(_: &mut Cpu, _: &Op) -> Exec {
    Ok(())
}

fn load_mxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if VEX {
        cpu.avx()?
    } else {
        cpu.sse()?
    }
    let linear = cpu.linear(op, 4, Access::Read)?;
    let value: u32 = cpu.read(linear)?;
    if value & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.fpu.frame.mxcsr = value;
    Ok(())
}

fn store_mxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if VEX {
        cpu.avx()?
    } else {
        cpu.sse()?
    }
    let linear = cpu.linear(op, 4, Access::Write)?;
    let value = cpu.fpu.frame.mxcsr;
    cpu.write(linear, value)
}

/// VZEROUPPER (from quadword 2) and VZEROALL (from 0).
fn zero<const FROM: usize>(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.avx()?;
    let count = if cpu.mode.code == CodeSize::Bits64 { 16 } else { 8 };
    for register in &mut cpu.fpu.frame.vector[..count] {
        register[FROM..].fill(0);
    }
    Ok(())
}
