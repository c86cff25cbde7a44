use std::sync::Arc;

use skep_hv::Startup;

use super::apic::lvt;
use super::*;

const SELF: u32 = 3;
const SVR: u64 = 0xf0;
const EOI: u64 = 0xb0;
const ESR: u64 = 0x280;
const ICR: u64 = 0x300;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const LVT_ERROR: u64 = 0x370;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
const TSC_DEADLINE: u32 = 0x6e0;
/// One TSC tick is half a nanosecond.
const TSC_HZ: u64 = 2_000_000_000;

fn apic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(id, true, 46, Arc::new(LinearTsc::new(TSC_HZ)));
    write(&mut apic, SVR, 0x1ff);
    apic
}

fn write(apic: &mut LocalApic, offset: u64, value: u32) {
    assert_eq!(apic.write_page(offset, 4, value.into(), 0), Action::None);
}

fn read(apic: &mut LocalApic, offset: u64) -> u32 {
    apic.read_page(offset, 4, 0) as u32
}

fn fixed(vector: u8) -> Delivery {
    Delivery { mode: DeliveryMode::Fixed, vector, level: false }
}

fn level(vector: u8) -> Delivery {
    Delivery { level: true, ..fixed(vector) }
}

/// The pending vector at `now`, acknowledged.
fn take(apic: &mut LocalApic, now: u64) -> Option<u8> {
    apic.advance(now);
    match apic.acknowledge() {
        Acknowledged::Vector(vector) => Some(vector),
        Acknowledged::Nothing => None,
        Acknowledged::External => panic!("external"),
    }
}

fn x2apic(apic: &mut LocalApic) {
    let base = apic.read_msr(0x1b, 0).unwrap();
    assert_eq!(apic.write_msr(0x1b, base | 1 << 10, 0), Some(Action::None));
}

#[test]
fn power_on_state() {
    let mut bsp = LocalApic::new(0, true, 46, Arc::new(LinearTsc::new(TSC_HZ)));
    let mut ap = LocalApic::new(SELF, true, 46, Arc::new(LinearTsc::new(TSC_HZ)));
    assert_eq!((bsp.base(), ap.base()), (0xfee0_0900, 0xfee0_0800));
    assert_eq!(read(&mut ap, 0x20), SELF << 24);
    assert_eq!(read(&mut ap, 0x30), 0x0105_0014);
    assert_eq!((read(&mut ap, SVR), read(&mut ap, 0xe0), read(&mut ap, 0xd0)), (0xff, u32::MAX, 0));
    assert_eq!((read(&mut ap, LVT_LINT0), read(&mut bsp, LVT_LINT0)), (0x1_0000, 0x700));
}

#[test]
fn priorities_nest() {
    let mut apic = apic(SELF);
    apic.accept(fixed(0x41));
    apic.accept(fixed(0x52));
    apic.accept(fixed(0x53));
    assert_eq!(take(&mut apic, 0), Some(0x53));
    assert_eq!(apic.ppr(), 0x50);
    assert_eq!(take(&mut apic, 0), None, "0x52 is in the same class");
    apic.accept(fixed(0x61));
    assert_eq!(take(&mut apic, 0), Some(0x61));
    assert_eq!(read(&mut apic, 0x130), 1 << 1, "ISR 0x61");
    assert_eq!(read(&mut apic, 0x220), 1 << (0x52 - 0x40) | 1 << 1, "IRR 0x52, 0x41");
    write(&mut apic, EOI, 0);
    write(&mut apic, EOI, 0);
    assert_eq!(take(&mut apic, 0), Some(0x52));
    write(&mut apic, EOI, 0);
    assert_eq!(take(&mut apic, 0), Some(0x41));
    write(&mut apic, EOI, 0);
    write(&mut apic, EOI, 0);
    assert_eq!((apic.ppr(), take(&mut apic, 0)), (0, None));
}

