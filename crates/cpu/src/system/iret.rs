//! IRET: SDM vol. 2A.

use iced_x86::{Code, Instruction};
use skep_hv::state::Segment;

use super::far::Target;
use super::frame::Frame;
use super::segments::v86_segment;
use crate::cpu::{Cpu, fl, seg};
use crate::fault::Exec;
use crate::op::{Handler, Op};
use crate::regs::at;

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    Some(match insn.code() {
        Code::Iretw => iret::<2>,
        Code::Iretd => iret::<4>,
        Code::Iretq => iret::<8>,
        _ => return None,
    })
}

fn iret<const SIZE: u64>(cpu: &mut Cpu, _: &Op) -> Exec {
    let was_blocked = cpu.nmi_blocked;
    let done = if !cpu.mode.protected {
        real::<SIZE>(cpu)
    } else if cpu.mode.v86 {
        if cpu.iopl() < 3 { Err(cpu.gp(0)) } else { real::<SIZE>(cpu) }
    } else {
        protected::<SIZE>(cpu)
    };
    // NMIs are unblocked even by an IRET that faults (vol. 3C §26.3).
    cpu.nmi_blocked = false;
    cpu.look |= was_blocked;
    done
}

/// Real mode, and virtual-8086 mode with IOPL 3.
fn real<const SIZE: u64>(cpu: &mut Cpu) -> Exec {
    let mut stack = Frame::current(cpu, 0);
    let offset = stack.pop(cpu, SIZE)?;
    let selector = stack.pop(cpu, SIZE)? as u16;
    let flags = stack.pop(cpu, SIZE)?;
    let target = cpu.real_target(selector, offset)?;
    let kept = if cpu.mode.v86 { fl::IOPL } else { 0 } | fl::VM | fl::VIF | fl::VIP;
    let changed = if SIZE == 2 { 0xffff } else { 0xffff_ffff } & !kept;
    let sp = stack.pointer(cpu.regs.r64(at::RSP));
    cpu.regs.set64(at::RSP, sp);
    cpu.set_rflags(cpu.rflags() & !changed | flags & changed);
    cpu.take(target);
    cpu.refresh_mode();
    Ok(())
}

fn protected<const SIZE: u64>(cpu: &mut Cpu) -> Exec {
    if cpu.flag(fl::NT) {
        if cpu.mode.long {
            return Err(cpu.gp(0));
        }
        return return_to_task(cpu);
    }
    let mut stack = Frame::current(cpu, 0);
    let offset = stack.pop(cpu, SIZE)?;
    let selector = stack.pop(cpu, SIZE)? as u16;
    let flags = stack.pop(cpu, SIZE)?;
    if flags & fl::VM != 0 && SIZE == 4 && cpu.mode.cpl == 0 && !cpu.mode.long {
        return to_v86(cpu, stack, offset, selector, flags);
    }
    let (target, outer) = cpu.return_target(selector, offset)?;
    let new_flags = protected_flags::<SIZE>(cpu, flags);
    if outer || cpu.is_64bit() {
        let sp = stack.pop(cpu, SIZE)?;
        let ss_selector = stack.pop(cpu, SIZE)? as u16;
        let ss = cpu.return_stack(ss_selector, &target)?;
        cpu.set_rflags(new_flags);
        cpu.leave_to_outer(target, ss, sp);
    } else {
        let sp = stack.pointer(cpu.regs.r64(at::RSP));
        cpu.regs.set64(at::RSP, sp);
        cpu.set_rflags(new_flags);
        cpu.take(target);
        cpu.refresh_mode();
    }
    Ok(())
}

/// What the popped flags change, by the privilege that IRET is executed with.
fn protected_flags<const SIZE: u64>(cpu: &Cpu, popped: u64) -> u64 {
    let mut changed = fl::STATUS | fl::TF | fl::DF | fl::NT;
    if SIZE > 2 {
        changed |= fl::RF | fl::AC | fl::ID;
    }
    if cpu.mode.cpl <= cpu.iopl() {
        changed |= fl::IF;
    }
    if cpu.mode.cpl == 0 {
        changed |= fl::IOPL;
        if SIZE > 2 {
            changed |= fl::VIF | fl::VIP;
        }
    }
    cpu.rflags() & !changed | popped & changed
}

fn to_v86(cpu: &mut Cpu, mut stack: Frame, offset: u64, selector: u16, flags: u64) -> Exec {
    let sp = stack.pop(cpu, 4)?;
    let mut selectors = [0u16; 5];
    for popped in &mut selectors {
        *popped = stack.pop(cpu, 4)? as u16;
    }
    // EIP is 16 bits worth something: a higher one faults at the next fetch, in the new mode.
    let [ss, es, ds, fs, gs] = selectors.map(v86_segment);
    let target = Target { cs: v86_segment(selector), rip: offset };
    cpu.set_rflags(flags);
    let segments: [(usize, Segment); 5] =
        [(seg::SS, ss), (seg::ES, es), (seg::DS, ds), (seg::FS, fs), (seg::GS, gs)];
    for (register, segment) in segments {
        cpu.segs[register] = segment;
    }
    cpu.regs.set64(at::RSP, sp);
    cpu.take(target);
    cpu.refresh_mode();
    Ok(())
}

/// NT: back to the task that the TSS's link names.
fn return_to_task(cpu: &mut Cpu) -> Exec {
    let link = cpu.read_system::<u16>(cpu.system_linear(cpu.tr.base))?;
    cpu.switch_task(link, false, 0)
}
