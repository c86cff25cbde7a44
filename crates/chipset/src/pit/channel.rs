//! One counter of the 8254.
//!
//! A counter is a function of time: the count, OUT and the rising edges of OUT follow from when it started and what
//! was loaded, so that nothing happens between the edges.

use serde::{Deserialize, Serialize};

use super::Pit;
use crate::time::{due, since, ticks, ticks_to_ns};

/// Modes 0 to 5 (data sheet, "Mode Definitions").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Mode {
    TerminalCount,
    OneShot,
    Rate,
    Square,
    SoftwareStrobe,
    HardwareStrobe,
}

impl Mode {
    /// From bits 3:1 of the control word; 6 and 7 are 2 and 3 again.
    fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::TerminalCount,
            1 => Self::OneShot,
            2 | 6 => Self::Rate,
            3 | 7 => Self::Square,
            4 => Self::SoftwareStrobe,
            _ => Self::HardwareStrobe,
        }
    }

    /// Starts at a rising edge of GATE, not when the count is written.
    fn triggered(self) -> bool {
        matches!(self, Self::OneShot | Self::HardwareStrobe)
    }

    fn periodic(self) -> bool {
        matches!(self, Self::Rate | Self::Square)
    }
}

/// A count that takes over when the running (half) cycle ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Next {
    reload: u64,
    /// When it takes over.
    at: u64,
    /// The start of its cycle: before `at`, if it takes over in the middle of a square wave.
    start: u64,
}

/// One counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Channel {
    mode: Mode,
    bcd: bool,
    /// Bytes that are read and written: 1 low, 2 high, 3 low then high.
    access: u8,
    /// The low byte of a count of which the high byte is to come.
    low_byte: Option<u8>,
    /// The high byte is read next.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
    /// The count register as written.
    written: u16,
    /// The count register has not been loaded yet.
    null_count: bool,
    /// There is a count to count down from (and, in triggered modes, a trigger has come).
    running: bool,
    /// What was loaded: 1 to 65536.
    reload: u64,
    next: Option<Next>,
    /// Counting began here (ns), with `counted` ticks before.
    start: u64,
    counted: u64,
    /// Rising edges of OUT since `start` that have been noticed.
    edges: u64,
}

