//! The 8259 pair and the IOAPIC behind one handle, and the lines that lead to them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use skep_hv::irq::{Irq, MsiSender, NoIrq};

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use crate::ioapic::{IoApic, IoApicState};
use crate::lapic::ExternalController;
use crate::pic::{PicPair, PicPairState};

/// The interrupt controllers outside the processors.
pub struct IrqChip {
    pic: Mutex<PicPair>,
    ioapic: Mutex<IoApic>,
}

/// Saved state of an [`IrqChip`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IrqChipState {
    pic: PicPairState,
    ioapic: IoApicState,
}

impl IrqChip {
    /// `msi` takes the IOAPIC's messages; `intr` is driven by the 8259 pair's INTR output
    /// ([`crate::LocalApics::lint0`]).
    pub fn new(msi: Arc<dyn MsiSender>, intr: Irq) -> Arc<Self> {
        Arc::new(Self { pic: Mutex::new(PicPair::new(intr)), ioapic: Mutex::new(IoApic::new(msi)) })
    }

    /// A new source on ISA interrupt `irq` (0-15), wired to the 8259 pair and to the IOAPIC, where it is GSI `irq`
    /// but for IRQ 0, which is GSI 2. High means asserted. Sources of one line are OR-ed; a source that is dropped
    /// lets go of the line.
    pub fn isa_line(self: &Arc<Self>, _irq: u8) -> Irq {
        Arc::new(NoIrq)
    }

    /// A new source on IOAPIC pin `gsi` (0-23) alone. High means asserted; pins 16 to 23 are wired active low, as
    /// PCI interrupts are: the guest programs them level-triggered, low.
    pub fn gsi_line(self: &Arc<Self>, _gsi: u8) -> Irq {
        Arc::new(NoIrq)
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
        self.pic().reset(now);
        self.ioapic().reset(now);
    }

    /// The state at `now`.
    pub fn save(&self, now: u64) -> IrqChipState {
        IrqChipState { pic: self.pic().save(now), ioapic: self.ioapic().save(now) }
    }

    /// Takes on `state`.
    pub fn restore(&self, state: &IrqChipState, now: u64) -> Result<(), RestoreError> {
        self.pic().restore(&state.pic, now)?;
        self.ioapic().restore(&state.ioapic, now)
    }

    fn pic(&self) -> MutexGuard<'_, PicPair> {
        self.pic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ioapic(&self) -> MutexGuard<'_, IoApic> {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ExternalController for IrqChip {
    fn acknowledge(&self) -> u8 {
        self.pic().acknowledge()
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic().end_of_interrupt(vector);
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

macro_rules! forward_device {
    ($window:ty, $part:ident) => {
        impl Device for $window {
            fn name(&self) -> &'static str {
                self.chip.$part().name()
            }
            fn windows(&self) -> Vec<Window> {
                self.chip.$part().windows()
            }
            fn access(&self) -> Access {
                self.chip.$part().access()
            }
            fn read_register(&mut self, offset: u64, width: u8, now: u64) -> u64 {
                self.chip.$part().read_register(offset, width, now)
            }
            fn write_register(&mut self, offset: u64, width: u8, value: u64, now: u64) -> Effect {
                self.chip.$part().write_register(offset, width, value, now)
            }
            fn reset(&mut self, now: u64) {
                self.chip.$part().reset(now);
            }
        }
    };
}

forward_device!(PicWindow, pic);
forward_device!(IoApicWindow, ioapic);