#[test]
fn task_priority_holds_back_its_class_and_below() {
    let mut apic = apic(SELF);
    apic.set_cr8(5);
    assert_eq!((read(&mut apic, 0x80), apic.cr8()), (0x50, 5));
    apic.accept(fixed(0x5f));
    assert!(!apic.pending().maskable);
    apic.accept(fixed(0x60));
    assert!(apic.pending().maskable);
    assert_eq!(take(&mut apic, 0), Some(0x60));
    write(&mut apic, 0x80, 0x7f);
    assert_eq!((apic.ppr(), apic.cr8()), (0x7f, 7), "TPR above ISR: PPR is TPR");
    write(&mut apic, 0x80, 0x6f);
    assert_eq!(apic.ppr(), 0x6f);
    write(&mut apic, 0x80, 0);
    assert_eq!(apic.ppr(), 0x60);
}

#[test]
fn end_of_level_interrupts_is_broadcast_unless_suppressed() {
    let mut apic = apic(SELF);
    apic.accept(level(0x41));
    assert_eq!(read(&mut apic, 0x1a0), 2, "TMR");
    assert_eq!(take(&mut apic, 0), Some(0x41));
    assert_eq!(apic.write_page(EOI, 4, 0, 0), Action::Eoi(0x41));
    write(&mut apic, SVR, 0x11ff);
    apic.accept(level(0x41));
    take(&mut apic, 0);
    write(&mut apic, EOI, 0);
    apic.accept(fixed(0x41));
    assert_eq!(read(&mut apic, 0x1a0), 0, "an edge clears TMR");
}

#[test]
fn software_disable_masks_and_refuses() {
    let mut apic = apic(SELF);
    write(&mut apic, LVT_TIMER, 0x40);
    write(&mut apic, SVR, 0xff);
    assert_eq!(read(&mut apic, LVT_TIMER), 0x1_0040);
    write(&mut apic, LVT_TIMER, 0x40);
    assert_eq!(read(&mut apic, LVT_TIMER), 0x1_0040);
    apic.accept(fixed(0x41));
    assert!(!apic.pending().maskable);
    apic.accept(Delivery { mode: DeliveryMode::Nmi, vector: 0, level: false });
    assert!(apic.pending().nmi);
    apic.acknowledge_nmi();
    assert!(!apic.pending().nmi);
}

#[test]
fn one_shot_timer() {
    let mut apic = apic(SELF);
    write(&mut apic, DIVIDE, 0b1011);
    write(&mut apic, LVT_TIMER, 0x40);
    let _ = apic.write_page(INITIAL, 4, 1000, 500);
    assert_eq!(apic.pending().next_ns, 1500);
    assert_eq!(apic.read_page(CURRENT, 4, 700), 800);
    assert_eq!(take(&mut apic, 1499), None);
    assert_eq!(take(&mut apic, 1500), Some(0x40));
    assert_eq!(apic.pending().next_ns, u64::MAX);
    assert_eq!(apic.read_page(CURRENT, 4, 1500), 0);
    assert_eq!(read(&mut apic, INITIAL), 1000);
}

#[test]
fn periodic_timer_and_its_divider() {
    let mut apic = apic(SELF);
    for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        write(&mut apic, DIVIDE, code);
        write(&mut apic, LVT_TIMER, 0x2_0040);
        let _ = apic.write_page(INITIAL, 4, 100, 0);
        assert_eq!(apic.pending().next_ns, 100 * divisor);
        assert_eq!(take(&mut apic, 100 * divisor), Some(0x40));
        assert_eq!(apic.pending().next_ns, 200 * divisor);
        write(&mut apic, EOI, 0);
        assert_eq!(take(&mut apic, 1050 * divisor), Some(0x40), "missed periods are one interrupt");
        assert_eq!(apic.pending().next_ns, 1100 * divisor);
        assert_eq!(apic.read_page(CURRENT, 4, 1050 * divisor), 50);
        write(&mut apic, EOI, 0);
        let _ = apic.write_page(INITIAL, 4, 0, 0);
        assert_eq!(apic.pending().next_ns, u64::MAX, "0 stops it");
    }
}

#[test]
fn changing_the_divider_keeps_the_count() {
    let mut apic = apic(SELF);
    write(&mut apic, DIVIDE, 0b1011);
    write(&mut apic, LVT_TIMER, 0x40);
    let _ = apic.write_page(INITIAL, 4, 1000, 0);
    let _ = apic.write_page(DIVIDE, 4, 0, 400);
    assert_eq!(apic.read_page(CURRENT, 4, 400), 600);
    assert_eq!(apic.pending().next_ns, 400 + 1200);
}

