//! Debug registers and breakpoints: SDM vol. 3B §18.2.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::{Cpu, cr4, fl};
use crate::fault::{Exec, vector};
use crate::mmu::MemWord;
use crate::op::{Handler, Op};

/// DR7 bits.
pub(super) mod dr7 {
    /// General detection: MOV DR is #DB.
    pub(crate) const GD: u64 = 1 << 13;
    /// Bits that can be set: L0 to GE, RTM is absent, GD, the fields of the four breakpoints.
    pub(crate) const WRITABLE: u64 = 0xffff_23ff;
    /// Bit 10 is always one.
    pub(crate) const FIXED: u64 = 1 << 10;
}

/// DR6 bits.
pub(super) mod dr6 {
    /// MOV DR under general detection.
    pub(crate) const BD: u64 = 1 << 13;
    /// B0 to B3, BD, BS, BT.
    pub(crate) const WRITABLE: u64 = 0xe00f;
    /// Bits that are always one (no RTM, no bus-lock detection).
    pub(crate) const FIXED: u64 = 0xffff_0ff0;
}

/// What a breakpoint waits for: its R/W field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    Fetch,
    Write,
    Io,
    ReadWrite,
}

impl Cpu {
    /// Breakpoint `n` if it is enabled: what it waits for, first address, length.
    fn breakpoint(&self, n: usize) -> Option<(Watch, u64, u64)> {
        if self.dr7 >> (2 * n) & 3 == 0 {
            return None;
        }
        let field = self.dr7 >> (16 + 4 * n);
        let watch = match field & 3 {
            0 => Watch::Fetch,
            1 => Watch::Write,
            2 => Watch::Io,
            _ => Watch::ReadWrite,
        };
        let len = [1, 2, 8, 4][(field >> 2 & 3) as usize];
        Some((watch, self.dr[n] & !(len - 1), len))
    }

    /// DR6's B bits for the enabled breakpoints that wait for this access.
    fn hits(&self, address: u64, size: u64, waits: impl Fn(Watch) -> bool) -> u64 {
        let last = address.wrapping_add(size - 1);
        let hit = |n: usize| {
            self.breakpoint(n).is_some_and(|(watch, first, len)| {
                waits(watch) && first <= last && address <= first + (len - 1)
            })
        };
        (0..4).filter(|&n| hit(n)).fold(0, |bits, n| bits | 1 << n)
    }

    /// Whether any data breakpoint is enabled.
    pub(super) fn data_breakpoints_armed(&self) -> bool {
        self.dr7 & 0xff != 0
            && (0..4).any(|n| matches!(self.breakpoint(n), Some((Watch::Write | Watch::ReadWrite, _, _))))
    }

    /// Notes data breakpoints that an access hits: a trap at the end of the instruction.
    pub(crate) fn data_breakpoints(&mut self, linear: u64, size: u64, write: bool) {
        let hits =
            self.hits(linear, size, |watch| watch == Watch::ReadWrite || write && watch == Watch::Write);
        self.note(hits);
    }

    /// As above for ports, with CR4.DE.
    pub(super) fn io_breakpoints(&mut self, port: u16, size: u8) {
        if self.dr7 & 0xff != 0 && self.cr4 & cr4::DE != 0 {
            let hits = self.hits(u64::from(port), u64::from(size), |watch| watch == Watch::Io);
            self.note(hits);
        }
    }

    fn note(&mut self, hits: u64) {
        if hits != 0 {
            self.debug_trap |= hits;
            self.look = true;
        }
    }

    /// Whether an instruction breakpoint is at `linear` and not suppressed by RF. Sets DR6 if so: the caller delivers #DB,
    /// a fault.
    pub(crate) fn instruction_breakpoint(&mut self, linear: u64) -> bool {
        if self.flag(fl::RF) {
            return false;
        }
        let hits = self.hits(linear, 1, |watch| watch == Watch::Fetch);
        if hits != 0 {
            self.dr6 = self.dr6 & !0xf | hits;
        }
        hits != 0
    }
}

pub(super) fn select(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    if insn.mnemonic() != Mnemonic::Mov {
        return None;
    }
    let debug = |i: u32| {
        let register = (insn.op_kind(i) == OpKind::Register).then(|| insn.op_register(i))?;
        register.is_dr().then(|| register.number() as u8)
    };
    Some(if let Some(to) = debug(0) {
        op.dst = to;
        if insn.op1_register().size() == 8 { to_debug::<u64> } else { to_debug::<u32> }
    } else {
        op.src = debug(1)?;
        if insn.op0_register().size() == 8 { from_debug::<u64> } else { from_debug::<u32> }
    })
}

/// The checks of MOV DR in their order; DR4 and DR5 are DR6 and DR7 without CR4.DE.
fn check(cpu: &mut Cpu, number: u8) -> Exec<usize> {
    let number = match number {
        4 | 5 if cpu.cr4 & cr4::DE != 0 => return Err(cpu.ud()),
        4 | 5 => number + 2,
        8.. => return Err(cpu.ud()),
        _ => number,
    };
    cpu.supervisor()?;
    if cpu.dr7 & dr7::GD != 0 {
        cpu.dr6 |= dr6::BD;
        return Err(cpu.trap(vector::DB));
    }
    Ok(usize::from(number))
}

fn to_debug<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let number = check(cpu, op.dst)?;
    let value = cpu.regs.get::<T>(op.src).to_u64();
    match number {
        6 | 7 if value >> 32 != 0 => return Err(cpu.gp(0)),
        6 => cpu.dr6 = value & dr6::WRITABLE | dr6::FIXED,
        7 => {
            cpu.dr7 = (value & dr7::WRITABLE) | dr7::FIXED;
            cpu.refresh_mode();
            cpu.look = true;
        }
        // Addresses need not be canonical.
        _ => cpu.dr[number] = value,
    }
    Ok(())
}

fn from_debug<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = match check(cpu, op.src)? {
        6 => cpu.dr6,
        7 => cpu.dr7,
        number => cpu.dr[number],
    };
    cpu.regs.set(op.dst, T::of(value));
    Ok(())
}
