//! Register groups between the contract's form and KVM's.

use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{
    Activity, Apic, CpuState, Debug, DescriptorTable, Events, Fpu, General, PendingException, Segment,
    StateError, StateGroups, System,
};

use crate::error::Moved;
use crate::msrs;

/// Registers of a local APIC's page.
const APIC_REGISTERS: usize = 64;

/// What it takes to convert.
pub(crate) struct Shape {
    /// Bytes of the XSAVE area that the guest's CPUID announces.
    pub(crate) xsave_size: usize,
    /// The state components that it announces.
    pub(crate) xcr0: u64,
    /// The registers of the `msrs` group.
    pub(crate) msrs: Vec<u32>,
}

/// Reads the named groups.
pub(crate) fn get(vcpu: &VcpuFd, groups: StateGroups, shape: &Shape) -> Result<CpuState, StateError> {
    let mut state = CpuState::default();
    if groups.general {
        state.general = Some(general(&vcpu.get_regs().moved("KVM_GET_REGS")?));
    }
    if groups.system {
        let sregs = vcpu.get_sregs().moved("KVM_GET_SREGS")?;
        let xcrs = vcpu.get_xcrs().moved("KVM_GET_XCRS")?;
        let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0);
        state.system = Some(system(&sregs, xcr0.map_or(1, |xcr| xcr.value)));
    }
    if groups.fpu {
        let mut area = vcpu.get_xsave().moved("KVM_GET_XSAVE")?;
        hide_components(&mut area, shape);
        let mut xsave: Vec<u8> = area.region.iter().flat_map(|word| word.to_le_bytes()).collect();
        xsave.truncate(shape.xsave_size);
        state.fpu = Some(Fpu { xsave });
    }
    if groups.msrs {
        state.msrs = Some(msrs::read(vcpu, &shape.msrs)?);
    }
    if groups.debug {
        let debug = vcpu.get_debug_regs().moved("KVM_GET_DEBUGREGS")?;
        state.debug = Some(Debug { address: debug.db, dr6: debug.dr6, dr7: debug.dr7 });
    }
    if groups.events {
        let events = vcpu.get_vcpu_events().moved("KVM_GET_VCPU_EVENTS")?;
        let activity = vcpu.get_mp_state().moved("KVM_GET_MP_STATE")?;
        state.events = Some(self::events(&events, activity.mp_state));
    }
    if groups.apic {
        let page = vcpu.get_lapic().moved("KVM_GET_LAPIC")?;
        let register = |n: usize| {
            let bytes: [u8; 4] = std::array::from_fn(|at| page.regs[n * 16 + at] as u8);
            u32::from_le_bytes(bytes)
        };
        state.apic = Some(Apic { registers: (0..APIC_REGISTERS).map(register).collect() });
    }
    Ok(state)
}