#[test]
fn masked_timer_counts_silently() {
    let mut apic = apic(SELF);
    write(&mut apic, DIVIDE, 0b1011);
    write(&mut apic, LVT_TIMER, 0x1_0040);
    let _ = apic.write_page(INITIAL, 4, 1000, 0);
    assert_eq!(apic.pending().next_ns, u64::MAX);
    assert_eq!(apic.read_page(CURRENT, 4, 999), 1);
    let _ = apic.write_page(LVT_TIMER, 4, 0x40, 2000);
    assert_eq!(take(&mut apic, 2000), None, "it expired while it was masked");
}

#[test]
fn tsc_deadline_timer() {
    let mut apic = apic(SELF);
    assert_eq!(apic.write_msr(TSC_DEADLINE, 4000, 0), Some(Action::None));
    assert_eq!(apic.read_msr(TSC_DEADLINE, 0), Some(0), "not in that mode");
    write(&mut apic, LVT_TIMER, 0x4_0040);
    let _ = apic.write_msr(TSC_DEADLINE, 4001, 0);
    assert_eq!(apic.read_msr(TSC_DEADLINE, 0), Some(4001));
    assert_eq!(apic.pending().next_ns, 2001);
    let _ = apic.write_page(INITIAL, 4, 5, 0);
    assert_eq!((read(&mut apic, INITIAL), read(&mut apic, CURRENT)), (0, 0), "ignored in that mode");
    assert_eq!(take(&mut apic, 2000), None);
    assert_eq!(take(&mut apic, 2001), Some(0x40));
    assert_eq!(apic.read_msr(TSC_DEADLINE, 2001), Some(0));
    write(&mut apic, EOI, 0);
    let _ = apic.write_msr(TSC_DEADLINE, 10, 3000);
    assert_eq!(take(&mut apic, 3000), Some(0x40), "a deadline in the past fires at once");
    let _ = apic.write_msr(TSC_DEADLINE, 10_000, 3000);
    let _ = apic.write_msr(TSC_DEADLINE, 0, 3000);
    assert_eq!(apic.pending().next_ns, u64::MAX);
    let _ = apic.write_msr(TSC_DEADLINE, 10_000, 3000);
    write(&mut apic, LVT_TIMER, 0x40);
    assert_eq!(apic.pending().next_ns, u64::MAX, "leaving the mode disarms");
}

#[test]
fn errors() {
    let mut apic = apic(SELF);
    write(&mut apic, LVT_ERROR, 0xfe);
    apic.accept(fixed(15));
    assert_eq!(take(&mut apic, 0), Some(0xfe));
    assert_eq!(read(&mut apic, ESR), 0, "until it is written");
    write(&mut apic, ICR, 0x0c);
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), 0x60);
    assert_eq!(read(&mut apic, 0x40), 0, "a reserved register");
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), 0x80);
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), 0);
    write(&mut apic, LVT_TIMER, 0x05);
    write(&mut apic, DIVIDE, 0xb);
    let _ = apic.write_page(INITIAL, 4, 10, 0);
    apic.advance(10);
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), 0x40, "an illegal vector in the local vector table");
}

#[test]
fn external_interrupts_through_lint0() {
    let mut apic = LocalApic::new(0, true, 46, Arc::new(LinearTsc::new(TSC_HZ)));
    apic.set_lint(0, true);
    assert!(apic.pending().maskable, "virtual wire");
    assert_eq!(apic.acknowledge(), Acknowledged::External);
    apic.set_lint(0, false);
    assert_eq!(apic.acknowledge(), Acknowledged::Nothing);
    write(&mut apic, SVR, 0x1ff);
    write(&mut apic, LVT_LINT0, 0x1_0700);
    apic.set_lint(0, true);
    assert!(!apic.pending().maskable);
    let _ = apic.write_msr(0x1b, 0xfee0_0100, 0);
    assert!(apic.pending().maskable, "disabled: the pin is INTR");
}

