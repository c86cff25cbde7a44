use std::sync::Arc;

use super::*;
use crate::testing::Line;

/// 2024-02-28 23:59:58 UTC, a Wednesday.
const START: i64 = 1_709_164_798;

struct Bench {
    rtc: Rtc,
    irq: Arc<Line>,
}

impl Bench {
    fn new() -> Self {
        let irq = Arc::new(Line::default());
        let config = RtcConfig {
            time: START * SECOND as i64,
            memory_below_4g: 0xc000_0000,
            memory_above_4g: 0x4000_0000,
        };
        Self { rtc: Rtc::new(config, irq.clone(), 0), irq }
    }

    fn read(&mut self, index: u8, now: u64) -> u8 {
        assert_eq!(self.rtc.write(0, 1, index.into(), now), Effect::None);
        self.rtc.read(1, 1, now) as u8
    }

    fn write(&mut self, index: u8, value: u8, now: u64) {
        assert_eq!(self.rtc.write(0, 2, u64::from(value) << 8 | u64::from(index), now), Effect::None);
    }

    /// Hour, minute, second, weekday, day, month, year, century as they read.
    fn time(&mut self, now: u64) -> [u8; 8] {
        [4, 2, 0, 6, 7, 8, 9, 0x32].map(|index| self.read(index, now))
    }
}

#[test]
fn time_in_bcd_rolls_over() {
    let mut b = Bench::new();
    assert_eq!(b.time(0), [0x23, 0x59, 0x58, 4, 0x28, 0x02, 0x24, 0x20]);
    assert_eq!(b.time(SECOND * 2), [0x00, 0x00, 0x00, 5, 0x29, 0x02, 0x24, 0x20]);
}

#[test]
fn binary_and_twelve_hours() {
    let mut b = Bench::new();
    b.write(0x0b, 0x04, 0);
    assert_eq!(b.time(0), [0x80 | 11, 59, 58, 4, 28, 2, 24, 20]);
    b.write(0x0b, 0x00, 0);
    assert_eq!(b.read(4, 0), 0x91);
    assert_eq!(b.read(4, 2 * SECOND), 0x12, "midnight");
    assert_eq!(b.read(4, (2 + 12 * 3600) * SECOND), 0x92, "noon");
}

#[test]
fn setting_the_time_as_linux_does() {
    let mut b = Bench::new();
    let now = SECOND / 3;
    b.write(0x0b, 0x82, now);
    b.write(0x0a, 0x76, now);
    for (index, value) in [(9, 0x31), (8, 0x12), (7, 0x31), (4, 0x12), (2, 0x34), (0, 0x56), (0x32, 0x21)] {
        b.write(index, value, now);
    }
    assert_eq!(b.read(0, now + 5 * SECOND), 0x56, "the clock stands");
    b.write(0x0b, 0x02, now);
    b.write(0x0a, 0x26, now);
    assert_eq!(b.time(now), [0x12, 0x34, 0x56, 2, 0x31, 0x12, 0x31, 0x21]);
    assert_eq!(b.read(0, now + SECOND / 2 - 1), 0x56);
    assert_eq!(b.read(0, now + SECOND / 2), 0x57, "half a second after the divider is let go");
}

#[test]
fn update_in_progress_precedes_the_second() {
    let mut b = Bench::new();
    assert_eq!(b.read(0x0a, SECOND - UPDATE - 1), 0x26);
    assert_eq!(b.read(0x0a, SECOND - UPDATE), 0xa6);
    assert_eq!(b.read(0x0a, SECOND - 1), 0xa6);
    assert_eq!(b.read(0x0a, SECOND), 0x26);
}

#[test]
fn update_interrupt() {
    let mut b = Bench::new();
    assert_eq!(b.rtc.next_deadline(), None);
    b.write(0x0b, 0x12, 0);
    assert_eq!(b.rtc.next_deadline(), Some(SECOND));
    b.rtc.advance(SECOND);
    assert!(b.irq.high());
    assert_eq!(b.rtc.next_deadline(), None, "until it is acknowledged");
    assert_eq!(b.read(0x0c, SECOND) & !0x40, 0x90);
    assert!(!b.irq.high());
    assert_eq!(b.read(0x0c, SECOND), 0);
    assert_eq!(b.rtc.next_deadline(), Some(2 * SECOND));
}

