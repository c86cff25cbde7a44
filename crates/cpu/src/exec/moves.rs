//! MOV and its relatives: MOVZX, MOVSX, LEA, CMOVcc, SETcc, XLAT, BSWAP, sign extension in the accumulator, NOP.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::Addressing;
use super::{Form, Shape, addressed, conditional, sized, wide};
use crate::alu::condition;
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::{Word, at};

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    let size = form.size;
    Some(match insn.mnemonic() {
        Mnemonic::Mov => {
            let general = |i: u32| insn.op_kind(i) != OpKind::Register || insn.op_register(i).is_gpr();
            if !(general(0) && general(1)) {
                return None;
            }
            match form.shape {
                Shape::RR => sized!(size, rr[][]),
                Shape::RI => sized!(size, ri[][]),
                Shape::RM => addressed!(form.flat, sized, size, rm[]),
                Shape::MR => addressed!(form.flat, sized, size, mr[]),
                Shape::MI => addressed!(form.flat, sized, size, mi[]),
                _ => return None,
            }
        }
        Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => extend(insn, form)?,
        Mnemonic::Lea => wide!(size, lea[][]),
        Mnemonic::Nop | Mnemonic::Endbr32 | Mnemonic::Endbr64 | Mnemonic::Rdsspd | Mnemonic::Rdsspq => {
            |_, _| Ok(())
        }
        Mnemonic::Cbw => |cpu, _| widen::<u8, u16>(cpu),
        Mnemonic::Cwde => |cpu, _| widen::<u16, u32>(cpu),
        Mnemonic::Cdqe => |cpu, _| widen::<u32, u64>(cpu),
        Mnemonic::Cwd => |cpu, _| sign::<u16>(cpu),
        Mnemonic::Cdq => |cpu, _| sign::<u32>(cpu),
        Mnemonic::Cqo => |cpu, _| sign::<u64>(cpu),
        Mnemonic::Bswap => match size {
            8 => |cpu, op| {
                let value = cpu.regs.r64(op.dst).swap_bytes();
                cpu.regs.set64(op.dst, value);
                Ok(())
            },
            4 => |cpu, op| {
                let value = cpu.regs.get::<u32>(op.dst).swap_bytes();
                cpu.regs.set(op.dst, value);
                Ok(())
            },
            // Undefined by the manual; every processor clears the register.
            _ => |cpu, op| {
                cpu.regs.set(op.dst, 0u16);
                Ok(())
            },
        },
        Mnemonic::Xlatb => xlat,
        mnemonic => {
            if let Some(cc) = cmov(mnemonic) {
                match (form.shape, size, form.flat) {
                    (Shape::RR, 2, _) => conditional!(cc, cmov_rr[u16]),
                    (Shape::RR, 4, _) => conditional!(cc, cmov_rr[u32]),
                    (Shape::RR, ..) => conditional!(cc, cmov_rr[u64]),
                    (Shape::RM, 2, _) => conditional!(cc, cmov_rm[u16, super::address::General]),
                    (Shape::RM, 4, true) => conditional!(cc, cmov_rm[u32, super::address::Flat]),
                    (Shape::RM, 8, true) => conditional!(cc, cmov_rm[u64, super::address::Flat]),
                    (Shape::RM, 4, false) => conditional!(cc, cmov_rm[u32, super::address::General]),
                    (Shape::RM, ..) => conditional!(cc, cmov_rm[u64, super::address::General]),
                    _ => return None,
                }
            } else {
                let cc = setcc(mnemonic)?;
                let _ = op;
                if form.shape == Shape::R { conditional!(cc, set_r[]) } else { conditional!(cc, set_m[]) }
            }
        }
    })
}

macro_rules! by_condition {
    ($name:ident: $($m:ident)*) => {
        /// Condition code of the mnemonic.
        fn $name(mnemonic: Mnemonic) -> Option<u8> {
            [$(Mnemonic::$m),*].iter().position(|&m| m == mnemonic).map(|cc| cc as u8)
        }
    };
}
by_condition!(cmov: Cmovo Cmovno Cmovb Cmovae Cmove Cmovne Cmovbe Cmova Cmovs Cmovns Cmovp Cmovnp Cmovl Cmovge Cmovle Cmovg);
by_condition!(setcc: Seto Setno Setb Setae Sete Setne Setbe Seta Sets Setns Setp Setnp Setl Setge Setle Setg);

fn rr<T: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.regs.get::<T>(op.src);
    cpu.regs.set(op.dst, value);
    Ok(())
}