/// Writes the groups that `state` holds.
pub(crate) fn set(vcpu: &VcpuFd, state: &CpuState, shape: &Shape) -> Result<(), StateError> {
    // System registers first: they say what the others may hold. Timers of the APIC before their deadline. Events last,
    // as other requests may clear them.
    if let Some(system) = &state.system {
        let mut sregs = vcpu.get_sregs().moved("KVM_GET_SREGS")?;
        put_system(&mut sregs, system);
        vcpu.set_sregs(&sregs).map_err(|error| refused("system.cr0", system.cr0, &error))?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: system.xcr0, ..Default::default() };
        vcpu.set_xcrs(&xcrs).map_err(|error| refused("system.xcr0", system.xcr0, &error))?;
    }
    if let Some(fpu) = &state.fpu {
        let mut area = kvm_xsave::default();
        let most = shape.xsave_size.min(area.region.len() * 4);
        // An area may be longer, if what is behind this processor's is in its initial state.
        let (used, rest) = fpu.xsave.split_at(fpu.xsave.len().min(most));
        if rest.iter().any(|&byte| byte != 0) {
            let (field, value) = ("fpu.xsave", fpu.xsave.len() as u64);
            return Err(StateError::Value {
                field,
                value,
                why: "it is larger than this processor's XSAVE area",
            });
        }
        for (word, bytes) in area.region.iter_mut().zip(used.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        hide_components(&mut area, shape);
        set_xsave(vcpu, &area).map_err(|error| refused("fpu.xsave", 0, &error))?;
    }
    if let Some(apic) = &state.apic {
        if apic.registers.len() != APIC_REGISTERS {
            let value = apic.registers.len() as u64;
            return Err(StateError::Value {
                field: "apic.registers",
                value,
                why: "a local APIC has 64 registers",
            });
        }
        let mut page = vcpu.get_lapic().moved("KVM_GET_LAPIC")?;
        for (n, register) in apic.registers.iter().enumerate() {
            for (at, byte) in register.to_le_bytes().into_iter().enumerate() {
                page.regs[n * 16 + at] = byte as _;
            }
        }
        vcpu.set_lapic(&page).map_err(|error| refused("apic.registers", 0, &error))?;
    }
    if let Some(msrs) = &state.msrs {
        msrs::write(vcpu, msrs)?;
    }
    if let Some(debug) = &state.debug {
        let regs = kvm_debugregs { db: debug.address, dr6: debug.dr6, dr7: debug.dr7, ..Default::default() };
        vcpu.set_debug_regs(&regs).map_err(|error| refused("debug.dr7", debug.dr7, &error))?;
    }
    if let Some(general) = &state.general {
        vcpu.set_regs(&regs(general)).map_err(|error| refused("general.rflags", general.rflags, &error))?;
    }
    if let Some(events) = &state.events {
        let mut now = vcpu.get_vcpu_events().moved("KVM_GET_VCPU_EVENTS")?;
        put_events(&mut now, events);
        vcpu.set_vcpu_events(&now).moved("KVM_SET_VCPU_EVENTS")?;
        let mp_state = match events.activity {
            Activity::Running => KVM_MP_STATE_RUNNABLE,
            Activity::Halted => KVM_MP_STATE_HALTED,
            Activity::WaitForSipi => KVM_MP_STATE_UNINITIALIZED,
            Activity::Shutdown => {
                let field = "events.activity";
                return Err(StateError::Value {
                    field,
                    value: 0,
                    why: "KVM cannot hold a processor in shutdown",
                });
            }
        };
        vcpu.set_mp_state(kvm_mp_state { mp_state }).moved("KVM_SET_MP_STATE")?;
    }
    Ok(())
}

/// Whether the guest ends level-triggered interrupts at the IOAPIC itself: bit 12 of the spurious-interrupt vector register.
pub(crate) fn suppresses_eoi_broadcast(vcpu: &VcpuFd) -> bool {
    const SPURIOUS: usize = 0xf0;
    vcpu.get_lapic().is_ok_and(|page| page.regs[SPURIOUS + 1] & 1 << 4 != 0)
}

/// Makes the processor forget what it remembers of the guest's page tables. There is no request for that; a change of CR4.PGE
/// does it (SDM vol. 3A §4.10.4.1), there and back.
pub(crate) fn flush_translations(vcpu: &VcpuFd) -> Result<(), StateError> {
    const PGE: u64 = 1 << 7;
    let mut sregs = vcpu.get_sregs().moved("KVM_GET_SREGS")?;
    for _ in 0..2 {
        sregs.cr4 ^= PGE;
        vcpu.set_sregs(&sregs).moved("KVM_SET_SREGS")?;
    }
    Ok(())
}

/// Takes the components that the guest's CPUID does not announce out of XSTATE_BV (SDM vol. 1 §13.4.2).
fn hide_components(area: &mut kvm_xsave, shape: &Shape) {
    area.region[128] &= shape.xcr0 as u32;
    area.region[129] &= (shape.xcr0 >> 32) as u32;
}

