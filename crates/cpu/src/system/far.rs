//! Far JMP, CALL and RET: SDM vol. 3A §5.8, vol. 2A CALL and JMP, vol. 2B RET.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use skep_hv::state::Segment;

use super::descriptor::{Descriptor, Gate, index, is_null, system_type};
use super::frame::Frame;
use super::mode::access;
use super::segments::{null_segment, real_segment, v86_segment};
use crate::cpu::{Cpu, seg};
use crate::fault::{Exec, vector};
use crate::mmu::Access;
use crate::op::{Handler, Op};
use crate::regs::at;

/// Where a transfer goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    /// The code segment to be loaded, RPL set.
    pub(super) cs: Segment,
    pub(super) rip: u64,
}

impl Cpu {
    /// Takes a checked target; the caller brings the mode up to date.
    pub(super) fn take(&mut self, target: Target) {
        self.segs[seg::CS] = target.cs;
        self.rip = target.rip;
    }

    /// CS for real and virtual-8086 mode, and the check of the offset against its limit.
    pub(super) fn real_target(&mut self, selector: u16, offset: u64) -> Exec<Target> {
        let old = &self.segs[seg::CS];
        let cs = if self.mode.v86 { v86_segment(selector) } else { real_segment(old, selector) };
        if offset > u64::from(cs.limit) {
            return Err(self.gp(0));
        }
        Ok(Target { cs, rip: offset })
    }

    /// A code segment whose privilege has been checked, to be entered at `cpl`: presence, and the offset. `error` is the
    /// code of the #GP for a bad offset.
    pub(super) fn enter(
        &mut self,
        code: &Descriptor,
        selector: u16,
        cpl: u8,
        offset: u64,
        error: u32,
    ) -> Exec<Target> {
        self.check_long_code(code, selector, error)?;
        if !code.present() {
            return Err(self.fault(vector::NP, index(selector) | error));
        }
        let wide = self.mode.long && code.access() & access::L != 0;
        let rip = if wide { offset } else { offset & 0xffff_ffff };
        let good = if wide { self.canonical(rip) } else { rip <= u64::from(code.limit()) };
        if !good {
            return Err(self.gp(error));
        }
        let cs = self.mark_accessed(code, selector & !3 | u16::from(cpl))?;
        Ok(Target { cs, rip })
    }
}

pub(super) fn select(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let direct = matches!(insn.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32);
    if direct {
        op.imm = match insn.op0_kind() {
            OpKind::FarBranch16 => u64::from(insn.far_branch16()),
            _ => u64::from(insn.far_branch32()),
        };
        op.disp = u64::from(insn.far_branch_selector());
    }
    Some(match insn.code() {
        Code::Jmp_ptr1616 => direct_transfer::<2, false>,
        Code::Jmp_ptr1632 => direct_transfer::<4, false>,
        Code::Call_ptr1616 => direct_transfer::<2, true>,
        Code::Call_ptr1632 => direct_transfer::<4, true>,
        Code::Jmp_m1616 => indirect_transfer::<2, false>,
        Code::Jmp_m1632 => indirect_transfer::<4, false>,
        Code::Jmp_m1664 => indirect_transfer::<8, false>,
        Code::Call_m1616 => indirect_transfer::<2, true>,
        Code::Call_m1632 => indirect_transfer::<4, true>,
        Code::Call_m1664 => indirect_transfer::<8, true>,
        _ if insn.mnemonic() == Mnemonic::Retf => match insn.code() {
            Code::Retfw | Code::Retfw_imm16 => ret::<2>,
            Code::Retfd | Code::Retfd_imm16 => ret::<4>,
            _ => ret::<8>,
        },
        _ => return None,
    })
}

fn direct_transfer<const SIZE: u64, const CALL: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    transfer::<SIZE, CALL>(cpu, op.disp as u16, op.imm)
}

fn indirect_transfer<const SIZE: u64, const CALL: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, SIZE + 2, Access::Read)?;
    let offset = match SIZE {
        2 => u64::from(cpu.read::<u16>(linear)?),
        4 => u64::from(cpu.read::<u32>(linear)?),
        _ => cpu.read::<u64>(linear)?,
    };
    let selector = cpu.read::<u16>(linear.wrapping_add(SIZE))?;
    transfer::<SIZE, CALL>(cpu, selector, offset)
}

