//! x87, MMX, SSE, AVX and the rarer integer instructions, on the host's own units.
//!
//! No vector semantics are ours: an instruction is re-encoded ([`encode`]) with its memory operand redirected to a buffer,
//! wrapped into a function that loads the guest's registers before and stores them after ([`thunk`]), and called. What
//! is ours is all round it: whether the instruction is there and enabled ([`gate`]), how its operand comes from and goes
//! to guest memory ([`operand`], [`plain`]), exceptions, and the few instructions whose effect is to move state ([`x87`],
//! [`xsave`], [`masked`], [`opmask`], [`moves`], [`control`]).

mod area;
mod arena;
mod control;
mod encode;
mod fpu;
mod gate;
mod masked;
mod moves;
mod operand;
mod opmask;
mod plain;
#[cfg(test)]
mod tests;
mod thunk;
mod x87;
mod xsave;

use iced_x86::Instruction;
use skep_hv::cpuid::CpuidTable;

pub(crate) use fpu::{FCW_MASKS, Fpu, FrameLayout, component};
pub(crate) use gate::{runs_here, runs_natively};
pub(crate) use plain::direct;
pub(crate) use thunk::Thunks;
pub(crate) use x87::X87;

use crate::cpu::CodeSize;
use crate::op::{Handler, Op};

/// The handler of an instruction of this room, or `None`: the processor does not have it. `bytes` are the instruction's.
pub(crate) fn select(
    insn: &Instruction,
    bytes: &[u8],
    op: &mut Op,
    code: CodeSize,
    thunks: &mut Thunks,
    cpuid: &CpuidTable,
) -> Option<Handler> {
    control::select(insn, cpuid)
        .or_else(|| x87::select(insn, op, cpuid))
        .or_else(|| xsave::select(insn, op, cpuid))
        .or_else(|| masked::select(insn, op, cpuid))
        .or_else(|| opmask::select(insn, op, cpuid))
        .or_else(|| plain::select(insn, bytes, op, code, thunks, cpuid))
}
