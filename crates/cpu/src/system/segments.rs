//! Segment registers: MOV, PUSH, POP, LDS to LSS, the FS and GS bases, SWAPGS.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use skep_hv::state::Segment;

use super::descriptor::{index, is_null};
use super::mode::access;
use crate::cpu::{Cpu, cr4, seg};
use crate::fault::{Exec, vector};
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::at;

/// A segment register that a null selector was loaded into. For SS the privilege level stays.
pub(super) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment { selector, base: 0, limit: 0, access: Segment::UNUSABLE | u32::from(dpl) << access::DPL_SHIFT }
}

impl Cpu {
    /// Loads a segment register other than CS as MOV does. After loading SS the caller brings the mode up to date.
    pub(super) fn load_segment(&mut self, register: usize, selector: u16) -> Exec {
        self.segs[register] = if !self.mode.protected {
            real_segment(&self.segs[register], selector)
        } else if self.mode.v86 {
            v86_segment(selector)
        } else if register == seg::SS {
            self.stack_segment(selector)?
        } else {
            self.data_segment(selector)?
        };
        Ok(())
    }

    /// SDM vol. 2B, MOV: loading SS.
    fn stack_segment(&mut self, selector: u16) -> Exec<Segment> {
        let cpl = self.mode.cpl;
        let rpl = (selector & 3) as u8;
        if is_null(selector) {
            // 64-bit mode has no use for a stack segment, but at level 3.
            if self.is_64bit() && cpl < 3 && rpl == cpl {
                return Ok(null_segment(selector, cpl));
            }
            return Err(self.gp(0));
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        if rpl != cpl || descriptor.dpl() != cpl || !descriptor.is_data() || !descriptor.rw() {
            return Err(self.gp(index(selector)));
        }
        if !descriptor.present() {
            return Err(self.fault(vector::SS, index(selector)));
        }
        self.mark_accessed(&descriptor, selector)
    }

    /// Loading DS, ES, FS, GS.
    fn data_segment(&mut self, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Ok(null_segment(selector, 0));
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        let readable = descriptor.is_data() || descriptor.is_code() && descriptor.rw();
        let privileged = descriptor.is_conforming()
            || (selector & 3) as u8 <= descriptor.dpl() && self.mode.cpl <= descriptor.dpl();
        if !readable || !privileged {
            return Err(self.gp(index(selector)));
        }
        if !descriptor.present() {
            return Err(self.fault(vector::NP, index(selector)));
        }
        self.mark_accessed(&descriptor, selector)
    }
}

/// Real mode replaces selector and base; limit and attributes stay ("unreal mode" rests on that).
pub(super) fn real_segment(old: &Segment, selector: u16) -> Segment {
    let (limit, rights) = if old.access & Segment::UNUSABLE != 0 {
        (0xffff, access::DATA)
    } else {
        (old.limit, old.access & !access::DPL | access::PRESENT | access::S)
    };
    Segment { selector, base: u64::from(selector) << 4, limit, access: rights }
}

/// Virtual-8086 mode: 64 KiB, level 3.
pub(super) fn v86_segment(selector: u16) -> Segment {
    Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, access: access::DATA | access::DPL }
}

pub(super) fn select(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let segment = |i: u32| {
        let register =
            (i < insn.op_count() && insn.op_kind(i) == OpKind::Register).then(|| insn.op_register(i))?;
        register.is_segment_register().then(|| register.number() as u8)
    };
    Some(match insn.mnemonic() {
        Mnemonic::Mov => {
            if let Some(from) = segment(1) {
                op.src = from;
                match (insn.op0_kind(), insn.op0_register().size()) {
                    (OpKind::Memory, _) => store_m,
                    (_, 2) => store_r::<u16>,
                    (_, 4) => store_r::<u32>,
                    _ => store_r::<u64>,
                }
            } else {
                op.dst = segment(0).filter(|&to| usize::from(to) != seg::CS)?;
                if insn.op1_kind() == OpKind::Memory { load_m } else { load_r }
            }
        }
        Mnemonic::Push => {
            op.src = segment(0)?;
            match op.osize() {
                2 => push::<u16>,
                4 => push_32,
                _ => push::<u64>,
            }
        }
        Mnemonic::Pop => {
            op.dst = segment(0).filter(|&to| usize::from(to) != seg::CS)?;
            match op.osize() {
                2 => pop::<u16>,
                4 => pop::<u32>,
                _ => pop::<u64>,
            }
        }
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
            op.src = match insn.mnemonic() {
                Mnemonic::Lds => seg::DS,
                Mnemonic::Les => seg::ES,
                Mnemonic::Lfs => seg::FS,
                Mnemonic::Lgs => seg::GS,
                _ => seg::SS,
            } as u8;
            match insn.op0_register().size() {
                2 => load_far::<u16>,
                4 => load_far::<u32>,
                _ => load_far::<u64>,
            }
        }
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => {
            op.src = if insn.mnemonic() == Mnemonic::Rdfsbase { seg::FS } else { seg::GS } as u8;
            if wide(insn) { read_base::<u64> } else { read_base::<u32> }
        }
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            op.src = if insn.mnemonic() == Mnemonic::Wrfsbase { seg::FS } else { seg::GS } as u8;
            if wide(insn) { write_base::<u64> } else { write_base::<u32> }
        }
        Mnemonic::Swapgs => swapgs,
        _ => return None,
    })
}

