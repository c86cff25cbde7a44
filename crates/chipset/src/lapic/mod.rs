//! Local APICs (SDM vol. 3A chapter 11, "Advanced Programmable Interrupt Controller").
//!
//! [`LocalApic`] is one of them as a state machine: registers by xAPIC page and x2APIC MSR, timer, local vector
//! table, acceptance of interrupts. What it wants of others (an IPI, the broadcast of an EOI) comes back as an
//! [`Action`]. [`LocalApics`] is the set: it finds the targets of messages, carries actions out and wakes vCPUs.

mod apic;
mod message;
mod registers;
mod set;
#[cfg(test)]
mod set_tests;
#[cfg(test)]
mod tests;
mod timer;
mod tsc;
mod vectors;

pub use apic::{Acknowledged, Action, LocalApic, LocalApicState};
pub use message::{Delivery, DeliveryMode, Destination, Ipi, Shorthand};
pub use set::{ApicConfig, LocalApics, LocalApicsState};
pub use tsc::{LinearTsc, TscClock};
pub use vectors::VectorSet;

/// What stands behind the local APICs: 8259 pair and IOAPIC. Implemented by [`crate::IrqChip`].
pub trait ExternalController: Send + Sync {
    /// INTA: the 8259 pair gives up a vector.
    fn acknowledge(&self) -> u8;
    /// A level-triggered interrupt with this vector has ended at some local APIC.
    fn end_of_interrupt(&self, vector: u8);
}
