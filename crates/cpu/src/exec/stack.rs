//! The stack: PUSH, POP, PUSHA, POPA, ENTER, LEAVE.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Form, Shape};
use crate::cpu::{CodeSize, Cpu, seg};
use crate::fault::{Exec, Raised, vector};
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::at;

impl Cpu {
    /// Linear address of the stack `offset` bytes from the top.
    #[inline(always)]
    fn stack(&mut self, offset: u64, size: u64, access: Access) -> Exec<u64> {
        let sp = self.regs.r64(at::RSP).wrapping_add(offset);
        if self.mode.code == CodeSize::Bits64 {
            Ok(sp)
        } else {
            let mask = self.mode.stack_mask;
            self.seg_linear(seg::SS, sp & mask, size, access)
        }
    }

    /// Pushes; the stack pointer moves only if the write succeeds.
    #[inline(always)]
    pub(crate) fn push<T: MemWord>(&mut self, value: T) -> Exec {
        let size = size_of::<T>() as u64;
        let linear = self.stack(size.wrapping_neg(), size, Access::Write)?;
        let done = self.write(linear, value);
        self.settle_stack(done)?;
        self.drop_stack(size.wrapping_neg());
        Ok(())
    }

    /// Pops.
    #[inline(always)]
    pub(crate) fn pop<T: MemWord>(&mut self) -> Exec<T> {
        let value = self.peek::<T>(0)?;
        self.drop_stack(size_of::<T>() as u64);
        Ok(value)
    }

    /// Reads what lies `offset` bytes from the top.
    #[inline(always)]
    pub(crate) fn peek<T: MemWord>(&mut self, offset: u64) -> Exec<T> {
        let linear = self.stack(offset, size_of::<T>() as u64, Access::Read)?;
        let done = self.read(linear);
        self.settle_stack(done)
    }

    /// A stack address that is not canonical is #SS, wherever an instruction's own operand lies.
    #[inline(always)]
    fn settle_stack<T>(&mut self, done: Exec<T>) -> Exec<T> {
        if done.is_err() && self.raised == Raised::NonCanonical {
            return Err(self.fault(vector::SS, 0));
        }
        done
    }

    /// Moves the stack pointer up (or down: wrapping) within its size.
    #[inline(always)]
    pub(crate) fn drop_stack(&mut self, bytes: u64) {
        let (old, mask) = (self.regs.r64(at::RSP), self.mode.stack_mask);
        let new = old.wrapping_add(bytes) & mask;
        // A 16-bit stack pointer leaves the rest of ESP alone.
        self.regs.set64(at::RSP, if mask == 0xffff { old & !mask | new } else { new });
    }
}

/// `f::<T>` for the operand size of a stack instruction.
macro_rules! by_width {
    ($op:expr, $f:ident) => {
        match $op.osize() {
            2 => $f::<u16> as Handler,
            4 => $f::<u32>,
            _ => $f::<u64>,
        }
    };
}

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    let segment = insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register();
    Some(match insn.mnemonic() {
        Mnemonic::Push if segment => return None,
        Mnemonic::Pop if segment => return None,
        Mnemonic::Push => match form.shape {
            Shape::R => by_width!(op, push_r),
            Shape::M => by_width!(op, push_m),
            _ => by_width!(op, push_i),
        },
        Mnemonic::Pop => match form.shape {
            Shape::R => by_width!(op, pop_r),
            _ => by_width!(op, pop_m),
        },
        Mnemonic::Pusha => pusha::<u16>,
        Mnemonic::Pushad => pusha::<u32>,
        Mnemonic::Popa => popa::<u16>,
        Mnemonic::Popad => popa::<u32>,
        Mnemonic::Leave => by_width!(op, leave),
        Mnemonic::Enter => {
            op.imm = insn.immediate(0) & 0xffff | (insn.immediate(1) & 31) << 16;
            by_width!(op, enter)
        }
        _ => return None,
    })
}

fn push_r<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.regs.get::<T>(op.dst);
    cpu.push(value)
}

