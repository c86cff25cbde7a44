//! String instructions. Repeated moves and fills run as one host instruction for each stretch that lies in one page of
//! plain memory on both sides; everything else goes element by element.
#![expect(unsafe_code, reason = "host string instructions on ranges that the TLB vouches for")]

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic};

use super::{Form, sized};
use crate::alu::{AluWord, st};
use crate::cpu::{Cpu, fl, seg};
use crate::fault::Exec;
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};
use crate::regs::{Word, at};

/// Elements between two looks at what other threads have left for us.
const PATIENCE: u64 = 4096;

pub(super) fn select(insn: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    let size = match insn.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Stosb | Mnemonic::Lodsb | Mnemonic::Cmpsb | Mnemonic::Scasb => 1,
        Mnemonic::Insb | Mnemonic::Outsb => 1,
        Mnemonic::Movsw | Mnemonic::Stosw | Mnemonic::Lodsw | Mnemonic::Cmpsw | Mnemonic::Scasw => 2,
        Mnemonic::Insw | Mnemonic::Outsw => 2,
        Mnemonic::Movsd | Mnemonic::Stosd | Mnemonic::Lodsd | Mnemonic::Cmpsd | Mnemonic::Scasd => 4,
        Mnemonic::Insd | Mnemonic::Outsd => 4,
        Mnemonic::Movsq | Mnemonic::Stosq | Mnemonic::Lodsq | Mnemonic::Cmpsq | Mnemonic::Scasq => 8,
        _ => return None,
    };
    // MOVSD and CMPSD are SSE2 instructions too.
    if !insn.is_string_instruction() {
        return None;
    }
    let _ = form;
    Some(match insn.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => sized!(size, string[Movs][]),
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => sized!(size, string[Stos][]),
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => sized!(size, string[Lods][]),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => sized!(size, string[Cmps][]),
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => sized!(size, string[Scas][]),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => sized!(size, string[Ins][]),
        _ => {
            let _ = op;
            sized!(size, string[Outs][])
        }
    })
}

/// One string operation.
trait Strings {
    /// REP stops on the zero flag too (CMPS, SCAS).
    const COMPARES: bool = false;
    /// RSI is cut to a 32-bit address size before the count is looked at.
    const SOURCE: bool = false;
    /// RDI likewise.
    const DESTINATION: bool = false;
    /// What is checked even if no element is to be done.
    fn check<T: AluWord + MemWord>(_cpu: &mut Cpu) -> Exec {
        Ok(())
    }
    /// Does one element and moves the index registers.
    fn one<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec;
    /// Does up to `count` elements at once: how many.
    fn many<T: AluWord + MemWord>(_cpu: &mut Cpu, _op: &Op, _count: u64) -> Exec<u64> {
        Ok(0)
    }
}

fn string<S: Strings, T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    if !op.has(Op::REP | Op::REPNE) {
        return S::one::<T>(cpu, op);
    }
    S::check::<T>(cpu)?;
    if op.has(Op::A32) && cpu.mode.code == crate::cpu::CodeSize::Bits64 {
        for (register, used) in [(at::RCX, true), (at::RSI, S::SOURCE), (at::RDI, S::DESTINATION)] {
            if used {
                let low = cpu.regs.get::<u32>(register);
                cpu.regs.set(register, low);
            }
        }
    }
    // A fault in a comparison finds the flags as they were before the first element (SDM vol. 2B, REP).
    let before = cpu.status;
    let result = repeat::<S, T>(cpu, op);
    if S::COMPARES && result.is_err() {
        cpu.status = before;
    }
    result
}

fn repeat<S: Strings, T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mask = op.amask();
    let mut left = PATIENCE;
    // A single step is one element.
    let stepping = cpu.flag(fl::TF);
    loop {
        let count = cpu.regs.r64(at::RCX) & mask;
        if count == 0 {
            return Ok(());
        }
        if left == 0 {
            // Interrupts are taken between elements: come back to this instruction.
            cpu.rip = cpu.rip.wrapping_sub(u64::from(op.len));
            return Ok(());
        }
        let done = if stepping { 0 } else { S::many::<T>(cpu, op, count)? };
        let done = if done == 0 {
            S::one::<T>(cpu, op)?;
            1
        } else {
            done
        };
        set_indexed(cpu, at::RCX, (count - done) & mask, mask);
        left = left.saturating_sub(done);
        if S::COMPARES && (cpu.status & st::ZF != 0) != op.has(Op::REP) {
            return Ok(());
        }
        if cpu.look || cpu.leave || stepping {
            left = 0;
        }
    }
}

