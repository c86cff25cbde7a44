//! The guest's time-stamp counter, as the TSC-deadline timer needs it.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::time::{ticks, ticks_to_ns};

/// Converts between host time and the guest's TSC.
pub trait TscClock: Send + Sync {
    /// The TSC of `vcpu` at `now` (ns).
    fn tsc_at(&self, vcpu: u32, now: u64) -> u64;
    /// The first instant (ns) at which the TSC of `vcpu` is at least `tsc`; 0 if that was before the clock began,
    /// `u64::MAX` if it is out of reach.
    fn time_of(&self, vcpu: u32, tsc: u64) -> u64;
}

/// A TSC that counts at a constant rate: `offset + now * hz / 10^9` on every vCPU.
#[derive(Debug)]
pub struct LinearTsc {
    hz: u64,
    offset: AtomicU64,
}

impl LinearTsc {
    /// `hz` ticks a second; 0 at host time 0.
    pub fn new(hz: u64) -> Self {
        Self { hz: hz.max(1), offset: AtomicU64::new(0) }
    }

    /// Sets what is added to the count (wrapping). Tell [`crate::LocalApics::tsc_changed`] when vCPUs already run.
    pub fn set_offset(&self, offset: u64) {
        self.offset.store(offset, Ordering::Relaxed);
    }

    /// What is added to the count.
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }
}

impl TscClock for LinearTsc {
    fn tsc_at(&self, _vcpu: u32, now: u64) -> u64 {
        ticks(now, self.hz).wrapping_add(self.offset())
    }

    fn time_of(&self, _vcpu: u32, tsc: u64) -> u64 {
        // The offset is a signed displacement: half of the range lies before host time 0.
        let offset = self.offset();
        let count = tsc.wrapping_sub(offset);
        let behind = if offset > u64::MAX / 2 { false } else { tsc < offset };
        if behind { 0 } else { ticks_to_ns(count, self.hz) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_reached_at_their_time_and_not_before() {
        let tsc = LinearTsc::new(2_893_437_000);
        for offset in [0u64, 12_345, 500u64.wrapping_neg()] {
            tsc.set_offset(offset);
            for deadline in [20_000u64, 20_001, 123_456_789, 1 << 50] {
                let at = tsc.time_of(0, deadline);
                assert!(tsc.tsc_at(0, at) >= deadline);
                assert!(tsc.tsc_at(0, at - 1) < deadline);
            }
        }
    }

    #[test]
    fn deadlines_out_of_range() {
        let tsc = LinearTsc::new(1_000);
        assert_eq!(tsc.time_of(0, u64::MAX), u64::MAX);
        tsc.set_offset(1_000);
        assert_eq!(tsc.time_of(0, 10), 0);
    }
}
