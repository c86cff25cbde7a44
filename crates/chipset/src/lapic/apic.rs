//! One local APIC: its state, acceptance of interrupts, delivery to the processor.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skep_hv::{Pending, Startup};

use super::message::{Delivery, DeliveryMode, Ipi, Route};
use super::registers::LVT_WRITABLE;
use super::timer::{Mode, Timer};
use super::{TscClock, VectorSet};
use crate::device::RestoreError;

/// What a local APIC wants of others after a write.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Deliver this.
    Ipi(Ipi),
    /// Tell IOAPICs that the level-triggered interrupt with this vector has ended.
    Eoi(u8),
}

/// What a processor gets for its interrupt acknowledge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acknowledged {
    /// Nothing: the interrupt has gone.
    Nothing,
    /// This vector, now in service.
    Vector(u8),
    /// An external interrupt: the 8259 pair is to be asked.
    External,
}

/// The local vector table: indices (1 and 2 are thermal sensor and performance counters, which raise nothing here)
/// and bits of its entries.
pub(super) mod lvt {
    pub(in super::super) const TIMER: usize = 0;
    pub(in super::super) const LINT0: usize = 3;
    pub(in super::super) const LINT1: usize = 4;
    pub(in super::super) const ERROR: usize = 5;
    /// Mask bit of every entry.
    pub(in super::super) const MASKED: u32 = 1 << 16;
    /// Trigger mode of LINT0: level.
    pub(in super::super) const LEVEL: u32 = 1 << 15;
    /// Remote IRR of LINT0: a level-triggered interrupt is in service.
    pub(in super::super) const REMOTE_IRR: u32 = 1 << 14;
}

/// Bits of the error status register (SDM vol. 3A §11.5.3).
pub(super) mod error {
    /// An IPI with a vector below 16 was to be sent.
    pub(in super::super) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    /// An interrupt with a vector below 16 was received, from others or the local vector table.
    pub(in super::super) const RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
    /// A register that does not exist was accessed in the xAPIC page.
    pub(in super::super) const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Bits of IA32_APIC_BASE (§11.4.4, §11.12.1).
pub(super) mod base {
    pub(in super::super) const BSP: u64 = 1 << 8;
    pub(in super::super) const X2APIC: u64 = 1 << 10;
    pub(in super::super) const ENABLE: u64 = 1 << 11;
    pub(in super::super) const ADDRESS: u64 = 0xfee0_0000;
}

/// SVR: the APIC is enabled by software.
pub(super) const SVR_ENABLE: u32 = 1 << 8;
/// SVR: EOIs are not broadcast to IOAPICs.
pub(super) const SVR_SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;

/// Everything a local APIC remembers. Times are relative to the instant of saving.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalApicState {
    pub(super) id: u32,
    pub(super) base: u64,
    pub(super) tpr: u8,
    pub(super) ldr: u32,
    pub(super) dfr: u32,
    pub(super) svr: u32,
    /// What ESR reads as; errors since it was last written are in `errors`.
    pub(super) esr: u32,
    pub(super) errors: u32,
    pub(super) icr: u64,
    pub(super) lvt: [u32; 6],
    pub(super) irr: VectorSet,
    pub(super) isr: VectorSet,
    pub(super) tmr: VectorSet,
    pub(super) timer: Timer,
    /// Levels of the LINT0 and LINT1 pins.
    pub(super) lint: [bool; 2],
    /// An ExtINT message has arrived.
    pub(super) extint: bool,
    pub(super) nmi: bool,
    pub(super) init: bool,
    pub(super) startup: Option<u8>,
    /// The processor is waiting for a start-up IPI; others are dropped.
    pub(super) wait_for_startup: bool,
}

impl LocalApicState {
    /// After power-on or INIT (SDM vol. 3A §11.4.7), with the parts that INIT leaves alone as given.
    fn fresh(id: u32, base: u64, lint: [bool; 2]) -> Self {
        let bsp = base & base::BSP != 0;
        let mut lvt = [lvt::MASKED; 6];
        if bsp {
            // Firmware leaves the bootstrap processor in virtual-wire mode; kernels started directly rely on it.
            lvt[lvt::LINT0] = 7 << 8;
        }
        Self {
            id,
            base,
            tpr: 0,
            ldr: if base & base::X2APIC != 0 { x2apic_ldr(id) } else { 0 },
            dfr: u32::MAX,
            svr: 0xff,
            esr: 0,
            errors: 0,
            icr: 0,
            lvt,
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            timer: Timer::default(),
            lint,
            extint: false,
            nmi: false,
            init: false,
            startup: None,
            wait_for_startup: !bsp,
        }
    }
}

