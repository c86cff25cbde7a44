//! Model-specific registers (SDM vol. 4): one that is not named here does not exist, and touching it is #GP(0).

use iced_x86::{Instruction, Mnemonic};

use super::cpuid::ARCH_CAPABILITIES;
use super::model::Model;
use super::mtrr::Mtrrs;
use super::paravirt::Paravirt;
use crate::cpu::{Cpu, cr0, cr4, efer, seg};
use crate::fault::Exec;
use crate::op::{Handler, Op};
use crate::regs::at;
use crate::vm::Shared;

/// Numbers, SDM vol. 4 table 2-2.
pub(crate) mod index {
    pub(crate) const TSC: u32 = 0x10;
    pub(crate) const PLATFORM_ID: u32 = 0x17;
    pub(crate) const APIC_BASE: u32 = 0x1b;
    pub(crate) const FEATURE_CONTROL: u32 = 0x3a;
    pub(crate) const TSC_ADJUST: u32 = 0x3b;
    pub(crate) const SPEC_CTRL: u32 = 0x48;
    pub(crate) const PRED_CMD: u32 = 0x49;
    pub(crate) const BIOS_UPDT_TRIG: u32 = 0x79;
    pub(crate) const BIOS_SIGN_ID: u32 = 0x8b;
    pub(crate) const PLATFORM_INFO: u32 = 0xce;
    pub(crate) const MTRRCAP: u32 = 0xfe;
    pub(crate) const ARCH_CAPABILITIES: u32 = 0x10a;
    pub(crate) const SYSENTER_CS: u32 = 0x174;
    pub(crate) const SYSENTER_ESP: u32 = 0x175;
    pub(crate) const SYSENTER_EIP: u32 = 0x176;
    pub(crate) const MCG_CAP: u32 = 0x179;
    pub(crate) const MCG_STATUS: u32 = 0x17a;
    pub(crate) const MCG_CTL: u32 = 0x17b;
    pub(crate) const PERF_STATUS: u32 = 0x198;
    pub(crate) const MISC_ENABLE: u32 = 0x1a0;
    pub(crate) const DEBUGCTL: u32 = 0x1d9;
    pub(crate) const PAT: u32 = 0x277;
    pub(crate) const MC0_CTL: u32 = 0x400;
    pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
    pub(crate) const X2APIC: u32 = 0x800;
    pub(crate) const X2APIC_LAST: u32 = 0x8ff;
    pub(crate) const EFER: u32 = 0xc000_0080;
    pub(crate) const STAR: u32 = 0xc000_0081;
    pub(crate) const LSTAR: u32 = 0xc000_0082;
    pub(crate) const CSTAR: u32 = 0xc000_0083;
    pub(crate) const FMASK: u32 = 0xc000_0084;
    pub(crate) const FS_BASE: u32 = 0xc000_0100;
    pub(crate) const GS_BASE: u32 = 0xc000_0101;
    pub(crate) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(crate) const TSC_AUX: u32 = 0xc000_0103;
}

/// Machine-check banks; none ever has anything to report.
const MCE_BANKS: u32 = 10;
/// MCG_CTL exists.
const MCG_CAP: u64 = MCE_BANKS as u64 | 1 << 8;
/// Fast strings on, no BTS, no PEBS.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;
/// What software may change in IA32_MISC_ENABLE: fast strings and the CPUID limit, both without effect here.
const MISC_ENABLE_WRITABLE: u64 = 1 | 1 << 22;
/// IA32_SPEC_CTRL: IBRS and BHI_DIS_S. It governs speculation, of which an interpreter has none; the bits are only kept.
const SPEC_CTRL: u64 = 1 | 1 << 10;
/// IA32_DEBUGCTL: LBR and BTF are kept and do nothing; there are no last-branch records to be seen.
const DEBUGCTL: u64 = 3;
/// The microcode revision claimed: newer than any that a guest knows to be faulty.
const MICROCODE: u64 = 0xffff_ffff;
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// The registers, with what stands behind them.
#[derive(Debug)]
pub(crate) struct Msrs {
    /// What the processor has.
    pub(crate) model: Model,
    /// KVM's paravirtual interface.
    pub(crate) kvm: Paravirt,
    pub(crate) star: u64,
    pub(crate) lstar: u64,
    pub(crate) cstar: u64,
    pub(crate) fmask: u64,
    pub(crate) kernel_gs_base: u64,
    pub(crate) tsc_aux: u64,
    pub(crate) sysenter_cs: u64,
    pub(crate) sysenter_esp: u64,
    pub(crate) sysenter_eip: u64,
    pub(crate) pat: u64,
    mtrrs: Mtrrs,
    misc_enable: u64,
    feature_control: u64,
    spec_ctrl: u64,
    debugctl: u64,
    mcg_status: u64,
    mcg_ctl: u64,
    mc_ctl: [u64; MCE_BANKS as usize],
}