/// A group that KVM refuses as a whole; it does not say which value of it.
fn refused(field: &'static str, value: u64, error: &kvm_ioctls::Error) -> StateError {
    match error.errno() {
        libc::EINVAL => {
            StateError::Value { field, value, why: "KVM refuses it, or another register of its group" }
        }
        _ => StateError::Backend(format!("{field}: {}", std::io::Error::from(*error))),
    }
}

/// KVM_SET_XSAVE.
#[expect(unsafe_code, reason = "the request reads as many bytes as the guest's area may have")]
pub(crate) fn set_xsave(vcpu: &VcpuFd, area: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: more than the structure's 4096 bytes are read only if this process asks for larger state components (AMX) with
    // arch_prctl, which it does not.
    unsafe { vcpu.set_xsave(area) }
}

fn general(regs: &kvm_regs) -> General {
    let gpr = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    General { gpr, rip: regs.rip, rflags: regs.rflags }
}

fn regs(general: &General) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = general.gpr;
    let (rip, rflags) = (general.rip, general.rflags | 2);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn segment(from: &kvm_segment) -> Segment {
    let access = u32::from(from.type_ & 15)
        | u32::from(from.s & 1) << 4
        | u32::from(from.dpl & 3) << 5
        | u32::from(from.present & 1) << 7
        | u32::from(from.avl & 1) << 12
        | u32::from(from.l & 1) << 13
        | u32::from(from.db & 1) << 14
        | u32::from(from.g & 1) << 15
        | if from.unusable != 0 { Segment::UNUSABLE } else { 0 };
    Segment { selector: from.selector, base: from.base, limit: from.limit, access }
}

fn put_segment(from: &Segment) -> kvm_segment {
    let bit = |at: u32| (from.access >> at & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: (from.access & 15) as u8,
        present: bit(7),
        dpl: (from.access >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: bit(16),
        padding: 0,
    }
}

fn system(sregs: &kvm_sregs, xcr0: u64) -> System {
    let table = |table: &kvm_dtable| DescriptorTable { base: table.base, limit: table.limit };
    System {
        segments: [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(segment),
        tr: segment(&sregs.tr),
        ldtr: segment(&sregs.ldt),
        gdtr: table(&sregs.gdt),
        idtr: table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        xcr0,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
    }
}

fn put_system(sregs: &mut kvm_sregs, system: &System) {
    let table =
        |table: &DescriptorTable| kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] };
    let [es, cs, ss, ds, fs, gs] = system.segments.each_ref().map(put_segment);
    *sregs = kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: put_segment(&system.tr),
        ldt: put_segment(&system.ldtr),
        gdt: table(&system.gdtr),
        idt: table(&system.idtr),
        cr0: system.cr0,
        cr2: system.cr2,
        cr3: system.cr3,
        cr4: system.cr4,
        cr8: system.cr8,
        efer: system.efer,
        apic_base: system.apic_base,
        // Interrupts in flight are in the events.
        interrupt_bitmap: [0; 4],
    };
}

fn events(events: &kvm_vcpu_events, mp_state: u32) -> Events {
    let exception = (events.exception.injected != 0 || events.exception.pending != 0).then(|| {
        let error_code = (events.exception.has_error_code != 0).then_some(events.exception.error_code);
        PendingException { vector: events.exception.nr, error_code }
    });
    Events {
        activity: match mp_state {
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
            _ => Activity::Running,
        },
        sti_shadow: u32::from(events.interrupt.shadow) & KVM_X86_SHADOW_INT_STI != 0,
        mov_ss_shadow: u32::from(events.interrupt.shadow) & KVM_X86_SHADOW_INT_MOV_SS != 0,
        nmi_blocked: events.nmi.masked != 0,
        nmi_pending: events.nmi.pending != 0 || events.nmi.injected != 0,
        exception,
        // A software interrupt in flight is executed again: RIP is still at the instruction.
        interrupt: (events.interrupt.injected != 0 && events.interrupt.soft == 0)
            .then_some(events.interrupt.nr),
    }
}

