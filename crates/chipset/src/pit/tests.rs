use std::sync::Arc;

use super::*;
use crate::testing::Line;
use crate::time::ticks_to_ns;

struct Bench {
    pit: Pit,
    irq: Arc<Line>,
}

impl Bench {
    fn new() -> Self {
        let irq = Arc::new(Line::default());
        Self { pit: Pit::new(irq.clone()), irq }
    }

    fn write(&mut self, offset: u64, value: u8, now: u64) {
        assert_eq!(self.pit.write(offset, 1, value.into(), now), Effect::None);
    }

    fn read(&mut self, offset: u64, now: u64) -> u8 {
        self.pit.read(offset, 1, now) as u8
    }

    /// Programs a counter, low byte then high byte.
    fn program(&mut self, channel: u8, mode: u8, count: u16, now: u64) {
        self.write(3, channel << 6 | 0x30 | mode << 1, now);
        self.load(channel, count, now);
    }

    fn load(&mut self, channel: u8, count: u16, now: u64) {
        for byte in count.to_le_bytes() {
            self.write(channel.into(), byte, now);
        }
    }

    fn count(&mut self, channel: u8, now: u64) -> u16 {
        self.write(3, channel << 6, now);
        u16::from_le_bytes([self.read(channel.into(), now), self.read(channel.into(), now)])
    }

    fn status(&mut self, channel: u8, now: u64) -> u8 {
        self.write(3, 0xe0 | 2 << channel, now);
        self.read(channel.into(), now)
    }

    fn out2(&mut self, now: u64) -> bool {
        self.read(4, now) & 0x20 != 0
    }
}

/// The instant of a tick.
fn at(tick: u64) -> u64 {
    ticks_to_ns(tick, Pit::HZ)
}

#[test]
fn mode_0_raises_out_at_terminal_count_and_counts_on() {
    let mut b = Bench::new();
    b.program(0, 0, 1000, 0);
    assert_eq!(b.pit.next_deadline(), Some(at(1000)));
    b.pit.advance(at(1000) - 1);
    assert!(!b.irq.high());
    assert_eq!(b.count(0, at(999)), 1);
    b.pit.advance(at(1000));
    assert!(b.irq.high());
    assert_eq!(b.pit.next_deadline(), None);
    assert_eq!(b.count(0, at(1000)), 0);
    assert_eq!(b.count(0, at(1001)), 0xffff);
    b.write(0, 5, at(1002));
    assert!(!b.irq.high(), "the first byte of a new count takes OUT down");
}

#[test]
fn mode_2_interrupts_every_period() {
    let mut b = Bench::new();
    b.program(0, 2, 1193, 0);
    b.irq.edges();
    for period in 1..=5 {
        let deadline = b.pit.next_deadline().unwrap();
        assert_eq!(deadline, at(1193 * period));
        b.pit.advance(deadline);
        assert_eq!(b.irq.edges(), 1);
    }
    b.pit.advance(at(1193 * 100 + 7));
    assert_eq!(b.irq.edges(), 1, "missed periods are one interrupt");
    assert_eq!(b.pit.next_deadline(), Some(at(1193 * 101)));
    assert_eq!(b.count(0, at(1193 * 100 + 10)), 1183);
}

#[test]
fn mode_2_takes_a_new_count_at_the_end_of_the_period() {
    let mut b = Bench::new();
    b.program(0, 2, 1000, 0);
    b.load(0, 100, at(500));
    assert_eq!(b.status(0, at(500)) & 0x40, 0x40, "not loaded yet");
    assert_eq!(b.count(0, at(600)), 400);
    b.irq.edges();
    b.pit.advance(b.pit.next_deadline().unwrap());
    assert_eq!(b.irq.edges(), 1);
    assert_eq!(b.pit.next_deadline(), Some(at(1000) + at(100)));
    assert_eq!(b.status(0, at(1010)), 0xb4);
}

#[test]
fn mode_3_is_high_for_the_longer_half() {
    let mut b = Bench::new();
    b.write(4, 1, 0);
    b.program(2, 3, 5, 0);
    let wave: Vec<bool> = (0..10).map(|tick| b.out2(at(tick))).collect();
    assert_eq!(wave, [true, true, true, false, false, true, true, true, false, false]);
    let counts: Vec<u16> = (0..6).map(|tick| b.count(2, at(tick))).collect();
    assert_eq!(counts, [4, 2, 0, 4, 2, 4]);
}

