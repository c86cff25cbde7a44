//! Delivery of interrupts and exceptions: SDM vol. 3A chapter 6, vol. 2A INT.

use iced_x86::{Instruction, Mnemonic};

use super::descriptor::{Gate, index, system_type};
use super::far::Target;
use super::frame::Frame;
use super::mode::access;
use super::segments::{null_segment, real_segment};
use crate::cpu::{Cpu, fl, seg};
use crate::fault::{Exception, Exec, Raised, vector};
use crate::op::{Handler, Op};
use crate::regs::at;

/// What an event is to the gate it goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// INT n: the gate's privilege level counts, and IOPL in virtual-8086 mode.
    Int,
    /// INT3 and INTO: the gate's privilege level counts.
    Breakpoint,
    /// Everything that the program did not ask for, INT1 included.
    Event,
}

impl Source {
    /// The EXT bit of error codes that the delivery itself raises.
    fn ext(self) -> u32 {
        u32::from(self == Self::Event)
    }
}

/// Classes of exceptions for the double-fault rule, table 6-4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(number: u8) -> Class {
    match number {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What follows when delivering `first` raises `second` (table 6-5); `None` is shutdown.
fn combine(first: Exception, second: Exception) -> Option<Exception> {
    let double = Exception { vector: vector::DF, error: Some(0) };
    match (class(first.vector), class(second.vector)) {
        (_, Class::Benign) => Some(second),
        (Class::DoubleFault, _) => None,
        (Class::Contributory, Class::Contributory) => Some(double),
        (Class::PageFault, Class::Contributory | Class::PageFault) => Some(double),
        _ => Some(second),
    }
}

/// Whether the saved image of RFLAGS has RF set: faults, so that an instruction breakpoint does not hit again
/// (vol. 3B §18.3.1.1). #DB is left to its own rules.
fn sets_resume(number: u8) -> bool {
    !matches!(number, vector::DB | vector::NMI | vector::BP | vector::OF | vector::DF | 18)
}

/// Attempts after which an exception is given up for now: a handler of level 3 whose stack is misaligned raises one #AC
/// after the other.
const ATTEMPTS: u32 = 16;

impl Cpu {
    /// Delivers an exception with RIP as it is to be saved, whatever comes of it: double fault and shutdown included.
    pub(crate) fn deliver_exception(&mut self, exception: Exception) {
        let mut current = exception;
        self.raised = Raised::None;
        for _ in 0..ATTEMPTS {
            self.stats.exceptions += 1;
            if current.vector == vector::DB {
                // General detection is off in the handler (vol. 3B §18.2.4).
                self.dr7 &= !super::debug::dr7::GD;
            }
            let resume = if sets_resume(current.vector) { fl::RF } else { 0 };
            if self.deliver(current.vector, Source::Event, current.error, resume).is_ok() {
                return;
            }
            let second = match std::mem::replace(&mut self.raised, Raised::None) {
                Raised::Exception(second) => second,
                Raised::NonCanonical => Exception { vector: vector::GP, error: Some(0) },
                other => {
                    self.raised = other;
                    self.look = true;
                    return;
                }
            };
            match combine(current, second) {
                Some(next) => current = next,
                None => {
                    self.shutdown = true;
                    self.look = true;
                    return;
                }
            }
        }
        // No end in sight. The instruction will raise it again; until then others get their turn.
        self.look = true;
    }

    /// Delivers an external interrupt that the local APIC has given up.
    pub(crate) fn deliver_interrupt(&mut self, vector: u8) {
        self.deliver_benign(vector);
    }

    /// Delivers an NMI; others are blocked until IRET.
    pub(crate) fn deliver_nmi(&mut self) {
        self.nmi_blocked = true;
        self.deliver_benign(vector::NMI);
    }

    fn deliver_benign(&mut self, vector: u8) {
        if self.deliver(vector, Source::Event, None, 0).is_err() {
            match std::mem::replace(&mut self.raised, Raised::None) {
                Raised::Exception(e) => self.deliver_exception(e),
                Raised::NonCanonical => {
                    self.deliver_exception(Exception { vector: vector::GP, error: Some(0) })
                }
                other => self.raised = other,
            }
        }
    }

    /// One attempt. `resume` is or-ed into the saved RFLAGS. On `Err` nothing has changed but memory below the stack.
    pub(super) fn deliver(&mut self, vector: u8, source: Source, error: Option<u32>, resume: u64) -> Exec {
        let flags = self.rflags() | resume;
        if !self.mode.protected {
            self.deliver_real(vector, source)?;
        } else if self.mode.long {
            self.deliver_long(vector, source, error, flags)?;
        } else {
            self.deliver_protected(vector, source, error, flags)?;
        }
        self.sti_shadow = false;
        self.mov_ss_shadow = false;
        self.refresh_mode();
        Ok(())
    }

    /// Real mode: the table of far pointers, §20.1.4.
    fn deliver_real(&mut self, vector: u8, source: Source) -> Exec {
        let entry = u32::from(vector) * 4;
        if entry + 3 > u32::from(self.idtr.limit) {
            return Err(self.gp(u32::from(vector) << 3 | 2 | source.ext()));
        }
        let linear = self.system_linear(self.idtr.base.wrapping_add(u64::from(entry)));
        let pointer = self.read_system::<u32>(linear)?;
        let (selector, offset) = ((pointer >> 16) as u16, u64::from(pointer & 0xffff));
        let mut stack = Frame::current(self, 0);
        stack.push(self, 2, self.rflags())?;
        stack.push(self, 2, u64::from(self.segs[seg::CS].selector))?;
        stack.push(self, 2, self.rip)?;
        let cs = real_segment(&self.segs[seg::CS], selector);
        self.commit(&stack, fl::IF | fl::TF | fl::RF | fl::AC, Target { cs, rip: offset });
        Ok(())
    }

    fn commit(&mut self, stack: &Frame, cleared: u64, target: Target) {
        let sp = stack.pointer(self.regs.r64(at::RSP));
        self.regs.set64(at::RSP, sp);
        self.set_rflags(self.rflags() & !cleared);
        self.take(target);
    }

    /// What a gate clears in RFLAGS: interrupt gates IF as well (§6.12.1.3).
    fn cleared(interrupt_gate: bool) -> u64 {
        fl::TF | fl::NT | fl::RF | fl::VM | if interrupt_gate { fl::IF } else { 0 }
    }

    /// Protected and virtual-8086 mode.
    fn deliver_protected(&mut self, vector: u8, source: Source, error: Option<u32>, flags: u64) -> Exec {
        let ext = source.ext();
        if self.mode.v86 && source == Source::Int && self.iopl() < 3 {
            return Err(self.gp(0));
        }
        let gate_error = u32::from(vector) << 3 | 2 | ext;
        let entry = u32::from(vector) * 8;
        if entry + 7 > u32::from(self.idtr.limit) {
            return Err(self.gp(gate_error));
        }
        let linear = self.system_linear(self.idtr.base.wrapping_add(u64::from(entry)));
        let raw = self.read_system::<u64>(linear)?;
        let (kind, dpl) = ((raw >> 40) as u32 & 0x1f, (raw >> 45 & 3) as u8);
        let size = match kind {
            system_type::INTERRUPT_GATE16 | system_type::TRAP_GATE16 => 2,
            system_type::INTERRUPT_GATE | system_type::TRAP_GATE => 4,
            system_type::TASK_GATE => 0,
            _ => return Err(self.gp(gate_error)),
        };
        if source != Source::Event && dpl < self.mode.cpl {
            return Err(self.gp(gate_error));
        }
        if raw >> 47 & 1 == 0 {
            return Err(self.fault(vector::NP, gate_error));
        }
        let gate = Gate::new(raw, 0);
        if kind == system_type::TASK_GATE {
            return self.switch_task(gate.selector, true, ext);
        }
        let offset = if size == 2 { gate.offset & 0xffff } else { gate.offset };
        let code = self.code_descriptor(gate.selector, vector::GP, ext)?;
        let cpl = self.mode.cpl;
        let inner = !code.is_conforming() && code.dpl() < cpl;
        let reachable = if self.mode.v86 { inner && code.dpl() == 0 } else { code.dpl() <= cpl };
        if !reachable {
            return Err(self.gp(index(gate.selector) | ext));
        }
        let cleared =
            Self::cleared(matches!(kind, system_type::INTERRUPT_GATE16 | system_type::INTERRUPT_GATE));
        if !inner {
            let target = self.enter(&code, gate.selector, cpl, offset, ext)?;
            let mut stack = Frame::current(self, ext);
            self.push_return(&mut stack, size, flags, error)?;
            self.commit(&stack, cleared, target);
            return Ok(());
        }

        let level = code.dpl();
        let (ss_selector, sp) = self.tss_stack(level, ext)?;
        let ss = self.inner_stack_segment(ss_selector, level, ext)?;
        let target = self.enter(&code, gate.selector, level, offset, ext)?;
        let mut stack = Frame::inner(ss, sp, index(ss_selector) | ext);
        if self.mode.v86 {
            for register in [seg::GS, seg::FS, seg::DS, seg::ES] {
                stack.push(self, size, u64::from(self.segs[register].selector))?;
            }
        }
        stack.push(self, size, u64::from(self.segs[seg::SS].selector))?;
        stack.push(self, size, self.regs.r64(at::RSP))?;
        self.push_return(&mut stack, size, flags, error)?;
        if self.mode.v86 {
            for register in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.segs[register] = null_segment(0, 0);
            }
        }
        self.segs[seg::SS] = ss;
        self.commit(&stack, cleared, target);
        Ok(())
    }

    /// RFLAGS, CS, RIP, and the error code if there is one.
    fn push_return(&mut self, stack: &mut Frame, size: u64, flags: u64, error: Option<u32>) -> Exec {
        stack.push(self, size, flags)?;
        stack.push(self, size, u64::from(self.segs[seg::CS].selector))?;
        stack.push(self, size, self.rip)?;
        match error {
            Some(error) => stack.push(self, size, u64::from(error)),
            None => Ok(()),
        }
    }

    /// IA-32e mode, §6.14.
    fn deliver_long(&mut self, vector: u8, source: Source, error: Option<u32>, flags: u64) -> Exec {
        let ext = source.ext();
        let gate_error = u32::from(vector) << 3 | 2 | ext;
        let entry = u32::from(vector) * 16;
        if entry + 15 > u32::from(self.idtr.limit) {
            return Err(self.gp(gate_error));
        }
        let linear = self.idtr.base.wrapping_add(u64::from(entry));
        let raw = self.read_table(linear)?;
        let high = self.read_table(linear.wrapping_add(8))?;
        let (kind, dpl) = ((raw >> 40) as u32 & 0x1f, (raw >> 45 & 3) as u8);
        let known = matches!(kind, system_type::INTERRUPT_GATE | system_type::TRAP_GATE);
        if !known || source != Source::Event && dpl < self.mode.cpl {
            return Err(self.gp(gate_error));
        }
        if raw >> 47 & 1 == 0 {
            return Err(self.fault(vector::NP, gate_error));
        }
        let gate = Gate::new(raw, high);
        let code = self.code_descriptor(gate.selector, vector::GP, ext)?;
        let wide = code.access() & (access::L | access::DB) == access::L;
        if code.dpl() > self.mode.cpl || !wide {
            return Err(self.gp(index(gate.selector) | ext));
        }
        let old_cpl = self.mode.cpl;
        let inner = !code.is_conforming() && code.dpl() < old_cpl;
        let cpl = if inner { code.dpl() } else { old_cpl };
        let target = self.enter(&code, gate.selector, cpl, gate.offset, ext)?;

        let ist = u32::from(gate.count & 7);
        let (old_ss, old_sp) = (self.segs[seg::SS], self.regs.r64(at::RSP));
        let sp = match ist {
            0 if inner => self.tss_stack64(u32::from(cpl), ext)?,
            0 => old_sp,
            _ => self.tss_stack64(3 + ist, ext)?,
        };
        let mut stack = Frame::wide(sp & !15, inner, ext);
        stack.push(self, 8, u64::from(old_ss.selector))?;
        stack.push(self, 8, old_sp)?;
        self.push_return(&mut stack, 8, flags, error)?;
        if inner {
            self.segs[seg::SS] = null_segment(u16::from(cpl), cpl);
        }
        self.commit(&stack, Self::cleared(kind == system_type::INTERRUPT_GATE), target);
        Ok(())
    }
}

