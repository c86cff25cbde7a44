//! Multiplication and division.
#![expect(unsafe_code, reason = "DIV and IDIV with their flags, after the quotient is known to fit")]

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic};

use super::address::Addressing;
use super::{Form, Shape, addressed, sized, wide};
use crate::alu::{AluWord, WideWord};
use crate::cpu::Cpu;
use crate::fault::{Exec, vector};
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::{Word, at};

trait Operation {
    fn apply<T: AluWord + DivWord>(cpu: &mut Cpu, b: T) -> Exec;
}
struct Mul;
struct Imul;
struct Div;
struct Idiv;

impl Operation for Mul {
    #[inline(always)]
    fn apply<T: AluWord + DivWord>(cpu: &mut Cpu, b: T) -> Exec {
        let a = cpu.regs.get::<T>(at::RAX);
        let product = T::mul(a, b, &mut cpu.status);
        set_pair(cpu, product);
        Ok(())
    }
}
impl Operation for Imul {
    #[inline(always)]
    fn apply<T: AluWord + DivWord>(cpu: &mut Cpu, b: T) -> Exec {
        let a = cpu.regs.get::<T>(at::RAX);
        let product = T::imul_wide(a, b, &mut cpu.status);
        set_pair(cpu, product);
        Ok(())
    }
}
impl Operation for Div {
    #[inline(always)]
    fn apply<T: AluWord + DivWord>(cpu: &mut Cpu, b: T) -> Exec {
        let (low, high) = pair::<T>(cpu);
        // The quotient fits if and only if the upper half is below the divisor.
        if high >= b {
            return Err(cpu.trap(vector::DE));
        }
        let result = T::div(low, high, b, &mut cpu.status);
        set_pair(cpu, result);
        Ok(())
    }
}
impl Operation for Idiv {
    #[inline(always)]
    fn apply<T: AluWord + DivWord>(cpu: &mut Cpu, b: T) -> Exec {
        let (low, high) = pair::<T>(cpu);
        if !T::signed_quotient_fits(low, high, b) {
            return Err(cpu.trap(vector::DE));
        }
        let result = T::idiv(low, high, b, &mut cpu.status);
        set_pair(cpu, result);
        Ok(())
    }
}

/// The double-width accumulator: AX, DX:AX, EDX:EAX, RDX:RAX.
fn pair<T: Word>(cpu: &Cpu) -> (T, T) {
    let high = if T::BITS == 8 { at::AH } else { at::RDX };
    (cpu.regs.get(at::RAX), cpu.regs.get(high))
}

fn set_pair<T: Word>(cpu: &mut Cpu, (low, high): (T, T)) {
    cpu.regs.set(at::RAX, low);
    cpu.regs.set(if T::BITS == 8 { at::AH } else { at::RDX }, high);
}

/// Division by width; the caller has made sure that the quotient fits.
trait DivWord: Word {
    fn div(low: Self, high: Self, by: Self, status: &mut u16) -> (Self, Self);
    fn idiv(low: Self, high: Self, by: Self, status: &mut u16) -> (Self, Self);
    fn signed_quotient_fits(low: Self, high: Self, by: Self) -> bool {
        if by == Self::default() {
            return false;
        }
        let dividend = i128::from(high.to_i64()) << Self::BITS | i128::from(low.to_u64());
        let by = i128::from(by.to_i64());
        // The common case, a sign-extended dividend, needs no long division.
        if high.to_i64() == low.to_i64() >> 63 && by != -1 {
            return true;
        }
        let limit = 1i128 << (Self::BITS - 1);
        dividend.checked_div(by).is_some_and(|q| q >= -limit && q < limit)
    }
}

