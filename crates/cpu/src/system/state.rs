//! State as the machine reads and writes it: [`skep_hv::state`].
//!
//! What the local APIC holds (CR8, IA32_APIC_BASE, a pending NMI) is the machine's to save: it reads as zero here, and is
//! not looked at when written.

use skep_hv::state::{
    Activity, CpuState, Debug, DescriptorTable, Events, Fpu, General, PendingException, Segment, StateError,
    StateGroups, System,
};

use super::cpuid::xcr0_valid;
use super::debug::{dr6, dr7};
use super::mode::{access, dpl};
use super::msr::index;
use crate::cpu::{Cpu, Table, cr0, cr4, efer, fl, seg};
use crate::fault::{Exception, vector};

/// RFLAGS bits that exist.
const RFLAGS: u64 = fl::STATUS
    | fl::TF
    | fl::IF
    | fl::DF
    | fl::IOPL
    | fl::NT
    | fl::RF
    | fl::VM
    | fl::AC
    | fl::VIF
    | fl::VIP
    | fl::ID
    | 2;
/// Bits of a segment's access rights that exist.
const ACCESS: u32 = 0xf0ff | Segment::UNUSABLE;
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

fn check(good: bool, field: &'static str, value: u64, why: &'static str) -> Result<(), StateError> {
    if good { Ok(()) } else { Err(StateError::Value { field, value, why }) }
}

/// Whether an address is canonical under CR4.
fn canonical(address: u64, control: u64) -> bool {
    let shift = if control & cr4::LA57 != 0 { 7 } else { 16 };
    ((address << shift) as i64 >> shift) as u64 == address
}

impl Cpu {
    /// Reads the named groups.
    pub(crate) fn get_state(&mut self, groups: StateGroups) -> Result<CpuState, StateError> {
        let general =
            General { gpr: std::array::from_fn(|n| self.regs.gpr(n)), rip: self.rip, rflags: self.rflags() };
        let table = |table: Table| DescriptorTable { base: table.base, limit: table.limit };
        let system = System {
            segments: self.segs,
            tr: self.tr,
            ldtr: self.ldtr,
            gdtr: table(self.gdtr),
            idtr: table(self.idtr),
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: 0,
            xcr0: self.xcr0,
            efer: self.efer,
            apic_base: 0,
        };
        let activity = if self.shutdown {
            Activity::Shutdown
        } else if self.wait_for_sipi {
            Activity::WaitForSipi
        } else if self.halted {
            Activity::Halted
        } else {
            Activity::Running
        };
        // A debug trap that has not been delivered is an exception, its DR6 bits set already.
        let trap =
            (self.debug_trap != 0).then_some(PendingException { vector: vector::DB, error_code: None });
        let events = Events {
            activity,
            sti_shadow: self.sti_shadow,
            mov_ss_shadow: self.mov_ss_shadow,
            nmi_blocked: self.nmi_blocked,
            nmi_pending: false,
            exception: trap,
            interrupt: None,
        };
        let mut msrs = None;
        if groups.msrs {
            let saved = self.msrs.saved();
            msrs = Some(saved.into_iter().filter_map(|msr| Some((msr, self.msr_read(msr)?))).collect());
        }
        Ok(CpuState {
            general: groups.general.then_some(general),
            system: groups.system.then_some(system),
            fpu: groups.fpu.then(|| Fpu { xsave: self.fpu.save_area(self.msrs.model.xcr0) }),
            msrs,
            debug: groups.debug.then_some(Debug {
                address: self.dr,
                dr6: self.dr6 | self.debug_trap,
                dr7: self.dr7,
            }),
            events: groups.events.then_some(events),
            // The machine has it.
            apic: None,
        })
    }

