//! HLT, PAUSE, and instructions that are there only to be refused.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Hlt => halt,
        Mnemonic::Pause => pause,
        Mnemonic::Ud0
        | Mnemonic::Ud1
        | Mnemonic::Ud2
        | Mnemonic::Rsm
        | Mnemonic::Monitor
        | Mnemonic::Mwait => |cpu, _| Err(cpu.ud()),
        _ => return None,
    })
}

/// PAUSEs after which a spinning guest makes room: some 10 µs of a tight loop.
const PATIENCE: u32 = 256;

/// Whoever holds what the guest spins for may be a virtual processor that the host does not run at the moment.
fn pause(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(PATIENCE) {
        std::thread::yield_now();
    }
    Ok(())
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