#[test]
fn periodic_interrupt() {
    let mut b = Bench::new();
    b.write(0x0a, 0x2d, 0); // 8 Hz
    b.write(0x0b, 0x42, 0);
    for n in 1..4 {
        assert_eq!(b.rtc.next_deadline(), Some(n * SECOND / 8));
        b.rtc.advance(n * SECOND / 8);
        assert_eq!(b.irq.edges(), 1);
        assert_eq!(b.read(0x0c, n * SECOND / 8), 0xc0);
    }
    b.read(0x0c, SECOND);
    b.write(0x0a, 0x21, SECOND); // 256 Hz
    assert_eq!(b.rtc.next_deadline(), Some(SECOND + 3_906_250));
    b.write(0x0a, 0x20, SECOND);
    assert_eq!(b.rtc.next_deadline(), None);
}

#[test]
fn alarm_with_wildcards() {
    let mut b = Bench::new();
    for (index, value) in [(1, 0x05), (3, 0x01), (5, 0x00)] {
        b.write(index, value, 0);
    }
    b.write(0x0b, 0x22, 0);
    assert_eq!(b.rtc.next_deadline(), Some(67 * SECOND));
    b.write(3, 0xff, 0);
    assert_eq!(b.rtc.next_deadline(), Some(7 * SECOND));
    b.rtc.advance(7 * SECOND);
    assert_eq!(b.read(0x0c, 7 * SECOND) & 0xa0, 0xa0);
    b.write(1, 0x99, 7 * SECOND);
    assert_eq!(b.rtc.next_deadline(), None, "there is no second 99");
    b.write(1, 0xc0, 7 * SECOND);
    assert_eq!(b.rtc.next_deadline(), Some(8 * SECOND));
}

#[test]
fn alarm_rings_though_nobody_looked() {
    let mut b = Bench::new();
    for (index, value) in [(1, 0x05), (3, 0xff), (5, 0xff)] {
        b.write(index, value, 0);
    }
    b.write(0x0b, 0x22, 0);
    b.rtc.advance(100_000 * SECOND);
    assert!(b.irq.high());
}

#[test]
fn memory_sizes_and_checksum() {
    let mut b = Bench::new();
    let word = |b: &mut Bench, index| u16::from_le_bytes([b.read(index, 0), b.read(index + 1, 0)]);
    assert_eq!(word(&mut b, 0x15), 640);
    assert_eq!(word(&mut b, 0x17), 0xffff);
    assert_eq!(word(&mut b, 0x34), 0xbf00);
    assert_eq!(word(&mut b, 0x5b), 0x4000);
    let sum: u16 = (0x10..0x2e).map(|index| u16::from(b.read(index, 0))).sum();
    assert_eq!(u16::from_be_bytes([b.read(0x2e, 0), b.read(0x2f, 0)]), sum);
}

#[test]
fn memory_and_time_outlive_a_reset() {
    let mut b = Bench::new();
    b.write(0x40, 0x5a, 0);
    b.write(0x0b, 0x72, 0);
    b.rtc.advance(SECOND);
    assert!(b.irq.high());
    b.rtc.reset(SECOND);
    assert!(!b.irq.high());
    assert_eq!((b.read(0x40, SECOND), b.read(0x0b, SECOND)), (0x5a, 0x02));
    assert_eq!(b.read(0, SECOND), 0x59);
    assert_eq!(b.read(0x0d, SECOND), 0x80);
}

#[test]
fn the_host_can_read_and_set_the_time() {
    let mut b = Bench::new();
    assert_eq!(b.rtc.time(1_500_000_000), START * 1_000_000_000 + 1_500_000_000);
    b.rtc.set_time(86_400_250_000_000, 1_000);
    assert_eq!(b.rtc.time(1_000), 86_400_250_000_000);
    assert_eq!(b.read(0, 1_000 + 999_750_000), 0x01);
}
