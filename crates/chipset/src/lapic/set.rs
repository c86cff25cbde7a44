//! The set of local APICs of a machine.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};

use serde::{Deserialize, Serialize};
use skep_hv::irq::{Irq, IrqLine, MsiMessage, MsiSender};
use skep_hv::{Kick, Pending, Startup};

use super::apic::{Acknowledged, Action, LocalApic, LocalApicState, base};
use super::message::{Delivery, DeliveryMode, Destination, Ipi, Route, Shorthand, decode_msi};
use super::{ExternalController, LinearTsc, TscClock};
use crate::device::RestoreError;

/// How the local APICs are made.
#[derive(Clone)]
pub struct ApicConfig {
    /// Number of vCPUs; APIC IDs are 0 to `vcpus - 1`. 1 to 255.
    pub vcpus: u32,
    /// x2APIC mode may be entered (must agree with CPUID.1:ECX\[21\]).
    pub x2apic: bool,
    /// Physical-address width (CPUID.80000008H:EAX\[7:0\]): IA32_APIC_BASE refuses bits above.
    pub physical_bits: u8,
    /// The guest's TSC, for the TSC-deadline timer.
    pub tsc: Arc<dyn TscClock>,
}

impl Default for ApicConfig {
    /// One vCPU, x2APIC, 46 physical-address bits, a TSC of 1 GHz.
    fn default() -> Self {
        Self { vcpus: 1, x2apic: true, physical_bits: 46, tsc: Arc::new(LinearTsc::new(1_000_000_000)) }
    }
}

/// Saved state of all local APICs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LocalApicsState {
    apics: Vec<LocalApicState>,
}

/// One APIC and what can be seen of it without its lock.
struct Slot {
    apic: Mutex<LocalApic>,
    /// [`Route`], packed.
    route: AtomicU64,
    /// IA32_APIC_BASE.
    base: AtomicU64,
    /// What waits, as bits of [`waiting`].
    waiting: AtomicU32,
    /// [`Pending::next_ns`].
    next: AtomicU64,
    kick: RwLock<Option<Arc<dyn Kick>>>,
}

/// Bits of [`Slot::waiting`].
mod waiting {
    pub(super) const STARTUP: u32 = 1;
    pub(super) const NMI: u32 = 2;
    pub(super) const MASKABLE: u32 = 4;

    pub(super) fn bits(pending: skep_hv::Pending) -> u32 {
        let bit = |waits, bit| if waits { bit } else { 0 };
        bit(pending.startup, STARTUP) | bit(pending.nmi, NMI) | bit(pending.maskable, MASKABLE)
    }
}

impl Slot {
    fn new(apic: LocalApic) -> Self {
        let slot = Self {
            apic: Mutex::new(apic),
            route: AtomicU64::new(0),
            base: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            next: AtomicU64::new(u64::MAX),
            kick: RwLock::new(None),
        };
        slot.change(|_| ());
        slot
    }

    fn lock(&self) -> MutexGuard<'_, LocalApic> {
        self.apic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the APIC and publishes what can be seen without the lock. Also says whether the vCPU has reason to
    /// look again: something waits that did not before, or the timer is due earlier.
    fn update<R>(&self, change: impl FnOnce(&mut LocalApic) -> R) -> (R, bool) {
        let mut apic = self.lock();
        let result = change(&mut apic);
        let pending = apic.pending();
        let bits = waiting::bits(pending);
        self.route.store(apic.route().pack(), Ordering::Release);
        self.base.store(apic.base(), Ordering::Release);
        // Only the holder of the lock writes these.
        let before = self.waiting.load(Ordering::Relaxed);
        let next = self.next.load(Ordering::Relaxed);
        self.waiting.store(bits, Ordering::Release);
        self.next.store(pending.next_ns, Ordering::Release);
        (result, bits & !before != 0 || pending.next_ns < next)
    }

    /// Changes the APIC and wakes the vCPU if it has reason to look again.
    fn change<R>(&self, change: impl FnOnce(&mut LocalApic) -> R) -> R {
        let (result, wake) = self.update(change);
        if wake {
            self.wake();
        }
        result
    }

    fn wake(&self) {
        if let Some(kick) = &*self.kick.read().unwrap_or_else(PoisonError::into_inner) {
            kick.wake();
        }
    }