fn transfer<const SIZE: u64, const CALL: bool>(cpu: &mut Cpu, selector: u16, offset: u64) -> Exec {
    if !cpu.mode.protected || cpu.mode.v86 {
        let target = cpu.real_target(selector, offset)?;
        return go::<SIZE, CALL>(cpu, target);
    }
    if is_null(selector) {
        return Err(cpu.gp(0));
    }
    let descriptor = cpu.descriptor(selector, vector::GP, 0)?;
    if descriptor.is_segment() {
        let cpl = cpu.mode.cpl;
        let allowed = if !descriptor.is_code() {
            false
        } else if descriptor.is_conforming() {
            descriptor.dpl() <= cpl
        } else {
            (selector & 3) as u8 <= cpl && descriptor.dpl() == cpl
        };
        if !allowed {
            return Err(cpu.gp(index(selector)));
        }
        let target = cpu.enter(&descriptor, selector, cpl, offset, 0)?;
        return go::<SIZE, CALL>(cpu, target);
    }
    through_gate::<CALL>(cpu, selector, &descriptor)
}

/// Same privilege level: for a call with the return address on the current stack.
fn go<const SIZE: u64, const CALL: bool>(cpu: &mut Cpu, target: Target) -> Exec {
    if CALL {
        let mut stack = Frame::current(cpu, 0);
        stack.push(cpu, SIZE, u64::from(cpu.segs[seg::CS].selector))?;
        stack.push(cpu, SIZE, cpu.rip)?;
        commit_stack(cpu, &stack);
    }
    cpu.take(target);
    cpu.refresh_mode();
    Ok(())
}

fn commit_stack(cpu: &mut Cpu, stack: &Frame) {
    let sp = stack.pointer(cpu.regs.r64(at::RSP));
    cpu.regs.set64(at::RSP, sp);
}

fn through_gate<const CALL: bool>(cpu: &mut Cpu, selector: u16, descriptor: &Descriptor) -> Exec {
    let kind = descriptor.system_type();
    let known = match kind {
        system_type::CALL_GATE => true,
        system_type::CALL_GATE16 | system_type::TASK_GATE | system_type::TSS | system_type::TSS16 => {
            !cpu.mode.long
        }
        _ => false,
    };
    let dpl = descriptor.dpl();
    if !known || dpl < cpu.mode.cpl || (selector & 3) as u8 > dpl {
        return Err(cpu.gp(index(selector)));
    }
    let high = if cpu.mode.long { cpu.upper_half(selector, vector::GP, 0)? } else { 0 };
    if !descriptor.present() {
        return Err(cpu.fault(vector::NP, index(selector)));
    }
    let gate = Gate::new(descriptor.raw, high);
    match kind {
        system_type::TASK_GATE => return cpu.switch_task(gate.selector, CALL, 0),
        system_type::TSS | system_type::TSS16 => return cpu.switch_task(selector, CALL, 0),
        _ => {}
    }
    let size = match kind {
        system_type::CALL_GATE16 => 2,
        _ if cpu.mode.long => 8,
        _ => 4,
    };
    let offset = if size == 2 { gate.offset & 0xffff } else { gate.offset };
    let code = cpu.code_descriptor(gate.selector, vector::GP, 0)?;
    let wide = code.access() & (access::L | access::DB) == access::L;
    if code.dpl() > cpu.mode.cpl || cpu.mode.long && !wide {
        return Err(cpu.gp(index(gate.selector)));
    }
    let cpl = cpu.mode.cpl;
    if CALL && !code.is_conforming() && code.dpl() < cpl {
        return call_inner(cpu, &gate, &code, size, offset);
    }
    if !CALL && !code.is_conforming() && code.dpl() != cpl {
        return Err(cpu.gp(index(gate.selector)));
    }
    let target = cpu.enter(&code, gate.selector, cpl, offset, 0)?;
    match (CALL, size) {
        (false, _) => go::<4, false>(cpu, target),
        (true, 2) => go::<2, true>(cpu, target),
        (true, 4) => go::<4, true>(cpu, target),
        (true, _) => go::<8, true>(cpu, target),
    }
}