#[test]
fn lint_pins_as_vectors_and_nmi() {
    let mut apic = apic(SELF);
    write(&mut apic, LVT_LINT0, 0x45);
    apic.set_lint(0, true);
    apic.set_lint(0, true);
    assert_eq!(take(&mut apic, 0), Some(0x45));
    write(&mut apic, EOI, 0);
    assert_eq!(take(&mut apic, 0), None);
    apic.set_lint(0, false);
    write(&mut apic, LVT_LINT0, 0x8046);
    apic.set_lint(0, true);
    assert_eq!(take(&mut apic, 0), Some(0x46));
    assert_eq!(read(&mut apic, LVT_LINT0), 0xc046, "remote IRR");
    let _ = apic.write_page(EOI, 4, 0, 0);
    assert_eq!(take(&mut apic, 0), Some(0x46), "still high");
    apic.set_lint(0, false);
    let _ = apic.write_page(EOI, 4, 0, 0);
    assert_eq!(read(&mut apic, LVT_LINT0), 0x8046);
    write(&mut apic, LVT_LINT1, 0x400);
    apic.set_lint(1, true);
    assert!(apic.pending().nmi);
}

#[test]
fn init_and_startup() {
    let mut apic = apic(SELF);
    let deliver = |apic: &mut LocalApic, mode, vector| apic.accept(Delivery { mode, vector, level: false });
    deliver(&mut apic, DeliveryMode::Init, 0);
    assert!(apic.pending().startup);
    assert_eq!(apic.acknowledge_startup(), Some(Startup::Init));
    assert_eq!(read(&mut apic, SVR), 0xff, "INIT resets the registers");
    assert_eq!(read(&mut apic, 0x20), SELF << 24);
    deliver(&mut apic, DeliveryMode::StartUp, 0x9a);
    assert_eq!(apic.acknowledge_startup(), Some(Startup::Sipi(0x9a)));
    deliver(&mut apic, DeliveryMode::StartUp, 0x9a);
    assert_eq!(apic.acknowledge_startup(), None, "the second one finds it running");
    deliver(&mut apic, DeliveryMode::Init, 0);
    deliver(&mut apic, DeliveryMode::StartUp, 0x10);
    assert_eq!(apic.acknowledge_startup(), Some(Startup::Init));
    assert_eq!(apic.acknowledge_startup(), Some(Startup::Sipi(0x10)));
    assert!(!apic.pending().startup);
}

#[test]
fn x2apic_registers() {
    let mut apic = apic(0x25);
    assert_eq!(apic.read_msr(0x802, 0), None, "not in x2APIC mode");
    x2apic(&mut apic);
    assert_eq!(apic.read_msr(0x802, 0), Some(0x25));
    assert_eq!(apic.read_msr(0x80d, 0), Some(0x2_0020));
    assert_eq!(
        apic.write_msr(0x830, 7 << 32 | 0x4055, 0).map(|action| matches!(action, Action::Ipi(ipi)
        if ipi.destination == Destination::Physical(7) && ipi.delivery == fixed(0x55))),
        Some(true)
    );
    assert_eq!(apic.read_msr(0x830, 0), Some(7 << 32 | 0x4055));
    apic.accept(fixed(0x41));
    assert_eq!(apic.read_msr(0x822, 0), Some(2));
    assert_eq!(take(&mut apic, 0), Some(0x41));
    assert_eq!(apic.write_msr(0x80b, 0, 0), Some(Action::None));
    assert_eq!(apic.ppr(), 0);
    assert_eq!(apic.write_msr(0x808, 0x20, 0), Some(Action::None));
    assert_eq!(apic.cr8(), 2);
}

#[test]
fn x2apic_faults() {
    let mut apic = apic(0);
    x2apic(&mut apic);
    // Registers that do not exist or cannot be written or read.
    for msr in [0x800, 0x801, 0x802, 0x803, 0x80a, 0x80d, 0x80e, 0x810, 0x831, 0x839, 0x8ff] {
        assert_eq!(apic.write_msr(msr, 0, 0), None, "{msr:#x}");
    }
    for msr in [0x800, 0x809, 0x80b, 0x80e, 0x831, 0x83f, 0x8ff] {
        assert_eq!(apic.read_msr(msr, 0), None, "{msr:#x}");
    }
    // Reserved bits.
    for (msr, value) in
        [(0x80b, 1), (0x828, 1), (0x808, 0x100), (0x832, 1 << 31), (0x838, 1 << 32), (0x83e, 4)]
    {
        assert_eq!(apic.write_msr(msr, value, 0), None, "{msr:#x}");
    }
}

