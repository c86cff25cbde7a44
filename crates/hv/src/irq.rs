//! Interrupt lines, messages, doorbells and signals: the capabilities that devices are given when they are built.

use std::sync::Arc;

/// Linux's event counter: a signal that can be waited for, and that the host's kernel can send and receive by itself.
pub use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::HvError;

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
    /// Says which level-triggered message IOAPIC input `pin` (0 to 23) sends from now on; `None` if it sends none. Local
    /// APICs in a back end tell the end of these alone ([`crate::VcpuIo::end_of_interrupt`]); the machine's own tell all.
    fn announce_pin(&self, pin: u8, message: Option<MsiMessage>) {
        let _ = (pin, message);
    }
}

/// A source of message-signalled interrupts: an entry of an MSI-X table, for example.
pub trait MessageLine: Send + Sync {
    /// What is sent from now on; `None` for nothing (masked, or not programmed yet).
    fn set_message(&self, message: Option<MsiMessage>) -> Result<(), HvError>;
    /// Sends the message. Never blocks.
    fn signal(&self);
    /// Writing 1 to this eventfd sends the message too, and needs neither this process nor an exit of the guest. `None`
    /// where there is no such path: then the owner waits for the events of its source and calls
    /// [`MessageLine::signal`].
    fn event_fd(&self) -> Option<&EventFd>;
}

/// Local APICs that a back end brings.
pub trait BackEndApics: MsiSender {
    /// A new source of messages with a path through the host's kernel.
    fn message_line(&self) -> Result<Arc<dyn MessageLine>, HvError>;
}

/// Something to be signalled: a doorbell's other end.
pub trait Signal: Send + Sync {
    /// Signals. Never blocks.
    fn signal(&self);
    /// The eventfd behind it, where there is one: who has it can signal from the host's kernel.
    fn event_fd(&self) -> Option<&EventFd> {
        None
    }
}

/// A guest write that stands for an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Doorbell {
    /// Where: guest physical address or port.
    pub address: IoAddress,
    /// Width of the write in bytes (1, 2, 4, 8); 0 for any width.
    pub width: u8,
    /// Only this value counts, or any. A value needs a width.
    pub value: Option<u64>,
}

/// A place in one of the two I/O spaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoAddress {
    /// Port I/O.
    Port(u16),
    /// Memory-mapped I/O at a guest physical address.
    Memory(u64),
}

impl Signal for EventFd {
    fn signal(&self) {
        // Fails only when 2^64 - 2 signals wait already.
        let _ = self.write(1);
    }

    fn event_fd(&self) -> Option<&EventFd> {
        Some(self)
    }
}

/// A line that leads nowhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoIrq;

impl IrqLine for NoIrq {
    fn set(&self, _high: bool) {}
}
