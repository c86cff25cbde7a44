//! The high-precision event timers (IA-PC HPET specification 1.0a): a 64-bit counter of 10 MHz and three comparators,
//! each one-shot or periodic, on IOAPIC pins, in place of 8254 and RTC (legacy replacement) or by message (FSB).

mod gate;
#[cfg(test)]
mod tests;
mod timer;

use std::sync::Arc;

pub use gate::LegacyGate;
use serde::{Deserialize, Serialize};
use skep_hv::irq::{Irq, MsiMessage, MsiSender};
use timer::{Timer, config};

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window, ones};
use crate::time::{since, ticks, ticks_to_ns};

/// Number of comparators.
const TIMERS: usize = 3;

/// Registers (§2.3.1), each 64 bits wide.
mod register {
    pub(super) const CAPABILITIES: u64 = 0x000;
    pub(super) const CONFIGURATION: u64 = 0x010;
    pub(super) const STATUS: u64 = 0x020;
    pub(super) const COUNTER: u64 = 0x0f0;
    pub(super) const TIMERS: u64 = 0x100;
    pub(super) const TIMERS_END: u64 = 0x15f;
    /// Offsets within a timer's 32 bytes.
    pub(super) const TIMER_CONFIGURATION: u64 = 0x00;
    pub(super) const TIMER_COMPARATOR: u64 = 0x08;
    pub(super) const TIMER_FSB_ROUTE: u64 = 0x10;
}

/// General configuration: the counter runs.
const ENABLE: u64 = 1;
/// General configuration: legacy replacement.
const LEGACY: u64 = 2;

/// Number of IOAPIC pins a timer may be routed to; lines after them are IRQ 0 and IRQ 8.
const GSIS: usize = 24;

/// Where an HPET's interrupts go.
pub struct HpetLines {
    /// IOAPIC pins by GSI; timers may be routed to those that are `Some`.
    pub gsi: [Option<Irq>; GSIS],
    /// IRQ 0 and IRQ 8, for legacy replacement.
    pub legacy: [Irq; 2],
    /// Takes messages of timers set to FSB delivery.
    pub msi: Arc<dyn MsiSender>,
}

impl HpetLines {
    /// The pins a timer may be routed to, a bit each.
    fn routes(&self) -> u32 {
        self.gsi.iter().enumerate().fold(0, |routes, (gsi, line)| routes | u32::from(line.is_some()) << gsi)
    }

    fn line(&self, index: usize) -> Option<&Irq> {
        match index.checked_sub(GSIS) {
            None => self.gsi.get(index)?.as_ref(),
            Some(legacy) => self.legacy.get(legacy),
        }
    }
}

/// Saved state of [`Hpet`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HpetState {
    configuration: u64,
    /// Level-triggered interrupts that are active, a bit per timer.
    status: u64,
    /// The counter at `start` (ns); while it is halted, the counter.
    counter: u64,
    start: u64,
    /// The count up to which comparators have been looked at.
    seen: u64,
    timers: [Timer; TIMERS],
}

impl HpetState {
    fn new() -> Self {
        let timers = [Timer::new(); TIMERS];
        Self { configuration: 0, status: 0, counter: 0, start: 0, seen: 0, timers }
    }

    fn running(&self) -> bool {
        self.configuration & ENABLE != 0
    }

    fn legacy(&self) -> bool {
        self.configuration & LEGACY != 0
    }

    fn count(&self, now: u64) -> u64 {
        let run = if self.running() { ticks(since(self.start, now), Hpet::HZ) } else { 0 };
        self.counter.wrapping_add(run)
    }

    /// The same with its instant moved by `by` (wrapping); a halted counter has none.
    fn shifted(&self, by: u64) -> Self {
        let start = if self.running() { self.start.wrapping_add(by) } else { 0 };
        Self { start, ..self.clone() }
    }

    /// The line of timer `index` (index into [`HpetLines`]).
    fn line(&self, index: usize) -> usize {
        if self.legacy() && index < 2 { GSIS + index } else { self.timers[index].route() }
    }
}

/// An HPET of three 64-bit timers.
///
/// Periods that pass between two calls of [`Device::advance`] give one interrupt, not several.
pub struct Hpet {
    lines: HpetLines,
    gate: LegacyGate,
    /// Lines held high for level-triggered interrupts, a bit each.
    asserted: u32,
    state: HpetState,
}

impl Hpet {
    /// Guest physical address of the registers.
    pub const BASE: u64 = 0xfed0_0000;
    /// Frequency of the main counter in Hz.
    pub const HZ: u64 = 10_000_000;
    /// General capabilities, low half (event timer block ID of the ACPI HPET table): Intel, legacy replacement,
    /// 64 bits, three timers, revision 1.
    pub const BLOCK_ID: u32 = 0x8086_a201;
    /// The smallest period that does not lose interrupts, in ticks (minimum clock tick of the ACPI HPET table).
    pub const MINIMUM_TICK: u16 = 128;

    /// `gate` is the one that guards IRQ 0 of the 8254 and IRQ 8 of the RTC.
    pub fn new(lines: HpetLines, gate: LegacyGate) -> Self {
        Self { lines, gate, asserted: 0, state: HpetState::new() }
    }

    /// Looks which comparators the counter has passed.
    fn settle(&mut self, now: u64) {
        let count = self.state.count(now);
        let passed = count.wrapping_sub(self.state.seen);
        if passed == 0 {
            return;
        }
        for index in 0..TIMERS {
            if self.state.timers[index].pass(self.state.seen, passed) {
                self.fire(index);
            }
        }
        self.state.seen = count;
    }

