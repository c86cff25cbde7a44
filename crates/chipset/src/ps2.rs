//! The i8042 keyboard controller with a keyboard and a mouse, and port 0x92.

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

/// Saved state of [`Ps2`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ps2State {}

/// The keyboard controller.
pub struct Ps2 {
    _irq1: Irq,
    _irq12: Irq,
}

impl Ps2 {
    /// `irq1` is the keyboard's interrupt, `irq12` the mouse's.
    pub fn new(irq1: Irq, irq12: Irq) -> Self {
        Self { _irq1: irq1, _irq12: irq12 }
    }

    /// Types: feeds scan codes of set 2 as the keyboard sends them. Returns how many bytes were taken.
    pub fn push_scancodes(&mut self, _codes: &[u8]) -> usize {
        0
    }

    /// Moves the mouse by counts (right and up are positive) and sets its buttons (bit 0 left, 1 right, 2 middle).
    pub fn push_motion(&mut self, _dx: i32, _dy: i32, _buttons: u8) {}
}

impl Device for Ps2 {
    fn name(&self) -> &'static str {
        "ps2"
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(0x60, 1, 0), Window::ports(0x64, 1, 4), Window::ports(0x92, 1, 5)]
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

impl Snapshot for Ps2 {
    type State = Ps2State;
    fn save(&self, _now: u64) -> Ps2State {
        Ps2State::default()
    }
    fn restore(&mut self, _state: &Ps2State, _now: u64) -> Result<(), RestoreError> {
        Ok(())
    }
}
