//! The local APIC's timer (SDM vol. 3A §11.5.4). Its bus clock is 1 GHz: one tick of the undivided clock is 1 ns.

use serde::{Deserialize, Serialize};

use super::TscClock;
use crate::time::{due, since};

/// Timer mode, LVT timer register bits 18:17.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl Mode {
    pub(super) fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// Counter and deadline.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Timer {
    /// Initial-count register.
    pub initial: u32,
    /// Divide-configuration register.
    pub divide: u32,
    /// IA32_TSC_DEADLINE; 0 when disarmed.
    pub deadline: u64,
    /// An expiry lies ahead.
    armed: bool,
    /// When the count reaches 0, or the TSC the deadline.
    expiry: u64,
}

impl Timer {
    /// The divisor: 2, 4, 8, ... 128, 1 for bits 3, 1, 0 of the divide-configuration register.
    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((code + 1) & 7)
    }

    fn period(&self) -> u64 {
        u64::from(self.initial) * self.divisor()
    }

    /// Writes the initial count: starts the timer, or stops it with 0.
    pub(super) fn start(&mut self, initial: u32, now: u64) {
        self.initial = initial;
        self.armed = initial != 0;
        self.expiry = now.wrapping_add(self.period());
    }

    /// The current count.
    pub(super) fn current(&self, now: u64) -> u32 {
        if self.armed {
            since(now, self.expiry).div_ceil(self.divisor()).min(u32::MAX.into()) as u32
        } else {
            0
        }
    }

    /// Writes the divide configuration; a running count goes on at the new rate.
    pub(super) fn set_divide(&mut self, divide: u32, now: u64, mode: Mode) {
        let left = self.current(now);
        self.divide = divide & 0xb;
        if self.armed && mode != Mode::TscDeadline {
            self.expiry = now.wrapping_add(u64::from(left) * self.divisor());
        }
    }

    /// Writes IA32_TSC_DEADLINE; 0 disarms.
    pub(super) fn set_deadline(&mut self, deadline: u64, vcpu: u32, clock: &dyn TscClock) {
        self.deadline = deadline;
        self.armed = deadline != 0;
        self.locate_deadline(vcpu, clock);
    }

    /// Finds the instant of the deadline, again if the TSC has been set.
    pub(super) fn locate_deadline(&mut self, vcpu: u32, clock: &dyn TscClock) {
        if self.deadline != 0 {
            // Far deadlines stay ahead under wrapping comparison: none is further than 146 years.
            self.expiry = clock.time_of(vcpu, self.deadline).min(u64::MAX / 2);
        }
    }

    /// Stops whatever runs: the timer has gone into or out of TSC-deadline mode (§11.5.4.1).
    pub(super) fn disarm(&mut self) {
        self.armed = false;
        self.deadline = 0;
        self.initial = 0;
    }

    /// Whether the timer has expired by `now`; goes on to the next period, or disarms.
    pub(super) fn expire(&mut self, mode: Mode, now: u64) -> bool {
        if !self.armed || !due(self.expiry, now) {
            return false;
        }
        match (mode, self.period()) {
            (Mode::Periodic, period) if period > 0 => {
                let late = now.wrapping_sub(self.expiry);
                self.expiry = now.wrapping_add(period - late % period);
            }
            _ => {
                self.armed = false;
                self.deadline = 0;
            }
        }
        true
    }

    /// When the timer expires.
    pub(super) fn next(&self) -> Option<u64> {
        self.armed.then_some(self.expiry)
    }

    /// Whether a saved timer is one, in this mode.
    pub(super) fn valid(&self, mode: Mode) -> bool {
        let counts = self.deadline == 0;
        let waits = self.initial == 0 && self.armed != counts;
        self.divide & !0xb == 0 && if mode == Mode::TscDeadline { waits } else { counts }
    }

    /// The same timer with its expiry moved by `by` (wrapping): to and from times relative to now. That of a
    /// TSC deadline is left for [`Self::locate_deadline`] to find.
    pub(super) fn shifted(&self, by: u64) -> Self {
        let counting = self.armed && self.deadline == 0;
        Self { expiry: if counting { self.expiry.wrapping_add(by) } else { 0 }, ..self.clone() }
    }
}
