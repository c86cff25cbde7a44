//! SYSCALL, SYSRET, SYSENTER, SYSEXIT: SDM vol. 3A §5.8.7 and §5.8.8.

use iced_x86::{Code, Instruction, Mnemonic};
use skep_hv::state::Segment;

use super::mode::access;
use crate::cpu::{Cpu, efer, fl, seg};
use crate::fault::Exec;
use crate::op::{Handler, Op};
use crate::regs::at;
use crate::run::DR6_BS;

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    Some(match insn.code() {
        Code::Sysretd => sysret::<false>,
        Code::Sysretq => sysret::<true>,
        Code::Sysexitd => sysexit::<false>,
        Code::Sysexitq => sysexit::<true>,
        _ => match insn.mnemonic() {
            Mnemonic::Syscall => syscall,
            Mnemonic::Sysenter => sysenter,
            _ => return None,
        },
    })
}

/// A flat code segment: 64-bit or 32-bit.
fn code(selector: u16, dpl: u32, wide: bool) -> Segment {
    let size = if wide { access::L } else { access::DB };
    let rights = access::CODE_SEGMENT | dpl << access::DPL_SHIFT | size | access::G;
    Segment { selector, base: 0, limit: u32::MAX, access: rights }
}

/// A flat stack segment.
fn stack(selector: u16, dpl: u32) -> Segment {
    let rights = access::DATA | dpl << access::DPL_SHIFT | access::DB | access::G;
    Segment { selector, base: 0, limit: u32::MAX, access: rights }
}

fn syscall(cpu: &mut Cpu, _: &Op) -> Exec {
    if !cpu.is_64bit() || cpu.efer & efer::SCE == 0 {
        return Err(cpu.ud());
    }
    let flags = cpu.rflags();
    cpu.regs.set64(at::RCX, cpu.rip);
    cpu.regs.set64(at::R11, flags & !fl::RF);
    cpu.rip = cpu.msrs.lstar;
    cpu.set_rflags(flags & !cpu.msrs.fmask & !fl::RF);
    let selector = (cpu.msrs.star >> 32) as u16 & !3;
    cpu.segs[seg::CS] = code(selector, 0, true);
    cpu.segs[seg::SS] = stack(selector.wrapping_add(8), 0);
    cpu.refresh_mode();
    cpu.step_by_new_flags();
    Ok(())
}

impl Cpu {
    /// Whether a single-step trap follows SYSCALL and SYSRET is up to the TF that they leave: a kernel that masks it is not
    /// stepped into, and a return to stepped code traps before that runs.
    fn step_by_new_flags(&mut self) {
        self.stepping = self.flag(fl::TF);
        if self.stepping {
            self.debug_trap |= DR6_BS;
            self.look = true;
        }
    }
}

fn sysret<const WIDE: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    if !cpu.is_64bit() || cpu.efer & efer::SCE == 0 {
        return Err(cpu.ud());
    }
    let target = cpu.regs.r64(at::RCX);
    if cpu.mode.cpl != 0 || WIDE && !cpu.canonical(target) {
        return Err(cpu.gp(0));
    }
    cpu.rip = if WIDE { target } else { target & 0xffff_ffff };
    cpu.set_rflags(cpu.regs.r64(at::R11) & 0x003c_7fd7);
    let selector = (cpu.msrs.star >> 48) as u16;
    cpu.segs[seg::CS] = code(selector.wrapping_add(if WIDE { 16 } else { 0 }) | 3, 3, WIDE);
    cpu.segs[seg::SS] = stack(selector.wrapping_add(8) | 3, 3);
    cpu.refresh_mode();
    cpu.step_by_new_flags();
    Ok(())
}

fn sysenter(cpu: &mut Cpu, _: &Op) -> Exec {
    if !cpu.msrs.model.sysenter {
        return Err(cpu.ud());
    }
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    if !cpu.mode.protected || selector == 0 {
        return Err(cpu.gp(0));
    }
    let long = cpu.mode.long;
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.set_rflags(cpu.rflags() & !(fl::VM | fl::IF));
    cpu.regs.set64(at::RSP, cpu.msrs.sysenter_esp & mask);
    cpu.rip = cpu.msrs.sysenter_eip & mask;
    cpu.segs[seg::CS] = code(selector, 0, long);
    cpu.segs[seg::SS] = stack(selector.wrapping_add(8), 0);
    cpu.refresh_mode();
    Ok(())
}

fn sysexit<const WIDE: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    if !cpu.msrs.model.sysenter {
        return Err(cpu.ud());
    }
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    let (sp, target) = (cpu.regs.r64(at::RCX), cpu.regs.r64(at::RDX));
    let canonical = !WIDE || cpu.canonical(sp) && cpu.canonical(target);
    if !cpu.mode.protected || selector == 0 || cpu.mode.cpl != 0 || !canonical {
        return Err(cpu.gp(0));
    }
    let mask = if WIDE { u64::MAX } else { 0xffff_ffff };
    cpu.regs.set64(at::RSP, sp & mask);
    cpu.rip = target & mask;
    let selector = selector.wrapping_add(if WIDE { 32 } else { 16 });
    cpu.segs[seg::CS] = code(selector | 3, 3, WIDE);
    cpu.segs[seg::SS] = stack(selector.wrapping_add(8) | 3, 3);
    cpu.refresh_mode();
    Ok(())
}
