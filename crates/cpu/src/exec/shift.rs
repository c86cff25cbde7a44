//! Shifts, rotates and double shifts.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::Addressing;
use super::{Form, Shape, addressed, sized, wide};
use crate::alu::{AluWord, WideWord, st};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::at;

trait Shift {
    fn apply<T: AluWord>(a: T, count: u8, status: &mut u16) -> T;
    /// A register by an immediate count.
    #[inline(always)]
    fn immediate<T: AluWord>(a: T, count: u8, status: &mut u16) -> T {
        Self::apply(a, count, status)
    }
}

macro_rules! shift {
    ($($name:ident $op:ident;)*) => {$(
        struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<T: AluWord>(a: T, count: u8, status: &mut u16) -> T {
                T::$op(a, count, status)
            }
        }
    )*};
}
shift! { Shl shl; Shr shr; Sar sar; Rcl rcl; Rcr rcr; }

/// Rotates of a register by an immediate leave OF alone where it is undefined (counts other than 1); others do not.
macro_rules! rotate {
    ($name:ident $op:ident) => {
        struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<T: AluWord>(a: T, count: u8, status: &mut u16) -> T {
                T::$op(a, count, status)
            }
            #[inline(always)]
            fn immediate<T: AluWord>(a: T, count: u8, status: &mut u16) -> T {
                let before = *status;
                let result = T::$op(a, count, status);
                if count & if T::BITS == 64 { 63 } else { 31 } != 1 {
                    *status = *status & !st::OF | before & st::OF;
                }
                result
            }
        }
    };
}
rotate!(Rol rol);
rotate!(Ror ror);

trait Double {
    fn apply<T: WideWord>(a: T, b: T, count: u8, status: &mut u16) -> T;
}
struct Shld;
impl Double for Shld {
    #[inline(always)]
    fn apply<T: WideWord>(a: T, b: T, count: u8, status: &mut u16) -> T {
        T::shld(a, b, count, status)
    }
}
struct Shrd;
impl Double for Shrd {
    #[inline(always)]
    fn apply<T: WideWord>(a: T, b: T, count: u8, status: &mut u16) -> T {
        T::shrd(a, b, count, status)
    }
}

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => single::<Shl>(insn, op, form),
        Mnemonic::Shr => single::<Shr>(insn, op, form),
        Mnemonic::Sar => single::<Sar>(insn, op, form),
        Mnemonic::Rol => single::<Rol>(insn, op, form),
        Mnemonic::Ror => single::<Ror>(insn, op, form),
        Mnemonic::Rcl => single::<Rcl>(insn, op, form),
        Mnemonic::Rcr => single::<Rcr>(insn, op, form),
        Mnemonic::Shld => double::<Shld>(insn, op, form),
        Mnemonic::Shrd => double::<Shrd>(insn, op, form),
        _ => return None,
    })
}

fn single<O: Shift>(insn: &Instruction, op: &mut Op, form: Form) -> Handler {
    let by_cl = insn.op_kind(1) == OpKind::Register;
    if !by_cl {
        op.imm = insn.immediate(1) & 0xff;
    }
    let memory = matches!(form.shape, Shape::M | Shape::MR | Shape::MI);
    match (memory, by_cl) {
        (false, false) => sized!(form.size, r_imm[O][]),
        (false, true) => sized!(form.size, r_cl[O][]),
        (true, false) => addressed!(form.flat, sized, form.size, m_imm[O]),
        (true, true) => addressed!(form.flat, sized, form.size, m_cl[O]),
    }
}

fn r_imm<O: Shift, T: AluWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.regs.get::<T>(op.dst);
    let result = O::immediate(a, op.imm as u8, &mut cpu.status);
    cpu.regs.set(op.dst, result);
    Ok(())
}

fn r_cl<O: Shift, T: AluWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let count = cpu.regs.get::<u8>(at::RCX);
    let a = cpu.regs.get::<T>(op.dst);
    let result = O::apply(a, count, &mut cpu.status);
    cpu.regs.set(op.dst, result);
    Ok(())
}

fn m_imm<O: Shift, T: AluWord + MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Write)?;
    let count = op.imm as u8;
    cpu.modify(linear, false, |a: T, s| O::apply(a, count, s))?;
    Ok(())
}

fn m_cl<O: Shift, T: AluWord + MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let count = cpu.regs.get::<u8>(at::RCX);
    let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Write)?;
    cpu.modify(linear, false, |a: T, s| O::apply(a, count, s))?;
    Ok(())
}

fn double<O: Double>(insn: &Instruction, op: &mut Op, form: Form) -> Handler {
    let by_cl = insn.op_kind(2) == OpKind::Register;
    if !by_cl {
        op.imm = insn.immediate(2) & 0xff;
    }
    match (form.shape == Shape::RR, by_cl) {
        (true, false) => wide!(form.size, double_r[O][Immediate]),
        (true, true) => wide!(form.size, double_r[O][Cl]),
        (false, false) => wide!(form.size, double_m[O][Immediate]),
        (false, true) => wide!(form.size, double_m[O][Cl]),
    }
}

/// Where a count comes from.
trait Count {
    fn count(cpu: &Cpu, op: &Op) -> u8;
}
struct Immediate;
impl Count for Immediate {
    fn count(_: &Cpu, op: &Op) -> u8 {
        op.imm as u8
    }
}
struct Cl;
impl Count for Cl {
    fn count(cpu: &Cpu, _: &Op) -> u8 {
        cpu.regs.get::<u8>(at::RCX)
    }
}

fn double_r<O: Double, T: WideWord, C: Count>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b, count) = (cpu.regs.get::<T>(op.dst), cpu.regs.get::<T>(op.src), C::count(cpu, op));
    let result = O::apply(a, b, count, &mut cpu.status);
    cpu.regs.set(op.dst, result);
    Ok(())
}

fn double_m<O: Double, T: WideWord + MemWord, C: Count>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, size_of::<T>() as u64, Access::Write)?;
    let (b, count) = (cpu.regs.get::<T>(op.src), C::count(cpu, op));
    cpu.modify(linear, false, |a: T, s| O::apply(a, b, count, s))?;
    Ok(())
}