fn wide(insn: &Instruction) -> bool {
    insn.op0_register() != Register::None && insn.op0_register().size() == 8
}

fn store_r<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.segs[usize::from(op.src)].selector;
    cpu.regs.set(op.dst, T::of(u64::from(selector)));
    Ok(())
}

fn store_m(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.segs[usize::from(op.src)].selector;
    let linear = cpu.linear(op, 2, Access::Write)?;
    cpu.write(linear, selector)
}

fn load_r(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.regs.get::<u16>(op.src);
    load(cpu, usize::from(op.dst), selector)
}

fn load_m(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, 2, Access::Read)?;
    let selector = cpu.read::<u16>(linear)?;
    load(cpu, usize::from(op.dst), selector)
}

fn load(cpu: &mut Cpu, register: usize, selector: u16) -> Exec {
    cpu.load_segment(register, selector)?;
    if register == seg::SS {
        inhibit(cpu);
    }
    Ok(())
}

/// Nothing comes between a load of SS by MOV or POP and the next instruction.
fn inhibit(cpu: &mut Cpu) {
    cpu.mov_ss_shadow = true;
    cpu.look = true;
    cpu.refresh_mode();
}

fn push<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.segs[usize::from(op.src)].selector;
    cpu.push(T::of(u64::from(selector)))
}

/// A 32-bit push of a segment register writes 16 bits (SDM vol. 2B, PUSH).
fn push_32(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.segs[usize::from(op.src)].selector;
    let sp = cpu.regs.r64(at::RSP).wrapping_sub(4) & cpu.mode.stack_mask;
    let linear = cpu.seg_linear(seg::SS, sp, 4, Access::Write)?;
    cpu.write(linear, selector)?;
    cpu.drop_stack(4u64.wrapping_neg());
    Ok(())
}

fn pop<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.peek::<T>(0)?.to_u64() as u16;
    let register = usize::from(op.dst);
    cpu.load_segment(register, selector)?;
    // The stack pointer still has the width of the stack it pointed into.
    cpu.drop_stack(size_of::<T>() as u64);
    if register == seg::SS {
        inhibit(cpu);
    }
    Ok(())
}

/// Offset first, selector behind it.
fn load_far<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let size = size_of::<T>() as u64;
    let linear = cpu.linear(op, size + 2, Access::Read)?;
    let offset = cpu.read::<T>(linear)?;
    let selector = cpu.read::<u16>(linear.wrapping_add(size))?;
    let register = usize::from(op.src);
    cpu.load_segment(register, selector)?;
    if register == seg::SS {
        cpu.refresh_mode();
    }
    cpu.regs.set(op.dst, offset);
    Ok(())
}

fn read_base<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(cpu.ud());
    }
    let base = cpu.segs[usize::from(op.src)].base;
    cpu.regs.set(op.dst, T::of(base));
    Ok(())
}

fn write_base<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(cpu.ud());
    }
    let base = cpu.regs.get::<T>(op.dst).to_u64();
    if !cpu.canonical(base) {
        return Err(cpu.gp(0));
    }
    cpu.segs[usize::from(op.src)].base = base;
    Ok(())
}

fn swapgs(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()?;
    std::mem::swap(&mut cpu.segs[seg::GS].base, &mut cpu.msrs.kernel_gs_base);
    Ok(())
}
