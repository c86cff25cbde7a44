//! Interrupt lines, messages and signals: the capabilities that devices are given when they are built.

use std::sync::Arc;

/// One input of an interrupt controller. Level semantics: the line is high or low until set again; a device with
/// edge interrupts calls [`IrqLine::pulse`].
pub trait IrqLine: Send + Sync {
    /// Drives the line. Setting it to the level it has does nothing.
    fn set(&self, high: bool);
    /// Low to high and back: one edge.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A shared line.
pub type Irq = Arc<dyn IrqLine>;

/// A message-signalled interrupt as it travels: PCI 3.0 §6.8.1, SDM vol. 3A §11.11.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Message address (0xfee00000 block).
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Takes messages to local APICs.
pub trait MsiSender: Send + Sync {
    /// Delivers `message`. Messages outside the APIC block are dropped.
    fn send(&self, message: MsiMessage);
}

/// Something to be signalled: a doorbell's other end.
pub trait Signal: Send + Sync {
    /// Signals. Never blocks.
    fn signal(&self);
}

/// A line that leads nowhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoIrq;

impl IrqLine for NoIrq {
    fn set(&self, _high: bool) {}
}