    /// Writes the groups that `state` holds. On error nothing has changed.
    pub(crate) fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.check_state(state)?;
        // The MSRs check their values themselves, some of them by CR4, so the system registers come first; both can be
        // put back.
        let before = self.get_state(StateGroups { system: true, msrs: true, ..StateGroups::default() })?;
        if let Some(system) = &state.system {
            self.put_system(system);
        }
        let mut done = match &state.msrs {
            Some(msrs) => self.put_msrs(msrs),
            None => Ok(()),
        };
        if let (Ok(()), Some(fpu)) = (&done, &state.fpu) {
            done = self.fpu.load_area(&fpu.xsave, self.msrs.model.xcr0);
        }
        if let Err(error) = done {
            if let Some(system) = &before.system {
                self.put_system(system);
            }
            if let Some(msrs) = &before.msrs {
                self.put_msrs(msrs)?;
            }
            self.refresh_mode();
            return Err(error);
        }
        self.put_rest(state);
        Ok(())
    }

    /// Checks all but the MSRs and the XSAVE area, which are checked where they are written.
    pub(crate) fn check_state(&self, state: &CpuState) -> Result<(), StateError> {
        let system = match &state.system {
            Some(system) => {
                self.check_system(system, state.general.map_or(self.rflags(), |g| g.rflags))?;
                *system
            }
            None => System { cr4: self.cr4, efer: self.efer, ..System::default() },
        };
        if let Some(general) = &state.general {
            check_general(general, &system)?;
        }
        if let Some(debug) = &state.debug {
            check(
                debug.dr6 & !(dr6::WRITABLE | dr6::FIXED) == 0,
                "debug.dr6",
                debug.dr6,
                "a reserved bit is set",
            )?;
            check(
                debug.dr7 & !(dr7::WRITABLE | dr7::FIXED) == 0,
                "debug.dr7",
                debug.dr7,
                "a reserved bit is set",
            )?;
        }
        if let Some(exception) = state.events.and_then(|events| events.exception) {
            check(
                exception.vector < 32,
                "events.exception.vector",
                exception.vector.into(),
                "it is no exception",
            )?;
        }
        Ok(())
    }

    /// Writes all but system registers, MSRs and the XSAVE area, makes what is cached follow, and delivers the exception
    /// that waits in the state.
    pub(crate) fn put_rest(&mut self, state: &CpuState) {
        if let Some(general) = &state.general {
            for (n, &value) in general.gpr.iter().enumerate() {
                self.regs.set_gpr(n, value);
            }
            self.rip = general.rip;
            self.set_rflags(general.rflags);
        }
        if let Some(debug) = &state.debug {
            self.dr = debug.address;
            self.dr6 = debug.dr6 | dr6::FIXED;
            self.dr7 = debug.dr7 | dr7::FIXED;
            self.debug_trap = 0;
        }
        if let Some(events) = &state.events {
            self.halted = events.activity == Activity::Halted;
            self.wait_for_sipi = events.activity == Activity::WaitForSipi;
            self.shutdown = events.activity == Activity::Shutdown;
            self.sti_shadow = events.sti_shadow;
            self.mov_ss_shadow = events.mov_ss_shadow;
            self.nmi_blocked = events.nmi_blocked;
            self.debug_trap = 0;
        }
        self.flush_tlb();
        self.refresh_mode();
        if self.cr0 & cr0::PG != 0
            && self.cr4 & cr4::PAE != 0
            && self.efer & efer::LMA == 0
            && self.load_pdptes(self.cr3).is_err()
        {
            // Cached entries are not part of the state, and memory may hold others by now: none is present.
            self.pdpte = [0; 4];
        }
        self.raised = crate::fault::Raised::None;
        self.look = true;
        self.ask_apic = true;
        if let Some(PendingException { vector, error_code }) =
            state.events.and_then(|events| events.exception)
        {
            self.deliver_exception(Exception { vector, error: error_code });
        } else if let Some(vector) = state.events.and_then(|events| events.interrupt) {
            self.deliver_interrupt(vector);
        }
    }

    fn check_system(&self, s: &System, rflags: u64) -> Result<(), StateError> {
        let model = &self.msrs.model;
        let on = |register: u64, bit: u64| register & bit != 0;
        check(s.cr0 & !CR0 == 0, "system.cr0", s.cr0, "a reserved bit is set")?;
        let paging = on(s.cr0, cr0::PG);
        check(!paging || on(s.cr0, cr0::PE), "system.cr0", s.cr0, "paging needs protected mode")?;
        check(!on(s.cr0, cr0::NW) || on(s.cr0, cr0::CD), "system.cr0", s.cr0, "NW needs CD")?;
        check(s.cr4 & !model.cr4 == 0, "system.cr4", s.cr4, "this model lacks a feature it enables")?;
        check(s.efer & !model.efer == 0, "system.efer", s.efer, "this model lacks a feature it enables")?;
        let long = on(s.efer, efer::LMA);
        check(long == (paging && on(s.efer, efer::LME)), "system.efer", s.efer, "LMA is LME and CR0.PG")?;
        check(!long || on(s.cr4, cr4::PAE), "system.cr4", s.cr4, "IA-32e mode needs PAE")?;
        check(long || !on(s.cr4, cr4::PCIDE), "system.cr4", s.cr4, "PCIDE needs IA-32e mode")?;
        let width = if long { model.physical_bits } else { 32 };
        check(s.cr3 >> width == 0, "system.cr3", s.cr3, "it is too large an address")?;
        check(
            xcr0_valid(s.xcr0, model.xcr0 | 1),
            "system.xcr0",
            s.xcr0,
            "this model lacks a state component",
        )?;
        check(
            !long || !on(rflags, fl::VM),
            "general.rflags",
            rflags,
            "there is no virtual-8086 mode in IA-32e mode",
        )?;

        let v86 = on(s.cr0, cr0::PE) && on(rflags, fl::VM);
        let names = ["system.es", "system.cs", "system.ss", "system.ds", "system.fs", "system.gs"];
        for (segment, name) in s
            .segments
            .iter()
            .chain([&s.ldtr, &s.tr])
            .zip(names.into_iter().chain(["system.ldtr", "system.tr"]))
        {
            check_segment(segment, name, s.cr4)?;
        }
        for (n, (segment, name)) in s.segments.iter().zip(names).enumerate() {
            let wide = long && matches!(n, seg::FS | seg::GS);
            check(
                wide || segment.base >> 32 == 0,
                name,
                segment.base,
                "the base of this segment has 32 bits",
            )?;
            if v86 {
                let fits = segment.base == u64::from(segment.selector) << 4 && dpl(segment) == 3;
                check(fits, name, segment.base, "it is no segment of virtual-8086 mode")?;
            }
        }
        let (cs, ss) = (&s.segments[seg::CS], &s.segments[seg::SS]);
        check(cs.access & Segment::UNUSABLE == 0, "system.cs", cs.access.into(), "CS cannot be unusable")?;
        check(
            !long || cs.access & (access::L | access::DB) != access::L | access::DB,
            "system.cs",
            cs.access.into(),
            "L and D exclude each other",
        )?;
        check(
            on(s.cr0, cr0::PE) || dpl(ss) == 0,
            "system.ss",
            ss.access.into(),
            "real mode is privilege level 0",
        )?;
        for (table, name) in [(s.gdtr, "system.gdtr"), (s.idtr, "system.idtr")] {
            check(canonical(table.base, s.cr4), name, table.base, "the address is not canonical")?;
        }
        Ok(())
    }

    /// Writes the system registers, which [`Cpu::check_state`] has checked.
    pub(crate) fn put_system(&mut self, s: &System) {
        let table = |table: DescriptorTable| Table { base: table.base, limit: table.limit };
        self.segs = s.segments;
        self.tr = s.tr;
        self.ldtr = s.ldtr;
        self.gdtr = table(s.gdtr);
        self.idtr = table(s.idtr);
        self.cr0 = s.cr0 | cr0::ET;
        self.cr2 = s.cr2;
        self.cr3 = s.cr3;
        self.cr4 = s.cr4;
        self.xcr0 = s.xcr0;
        self.efer = s.efer;
    }

    /// Writes one MSR of the saved ones.
    pub(crate) fn put_msr(&mut self, msr: u32, value: u64) -> Result<(), StateError> {
        match msr {
            index::TSC => self.tsc.restore(value),
            index::TSC_ADJUST => self.tsc.restore_adjust(value),
            // Status registers can only be cleared, and never hold anything else.
            _ => check(self.msr_write(msr, value).is_some(), "msrs", value, "an MSR cannot hold it")?,
        }
        Ok(())
    }

    fn put_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), StateError> {
        let saved = self.msrs.saved();
        if let Some(&(msr, _)) = msrs.iter().find(|(msr, _)| saved.binary_search(msr).is_err()) {
            return Err(StateError::Msr(msr));
        }
        for &(msr, value) in msrs {
            self.put_msr(msr, value)?;
        }
        self.tsc_changed();
        Ok(())
    }
}

fn check_general(general: &General, system: &System) -> Result<(), StateError> {
    check(general.rflags & 2 != 0, "general.rflags", general.rflags, "bit 1 is always set")?;
    check(general.rflags & !RFLAGS == 0, "general.rflags", general.rflags, "a reserved bit is set")?;
    let good = if system.efer & efer::LMA != 0 {
        canonical(general.rip, system.cr4)
    } else {
        general.rip >> 32 == 0
    };
    check(good, "general.rip", general.rip, "it is not an address of this mode")
}

fn check_segment(segment: &Segment, name: &'static str, control: u64) -> Result<(), StateError> {
    check(
        segment.access & !ACCESS == 0,
        name,
        segment.access.into(),
        "a reserved bit of the access rights is set",
    )?;
    check(canonical(segment.base, control), name, segment.base, "the base is not canonical")?;
    if segment.access & Segment::UNUSABLE == 0 {
        let granular = segment.access & access::G != 0;
        let good = if granular { segment.limit & 0xfff == 0xfff } else { segment.limit >> 20 == 0 };
        check(good, name, segment.limit.into(), "the limit does not fit its granularity")?;
    }
    Ok(())
}