/// The logical x2APIC ID, derived from the ID (§11.12.10.2).
pub(super) fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

/// One local APIC.
pub struct LocalApic {
    pub(super) state: LocalApicState,
    pub(super) x2apic: bool,
    pub(super) physical_bits: u8,
    pub(super) clock: Arc<dyn TscClock>,
}

impl LocalApic {
    /// An APIC in its power-on state; ID 0 is the bootstrap processor's. `x2apic`: the mode may be entered.
    /// `physical_bits`: width of IA32_APIC_BASE.
    pub fn new(id: u32, x2apic: bool, physical_bits: u8, clock: Arc<dyn TscClock>) -> Self {
        let state = LocalApicState::fresh(id, Self::power_on_base(id), [false; 2]);
        Self { state, x2apic, physical_bits: physical_bits.clamp(36, 52), clock }
    }

    fn power_on_base(id: u32) -> u64 {
        base::ADDRESS | base::ENABLE | if id == 0 { base::BSP } else { 0 }
    }

    /// Back to the power-on state; the pins keep their levels.
    pub fn reset(&mut self) {
        self.state =
            LocalApicState::fresh(self.state.id, Self::power_on_base(self.state.id), self.state.lint);
    }

    /// The registers as after INIT, but what waits for the processor stays.
    pub(super) fn clear_registers(&mut self) {
        let s = &self.state;
        let fresh = LocalApicState::fresh(s.id, s.base, s.lint);
        let (init, startup, wait_for_startup, nmi) = (s.init, s.startup, s.wait_for_startup, s.nmi);
        self.state = LocalApicState { init, startup, wait_for_startup, nmi, ..fresh };
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.state.base
    }

    pub(super) fn enabled_globally(&self) -> bool {
        self.state.base & base::ENABLE != 0
    }

    pub(super) fn enabled(&self) -> bool {
        self.enabled_globally() && self.state.svr & SVR_ENABLE != 0
    }

    pub(super) fn in_x2apic_mode(&self) -> bool {
        self.state.base & (base::X2APIC | base::ENABLE) == base::X2APIC | base::ENABLE
    }

    pub(super) fn route(&self) -> Route {
        let s = &self.state;
        Route { x2apic: self.in_x2apic_mode(), ldr: s.ldr, flat: s.dfr >> 28 == 0xf, enabled: self.enabled() }
    }

    /// The processor-priority register (§11.8.3.1).
    pub fn ppr(&self) -> u8 {
        let in_service = self.state.isr.highest().unwrap_or(0);
        if self.state.tpr & 0xf0 >= in_service & 0xf0 { self.state.tpr } else { in_service & 0xf0 }
    }

    /// The arbitration priority, as lowest-priority delivery compares it (§11.6.2.4).
    pub(super) fn arbitration_priority(&self) -> u8 {
        let requested = self.state.irr.highest().unwrap_or(0);
        let in_service = self.state.isr.highest().unwrap_or(0);
        if self.state.tpr & 0xf0 >= (requested.max(in_service)) & 0xf0 {
            self.state.tpr
        } else {
            requested.max(in_service) & 0xf0
        }
    }

    /// The highest requested vector that the processor priority lets through.
    fn deliverable(&self) -> Option<u8> {
        if !self.enabled_globally() {
            return None;
        }
        self.state.irr.highest().filter(|vector| vector & 0xf0 > self.ppr() & 0xf0)
    }

    /// Whether the 8259 pair has an interrupt for this processor.
    fn external(&self) -> bool {
        let lint0 = self.state.lvt[lvt::LINT0];
        // With the APIC disabled, the LINT0 pin is INTR (§11.4.3).
        let through = !self.enabled_globally() || lint0 & (lvt::MASKED | 7 << 8) == 7 << 8;
        self.state.extint || self.state.lint[0] && through
    }

