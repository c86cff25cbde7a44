//! The 8254 programmable interval timer and the speaker port 0x61.

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

/// Saved state of [`Pit`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PitState {}

/// An 8254: channel 0 drives IRQ 0, channel 2 the speaker.
pub struct Pit {
    _irq0: Irq,
}

impl Pit {
    /// Input clock in Hz.
    pub const HZ: u64 = 1_193_182;

    /// `irq0` follows OUT of channel 0 (give it [`crate::LegacyGate::guard`]ed if there is an HPET).
    pub fn new(irq0: Irq) -> Self {
        Self { _irq0: irq0 }
    }
}

impl Device for Pit {
    fn name(&self) -> &'static str {
        "pit"
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(0x40, 4, 0), Window::ports(0x61, 1, 4)]
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

impl Snapshot for Pit {
    type State = PitState;
    fn save(&self, _now: u64) -> PitState {
        PitState::default()
    }
    fn restore(&mut self, _state: &PitState, _now: u64) -> Result<(), RestoreError> {
        Ok(())
    }
}
