//! Decimal adjustment and BOUND: instructions of 16- and 32-bit code only (SDM vol. 2A, #UD in 64-bit mode, which decode
//! sees to). Flags that the manual leaves undefined come from the adjusting addition or subtraction.

use iced_x86::{Instruction, Mnemonic};

use super::Form;
use crate::alu::{AluWord, rflags_to_status, st, status_to_rflags};
use crate::cpu::{Cpu, fl};
use crate::fault::{Exec, vector};
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::at;

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Aaa => |cpu, _| ascii(cpu, u16::add),
        Mnemonic::Aas => |cpu, _| ascii(cpu, u16::sub),
        Mnemonic::Daa => |cpu, _| decimal(cpu, u8::add),
        Mnemonic::Das => |cpu, _| decimal(cpu, u8::sub),
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        Mnemonic::Bound => {
            let _ = op;
            if form.size == 2 { bound::<u16> } else { bound::<u32> }
        }
        _ => return None,
    })
}

fn flag(cpu: &Cpu, flag: u64) -> bool {
    status_to_rflags(cpu.status) & flag != 0
}

/// AAA and AAS: AX is adjusted by 0x106 if the low digit left its range.
fn ascii(cpu: &mut Cpu, adjust: fn(u16, u16, &mut u16) -> u16) -> Exec {
    let ax = cpu.regs.get::<u16>(at::RAX);
    let carry = ax & 0xf > 9 || flag(cpu, fl::AF);
    let mut status = cpu.status;
    let result = adjust(ax, if carry { 0x106 } else { 0 }, &mut status) & 0xff0f;
    cpu.regs.set(at::RAX, result);
    let flags = status_to_rflags(status) & !(fl::AF | fl::CF);
    cpu.status = rflags_to_status(flags | if carry { fl::AF | fl::CF } else { 0 });
    Ok(())
}

/// DAA and DAS.
fn decimal(cpu: &mut Cpu, adjust: fn(u8, u8, &mut u16) -> u8) -> Exec {
    let al = cpu.regs.get::<u8>(at::RAX);
    let (old_carry, half) = (flag(cpu, fl::CF), al & 0xf > 9 || flag(cpu, fl::AF));
    let mut status = cpu.status;
    let mut result = al;
    let mut carry = old_carry || al > 0x99;
    if half {
        result = adjust(result, 6, &mut status);
        // DAS borrows out of the whole byte here already.
        carry |= status & st::CF != 0 && al < 6;
    }
    if old_carry || al > 0x99 {
        result = adjust(result, 0x60, &mut status);
    }
    cpu.regs.set(at::RAX, result);
    u8::or(result, 0, &mut status);
    let flags = status_to_rflags(status) & !(fl::AF | fl::CF);
    let set = if half { fl::AF } else { 0 } | if carry { fl::CF } else { 0 };
    cpu.status = rflags_to_status(flags | set);
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Exec {
    let (al, base) = (cpu.regs.get::<u8>(at::RAX), op.imm as u8);
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(cpu.trap(vector::DE));
    };
    cpu.regs.set(at::RAX, u16::from(high) << 8 | u16::from(low));
    u8::or(low, 0, &mut cpu.status);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Exec {
    let ax = cpu.regs.get::<u16>(at::RAX);
    let product = ((ax >> 8) as u8).wrapping_mul(op.imm as u8);
    let result = u8::add(ax as u8, product, &mut cpu.status);
    cpu.regs.set(at::RAX, u16::from(result));
    Ok(())
}

/// #BR if the register is outside of the two bounds in memory.
fn bound<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let size = size_of::<T>() as u64;
    let linear = cpu.linear(op, 2 * size, Access::Read)?;
    let (lower, upper) = (cpu.read::<T>(linear)?, cpu.read::<T>(linear.wrapping_add(size))?);
    let index = cpu.regs.get::<T>(op.dst).to_i64();
    if index < lower.to_i64() || index > upper.to_i64() { Err(cpu.trap(vector::BR)) } else { Ok(()) }
}