    /// What waits for the processor. Call [`advance`](Self::advance) first.
    pub fn pending(&self) -> Pending {
        let unmasked = self.state.lvt[lvt::TIMER] & lvt::MASKED == 0;
        Pending {
            startup: self.state.init || self.state.startup.is_some(),
            nmi: self.state.nmi,
            maskable: self.external() || self.deliverable().is_some(),
            next_ns: if unmasked { self.state.timer.next().unwrap_or(u64::MAX) } else { u64::MAX },
        }
    }

    /// INTA.
    pub fn acknowledge(&mut self) -> Acknowledged {
        if self.external() {
            self.state.extint = false;
            return Acknowledged::External;
        }
        let Some(vector) = self.deliverable() else { return Acknowledged::Nothing };
        self.state.irr.remove(vector);
        self.state.isr.insert(vector);
        Acknowledged::Vector(vector)
    }

    /// The processor takes its NMI.
    pub fn acknowledge_nmi(&mut self) {
        self.state.nmi = false;
    }

    /// The processor acts on INIT (which resets all but ID, base and pins) or on a start-up IPI.
    pub fn acknowledge_startup(&mut self) -> Option<Startup> {
        if self.state.init {
            let startup = self.state.startup;
            self.state = LocalApicState::fresh(self.state.id, self.state.base, self.state.lint);
            // A start-up IPI may have followed before the processor came to look.
            self.state.startup = startup.filter(|_| self.state.wait_for_startup);
            return Some(Startup::Init);
        }
        let vector = self.state.startup.take()?;
        self.state.wait_for_startup = false;
        Some(Startup::Sipi(vector))
    }

    /// CR8: the priority class of TPR (§11.8.6).
    pub fn cr8(&self) -> u8 {
        self.state.tpr >> 4
    }

    /// Writes CR8; the sub-class becomes 0.
    pub fn set_cr8(&mut self, value: u8) {
        self.state.tpr = value << 4;
    }