impl Msrs {
    /// Registers in their reset state.
    pub(crate) fn new(_id: u32, shared: &Shared) -> Self {
        let model = Model::new(&shared.cpuid);
        Self {
            mtrrs: Mtrrs::new(model.physical_bits),
            model,
            kvm: Paravirt::default(),
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: PAT_RESET,
            misc_enable: MISC_ENABLE,
            feature_control: 1,
            spec_ctrl: 0,
            debugctl: 0,
            mcg_status: 0,
            mcg_ctl: 0,
            mc_ctl: [0; MCE_BANKS as usize],
        }
    }

    /// Power-on values for everything but the model.
    pub(crate) fn reset(&mut self) {
        self.kvm = Paravirt::default();
        self.mtrrs = Mtrrs::new(self.model.physical_bits);
        for register in [
            &mut self.star,
            &mut self.lstar,
            &mut self.cstar,
            &mut self.fmask,
            &mut self.kernel_gs_base,
            &mut self.tsc_aux,
            &mut self.sysenter_cs,
            &mut self.sysenter_esp,
            &mut self.sysenter_eip,
            &mut self.spec_ctrl,
            &mut self.debugctl,
            &mut self.mcg_status,
            &mut self.mcg_ctl,
        ] {
            *register = 0;
        }
        self.mc_ctl = [0; MCE_BANKS as usize];
        self.pat = PAT_RESET;
        self.misc_enable = MISC_ENABLE;
        self.feature_control = 1;
    }

    /// Indices of the registers that a saved state holds, ascending; those of the local APIC and EFER, FS and GS base
    /// have groups of their own. The TSC comes before its adjustment.
    pub(crate) fn saved(&self) -> Vec<u32> {
        use index::{
            CSTAR, DEBUGCTL, FMASK, KERNEL_GS_BASE, LSTAR, MC0_CTL, MCG_CTL, MCG_STATUS, MISC_ENABLE, PAT,
            SPEC_CTRL, STAR, SYSENTER_CS, SYSENTER_EIP, SYSENTER_ESP, TSC, TSC_ADJUST, TSC_AUX,
        };
        let mut saved = vec![TSC];
        saved.extend(self.model.tsc_adjust.then_some(TSC_ADJUST));
        saved.extend(self.model.spec_ctrl.then_some(SPEC_CTRL));
        saved.extend([
            SYSENTER_CS,
            SYSENTER_ESP,
            SYSENTER_EIP,
            MCG_STATUS,
            MCG_CTL,
            MISC_ENABLE,
            DEBUGCTL,
            PAT,
        ]);
        saved.extend(Mtrrs::indices());
        saved.extend((0..MCE_BANKS).map(|bank| MC0_CTL + 4 * bank));
        saved.extend(Paravirt::indices(self.model.paravirt));
        saved.extend([STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE]);
        saved.extend(self.model.rdtscp.then_some(TSC_AUX));
        saved.sort_unstable();
        saved.dedup();
        saved
    }
}

