//! Whole-register moves between vector registers and memory: the most frequent vector instructions have no semantics to
//! borrow, so they run without a thunk. Non-temporal stores are stores (their hint means nothing to the frame of a thunk).

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};

use super::gate::Unit;
use super::plain::{must_be_aligned, vector_number};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::Word;

/// The handler of a whole-register move. The register's number goes to [`Op::dst`], the size of the operand to
/// [`Op::imm`].
pub(super) fn select(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic as M;
    let vex = match insn.code().encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX => true,
        _ => return None,
    };
    match insn.mnemonic() {
        M::Movnti => return store_general(insn, op),
        M::Movaps | M::Movups | M::Movapd | M::Movupd | M::Movdqa | M::Movdqu | M::Lddqu | M::Movntdqa => {}
        M::Vmovaps
        | M::Vmovups
        | M::Vmovapd
        | M::Vmovupd
        | M::Vmovdqa
        | M::Vmovdqu
        | M::Vlddqu
        | M::Vmovntdqa => {}
        M::Movntps | M::Movntpd | M::Movntdq | M::Vmovntps | M::Vmovntpd | M::Vmovntdq => {}
        _ => return None,
    }
    let aligned = must_be_aligned(insn);
    match (insn.op_kind(0), insn.op_kind(1)) {
        (OpKind::Register, OpKind::Memory) => {
            op.dst = vector_number(insn.op0_register())?;
            op.imm = insn.memory_size().size() as u64;
            Some(match (vex, op.imm, aligned) {
                (false, 16, true) => load::<{ Unit::SSE }, 16, true>,
                (false, 16, false) => load::<{ Unit::SSE }, 16, false>,
                (true, 16, true) => load::<{ Unit::AVX }, 16, true>,
                (true, 16, false) => load::<{ Unit::AVX }, 16, false>,
                (true, 32, true) => load::<{ Unit::AVX }, 32, true>,
                (true, 32, false) => load::<{ Unit::AVX }, 32, false>,
                _ => return None,
            })
        }
        (OpKind::Memory, OpKind::Register) => {
            op.dst = vector_number(insn.op1_register())?;
            op.imm = insn.memory_size().size() as u64;
            Some(match (vex, op.imm, aligned) {
                (false, 16, true) => store::<{ Unit::SSE }, 16, true>,
                (false, 16, false) => store::<{ Unit::SSE }, 16, false>,
                (true, 16, true) => store::<{ Unit::AVX }, 16, true>,
                (true, 16, false) => store::<{ Unit::AVX }, 16, false>,
                (true, 32, true) => store::<{ Unit::AVX }, 32, true>,
                (true, 32, false) => store::<{ Unit::AVX }, 32, false>,
                _ => return None,
            })
        }
        (OpKind::Register, OpKind::Register) => {
            op.dst = vector_number(insn.op0_register())?;
            op.src = vector_number(insn.op1_register())?;
            Some(match (vex, insn.op0_register().size()) {
                (false, 16) => copy::<{ Unit::SSE }, 16>,
                (true, 16) => copy::<{ Unit::AVX }, 16>,
                (true, 32) => copy::<{ Unit::AVX }, 32>,
                _ => return None,
            })
        }
        _ => None,
    }
}

fn load<const UNIT: u8, const SIZE: u64, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.unit::<UNIT>()?;
    let linear = cpu.operand(op, SIZE, ALIGNED, Access::Read)?;
    let n = op.dst as usize & 31;
    cpu.load_vector(n, linear, SIZE)?;
    if UNIT == Unit::AVX {
        cpu.fpu.frame.vector[n][SIZE as usize / 8..].fill(0);
    }
    Ok(())
}

fn store<const UNIT: u8, const SIZE: u64, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.unit::<UNIT>()?;
    let linear = cpu.operand(op, SIZE, ALIGNED, Access::Write)?;
    cpu.store_vector(op.dst as usize, linear, SIZE)
}

fn copy<const UNIT: u8, const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.unit::<UNIT>()?;
    let vector = &mut cpu.fpu.frame.vector;
    let from = vector[op.src as usize & 31];
    let to = &mut vector[op.dst as usize & 31];
    to[..SIZE / 8].copy_from_slice(&from[..SIZE / 8]);
    if UNIT == Unit::AVX {
        to[SIZE / 8..].fill(0);
    }
    Ok(())
}

/// MOVNTI.
fn store_general(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    op.src = (insn.op1_register().full_register().number() * 8) as u8;
    Some(if insn.op1_register().size() == 8 { movnti::<u64> } else { movnti::<u32> })
}

fn movnti<T: Word + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, size_of::<T>() as u64, Access::Write)?;
    let value = cpu.regs.get::<T>(op.src);
    cpu.write(linear, value)
}
