//! Control registers and what hangs on them: MOV CR, LMSW, SMSW, CLTS, INVLPG, INVPCID. SDM vol. 3A §2.5, §4.10.4.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::mode::access;
use crate::cpu::{Cpu, cr0, cr4, efer, seg};
use crate::fault::Exec;
use crate::mmu::{Access, MemWord};
use crate::op::{Handler, Op};

/// CR0 bits that exist; others read as zero.
const CR0: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// MOV to CR3: keep the translations of the new PCID.
const NO_FLUSH: u64 = 1 << 63;
/// PDPTE bits that must be zero beside those above MAXPHYADDR (table 4-8).
const PDPTE_RESERVED: u64 = 0x1e6;

impl Cpu {
    /// Sets CR0 as MOV does, with all checks.
    pub(super) fn write_cr0(&mut self, value: u64) -> Exec {
        if value >> 32 != 0 {
            return Err(self.gp(0));
        }
        let new = value & CR0 | cr0::ET;
        let on = |bit| new & bit != 0;
        if on(cr0::PG) && !on(cr0::PE) || on(cr0::NW) && !on(cr0::CD) {
            return Err(self.gp(0));
        }
        let changed = new ^ self.cr0;
        let wide_code = self.segs[seg::CS].access & access::L != 0;
        let mut new_efer = self.efer;
        if changed & cr0::PG != 0 {
            if on(cr0::PG) && self.efer & efer::LME != 0 {
                // Into IA-32e mode (§10.8.5): PAE, no 64-bit code segment yet, no 16-bit TSS.
                let small_tss = matches!(self.tr.access & 0x9f, 0x81 | 0x83);
                if self.cr4 & cr4::PAE == 0 || wide_code || small_tss {
                    return Err(self.gp(0));
                }
                new_efer |= efer::LMA;
            } else if !on(cr0::PG) {
                if self.is_64bit() || self.cr4 & cr4::PCIDE != 0 {
                    return Err(self.gp(0));
                }
                new_efer &= !efer::LMA;
            }
        }
        let pae = on(cr0::PG) && self.cr4 & cr4::PAE != 0 && new_efer & efer::LMA == 0;
        if pae && changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.cr0 = new;
        self.efer = new_efer;
        if changed & (cr0::PG | cr0::PE | cr0::WP) != 0 {
            self.flush_tlb();
        }
        self.refresh_mode();
        Ok(())
    }

    /// Sets CR3 as MOV does.
    pub(super) fn write_cr3(&mut self, value: u64) -> Exec {
        let pcids = self.cr4 & cr4::PCIDE != 0;
        let keep = pcids && value & NO_FLUSH != 0;
        let value = if pcids { value & !NO_FLUSH } else { value };
        if self.mode.long {
            if value >> self.msrs.model.physical_bits != 0 {
                return Err(self.gp(0));
            }
        } else if self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 {
            self.load_pdptes(value)?;
        }
        self.cr3 = value;
        let pcid = self.pcid();
        self.tlb.switch(pcid, keep);
        self.look = true;
        Ok(())
    }

    /// Sets CR4 as MOV does.
    pub(super) fn write_cr4(&mut self, value: u64) -> Exec {
        let on = |bit| value & bit != 0;
        let changed = value ^ self.cr4;
        let long = self.mode.long;
        let refused = value & !self.msrs.model.cr4 != 0
            || long && !on(cr4::PAE)
            || long && changed & cr4::LA57 != 0
            || changed & value & cr4::PCIDE != 0 && (!long || self.cr3 & 0xfff != 0);
        if refused {
            return Err(self.gp(0));
        }
        let pdptes = cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP;
        if self.cr0 & cr0::PG != 0 && !long && on(cr4::PAE) && changed & pdptes != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.cr4 = value;
        let translations = pdptes | cr4::PCIDE | cr4::SMAP | cr4::LA57;
        if changed & translations != 0 {
            self.flush_tlb();
        }
        self.refresh_mode();
        Ok(())
    }

    /// Loads the PDPTEs of PAE paging (§4.4.1); #GP(0) if a reserved bit is set in one that is present.
    pub(super) fn load_pdptes(&mut self, cr3: u64) -> Exec {
        let reserved = PDPTE_RESERVED | !((1 << self.msrs.model.physical_bits) - 1);
        let mut loaded = [0; 4];
        for (at, entry) in (cr3 & 0xffff_ffe0..).step_by(8).zip(&mut loaded) {
            *entry = self.memory.load_u64(at).unwrap_or(0);
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Err(self.gp(0));
            }
        }
        self.pdpte = loaded;
        Ok(())
    }
}