impl Cpu {
    /// The value of an MSR; `None`: #GP(0).
    pub(crate) fn msr_read(&mut self, msr: u32) -> Option<u64> {
        let m = &self.msrs;
        Some(match msr {
            index::TSC => self.tsc.now(),
            index::PLATFORM_ID | index::BIOS_UPDT_TRIG => 0,
            index::APIC_BASE | index::TSC_DEADLINE | index::X2APIC..=index::X2APIC_LAST => {
                return self.io().apic_msr_read(msr);
            }
            index::FEATURE_CONTROL => m.feature_control,
            index::TSC_ADJUST if m.model.tsc_adjust => self.tsc.adjust(),
            index::SPEC_CTRL if m.model.spec_ctrl => m.spec_ctrl,
            index::BIOS_SIGN_ID => MICROCODE << 32,
            // Maximum non-turbo ratio in units of 100 MHz, which is the TSC's.
            index::PLATFORM_INFO => (((self.tsc.hz() + 50_000_000) / 100_000_000) & 0xff) << 8,
            index::ARCH_CAPABILITIES if m.model.arch_capabilities => {
                m.model.cpuid.arch_capabilities(ARCH_CAPABILITIES)
            }
            index::SYSENTER_CS => m.sysenter_cs,
            index::SYSENTER_ESP => m.sysenter_esp,
            index::SYSENTER_EIP => m.sysenter_eip,
            index::MCG_CAP => MCG_CAP,
            index::MCG_STATUS => m.mcg_status,
            index::MCG_CTL => m.mcg_ctl,
            index::PERF_STATUS => 0,
            index::MISC_ENABLE => m.misc_enable,
            index::DEBUGCTL => m.debugctl,
            index::PAT => m.pat,
            index::EFER if m.model.efer != 0 => self.efer,
            index::STAR => m.star,
            index::LSTAR => m.lstar,
            index::CSTAR => m.cstar,
            index::FMASK => m.fmask,
            index::FS_BASE => self.segs[seg::FS].base,
            index::GS_BASE => self.segs[seg::GS].base,
            index::KERNEL_GS_BASE => m.kernel_gs_base,
            index::TSC_AUX if m.model.rdtscp || m.model.rdpid => m.tsc_aux,
            _ if let Some((bank, register)) = machine_check(msr) => match register {
                0 => m.mc_ctl[bank],
                _ => 0,
            },
            _ => return m.mtrrs.read(msr).or_else(|| m.kvm.read(msr, m.model.paravirt)),
        })
    }