fn put_events(to: &mut kvm_vcpu_events, events: &Events) {
    *to = kvm_vcpu_events::default();
    to.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    if let Some(exception) = events.exception {
        to.exception.injected = 1;
        to.exception.nr = exception.vector;
        to.exception.has_error_code = exception.error_code.is_some().into();
        to.exception.error_code = exception.error_code.unwrap_or(0);
    }
    if let Some(vector) = events.interrupt {
        to.interrupt.injected = 1;
        to.interrupt.nr = vector;
    }
    let shadow = |on: bool, bit: u32| if on { bit as u8 } else { 0 };
    to.interrupt.shadow = shadow(events.sti_shadow, KVM_X86_SHADOW_INT_STI)
        | shadow(events.mov_ss_shadow, KVM_X86_SHADOW_INT_MOV_SS);
    to.nmi.masked = events.nmi_blocked.into();
    to.nmi.pending = events.nmi_pending.into();
}

/// Everything about a vCPU as it was when KVM made it.
pub(crate) struct PowerOn {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: Box<kvm_xsave>,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: Box<kvm_lapic_state>,
    mp_state: kvm_mp_state,
    msrs: Vec<(u32, u64)>,
}

impl PowerOn {
    /// Remembers the state of a vCPU that has not run.
    pub(crate) fn of(vcpu: &VcpuFd, cpuid: &CpuidTable, shape: &Shape) -> Result<Self, StateError> {
        let mut regs = vcpu.get_regs().moved("KVM_GET_REGS")?;
        // Family, model and stepping (SDM vol. 3A table 11-1).
        regs.rdx = cpuid.get(1, 0).unwrap_or_default().eax.into();
        let mut msrs = msrs::read(vcpu, &shape.msrs)?;
        for (index, value) in &mut msrs {
            match *index {
                msrs::IA32_TSC => *value = 0,
                msrs::IA32_MISC_ENABLE => *value |= msrs::FAST_STRINGS,
                msrs::IA32_ARCH_CAPABILITIES => *value = cpuid.arch_capabilities(*value),
                _ => {}
            }
        }
        Ok(Self {
            regs,
            sregs: vcpu.get_sregs().moved("KVM_GET_SREGS")?,
            xcrs: vcpu.get_xcrs().moved("KVM_GET_XCRS")?,
            xsave: Box::new(vcpu.get_xsave().moved("KVM_GET_XSAVE")?),
            debug: vcpu.get_debug_regs().moved("KVM_GET_DEBUGREGS")?,
            events: vcpu.get_vcpu_events().moved("KVM_GET_VCPU_EVENTS")?,
            lapic: Box::new(vcpu.get_lapic().moved("KVM_GET_LAPIC")?),
            mp_state: vcpu.get_mp_state().moved("KVM_GET_MP_STATE")?,
            msrs,
        })
    }

    /// Gives a vCPU this state.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        vcpu.set_sregs(&self.sregs).moved("KVM_SET_SREGS")?;
        vcpu.set_xcrs(&self.xcrs).moved("KVM_SET_XCRS")?;
        set_xsave(vcpu, &self.xsave).moved("KVM_SET_XSAVE")?;
        vcpu.set_lapic(&self.lapic).moved("KVM_SET_LAPIC")?;
        msrs::write(vcpu, &self.msrs)?;
        vcpu.set_debug_regs(&self.debug).moved("KVM_SET_DEBUGREGS")?;
        vcpu.set_regs(&self.regs).moved("KVM_SET_REGS")?;
        let mut events = self.events;
        // All of them are to be written, whatever was valid when they were read.
        events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
        vcpu.set_vcpu_events(&events).moved("KVM_SET_VCPU_EVENTS")?;
        vcpu.set_mp_state(self.mp_state).moved("KVM_SET_MP_STATE")
    }
}