impl Channel {
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: Mode::TerminalCount,
            bcd: false,
            access: 3,
            low_byte: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
            gate,
            written: 0,
            null_count: true,
            running: false,
            reload: 0x1_0000,
            next: None,
            start: 0,
            counted: 0,
            edges: 0,
        }
    }

    /// GATE stops the count in all but the triggered modes.
    fn counting(&self) -> bool {
        self.running && (self.gate || self.mode.triggered())
    }

    /// Ticks since the count was loaded.
    fn elapsed(&self, now: u64) -> u64 {
        let run = if self.counting() { ticks(since(self.start, now), Pit::HZ) } else { 0 };
        self.counted.saturating_add(run)
    }

    /// The instant of a tick after loading.
    fn instant(&self, tick: u64) -> u64 {
        self.start.wrapping_add(ticks_to_ns(tick.saturating_sub(self.counted), Pit::HZ))
    }

    /// Ticks of the high half of a square wave.
    fn high_half(reload: u64) -> u64 {
        reload.div_ceil(2)
    }

    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// The counting element as it is read.
    fn count(&self, now: u64) -> u16 {
        let (elapsed, reload) = (self.elapsed(now), self.reload);
        let count = match self.mode {
            _ if !self.running => self.value_written(),
            Mode::Rate => reload - elapsed % reload,
            Mode::Square => {
                let (tick, high) = (elapsed % reload, Self::high_half(reload));
                let tick = if tick < high { tick } else { tick - high };
                (reload & !1).saturating_sub(2 * tick)
            }
            _ => (reload + self.modulus() - elapsed % self.modulus()) % self.modulus(),
        };
        self.encode(count % self.modulus())
    }

    fn encode(&self, count: u64) -> u16 {
        if !self.bcd {
            return count as u16;
        }
        (0..4).fold(0, |bcd, digit| bcd | ((count / 10u64.pow(digit) % 10) as u16) << (4 * digit))
    }

    /// The count register as a number; 0 stands for the modulus.
    fn value_written(&self) -> u64 {
        let value = if self.bcd {
            (0..4).fold(0, |value, digit| {
                value + u64::from(self.written >> (4 * digit) & 0xf) * 10u64.pow(digit)
            })
        } else {
            self.written.into()
        };
        if value == 0 { self.modulus() } else { value }
    }

    /// OUT.
    pub(super) fn out(&self, now: u64) -> bool {
        let elapsed = self.elapsed(now);
        match self.mode {
            Mode::TerminalCount => self.running && elapsed >= self.reload,
            _ if !self.running => true,
            Mode::OneShot => elapsed >= self.reload,
            Mode::Rate => !self.gate || self.reload == 1 || elapsed % self.reload != self.reload - 1,
            Mode::Square => !self.gate || elapsed % self.reload < Self::high_half(self.reload),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => elapsed != self.reload,
        }
    }

    /// How often OUT has risen in the ticks since loading.
    fn edges_after(&self, elapsed: u64) -> u64 {
        match self.mode {
            Mode::Rate | Mode::Square => elapsed / self.reload,
            Mode::TerminalCount | Mode::OneShot => (elapsed >= self.reload).into(),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => (elapsed > self.reload).into(),
        }
    }

    /// When OUT rises next.
    pub(super) fn next_edge(&self) -> Option<u64> {
        if !self.counting() {
            return None;
        }
        let tick = match self.mode {
            Mode::Rate | Mode::Square => (self.edges + 1).saturating_mul(self.reload),
            _ if self.edges > 0 => return None,
            Mode::TerminalCount | Mode::OneShot => self.reload,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => self.reload + 1,
        };
        let edge = self.instant(tick);
        // A new count may take over first.
        Some(match self.next {
            Some(next) if due(next.at, edge) => next.at,
            _ => edge,
        })
    }

    /// Brings the counter up to `now`; whether OUT has risen since last time.
    pub(super) fn settle(&mut self, now: u64) -> bool {
        let mut risen = false;
        if let Some(next) = self.next.filter(|next| self.counting() && due(next.at, now)) {
            risen = self.notice_edges(next.at);
            self.begin(next.reload, next.start);
        }
        risen | self.notice_edges(now)
    }

    fn notice_edges(&mut self, now: u64) -> bool {
        if !self.running {
            return false;
        }
        let edges = self.edges_after(self.elapsed(now));
        let risen = edges > self.edges;
        self.edges = edges;
        risen
    }

    /// Loads the counting element.
    fn begin(&mut self, reload: u64, start: u64) {
        self.reload = reload;
        self.start = start;
        self.counted = 0;
        self.edges = 0;
        self.next = None;
        self.null_count = false;
        self.running = true;
    }

    /// Control word for this counter.
    pub(super) fn control(&mut self, word: u8, now: u64) {
        let access = word >> 4 & 3;
        if access == 0 {
            return self.latch_count(now);
        }
        *self = Self {
            mode: Mode::from_bits(word >> 1),
            bcd: word & 1 != 0,
            access,
            written: self.written,
            ..Self::new(self.gate)
        };
    }

    /// Counter latch command; a count that is latched already stays.
    pub(super) fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(now));
            self.read_high = false;
        }
    }

    /// Read-back command, status: OUT, null count, and the control word (figure 10).
    pub(super) fn latch_status(&mut self, now: u64) {
        let mode = match self.mode {
            Mode::TerminalCount => 0,
            Mode::OneShot => 1,
            Mode::Rate => 2,
            Mode::Square => 3,
            Mode::SoftwareStrobe => 4,
            Mode::HardwareStrobe => 5,
        };
        let flags = u8::from(self.out(now)) << 7 | u8::from(self.null_count) << 6;
        self.latched_status.get_or_insert(flags | self.access << 4 | mode << 1 | u8::from(self.bcd));
    }

    /// A read of the counter's port: status, latched count or the running count.
    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = self.latched_count.unwrap_or_else(|| self.count(now));
        let high = match self.access {
            1 => false,
            2 => true,
            _ => self.read_high,
        };
        self.read_high = self.access == 3 && !high;
        if !self.read_high {
            self.latched_count = None;
        }
        if high { (count >> 8) as u8 } else { count as u8 }
    }

    /// A write of the counter's port.
    pub(super) fn write(&mut self, byte: u8, now: u64) {
        self.written = match (self.access, self.low_byte.take()) {
            (1, _) => byte.into(),
            (2, _) => u16::from(byte) << 8,
            (_, Some(low)) => u16::from_le_bytes([low, byte]),
            (_, None) => {
                self.low_byte = Some(byte);
                if self.mode == Mode::TerminalCount {
                    // The first byte stops the count and OUT goes low.
                    self.running = false;
                }
                return;
            }
        };
        self.null_count = true;
        let reload = self.value_written();
        if self.mode.triggered() {
            // Waits for GATE.
        } else if self.mode.periodic() && self.running {
            self.next = Some(self.takeover(reload, now));
        } else {
            self.begin(reload, now);
        }
    }

    /// Rate generators take a new count at the end of the cycle, square waves at the end of the half cycle.
    fn takeover(&self, reload: u64, now: u64) -> Next {
        let elapsed = self.elapsed(now);
        let (cycle, tick) = (elapsed - elapsed % self.reload, elapsed % self.reload);
        let high = Self::high_half(self.reload);
        if self.mode == Mode::Square && tick < high {
            let at = self.instant(cycle + high);
            return Next {
                reload,
                at,
                start: at.wrapping_sub(ticks_to_ns(Self::high_half(reload), Pit::HZ)),
            };
        }
        let at = self.instant(cycle + self.reload);
        Next { reload, at, start: at }
    }

    /// Whether GATE is high.
    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    /// Drives GATE.
    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == self.gate {
            return;
        }
        self.settle(now);
        if gate {
            self.gate = true;
            if self.mode.triggered() || self.mode.periodic() && self.running {
                self.begin(self.value_written(), now);
            } else {
                self.start = now;
            }
        } else {
            // Fixes the count; triggered modes go on regardless.
            if !self.mode.triggered() {
                self.counted = self.elapsed(now);
                self.start = now;
            }
            self.gate = false;
        }
    }

    /// The same counter with its instants moved by `by` (wrapping); one that stands has none.
    pub(super) fn shifted(&self, by: u64) -> Self {
        let next = self.next.map(|next| Next {
            at: next.at.wrapping_add(by),
            start: next.start.wrapping_add(by),
            ..next
        });
        let start = if self.running { self.start.wrapping_add(by) } else { 0 };
        Self { start, next, ..self.clone() }
    }

    /// Whether a saved counter is one.
    pub(super) fn valid(&self) -> bool {
        let counts = |reload| (1..=0x1_0000).contains(&reload);
        counts(self.reload)
            && self.next.is_none_or(|next| counts(next.reload))
            && (1..=3).contains(&self.access)
    }
}