/// Writes an index or count register at the address size.
fn set_indexed(cpu: &mut Cpu, register: u8, value: u64, mask: u64) {
    match mask {
        0xffff => cpu.regs.set(register, value as u16),
        0xffff_ffff => cpu.regs.set(register, value as u32),
        _ => cpu.regs.set(register, value),
    }
}

fn advance<T: Word>(cpu: &mut Cpu, op: &Op, register: u8) {
    let size = size_of::<T>() as u64;
    let step = if cpu.flag(fl::DF) { size.wrapping_neg() } else { size };
    let mask = op.amask();
    let value = cpu.regs.r64(register).wrapping_add(step) & mask;
    set_indexed(cpu, register, value, mask);
}

fn source<T: Word>(cpu: &mut Cpu, op: &Op) -> Exec<u64> {
    let offset = cpu.regs.r64(at::RSI) & op.amask();
    cpu.seg_linear(op.seg as usize, offset, size_of::<T>() as u64, Access::Read)
}

fn destination<T: Word>(cpu: &mut Cpu, op: &Op, access: Access) -> Exec<u64> {
    let offset = cpu.regs.r64(at::RDI) & op.amask();
    cpu.seg_linear(seg::ES, offset, size_of::<T>() as u64, access)
}

/// Elements from `linear` to the end of its page, at most `count`; none if they go downwards or straddle.
fn stretch<T: Word>(cpu: &Cpu, linear: u64, count: u64) -> u64 {
    if cpu.flag(fl::DF) { 0 } else { ((4096 - linear % 4096) / size_of::<T>() as u64).min(count) }
}

/// Whether offsets may run on without leaving a small address size or a segment.
fn unbounded(cpu: &Cpu, op: &Op) -> bool {
    cpu.mode.code == crate::cpu::CodeSize::Bits64 && op.amask() == u64::MAX
}

struct Movs;
impl Strings for Movs {
    const SOURCE: bool = true;
    const DESTINATION: bool = true;

    fn one<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
        let from = source::<T>(cpu, op)?;
        let value = cpu.read::<T>(from)?;
        let to = destination::<T>(cpu, op, Access::Write)?;
        cpu.write(to, value)?;
        advance::<T>(cpu, op, at::RSI);
        advance::<T>(cpu, op, at::RDI);
        Ok(())
    }

    fn many<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op, count: u64) -> Exec<u64> {
        if !unbounded(cpu, op) {
            return Ok(0);
        }
        let (from, to) = (source::<T>(cpu, op)?, destination::<T>(cpu, op, Access::Write)?);
        let count = stretch::<T>(cpu, from, count);
        let count = stretch::<T>(cpu, to, count);
        let bytes = count * size_of::<T>() as u64;
        let Some(source) = cpu.host_range(from, bytes, false)? else { return Ok(0) };
        let Some(target) = cpu.host_range(to, bytes, true)? else { return Ok(0) };
        // The second look-up may have evicted the first.
        if cpu.tlb.read(from, bytes) != Some(source) {
            return Ok(0);
        }
        // SAFETY: both ranges are mapped for `bytes` bytes. The element size is kept, as overlapping ranges show it.
        unsafe {
            let (rcx, rsi, rdi) = (count, source, target);
            match size_of::<T>() {
                1 => {
                    asm!("rep movsb", inout("rcx") rcx => _, inout("rsi") rsi => _, inout("rdi") rdi => _, options(nostack, preserves_flags))
                }
                2 => {
                    asm!("rep movsw", inout("rcx") rcx => _, inout("rsi") rsi => _, inout("rdi") rdi => _, options(nostack, preserves_flags))
                }
                4 => {
                    asm!("rep movsd", inout("rcx") rcx => _, inout("rsi") rsi => _, inout("rdi") rdi => _, options(nostack, preserves_flags))
                }
                _ => {
                    asm!("rep movsq", inout("rcx") rcx => _, inout("rsi") rsi => _, inout("rdi") rdi => _, options(nostack, preserves_flags))
                }
            }
        }
        let (si, di) = (cpu.regs.r64(at::RSI), cpu.regs.r64(at::RDI));
        cpu.regs.set64(at::RSI, si.wrapping_add(bytes));
        cpu.regs.set64(at::RDI, di.wrapping_add(bytes));
        Ok(count)
    }
}

struct Stos;
impl Strings for Stos {
    const DESTINATION: bool = true;