    /// Writes an MSR; `None`: #GP(0), and nothing has changed.
    pub(crate) fn msr_write(&mut self, msr: u32, value: u64) -> Option<()> {
        let shift = if self.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
        let canonical = ((value << shift) as i64 >> shift) as u64 == value;
        let m = &mut self.msrs;
        let keep = |register: &mut u64, allowed: bool| allowed.then(|| *register = value);
        match msr {
            index::TSC => {
                self.tsc.write(value);
                self.tsc_changed();
            }
            index::APIC_BASE | index::TSC_DEADLINE | index::X2APIC..=index::X2APIC_LAST => {
                let flow = self.io().apic_msr_write(msr, value)?;
                self.after_io(flow);
                // The write may have raised the processor's own interrupt, or let one through.
                self.look = true;
            }
            // Locked: any write is refused (SDM vol. 3C §24.7).
            index::FEATURE_CONTROL => return None,
            index::TSC_ADJUST if m.model.tsc_adjust => {
                self.tsc.write_adjust(value);
                self.tsc_changed();
            }
            index::SPEC_CTRL if m.model.spec_ctrl => return keep(&mut m.spec_ctrl, value & !SPEC_CTRL == 0),
            index::PRED_CMD if m.model.spec_ctrl => return (value & !1 == 0).then_some(()),
            index::BIOS_UPDT_TRIG => {}
            index::BIOS_SIGN_ID => {}
            index::SYSENTER_CS => m.sysenter_cs = value,
            index::SYSENTER_ESP => return keep(&mut m.sysenter_esp, canonical),
            index::SYSENTER_EIP => return keep(&mut m.sysenter_eip, canonical),
            index::MCG_STATUS => return keep(&mut m.mcg_status, value == 0),
            index::MCG_CTL => return keep(&mut m.mcg_ctl, value == 0 || value == u64::MAX),
            index::MISC_ENABLE => {
                m.misc_enable = m.misc_enable & !MISC_ENABLE_WRITABLE | value & MISC_ENABLE_WRITABLE
            }
            index::DEBUGCTL => return keep(&mut m.debugctl, value & !DEBUGCTL == 0),
            index::PAT => return keep(&mut m.pat, pat_valid(value)),
            index::EFER if m.model.efer != 0 => return self.write_efer(value),
            index::STAR => m.star = value,
            index::LSTAR => return keep(&mut m.lstar, canonical),
            index::CSTAR => return keep(&mut m.cstar, canonical),
            index::FMASK => return keep(&mut m.fmask, value >> 32 == 0),
            index::FS_BASE => return keep(&mut self.segs[seg::FS].base, canonical),
            index::GS_BASE => return keep(&mut self.segs[seg::GS].base, canonical),
            index::KERNEL_GS_BASE => return keep(&mut m.kernel_gs_base, canonical),
            index::TSC_AUX if m.model.rdtscp || m.model.rdpid => {
                return keep(&mut m.tsc_aux, value >> 32 == 0);
            }
            _ if let Some((bank, register)) = machine_check(msr) => match register {
                0 => return keep(&mut m.mc_ctl[bank], value == 0 || value == u64::MAX),
                // Status, address and miscellany can only be cleared (SDM vol. 3B §16.3.2).
                _ => return (value == 0).then_some(()),
            },
            _ => {
                if m.mtrrs.knows(msr) {
                    return m.mtrrs.write(msr, value);
                }
                return self.kvm_msr_write(msr, value);
            }
        }
        Some(())
    }

    /// WRMSR IA32_EFER (SDM vol. 3A §2.2.1, §10.8.5).
    fn write_efer(&mut self, value: u64) -> Option<()> {
        if value & !self.msrs.model.efer != 0 {
            return None;
        }
        // LME may not change under paging; LMA is the processor's.
        if self.cr0 & cr0::PG != 0 && (value ^ self.efer) & efer::LME != 0 {
            return None;
        }
        let new = value & !efer::LMA | self.efer & efer::LMA;
        if (new ^ self.efer) & efer::NXE != 0 {
            self.flush_tlb();
        }
        self.efer = new;
        Some(())
    }
}

/// Whether a value is one that IA32_PAT can hold: eight of UC, WC, WT, WP, WB, UC- (SDM vol. 3A §12.12.2).
fn pat_valid(value: u64) -> bool {
    value.to_le_bytes().iter().all(|&kind| matches!(kind, 0 | 1 | 4..=7))
}

/// Bank and register (CTL, STATUS, ADDR, MISC) of a machine-check MSR.
fn machine_check(msr: u32) -> Option<(usize, u32)> {
    let at = msr.checked_sub(index::MC0_CTL).filter(|&at| at < 4 * MCE_BANKS)?;
    Some(((at / 4) as usize, at % 4))
}

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Rdmsr => rdmsr,
        Mnemonic::Wrmsr => wrmsr,
        _ => return None,
    })
}

fn rdmsr(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()?;
    let msr = cpu.regs.get::<u32>(at::RCX);
    let Some(value) = cpu.msr_read(msr) else { return Err(cpu.gp(0)) };
    cpu.set_edx_eax(value);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()?;
    let (msr, value) = (cpu.regs.get::<u32>(at::RCX), cpu.edx_eax());
    if cpu.msr_write(msr, value).is_none() {
        return Err(cpu.gp(0));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pat_takes_the_six_types_only() {
        assert!(pat_valid(PAT_RESET));
        assert!(pat_valid(0x0706_0504_0100_0706));
        for bad in [2u64, 3, 8, 0x80] {
            for entry in 0..8 {
                assert!(!pat_valid(bad << (8 * entry)));
            }
        }
    }
}
