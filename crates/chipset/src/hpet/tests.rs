use super::*;
use crate::testing::{Line, Messages};

struct Bench {
    hpet: Hpet,
    gsi: [Arc<Line>; 2],
    legacy: [Arc<Line>; 2],
    messages: Arc<Messages>,
    gate: LegacyGate,
}

/// Nanoseconds a tick.
const TICK: u64 = 100;
const ROUTE_20: u64 = 20 << 9;
const ROUTE_21: u64 = 21 << 9;

impl Bench {
    fn new() -> Self {
        let gsi = [Arc::new(Line::default()), Arc::new(Line::default())];
        let legacy = [Arc::new(Line::default()), Arc::new(Line::default())];
        let messages = Arc::new(Messages::default());
        let gate = LegacyGate::default();
        let mut pins = [const { None }; GSIS];
        pins[20] = Some(gsi[0].clone() as Irq);
        pins[21] = Some(gsi[1].clone() as Irq);
        let lines =
            HpetLines { gsi: pins, legacy: [legacy[0].clone(), legacy[1].clone()], msi: messages.clone() };
        Self { hpet: Hpet::new(lines, gate.clone()), gsi, legacy, messages, gate }
    }

    fn write(&mut self, offset: u64, value: u64, now: u64) {
        assert_eq!(self.hpet.write(offset, 8, value, now), Effect::None);
    }

    fn read(&mut self, offset: u64, now: u64) -> u64 {
        self.hpet.read(offset, 8, now)
    }
}

#[test]
fn capabilities() {
    let mut b = Bench::new();
    assert_eq!(b.read(0, 0), 100_000_000 << 32 | 0x8086_a201);
    assert_eq!(b.hpet.read(4, 4, 0), 100_000_000);
    assert_eq!(b.read(0x100, 0), 0x0030_0000 << 32 | 0x8030);
    assert_eq!(b.read(0x160, 0), 0);
}

#[test]
fn the_counter_runs_while_enabled() {
    let mut b = Bench::new();
    assert_eq!(b.read(0xf0, 5000), 0);
    b.write(0x10, 1, 5000);
    assert_eq!(b.read(0xf0, 5000 + 7 * TICK), 7);
    b.write(0x10, 0, 5000 + 9 * TICK);
    assert_eq!(b.read(0xf0, 90_000), 9);
    b.write(0xf0, 0xffff_ffff, 90_000);
    b.write(0x10, 1, 90_000);
    assert_eq!(b.read(0xf0, 90_000 + 2 * TICK), 0x1_0000_0001);
    assert_eq!(b.hpet.read(0xf4, 4, 90_000 + 2 * TICK), 1);
}

#[test]
fn one_shot_edge() {
    let mut b = Bench::new();
    b.write(0x100, ROUTE_20 | config::INTERRUPT, 0);
    b.write(0x108, 50, 0);
    assert_eq!(b.hpet.next_deadline(), None, "the counter is halted");
    b.write(0x10, 1, 1000);
    assert_eq!(b.hpet.next_deadline(), Some(1000 + 50 * TICK));
    b.hpet.advance(1000 + 50 * TICK - 1);
    assert_eq!(b.gsi[0].edges(), 0);
    b.hpet.advance(1000 + 50 * TICK);
    assert_eq!(b.gsi[0].edges(), 1);
    assert!(!b.gsi[0].high());
    assert_eq!(b.read(0x20, 10_000), 0);
    assert_eq!(b.hpet.next_deadline(), None);
}

#[test]
fn periodic_as_linux_programs_it() {
    let mut b = Bench::new();
    b.write(0x10, 1, 0);
    let now = 1000 * TICK;
    b.write(0x100, ROUTE_20 | config::INTERRUPT | config::PERIODIC | config::SET_VALUE, now);
    b.write(0x108, 1500, now);
    b.write(0x108, 200, now);
    for n in 0..4 {
        assert_eq!(b.hpet.next_deadline(), Some((1500 + 200 * n) * TICK));
        b.hpet.advance((1500 + 200 * n) * TICK);
        assert_eq!(b.gsi[0].edges(), 1);
    }
    b.hpet.advance(3199 * TICK);
    assert_eq!(b.gsi[0].edges(), 1);
    assert_eq!(b.read(0x108, 3199 * TICK), 3300);
}

