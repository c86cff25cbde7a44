//! The 8259 pair and the IOAPIC behind one handle, and the lines that lead to them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use serde::{Deserialize, Serialize};
use skep_hv::irq::{Irq, IrqLine, MsiSender, Signal};

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use crate::ioapic::{IoApic, IoApicState};
use crate::lapic::ExternalController;
use crate::pic::{PicPair, PicPairState};

/// Number of ISA interrupts.
const ISA_LINES: usize = 16;
/// IOAPIC pins from this one on are wired active low.
const FIRST_PCI_PIN: u8 = 16;

/// A controller and, for each of its inputs, how many sources are asserted.
struct Wired<Chip, const INPUTS: usize> {
    chip: Chip,
    asserted: [i32; INPUTS],
}

impl<Chip, const INPUTS: usize> Wired<Chip, INPUTS> {
    fn new(chip: Chip) -> Mutex<Self> {
        Mutex::new(Self { chip, asserted: [0; INPUTS] })
    }

    /// Counts one source more or less on `input`; whether any is asserted now.
    fn count(&mut self, input: u8, asserted: bool) -> bool {
        let Some(count) = self.asserted.get_mut(usize::from(input)) else { return false };
        *count += if asserted { 1 } else { -1 };
        *count > 0
    }
}

type WiredPic = Wired<PicPair, ISA_LINES>;
type WiredIoApic = Wired<IoApic, { IoApic::PINS as usize }>;

impl WiredIoApic {
    fn drive(&mut self, pin: u8, asserted: bool) {
        let any = self.count(pin, asserted);
        self.chip.set_pin(pin, any != (pin >= FIRST_PCI_PIN));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The interrupt controllers outside the processors. Any thread may use them.
pub struct IrqChip {
    pic: Mutex<WiredPic>,
    ioapic: Arc<Mutex<WiredIoApic>>,
    /// Lines that fall at the end of their interrupt.
    resampled: RwLock<Vec<Resampled>>,
}

/// A line that falls at the end of its interrupt, and who is told.
struct Resampled {
    gsi: u8,
    line: Weak<Source>,
    ended: Arc<dyn Signal>,
}

/// Saved state of an [`IrqChip`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IrqChipState {
    pic: PicPairState,
    ioapic: IoApicState,
}

impl IrqChip {
    /// `msi` takes the IOAPIC's messages; `intr` is driven by the 8259 pair's INTR output
    /// ([`crate::LocalApics::lint0`]), which also leads to IOAPIC pin 0 (MultiProcessor Specification 1.4 §5.3).
    pub fn new(msi: Arc<dyn MsiSender>, intr: Irq) -> Arc<Self> {
        let mut ioapic = IoApic::new(msi);
        (FIRST_PCI_PIN..IoApic::PINS).for_each(|pin| ioapic.set_pin(pin, true));
        let ioapic = Arc::new(Wired::new(ioapic));
        let intr = Arc::new(Intr { lint0: intr, ioapic: ioapic.clone() });
        Arc::new(Self { pic: Wired::new(PicPair::new(intr)), ioapic, resampled: RwLock::default() })
    }

    /// A new source on ISA interrupt `irq` (0-15), wired to the 8259 pair and to the IOAPIC, where it is GSI `irq`
    /// but for IRQ 0, which is GSI 2. High means asserted. Sources of one line are OR-ed; a source that is dropped
    /// lets go of the line.
    pub fn isa_line(self: &Arc<Self>, irq: u8) -> Irq {
        let gsi = match irq {
            0 => Some(2),
            // The cascade is no input.
            2 => None,
            irq => (irq < ISA_LINES as u8).then_some(irq),
        };
        self.source(gsi.and(Some(irq)), gsi)
    }

    /// A new source on IOAPIC pin `gsi` (0-23) alone. High means asserted; pins 16 to 23 are wired active low, as
    /// PCI interrupts are: the guest programs them level-triggered, low.
    pub fn gsi_line(self: &Arc<Self>, gsi: u8) -> Irq {
        self.source(None, (gsi < IoApic::PINS).then_some(gsi))
    }

