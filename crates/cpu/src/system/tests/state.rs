//! Reset values, and state that is read, written and refused.

use skep_hv::state::{Activity, CpuState, Events, StateError, StateGroups, System};

use super::super::msr::index as msr;
use super::*;

#[test]
fn power_on() {
    let mut cpu = long(3);
    cpu.msr_write(msr::LSTAR, 5);
    cpu.power_on_reset();
    assert_eq!((cpu.rip, cpu.segs[seg::CS].selector, cpu.segs[seg::CS].base), (0xfff0, 0xf000, 0xffff_0000));
    assert_eq!((cpu.cr0, cpu.cr4, cpu.efer, cpu.rflags()), (0x6000_0010, 0, 0, 2));
    assert_eq!((cpu.dr6, cpu.dr7, cpu.idtr.limit), (0xffff_0ff0, 0x400, 0xffff));
    assert_eq!(cpu.regs.r64(at::RDX), u64::from(cpu.msrs.model.cpuid.get(1, 0).unwrap().eax));
    assert_eq!((cpu.msr_read(msr::LSTAR), cpu.msr_read(msr::PAT)), (Some(0), Some(0x0007_0406_0007_0406)));
    assert!(!cpu.mode.protected && cpu.mode.cpl == 0 && !cpu.wait_for_sipi);
}

#[test]
fn init_keeps_what_it_must_and_a_start_up_ipi_begins() {
    let mut cpu = long(0);
    cpu.msr_write(msr::LSTAR, 5);
    cpu.cr0 |= cr0::CD;
    cpu.init_reset();
    assert_eq!((cpu.cr0, cpu.efer), (cr0::CD | cr0::ET, 0));
    assert_eq!(cpu.msr_read(msr::LSTAR), Some(5));
    cpu.wait_for_sipi = true;
    cpu.sipi(0x9a);
    assert_eq!((cpu.segs[seg::CS].selector, cpu.segs[seg::CS].base, cpu.rip), (0x9a00, 0x9_a000, 0));
    assert!(!cpu.wait_for_sipi);
}

/// All but the TSC, which moves.
fn still(mut state: CpuState) -> CpuState {
    if let Some(msrs) = &mut state.msrs {
        msrs.retain(|m| m.0 != msr::TSC);
    }
    state
}

#[test]
fn state_goes_from_one_processor_to_another() {
    for mut from in [real(), protected(0), protected(3), v86(2), long(0), long(3)] {
        for n in 0..16 {
            from.regs.set_gpr(n, 0x1111_1111_1111 * n as u64);
        }
        from.msr_write(msr::KERNEL_GS_BASE, 0x1234);
        from.msr_write(msr::TSC_ADJUST, 1 << 40);
        from.msr_write(0x200, 6);
        from.dr[1] = 0x4567;
        from.nmi_blocked = true;
        from.sti_shadow = true;
        from.halted = true;
        let state = from.get_state(StateGroups::ALL).unwrap();
        let mut to = cpu();
        to.set_state(&state).unwrap();
        assert_eq!(still(to.get_state(StateGroups::ALL).unwrap()), still(state));
        assert_eq!(to.mode, from.mode);
        assert!(to.tsc.now() >= 1 << 40, "the count goes on");
    }
}

#[test]
fn groups_that_were_not_asked_for_are_absent() {
    let mut cpu = long(0);
    let state = cpu.get_state(StateGroups { debug: true, ..StateGroups::default() }).unwrap();
    assert!(state.debug.is_some() && state.general.is_none() && state.msrs.is_none() && state.fpu.is_none());
    cpu.set_state(&CpuState::default()).unwrap();
}

