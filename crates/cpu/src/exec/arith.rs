//! ADD to CMP, TEST, INC, DEC, NEG, NOT, and the flag instructions.

use iced_x86::{Instruction, Mnemonic};

use super::address::Addressing;
use super::{Form, Shape, addressed, sized};
use crate::alu::{AluWord, st};
use crate::cpu::{Cpu, fl};
use crate::fault::Exec;
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::at;

/// An operation on two operands.
trait Binary {
    /// False for those that set flags only.
    const WRITES: bool;
    fn apply<T: AluWord>(a: T, b: T, status: &mut u16) -> T;
}

/// An operation on one operand.
trait Unary {
    fn apply<T: AluWord>(a: T, status: &mut u16) -> T;
}

macro_rules! binary {
    ($($name:ident $op:ident $writes:literal;)*) => {$(
        struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<T: AluWord>(a: T, b: T, status: &mut u16) -> T {
                T::$op(a, b, status)
            }
        }
    )*};
}
binary! {
    Add add true;
    Adc adc true;
    Sub sub true;
    Sbb sbb true;
    And and true;
    Or or true;
    Xor xor true;
    Cmp sub false;
    Test and false;
}

macro_rules! unary {
    ($($name:ident $body:expr;)*) => {$(
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<T: AluWord>(a: T, status: &mut u16) -> T {
                let f: fn(T, &mut u16) -> T = $body;
                f(a, status)
            }
        }
    )*};
}
unary! {
    Inc T::inc;
    Dec T::dec;
    Neg T::neg;
    Not |a, _| T::of(!a.to_u64());
}

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Add => two::<Add>(form)?,
        Mnemonic::Adc => two::<Adc>(form)?,
        Mnemonic::Sub => two::<Sub>(form)?,
        Mnemonic::Sbb => two::<Sbb>(form)?,
        Mnemonic::And => two::<And>(form)?,
        Mnemonic::Or => two::<Or>(form)?,
        Mnemonic::Xor => two::<Xor>(form)?,
        Mnemonic::Cmp => two::<Cmp>(form)?,
        Mnemonic::Test => two::<Test>(form)?,
        Mnemonic::Inc => one::<Inc>(form)?,
        Mnemonic::Dec => one::<Dec>(form)?,
        Mnemonic::Neg => one::<Neg>(form)?,
        Mnemonic::Not => one::<Not>(form)?,
        Mnemonic::Clc => |cpu, _| status(cpu, |s| s & !st::CF),
        Mnemonic::Stc => |cpu, _| status(cpu, |s| s | st::CF),
        Mnemonic::Cmc => |cpu, _| status(cpu, |s| s ^ st::CF),
        Mnemonic::Cld => |cpu, _| {
            cpu.rflags_rest &= !fl::DF;
            Ok(())
        },
        Mnemonic::Std => |cpu, _| {
            cpu.rflags_rest |= fl::DF;
            Ok(())
        },
        Mnemonic::Lahf => |cpu, _| {
            let flags = (cpu.status >> 8) as u8;
            cpu.regs.set(at::AH, flags);
            Ok(())
        },
        Mnemonic::Sahf => |cpu, _| {
            let flags = u16::from(cpu.regs.get::<u8>(at::AH)) & 0xd5 | 2;
            status(cpu, |s| flags << 8 | s & st::OF)
        },
        Mnemonic::Salc => |cpu, _| {
            let carry = cpu.status & st::CF != 0;
            cpu.regs.set(at::RAX, if carry { 0xffu8 } else { 0 });
            Ok(())
        },
        _ => {
            let _ = op;
            return None;
        }
    })
}

fn status(cpu: &mut Cpu, f: impl FnOnce(u16) -> u16) -> Exec {
    cpu.status = f(cpu.status);
    Ok(())
}

fn two<O: Binary>(form: Form) -> Option<Handler> {
    Some(match form.shape {
        Shape::RR => sized!(form.size, rr[O][]),
        Shape::RI => sized!(form.size, ri[O][]),
        Shape::RM => addressed!(form.flat, sized, form.size, rm[O]),
        Shape::MR => addressed!(form.flat, sized, form.size, mr[O]),
        Shape::MI => addressed!(form.flat, sized, form.size, mi[O]),
        _ => return None,
    })
}

fn one<O: Unary>(form: Form) -> Option<Handler> {
    Some(match form.shape {
        Shape::R => sized!(form.size, r[O][]),
        Shape::M => addressed!(form.flat, sized, form.size, m[O]),
        _ => return None,
    })
}

fn rr<O: Binary, T: AluWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.regs.get::<T>(op.dst), cpu.regs.get::<T>(op.src));
    put::<O, T>(cpu, op, a, b)
}

fn ri<O: Binary, T: AluWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.regs.get::<T>(op.dst);
    put::<O, T>(cpu, op, a, T::of(op.imm))
}

fn rm<O: Binary, T: AluWord + MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Read)?;
    let b = cpu.read::<T>(linear)?;
    let a = cpu.regs.get::<T>(op.dst);
    put::<O, T>(cpu, op, a, b)
}

#[inline(always)]
fn put<O: Binary, T: AluWord>(cpu: &mut Cpu, op: &Op, a: T, b: T) -> Exec {
    let result = O::apply(a, b, &mut cpu.status);
    if O::WRITES {
        cpu.regs.set(op.dst, result);
    }
    Ok(())
}

fn mr<O: Binary, T: AluWord + MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.regs.get::<T>(op.src);
    to_memory::<O, T, A>(cpu, op, b)
}

fn mi<O: Binary, T: AluWord + MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    to_memory::<O, T, A>(cpu, op, T::of(op.imm))
}

#[inline(always)]
fn to_memory<O: Binary, T: AluWord + MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op, b: T) -> Exec {
    if O::WRITES {
        let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Write)?;
        cpu.modify(linear, op.has(Op::LOCK), |a, s| O::apply(a, b, s))?;
    } else {
        let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Read)?;
        let a = cpu.read::<T>(linear)?;
        O::apply(a, b, &mut cpu.status);
    }
    Ok(())
}

fn r<O: Unary, T: AluWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.regs.get::<T>(op.dst);
    let result = O::apply(a, &mut cpu.status);
    cpu.regs.set(op.dst, result);
    Ok(())
}

fn m<O: Unary, T: AluWord + MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Write)?;
    cpu.modify(linear, op.has(Op::LOCK), |a: T, s| O::apply(a, s))?;
    Ok(())
}