    /// As [`IrqChip::gsi_line`], and the line falls by itself when the guest ends the interrupt of this input; then `ended`
    /// is signalled, and who still has something to say raises the line again. For sources that cannot tell when they are
    /// served.
    pub fn resampled_line(self: &Arc<Self>, gsi: u8, ended: Arc<dyn Signal>) -> Irq {
        let line = self.source(None, (gsi < IoApic::PINS).then_some(gsi));
        let mut resampled = self.resampled.write().unwrap_or_else(PoisonError::into_inner);
        resampled.retain(|other| other.line.strong_count() != 0);
        resampled.push(Resampled { gsi, line: Arc::downgrade(&line), ended });
        line
    }

    fn source(self: &Arc<Self>, pic: Option<u8>, gsi: Option<u8>) -> Arc<Source> {
        Arc::new(Source { chip: self.clone(), pic, gsi, asserted: AtomicBool::new(false) })
    }

    /// The registers of the 8259 pair.
    pub fn pic_window(self: &Arc<Self>) -> PicWindow {
        PicWindow { chip: self.clone() }
    }

    /// The registers of the IOAPIC.
    pub fn ioapic_window(self: &Arc<Self>) -> IoApicWindow {
        IoApicWindow { chip: self.clone() }
    }

    /// Both controllers back to their reset state. Lines keep their level.
    pub fn reset(&self, now: u64) {
        lock(&self.pic).chip.reset(now);
        lock(&self.ioapic).chip.reset(now);
    }

    /// The state at `now`.
    pub fn save(&self, now: u64) -> IrqChipState {
        IrqChipState { pic: lock(&self.pic).chip.save(now), ioapic: lock(&self.ioapic).chip.save(now) }
    }

    /// Takes on `state`. Devices must have driven their lines to match before.
    pub fn restore(&self, state: &IrqChipState, now: u64) -> Result<(), RestoreError> {
        lock(&self.pic).chip.restore(&state.pic, now)?;
        lock(&self.ioapic).chip.restore(&state.ioapic, now)
    }
}

impl ExternalController for IrqChip {
    fn acknowledge(&self) -> u8 {
        lock(&self.pic).chip.acknowledge()
    }

