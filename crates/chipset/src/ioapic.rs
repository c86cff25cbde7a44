//! The IOAPIC (Intel 82093AA, with the EOI register of version 0x20).

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use serde::{Deserialize, Serialize};
use skep_hv::irq::MsiSender;
use std::sync::Arc;

/// Saved state of [`IoApic`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct IoApicState {}

/// An IOAPIC of 24 pins.
pub struct IoApic {
    _msi: Arc<dyn MsiSender>,
}

impl IoApic {
    /// Guest physical address of the register page.
    pub const BASE: u64 = 0xfec0_0000;
    /// Number of pins.
    pub const PINS: u8 = 24;

    /// `msi` takes the messages.
    pub fn new(msi: Arc<dyn MsiSender>) -> Self {
        Self { _msi: msi }
    }

    /// Drives input `pin`.
    pub fn set_pin(&mut self, _pin: u8, _high: bool) {}

    /// A level-triggered interrupt with this vector has ended.
    pub fn end_of_interrupt(&mut self, _vector: u8) {}
}

impl Device for IoApic {
    fn name(&self) -> &'static str {
        "ioapic"
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::memory(Self::BASE, 0x1000)]
    }
    fn access(&self) -> Access {
        Access::BYTE
    }
    fn read_register(&mut self, _offset: u64, _width: u8, _now: u64) -> u64 {
        0xff
    }
    fn write_register(&mut self, _offset: u64, _width: u8, _value: u64, _now: u64) -> Effect {
        Effect::None
    }
    fn reset(&mut self, _now: u64) {}
}

impl Snapshot for IoApic {
    type State = IoApicState;
    fn save(&self, _now: u64) -> IoApicState {
        IoApicState::default()
    }
    fn restore(&mut self, _state: &IoApicState, _now: u64) -> Result<(), RestoreError> {
        Ok(())
    }
}
