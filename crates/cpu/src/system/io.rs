//! IN and OUT, and the permission to use them: SDM vol. 1 chapter 19.

use iced_x86::{Code, Instruction};

use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};
use crate::regs::{Word, at};

impl Cpu {
    /// #GP(0) unless IOPL or the TSS's bitmap allow `size` bytes at `port`.
    pub(crate) fn io_allowed(&mut self, port: u16, size: u8) -> Exec {
        let free = !self.mode.protected || !self.mode.v86 && self.mode.cpl <= self.iopl();
        if !free {
            let allowed = self.tss_permits_io(port, size);
            if !self.table_fault(allowed)? {
                return Err(self.gp(0));
            }
        }
        self.io_breakpoints(port, size);
        Ok(())
    }
}

pub(super) fn select(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match insn.code() {
        Code::In_AL_imm8
        | Code::In_AX_imm8
        | Code::In_EAX_imm8
        | Code::Out_imm8_AL
        | Code::Out_imm8_AX
        | Code::Out_imm8_EAX => {
            op.imm = u64::from(insn.immediate8());
            match insn.code() {
                Code::In_AL_imm8 => |cpu, op| input::<u8>(cpu, op.imm as u16),
                Code::In_AX_imm8 => |cpu, op| input::<u16>(cpu, op.imm as u16),
                Code::In_EAX_imm8 => |cpu, op| input::<u32>(cpu, op.imm as u16),
                Code::Out_imm8_AL => |cpu, op| output::<u8>(cpu, op.imm as u16),
                Code::Out_imm8_AX => |cpu, op| output::<u16>(cpu, op.imm as u16),
                _ => |cpu, op| output::<u32>(cpu, op.imm as u16),
            }
        }
        Code::In_AL_DX => |cpu, _| input::<u8>(cpu, dx(cpu)),
        Code::In_AX_DX => |cpu, _| input::<u16>(cpu, dx(cpu)),
        Code::In_EAX_DX => |cpu, _| input::<u32>(cpu, dx(cpu)),
        Code::Out_DX_AL => |cpu, _| output::<u8>(cpu, dx(cpu)),
        Code::Out_DX_AX => |cpu, _| output::<u16>(cpu, dx(cpu)),
        Code::Out_DX_EAX => |cpu, _| output::<u32>(cpu, dx(cpu)),
        _ => return None,
    })
}

fn dx(cpu: &Cpu) -> u16 {
    cpu.regs.get::<u16>(at::RDX)
}

fn input<T: Word>(cpu: &mut Cpu, port: u16) -> Exec {
    let size = size_of::<T>() as u8;
    cpu.io_allowed(port, size)?;
    cpu.stats.port_io += 1;
    let value = cpu.io().port_read(port, size);
    cpu.regs.set(at::RAX, T::of(u64::from(value)));
    Ok(())
}

fn output<T: Word>(cpu: &mut Cpu, port: u16) -> Exec {
    let size = size_of::<T>() as u8;
    cpu.io_allowed(port, size)?;
    cpu.stats.port_io += 1;
    let value = cpu.regs.get::<T>(at::RAX).to_u64() as u32;
    let flow = cpu.io().port_write(port, size, value);
    cpu.after_io(flow);
    Ok(())
}