impl Cpu {
    /// INT n and its like. They clear TF: no single-step trap follows them (SDM vol. 3B §17.3.1.4).
    fn interrupt(&mut self, vector: u8, source: Source) -> Exec {
        self.deliver(vector, source, None, 0)?;
        self.stepping = false;
        Ok(())
    }
}

pub(super) fn select(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Int => {
            op.imm = u64::from(insn.immediate8());
            |cpu, op| cpu.interrupt(op.imm as u8, Source::Int)
        }
        Mnemonic::Int3 => |cpu, _| cpu.interrupt(vector::BP, Source::Breakpoint),
        Mnemonic::Int1 => |cpu, _| cpu.interrupt(vector::DB, Source::Event),
        Mnemonic::Into => |cpu, _| match cpu.rflags() & fl::OF {
            0 => Ok(()),
            _ => cpu.interrupt(vector::OF, Source::Breakpoint),
        },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_6_5() {
        let e = |vector| Exception { vector, error: None };
        let after = |first, second| combine(e(first), e(second)).map(|e| e.vector);
        for contributory in [0, 10, 11, 12, 13] {
            assert_eq!(after(contributory, 13), Some(8));
            assert_eq!(
                after(contributory, 14),
                Some(14),
                "a page fault behind a contributory one is served alone"
            );
            assert_eq!(after(14, contributory), Some(8));
            assert_eq!(after(3, contributory), Some(contributory));
            assert_eq!(after(8, contributory), None);
        }
        assert_eq!(after(14, 14), Some(8));
        assert_eq!(after(8, 14), None);
        assert_eq!(after(6, 14), Some(14));
        assert_eq!(after(14, 1), Some(1));
    }
}
