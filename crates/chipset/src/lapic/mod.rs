//! Local APICs (SDM vol. 3A chapter 11).

mod set;

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
pub use set::{ApicConfig, LocalApics, LocalApicsState};

/// What stands behind the local APICs: 8259 pair and IOAPIC. Implemented by [`crate::IrqChip`].
pub trait ExternalController: Send + Sync {
    /// INTA: the 8259 pair gives up a vector.
    fn acknowledge(&self) -> u8;
    /// A level-triggered interrupt with this vector has ended at some local APIC.
    fn end_of_interrupt(&self, vector: u8);
}

/// Converts between host time and the guest's TSC.
pub trait TscClock: Send + Sync {
    /// The TSC of `vcpu` at `now` (ns).
    fn tsc_at(&self, vcpu: u32, now: u64) -> u64;
    /// The first instant (ns) at which the TSC of `vcpu` is at least `tsc`; `u64::MAX` if out of reach.
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

    /// Sets what is added to the count. Tell [`LocalApics::tsc_changed`] when vCPUs already run.
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
        crate::time::ticks(now, self.hz).wrapping_add(self.offset())
    }

    fn time_of(&self, _vcpu: u32, tsc: u64) -> u64 {
        let count = tsc.wrapping_sub(self.offset());
        // An offset above the deadline is a deadline that has passed before host time 0.
        if count > u64::MAX / 2 && tsc < self.offset() { 0 } else { crate::time::ticks_to_ns(count, self.hz) }
    }
}

/// One local APIC, without its surroundings: what it wants of others comes back as a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalApic {
    id: u32,
}