pub(super) fn select(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let control = |i: u32| {
        let register =
            (i < insn.op_count() && insn.op_kind(i) == OpKind::Register).then(|| insn.op_register(i))?;
        register.is_cr().then(|| register.number() as u8)
    };
    let memory = insn.op0_kind() == OpKind::Memory;
    Some(match insn.mnemonic() {
        Mnemonic::Mov => {
            if let Some(to) = control(0) {
                op.dst = to;
                if insn.op1_register().size() == 8 { to_control::<u64> } else { to_control::<u32> }
            } else {
                op.src = control(1)?;
                if insn.op0_register().size() == 8 { from_control::<u64> } else { from_control::<u32> }
            }
        }
        Mnemonic::Lmsw if memory => lmsw_m,
        Mnemonic::Lmsw => |cpu, op| {
            let value = cpu.regs.get::<u16>(op.dst);
            lmsw(cpu, value)
        },
        Mnemonic::Smsw if memory => smsw_m,
        Mnemonic::Smsw => match insn.op0_register().size() {
            2 => smsw_r::<u16>,
            4 => smsw_r::<u32>,
            _ => smsw_r::<u64>,
        },
        Mnemonic::Clts => |cpu, _| {
            cpu.supervisor()?;
            cpu.cr0 &= !cr0::TS;
            Ok(())
        },
        Mnemonic::Invlpg => invlpg,
        Mnemonic::Invpcid => {
            if insn.op0_register().size() == 8 {
                invpcid::<u64>
            } else {
                invpcid::<u32>
            }
        }
        _ => return None,
    })
}

fn to_control<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    if !matches!(op.dst, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.supervisor()?;
    let value = cpu.regs.get::<T>(op.src).to_u64();
    match op.dst {
        0 => cpu.write_cr0(value),
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => cpu.write_cr3(value),
        4 => cpu.write_cr4(value),
        _ => {
            if value > 0xf {
                return Err(cpu.gp(0));
            }
            cpu.io().set_cr8(value as u8);
            // A lower priority may let an interrupt through.
            cpu.ask_apic = true;
            cpu.look = true;
            Ok(())
        }
    }
}

fn from_control<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    if !matches!(op.src, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.supervisor()?;
    let value = match op.src {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        _ => u64::from(cpu.io().cr8()),
    };
    cpu.regs.set(op.dst, T::of(value));
    Ok(())
}

fn lmsw_m(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.supervisor()?;
    let linear = cpu.linear(op, 2, Access::Read)?;
    let value = cpu.read::<u16>(linear)?;
    lmsw(cpu, value)
}

/// PE, MP, EM and TS; PE can be set and not cleared.
fn lmsw(cpu: &mut Cpu, value: u16) -> Exec {
    cpu.supervisor()?;
    let kept = cpu.cr0 & (!0xf | cr0::PE);
    cpu.write_cr0(kept | u64::from(value & 0xf))
}

fn smsw_m(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.user_may_look()?;
    let linear = cpu.linear(op, 2, Access::Write)?;
    cpu.write(linear, cpu.cr0 as u16)
}

fn smsw_r<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.user_may_look()?;
    cpu.regs.set(op.dst, T::of(cpu.cr0));
    Ok(())
}

/// Neither segment limits nor canonicality count: an address that maps nothing has nothing to forget.
fn invlpg(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.supervisor()?;
    let offset = cpu.offset(op);
    let base = match usize::from(op.seg) {
        segment @ (seg::FS | seg::GS) => cpu.segs[segment].base,
        segment if !cpu.is_64bit() => cpu.segs[segment].base,
        _ => 0,
    };
    let linear = cpu.system_linear(base.wrapping_add(offset));
    cpu.tlb.flush_page(linear);
    Ok(())
}

fn invpcid<T: MemWord>(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.msrs.model.invpcid {
        return Err(cpu.ud());
    }
    cpu.supervisor()?;
    let kind = cpu.regs.get::<T>(op.dst).to_u64();
    let linear = cpu.linear(op, 16, Access::Read)?;
    let pcid = cpu.read::<u64>(linear)?;
    let address = cpu.read::<u64>(linear.wrapping_add(8))?;
    if kind > 3 || pcid >> 12 != 0 {
        return Err(cpu.gp(0));
    }
    let disabled = cpu.cr4 & cr4::PCIDE == 0;
    if kind < 2 && disabled && pcid != 0 || kind == 0 && !cpu.canonical(address) {
        return Err(cpu.gp(0));
    }
    match kind {
        0 if cpu.mode.long => cpu.tlb.flush_page(address),
        0 => cpu.tlb.flush_page(address & 0xffff_ffff),
        1 => cpu.tlb.flush_pcid(pcid as u16),
        2 => cpu.flush_tlb(),
        _ => {
            let pcid = cpu.pcid();
            cpu.tlb.flush_spaces();
            cpu.tlb.switch(pcid, false);
        }
    }
    Ok(())
}
