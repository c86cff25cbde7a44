//! HLT, PAUSE, and instructions that are there only to be refused.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Hlt => halt,
        Mnemonic::Pause => |_, _| {
            std::hint::spin_loop();
            Ok(())
        },
        Mnemonic::Ud0
        | Mnemonic::Ud1
        | Mnemonic::Ud2
        | Mnemonic::Rsm
        | Mnemonic::Monitor
        | Mnemonic::Mwait => |cpu, _| Err(cpu.ud()),
        _ => return None,
    })
}

fn halt(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()?;
    // Whatever shadow there was covered this instruction.
    cpu.sti_shadow = false;
    cpu.mov_ss_shadow = false;
    cpu.halted = true;
    cpu.look = true;
    Ok(())
}