    fn pending(&self, now: u64) -> Pending {
        if self.next.load(Ordering::Acquire) <= now {
            // The vCPU itself asks: it need not be woken for what it is about to hear.
            self.update(|apic| apic.advance(now));
        }
        let bits = self.waiting.load(Ordering::Acquire);
        Pending {
            startup: bits & waiting::STARTUP != 0,
            nmi: bits & waiting::NMI != 0,
            maskable: bits & waiting::MASKABLE != 0,
            next_ns: self.next.load(Ordering::Acquire),
        }
    }

    fn route(&self) -> Route {
        Route::unpack(self.route.load(Ordering::Acquire))
    }
}

/// The local APICs of a machine. Every method may be called from any thread; those that take `vcpu` and stand for
/// an act of that processor are meant for its own thread. A `vcpu` that does not exist does nothing.
pub struct LocalApics {
    slots: Vec<Slot>,
    controller: OnceLock<Weak<dyn ExternalController>>,
    /// Where the search for a lowest-priority target starts, so that equals take turns.
    turn: AtomicU32,
}

impl LocalApics {
    /// APICs in their power-on state. The bootstrap processor is vCPU 0; its LINT0 passes 8259 interrupts through,
    /// as firmware leaves it (virtual-wire mode, MultiProcessor Specification 1.4 §3.6.2.2).
    pub fn new(config: ApicConfig) -> Arc<Self> {
        let slot =
            |id| Slot::new(LocalApic::new(id, config.x2apic, config.physical_bits, config.tsc.clone()));
        let slots = (0..config.vcpus.clamp(1, 255)).map(slot).collect();
        Arc::new(Self { slots, controller: OnceLock::new(), turn: AtomicU32::new(0) })
    }

    /// Says how to wake `vcpu` when something becomes pending for it. The latest call holds.
    pub fn attach_cpu(&self, vcpu: u32, kick: Arc<dyn Kick>) {
        if let Some(slot) = self.slot(vcpu) {
            *slot.kick.write().unwrap_or_else(PoisonError::into_inner) = Some(kick);
        }
    }

    /// Says who gives external interrupts and hears of the end of level-triggered ones. The first call holds.
    pub fn attach_controller(&self, controller: Weak<dyn ExternalController>) {
        let _ = self.controller.set(controller);
    }

    /// The wire to every LINT0 pin: the 8259 pair's INTR.
    pub fn lint0(self: &Arc<Self>) -> Irq {
        Arc::new(LintLine { apics: self.clone(), pin: 0 })
    }

    /// The wire to every LINT1 pin: NMI.
    pub fn lint1(self: &Arc<Self>) -> Irq {
        Arc::new(LintLine { apics: self.clone(), pin: 1 })
    }

    /// Number of APICs.
    pub fn count(&self) -> u32 {
        self.slots.len() as u32
    }

    fn slot(&self, vcpu: u32) -> Option<&Slot> {
        self.slots.get(vcpu as usize)
    }

    /// What waits for `vcpu` (`VcpuIo::interrupts`). Also looks at its timer. Takes no lock unless that is due.
    pub fn pending(&self, vcpu: u32, now: u64) -> Pending {
        let nothing = Pending { next_ns: u64::MAX, ..Pending::default() };
        self.slot(vcpu).map_or(nothing, |slot| slot.pending(now))
    }

    /// INTA: `vcpu` takes the interrupt that [`pending`](Self::pending) announced; `None` if it has gone.
    pub fn acknowledge(&self, vcpu: u32, now: u64) -> Option<u8> {
        let acknowledged = self.slot(vcpu)?.change(|apic| {
            apic.advance(now);
            apic.acknowledge()
        });
        match acknowledged {
            Acknowledged::Nothing => None,
            Acknowledged::Vector(vector) => Some(vector),
            Acknowledged::External => Some(self.controller.get()?.upgrade()?.acknowledge()),
        }
    }

    /// `vcpu` takes its NMI.
    pub fn acknowledge_nmi(&self, vcpu: u32) {
        if let Some(slot) = self.slot(vcpu) {
            slot.change(LocalApic::acknowledge_nmi);
        }
    }

