//! Descriptor-table registers and the instructions that look into tables: LGDT, LIDT, SGDT, SIDT, LLDT, LTR, SLDT, STR,
//! LAR, LSL, VERR, VERW.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::descriptor::{Descriptor, index, is_null, system_type};
use super::segments::null_segment;
use crate::alu::st;
use crate::cpu::{Cpu, Table};
use crate::fault::{Exec, vector};
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};

pub(super) fn select(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let memory = |i: u32| i < insn.op_count() && insn.op_kind(i) == OpKind::Memory;
    Some(match insn.mnemonic() {
        Mnemonic::Lgdt | Mnemonic::Lidt => {
            op.imm = match insn.code() {
                Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 0xff_ffff,
                Code::Lgdt_m1632 | Code::Lidt_m1632 => 0xffff_ffff,
                _ => u64::MAX,
            };
            if insn.mnemonic() == Mnemonic::Lgdt { load_table::<true> } else { load_table::<false> }
        }
        Mnemonic::Sgdt | Mnemonic::Sidt => {
            let wide = matches!(insn.code(), Code::Sgdt_m1664 | Code::Sidt_m1664);
            match (insn.mnemonic() == Mnemonic::Sgdt, wide) {
                (true, false) => store_table::<true, false>,
                (true, true) => store_table::<true, true>,
                (false, false) => store_table::<false, false>,
                (false, true) => store_table::<false, true>,
            }
        }
        Mnemonic::Lldt if memory(0) => |cpu, op| load_from_memory(cpu, op, load_ldt),
        Mnemonic::Lldt => |cpu, op| load_from_register(cpu, op, load_ldt),
        Mnemonic::Ltr if memory(0) => |cpu, op| load_from_memory(cpu, op, load_task),
        Mnemonic::Ltr => |cpu, op| load_from_register(cpu, op, load_task),
        Mnemonic::Sldt | Mnemonic::Str => {
            op.src = u8::from(insn.mnemonic() == Mnemonic::Str);
            if memory(0) {
                store_m
            } else {
                match insn.op0_register().size() {
                    2 => store_r::<u16>,
                    4 => store_r::<u32>,
                    _ => store_r::<u64>,
                }
            }
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            let lar = insn.mnemonic() == Mnemonic::Lar;
            match (insn.op0_register().size(), memory(1), lar) {
                (2, false, true) => look::<u16, false, true>,
                (2, false, false) => look::<u16, false, false>,
                (2, true, true) => look::<u16, true, true>,
                (2, true, false) => look::<u16, true, false>,
                (4, false, true) => look::<u32, false, true>,
                (4, false, false) => look::<u32, false, false>,
                (4, true, true) => look::<u32, true, true>,
                (4, true, false) => look::<u32, true, false>,
                (_, false, true) => look::<u64, false, true>,
                (_, false, false) => look::<u64, false, false>,
                (_, true, true) => look::<u64, true, true>,
                (_, true, false) => look::<u64, true, false>,
            }
        }
        Mnemonic::Verr | Mnemonic::Verw => match (memory(0), insn.mnemonic() == Mnemonic::Verw) {
            (false, false) => verify::<false, false>,
            (false, true) => verify::<false, true>,
            (true, false) => verify::<true, false>,
            (true, true) => verify::<true, true>,
        },
        _ => return None,
    })
}

/// Limit, then base; `op.imm` masks the base.
fn load_table<const GDT: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.supervisor()?;
    let wide = cpu.is_64bit();
    let linear = cpu.linear(op, if wide { 10 } else { 6 }, Access::Read)?;
    let limit = cpu.read::<u16>(linear)?;
    let at = linear.wrapping_add(2);
    let base = if wide { cpu.read::<u64>(at)? } else { u64::from(cpu.read::<u32>(at)?) & op.imm };
    if !cpu.canonical(base) {
        return Err(cpu.gp(0));
    }
    *(if GDT { &mut cpu.gdtr } else { &mut cpu.idtr }) = Table { base, limit };
    Ok(())
}

fn store_table<const GDT: bool, const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.user_may_look()?;
    let Table { base, limit } = if GDT { cpu.gdtr } else { cpu.idtr };
    let size = if WIDE { 10 } else { 6 };
    let linear = cpu.linear(op, size, Access::Write)?;
    let mut image = [0; 10];
    image[..2].copy_from_slice(&limit.to_le_bytes());
    image[2..].copy_from_slice(&base.to_le_bytes());
    cpu.write_bytes(linear, &image[..size as usize])
}

fn load_from_memory(cpu: &mut Cpu, op: &Op, load: fn(&mut Cpu, u16) -> Exec) -> Exec {
    cpu.protected_only()?;
    cpu.supervisor()?;
    let linear = cpu.linear(op, 2, Access::Read)?;
    let selector = cpu.read::<u16>(linear)?;
    load(cpu, selector)
}

fn load_from_register(cpu: &mut Cpu, op: &Op, load: fn(&mut Cpu, u16) -> Exec) -> Exec {
    cpu.protected_only()?;
    cpu.supervisor()?;
    let selector = cpu.regs.get::<u16>(op.dst);
    load(cpu, selector)
}