    fn one<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
        let to = destination::<T>(cpu, op, Access::Write)?;
        let value = cpu.regs.get::<T>(at::RAX);
        cpu.write(to, value)?;
        advance::<T>(cpu, op, at::RDI);
        Ok(())
    }

    fn many<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op, count: u64) -> Exec<u64> {
        if !unbounded(cpu, op) {
            return Ok(0);
        }
        let to = destination::<T>(cpu, op, Access::Write)?;
        let count = stretch::<T>(cpu, to, count);
        let bytes = count * size_of::<T>() as u64;
        let Some(target) = cpu.host_range(to, bytes, true)? else { return Ok(0) };
        let value = cpu.regs.r64(at::RAX);
        // SAFETY: the range is mapped for `bytes` bytes.
        unsafe {
            let (rcx, rdi, rax) = (count, target, value);
            match size_of::<T>() {
                1 => {
                    asm!("rep stosb", inout("rcx") rcx => _, inout("rdi") rdi => _, in("rax") rax, options(nostack, preserves_flags))
                }
                2 => {
                    asm!("rep stosw", inout("rcx") rcx => _, inout("rdi") rdi => _, in("rax") rax, options(nostack, preserves_flags))
                }
                4 => {
                    asm!("rep stosd", inout("rcx") rcx => _, inout("rdi") rdi => _, in("rax") rax, options(nostack, preserves_flags))
                }
                _ => {
                    asm!("rep stosq", inout("rcx") rcx => _, inout("rdi") rdi => _, in("rax") rax, options(nostack, preserves_flags))
                }
            }
        }
        let di = cpu.regs.r64(at::RDI);
        cpu.regs.set64(at::RDI, di.wrapping_add(bytes));
        Ok(count)
    }
}

struct Lods;
impl Strings for Lods {
    fn one<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
        let from = source::<T>(cpu, op)?;
        let value = cpu.read::<T>(from)?;
        cpu.regs.set(at::RAX, value);
        advance::<T>(cpu, op, at::RSI);
        Ok(())
    }
}

struct Cmps;
impl Strings for Cmps {
    const COMPARES: bool = true;
    fn one<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
        // Processors look at the second operand first, as faults show.
        let to = destination::<T>(cpu, op, Access::Read)?;
        let b = cpu.read::<T>(to)?;
        let from = source::<T>(cpu, op)?;
        let a = cpu.read::<T>(from)?;
        T::sub(a, b, &mut cpu.status);
        advance::<T>(cpu, op, at::RSI);
        advance::<T>(cpu, op, at::RDI);
        Ok(())
    }
}

struct Scas;
impl Strings for Scas {
    const COMPARES: bool = true;
    fn one<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
        let at_di = destination::<T>(cpu, op, Access::Read)?;
        let b = cpu.read::<T>(at_di)?;
        T::sub(cpu.regs.get::<T>(at::RAX), b, &mut cpu.status);
        advance::<T>(cpu, op, at::RDI);
        Ok(())
    }
}

fn port_allowed<T: Word>(cpu: &mut Cpu) -> Exec {
    let port = cpu.regs.get::<u16>(at::RDX);
    cpu.io_allowed(port, size_of::<T>() as u8)
}

struct Ins;
impl Strings for Ins {
    const DESTINATION: bool = true;

    fn check<T: AluWord + MemWord>(cpu: &mut Cpu) -> Exec {
        port_allowed::<T>(cpu)
    }

    fn one<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
        let port = cpu.regs.get::<u16>(at::RDX);
        cpu.io_allowed(port, size_of::<T>() as u8)?;
        let to = destination::<T>(cpu, op, Access::Write)?;
        cpu.probe(to, size_of::<T>() as u64, Access::Write)?;
        cpu.stats.port_io += 1;
        let value = cpu.io().port_read(port, size_of::<T>() as u8);
        cpu.write(to, T::of(u64::from(value)))?;
        advance::<T>(cpu, op, at::RDI);
        Ok(())
    }
}

struct Outs;
impl Strings for Outs {
    const SOURCE: bool = true;

    fn check<T: AluWord + MemWord>(cpu: &mut Cpu) -> Exec {
        port_allowed::<T>(cpu)
    }

    fn one<T: AluWord + MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
        let port = cpu.regs.get::<u16>(at::RDX);
        cpu.io_allowed(port, size_of::<T>() as u8)?;
        let from = source::<T>(cpu, op)?;
        let value = cpu.read::<T>(from)?;
        advance::<T>(cpu, op, at::RSI);
        cpu.stats.port_io += 1;
        let flow = cpu.io().port_write(port, size_of::<T>() as u8, value.to_u64() as u32);
        cpu.after_io(flow);
        Ok(())
    }
}