#[test]
fn self_ipi() {
    let mut apic = apic(SELF);
    x2apic(&mut apic);
    let action = apic.write_msr(0x83f, 0x77, 0).unwrap();
    let Action::Ipi(ipi) = action else { panic!("{action:?}") };
    assert_eq!((ipi.shorthand, ipi.delivery), (Shorthand::Itself, fixed(0x77)));
    assert_eq!(apic.write_msr(0x83f, 0x0f, 0), Some(Action::None));
    let _ = apic.write_msr(0x828, 0, 0);
    assert_eq!(apic.read_msr(0x828, 0), Some(0x20));
}

#[test]
fn changes_of_mode() {
    const OFF: u64 = 0xfee0_0900 & !0x800;
    const XAPIC: u64 = 0xfee0_0900;
    const X2APIC: u64 = 0xfee0_0d00;
    let step = |from: &[u64], to: u64| {
        let mut apic = LocalApic::new(0, true, 46, Arc::new(LinearTsc::new(TSC_HZ)));
        from.iter().for_each(|&base| assert!(apic.write_msr(0x1b, base, 0).is_some()));
        apic.write_msr(0x1b, to, 0).is_some()
    };
    assert!(step(&[], XAPIC | 0x1000));
    assert!(step(&[], OFF));
    assert!(step(&[], X2APIC));
    assert!(step(&[OFF], XAPIC));
    assert!(step(&[X2APIC], OFF));
    assert!(!step(&[X2APIC], XAPIC));
    assert!(!step(&[OFF], X2APIC));
    assert!(!step(&[], OFF | 0x400));
    assert!(!step(&[], XAPIC | 1));
    assert!(!step(&[], XAPIC | 1 << 46));
    let mut without = LocalApic::new(0, false, 46, Arc::new(LinearTsc::new(TSC_HZ)));
    assert_eq!(without.write_msr(0x1b, X2APIC, 0), None);
}

#[test]
fn init_level_deassert_is_ignored() {
    let mut apic = apic(SELF);
    assert_eq!(apic.write_page(ICR, 4, 0x8500, 0), Action::None);
    assert!(matches!(apic.write_page(ICR, 4, 0xc500, 0), Action::Ipi(_)));
}

#[test]
fn odd_accesses_of_the_page() {
    let mut apic = apic(SELF);
    assert_eq!(apic.read_page(0x33, 1, 0), 0x01);
    assert_eq!(apic.read_page(0x34, 4, 0), 0);
    assert_eq!(apic.read_page(0x30, 8, 0), 0x0105_0014);
    assert_eq!(apic.write_page(0x80, 1, 0x50, 0), Action::None);
    assert_eq!(apic.write_page(0x84, 4, 0x50, 0), Action::None);
    assert_eq!(apic.read_page(0x80, 4, 0), 0);
}

#[test]
fn paravirtual_eoi_is_offered_only_when_nothing_would_be_missed() {
    let mut apic = apic(SELF);
    assert!(!apic.can_skip_eoi());
    apic.accept(fixed(0x41));
    take(&mut apic, 0);
    assert!(apic.can_skip_eoi());
    apic.accept(fixed(0x31));
    assert!(!apic.can_skip_eoi());
    let _ = apic.end_of_interrupt();
    assert_eq!(take(&mut apic, 0), Some(0x31));
    let _ = apic.end_of_interrupt();
    apic.accept(level(0x41));
    take(&mut apic, 0);
    assert!(!apic.can_skip_eoi());
}

#[test]
fn restoring_keeps_the_timer_running() {
    let mut old = apic(SELF);
    write(&mut old, DIVIDE, 0xb);
    write(&mut old, LVT_TIMER, 0x2_0040);
    let _ = old.write_page(INITIAL, 4, 1000, 50_000);
    let state = old.save(50_400);
    let mut new = apic(SELF);
    new.restore(&state, 7).unwrap();
    assert_eq!(new.pending().next_ns, 607);
    assert_eq!(new.save(7), state);
    assert!(apic(SELF + 1).restore(&state, 0).is_err(), "another's");
    assert_eq!(state.lvt[lvt::TIMER], 0x2_0040);
}