fn push_i<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.push(T::of(op.imm))
}

fn push_m<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, size_of::<T>() as u64, Access::Read)?;
    let value = cpu.read::<T>(linear)?;
    cpu.push(value)
}

fn pop_r<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.pop::<T>()?;
    cpu.regs.set(op.dst, value);
    Ok(())
}

/// The address is computed after the stack pointer has moved (SDM vol. 2B, POP).
fn pop_m<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.peek::<T>(0)?;
    let size = size_of::<T>() as u64;
    let old = cpu.regs.r64(at::RSP);
    cpu.drop_stack(size);
    let done = match cpu.linear(op, size, Access::Write) {
        Ok(linear) => cpu.write(linear, value),
        Err(abort) => Err(abort),
    };
    if done.is_err() {
        cpu.regs.set64(at::RSP, old);
    }
    done
}

fn pusha<T: MemWord>(cpu: &mut Cpu, _: &Op) -> Exec {
    let size = size_of::<T>() as u64;
    for slot in 1..=8u64 {
        cpu.stack((slot * size).wrapping_neg(), size, Access::Write)?;
    }
    let values: [T; 8] = std::array::from_fn(|i| T::of(cpu.regs.gpr(i)));
    let lowest = cpu.stack((8 * size).wrapping_neg(), size, Access::Write)?;
    cpu.probe(lowest, 8 * size, Access::Write)?;
    for value in values {
        cpu.push(value)?;
    }
    Ok(())
}

fn popa<T: MemWord>(cpu: &mut Cpu, _: &Op) -> Exec {
    let size = size_of::<T>() as u64;
    let mut values = [T::default(); 8];
    for (slot, value) in values.iter_mut().enumerate() {
        *value = cpu.peek(slot as u64 * size)?;
    }
    // DI SI BP (SP is skipped) BX DX CX AX lie upwards.
    for (slot, value) in values.into_iter().enumerate() {
        if slot != 3 {
            cpu.regs.set((7 - slot as u8) * 8, value);
        }
    }
    cpu.drop_stack(8 * size);
    Ok(())
}

fn leave<T: MemWord>(cpu: &mut Cpu, _: &Op) -> Exec {
    let (old, mask) = (cpu.regs.r64(at::RSP), cpu.mode.stack_mask);
    let frame = cpu.regs.r64(at::RBP) & mask;
    cpu.regs.set64(at::RSP, if mask == 0xffff { old & !mask | frame } else { frame });
    match cpu.pop::<T>() {
        Ok(value) => {
            cpu.regs.set(at::RBP, value);
            Ok(())
        }
        Err(abort) => {
            cpu.regs.set64(at::RSP, old);
            Err(abort)
        }
    }
}

fn enter<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let old = cpu.regs.r64(at::RSP);
    let done = enter_frame::<T>(cpu, op.imm & 0xffff, op.imm >> 16);
    if done.is_err() {
        cpu.regs.set64(at::RSP, old);
    }
    done
}

fn enter_frame<T: MemWord>(cpu: &mut Cpu, bytes: u64, level: u64) -> Exec {
    let size = size_of::<T>() as u64;
    let frame_pointer = cpu.regs.get::<T>(at::RBP);
    cpu.push(frame_pointer)?;
    let frame = cpu.regs.r64(at::RSP);
    let mask = cpu.mode.stack_mask;
    for i in 1..level {
        let from = cpu.regs.r64(at::RBP).wrapping_sub(i * size) & mask;
        let linear = cpu.seg_linear(seg::SS, from, size, Access::Read)?;
        let value = cpu.read::<T>(linear)?;
        cpu.push(value)?;
    }
    if level > 0 {
        cpu.push(T::of(frame))?;
    }
    cpu.drop_stack(bytes.wrapping_neg());
    // The new top must be writable.
    let top = cpu.stack(0, size, Access::Write)?;
    cpu.check_alignment(top, size)?;
    cpu.probe(top, size, Access::Write)?;
    cpu.regs.set(at::RBP, T::of(frame));
    Ok(())
}
