//! One comparator (IA-PC HPET 1.0a §2.3.8, §2.3.9).

use serde::{Deserialize, Serialize};

/// Timer configuration and capability register.
pub(super) mod config {
    /// Level-triggered.
    pub(in super::super) const LEVEL: u64 = 1 << 1;
    /// Interrupts are enabled.
    pub(in super::super) const INTERRUPT: u64 = 1 << 2;
    /// Periodic.
    pub(in super::super) const PERIODIC: u64 = 1 << 3;
    /// The next write of the comparator also sets the accumulator.
    pub(in super::super) const SET_VALUE: u64 = 1 << 6;
    /// The timer works with 32 bits.
    pub(in super::super) const NARROW: u64 = 1 << 8;
    /// IOAPIC pin.
    pub(in super::super) const ROUTE: u64 = 0x1f << 9;
    /// FSB (message) delivery.
    pub(in super::super) const FSB: u64 = 1 << 14;
    /// What all of ours can: periodic, 64 bits, FSB delivery.
    pub(in super::super) const CAPABILITIES: u64 = 1 << 4 | 1 << 5 | 1 << 15;
    pub(in super::super) const WRITABLE: u64 =
        LEVEL | INTERRUPT | PERIODIC | SET_VALUE | NARROW | ROUTE | FSB;
}

/// One timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Timer {
    /// Writable configuration bits.
    config: u64,
    /// What the counter is compared with; in periodic mode the accumulator.
    pub(super) comparator: u64,
    period: u64,
    /// FSB interrupt route register: address in the high half, data in the low one.
    pub(super) fsb: u64,
}

impl Timer {
    pub(super) fn new() -> Self {
        Self { config: 0, comparator: u64::MAX, period: 0, fsb: 0 }
    }

    /// Whether all of these configuration bits are set.
    pub(super) fn has(&self, bits: u64) -> bool {
        self.config & bits == bits
    }

    /// IOAPIC pin, below 24.
    pub(super) fn route(&self) -> usize {
        (self.config >> 9 & 0x1f) as usize
    }

    /// All ones in the timer's width.
    fn width(&self) -> u64 {
        if self.has(config::NARROW) { u32::MAX.into() } else { u64::MAX }
    }

    pub(super) fn configuration(&self, routes: u32) -> u64 {
        u64::from(routes) << 32 | config::CAPABILITIES | self.config
    }

    /// Writes the bits of `mask` of the configuration. A route that is not among `routes` is not taken (§2.3.8).
    pub(super) fn configure(&mut self, value: u64, mask: u64, routes: u32) {
        let mut new = (self.config & !mask | value & mask) & config::WRITABLE;
        if routes >> (new >> 9 & 0x1f) & 1 == 0 {
            new = new & !config::ROUTE | self.config & config::ROUTE;
        }
        self.config = new;
        self.comparator &= self.width();
        self.period &= self.width();
    }

    /// Writes the bits of `mask` of the comparator (§2.3.9): in periodic mode the period, and the accumulator if that
    /// was asked for.
    pub(super) fn write_comparator(&mut self, value: u64, mask: u64) {
        let periodic = self.has(config::PERIODIC);
        let (mask, width) = (mask & self.width(), self.width());
        if !periodic || self.has(config::SET_VALUE) {
            self.comparator = (self.comparator & !mask | value & mask) & width;
        }
        if periodic {
            self.period = (self.period & !mask | value & mask) & width;
        }
        self.config &= !config::SET_VALUE;
    }

    /// Ticks from `count` to the next match; `None` for the full turn of a 64-bit counter.
    pub(super) fn distance(&self, count: u64) -> Option<u64> {
        match self.comparator.wrapping_sub(count) & self.width() {
            0 => self.width().checked_add(1),
            distance => Some(distance),
        }
    }

    /// The counter goes `ticks` on from `count`: whether it matches on the way. A periodic comparator moves on.
    pub(super) fn pass(&mut self, count: u64, ticks: u64) -> bool {
        let Some(beyond) = self.distance(count).and_then(|distance| ticks.checked_sub(distance)) else {
            return false;
        };
        if self.has(config::PERIODIC) && self.period > 0 {
            // The first multiple of the period after the counter.
            let steps = beyond / self.period + 1;
            self.comparator = self.comparator.wrapping_add(steps.wrapping_mul(self.period)) & self.width();
        }
        true
    }

    /// Whether a saved timer is one.
    pub(super) fn valid(&self) -> bool {
        let narrow = (self.comparator | self.period) & !self.width() == 0;
        self.config & !config::WRITABLE == 0 && self.route() < super::GSIS && narrow
    }
}
