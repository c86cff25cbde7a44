//! Legacy replacement: who drives IRQ 0 and IRQ 8.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use skep_hv::irq::{Irq, IrqLine};

/// The switch that takes IRQ 0 and IRQ 8 from 8254 and RTC while the HPET's legacy replacement is on.
#[derive(Clone, Default)]
pub struct LegacyGate {
    inner: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    replaced: AtomicBool,
    lines: Mutex<Vec<Weak<GuardedLine>>>,
}

impl LegacyGate {
    /// `line`, cut off while legacy replacement is on.
    pub fn guard(&self, line: Irq) -> Irq {
        let guarded = Arc::new(GuardedLine { line, gate: self.inner.clone(), level: AtomicBool::new(false) });
        let mut lines = self.inner.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.retain(|line| line.strong_count() > 0);
        lines.push(Arc::downgrade(&guarded));
        guarded
    }

    /// Turns legacy replacement on or off.
    pub(super) fn set(&self, replaced: bool) {
        if self.inner.replaced.swap(replaced, Ordering::AcqRel) == replaced {
            return;
        }
        let lines = self.inner.lines.lock().unwrap_or_else(PoisonError::into_inner);
        for line in lines.iter().filter_map(Weak::upgrade) {
            line.drive();
        }
    }
}

impl fmt::Debug for LegacyGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LegacyGate").field("replaced", &self.inner.replaced).finish_non_exhaustive()
    }
}

struct GuardedLine {
    line: Irq,
    gate: Arc<Gate>,
    level: AtomicBool,
}

impl GuardedLine {
    fn drive(&self) {
        self.line.set(self.level.load(Ordering::Acquire) && !self.gate.replaced.load(Ordering::Acquire));
    }
}

impl IrqLine for GuardedLine {
    fn set(&self, high: bool) {
        self.level.store(high, Ordering::Release);
        self.drive();
    }
}
