//! The real-time clock and CMOS memory (Motorola MC146818 data sheet), 128 bytes behind ports 0x70 and 0x71.
//!
//! The time base is 32.768 kHz: UIP rises 244 µs before an update cycle of 1984 µs, at whose end the time changes.

mod calendar;
#[cfg(test)]
mod tests;

use calendar::DateTime;
use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use crate::time::{SECOND, due, since, ticks, ticks_to_ns};

/// Time base in Hz.
const HZ: u64 = 32_768;
/// How long before the time changes UIP is set, in ns.
const UPDATE: u64 = 244_000 + 1_984_000;
/// Bytes of time, registers and memory.
const CELLS: usize = 128;

/// Cells with a meaning of their own.
mod cell {
    pub(super) const SECOND: usize = 0x00;
    pub(super) const SECOND_ALARM: usize = 0x01;
    pub(super) const MINUTE: usize = 0x02;
    pub(super) const MINUTE_ALARM: usize = 0x03;
    pub(super) const HOUR: usize = 0x04;
    pub(super) const HOUR_ALARM: usize = 0x05;
    pub(super) const WEEKDAY: usize = 0x06;
    pub(super) const DAY: usize = 0x07;
    pub(super) const MONTH: usize = 0x08;
    pub(super) const YEAR: usize = 0x09;
    pub(super) const A: usize = 0x0a;
    pub(super) const B: usize = 0x0b;
    pub(super) const C: usize = 0x0c;
    pub(super) const D: usize = 0x0d;
    /// The century, where the FADT says it is.
    pub(super) const CENTURY: usize = 0x32;

    /// Cells that show the running time.
    pub(super) const TIME: [usize; 8] = [SECOND, MINUTE, HOUR, WEEKDAY, DAY, MONTH, YEAR, CENTURY];
}

/// Register A: update in progress, divider, rate.
const A_UPDATING: u8 = 0x80;
/// Divider bits that hold the divider chain in reset when both are set.
const A_DIVIDER_RESET: u8 = 0x60;
const A_RATE: u8 = 0x0f;

/// Register B.
mod control {
    pub(super) const SET: u8 = 0x80;
    pub(super) const BINARY: u8 = 0x04;
    pub(super) const HOURS_24: u8 = 0x02;
    /// Square wave, interrupt enables: what RESET# clears.
    pub(super) const CLEARED_BY_RESET: u8 = 0x78;
}

/// Register C, and the enables in register B.
mod flag {
    pub(super) const ANY: u8 = 0x80;
    pub(super) const PERIODIC: u8 = 0x40;
    pub(super) const ALARM: u8 = 0x20;
    pub(super) const UPDATE: u8 = 0x10;
    pub(super) const ALL: u8 = PERIODIC | ALARM | UPDATE;
}

/// Register D: RAM and time are valid.
const D_VALID: u8 = 0x80;

/// What an RTC shows at power-on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RtcConfig {
    /// Time of day: nanoseconds since 1970-01-01 00:00 in the zone the guest is to see (UTC, or local time).
    pub time: i64,
    /// Guest memory below 4 GiB in bytes, from address 0.
    pub memory_below_4g: u64,
    /// Guest memory above 4 GiB in bytes.
    pub memory_above_4g: u64,
}

/// Saved state of [`Rtc`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    index: u8,
    /// 128 cells; those of the time count only while the clock stands.
    cells: Vec<u8>,
    /// A second began at this instant (ns), and it was this one since 1970.
    anchor: u64,
    seconds: i64,
    /// The second up to which updates and alarms have been noticed.
    seen: i64,
    /// Periodic interrupts are counted from this instant; so many have been noticed.
    periodic_start: u64,
    periodic_seen: u64,
}

impl RtcState {
    fn cell(&self, index: usize) -> u8 {
        self.cells.get(index).copied().unwrap_or(0xff)
    }

    fn set_cell(&mut self, index: usize, value: u8) {
        if let Some(cell) = self.cells.get_mut(index) {
            *cell = value;
        }
    }

    /// The time stands while SET is 1 or the divider is held in reset.
    fn stands(&self) -> bool {
        self.cell(cell::B) & control::SET != 0 || self.divider_reset()
    }

    fn divider_reset(&self) -> bool {
        self.cell(cell::A) & A_DIVIDER_RESET == A_DIVIDER_RESET
    }

    /// Seconds since 1970 while the clock runs.
    fn running_seconds(&self, now: u64) -> i64 {
        self.seconds.saturating_add((since(self.anchor, now) / SECOND) as i64)
    }

