//! The chipset of a PC as pure state machines: local APICs, IOAPIC, 8259 pair, 8254, HPET, ACPI power management,
//! RTC, UARTs, keyboard controller and the small ports.
//!
//! Nothing here owns a thread, a file, a socket or a clock. Time comes in as `now`, nanoseconds of
//! [`skep_hv::monotonic_ns`]; interrupts go out through capabilities given at build time ([`skep_hv::irq`]); what a
//! device wants of the whole machine comes back as an [`Effect`].
//!
//! # How the parts meet
//!
//! * A register window is a [`Device`]; the bus calls [`Device::read`] and [`Device::write`] with any width and
//!   alignment, and one access layer ([`device`]) turns that into the native accesses a device declares.
//! * [`IrqChip`] is the 8259 pair and the IOAPIC behind one handle that any thread may use. It hands out interrupt
//!   lines; a line may be shared, its sources are OR-ed together.
//! * [`LocalApics`] is the set of local APICs, used by every vCPU thread and by whoever sends messages. IOAPIC and
//!   devices reach it as [`skep_hv::irq::MsiSender`].
//! * Lock order: a device, then [`IrqChip`] (8259 before IOAPIC), then one local APIC, then a vCPU's wake. No lock
//!   is held on the way back (end of interrupt, acknowledge of an 8259 interrupt).
//!
//! ```
//! use std::sync::Arc;
//! use skep_chipset::{ApicConfig, IrqChip, LocalApics, Uart, NoSignal};
//!
//! let apics = LocalApics::new(ApicConfig { vcpus: 2, ..ApicConfig::default() });
//! let chip = IrqChip::new(apics.clone(), apics.lint0());
//! apics.attach_controller(Arc::downgrade(&chip) as _);
//! let com1 = Uart::new(Uart::COM1, chip.isa_line(4), Arc::new(NoSignal));
//! # let _ = com1;
//! ```
//!
//! # Restoring
//!
//! Times inside a saved state are relative to the `now` it was saved at. Restore devices first (they drive their
//! lines), then [`IrqChip`], then [`LocalApics`]: each overwrites what restoring the former stirred up.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod device;
#[doc(hidden)]
pub mod drive;
pub mod hpet;
pub mod ioapic;
pub mod irqchip;
pub mod lapic;
pub mod pic;
pub mod pit;
pub mod ports;
pub mod ps2;
pub mod rtc;
#[cfg(test)]
mod testing;
mod time;
pub mod uart;

pub use acpi::{AcpiPm, ResetControl};
pub use device::{Access, Device, Effect, RestoreError, Snapshot, Space, Window};
pub use hpet::{Hpet, HpetLines, LegacyGate};
pub use ioapic::IoApic;
pub use irqchip::{IoApicWindow, IrqChip, PicWindow};
pub use lapic::{ApicConfig, ExternalController, LinearTsc, LocalApic, LocalApics, TscClock};
pub use pic::PicPair;
pub use pit::Pit;
pub use ports::{DebugExit, PostPort};
pub use ps2::Ps2;
pub use rtc::{Rtc, RtcConfig};
pub use uart::{NoSignal, Uart};