    /// An interrupt arrives, from another APIC, an IOAPIC or a device.
    pub fn accept(&mut self, delivery: Delivery) {
        let s = &mut self.state;
        match delivery.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if self.enabled() {
                    self.request(delivery.vector, delivery.level);
                }
            }
            DeliveryMode::Nmi => s.nmi = true,
            DeliveryMode::Init => {
                s.init = true;
                s.startup = None;
            }
            DeliveryMode::StartUp => {
                if s.init && s.base & base::BSP == 0 || !s.init && s.wait_for_startup {
                    s.startup = Some(delivery.vector);
                }
            }
            DeliveryMode::ExtInt => s.extint = true,
            DeliveryMode::Smi | DeliveryMode::Reserved => {}
        }
    }

    /// Sets a vector's request bit.
    fn request(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            return self.raise_error(error::RECEIVED_ILLEGAL_VECTOR);
        }
        self.state.irr.insert(vector);
        self.state.tmr.set(vector, level);
    }

    /// Notes an error and raises the error interrupt (§11.5.3).
    pub(super) fn raise_error(&mut self, bit: u32) {
        let news = self.state.errors & bit == 0;
        self.state.errors |= bit;
        let entry = self.state.lvt[lvt::ERROR];
        if news && entry & lvt::MASKED == 0 && self.enabled() {
            if entry & 0xff < 16 {
                self.state.errors |= error::RECEIVED_ILLEGAL_VECTOR;
            } else {
                self.request(entry as u8, false);
            }
        }
    }

    /// An event of the local vector table.
    fn local(&mut self, index: usize, level: bool) {
        let entry = self.state.lvt[index];
        if entry & lvt::MASKED != 0 || !self.enabled_globally() {
            return;
        }
        let mode = if index == lvt::TIMER || index == lvt::ERROR {
            DeliveryMode::Fixed
        } else {
            DeliveryMode::from_bits(entry >> 8)
        };
        match mode {
            DeliveryMode::Fixed => self.accept(Delivery { mode, vector: entry as u8, level }),
            DeliveryMode::Nmi | DeliveryMode::Init => self.accept(Delivery { mode, vector: 0, level: false }),
            // ExtINT follows the pin's level; the others do nothing here.
            _ => {}
        }
    }

    /// Drives pin LINT0 (`pin` 0) or LINT1 (1).
    pub fn set_lint(&mut self, pin: usize, high: bool) {
        let Some(level) = self.state.lint.get_mut(pin) else { return };
        let rising = !*level && high;
        *level = high;
        if !self.enabled_globally() {
            // The pins are INTR and NMI.
            if pin == 1 && rising {
                self.state.nmi = true;
            }
            return;
        }
        let index = if pin == 0 { lvt::LINT0 } else { lvt::LINT1 };
        if self.lint0_is_level(index) {
            self.sample_lint0();
        } else if rising {
            self.local(index, false);
        }
    }

    fn lint0_is_level(&self, index: usize) -> bool {
        let entry = self.state.lvt[lvt::LINT0];
        index == lvt::LINT0 && entry & lvt::LEVEL != 0 && entry & 7 << 8 == 0
    }

    /// Requests LINT0's level-triggered interrupt if the pin is high and none is in service.
    pub(super) fn sample_lint0(&mut self) {
        let entry = self.state.lvt[lvt::LINT0];
        let ready = self.lint0_is_level(lvt::LINT0) && self.state.lint[0];
        if ready && entry & (lvt::REMOTE_IRR | lvt::MASKED) == 0 && self.enabled() {
            self.local(lvt::LINT0, true);
            self.state.lvt[lvt::LINT0] |= lvt::REMOTE_IRR;
        }
    }

    /// The end of the interrupt in service with the highest priority (§11.8.5).
    pub fn end_of_interrupt(&mut self) -> Action {
        let Some(vector) = self.state.isr.highest() else { return Action::None };
        self.state.isr.remove(vector);
        if !self.state.tmr.contains(vector) {
            return Action::None;
        }
        let lint0 = &mut self.state.lvt[lvt::LINT0];
        if *lint0 & lvt::REMOTE_IRR != 0 && *lint0 as u8 == vector {
            *lint0 &= !lvt::REMOTE_IRR;
            self.sample_lint0();
        }
        if self.state.svr & SVR_SUPPRESS_EOI_BROADCAST != 0 { Action::None } else { Action::Eoi(vector) }
    }

    /// Whether the interrupt in service may end without an EOI write: it is edge-triggered and nothing waits.
    pub fn can_skip_eoi(&self) -> bool {
        let s = &self.state;
        s.irr.is_empty() && !self.external() && s.isr.highest().is_some_and(|vector| !s.tmr.contains(vector))
    }

    /// Lets the timer expire if its time has come.
    pub fn advance(&mut self, now: u64) {
        let mode = Mode::from_lvt(self.state.lvt[lvt::TIMER]);
        if self.state.timer.expire(mode, now) {
            self.local(lvt::TIMER, false);
        }
    }

    /// The TSC has been set: an armed deadline is at another instant now.
    pub fn tsc_changed(&mut self) {
        self.state.timer.locate_deadline(self.state.id, &*self.clock);
    }

    /// The state at `now`.
    pub fn save(&self, now: u64) -> LocalApicState {
        LocalApicState { timer: self.state.timer.shifted(now.wrapping_neg()), ..self.state.clone() }
    }

    /// Whether this APIC can be in `state`.
    pub(super) fn check(&self, state: &LocalApicState) -> Result<(), RestoreError> {
        let fail = |what| Err(RestoreError { device: "local APIC", what });
        if state.id != self.state.id {
            return fail("the APIC ID differs");
        }
        let mode = state.base & (base::X2APIC | base::ENABLE);
        if mode == base::X2APIC || mode & base::X2APIC != 0 && !self.x2apic {
            return fail("IA32_APIC_BASE holds a mode that this APIC does not have");
        }
        if state.base & self.base_reserved() != 0 {
            return fail("IA32_APIC_BASE has reserved bits set");
        }
        let bits =
            state.lvt.iter().zip(LVT_WRITABLE).fold(0, |bits, (entry, writable)| bits | entry & !writable);
        if bits & !lvt::REMOTE_IRR != 0 {
            return fail("the local vector table has reserved bits set");
        }
        if !state.timer.valid(Mode::from_lvt(state.lvt[lvt::TIMER])) {
            return fail("the timer is set up for another mode");
        }
        Ok(())
    }

    /// Takes on `state`.
    pub fn restore(&mut self, state: &LocalApicState, now: u64) -> Result<(), RestoreError> {
        self.check(state)?;
        self.state = LocalApicState { timer: state.timer.shifted(now), ..state.clone() };
        self.tsc_changed();
        Ok(())
    }
}