    /// When a second begins; the past for one that has begun.
    fn instant(&self, seconds: i64) -> Option<u64> {
        let ahead = u64::try_from(seconds.checked_sub(self.seconds)?).ok()?;
        Some(self.anchor.wrapping_add(ahead.checked_mul(SECOND)?))
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value.rem_euclid(100) as u8;
        if self.cell(cell::B) & control::BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> i64 {
        if self.cell(cell::B) & control::BINARY != 0 {
            value.into()
        } else {
            i64::from(value >> 4) * 10 + i64::from(value & 0xf)
        }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.cell(cell::B) & control::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.cell(cell::B) & control::HOURS_24 != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    /// What a time cell shows at `time`.
    fn encode_cell(&self, index: usize, time: &DateTime) -> u8 {
        match index {
            cell::SECOND => self.encode(time.second),
            cell::MINUTE => self.encode(time.minute),
            cell::HOUR => self.encode_hour(time.hour),
            cell::WEEKDAY => self.encode(time.weekday),
            cell::DAY => self.encode(time.day),
            cell::MONTH => self.encode(time.month),
            cell::YEAR => self.encode(time.year),
            _ => self.encode(time.year.div_euclid(100)),
        }
    }

    /// The time that the cells hold; values that no clock shows become the nearest one.
    fn decode_cells(&self) -> i64 {
        let value = |index| self.decode(self.cell(index));
        let time = DateTime {
            year: value(cell::CENTURY) * 100 + value(cell::YEAR).min(99),
            month: value(cell::MONTH).clamp(1, 12),
            day: value(cell::DAY).clamp(1, 31),
            weekday: 1,
            hour: self.decode_hour(self.cell(cell::HOUR)).min(23),
            minute: value(cell::MINUTE).min(59),
            second: value(cell::SECOND).min(59),
        };
        time.seconds()
    }

    /// Copies the running time to the cells.
    fn show(&mut self, now: u64) {
        let time = DateTime::from_seconds(self.running_seconds(now));
        for index in cell::TIME {
            let value = self.encode_cell(index, &time);
            self.set_cell(index, value);
        }
    }

    /// Goes on from the time in the cells; the second under way began `phase` ns ago.
    fn run(&mut self, now: u64, phase: u64) {
        self.seconds = self.decode_cells();
        self.seen = self.seconds;
        self.anchor = now.wrapping_sub(phase);
    }

    /// How long ago the second under way began.
    fn phase(&self, now: u64) -> u64 {
        since(self.anchor, now) % SECOND
    }

    /// The alarm's second, minute and hour: `None` for "don't care". The outer `None` never matches.
    fn alarm(&self) -> Option<[Option<i64>; 3]> {
        let field = |index: usize, limit: i64| match self.cell(index) {
            0xc0.. => Some(None),
            raw => {
                let value = if index == cell::HOUR_ALARM { self.decode_hour(raw) } else { self.decode(raw) };
                (value < limit).then_some(Some(value))
            }
        };
        Some([field(cell::SECOND_ALARM, 60)?, field(cell::MINUTE_ALARM, 60)?, field(cell::HOUR_ALARM, 24)?])
    }

    /// The first second after `after` at which the alarm rings.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let [second, minute, hour] = self.alarm()?;
        let other = |field: Option<i64>, value: i64| field.is_some_and(|field| field != value);
        let mut time = after.checked_add(1)?;
        // At most 24 hours, 60 minutes and 60 seconds are passed over.
        for _ in 0..160 {
            let (s, m, h) = (
                time.rem_euclid(60),
                time.div_euclid(60).rem_euclid(60),
                time.div_euclid(3600).rem_euclid(24),
            );
            time += if other(hour, h) {
                3600 - 60 * m - s
            } else if other(minute, m) {
                60 - s
            } else if other(second, s) {
                1
            } else {
                return Some(time);
            };
        }
        None
    }

    /// Ticks of the time base between periodic interrupts (table 5).
    fn period(&self) -> Option<u64> {
        match self.cell(cell::A) & A_RATE {
            _ if self.divider_reset() => None,
            0 => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn periods(&self, now: u64, period: u64) -> u64 {
        ticks(since(self.periodic_start, now), HZ) / period
    }

    fn shifted(&self, by: u64) -> Self {
        Self {
            anchor: self.anchor.wrapping_add(by),
            periodic_start: self.periodic_start.wrapping_add(by),
            ..self.clone()
        }
    }
}

/// An MC146818 with 128 bytes, and its IRQ 8.
pub struct Rtc {
    irq8: Irq,
    state: RtcState,
}

impl Rtc {
    /// `irq8` is the IRQ output (give it [`crate::LegacyGate::guard`]ed if there is an HPET).
    pub fn new(config: RtcConfig, irq8: Irq, now: u64) -> Self {
        let mut state = RtcState {
            index: 0,
            cells: vec![0; CELLS],
            anchor: now,
            seconds: 0,
            seen: 0,
            periodic_start: now,
            periodic_seen: 0,
        };
        // 32.768 kHz, 1024 Hz periodic; 24 hours, BCD: as firmware leaves them.
        state.set_cell(cell::A, 0x26);
        state.set_cell(cell::B, control::HOURS_24);
        state.set_cell(cell::D, D_VALID);
        describe_memory(&mut state, config);
        let mut rtc = Self { irq8, state };
        rtc.set_time(config.time, now);
        rtc
    }

    /// Sets the clock, as in [`RtcConfig::time`].
    pub fn set_time(&mut self, time: i64, now: u64) {
        let s = &mut self.state;
        s.seconds = time.div_euclid(SECOND as i64);
        s.seen = s.seconds;
        s.anchor = now.wrapping_sub(time.rem_euclid(SECOND as i64) as u64);
        if s.stands() {
            s.show(now);
        }
    }

    /// The clock's time, as in [`RtcConfig::time`].
    pub fn time(&self, now: u64) -> i64 {
        let s = &self.state;
        let seconds = if s.stands() { s.decode_cells() } else { s.running_seconds(now) };
        seconds.saturating_mul(SECOND as i64).saturating_add(s.phase(now) as i64)
    }

    /// Notices what has come: periods, updates, the alarm.
    fn settle(&mut self, now: u64) {
        let s = &mut self.state;
        let mut flags = 0;
        if let Some(period) = s.period() {
            let periods = s.periods(now, period);
            if periods > s.periodic_seen {
                s.periodic_seen = periods;
                flags |= flag::PERIODIC;
            }
        }
        if !s.stands() {
            let seconds = s.running_seconds(now);
            if seconds > s.seen {
                flags |= flag::UPDATE;
                if s.next_alarm(s.seen).is_some_and(|alarm| alarm <= seconds) {
                    flags |= flag::ALARM;
                }
                s.seen = seconds;
            }
        }
        if flags != 0 {
            let all = s.cell(cell::C) | flags;
            s.set_cell(cell::C, all);
            self.update_line();
        }
    }

    /// IRQF and the line: any flag that is enabled.
    fn update_line(&mut self) {
        let s = &mut self.state;
        let flags = s.cell(cell::C) & flag::ALL;
        let any = flags & s.cell(cell::B) != 0;
        s.set_cell(cell::C, flags | if any { flag::ANY } else { 0 });
        self.irq8.set(any);
    }

    fn read_cell(&mut self, index: usize, now: u64) -> u8 {
        self.settle(now);
        let s = &mut self.state;
        match index {
            cell::A => {
                let updating = !s.stands() && s.phase(now) >= SECOND - UPDATE;
                s.cell(cell::A) | if updating { A_UPDATING } else { 0 }
            }
            cell::C => {
                let flags = s.cell(cell::C);
                s.set_cell(cell::C, 0);
                self.update_line();
                flags
            }
            _ if cell::TIME.contains(&index) && !s.stands() => {
                s.encode_cell(index, &DateTime::from_seconds(s.running_seconds(now)))
            }
            _ => s.cell(index),
        }
    }

    fn write_cell(&mut self, index: usize, value: u8, now: u64) {
        self.settle(now);
        let s = &mut self.state;
        match index {
            cell::A | cell::B => self.write_control(index, value, now),
            cell::C | cell::D => {}
            _ if cell::TIME.contains(&index) && !s.stands() => {
                s.show(now);
                s.set_cell(index, value);
                s.run(now, s.phase(now));
            }
            _ => s.set_cell(index, value),
        }
    }

    fn write_control(&mut self, index: usize, value: u8, now: u64) {
        let s = &mut self.state;
        let (stood, held, rate) = (s.stands(), s.divider_reset(), s.cell(cell::A) & !A_UPDATING);
        if index == cell::A {
            s.set_cell(cell::A, value & !A_UPDATING);
        } else if value & control::SET != 0 {
            // SET also clears the update interrupt's enable.
            s.set_cell(cell::B, value & !flag::UPDATE);
        } else {
            s.set_cell(cell::B, value);
        }
        if held && !s.divider_reset() {
            // The first update comes half a second after the divider is let go.
            s.anchor = now.wrapping_sub(SECOND / 2);
        }
        match (stood, s.stands()) {
            (true, false) => s.run(now, s.phase(now)),
            (false, true) => s.show(now),
            _ => {}
        }
        if s.cell(cell::A) != rate {
            (s.periodic_start, s.periodic_seen) = (now, 0);
        }
        self.update_line();
    }
}

/// The memory sizes and equipment that firmware leaves in CMOS memory, and its checksum.
fn describe_memory(state: &mut RtcState, config: RtcConfig) {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    let mut write = |index: usize, bytes: usize, value: u64| {
        let limit = (1 << (8 * bytes)) - 1;
        for (i, byte) in value.min(limit).to_le_bytes().iter().take(bytes).enumerate() {
            state.set_cell(index + i, *byte);
        }
    };
    let low = config.memory_below_4g;
    let extended = low.saturating_sub(MIB) / KIB;
    // Equipment: FPU, PS/2 mouse.
    write(0x14, 1, 0x06);
    write(0x15, 2, (low / KIB).min(640));
    write(0x17, 2, extended);
    write(0x30, 2, extended);
    write(0x34, 2, low.saturating_sub(16 * MIB) / (64 * KIB));
    write(0x5b, 3, config.memory_above_4g / (64 * KIB));
    let sum: u16 = (0x10..0x2e).map(|index| u16::from(state.cell(index))).sum();
    let [low, high] = sum.to_le_bytes();
    state.set_cell(0x2e, high);
    state.set_cell(0x2f, low);
}

impl Device for Rtc {
    fn name(&self) -> &'static str {
        "rtc"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(0x70, 2, 0)]
    }

    fn access(&self) -> Access {
        Access::BYTE
    }

    fn read_register(&mut self, offset: u64, _width: u8, now: u64) -> u64 {
        match offset {
            1 => self.read_cell(self.state.index.into(), now).into(),
            // The index cannot be read.
            _ => 0xff,
        }
    }

    fn write_register(&mut self, offset: u64, _width: u8, value: u64, now: u64) -> Effect {
        match offset {
            // Bit 7 masks NMIs; none come from here.
            0 => self.state.index = value as u8 & 0x7f,
            _ => self.write_cell(self.state.index.into(), value as u8, now),
        }
        Effect::None
    }

    /// Time and memory live on their battery; only interrupts are reset.
    fn reset(&mut self, now: u64) {
        self.settle(now);
        let control = self.state.cell(cell::B) & !control::CLEARED_BY_RESET;
        self.state.set_cell(cell::B, control);
        self.state.set_cell(cell::C, 0);
        self.state.index = 0;
        self.update_line();
    }

    fn next_deadline(&self) -> Option<u64> {
        let s = &self.state;
        let waiting = s.cell(cell::B) & !s.cell(cell::C);
        let periodic = s.period().filter(|_| waiting & flag::PERIODIC != 0).map(|period| {
            let tick = s.periodic_seen.saturating_add(1).saturating_mul(period);
            s.periodic_start.wrapping_add(ticks_to_ns(tick, HZ))
        });
        let second = |kind: u8, seconds: Option<i64>| {
            if waiting & kind == 0 || s.stands() { None } else { s.instant(seconds?) }
        };
        let update = second(flag::UPDATE, s.seen.checked_add(1));
        let alarm = second(flag::ALARM, s.next_alarm(s.seen));
        [periodic, update, alarm]
            .into_iter()
            .flatten()
            .reduce(|first, other| if due(first, other) { first } else { other })
    }

    fn advance(&mut self, now: u64) {
        self.settle(now);
    }
}

impl Snapshot for Rtc {
    type State = RtcState;

    fn save(&self, now: u64) -> RtcState {
        self.state.shifted(now.wrapping_neg())
    }

    fn restore(&mut self, state: &RtcState, now: u64) -> Result<(), RestoreError> {
        let far = |seconds: i64| seconds.unsigned_abs() > 1 << 40;
        let state = state.shifted(now);
        let mut valid = state.cells.len() == CELLS
            && state.index < 128
            && state.cell(cell::A) & A_UPDATING == 0
            && !far(state.seconds)
            && !far(state.seen)
            && due(state.anchor, now)
            && due(state.periodic_start, now);
        // Nothing can have been noticed that has not come.
        valid &= state.stands() || state.seen <= state.running_seconds(now);
        valid &= state.period().is_none_or(|period| state.periodic_seen <= state.periods(now, period));
        if !valid {
            return Err(RestoreError { device: "rtc", what: "a register holds what it cannot" });
        }
        self.state = state;
        self.update_line();
        Ok(())
    }
}