/// A call through a gate to a more privileged level, on that level's stack.
fn call_inner(cpu: &mut Cpu, gate: &Gate, code: &Descriptor, size: u64, offset: u64) -> Exec {
    let cpl = code.dpl();
    let target = cpu.enter(code, gate.selector, cpl, offset, 0)?;
    let (old_ss, old_sp) = (cpu.segs[seg::SS].selector, cpu.regs.r64(at::RSP));
    let (ss, mut stack) = if cpu.mode.long {
        let sp = cpu.tss_stack64(u32::from(cpl), 0)?;
        (null_segment(u16::from(cpl), cpl), Frame::wide(sp, true, 0))
    } else {
        let (selector, sp) = cpu.tss_stack(cpl, 0)?;
        let ss = cpu.inner_stack_segment(selector, cpl, 0)?;
        (ss, Frame::inner(ss, sp, index(selector)))
    };
    stack.push(cpu, size, u64::from(old_ss))?;
    stack.push(cpu, size, old_sp)?;
    if !cpu.mode.long {
        // Parameters are copied in the order in which they lie.
        let caller = Frame::current(cpu, 0);
        for parameter in (0..u64::from(gate.count)).rev() {
            let value = caller.peek(cpu, parameter * size, size)?;
            stack.push(cpu, size, value)?;
        }
    }
    stack.push(cpu, size, u64::from(cpu.segs[seg::CS].selector))?;
    stack.push(cpu, size, cpu.rip)?;
    cpu.segs[seg::SS] = ss;
    commit_stack(cpu, &stack);
    cpu.take(target);
    cpu.refresh_mode();
    Ok(())
}

fn ret<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Exec {
    let release = op.imm & 0xffff;
    let mut stack = Frame::current(cpu, 0);
    let offset = stack.pop(cpu, SIZE)?;
    let selector = stack.pop(cpu, SIZE)? as u16;
    if !cpu.mode.protected || cpu.mode.v86 {
        let target = cpu.real_target(selector, offset)?;
        stack.skip(release);
        commit_stack(cpu, &stack);
        cpu.take(target);
        cpu.refresh_mode();
        return Ok(());
    }
    let (target, outer) = cpu.return_target(selector, offset)?;
    stack.skip(release);
    if outer {
        let sp = stack.pop(cpu, SIZE)?;
        let ss_selector = stack.pop(cpu, SIZE)? as u16;
        let ss = cpu.return_stack(ss_selector, &target)?;
        cpu.leave_to_outer(target, ss, sp.wrapping_add(release));
    } else {
        commit_stack(cpu, &stack);
        cpu.take(target);
        cpu.refresh_mode();
    }
    Ok(())
}

impl Cpu {
    /// The code segment that RET and IRET go back to, and whether that is a less privileged level.
    pub(super) fn return_target(&mut self, selector: u16, offset: u64) -> Exec<(Target, bool)> {
        let code = self.code_descriptor(selector, vector::GP, 0)?;
        let rpl = (selector & 3) as u8;
        let privileged = if code.is_conforming() { code.dpl() <= rpl } else { code.dpl() == rpl };
        if rpl < self.mode.cpl || !privileged {
            return Err(self.gp(index(selector)));
        }
        let target = self.enter(&code, selector, rpl, offset, 0)?;
        Ok((target, rpl > self.mode.cpl))
    }

    /// The stack segment that goes with it.
    pub(super) fn return_stack(&mut self, selector: u16, target: &Target) -> Exec<Segment> {
        let rpl = (target.cs.selector & 3) as u8;
        if is_null(selector) {
            let wide = self.mode.long && target.cs.access & access::L != 0;
            if wide && rpl != 3 && (selector & 3) as u8 == rpl {
                return Ok(null_segment(selector, rpl));
            }
            return Err(self.gp(0));
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        let matching = (selector & 3) as u8 == rpl && descriptor.dpl() == rpl;
        if !matching || !descriptor.is_data() || !descriptor.rw() {
            return Err(self.gp(index(selector)));
        }
        if !descriptor.present() {
            return Err(self.fault(vector::SS, index(selector)));
        }
        self.mark_accessed(&descriptor, selector)
    }

    /// Commits a return with a new stack; segments that the new level may not use become null.
    pub(super) fn leave_to_outer(&mut self, target: Target, ss: Segment, sp: u64) {
        let outer = (target.cs.selector & 3) as u8 > self.mode.cpl;
        self.take(target);
        self.segs[seg::SS] = ss;
        self.refresh_mode();
        let mask = self.mode.stack_mask;
        let old = self.regs.r64(at::RSP);
        self.regs.set64(at::RSP, if mask == 0xffff { old & !mask | sp & mask } else { sp & mask });
        if outer {
            self.drop_privileged_segments();
        }
    }

    fn drop_privileged_segments(&mut self) {
        for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &self.segs[register];
            let conforming = access::S | access::CODE | access::EC;
            let inner =
                super::mode::dpl(segment) < self.mode.cpl && segment.access & conforming != conforming;
            if segment.access & Segment::UNUSABLE == 0 && inner {
                self.segs[register] = null_segment(0, 0);
            }
        }
    }
}
