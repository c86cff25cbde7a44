//! RFLAGS: CLI, STI, PUSHF, POPF, CLAC, STAC.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{Cpu, fl};
use crate::fault::Exec;
use crate::mmu::MemWord;
use crate::op::{Handler, Op};

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Cli => cli,
        Mnemonic::Sti => sti,
        Mnemonic::Pushf => pushf::<u16>,
        Mnemonic::Pushfd => pushf::<u32>,
        Mnemonic::Pushfq => pushf::<u64>,
        Mnemonic::Popf => popf::<u16>,
        Mnemonic::Popfd => popf::<u32>,
        Mnemonic::Popfq => popf::<u64>,
        Mnemonic::Clac => |cpu, _| access_control(cpu, false),
        Mnemonic::Stac => |cpu, _| access_control(cpu, true),
        _ => return None,
    })
}

/// #GP(0) unless IOPL allows the program to touch IF; level 0 in real mode.
fn interrupt_flag_allowed(cpu: &mut Cpu) -> Exec {
    if cpu.mode.protected && cpu.mode.cpl > cpu.iopl() { Err(cpu.gp(0)) } else { Ok(()) }
}

fn cli(cpu: &mut Cpu, _: &Op) -> Exec {
    interrupt_flag_allowed(cpu)?;
    cpu.rflags_rest &= !fl::IF;
    Ok(())
}

fn sti(cpu: &mut Cpu, _: &Op) -> Exec {
    interrupt_flag_allowed(cpu)?;
    if !cpu.flag(fl::IF) {
        cpu.rflags_rest |= fl::IF;
        cpu.sti_shadow = true;
        // The shadow ends with the next instruction that the loop runs under its eyes; until something waits, nobody can
        // tell that it lasted longer.
        cpu.look |= cpu.pending.maskable;
    }
    Ok(())
}

/// PUSHF and POPF in virtual-8086 mode need IOPL 3.
fn v86_allowed(cpu: &mut Cpu) -> Exec {
    if cpu.mode.v86 && cpu.iopl() < 3 { Err(cpu.gp(0)) } else { Ok(()) }
}

fn pushf<T: MemWord>(cpu: &mut Cpu, _: &Op) -> Exec {
    v86_allowed(cpu)?;
    let image = cpu.rflags() & !(fl::VM | fl::RF);
    cpu.push(T::of(image))
}

/// Which flags POPF changes, by operand size in bytes and privilege (SDM vol. 2B, POPF, table 4-16).
pub(super) fn popf_changes(size: usize, cpl: u8, iopl: u8) -> u64 {
    let mut changed = fl::STATUS | fl::TF | fl::DF | fl::NT;
    if size > 2 {
        changed |= fl::AC | fl::ID;
    }
    if cpl <= iopl {
        changed |= fl::IF;
    }
    if cpl == 0 {
        changed |= fl::IOPL;
    }
    changed
}

fn popf<T: MemWord>(cpu: &mut Cpu, _: &Op) -> Exec {
    v86_allowed(cpu)?;
    let popped = cpu.pop::<T>()?.to_u64();
    let changed = popf_changes(size_of::<T>(), cpu.mode.cpl, cpu.iopl());
    let cleared = if size_of::<T>() > 2 { fl::RF } else { 0 };
    let old = cpu.rflags();
    cpu.set_rflags(old & !(changed | cleared) | popped & changed);
    if (cpu.rflags() ^ old) & fl::AC != 0 {
        cpu.select_context();
    }
    Ok(())
}

fn access_control(cpu: &mut Cpu, on: bool) -> Exec {
    if !cpu.msrs.model.smap || cpu.mode.cpl > 0 {
        return Err(cpu.ud());
    }
    cpu.rflags_rest = cpu.rflags_rest & !fl::AC | if on { fl::AC } else { 0 };
    cpu.select_context();
    Ok(())
}
