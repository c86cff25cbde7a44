//! MXCSR, VZEROUPPER, fences, cache control and hints.

use std::sync::atomic::{Ordering, fence};

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
        // Hints, on every processor, if only as the no-operations that they once were.
        M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2 => {
            return Some(nothing);
        }
        M::Prefetchit0 | M::Prefetchit1 | M::Prefetchreservednop_m8 | M::Cldemote => return Some(nothing),
        M::Bndcl | M::Bndcn | M::Bndcu | M::Bndldx | M::Bndmk | M::Bndmov | M::Bndstx => {
            return Some(nothing);
        }
        M::Pause => return Some(pause),
        M::Ldmxcsr => load_mxcsr::<false>,
        M::Vldmxcsr => load_mxcsr::<true>,
        M::Stmxcsr => store_mxcsr::<false>,
        M::Vstmxcsr => store_mxcsr::<true>,
        M::Vzeroupper => zero::<2>,
        M::Vzeroall => zero::<0>,
        M::Lfence | M::Sfence | M::Mfence | M::Serialize => order,
        M::Clflush | M::Clflushopt | M::Clwb => flush_line,
        _ => return None,
    };
    gate::offered(insn, cpuid).then_some(handler)
}

fn nothing(_: &mut Cpu, _: &Op) -> Exec {
    Ok(())
}

fn pause(_: &mut Cpu, _: &Op) -> Exec {
    std::hint::spin_loop();
    Ok(())
}

fn order(_: &mut Cpu, _: &Op) -> Exec {
    fence(Ordering::SeqCst);
    Ok(())
}

/// Faults as a byte read does; caches are the host's affair.
fn flush_line(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, 1, Access::Read)?;
    cpu.probe(linear, 1, Access::Read)
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
