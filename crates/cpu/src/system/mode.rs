//! What follows from the control registers, RFLAGS and the segments: the mode, and how memory is looked at in it.

use skep_hv::state::Segment;

use crate::cpu::{CodeSize, Cpu, Mode, cr0, cr4, efer, fl, seg};
use crate::fault::Exec;
use crate::mmu::Context;

/// Fields of [`Segment::access`].
pub(crate) mod access {
    pub(crate) const ACCESSED: u32 = 1 << 0;
    /// Data: writable. Code: readable.
    pub(crate) const RW: u32 = 1 << 1;
    /// Data: expand-down. Code: conforming.
    pub(crate) const EC: u32 = 1 << 2;
    pub(crate) const CODE: u32 = 1 << 3;
    /// Code or data, not a system segment.
    pub(crate) const S: u32 = 1 << 4;
    pub(crate) const DPL_SHIFT: u32 = 5;
    pub(crate) const DPL: u32 = 3 << DPL_SHIFT;
    pub(crate) const PRESENT: u32 = 1 << 7;
    pub(crate) const L: u32 = 1 << 13;
    pub(crate) const DB: u32 = 1 << 14;
    pub(crate) const G: u32 = 1 << 15;
    /// Present, accessed, writable data segment of privilege level 0.
    pub(crate) const DATA: u32 = PRESENT | S | RW | ACCESSED;
    /// Present, accessed, readable code segment of privilege level 0.
    pub(crate) const CODE_SEGMENT: u32 = PRESENT | S | CODE | RW | ACCESSED;
}

/// The privilege level that a segment's descriptor asks for.
pub(crate) fn dpl(segment: &Segment) -> u8 {
    ((segment.access & access::DPL) >> access::DPL_SHIFT) as u8
}

impl Cpu {
    /// Brings [`Cpu::mode`] and the choice of translations up to date. To be called after any change of CR0, CR4, EFER,
    /// RFLAGS.VM or AC, CS, SS, or DR7.
    pub(crate) fn refresh_mode(&mut self) {
        let protected = self.cr0 & cr0::PE != 0;
        let long = self.efer & efer::LMA != 0;
        let v86 = protected && !long && self.flag(fl::VM);
        let (cs, ss) = (&self.segs[seg::CS], &self.segs[seg::SS]);
        // The descriptor privilege level of SS is the CPL in every protected mode (SDM vol. 3C §25.3.1.2).
        let cpl = match (protected, v86) {
            (false, _) => 0,
            (_, true) => 3,
            _ => dpl(ss),
        };
        let code = if long && cs.access & access::L != 0 {
            CodeSize::Bits64
        } else if cs.access & access::DB != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        let stack_mask = match code {
            CodeSize::Bits64 => u64::MAX,
            _ if ss.access & access::DB != 0 => 0xffff_ffff,
            _ => 0xffff,
        };
        self.mode = Mode { cpl, code, stack_mask, protected, v86, long, paging: self.cr0 & cr0::PG != 0 };
        self.select_context();
    }

    /// Chooses the array of translations: after a change of RFLAGS.AC alone this is all that is needed.
    pub(crate) fn select_context(&mut self) {
        let context = if self.alignment_checked() || self.data_breakpoints_armed() {
            Context::Slow
        } else if self.mode.cpl == 3 {
            Context::User
        } else if self.smap_active() {
            Context::Kernel
        } else {
            Context::KernelAll
        };
        self.tlb.select(context);
    }

    /// Whether SMAP forbids explicit supervisor accesses to user pages now (SDM vol. 3A §4.6.1).
    pub(crate) fn smap_active(&self) -> bool {
        self.cr4 & cr4::SMAP != 0 && !self.flag(fl::AC)
    }

    /// Whether misaligned accesses are #AC (SDM vol. 3A §6.15, interrupt 17).
    pub(crate) fn alignment_checked(&self) -> bool {
        self.mode.cpl == 3 && self.flag(fl::AC) && self.cr0 & cr0::AM != 0
    }

    /// #GP(0) unless at privilege level 0.
    pub(crate) fn supervisor(&mut self) -> Exec {
        if self.mode.cpl == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    /// #UD in real mode and virtual-8086 mode.
    pub(crate) fn protected_only(&mut self) -> Exec {
        if self.mode.protected && !self.mode.v86 { Ok(()) } else { Err(self.ud()) }
    }

    /// #GP(0) where user mode may not look (CR4.UMIP).
    pub(crate) fn user_may_look(&mut self) -> Exec {
        if self.mode.cpl > 0 && self.cr4 & cr4::UMIP != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    /// Whether the processor is in 64-bit mode, as opposed to compatibility and legacy modes.
    pub(crate) fn is_64bit(&self) -> bool {
        self.mode.code == CodeSize::Bits64
    }

    /// IOPL.
    pub(crate) fn iopl(&self) -> u8 {
        ((self.rflags_rest & fl::IOPL) >> 12) as u8
    }

    /// The PCID in use: zero without CR4.PCIDE.
    pub(crate) fn pcid(&self) -> u16 {
        if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// Forgets every translation.
    pub(crate) fn flush_tlb(&mut self) {
        self.tlb.flush_all();
        let pcid = self.pcid();
        self.tlb.switch(pcid, false);
    }
}