macro_rules! divide {
    ($t:ty, $m:literal) => {
        impl DivWord for $t {
            divide!($t, div, concat!("div {b", $m, "}"));
            divide!($t, idiv, concat!("idiv {b", $m, "}"));
        }
    };
    ($t:ty, $name:ident, $text:expr) => {
        #[inline(always)]
        fn $name(low: $t, high: $t, by: $t, status: &mut u16) -> ($t, $t) {
            let (quotient, remainder, flags): (u64, u64, u64);
            // SAFETY: register arithmetic only; the caller made sure that it does not fault.
            unsafe {
                asm!("add al, 127", "sahf", "mov rax, {f}", $text, "mov {f}, rax", "lahf", "seto al",
                    b = in(reg) by, f = inout(reg) low as u64 => quotient, inout("rax") u64::from(*status) => flags,
                    inout("rdx") high as u64 => remainder, options(nomem, nostack, pure));
            }
            *status = flags as u16;
            (quotient as $t, remainder as $t)
        }
    };
}
divide!(u16, ":x");
divide!(u32, ":e");
divide!(u64, ":r");

impl DivWord for u8 {
    fn div(low: u8, high: u8, by: u8, status: &mut u16) -> (u8, u8) {
        byte_divide(low, high, by, status, false)
    }
    fn idiv(low: u8, high: u8, by: u8, status: &mut u16) -> (u8, u8) {
        byte_divide(low, high, by, status, true)
    }
}

fn byte_divide(low: u8, high: u8, by: u8, status: &mut u16, signed: bool) -> (u8, u8) {
    let dividend = u64::from(u16::from(high) << 8 | u16::from(low));
    let (result, flags): (u64, u64);
    // SAFETY: register arithmetic only; the caller made sure that it does not fault.
    unsafe {
        if signed {
            asm!("add al, 127", "sahf", "mov rax, {f}", "idiv {b}", "mov {f}, rax", "lahf", "seto al",
                b = in(reg_byte) by, f = inout(reg) dividend => result, inout("rax") u64::from(*status) => flags,
                options(nomem, nostack, pure));
        } else {
            asm!("add al, 127", "sahf", "mov rax, {f}", "div {b}", "mov {f}, rax", "lahf", "seto al",
                b = in(reg_byte) by, f = inout(reg) dividend => result, inout("rax") u64::from(*status) => flags,
                options(nomem, nostack, pure));
        }
    }
    *status = flags as u16;
    (result as u8, (result >> 8) as u8)
}

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Mul => one::<Mul>(form),
        Mnemonic::Div => one::<Div>(form),
        Mnemonic::Idiv => one::<Idiv>(form),
        Mnemonic::Imul if insn.op_count() == 1 => one::<Imul>(form),
        Mnemonic::Imul if insn.op_count() == 3 => {
            op.imm = insn.immediate(2);
            if form.shape == Shape::RR {
                wide!(form.size, imul_rri[][])
            } else {
                wide!(form.size, imul_rmi[][])
            }
        }
        Mnemonic::Imul => {
            if form.shape == Shape::RR {
                wide!(form.size, imul_rr[][])
            } else {
                wide!(form.size, imul_rm[][])
            }
        }
        _ => return None,
    })
}

fn one<O: Operation>(form: Form) -> Handler {
    if form.shape == Shape::R {
        sized!(form.size, r[O][])
    } else {
        addressed!(form.flat, sized, form.size, m[O])
    }
}

fn r<O: Operation, T: AluWord + DivWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.regs.get::<T>(op.dst);
    O::apply(cpu, b)
}

fn m<O: Operation, T: AluWord + DivWord + MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Read)?;
    let b = cpu.read::<T>(linear)?;
    O::apply(cpu, b)
}

fn imul_rr<T: WideWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.regs.get::<T>(op.dst), cpu.regs.get::<T>(op.src));
    imul(cpu, op, a, b)
}

fn imul_rm<T: WideWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, size_of::<T>() as u64, Access::Read)?;
    let b = cpu.read::<T>(linear)?;
    let a = cpu.regs.get::<T>(op.dst);
    imul(cpu, op, a, b)
}

fn imul_rri<T: WideWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.regs.get::<T>(op.src);
    imul(cpu, op, a, T::of(op.imm))
}

fn imul_rmi<T: WideWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, size_of::<T>() as u64, Access::Read)?;
    let a = cpu.read::<T>(linear)?;
    imul(cpu, op, a, T::of(op.imm))
}

#[inline(always)]
fn imul<T: WideWord>(cpu: &mut Cpu, op: &Op, a: T, b: T) -> Exec {
    let result = T::imul(a, b, &mut cpu.status);
    cpu.regs.set(op.dst, result);
    Ok(())
}
