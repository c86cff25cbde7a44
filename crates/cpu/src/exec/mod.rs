//! The integer instruction set, a module for each family. Each has a `select` that looks an instruction up in its table
//! and answers with the handler that executes it.

pub(crate) mod address;
mod arith;
mod atomic;
mod bits;
mod branch;
mod decimal;
mod moves;
mod muldiv;
mod shift;
mod stack;
mod string;

use iced_x86::{Instruction, OpKind};

use crate::cpu::CodeSize;
use crate::op::{Handler, Op};

/// The handler of an integer instruction, or `None` if it is none of this module's.
pub(crate) fn select(insn: &Instruction, op: &mut Op, code: CodeSize) -> Option<Handler> {
    let form = Form::of(insn, op, code);
    arith::select(insn, op, form)
        .or_else(|| moves::select(insn, op, form))
        .or_else(|| branch::select(insn, op, form))
        .or_else(|| stack::select(insn, op, form))
        .or_else(|| shift::select(insn, op, form))
        .or_else(|| bits::select(insn, op, form))
        .or_else(|| muldiv::select(insn, op, form))
        .or_else(|| atomic::select(insn, op, form))
        .or_else(|| string::select(insn, op, form))
        .or_else(|| decimal::select(insn, op, form))
}

/// What the first operands are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// None, or immediates only.
    Plain,
    /// Register.
    R,
    /// Memory.
    M,
    /// Register, register.
    RR,
    /// Register, immediate.
    RI,
    /// Register, memory.
    RM,
    /// Memory, register.
    MR,
    /// Memory, immediate.
    MI,
}

/// An instruction's form: what selects between the variants of a handler.
#[derive(Debug, Clone, Copy)]
struct Form {
    shape: Shape,
    /// Operand size in bytes: that of the first operand.
    size: usize,
    /// The memory operand needs no segment and no masking: 64-bit mode, 64-bit addresses, not FS or GS.
    flat: bool,
    code: CodeSize,
}

impl Form {
    fn of(insn: &Instruction, op: &Op, code: CodeSize) -> Self {
        let kind = |i: u32| match (i < insn.op_count()).then(|| insn.op_kind(i)) {
            Some(OpKind::Register) => 'r',
            Some(OpKind::Memory) => 'm',
            Some(
                OpKind::Immediate8
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64,
            ) => 'i',
            _ => '-',
        };
        let shape = match (kind(0), kind(1)) {
            ('r', 'r') => Shape::RR,
            ('r', 'i') => Shape::RI,
            ('r', 'm') => Shape::RM,
            ('m', 'r') => Shape::MR,
            ('m', 'i') => Shape::MI,
            ('r', _) => Shape::R,
            ('m', _) => Shape::M,
            _ => Shape::Plain,
        };
        let size = match kind(0) {
            'r' => insn.op_register(0).size(),
            'm' => insn.memory_size().size(),
            _ => 0,
        };
        let flat = code == CodeSize::Bits64
            && !op.has(Op::A32)
            && op.seg != crate::cpu::seg::FS as u8
            && op.seg != crate::cpu::seg::GS as u8;
        Self { shape, size, flat, code }
    }
}

/// `f::<pre.., T, post..>` for the operand size.
macro_rules! sized {
    ($size:expr, $f:ident [$($pre:ty),*] [$($post:ty),*]) => {
        match $size {
            1 => $f::<$($pre,)* u8 $(, $post)*> as crate::op::Handler,
            2 => $f::<$($pre,)* u16 $(, $post)*>,
            4 => $f::<$($pre,)* u32 $(, $post)*>,
            _ => $f::<$($pre,)* u64 $(, $post)*>,
        }
    };
}
/// As `sized`, for instructions that have no 8-bit form.
macro_rules! wide {
    ($size:expr, $f:ident [$($pre:ty),*] [$($post:ty),*]) => {
        match $size {
            2 => $f::<$($pre,)* u16 $(, $post)*> as crate::op::Handler,
            4 => $f::<$($pre,)* u32 $(, $post)*>,
            _ => $f::<$($pre,)* u64 $(, $post)*>,
        }
    };
}
/// `sized` or `wide` for a handler with a memory operand: flat or general addressing.
macro_rules! addressed {
    ($flat:expr, $which:ident, $size:expr, $f:ident [$($pre:ty),*]) => {
        if $flat {
            crate::exec::$which!($size, $f [$($pre),*] [crate::exec::address::Flat])
        } else {
            crate::exec::$which!($size, $f [$($pre),*] [crate::exec::address::General])
        }
    };
}
/// A handler for one of the sixteen conditions.
macro_rules! conditional {
    ($cc:expr, $f:ident [$($g:ty),*]) => {
        match $cc {
            0 => $f::<0 $(, $g)*> as crate::op::Handler,
            1 => $f::<1 $(, $g)*>,
            2 => $f::<2 $(, $g)*>,
            3 => $f::<3 $(, $g)*>,
            4 => $f::<4 $(, $g)*>,
            5 => $f::<5 $(, $g)*>,
            6 => $f::<6 $(, $g)*>,
            7 => $f::<7 $(, $g)*>,
            8 => $f::<8 $(, $g)*>,
            9 => $f::<9 $(, $g)*>,
            10 => $f::<10 $(, $g)*>,
            11 => $f::<11 $(, $g)*>,
            12 => $f::<12 $(, $g)*>,
            13 => $f::<13 $(, $g)*>,
            14 => $f::<14 $(, $g)*>,
            _ => $f::<15 $(, $g)*>,
        }
    };
}
use {addressed, conditional, sized, wide};
