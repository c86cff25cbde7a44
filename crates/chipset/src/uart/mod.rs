//! The 16550A UART (National PC16550D data sheet; sections of its chapter 8 are cited).
//!
//! The line is infinitely fast: a byte written leaves at once, and the four idle character times after which a
//! receiver FIFO below its trigger level raises a time-out interrupt (§8.4) have always passed. When nobody takes the
//! output, the transmitter stays busy, as it would behind a slow line, and nothing is lost.
//!
//! A PC gates the interrupt with OUT2. This one does not: no known driver depends on being silenced by it, and some
//! small kernels forget to set it.

mod fifo;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use fifo::Fifo;
use serde::{Deserialize, Serialize};
use skep_hv::irq::{Irq, Signal};

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};

/// A signal that nobody hears.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoSignal;

impl Signal for NoSignal {
    fn signal(&self) {}
}

/// Interrupt enable register (§8.7).
mod ier {
    pub(super) const RECEIVED: u8 = 1;
    pub(super) const TRANSMITTER_EMPTY: u8 = 2;
    pub(super) const LINE_STATUS: u8 = 4;
    pub(super) const MODEM_STATUS: u8 = 8;
}

/// Interrupt identification register (§8.6).
mod iir {
    pub(super) const NONE: u8 = 1;
    pub(super) const MODEM_STATUS: u8 = 0;
    pub(super) const TRANSMITTER_EMPTY: u8 = 2;
    pub(super) const RECEIVED: u8 = 4;
    pub(super) const LINE_STATUS: u8 = 6;
    pub(super) const TIME_OUT: u8 = 0xc;
    pub(super) const FIFOS: u8 = 0xc0;
}

/// Line status register (§8.4).
mod lsr {
    pub(super) const DATA_READY: u8 = 1;
    pub(super) const OVERRUN: u8 = 2;
    pub(super) const BREAK: u8 = 0x10;
    pub(super) const HOLDING_EMPTY: u8 = 0x20;
    pub(super) const TRANSMITTER_EMPTY: u8 = 0x40;
    pub(super) const FIFO_ERROR: u8 = 0x80;
}

/// Modem control register (§8.8): loop-back; the outputs in the order of the inputs that loop-back feeds.
mod mcr {
    pub(super) const DTR: u8 = 1;
    pub(super) const RTS: u8 = 2;
    pub(super) const OUT1: u8 = 4;
    pub(super) const OUT2: u8 = 8;
    pub(super) const LOOP: u8 = 0x10;
}

/// Modem status register (§8.9): inputs; each has its change bit four places lower.
mod msr {
    pub(super) const CTS: u8 = 0x10;
    pub(super) const DSR: u8 = 0x20;
    pub(super) const RI: u8 = 0x40;
    pub(super) const DCD: u8 = 0x80;
    pub(super) const CHANGES: u8 = 0x0f;
}

/// Line control register: divisor latch access (§8.1).
const LCR_DLAB: u8 = 0x80;
/// FIFO control register (§8.5).
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVER: u8 = 2;
const FCR_CLEAR_TRANSMITTER: u8 = 4;

/// Saved state of [`Uart`]. Output that nobody has taken is not in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
    ier: u8,
    /// Enable and trigger bits of the FIFO control register.
    fcr: u8,
    lcr: u8,
    mcr: u8,
    msr: u8,
    scratch: u8,
    divisor: [u8; 2],
    overrun: bool,
    /// The transmitter-empty interrupt waits.
    empty_pending: bool,
    receiver: Fifo,
    transmitter: Fifo,
    connected: bool,
}