#[test]
fn impossible_states_are_refused_whole() {
    type Spoil = fn(&mut System);
    let spoil: [(&str, Spoil); 17] = [
        ("system.cr0", |s| s.cr0 &= !cr0::PE),
        ("system.cr0", |s| s.cr0 |= 1 << 40),
        ("system.cr0", |s| s.cr0 |= cr0::NW),
        ("system.cr4", |s| s.cr4 |= 1 << 13),
        ("system.cr4", |s| s.cr4 &= !cr4::PAE),
        ("system.efer", |s| s.efer &= !efer::LMA),
        ("system.efer", |s| s.efer |= 2),
        ("system.cr3", |s| s.cr3 = 1 << 60),
        ("system.xcr0", |s| s.xcr0 = 0),
        ("system.xcr0", |s| s.xcr0 = 1 << 63 | 1),
        ("system.cs", |s| s.segments[seg::CS].access |= access::DB),
        ("system.cs", |s| s.segments[seg::CS].access |= 1 << 20),
        ("system.ss", |s| s.segments[seg::SS].limit = 0x1234_5678),
        ("system.ds", |s| s.segments[seg::DS].base = 1 << 40),
        ("system.gs", |s| s.segments[seg::GS].base = 1 << 60),
        ("system.tr", |s| s.tr.base = 1 << 60),
        ("system.gdtr", |s| s.gdtr.base = 1 << 60),
    ];
    let mut cpu = long(0);
    let good = cpu.get_state(StateGroups::ALL).unwrap();
    for (n, (wanted, spoil)) in spoil.into_iter().enumerate() {
        let mut bad = good.clone();
        bad.general.as_mut().unwrap().gpr[0] = 77;
        spoil(bad.system.as_mut().unwrap());
        match cpu.set_state(&bad) {
            Err(StateError::Value { field, .. }) => assert_eq!(field, wanted, "case {n}"),
            other => panic!("case {n}: {other:?}"),
        }
        assert_eq!(still(cpu.get_state(StateGroups::ALL).unwrap()), still(good.clone()), "case {n}");
    }
    let mut bad = good.clone();
    bad.general.as_mut().unwrap().rflags = 0;
    assert!(cpu.set_state(&bad).is_err());
    bad.general.as_mut().unwrap().rflags = 2 | 1 << 40;
    assert!(cpu.set_state(&bad).is_err());
    let mut bad = good.clone();
    bad.general.as_mut().unwrap().rip = 1 << 50;
    assert!(cpu.set_state(&bad).is_err());
    let mut bad = good.clone();
    bad.msrs = Some(vec![(msr::LSTAR, 0x1000), (0x1234_5678, 0)]);
    assert!(matches!(cpu.set_state(&bad), Err(StateError::Msr(0x1234_5678))));
    bad.msrs = Some(vec![(msr::LSTAR, 0x1000), (msr::PAT, 2)]);
    assert!(cpu.set_state(&bad).is_err());
    bad.msrs = None;
    bad.fpu.as_mut().unwrap().xsave.clear();
    assert!(cpu.set_state(&bad).is_err());
    assert_eq!(still(cpu.get_state(StateGroups::ALL).unwrap()), still(good), "nothing has stuck");
}

#[test]
fn activity_and_a_pending_exception() {
    let mut cpu = long(0);
    for activity in [Activity::Halted, Activity::WaitForSipi, Activity::Shutdown, Activity::Running] {
        let events = Events { activity, ..Events::default() };
        cpu.set_state(&CpuState { events: Some(events), ..CpuState::default() }).unwrap();
        assert_eq!(cpu.get_state(StateGroups::ALL).unwrap().events, Some(events));
    }
    set_gate(&cpu, 13, gate(super::super::descriptor::system_type::INTERRUPT_GATE, 0, CODE0, HANDLER, 0));
    let exception = Some(skep_hv::state::PendingException { vector: 13, error_code: Some(5) });
    cpu.set_state(&CpuState {
        events: Some(Events { exception, ..Events::default() }),
        ..CpuState::default()
    })
    .unwrap();
    assert_eq!((cpu.rip, stack(&cpu, 8)), (HANDLER, [5, CODE]));
    // A trap that waits is saved as what it will be.
    cpu.debug_trap = 1 << 14;
    let state = cpu.get_state(StateGroups::ALL).unwrap();
    assert_eq!(state.events.unwrap().exception.unwrap().vector, 1);
    assert_ne!(state.debug.unwrap().dr6 & 1 << 14, 0);
}
