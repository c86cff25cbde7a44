//! Near control transfers: JMP, Jcc, CALL, RET, LOOP, JCXZ.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Form, Shape, conditional};
use crate::alu::{condition, st};
use crate::cpu::{CodeSize, Cpu, seg};
use crate::fault::Exec;
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::{BLOCK_RIP, at};

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    let near = matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    if near {
        // Relative to the start of the block, as decode starts there at address zero.
        op.imm = insn.near_branch_target();
    }
    let long = form.code == CodeSize::Bits64;
    let short_target = insn.op0_kind() == OpKind::NearBranch16;
    let size = match insn.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => form.size,
    };
    Some(match insn.mnemonic() {
        Mnemonic::Jmp if near && long && !short_target => |cpu, op| {
            cpu.rip = target(cpu, op);
            Ok(())
        },
        Mnemonic::Jmp if near => jump_legacy,
        Mnemonic::Call if near && long && !short_target => |cpu, op| {
            let (next, to) = (cpu.rip, target(cpu, op));
            cpu.push::<u64>(next)?;
            cpu.rip = to;
            Ok(())
        },
        Mnemonic::Call if near => match size {
            2 => call_legacy::<u16>,
            _ => call_legacy::<u32>,
        },
        Mnemonic::Jmp if matches!(form.shape, Shape::R | Shape::M) && !is_far(insn) => match size {
            2 => jump_indirect::<u16> as Handler,
            4 => jump_indirect::<u32>,
            _ => jump_indirect::<u64>,
        },
        Mnemonic::Call if matches!(form.shape, Shape::R | Shape::M) && !is_far(insn) => match size {
            2 => call_indirect::<u16> as Handler,
            4 => call_indirect::<u32>,
            _ => call_indirect::<u64>,
        },
        Mnemonic::Ret => match op.osize() {
            2 => ret::<u16> as Handler,
            4 => ret::<u32>,
            _ => ret::<u64>,
        },
        Mnemonic::Loop => |cpu, op| looped(cpu, op, |_| true),
        Mnemonic::Loope => |cpu, op| looped(cpu, op, |status| status & st::ZF != 0),
        Mnemonic::Loopne => |cpu, op| looped(cpu, op, |status| status & st::ZF == 0),
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => |cpu, op| {
            if cpu.regs.r64(at::RCX) & op.amask() == 0 { jump_legacy(cpu, op) } else { Ok(()) }
        },
        mnemonic => {
            let cc = jcc(mnemonic)?;
            if long && !short_target { conditional!(cc, branch[]) } else { conditional!(cc, branch_legacy[]) }
        }
    })
}

fn is_far(insn: &Instruction) -> bool {
    insn.is_call_far_indirect() || insn.is_jmp_far_indirect()
}

fn jcc(mnemonic: Mnemonic) -> Option<u8> {
    use Mnemonic::{Ja, Jae, Jb, Jbe, Je, Jg, Jge, Jl, Jle, Jne, Jno, Jnp, Jns, Jo, Jp, Js};
    let all = [Jo, Jno, Jb, Jae, Je, Jne, Jbe, Ja, Js, Jns, Jp, Jnp, Jl, Jge, Jle, Jg];
    all.iter().position(|&m| m == mnemonic).map(|cc| cc as u8)
}

#[inline(always)]
fn target(cpu: &Cpu, op: &Op) -> u64 {
    cpu.regs.r64(BLOCK_RIP).wrapping_add(op.imm)
}

fn branch<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    if condition::<CC>(cpu.status) {
        cpu.rip = target(cpu, op);
    }
    Ok(())
}

fn branch_legacy<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    if condition::<CC>(cpu.status) { jump_legacy(cpu, op) } else { Ok(()) }
}

/// A relative target of an instruction that may be 16 or 32 bits wide: truncated and checked against the segment.
fn legacy_target(cpu: &mut Cpu, op: &Op) -> Exec<u64> {
    let mask = match op.attr & (Op::O16 | Op::O32) {
        Op::O16 => 0xffff,
        Op::O32 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let to = target(cpu, op) & mask;
    check_target(cpu, to)?;
    Ok(to)
}

fn jump_legacy(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.rip = legacy_target(cpu, op)?;
    Ok(())
}

fn call_legacy<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = legacy_target(cpu, op)?;
    let next = T::of(cpu.rip);
    cpu.push(next)?;
    cpu.rip = to;
    Ok(())
}

/// #GP(0) for a target outside of the code segment or the canonical address space.
#[inline(always)]
fn check_target(cpu: &mut Cpu, to: u64) -> Exec {
    let good = match cpu.mode.code {
        CodeSize::Bits64 => cpu.canonical(to),
        _ => to <= u64::from(cpu.segs[seg::CS].limit),
    };
    if good { Ok(()) } else { Err(cpu.gp(0)) }
}

fn fetch_target<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec<u64> {
    let to = if op.dst == NONE {
        let linear = cpu.linear(op, size_of::<T>() as u64, Access::Read)?;
        cpu.read::<T>(linear)?
    } else {
        cpu.regs.get::<T>(op.dst)
    };
    Ok(to.to_u64())
}

/// `Op::dst` of an instruction whose first operand is not a register.
pub(crate) const NONE: u8 = u8::MAX;

fn jump_indirect<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = fetch_target::<T>(cpu, op)?;
    check_target(cpu, to)?;
    cpu.rip = to;
    Ok(())
}

fn call_indirect<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = fetch_target::<T>(cpu, op)?;
    let (next, stack) = (T::of(cpu.rip), cpu.regs.r64(at::RSP));
    cpu.push(next)?;
    // The return address is in memory before the target is looked at.
    if let Err(abort) = check_target(cpu, to) {
        cpu.regs.set64(at::RSP, stack);
        return Err(abort);
    }
    cpu.rip = to;
    Ok(())
}

fn ret<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = cpu.peek::<T>(0)?.to_u64();
    check_target(cpu, to)?;
    cpu.drop_stack(size_of::<T>() as u64 + (op.imm & 0xffff));
    cpu.rip = to;
    Ok(())
}

fn looped(cpu: &mut Cpu, op: &Op, also: fn(u16) -> bool) -> Exec {
    let mask = op.amask();
    let old = cpu.regs.r64(at::RCX);
    let count = old.wrapping_sub(1) & mask;
    if count != 0 && also(cpu.status) {
        cpu.rip = legacy_target(cpu, op)?;
    }
    match mask {
        0xffff => cpu.regs.set(at::RCX, count as u16),
        0xffff_ffff => cpu.regs.set(at::RCX, count as u32),
        _ => cpu.regs.set(at::RCX, count),
    }
    Ok(())
}