    fn end_of_interrupt(&self, vector: u8) {
        let pins = lock(&self.ioapic).chip.in_service(vector);
        let resampled = self.resampled.read().unwrap_or_else(PoisonError::into_inner);
        let ended = || resampled.iter().filter(|other| pins >> other.gsi & 1 != 0);
        // Down before the input is looked at again, and told after that: who raises it again raises a new interrupt.
        ended().filter_map(|other| other.line.upgrade()).for_each(|line| line.set(false));
        lock(&self.ioapic).chip.end_of_interrupt(vector);
        ended().for_each(|other| other.ended.signal());
    }
}

/// The INTR wire: to the processors and to IOAPIC pin 0.
struct Intr {
    lint0: Irq,
    ioapic: Arc<Mutex<WiredIoApic>>,
}

impl IrqLine for Intr {
    fn set(&self, high: bool) {
        self.lint0.set(high);
        lock(&self.ioapic).drive(0, high);
    }
}

/// One source on a wire that may have several.
struct Source {
    chip: Arc<IrqChip>,
    pic: Option<u8>,
    gsi: Option<u8>,
    asserted: AtomicBool,
}

impl IrqLine for Source {
    fn set(&self, high: bool) {
        if self.asserted.swap(high, Ordering::AcqRel) == high {
            return;
        }
        if let Some(irq) = self.pic {
            let mut pic = lock(&self.chip.pic);
            let any = pic.count(irq, high);
            pic.chip.set_line(irq, any);
        }
        if let Some(gsi) = self.gsi {
            lock(&self.chip.ioapic).drive(gsi, high);
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// The 8259 pair's ports (0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1) as a bus device.
pub struct PicWindow {
    chip: Arc<IrqChip>,
}

/// The IOAPIC's page (0xfec00000) as a bus device.
pub struct IoApicWindow {
    chip: Arc<IrqChip>,
}

impl PicWindow {
    /// The 8259's end of interrupt concerns nobody else.
    fn ends_interrupt(&self, _offset: u64) -> bool {
        false
    }
}

impl IoApicWindow {
    /// A write to the EOI register is an end of interrupt as one that a local APIC tells.
    fn ends_interrupt(&self, offset: u64) -> bool {
        offset == IoApic::EOI
    }
}

macro_rules! forward_device {
    ($window:ty, $part:ident) => {
        impl Device for $window {
            fn name(&self) -> &'static str {
                lock(&self.chip.$part).chip.name()
            }
            fn windows(&self) -> Vec<Window> {
                lock(&self.chip.$part).chip.windows()
            }
            fn access(&self) -> Access {
                lock(&self.chip.$part).chip.access()
            }
            fn read_register(&mut self, offset: u64, width: u8, now: u64) -> u64 {
                lock(&self.chip.$part).chip.read_register(offset, width, now)
            }
            fn write_register(&mut self, offset: u64, width: u8, value: u64, now: u64) -> Effect {
                lock(&self.chip.$part).chip.write_register(offset, width, value, now)
            }
            fn reset(&mut self, now: u64) {
                lock(&self.chip.$part).chip.reset(now);
            }
            // One lock for an access instead of one for each question about it.
            fn read(&mut self, offset: u64, width: u8, now: u64) -> u64 {
                lock(&self.chip.$part).chip.read(offset, width, now)
            }
            fn write(&mut self, offset: u64, width: u8, value: u64, now: u64) -> Effect {
                if self.ends_interrupt(offset) {
                    self.chip.end_of_interrupt(value as u8);
                    return Effect::None;
                }
                lock(&self.chip.$part).chip.write(offset, width, value, now)
            }
        }
    };
}

forward_device!(PicWindow, pic);
forward_device!(IoApicWindow, ioapic);

#[cfg(test)]
mod tests {
    use skep_hv::irq::MsiMessage;

    use super::*;
    use crate::testing::{Line, Messages};

    fn chip() -> (Arc<IrqChip>, Arc<Messages>, Arc<Line>) {
        let (messages, intr) = (Arc::new(Messages::default()), Arc::new(Line::default()));
        (IrqChip::new(messages.clone(), intr.clone()), messages, intr)
    }

    fn program(chip: &Arc<IrqChip>, pin: u64, low: u64) {
        let mut window = chip.ioapic_window();
        let _ = window.write(0, 4, 0x10 + 2 * pin, 0);
        let _ = window.write(0x10, 4, low, 0);
    }

    #[test]
    fn isa_interrupts_reach_both_controllers() {
        let (chip, messages, intr) = chip();
        program(&chip, 2, 0x50);
        let timer = chip.isa_line(0);
        timer.set(true);
        assert_eq!(messages.take(), [MsiMessage { address: 0xfee0_0000, data: 0x50 }]);
        assert!(intr.high());
        assert_eq!(chip.acknowledge(), 0);
        assert!(!intr.high());
    }

    #[test]
    fn shared_lines_are_or_ed() {
        let (chip, messages, _) = chip();
        program(&chip, 17, 1 << 15 | 1 << 13 | 0x61);
        assert_eq!(messages.take(), [], "idle PCI lines are high");
        let (a, b) = (chip.gsi_line(17), chip.gsi_line(17));
        a.set(true);
        b.set(true);
        assert_eq!(messages.take().len(), 1);
        a.set(false);
        chip.end_of_interrupt(0x61);
        assert_eq!(messages.take().len(), 1, "b still asserts it");
        drop(b);
        chip.end_of_interrupt(0x61);
        assert_eq!(messages.take(), []);
    }

    #[test]
    fn intr_reaches_pin_zero() {
        let (chip, messages, _) = chip();
        program(&chip, 0, 7 << 8);
        chip.isa_line(3).pulse();
        assert_eq!(messages.take(), [MsiMessage { address: 0xfee0_0000, data: 0x700 }]);
    }

    #[test]
    fn lines_that_do_not_exist_lead_nowhere() {
        let (chip, messages, intr) = chip();
        for irq in [2, 16, 255] {
            chip.isa_line(irq).set(true);
        }
        chip.gsi_line(24).set(true);
        assert_eq!(messages.take(), []);
        assert!(!intr.high());
    }
}
