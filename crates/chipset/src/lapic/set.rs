//! The set of local APICs of a machine.

use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};
use skep_hv::irq::{Irq, MsiMessage, MsiSender, NoIrq};
use skep_hv::{Kick, Pending, Startup};

use super::{ExternalController, LinearTsc, LocalApic, TscClock};
use crate::device::RestoreError;

/// How the local APICs are made.
#[derive(Clone)]
pub struct ApicConfig {
    /// Number of vCPUs; APIC IDs are 0 to `vcpus - 1`. At most 255.
    pub vcpus: u32,
    /// x2APIC mode may be entered (must agree with CPUID.1:ECX[21]).
    pub x2apic: bool,
    /// Physical-address width: IA32_APIC_BASE refuses bits above.
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
    apics: Vec<LocalApic>,
}

/// The local APICs of a machine. Every method may be called from any thread; those that take `vcpu` and stand for
/// an act of that processor are meant for its own thread. A `vcpu` that does not exist does nothing.
pub struct LocalApics {
    config: ApicConfig,
}

impl LocalApics {
    /// APICs in their power-on state. The bootstrap processor is vCPU 0; its LINT0 passes 8259 interrupts through,
    /// as firmware leaves it (virtual-wire mode, MultiProcessor Specification 1.4 §3.6.2.2).
    pub fn new(config: ApicConfig) -> Arc<Self> {
        Arc::new(Self { config })
    }

    /// Says how to wake `vcpu` when something becomes pending for it.
    pub fn attach_cpu(&self, _vcpu: u32, _kick: Arc<dyn Kick>) {
        todo!()
    }

    /// Says who gives external interrupts and hears of the end of level-triggered ones.
    pub fn attach_controller(&self, _controller: Weak<dyn ExternalController>) {
        todo!()
    }

    /// The wire to every LINT0 pin: the 8259 pair's INTR.
    pub fn lint0(self: &Arc<Self>) -> Irq {
        Arc::new(NoIrq)
    }

    /// The wire to every LINT1 pin: NMI.
    pub fn lint1(self: &Arc<Self>) -> Irq {
        Arc::new(NoIrq)
    }

    /// Number of APICs.
    pub fn count(&self) -> u32 {
        self.config.vcpus
    }

    /// What waits for `vcpu` (`VcpuIo::interrupts`). Also looks at its timer.
    pub fn pending(&self, _vcpu: u32, _now: u64) -> Pending {
        todo!()
    }

    /// INTA: `vcpu` takes the interrupt that [`pending`](Self::pending) announced; `None` if it has gone.
    pub fn acknowledge(&self, _vcpu: u32, _now: u64) -> Option<u8> {
        todo!()
    }

    /// `vcpu` takes its NMI.
    pub fn acknowledge_nmi(&self, _vcpu: u32) {
        todo!()
    }

    /// `vcpu` acts on INIT (which resets its APIC) or a start-up IPI.
    pub fn acknowledge_startup(&self, _vcpu: u32, _now: u64) -> Option<Startup> {
        todo!()
    }

    /// CR8 of `vcpu`: the priority class in TPR[7:4].
    pub fn cr8(&self, _vcpu: u32) -> u8 {
        todo!()
    }

    /// Writes CR8.
    pub fn set_cr8(&self, _vcpu: u32, _value: u8) {
        todo!()
    }

    /// IA32_APIC_BASE of `vcpu`.
    pub fn apic_base(&self, _vcpu: u32) -> u64 {
        todo!()
    }

    /// The offset into `vcpu`'s register page, if `gpa` lies in it and the APIC is in xAPIC mode.
    pub fn mmio_offset(&self, _vcpu: u32, _gpa: u64) -> Option<u64> {
        todo!()
    }

    /// A read of `vcpu`'s register page, of any width and alignment.
    pub fn mmio_read(&self, _vcpu: u32, _offset: u64, _width: u8, _now: u64) -> u64 {
        todo!()
    }

    /// A write to `vcpu`'s register page, of any width and alignment.
    pub fn mmio_write(&self, _vcpu: u32, _offset: u64, _width: u8, _value: u64, _now: u64) {
        todo!()
    }

    /// RDMSR of IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0), 0x800-0x8ff. `None`: #GP(0).
    pub fn msr_read(&self, _vcpu: u32, _msr: u32, _now: u64) -> Option<u64> {
        todo!()
    }

    /// WRMSR of the same. `None`: #GP(0).
    pub fn msr_write(&self, _vcpu: u32, _msr: u32, _value: u64, _now: u64) -> Option<()> {
        todo!()
    }

    /// Sends `icr` (low half: vector, delivery mode; destination ignored) from `vcpu` to the APIC IDs in `targets`.
    pub fn send_ipis(&self, _vcpu: u32, _icr: u64, _targets: &mut dyn Iterator<Item = u32>) {
        todo!()
    }

    /// Makes an NMI pending at `vcpu`.
    pub fn inject_nmi(&self, _vcpu: u32) {
        todo!()
    }

    /// The guest's TSC of `vcpu` has been set: an armed deadline moves.
    pub fn tsc_changed(&self, _vcpu: u32) {
        todo!()
    }

    /// Whether the interrupt just acknowledged may end without an EOI write (paravirtual EOI): it is
    /// edge-triggered, and nothing waits behind it.
    pub fn can_skip_eoi(&self, _vcpu: u32) -> bool {
        todo!()
    }

    /// The guest has ended the interrupt by the paravirtual flag: does what an EOI write would have done.
    pub fn end_skipped(&self, _vcpu: u32, _now: u64) {
        todo!()
    }

    /// Every APIC back to power-on state. Lines keep their level.
    pub fn reset(&self, _now: u64) {
        todo!()
    }

    /// The state at `now`.
    pub fn save(&self, _now: u64) -> LocalApicsState {
        todo!()
    }

    /// Takes on `state`; fails if the number of APICs differs. Wakes every vCPU.
    pub fn restore(&self, _state: &LocalApicsState, _now: u64) -> Result<(), RestoreError> {
        todo!()
    }
}

impl MsiSender for LocalApics {
    fn send(&self, _message: MsiMessage) {
        todo!()
    }
}