fn ri<T: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.regs.set(op.dst, T::of(op.imm));
    Ok(())
}

fn rm<T: MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Read)?;
    let value = cpu.read::<T>(linear)?;
    cpu.regs.set(op.dst, value);
    Ok(())
}

fn mr<T: MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Write)?;
    let value = cpu.regs.get::<T>(op.src);
    cpu.write(linear, value)
}

fn mi<T: MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Write)?;
    cpu.write(linear, T::of(op.imm))
}

fn lea<T: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let offset = cpu.offset(op);
    cpu.regs.set(op.dst, T::of(offset));
    Ok(())
}

/// Source width S to destination width D.
fn extend(insn: &Instruction, form: Form) -> Option<Handler> {
    let signed = insn.mnemonic() != Mnemonic::Movzx;
    let memory = form.shape == Shape::RM;
    let from = if memory { insn.memory_size().size() } else { insn.op_register(1).size() };
    macro_rules! pick {
        ($($s:literal $S:ty, $d:literal $D:ty;)*) => {
            match (from, form.size, signed, memory) {
                $(($s, $d, false, false) => extend_r::<$S, $D, false> as Handler,
                ($s, $d, true, false) => extend_r::<$S, $D, true>,
                ($s, $d, false, true) if form.flat => extend_m::<$S, $D, false, super::address::Flat>,
                ($s, $d, true, true) if form.flat => extend_m::<$S, $D, true, super::address::Flat>,
                ($s, $d, false, true) => extend_m::<$S, $D, false, super::address::General>,
                ($s, $d, true, true) => extend_m::<$S, $D, true, super::address::General>,)*
                _ => return None,
            }
        };
    }
    Some(pick! {
        1 u8, 2 u16; 1 u8, 4 u32; 1 u8, 8 u64;
        2 u16, 2 u16; 2 u16, 4 u32; 2 u16, 8 u64;
        4 u32, 4 u32; 4 u32, 8 u64;
    })
}

#[inline(always)]
fn extended<S: Word, D: Word, const SIGNED: bool>(value: S) -> D {
    D::of(if SIGNED { value.to_i64() as u64 } else { value.to_u64() })
}

fn extend_r<S: Word, D: Word, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.regs.get::<S>(op.src);
    cpu.regs.set(op.dst, extended::<S, D, SIGNED>(value));
    Ok(())
}

fn extend_m<S: MemWord, D: Word, const SIGNED: bool, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, size_of::<S>() as u64, Access::Read)?;
    let value = cpu.read::<S>(linear)?;
    cpu.regs.set(op.dst, extended::<S, D, SIGNED>(value));
    Ok(())
}

/// CBW, CWDE, CDQE.
fn widen<S: Word, D: Word>(cpu: &mut Cpu) -> Exec {
    let value = cpu.regs.get::<S>(at::RAX);
    cpu.regs.set(at::RAX, extended::<S, D, true>(value));
    Ok(())
}

/// CWD, CDQ, CQO.
fn sign<T: Word>(cpu: &mut Cpu) -> Exec {
    let value = cpu.regs.get::<T>(at::RAX).to_i64() >> 63;
    cpu.regs.set(at::RDX, T::of(value as u64));
    Ok(())
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Exec {
    let offset = cpu.regs.r64(at::RBX).wrapping_add(u64::from(cpu.regs.get::<u8>(at::RAX))) & op.amask();
    let linear = cpu.seg_linear(op.seg as usize, offset, 1, Access::Read)?;
    let value = cpu.read::<u8>(linear)?;
    cpu.regs.set(at::RAX, value);
    Ok(())
}

fn cmov_rr<const CC: u8, T: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    // A 32-bit destination loses its upper half even if the condition is false.
    let from = if condition::<CC>(cpu.status) { op.src } else { op.dst };
    let value = cpu.regs.get::<T>(from);
    cpu.regs.set(op.dst, value);
    Ok(())
}

fn cmov_rm<const CC: u8, T: MemWord, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, size_of::<T>() as u64, Access::Read)?;
    let loaded = cpu.read::<T>(linear)?;
    let value = if condition::<CC>(cpu.status) { loaded } else { cpu.regs.get::<T>(op.dst) };
    cpu.regs.set(op.dst, value);
    Ok(())
}

fn set_r<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = u8::from(condition::<CC>(cpu.status));
    cpu.regs.set(op.dst, value);
    Ok(())
}

fn set_m<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, 1, Access::Write)?;
    let value = u8::from(condition::<CC>(cpu.status));
    cpu.write(linear, value)
}
