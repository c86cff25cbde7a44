//! The 16550A UART (PC16550D).

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use serde::{Deserialize, Serialize};
use skep_hv::irq::{Irq, Signal};
use std::sync::Arc;

/// Saved state of [`Uart`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UartState {}

/// A signal that nobody hears.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoSignal;

impl Signal for NoSignal {
    fn signal(&self) {}
}

/// A 16550A. Its line is infinitely fast: a byte written leaves at once, unless collected output is full.
pub struct Uart {
    base: u16,
    _irq: Irq,
    _attention: Arc<dyn Signal>,
}

impl Uart {
    /// Port of COM1 (IRQ 4).
    pub const COM1: u16 = 0x3f8;
    /// Port of COM2 (IRQ 3).
    pub const COM2: u16 = 0x2f8;
    /// Port of COM3 (IRQ 4).
    pub const COM3: u16 = 0x3e8;
    /// Port of COM4 (IRQ 3).
    pub const COM4: u16 = 0x2e8;
    /// Bytes of output that are collected before the transmitter reads as busy.
    pub const OUTPUT_CAPACITY: usize = 64 * 1024;

    /// A UART at port `base`. `attention` is signalled when output appears after there was none, and when the guest
    /// has made room after [`push_input`](Self::push_input) took less than it was given.
    pub fn new(base: u16, irq: Irq, attention: Arc<dyn Signal>) -> Self {
        Self { base, _irq: irq, _attention: attention }
    }

    /// Takes everything transmitted so far.
    pub fn take_output(&mut self) -> Vec<u8> {
        Vec::new()
    }

    /// Whether there is output to take.
    pub fn has_output(&self) -> bool {
        false
    }

    /// Receives as many of `bytes` as the receiver has room for and says how many.
    pub fn push_input(&mut self, _bytes: &[u8]) -> usize {
        0
    }

    /// How many bytes [`push_input`](Self::push_input) would take.
    pub fn input_room(&self) -> usize {
        0
    }

    /// Receives a break.
    pub fn push_break(&mut self) {}

    /// Whether somebody is connected at the other end: drives CTS, DSR and DCD. True at the start.
    pub fn set_connected(&mut self, _connected: bool) {}
}

impl Device for Uart {
    fn name(&self) -> &'static str {
        "uart"
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(self.base, 8, 0)]
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

impl Snapshot for Uart {
    type State = UartState;
    fn save(&self, _now: u64) -> UartState {
        UartState::default()
    }
    fn restore(&mut self, _state: &UartState, _now: u64) -> Result<(), RestoreError> {
        Ok(())
    }
}
