//! What tests put in place of the rest of a machine.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use skep_hv::irq::{IrqLine, MsiMessage, MsiSender, Signal};

/// A line that remembers its level and counts its rising edges.
#[derive(Debug, Default)]
pub(crate) struct Line {
    level: AtomicBool,
    edges: AtomicU32,
}

impl Line {
    pub(crate) fn high(&self) -> bool {
        self.level.load(Ordering::Relaxed)
    }

    /// Rising edges since last asked.
    pub(crate) fn edges(&self) -> u32 {
        self.edges.swap(0, Ordering::Relaxed)
    }
}

impl IrqLine for Line {
    fn set(&self, high: bool) {
        if !self.level.swap(high, Ordering::Relaxed) && high {
            self.edges.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Collects messages.
#[derive(Debug, Default)]
pub(crate) struct Messages(Mutex<Vec<MsiMessage>>);

impl Messages {
    pub(crate) fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl MsiSender for Messages {
    fn send(&self, message: MsiMessage) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(message);
    }
}

/// Counts signals.
#[derive(Debug, Default)]
pub(crate) struct Bell(AtomicU32);

impl Bell {
    /// Signals since last asked.
    pub(crate) fn rings(&self) -> u32 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl Signal for Bell {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}