impl UartState {
    /// After master reset (§8.2, table II).
    fn new(connected: bool) -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            msr: modem_inputs(0, connected),
            scratch: 0,
            divisor: [12, 0],
            overrun: false,
            empty_pending: false,
            receiver: Fifo::default(),
            transmitter: Fifo::default(),
            connected,
        }
    }

    fn fifos(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifos() { Fifo::SIZE } else { 1 }
    }

    /// How many bytes raise the received-data interrupt.
    fn trigger(&self) -> usize {
        if self.fifos() { [1, 4, 8, 14][usize::from(self.fcr >> 6)] } else { 1 }
    }

    fn line_status(&self) -> u8 {
        let mut status = 0;
        if !self.receiver.is_empty() {
            status |= lsr::DATA_READY;
        }
        if self.overrun {
            status |= lsr::OVERRUN;
        }
        if self.receiver.front_marked() {
            status |= lsr::BREAK;
        }
        if self.transmitter.is_empty() {
            status |= lsr::HOLDING_EMPTY | lsr::TRANSMITTER_EMPTY;
        }
        if self.fifos() && self.receiver.any_marked() {
            status |= lsr::FIFO_ERROR;
        }
        status
    }

    /// The interrupt with the highest priority (table IV).
    fn interrupt(&self) -> u8 {
        let received = self.receiver.len();
        if self.ier & ier::LINE_STATUS != 0 && (self.overrun || self.receiver.front_marked()) {
            iir::LINE_STATUS
        } else if self.ier & ier::RECEIVED != 0 && received >= self.trigger() {
            iir::RECEIVED
        } else if self.ier & ier::RECEIVED != 0 && received > 0 {
            iir::TIME_OUT
        } else if self.ier & ier::TRANSMITTER_EMPTY != 0 && self.empty_pending {
            iir::TRANSMITTER_EMPTY
        } else if self.ier & ier::MODEM_STATUS != 0 && self.msr & msr::CHANGES != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    /// Feeds the modem inputs from their source and notes changes.
    fn update_modem(&mut self) {
        let inputs = modem_inputs(self.mcr, self.connected);
        let changed = (self.msr ^ inputs) & !msr::CHANGES;
        // The ring indicator's change bit notes trailing edges only.
        let changed = changed & !(inputs & msr::RI);
        self.msr = inputs | self.msr & msr::CHANGES | changed >> 4;
    }

    fn receive(&mut self, byte: u8, is_break: bool) {
        if !self.receiver.push(byte, is_break, self.capacity()) {
            self.overrun = true;
            if !self.fifos() {
                // Without FIFOs the newcomer overwrites (§8.4, bit 1).
                self.receiver.clear();
                self.receiver.push(byte, is_break, 1);
            }
        }
    }
}

