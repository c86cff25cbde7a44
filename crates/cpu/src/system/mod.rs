//! Everything privileged: descriptors, control transfers, exceptions, MSRs, the paravirtual interface. The reference is
//! the Intel SDM; what a module holds says its first line.
//!
//! Each module has a `select` of its own from mnemonic to handler. The rest of the processor calls, beside those,
//! [`Cpu::deliver_exception`](crate::cpu::Cpu) and its likes in [`gates`], [`Cpu::refresh_mode`](crate::cpu::Cpu) in
//! [`mode`], and the resets in [`reset`].

mod cache;
mod control;
mod cpuid;
mod debug;
mod descriptor;
mod far;
mod flags;
mod frame;
mod gates;
mod halt;
mod io;
mod iret;
mod mode;
mod model;
mod msr;
mod mtrr;
mod paravirt;
mod reset;
mod segments;
mod state;
mod syscall;
mod tables;
mod tasks;
#[cfg(test)]
mod tests;
mod tsc;

use iced_x86::{Instruction, Mnemonic};

pub(crate) use mode::access;
pub(crate) use msr::{Msrs, index};
pub(crate) use tsc::{Tsc, host_tsc_hz};

use crate::cpu::{CodeSize, Cpu};
use crate::op::{Handler, Op};
use crate::regs::at;

/// The handler of a system instruction, or `None` if it is none of this module's.
pub(crate) fn select(insn: &Instruction, op: &mut Op, _: CodeSize) -> Option<Handler> {
    flags::select(insn, op)
        .or_else(|| segments::select(insn, op))
        .or_else(|| cache::select(insn, op))
        .or_else(|| far::select(insn, op))
        .or_else(|| iret::select(insn, op))
        .or_else(|| gates::select(insn, op))
        .or_else(|| syscall::select(insn, op))
        .or_else(|| io::select(insn, op))
        .or_else(|| control::select(insn, op))
        .or_else(|| debug::select(insn, op))
        .or_else(|| tables::select(insn, op))
        .or_else(|| msr::select(insn, op))
        .or_else(|| cpuid::select(insn, op))
        .or_else(|| tsc::select(insn, op))
        .or_else(|| paravirt::select(insn, op))
        .or_else(|| halt::select(insn, op))
}

/// Whether a block goes on behind a system instruction: those that only read, and those whose effect the next
/// instruction of a block cannot miss.
pub(crate) fn continues(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Sgdt
            | Mnemonic::Sidt
            | Mnemonic::Sldt
            | Mnemonic::Str
            | Mnemonic::Smsw
            | Mnemonic::Lar
            | Mnemonic::Lsl
            | Mnemonic::Verr
            | Mnemonic::Verw
            | Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Rdpid
            | Mnemonic::Rdfsbase
            | Mnemonic::Rdgsbase
            | Mnemonic::Xgetbv
            | Mnemonic::Swapgs
            | Mnemonic::Pause
            | Mnemonic::Cli
            | Mnemonic::Clac
            | Mnemonic::Stac
            | Mnemonic::Pushf
            | Mnemonic::Pushfd
            | Mnemonic::Pushfq
            | Mnemonic::Clflush
            | Mnemonic::Clflushopt
            | Mnemonic::Clwb
            | Mnemonic::Lfence
            | Mnemonic::Sfence
            | Mnemonic::Mfence
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetchwt1
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchit0
            | Mnemonic::Prefetchit1
    )
}

impl Cpu {
    /// EDX:EAX.
    pub(crate) fn edx_eax(&self) -> u64 {
        u64::from(self.regs.get::<u32>(at::RDX)) << 32 | u64::from(self.regs.get::<u32>(at::RAX))
    }

    /// Sets EDX:EAX; the upper halves of RDX and RAX are cleared.
    pub(crate) fn set_edx_eax(&mut self, value: u64) {
        self.regs.set(at::RAX, value as u32);
        self.regs.set(at::RDX, (value >> 32) as u32);
    }
}
