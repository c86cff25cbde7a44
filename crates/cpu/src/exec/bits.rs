//! Bit tests and scans.

use iced_x86::{Instruction, Mnemonic};

use super::{Form, Shape, wide};
use crate::alu::WideWord;
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};

trait Test {
    const WRITES: bool;
    fn apply<T: WideWord>(a: T, bit: T, status: &mut u16) -> T;
}
macro_rules! test {
    ($($name:ident $op:ident;)*) => {$(
        struct $name;
        impl Test for $name {
            const WRITES: bool = true;
            #[inline(always)]
            fn apply<T: WideWord>(a: T, bit: T, status: &mut u16) -> T {
                T::$op(a, bit, status)
            }
        }
    )*};
}
test! { Bts bts; Btr btr; Btc btc; }
struct Bt;
impl Test for Bt {
    const WRITES: bool = false;
    #[inline(always)]
    fn apply<T: WideWord>(a: T, bit: T, status: &mut u16) -> T {
        T::bt(a, bit, status);
        a
    }
}

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    let _ = op;
    Some(match insn.mnemonic() {
        Mnemonic::Bt => test::<Bt>(form),
        Mnemonic::Bts => test::<Bts>(form),
        Mnemonic::Btr => test::<Btr>(form),
        Mnemonic::Btc => test::<Btc>(form),
        Mnemonic::Bsf => match form.shape {
            Shape::RR => wide!(form.size, bsf_r[][]),
            _ => wide!(form.size, bsf_m[][]),
        },
        Mnemonic::Bsr => match form.shape {
            Shape::RR => wide!(form.size, bsr_r[][]),
            _ => wide!(form.size, bsr_m[][]),
        },
        _ => return None,
    })
}

fn test<O: Test>(form: Form) -> Handler {
    match form.shape {
        Shape::RR => wide!(form.size, rr[O][]),
        Shape::RI => wide!(form.size, ri[O][]),
        Shape::MI => wide!(form.size, mi[O][]),
        _ => wide!(form.size, mr[O][]),
    }
}

fn rr<O: Test, T: WideWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let bit = cpu.regs.get::<T>(op.src);
    register::<O, T>(cpu, op, bit)
}

fn ri<O: Test, T: WideWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    register::<O, T>(cpu, op, T::of(op.imm))
}

fn register<O: Test, T: WideWord>(cpu: &mut Cpu, op: &Op, bit: T) -> Exec {
    let a = cpu.regs.get::<T>(op.dst);
    let result = O::apply(a, bit, &mut cpu.status);
    if O::WRITES {
        cpu.regs.set(op.dst, result);
    }
    Ok(())
}

fn mi<O: Test, T: WideWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let offset = cpu.offset(op);
    memory::<O, T>(cpu, op, offset, T::of(op.imm))
}

/// The register's whole signed value is a bit offset from the operand's address.
fn mr<O: Test, T: WideWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let bit = cpu.regs.get::<T>(op.src);
    let size = size_of::<T>() as i64;
    let words = bit.to_i64() >> T::BITS.trailing_zeros();
    let offset = cpu.offset(op).wrapping_add(words.wrapping_mul(size) as u64) & op.amask();
    memory::<O, T>(cpu, op, offset, bit)
}

fn memory<O: Test, T: WideWord + MemWord>(cpu: &mut Cpu, op: &Op, offset: u64, bit: T) -> Exec {
    let size = size_of::<T>() as u64;
    if O::WRITES {
        let linear = cpu.seg_linear(op.seg as usize, offset, size, Access::Write)?;
        cpu.modify(linear, op.has(Op::LOCK), |a: T, s| O::apply(a, bit, s))?;
    } else {
        let linear = cpu.seg_linear(op.seg as usize, offset, size, Access::Read)?;
        let a = cpu.read::<T>(linear)?;
        O::apply(a, bit, &mut cpu.status);
    }
    Ok(())
}

macro_rules! scan {
    ($($op:ident $r:ident $m:ident;)*) => {$(
        fn $r<T: WideWord>(cpu: &mut Cpu, op: &Op) -> Exec {
            let source = cpu.regs.get::<T>(op.src);
            found(cpu, op, source, T::$op)
        }
        fn $m<T: WideWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
            let linear = cpu.linear(op, size_of::<T>() as u64, Access::Read)?;
            let source = cpu.read::<T>(linear)?;
            found(cpu, op, source, T::$op)
        }
    )*};
}
scan! { bsf bsf_r bsf_m; bsr bsr_r bsr_m; }

#[inline(always)]
fn found<T: WideWord>(cpu: &mut Cpu, op: &Op, source: T, scan: fn(T, T, &mut u16) -> T) -> Exec {
    let old = cpu.regs.get::<T>(op.dst);
    let result = scan(old, source, &mut cpu.status);
    if source != T::default() {
        cpu.regs.set(op.dst, result);
    }
    Ok(())
}
