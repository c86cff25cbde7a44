//! Power-on, RESET, INIT and start-up: SDM vol. 3A §10.1, table 10-1.

use skep_hv::state::Segment;

use super::debug::{dr6, dr7};
use super::descriptor::system_type;
use super::mode::access;
use crate::cpu::{Cpu, Table, cr0, seg};
use crate::fault::Raised;
use crate::regs::{Regs, at};

/// The limit of everything after reset.
const LIMIT: u32 = 0xffff;

impl Cpu {
    /// The state after power-on or RESET. The TSC goes on with the VM's. All but the bootstrap processor wait for a
    /// start-up IPI.
    pub(crate) fn power_on_reset(&mut self) {
        self.cr0 = cr0::CD | cr0::NW;
        self.xcr0 = 1;
        self.fpu.reset();
        self.msrs.reset();
        self.tsc.reset();
        self.tsc_changed();
        self.init_reset();
        self.wait_for_sipi = self.id != 0;
    }

    /// The state after INIT: as after RESET, but the caches' bits of CR0, x87 and vector state, XCR0, the TSC, MTRRs and
    /// other MSRs stay.
    pub(crate) fn init_reset(&mut self) {
        let signature = self.msrs.model.cpuid.get(1, 0).unwrap_or_default().eax;
        self.regs = Regs::new();
        self.regs.set64(at::RDX, u64::from(signature));
        self.rip = 0xfff0;
        self.set_rflags(2);
        let data = Segment { selector: 0, base: 0, limit: LIMIT, access: access::DATA };
        self.segs = [data; 6];
        self.segs[seg::CS] = Segment { selector: 0xf000, base: 0xffff_0000, ..data };
        self.gdtr = Table { base: 0, limit: LIMIT as u16 };
        self.idtr = self.gdtr;
        self.ldtr = Segment { access: access::PRESENT | system_type::LDT, ..data };
        self.tr = Segment { access: access::PRESENT | system_type::TSS_BUSY, ..data };
        self.cr0 = self.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.efer = 0;
        self.pdpte = [0; 4];
        self.dr = [0; 4];
        self.dr6 = dr6::FIXED;
        self.dr7 = dr7::FIXED;
        self.raised = Raised::None;
        self.debug_trap = 0;
        self.sti_shadow = false;
        self.mov_ss_shadow = false;
        self.nmi_blocked = false;
        self.halted = false;
        self.shutdown = false;
        self.wait_for_sipi = false;
        self.ask_apic = true;
        self.look = true;
        self.flush_tlb();
        self.refresh_mode();
    }

    /// A start-up IPI (§9.4.4): real mode at `vector << 12`.
    pub(crate) fn sipi(&mut self, vector: u8) {
        self.wait_for_sipi = false;
        self.halted = false;
        let selector = u16::from(vector) << 8;
        self.segs[seg::CS] =
            Segment { selector, base: u64::from(selector) << 4, limit: LIMIT, access: access::DATA };
        self.rip = 0;
        self.refresh_mode();
    }
}