#[test]
fn mode_3_takes_a_new_count_at_the_half_cycle() {
    let mut b = Bench::new();
    b.write(4, 1, 0);
    b.program(2, 3, 1000, 0);
    b.load(2, 10, at(100));
    assert!(b.out2(at(499)));
    assert!(!b.out2(at(500) + at(3)));
    assert!(b.out2(at(500) + at(6)));
}

#[test]
fn modes_1_and_5_wait_for_the_gate() {
    let mut b = Bench::new();
    b.program(2, 1, 100, 0);
    assert!(b.out2(at(50)));
    b.write(4, 1, at(60));
    assert!(!b.out2(at(61)));
    b.write(4, 0, at(70));
    assert!(!b.out2(at(80)), "the gate's level does not matter");
    b.write(4, 1, at(100));
    assert!(!b.out2(at(100) + at(99)), "triggered again");
    assert!(b.out2(at(100) + at(100)));
    b.write(4, 0, at(300));
    b.program(2, 5, 100, at(300));
    b.write(4, 1, at(400));
    let end = at(400) + at(100);
    assert!(b.out2(end - 1));
    assert!(!b.out2(end));
    assert!(b.out2(at(400) + at(101)));
}

#[test]
fn mode_4_strobes_once() {
    let mut b = Bench::new();
    b.program(0, 4, 10, 0);
    b.irq.edges();
    assert_eq!(b.pit.next_deadline(), Some(at(11)));
    b.pit.advance(at(11));
    assert_eq!(b.irq.edges(), 1);
    assert_eq!(b.pit.next_deadline(), None);
}

#[test]
fn the_gate_pauses_mode_0() {
    let mut b = Bench::new();
    b.write(4, 1, 0);
    b.program(2, 0, 1000, 0);
    b.write(4, 0, at(400));
    assert_eq!(b.count(2, at(5000)), 600);
    assert!(!b.out2(at(5000)));
    b.write(4, 1, at(5000));
    assert!(!b.out2(at(5000) + at(599)));
    assert!(b.out2(at(5000) + at(600)));
}

#[test]
fn latched_counts_hold_until_read() {
    let mut b = Bench::new();
    b.program(0, 2, 0, 0);
    b.write(3, 0, at(0x1234));
    b.write(3, 0, at(0x2000));
    assert_eq!(b.read(0, at(0x3000)), 0xcc);
    assert_eq!(b.read(0, at(0x4000)), 0xed);
    assert_eq!(b.read(0, at(0x4000)), 0, "running again: 0xc000");
    assert_eq!(b.read(0, at(0x4000)), 0xc0);
}

#[test]
fn read_back_gives_status_then_count() {
    let mut b = Bench::new();
    b.program(0, 2, 0x1000, 0);
    b.write(3, 0xc2, at(0x10));
    assert_eq!(b.read(0, 0), 0xb4);
    assert_eq!(b.read(0, at(0x800)), 0xf0);
    assert_eq!(b.read(0, at(0x800)), 0x0f);
}

#[test]
fn single_byte_access() {
    let mut b = Bench::new();
    b.write(3, 0x14, 0); // low byte, mode 2
    b.write(0, 0x40, 0);
    assert_eq!(b.read(0, at(0x10)), 0x30);
    b.write(3, 0x24, 0); // high byte
    b.write(0, 0x40, 0);
    assert_eq!(b.read(0, at(0x100)), 0x3f);
}

#[test]
fn bcd_counts() {
    let mut b = Bench::new();
    b.write(3, 0x35, 0);
    b.load(0, 0x1000, 0);
    assert_eq!(b.count(0, at(1)), 0x0999);
    assert_eq!(b.pit.next_deadline(), Some(at(1000)));
    b.write(3, 0x31, 0);
    b.load(0, 0, 0);
    assert_eq!(b.count(0, at(1)), 0x9999);
}

#[test]
fn speaker_port_shows_refresh_and_keeps_its_bits() {
    let mut b = Bench::new();
    b.write(4, 0xff, 0);
    assert_eq!(b.read(4, 0) & 0xcf, 0x0f);
    let toggles = (0..100).filter(|i| b.read(4, i * 7_000) & 0x10 != 0).count();
    assert!((40..60).contains(&toggles));
}

#[test]
fn restoring_in_another_process_keeps_the_phase() {
    let mut b = Bench::new();
    b.program(0, 2, 1000, 1_000_000_000);
    let state = b.pit.save(1_000_000_000 + at(400));
    let mut c = Bench::new();
    c.pit.restore(&state, 50).unwrap();
    assert_eq!(c.count(0, 50), 600);
    assert_eq!(c.pit.next_deadline(), Some(50 + at(1000) - at(400)));
}
