//! The local APICs, whoever has them: the machine itself, or the back end that runs the vCPUs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use skep_chipset::{ApicConfig, ExternalController, LocalApics};
use skep_hv::irq::{BackEndApics, EventFd, Irq, IrqLine, MessageLine, MsiMessage, MsiSender};
use skep_hv::{HvError, Kick, Pending, monotonic_ns};

use crate::bus::lock;

/// The local APICs of a machine.
pub(crate) enum Apics {
    /// Ours.
    Machine(Arc<LocalApics>),
    /// The back end's.
    BackEnd(BackEnd),
}

/// What the machine keeps of local APICs that it does not have: the wire from the 8259 pair, which leads to LINT0 of the
/// bootstrap processor.
pub(crate) struct BackEnd {
    apics: Arc<dyn BackEndApics>,
    wire: Arc<Wire>,
    controller: OnceLock<Weak<dyn ExternalController>>,
}

#[derive(Default)]
struct Wire {
    high: AtomicBool,
    processor: Mutex<Option<Arc<dyn Kick>>>,
}

impl IrqLine for Wire {
    fn set(&self, high: bool) {
        if self.high.swap(high, Ordering::SeqCst) != high
            && high
            && let Some(processor) = &*lock(&self.processor)
        {
            processor.wake();
        }
    }
}

impl Apics {
    /// Those of the back end if it brings some, else our own.
    pub(crate) fn new(config: ApicConfig, back_end: Option<Arc<dyn BackEndApics>>) -> Self {
        match back_end {
            None => Self::Machine(LocalApics::new(config)),
            Some(apics) => {
                Self::BackEnd(BackEnd { apics, wire: Arc::default(), controller: OnceLock::new() })
            }
        }
    }

    /// Ours, if they are.
    pub(crate) fn machine(&self) -> Option<&Arc<LocalApics>> {
        match self {
            Self::Machine(apics) => Some(apics),
            Self::BackEnd(_) => None,
        }
    }

    /// Takes messages to them.
    pub(crate) fn msi(&self) -> Arc<dyn MsiSender> {
        match self {
            Self::Machine(apics) => apics.clone(),
            Self::BackEnd(own) => own.apics.clone(),
        }
    }

    /// The wire for the 8259 pair's INTR.
    pub(crate) fn lint0(&self) -> Irq {
        match self {
            Self::Machine(apics) => apics.lint0(),
            Self::BackEnd(own) => own.wire.clone(),
        }
    }

    /// A new source of messages.
    pub(crate) fn message_line(&self) -> Result<Arc<dyn MessageLine>, HvError> {
        match self {
            Self::Machine(apics) => Ok(Arc::new(Line { apics: apics.clone(), message: Mutex::new(None) })),
            Self::BackEnd(own) => own.apics.message_line(),
        }
    }

    /// Says who gives external interrupts and hears of the end of level-triggered ones. The first call holds.
    pub(crate) fn attach_controller(&self, controller: Weak<dyn ExternalController>) {
        match self {
            Self::Machine(apics) => apics.attach_controller(controller),
            Self::BackEnd(own) => {
                let _ = own.controller.set(controller);
            }
        }
    }

    /// Says how to wake `vcpu`.
    pub(crate) fn attach_cpu(&self, vcpu: u32, kick: Arc<dyn Kick>) {
        match self {
            Self::Machine(apics) => apics.attach_cpu(vcpu, kick),
            Self::BackEnd(own) if vcpu == 0 => *lock(&own.wire.processor) = Some(kick),
            Self::BackEnd(_) => {}
        }
    }

    /// What the machine has for `vcpu`.
    pub(crate) fn pending(&self, vcpu: u32) -> Pending {
        match self {
            Self::Machine(apics) => apics.pending(vcpu, monotonic_ns()),
            Self::BackEnd(own) => {
                let maskable = vcpu == 0 && own.wire.high.load(Ordering::SeqCst);
                Pending { maskable, next_ns: u64::MAX, ..Pending::default() }
            }
        }
    }

    /// INTA.
    pub(crate) fn acknowledge(&self, vcpu: u32) -> Option<u8> {
        match self {
            Self::Machine(apics) => apics.acknowledge(vcpu, monotonic_ns()),
            Self::BackEnd(own) => {
                own.wire.high.load(Ordering::SeqCst).then_some(())?;
                Some(own.controller.get()?.upgrade()?.acknowledge())
            }
        }
    }

    /// A back end has seen the end of a level-triggered interrupt.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        if let Self::BackEnd(own) = self
            && let Some(controller) = own.controller.get().and_then(Weak::upgrade)
        {
            controller.end_of_interrupt(vector);
        }
    }

    /// RESET#. Those of a back end are reset with their processors.
    pub(crate) fn reset(&self) {
        if let Self::Machine(apics) = self {
            apics.reset();
        }
    }
}

/// A source of messages to our own APICs.
struct Line {
    apics: Arc<LocalApics>,
    message: Mutex<Option<MsiMessage>>,
}

impl MessageLine for Line {
    fn set_message(&self, message: Option<MsiMessage>) -> Result<(), HvError> {
        *lock(&self.message) = message;
        Ok(())
    }

    fn signal(&self) {
        let message = *lock(&self.message);
        if let Some(message) = message {
            self.apics.send(message);
        }
    }

    fn event_fd(&self) -> Option<&EventFd> {
        None
    }
}