    /// `vcpu` acts on INIT (which resets its APIC) or a start-up IPI. Start-up IPIs that the processor does not wait
    /// for never get here.
    pub fn acknowledge_startup(&self, vcpu: u32) -> Option<Startup> {
        self.slot(vcpu)?.change(LocalApic::acknowledge_startup)
    }

    /// CR8 of `vcpu`: the priority class, TPR\[7:4\].
    pub fn cr8(&self, vcpu: u32) -> u8 {
        self.slot(vcpu).map_or(0, |slot| slot.lock().cr8())
    }

    /// Writes CR8.
    pub fn set_cr8(&self, vcpu: u32, value: u8) {
        if let Some(slot) = self.slot(vcpu) {
            slot.change(|apic| apic.set_cr8(value));
        }
    }

    /// IA32_APIC_BASE of `vcpu`. Takes no lock.
    pub fn apic_base(&self, vcpu: u32) -> u64 {
        self.slot(vcpu).map_or(0, |slot| slot.base.load(Ordering::Acquire))
    }

    /// The offset into `vcpu`'s register page, if `gpa` lies in it and the APIC is in xAPIC mode. Takes no lock.
    pub fn mmio_offset(&self, vcpu: u32, gpa: u64) -> Option<u64> {
        let apic_base = self.apic_base(vcpu);
        let in_page = gpa & !0xfff == apic_base & !0xfff;
        (in_page && apic_base & (base::ENABLE | base::X2APIC) == base::ENABLE).then_some(gpa & 0xfff)
    }

    /// A read of `vcpu`'s register page.
    pub fn mmio_read(&self, vcpu: u32, offset: u64, width: u8, now: u64) -> u64 {
        self.slot(vcpu).map_or(0, |slot| slot.change(|apic| apic.read_page(offset, width, now)))
    }

    /// A write to `vcpu`'s register page.
    pub fn mmio_write(&self, vcpu: u32, offset: u64, width: u8, value: u64, now: u64) {
        if let Some(slot) = self.slot(vcpu) {
            let action = slot.change(|apic| apic.write_page(offset, width, value, now));
            self.perform(vcpu, action);
        }
    }

    /// RDMSR of IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0), 0x800-0x8ff. `None`: #GP(0).
    pub fn msr_read(&self, vcpu: u32, msr: u32, now: u64) -> Option<u64> {
        self.slot(vcpu)?.change(|apic| apic.read_msr(msr, now))
    }

    /// WRMSR of the same. `None`: #GP(0).
    pub fn msr_write(&self, vcpu: u32, msr: u32, value: u64, now: u64) -> Option<()> {
        let action = self.slot(vcpu)?.change(|apic| apic.write_msr(msr, value, now))?;
        self.perform(vcpu, action);
        Some(())
    }

