//! What devices are given when they are built: interrupts, doorbells and memory, whatever runs the processors.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use skep_chipset::{IrqChip, Space};
use skep_hv::irq::{Doorbell, IoAddress, Irq, MessageLine, Signal};
use skep_hv::{HvError, Vm};
use skep_memory::GuestMemory;

use crate::apics::Apics;

/// The capabilities of a machine that devices build on.
pub struct Harness {
    pub(crate) chip: Arc<IrqChip>,
    pub(crate) apics: Arc<Apics>,
    pub(crate) doorbells: Arc<Doorbells>,
    pub(crate) memory: GuestMemory,
}

impl Harness {
    /// A source on IOAPIC input `gsi` (0 to 23). High means asserted; inputs 16 to 23 are wired active low. For edges,
    /// [`skep_hv::irq::IrqLine::pulse`].
    pub fn line(&self, gsi: u8) -> Irq {
        self.chip.gsi_line(gsi)
    }

    /// The same for a level-triggered interrupt whose source cannot tell when it is served: the line falls by itself when
    /// the guest ends the interrupt, and `ended` is signalled. Who still has something to say raises it again.
    pub fn resampled_line(&self, gsi: u8, ended: Arc<dyn Signal>) -> Irq {
        self.chip.resampled_line(gsi, ended)
    }

    /// A source of message-signalled interrupts.
    ///
    /// # Errors
    /// The host cannot give another one.
    pub fn message_line(&self) -> Result<Arc<dyn MessageLine>, HvError> {
        self.apics.message_line()
    }

    /// Has `event` signalled when the guest writes `doorbell`, by the shortest way there is: in the host's kernel, if the
    /// processors run there and the event is an eventfd. The device's own write handler is not called for such a write.
    /// Dropping the handle takes it back.
    ///
    /// # Errors
    /// The doorbell makes no sense, is attached already, or the host refuses it.
    pub fn doorbell(&self, doorbell: Doorbell, event: Arc<dyn Signal>) -> Result<DoorbellHandle, HvError> {
        self.doorbells.attach(doorbell, event)
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}

/// A doorbell that is attached.
pub struct DoorbellHandle {
    doorbells: Arc<Doorbells>,
    doorbell: Doorbell,
    event: Arc<dyn Signal>,
    in_kernel: bool,
}

impl Drop for DoorbellHandle {
    fn drop(&mut self) {
        if let Some(vm) = self.doorbells.vm.as_ref().filter(|_| self.in_kernel) {
            vm.detach_doorbell(self.doorbell, &self.event);
        }
        self.doorbells.remove(&self.doorbell);
    }
}

type Attached = Vec<(Doorbell, Arc<dyn Signal>)>;

/// The doorbells of a machine, for writes that reach this process.
pub(crate) struct Doorbells {
    /// Who may have a shorter way.
    vm: Option<Arc<dyn Vm>>,
    /// How many there are, so that machines without any do not look.
    count: AtomicUsize,
    attached: RwLock<HashMap<IoAddress, Attached>>,
}

impl Doorbells {
    pub(crate) fn new(vm: Option<Arc<dyn Vm>>) -> Arc<Self> {
        Arc::new(Self { vm, count: AtomicUsize::new(0), attached: RwLock::default() })
    }

    fn attach(
        self: &Arc<Self>,
        doorbell: Doorbell,
        event: Arc<dyn Signal>,
    ) -> Result<DoorbellHandle, HvError> {
        if !matches!(doorbell.width, 0 | 1 | 2 | 4 | 8) || doorbell.width == 0 && doorbell.value.is_some() {
            return Err(HvError::Invalid(format!(
                "{doorbell:x?}: a doorbell's value needs a width of 1, 2, 4 or 8"
            )));
        }
        {
            let mut attached = self.attached.write().unwrap_or_else(PoisonError::into_inner);
            let here = attached.entry(doorbell.address).or_default();
            if here.iter().any(|(other, _)| *other == doorbell) {
                return Err(HvError::Invalid(format!("{doorbell:x?} is attached already")));
            }
            here.push((doorbell, event.clone()));
            self.count.fetch_add(1, Ordering::Release);
        }
        let in_kernel = self.vm.as_ref().map_or(Ok(false), |vm| vm.attach_doorbell(doorbell, &event));
        let in_kernel = in_kernel.inspect_err(|_| self.remove(&doorbell))?;
        Ok(DoorbellHandle { doorbells: self.clone(), doorbell, event, in_kernel })
    }

    fn remove(&self, doorbell: &Doorbell) {
        let mut attached = self.attached.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(here) = attached.get_mut(&doorbell.address) {
            here.retain(|(other, _)| other != doorbell);
            if here.is_empty() {
                attached.remove(&doorbell.address);
            }
            self.count.fetch_sub(1, Ordering::Release);
        }
    }

    /// Signals the doorbells that a write rings; whether there was one.
    pub(crate) fn ring(&self, space: Space, address: u64, width: u8, value: u64) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let address = match space {
            Space::Port => IoAddress::Port(address as u16),
            Space::Memory => IoAddress::Memory(address),
        };
        let attached = self.attached.read().unwrap_or_else(PoisonError::into_inner);
        let rung = attached.get(&address).into_iter().flatten().filter(|(doorbell, _)| {
            (doorbell.width == 0 || doorbell.width == width)
                && doorbell.value.is_none_or(|wanted| wanted == value)
        });
        rung.map(|(_, event)| event.signal()).count() != 0
    }
}
