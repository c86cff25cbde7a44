//! The pair of 8259A interrupt controllers.

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

/// Saved state of [`PicPair`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PicPairState {}

/// Two 8259A in cascade.
pub struct PicPair {
    _intr: Irq,
}

impl PicPair {
    /// `intr` is driven by the INTR output.
    pub fn new(intr: Irq) -> Self {
        Self { _intr: intr }
    }

    /// Drives input `irq` (0-15).
    pub fn set_line(&mut self, _irq: u8, _high: bool) {}

    /// INTA: the vector of the interrupt with the highest priority, or a spurious one.
    pub fn acknowledge(&mut self) -> u8 {
        7
    }
}

impl Device for PicPair {
    fn name(&self) -> &'static str {
        "pic"
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(0x20, 2, 0), Window::ports(0xa0, 2, 2), Window::ports(0x4d0, 2, 4)]
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

impl Snapshot for PicPair {
    type State = PicPairState;
    fn save(&self, _now: u64) -> PicPairState {
        PicPairState::default()
    }
    fn restore(&mut self, _state: &PicPairState, _now: u64) -> Result<(), RestoreError> {
        Ok(())
    }
}