    /// Sends `icr` (low half: vector and delivery mode fixed, lowest-priority or NMI; its destination is ignored) to
    /// the APIC IDs in `targets`. Other modes do nothing.
    pub fn send_ipis(&self, icr: u64, targets: &mut dyn Iterator<Item = u32>) {
        let mode = DeliveryMode::from_bits(icr as u32 >> 8);
        if matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority | DeliveryMode::Nmi) {
            let delivery = Delivery { mode, vector: icr as u8, level: false };
            // No list of distinct targets is longer than this.
            targets.take(self.slots.len()).for_each(|id| self.deliver_to(id, delivery));
        }
    }

    /// Makes an NMI pending at `vcpu`.
    pub fn inject_nmi(&self, vcpu: u32) {
        self.deliver_to(vcpu, Delivery { mode: DeliveryMode::Nmi, vector: 2, level: false });
    }

    /// The guest's TSC of `vcpu` has been set: an armed deadline moves.
    pub fn tsc_changed(&self, vcpu: u32) {
        if let Some(slot) = self.slot(vcpu) {
            slot.change(LocalApic::tsc_changed);
        }
    }

    /// Whether the interrupt in service at `vcpu` may end without an EOI write (paravirtual EOI): it is
    /// edge-triggered, and nothing waits behind it. The offer must be withdrawn when something becomes pending.
    pub fn can_skip_eoi(&self, vcpu: u32) -> bool {
        self.slot(vcpu).is_some_and(|slot| slot.lock().can_skip_eoi())
    }

    /// The guest has ended the interrupt by the paravirtual flag: does what an EOI write would have done.
    pub fn end_skipped(&self, vcpu: u32) {
        if let Some(slot) = self.slot(vcpu) {
            let action = slot.change(LocalApic::end_of_interrupt);
            self.perform(vcpu, action);
        }
    }

    /// Every APIC back to power-on state. Lines keep their level.
    pub fn reset(&self) {
        self.slots.iter().for_each(|slot| slot.change(LocalApic::reset));
    }

    /// The state at `now`.
    pub fn save(&self, now: u64) -> LocalApicsState {
        LocalApicsState { apics: self.slots.iter().map(|slot| slot.lock().save(now)).collect() }
    }

    /// Takes on `state`; fails if the number of APICs differs, or an APIC cannot be in its state. Wakes every vCPU.
    pub fn restore(&self, state: &LocalApicsState, now: u64) -> Result<(), RestoreError> {
        if state.apics.len() != self.slots.len() {
            return Err(RestoreError { device: "local APIC", what: "the number of processors differs" });
        }
        for (slot, saved) in self.slots.iter().zip(&state.apics) {
            slot.lock().check(saved)?;
        }
        for (slot, saved) in self.slots.iter().zip(&state.apics) {
            slot.change(|apic| apic.restore(saved, now))?;
            slot.wake();
        }
        Ok(())
    }

    fn perform(&self, sender: u32, action: Action) {
        match action {
            Action::None => {}
            Action::Ipi(ipi) => self.send_ipi(sender, ipi),
            Action::Eoi(vector) => {
                if let Some(controller) = self.controller.get().and_then(Weak::upgrade) {
                    controller.end_of_interrupt(vector);
                }
            }
        }
    }

    fn send_ipi(&self, sender: u32, ipi: Ipi) {
        match ipi.shorthand {
            Shorthand::None => self.deliver(ipi.delivery, ipi.destination),
            Shorthand::Itself => self.deliver_to(sender, ipi.delivery),
            Shorthand::All => self.deliver(ipi.delivery, Destination::All),
            Shorthand::Others => {
                let others = (0..self.count()).filter(|&id| id != sender);
                self.deliver_among(ipi.delivery, others);
            }
        }
    }

    fn deliver(&self, delivery: Delivery, destination: Destination) {
        match destination {
            Destination::Physical(id) => self.deliver_to(id, delivery),
            Destination::All => self.deliver_among(delivery, 0..self.count()),
            Destination::Logical(id) => {
                let matching =
                    self.slots.iter().zip(0..).filter(|(slot, _)| slot.route().matches_logical(id));
                self.deliver_among(delivery, matching.map(|(_, id)| id));
            }
        }
    }

    fn deliver_among(&self, delivery: Delivery, targets: impl Iterator<Item = u32>) {
        if delivery.mode != DeliveryMode::LowestPriority {
            return targets.for_each(|id| self.deliver_to(id, delivery));
        }
        // The lowest arbitration priority wins (§11.6.2.4); among equals, the next one after the last winner.
        let turn = self.turn.load(Ordering::Relaxed);
        let rank = |id: u32| {
            let slot = self.slot(id).filter(|slot| slot.route().enabled)?;
            let distance = (id + self.count() - turn % self.count()) % self.count();
            Some((slot.lock().arbitration_priority() >> 4, distance, id))
        };
        if let Some((_, _, id)) = targets.filter_map(rank).min() {
            self.turn.store(id + 1, Ordering::Relaxed);
            self.deliver_to(id, delivery);
        }
    }

    fn deliver_to(&self, id: u32, delivery: Delivery) {
        if let Some(slot) = self.slot(id) {
            slot.change(|apic| apic.accept(delivery));
        }
    }
}

impl MsiSender for LocalApics {
    fn send(&self, message: MsiMessage) {
        if let Some((delivery, destination)) = decode_msi(message) {
            self.deliver(delivery, destination);
        }
    }
}

/// A wire to one of the two interrupt pins of every APIC.
struct LintLine {
    apics: Arc<LocalApics>,
    pin: usize,
}

impl IrqLine for LintLine {
    fn set(&self, high: bool) {
        self.apics.slots.iter().for_each(|slot| slot.change(|apic| apic.set_lint(self.pin, high)));
    }
}
