//! XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.

use iced_x86::{Instruction, Mnemonic};

use super::{Form, Shape, sized};
use crate::alu::{AluWord, st};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::{Word, at};

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    Some(match (insn.mnemonic(), form.shape) {
        (Mnemonic::Xchg, Shape::RR) => sized!(form.size, xchg_rr[][]),
        (Mnemonic::Xchg, Shape::MR) => sized!(form.size, xchg_mr[][]),
        (Mnemonic::Xchg, Shape::RM) => {
            op.src = op.dst;
            sized!(form.size, xchg_mr[][])
        }
        (Mnemonic::Xadd, Shape::RR) => sized!(form.size, xadd_rr[][]),
        (Mnemonic::Xadd, Shape::MR) => sized!(form.size, xadd_mr[][]),
        (Mnemonic::Cmpxchg, Shape::RR) => sized!(form.size, cmpxchg_rr[][]),
        (Mnemonic::Cmpxchg, Shape::MR) => sized!(form.size, cmpxchg_mr[][]),
        (Mnemonic::Cmpxchg8b, Shape::M) => cmpxchg8b,
        (Mnemonic::Cmpxchg16b, Shape::M) => cmpxchg16b,
        _ => return None,
    })
}

fn xchg_rr<T: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.regs.get::<T>(op.dst), cpu.regs.get::<T>(op.src));
    cpu.regs.set(op.dst, b);
    cpu.regs.set(op.src, a);
    Ok(())
}

/// With memory the exchange is locked, prefix or not.
fn xchg_mr<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, size_of::<T>() as u64, Access::Write)?;
    let new = cpu.regs.get::<T>(op.src);
    let old = cpu.modify(linear, true, |_: T, _| new)?;
    cpu.regs.set(op.src, old);
    Ok(())
}

fn xadd_rr<T: AluWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.regs.get::<T>(op.dst), cpu.regs.get::<T>(op.src));
    let sum = T::add(a, b, &mut cpu.status);
    cpu.regs.set(op.src, a);
    cpu.regs.set(op.dst, sum);
    Ok(())
}

fn xadd_mr<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, size_of::<T>() as u64, Access::Write)?;
    let b = cpu.regs.get::<T>(op.src);
    let old = cpu.modify(linear, op.has(Op::LOCK), |a: T, s| T::add(a, b, s))?;
    cpu.regs.set(op.src, old);
    Ok(())
}

fn cmpxchg_rr<T: AluWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (expected, found) = (cpu.regs.get::<T>(at::RAX), cpu.regs.get::<T>(op.dst));
    T::sub(expected, found, &mut cpu.status);
    if expected == found {
        let new = cpu.regs.get::<T>(op.src);
        cpu.regs.set(op.dst, new);
    } else {
        cpu.regs.set(at::RAX, found);
    }
    Ok(())
}

/// The destination gets a write cycle whatever the comparison says (SDM vol. 2A, CMPXCHG).
fn cmpxchg_mr<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, size_of::<T>() as u64, Access::Write)?;
    let (expected, new) = (cpu.regs.get::<T>(at::RAX), cpu.regs.get::<T>(op.src));
    let found = cpu.modify(linear, op.has(Op::LOCK), |a: T, s| {
        T::sub(expected, a, s);
        if a == expected { new } else { a }
    })?;
    if found != expected {
        cpu.regs.set(at::RAX, found);
    }
    Ok(())
}

fn set_zero_flag(cpu: &mut Cpu, zero: bool) {
    cpu.status = cpu.status & !st::ZF | if zero { st::ZF } else { 0 };
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, 8, Access::Write)?;
    let pair = |cpu: &Cpu, high: u8, low: u8| {
        u64::from(cpu.regs.get::<u32>(high)) << 32 | u64::from(cpu.regs.get::<u32>(low))
    };
    let (expected, new) = (pair(cpu, at::RDX, at::RAX), pair(cpu, at::RCX, at::RBX));
    let found = cpu.modify(linear, op.has(Op::LOCK), |a: u64, _| if a == expected { new } else { a })?;
    set_zero_flag(cpu, found == expected);
    if found != expected {
        cpu.regs.set(at::RAX, found as u32);
        cpu.regs.set(at::RDX, (found >> 32) as u32);
    }
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, 16, Access::Write)?;
    let pair =
        |cpu: &Cpu, high: u8, low: u8| u128::from(cpu.regs.r64(high)) << 64 | u128::from(cpu.regs.r64(low));
    let (expected, new) = (pair(cpu, at::RDX, at::RAX), pair(cpu, at::RCX, at::RBX));
    let found = cpu.compare_exchange_16(linear, expected, new)?;
    set_zero_flag(cpu, found == expected);
    if found != expected {
        cpu.regs.set64(at::RAX, found as u64);
        cpu.regs.set64(at::RDX, (found >> 64) as u64);
    }
    Ok(())
}