#[test]
fn level_holds_until_status_is_cleared() {
    let mut b = Bench::new();
    b.write(0x10, 1, 0);
    b.write(0x120, ROUTE_21 | config::INTERRUPT | config::LEVEL, 0);
    b.write(0x128, 10, 0);
    b.hpet.advance(10 * TICK);
    assert!(b.gsi[1].high());
    assert_eq!(b.read(0x20, 10 * TICK), 2);
    b.write(0x20, 1, 10 * TICK);
    assert!(b.gsi[1].high());
    b.write(0x20, 2, 10 * TICK);
    assert!(!b.gsi[1].high());
}

#[test]
fn two_level_timers_on_one_line() {
    let mut b = Bench::new();
    b.write(0x10, 1, 0);
    for timer in [0x100, 0x120] {
        b.write(timer, ROUTE_20 | config::INTERRUPT | config::LEVEL, 0);
        b.write(timer + 8, 10, 0);
    }
    b.hpet.advance(10 * TICK);
    b.write(0x20, 1, 10 * TICK);
    assert!(b.gsi[0].high());
    b.write(0x20, 2, 10 * TICK);
    assert!(!b.gsi[0].high());
}

#[test]
fn legacy_replacement_moves_irq_0_and_8() {
    let mut b = Bench::new();
    let line = Arc::new(Line::default());
    let pit = b.gate.guard(line.clone());
    pit.set(true);
    assert!(line.high());
    b.write(0x10, 3, 0);
    assert!(!line.high());
    pit.set(false);
    pit.set(true);
    assert!(!line.high());
    for timer in [0x100, 0x120, 0x140] {
        b.write(timer, ROUTE_20 | config::INTERRUPT, 0);
        b.write(timer + 8, 10, 0);
    }
    b.hpet.advance(10 * TICK);
    assert_eq!((b.legacy[0].edges(), b.legacy[1].edges(), b.gsi[0].edges()), (1, 1, 1));
    b.hpet.reset(0);
    assert!(line.high());
}

#[test]
fn fsb_delivery() {
    let mut b = Bench::new();
    b.write(0x10, 1, 0);
    b.write(0x110, 0xfee0_1000 << 32 | 0x4041, 0);
    b.write(0x100, config::FSB | config::INTERRUPT, 0);
    b.write(0x108, 10, 0);
    b.hpet.advance(10 * TICK);
    assert_eq!(b.messages.take(), [MsiMessage { address: 0xfee0_1000, data: 0x4041 }]);
}

#[test]
fn narrow_timers_wrap() {
    let mut b = Bench::new();
    b.write(0xf0, 0xffff_fff0, 0);
    b.write(0x100, ROUTE_20 | config::INTERRUPT | config::NARROW, 0);
    assert_eq!(b.hpet.write(0x108, 4, 0x10, 0), Effect::None);
    b.write(0x10, 1, 0);
    assert_eq!(b.hpet.next_deadline(), Some(0x20 * TICK));
    b.hpet.advance(0x20 * TICK);
    assert_eq!(b.gsi[0].edges(), 1);
    assert_eq!(b.hpet.next_deadline(), Some((0x20 + (1 << 32)) * TICK), "again every turn");
}

#[test]
fn routes_that_do_not_exist_are_not_taken() {
    let mut b = Bench::new();
    b.write(0x100, ROUTE_21, 0);
    b.write(0x100, 31 << 9, 0);
    assert_eq!(b.read(0x100, 0) & config::ROUTE, ROUTE_21);
}

#[test]
fn an_edge_on_a_pin_that_is_held_high_is_none() {
    let mut b = Bench::new();
    b.write(0x10, 1, 0);
    b.write(0x100, ROUTE_20 | config::INTERRUPT | config::LEVEL, 0);
    b.write(0x108, 10, 0);
    b.write(0x120, ROUTE_20 | config::INTERRUPT, 0);
    b.write(0x128, 20, 0);
    b.hpet.advance(10 * TICK);
    assert!(b.gsi[0].high());
    b.hpet.advance(20 * TICK);
    assert!(b.gsi[0].high(), "the level-triggered timer still holds it");
}
