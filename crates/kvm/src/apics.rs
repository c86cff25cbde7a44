//! The way to the local APICs in the kernel: messages, the routes of interrupt inputs, and lines with an eventfd.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use skep_hv::HvError;
use skep_hv::irq::{BackEndApics, EFD_CLOEXEC, EFD_NONBLOCK, EventFd, MessageLine, MsiMessage, MsiSender};

use crate::error::Tried;

/// Inputs of the IOAPIC. They have the first interrupt numbers (GSI); message lines have those above.
pub(crate) const PINS: u32 = 24;
/// Most interrupt numbers of a VM (KVM_MAX_IRQ_ROUTES).
const MOST: u32 = 4096;

/// The local APICs of one VM. Clones are the same ones.
#[derive(Clone)]
pub(crate) struct Apics {
    vm: Arc<VmFd>,
    routes: Arc<Mutex<Routes>>,
}

/// Which message every interrupt number stands for. Message lines in use have an entry, `None` until they have a message.
#[derive(Default)]
struct Routes {
    pins: [Option<MsiMessage>; PINS as usize],
    lines: BTreeMap<u32, Option<MsiMessage>>,
}

impl Routes {
    /// Tells the kernel.
    fn commit(&self, vm: &VmFd) -> Result<(), HvError> {
        let pins = (0..).zip(&self.pins).filter_map(|(gsi, message)| Some((gsi, (*message)?)));
        let lines = self.lines.iter().filter_map(|(&gsi, message)| Some((gsi, (*message)?)));
        let entries: Vec<_> = pins.chain(lines).map(|(gsi, message)| entry(gsi, message)).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| HvError::Invalid(format!("{} interrupt routes are too many", entries.len())))?;
        vm.set_gsi_routing(&table).tried("KVM_SET_GSI_ROUTING")
    }
}

fn entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
}

impl Apics {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, routes: Arc::default() }
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the routes of the IOAPIC's inputs.
    pub(crate) fn reset(&self) {
        let mut routes = self.routes();
        routes.pins = Default::default();
        // As when a pin is set: there is nobody to tell.
        let _ = routes.commit(&self.vm);
    }
}

impl MsiSender for Apics {
    fn send(&self, message: MsiMessage) {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // A message that no processor takes is lost, as on the bus.
        let _ = self.vm.signal_msi(msi);
    }

    fn announce_pin(&self, pin: u8, message: Option<MsiMessage>) {
        let mut routes = self.routes();
        let Some(place) = routes.pins.get_mut(usize::from(pin)) else { return };
        if *place != message {
            *place = message;
            // Fails only for lack of kernel memory. Then the end of this input's interrupts is not told, and the guest finds
            // a device that does not interrupt again, as it would with hardware that fails.
            let _ = routes.commit(&self.vm);
        }
    }
}

impl BackEndApics for Apics {
    fn message_line(&self) -> Result<Arc<dyn MessageLine>, HvError> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(|source| HvError::Os { what: "eventfd", source })?;
        let mut routes = self.routes();
        let free = (PINS..MOST).find(|gsi| !routes.lines.contains_key(gsi));
        let gsi = free.ok_or_else(|| {
            HvError::Unsupported(format!("a VM has at most {} message-signalled interrupts", MOST - PINS))
        })?;
        routes.lines.insert(gsi, None);
        drop(routes);
        Ok(Arc::new(Line { apics: self.clone(), gsi, event, attached: Mutex::new(false) }))
    }
}

/// An interrupt number, and the eventfd that raises it.
struct Line {
    apics: Apics,
    gsi: u32,
    event: EventFd,
    attached: Mutex<bool>,
}

impl Line {
    fn attach(&self, on: bool) -> Result<(), HvError> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        match (*attached, on) {
            (false, true) => self.apics.vm.register_irqfd(&self.event, self.gsi).tried("KVM_IRQFD")?,
            (true, false) => self.apics.vm.unregister_irqfd(&self.event, self.gsi).tried("KVM_IRQFD")?,
            _ => {}
        }
        *attached = on;
        Ok(())
    }

    fn route(&self, message: Option<MsiMessage>) -> Result<(), HvError> {
        let mut routes = self.apics.routes();
        if routes.lines.get(&self.gsi) == Some(&message) {
            return Ok(());
        }
        routes.lines.insert(self.gsi, message);
        routes.commit(&self.apics.vm)
    }
}

impl MessageLine for Line {
    fn set_message(&self, message: Option<MsiMessage>) -> Result<(), HvError> {
        // What is signalled while there is no message stays counted in the eventfd and is sent when there is one.
        if message.is_none() {
            self.attach(false)?;
        }
        self.route(message)?;
        self.attach(message.is_some())
    }

    fn signal(&self) {
        // Fails only when 2^64 - 2 signals wait already.
        let _ = self.event.write(1);
    }

    fn event_fd(&self) -> Option<&EventFd> {
        Some(&self.event)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // Nothing depends on it any more, whether the kernel takes it back now or with the VM.
        let _ = self.attach(false);
        let mut routes = self.apics.routes();
        if routes.lines.remove(&self.gsi).flatten().is_some() {
            let _ = routes.commit(&self.apics.vm);
        }
    }
}