    fn fire(&mut self, index: usize) {
        let timer = &self.state.timers[index];
        if timer.has(config::LEVEL) && !timer.has(config::FSB) {
            self.state.status |= 1 << index;
            self.update_lines();
        } else if !timer.has(config::INTERRUPT) {
        } else if timer.has(config::FSB) {
            let message = MsiMessage { address: timer.fsb >> 32, data: timer.fsb as u32 };
            self.lines.msi.send(message);
        } else {
            let index = self.state.line(index);
            // A pin that another timer holds high stays so: there is no edge.
            if self.asserted >> index & 1 == 0
                && let Some(line) = self.lines.line(index)
            {
                line.pulse();
            }
        }
    }

    /// Holds the lines of level-triggered interrupts.
    fn update_lines(&mut self) {
        let mut wanted = 0u32;
        for (index, timer) in self.state.timers.iter().enumerate() {
            if self.state.status >> index & 1 != 0 && timer.has(config::INTERRUPT | config::LEVEL) {
                wanted |= 1 << self.state.line(index);
            }
        }
        let mut changed = self.asserted ^ wanted;
        self.asserted = wanted;
        while changed != 0 {
            let index = changed.trailing_zeros();
            changed &= changed - 1;
            if let Some(line) = self.lines.line(index as usize) {
                line.set(wanted >> index & 1 != 0);
            }
        }
    }

    fn read_wide(&self, offset: u64, now: u64) -> u64 {
        const PERIOD_FS: u64 = 1_000_000_000_000_000 / Hpet::HZ;
        let s = &self.state;
        match offset {
            register::CAPABILITIES => PERIOD_FS << 32 | u64::from(Self::BLOCK_ID),
            register::CONFIGURATION => s.configuration,
            register::STATUS => s.status,
            register::COUNTER => s.count(now),
            register::TIMERS..=register::TIMERS_END => {
                let Some(timer) = s.timers.get((offset - register::TIMERS) as usize / 0x20) else { return 0 };
                match offset & 0x1f {
                    register::TIMER_CONFIGURATION => timer.configuration(self.lines.routes()),
                    register::TIMER_COMPARATOR => timer.comparator,
                    register::TIMER_FSB_ROUTE => timer.fsb,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Writes the bits of `mask` of a register.
    fn write_wide(&mut self, offset: u64, value: u64, mask: u64, now: u64) {
        let routes = self.lines.routes();
        let s = &mut self.state;
        match offset {
            register::CONFIGURATION => {
                let count = s.count(now);
                s.configuration = (s.configuration & !mask | value & mask) & (ENABLE | LEGACY);
                (s.counter, s.start) = (count, now);
                self.gate.set(self.state.legacy());
            }
            register::STATUS => s.status &= !(value & mask),
            register::COUNTER => {
                s.counter = s.count(now) & !mask | value & mask;
                (s.start, s.seen) = (now, s.counter);
            }
            register::TIMERS..=register::TIMERS_END => {
                let index = (offset - register::TIMERS) as usize / 0x20;
                let Some(timer) = s.timers.get_mut(index) else { return };
                match offset & 0x1f {
                    register::TIMER_CONFIGURATION => {
                        timer.configure(value, mask, routes);
                        if !timer.has(config::LEVEL) {
                            // The status of an edge-triggered timer is 0 (§2.3.6).
                            s.status &= !(1 << index);
                        }
                    }
                    register::TIMER_COMPARATOR => timer.write_comparator(value, mask),
                    register::TIMER_FSB_ROUTE => timer.fsb = timer.fsb & !mask | value & mask,
                    _ => {}
                }
            }
            _ => {}
        }
        self.update_lines();
    }
}

impl Device for Hpet {
    fn name(&self) -> &'static str {
        "hpet"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::memory(Self::BASE, 0x400)]
    }

    fn access(&self) -> Access {
        Access { min: 4, max: 8 }
    }

    fn read_register(&mut self, offset: u64, width: u8, now: u64) -> u64 {
        let register = offset & !7;
        if register != register::COUNTER {
            self.settle(now);
        }
        self.read_wide(register, now) >> ((offset & 4) * 8) & ones(width)
    }

    fn write_register(&mut self, offset: u64, width: u8, value: u64, now: u64) -> Effect {
        self.settle(now);
        let shift = (offset & 4) * 8;
        self.write_wide(offset & !7, value << shift, ones(width) << shift, now);
        Effect::None
    }

    fn reset(&mut self, _now: u64) {
        self.state = HpetState::new();
        self.gate.set(false);
        self.update_lines();
    }

    fn next_deadline(&self) -> Option<u64> {
        let s = &self.state;
        if !s.running() {
            return None;
        }
        // Timers that interrupt nobody are looked at when somebody reads them.
        let waiting = s.timers.iter().filter(|timer| timer.has(config::INTERRUPT));
        let distance = waiting.filter_map(|timer| timer.distance(s.seen)).min()?;
        let ticks = s.seen.wrapping_sub(s.counter).checked_add(distance)?;
        // Centuries away is never.
        let delay = ticks_to_ns(ticks, Self::HZ);
        (delay < u64::MAX / 4).then(|| s.start.wrapping_add(delay))
    }

    fn advance(&mut self, now: u64) {
        self.settle(now);
    }
}

impl Snapshot for Hpet {
    type State = HpetState;

    fn save(&self, now: u64) -> HpetState {
        self.state.shifted(now.wrapping_neg())
    }

    fn restore(&mut self, state: &HpetState, now: u64) -> Result<(), RestoreError> {
        let valid = state.configuration & !(ENABLE | LEGACY) == 0
            && state.status >> TIMERS == 0
            && state.timers.iter().all(Timer::valid);
        if !valid {
            return Err(RestoreError { device: "hpet", what: "a register holds what it cannot" });
        }
        self.state = state.shifted(now);
        self.gate.set(self.state.legacy());
        self.update_lines();
        Ok(())
    }
}