/// A system descriptor in the GDT, with its whole base.
fn system_descriptor(cpu: &mut Cpu, selector: u16, kinds: &[u32]) -> Exec<(Descriptor, u64)> {
    if selector & 4 != 0 {
        return Err(cpu.gp(index(selector)));
    }
    let descriptor = cpu.descriptor(selector, vector::GP, 0)?;
    if descriptor.is_segment() || !kinds.contains(&descriptor.system_type()) {
        return Err(cpu.gp(index(selector)));
    }
    let high = if cpu.mode.long { cpu.upper_half(selector, vector::GP, 0)? } else { 0 };
    let base = descriptor.base() | high << 32;
    if !descriptor.present() {
        return Err(cpu.fault(vector::NP, index(selector)));
    }
    if !cpu.canonical(base) {
        return Err(cpu.gp(index(selector)));
    }
    Ok((descriptor, base))
}

fn load_ldt(cpu: &mut Cpu, selector: u16) -> Exec {
    if is_null(selector) {
        cpu.ldtr = null_segment(selector, 0);
        return Ok(());
    }
    let (descriptor, base) = system_descriptor(cpu, selector, &[system_type::LDT])?;
    cpu.ldtr = descriptor.segment(selector);
    cpu.ldtr.base = base;
    Ok(())
}

fn load_task(cpu: &mut Cpu, selector: u16) -> Exec {
    if is_null(selector) {
        return Err(cpu.gp(0));
    }
    let available: &[u32] =
        if cpu.mode.long { &[system_type::TSS] } else { &[system_type::TSS, system_type::TSS16] };
    let (descriptor, base) = system_descriptor(cpu, selector, available)?;
    // Available becomes busy.
    let rights = (descriptor.raw >> 40) as u8 | 2;
    let done = cpu.write_system(descriptor.linear.wrapping_add(5), rights);
    cpu.table_fault(done)?;
    cpu.tr = descriptor.segment(selector);
    cpu.tr.access |= 2;
    cpu.tr.base = base;
    Ok(())
}

fn local_selector(cpu: &mut Cpu, op: &Op) -> Exec<u16> {
    cpu.protected_only()?;
    cpu.user_may_look()?;
    Ok(if op.src == 0 { cpu.ldtr.selector } else { cpu.tr.selector })
}

fn store_r<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = local_selector(cpu, op)?;
    cpu.regs.set(op.dst, T::of(u64::from(selector)));
    Ok(())
}

fn store_m(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = local_selector(cpu, op)?;
    let linear = cpu.linear(op, 2, Access::Write)?;
    cpu.write(linear, selector)
}

/// The descriptor that a selector operand names, if the program may know of it.
fn visible(cpu: &mut Cpu, selector: u16) -> Exec<Option<Descriptor>> {
    if is_null(selector) {
        return Ok(None);
    }
    let found = cpu.find_descriptor(selector)?;
    let cpl = cpu.mode.cpl;
    Ok(found.filter(|descriptor| {
        descriptor.is_conforming() || cpl <= descriptor.dpl() && (selector & 3) as u8 <= descriptor.dpl()
    }))
}

fn set_zero(cpu: &mut Cpu, on: bool) {
    cpu.status = cpu.status & !st::ZF | if on { st::ZF } else { 0 };
}

/// LAR and LSL.
fn look<T: MemWord, const MEMORY: bool, const LAR: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.protected_only()?;
    let selector = selector_operand::<MEMORY>(cpu, op, op.src)?;
    let long = cpu.mode.long;
    let found = visible(cpu, selector)?.filter(|descriptor| {
        descriptor.is_segment()
            || match descriptor.system_type() {
                system_type::LDT | system_type::TSS | system_type::TSS_BUSY => true,
                system_type::TSS16 | system_type::TSS16_BUSY => !long,
                system_type::CALL_GATE => LAR,
                system_type::CALL_GATE16 | system_type::TASK_GATE => LAR && !long,
                _ => false,
            }
    });
    if let Some(descriptor) = found {
        let value = if LAR { descriptor.raw >> 32 & 0x00f0_ff00 } else { u64::from(descriptor.limit()) };
        cpu.regs.set(op.dst, T::of(value));
    }
    set_zero(cpu, found.is_some());
    Ok(())
}

fn selector_operand<const MEMORY: bool>(cpu: &mut Cpu, op: &Op, register: u8) -> Exec<u16> {
    if MEMORY {
        let linear = cpu.linear(op, 2, Access::Read)?;
        cpu.read::<u16>(linear)
    } else {
        Ok(cpu.regs.get::<u16>(register))
    }
}

/// VERR and VERW.
fn verify<const MEMORY: bool, const WRITE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.protected_only()?;
    let selector = selector_operand::<MEMORY>(cpu, op, op.dst)?;
    let good = visible(cpu, selector)?.is_some_and(|descriptor| {
        if WRITE {
            descriptor.is_data() && descriptor.rw()
        } else {
            descriptor.is_data() || descriptor.is_code() && descriptor.rw()
        }
    });
    set_zero(cpu, good);
    Ok(())
}