/// CTS, DSR, RI and DCD: what the modem says, or in loop-back the UART's own outputs.
fn modem_inputs(control: u8, connected: bool) -> u8 {
    if control & mcr::LOOP == 0 {
        return if connected { msr::CTS | msr::DSR | msr::DCD } else { 0 };
    }
    [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
        .iter()
        .filter(|(output, _)| control & output != 0)
        .fold(0, |inputs, (_, input)| inputs | input)
}

/// A 16550A.
pub struct Uart {
    base: u16,
    irq: Irq,
    attention: Arc<dyn Signal>,
    line: bool,
    output: Vec<u8>,
    /// [`Self::push_input`] took less than it was given.
    refused: bool,
    state: UartState,
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
        let state = UartState::new(true);
        Self { base, irq, attention, line: false, output: Vec::new(), refused: false, state }
    }

    /// Takes everything transmitted so far.
    pub fn take_output(&mut self) -> Vec<u8> {
        let taken = std::mem::take(&mut self.output);
        self.transmit();
        self.update_line();
        taken
    }

    /// Whether there is output to take.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Receives as many of `bytes` as the receiver has room for and says how many.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let taken = self.input_room().min(bytes.len());
        for &byte in bytes.iter().take(taken) {
            self.state.receive(byte, false);
        }
        self.refused |= taken < bytes.len();
        self.update_line();
        taken
    }

    /// How many bytes [`push_input`](Self::push_input) would take: none in loop-back, where the line is cut off.
    pub fn input_room(&self) -> usize {
        let s = &self.state;
        if s.mcr & mcr::LOOP != 0 { 0 } else { s.capacity().saturating_sub(s.receiver.len()) }
    }

    /// Receives a break.
    pub fn push_break(&mut self) {
        if self.state.mcr & mcr::LOOP == 0 {
            self.state.receive(0, true);
            self.update_line();
        }
    }

    /// Whether somebody is connected at the other end: drives CTS, DSR and DCD. True at the start.
    pub fn set_connected(&mut self, connected: bool) {
        self.state.connected = connected;
        self.state.update_modem();
        self.update_line();
    }

    fn update_line(&mut self) {
        let high = self.state.interrupt() != iir::NONE;
        if high != self.line {
            self.line = high;
            self.irq.set(high);
        }
    }

    /// Signals if input that was refused would fit now.
    fn offer_room(&mut self) {
        if self.refused && self.input_room() > 0 {
            self.refused = false;
            self.attention.signal();
        }
    }

    fn write_holding(&mut self, byte: u8) {
        self.state.empty_pending = false;
        if self.state.mcr & mcr::LOOP != 0 {
            self.state.receive(byte, false);
            self.state.empty_pending = true;
            return;
        }
        // A byte too many is lost, as on the chip: drivers look at the line status first.
        self.state.transmitter.push(byte, false, self.state.capacity());
        self.transmit();
    }

    /// Moves bytes from the transmitter to the output while there is room.
    fn transmit(&mut self) {
        let (silent, waiting) = (self.output.is_empty(), !self.state.transmitter.is_empty());
        while self.output.len() < Self::OUTPUT_CAPACITY {
            let Some(byte) = self.state.transmitter.pop() else { break };
            self.output.push(byte);
        }
        self.state.empty_pending |= waiting && self.state.transmitter.is_empty();
        if silent && !self.output.is_empty() {
            self.attention.signal();
        }
    }

    fn write_fifo_control(&mut self, value: u8) {
        let s = &mut self.state;
        let switched = (s.fcr ^ value) & FCR_ENABLE != 0;
        if switched || value & (FCR_ENABLE | FCR_CLEAR_RECEIVER) == FCR_ENABLE | FCR_CLEAR_RECEIVER {
            s.receiver.clear();
        }
        if switched || value & (FCR_ENABLE | FCR_CLEAR_TRANSMITTER) == FCR_ENABLE | FCR_CLEAR_TRANSMITTER {
            s.empty_pending |= !s.transmitter.is_empty();
            s.transmitter.clear();
        }
        s.fcr = if value & FCR_ENABLE != 0 { value & 0xc1 } else { 0 };
    }

    fn write_interrupt_enable(&mut self, value: u8) {
        let s = &mut self.state;
        let newly = value & !s.ier;
        s.ier = value & 0x0f;
        // Enabling the interrupt of an empty transmitter raises it.
        if newly & ier::TRANSMITTER_EMPTY != 0 && s.transmitter.is_empty() {
            s.empty_pending = true;
        }
    }
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

    fn read_register(&mut self, offset: u64, _width: u8, _now: u64) -> u64 {
        let s = &mut self.state;
        let latch = s.lcr & LCR_DLAB != 0;
        let value = match offset {
            0 | 1 if latch => return s.divisor[offset as usize].into(),
            0 => {
                let byte = s.receiver.pop().unwrap_or(0);
                self.offer_room();
                byte
            }
            1 => return s.ier.into(),
            2 => {
                let interrupt = s.interrupt();
                if interrupt == iir::TRANSMITTER_EMPTY {
                    s.empty_pending = false;
                }
                if s.fifos() { interrupt | iir::FIFOS } else { interrupt }
            }
            3 => return s.lcr.into(),
            4 => return s.mcr.into(),
            5 => {
                let status = s.line_status();
                if status & (lsr::OVERRUN | lsr::BREAK) == 0 {
                    return status.into();
                }
                s.overrun = false;
                s.receiver.unmark_front();
                status
            }
            6 => {
                let status = s.msr;
                s.msr &= !msr::CHANGES;
                status
            }
            7 => return s.scratch.into(),
            _ => return 0xff,
        };
        self.update_line();
        value.into()
    }

    fn write_register(&mut self, offset: u64, _width: u8, value: u64, _now: u64) -> Effect {
        let value = value as u8;
        let s = &mut self.state;
        let latch = s.lcr & LCR_DLAB != 0;
        match offset {
            0 | 1 if latch => s.divisor[offset as usize] = value,
            0 => self.write_holding(value),
            1 => self.write_interrupt_enable(value),
            2 => {
                self.write_fifo_control(value);
                self.offer_room();
            }
            3 => s.lcr = value,
            4 => {
                s.mcr = value & 0x1f;
                s.update_modem();
                self.offer_room();
            }
            // Line and modem status are for reading; the data sheet keeps writes for factory tests.
            5 | 6 => {}
            7 => s.scratch = value,
            _ => {}
        }
        self.update_line();
        Effect::None
    }

    fn reset(&mut self, _now: u64) {
        self.state = UartState::new(self.state.connected);
        self.update_line();
        self.offer_room();
    }
}

impl Snapshot for Uart {
    type State = UartState;

    fn save(&self, _now: u64) -> UartState {
        self.state.clone()
    }

    fn restore(&mut self, state: &UartState, _now: u64) -> Result<(), RestoreError> {
        if !state.receiver.valid() || !state.transmitter.valid() {
            return Err(RestoreError { device: "uart", what: "a FIFO is malformed" });
        }
        self.state = state.clone();
        self.transmit();
        self.update_line();
        self.offer_room();
        Ok(())
    }
}
