//! The registers of a local APIC: xAPIC page (SDM vol. 3A table 11-1), x2APIC MSRs (§11.12.1.2), IA32_APIC_BASE and
//! IA32_TSC_DEADLINE. A register is known by its page offset divided by 16, which is its MSR minus 0x800.

use super::apic::{Action, LocalApic, SVR_ENABLE, SVR_SUPPRESS_EOI_BROADCAST, base, error, lvt, x2apic_ldr};
use super::message::{Delivery, DeliveryMode, Destination, Ipi, Shorthand};
use super::timer::Mode;
use crate::device::ones;

mod register {
    pub(super) const ID: u32 = 0x02;
    pub(super) const VERSION: u32 = 0x03;
    pub(super) const TPR: u32 = 0x08;
    pub(super) const APR: u32 = 0x09;
    pub(super) const PPR: u32 = 0x0a;
    pub(super) const EOI: u32 = 0x0b;
    pub(super) const RRD: u32 = 0x0c;
    pub(super) const LDR: u32 = 0x0d;
    pub(super) const DFR: u32 = 0x0e;
    pub(super) const SVR: u32 = 0x0f;
    pub(super) const ISR: u32 = 0x10;
    pub(super) const ISR_END: u32 = 0x17;
    pub(super) const TMR: u32 = 0x18;
    pub(super) const TMR_END: u32 = 0x1f;
    pub(super) const IRR: u32 = 0x20;
    pub(super) const IRR_END: u32 = 0x27;
    pub(super) const ESR: u32 = 0x28;
    pub(super) const ICR: u32 = 0x30;
    pub(super) const ICR_HIGH: u32 = 0x31;
    pub(super) const LVT: u32 = 0x32;
    pub(super) const LVT_END: u32 = 0x37;
    pub(super) const INITIAL_COUNT: u32 = 0x38;
    pub(super) const CURRENT_COUNT: u32 = 0x39;
    pub(super) const DIVIDE: u32 = 0x3e;
    pub(super) const SELF_IPI: u32 = 0x3f;
}

/// Integrated APIC (0x14), six LVT entries, EOI-broadcast suppression (§11.4.8).
const VERSION: u32 = 1 << 24 | 5 << 16 | 0x14;

/// IA32_APIC_BASE.
const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First x2APIC MSR.
const MSR_X2APIC: u32 = 0x800;
/// Last x2APIC MSR.
const MSR_X2APIC_END: u32 = 0x8ff;

/// Writable bits of the LVT entries, in their order (figure 11-8).
pub(super) const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
/// Delivery status and remote IRR: read-only, but not reserved.
const LVT_READ_ONLY: u32 = 1 << 12 | lvt::REMOTE_IRR;

/// What an x2APIC register does with a write (§11.12.1.2; bits outside the mask are reserved).
enum Writable {
    /// Bits that may be set.
    Bits(u64),
    /// Read-only, or no register.
    No,
}

impl LocalApic {
    /// A register both modes share; `None` if there is none.
    fn read_common(&mut self, register: u32, now: u64) -> Option<u32> {
        let s = &self.state;
        Some(match register {
            register::VERSION => VERSION,
            register::TPR => s.tpr.into(),
            register::PPR => self.ppr().into(),
            register::SVR => s.svr,
            register::ISR..=register::ISR_END => s.isr.word(register - register::ISR),
            register::TMR..=register::TMR_END => s.tmr.word(register - register::TMR),
            register::IRR..=register::IRR_END => {
                self.advance(now);
                self.state.irr.word(register - register::IRR)
            }
            register::ESR => s.esr,
            register::LVT..=register::LVT_END => s.lvt[(register - register::LVT) as usize],
            register::INITIAL_COUNT => s.timer.initial,
            register::CURRENT_COUNT => {
                self.advance(now);
                if self.timer_mode() == Mode::TscDeadline { 0 } else { self.state.timer.current(now) }
            }
            register::DIVIDE => s.timer.divide,
            _ => return None,
        })
    }

    /// Writes a register both modes share; `None` if there is none.
    fn write_common(&mut self, register: u32, value: u32, now: u64) -> Option<Action> {
        match register {
            register::TPR => self.state.tpr = value as u8,
            register::EOI => return Some(self.end_of_interrupt()),
            register::SVR => self.write_svr(value),
            register::ESR => {
                self.state.esr = self.state.errors;
                self.state.errors = 0;
            }
            register::LVT..=register::LVT_END => {
                self.write_lvt((register - register::LVT) as usize, value, now);
            }
            register::INITIAL_COUNT => {
                if self.timer_mode() != Mode::TscDeadline {
                    self.advance(now);
                    self.state.timer.start(value, now);
                }
            }
            register::DIVIDE => {
                self.advance(now);
                let mode = self.timer_mode();
                self.state.timer.set_divide(value, now, mode);
            }
            _ => return None,
        }
        Some(Action::None)
    }

    fn timer_mode(&self) -> Mode {
        Mode::from_lvt(self.state.lvt[lvt::TIMER])
    }

    fn write_svr(&mut self, value: u32) {
        self.state.svr = value & (0x2ff | SVR_ENABLE | SVR_SUPPRESS_EOI_BROADCAST);
        if value & SVR_ENABLE == 0 {
            // §11.4.7.2: all mask bits are set, and stay so.
            for entry in &mut self.state.lvt {
                *entry |= lvt::MASKED;
            }
        }
    }

    fn write_lvt(&mut self, index: usize, value: u32, now: u64) {
        if index == lvt::TIMER {
            // An expiry that has come belongs to the old setting.
            self.advance(now);
        }
        let Some(&writable) = LVT_WRITABLE.get(index) else { return };
        let old = self.state.lvt[index];
        let mut new = value & writable;
        if index == lvt::LINT0 && new & lvt::LEVEL != 0 {
            new |= old & lvt::REMOTE_IRR;
        }
        if self.state.svr & SVR_ENABLE == 0 {
            new |= lvt::MASKED;
        }
        self.state.lvt[index] = new;
        if index == lvt::TIMER {
            let (old, new) = (Mode::from_lvt(old), Mode::from_lvt(new));
            if (old == Mode::TscDeadline) != (new == Mode::TscDeadline) {
                self.state.timer.disarm();
            }
        }
        if index == lvt::LINT0 {
            self.sample_lint0();
        }
    }

    /// Writes the interrupt command register's low half: sends.
    fn send(&mut self, x2apic: bool) -> Action {
        let Some(ipi) = Ipi::from_icr(self.state.icr, x2apic) else { return Action::None };
        self.checked(ipi)
    }

    /// The IPI, unless it has an illegal vector.
    fn checked(&mut self, ipi: Ipi) -> Action {
        let carries_vector = matches!(ipi.delivery.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if carries_vector && ipi.delivery.vector < 16 {
            self.raise_error(error::SEND_ILLEGAL_VECTOR);
            return Action::None;
        }
        Action::Ipi(ipi)
    }

    /// A 32-bit read at an offset of the xAPIC page. Registers lie at multiples of 16; other offsets read as 0.
    pub fn read_page(&mut self, offset: u64, width: u8, now: u64) -> u64 {
        let (register, byte) = ((offset >> 4) as u32, offset & 0xf);
        if offset >= 0x1000 || byte > 3 {
            return 0;
        }
        let s = &self.state;
        let value = match register {
            register::ID => s.id << 24,
            register::APR => self.arbitration_priority().into(),
            register::EOI | register::RRD => 0,
            register::LDR => s.ldr,
            register::DFR => s.dfr,
            register::ICR => s.icr as u32,
            register::ICR_HIGH => (s.icr >> 32) as u32,
            _ => self.read_common(register, now).unwrap_or_else(|| {
                self.raise_error(error::ILLEGAL_REGISTER);
                0
            }),
        };
        u64::from(value) >> (byte * 8) & ones(width)
    }

    /// A write at an offset of the xAPIC page. Only aligned 32-bit writes are defined (§11.4.1); of a 64-bit one
    /// the low half counts, others are dropped.
    pub fn write_page(&mut self, offset: u64, width: u8, value: u64, now: u64) -> Action {
        if offset >= 0x1000 || offset & 0xf != 0 || width < 4 {
            return Action::None;
        }
        let (register, value) = ((offset >> 4) as u32, value as u32);
        let s = &mut self.state;
        match register {
            register::LDR => s.ldr = value & 0xff00_0000,
            register::DFR => s.dfr = value | 0x0fff_ffff,
            register::ICR => {
                s.icr = s.icr & 0xffff_ffff_0000_0000 | u64::from(value & 0x000c_cfff);
                return self.send(false);
            }
            register::ICR_HIGH => s.icr = u64::from(value & 0xff00_0000) << 32 | s.icr & 0xffff_ffff,
            // Read-only registers take no notice.
            register::ID | register::VERSION | register::APR | register::PPR | register::RRD => {}
            register::ISR..=register::IRR_END | register::CURRENT_COUNT => {}
            _ => {
                if let Some(action) = self.write_common(register, value, now) {
                    return action;
                }
                self.raise_error(error::ILLEGAL_REGISTER);
            }
        }
        Action::None
    }

    /// RDMSR; `None` is #GP(0).
    pub fn read_msr(&mut self, msr: u32, now: u64) -> Option<u64> {
        match msr {
            MSR_APIC_BASE => Some(self.state.base),
            MSR_TSC_DEADLINE => {
                self.advance(now);
                Some(if self.timer_mode() == Mode::TscDeadline { self.state.timer.deadline } else { 0 })
            }
            MSR_X2APIC..=MSR_X2APIC_END if self.in_x2apic_mode() => match msr - MSR_X2APIC {
                register::ID => Some(self.state.id.into()),
                register::LDR => Some(self.state.ldr.into()),
                register::ICR => Some(self.state.icr),
                // Write-only.
                register::EOI | register::SELF_IPI => None,
                register => self.read_common(register, now).map(u64::from),
            },
            _ => None,
        }
    }

    /// WRMSR; `None` is #GP(0).
    pub fn write_msr(&mut self, msr: u32, value: u64, now: u64) -> Option<Action> {
        match msr {
            MSR_APIC_BASE => self.write_base(value).map(|()| Action::None),
            MSR_TSC_DEADLINE => {
                self.advance(now);
                if self.timer_mode() == Mode::TscDeadline {
                    self.state.timer.set_deadline(value, self.state.id, &*self.clock);
                }
                Some(Action::None)
            }
            MSR_X2APIC..=MSR_X2APIC_END if self.in_x2apic_mode() => {
                self.write_x2apic(msr - MSR_X2APIC, value, now)
            }
            _ => None,
        }
    }

    fn write_x2apic(&mut self, register: u32, value: u64, now: u64) -> Option<Action> {
        let writable = match register {
            register::TPR => Writable::Bits(0xff),
            register::EOI | register::ESR => Writable::Bits(0),
            register::SVR => Writable::Bits(0x13ff),
            register::ICR => Writable::Bits(0xffff_ffff_000c_dfff),
            register::LVT..=register::LVT_END => {
                let index = (register - register::LVT) as usize;
                Writable::Bits((LVT_WRITABLE.get(index)? | LVT_READ_ONLY).into())
            }
            register::INITIAL_COUNT => Writable::Bits(u32::MAX.into()),
            register::DIVIDE => Writable::Bits(0xb),
            register::SELF_IPI => Writable::Bits(0xff),
            _ => Writable::No,
        };
        let Writable::Bits(bits) = writable else { return None };
        if value & !bits != 0 {
            return None;
        }
        match register {
            register::ICR => {
                // Delivery status does not exist in x2APIC mode (§11.12.9).
                self.state.icr = value & !(1 << 12);
                Some(self.send(true))
            }
            register::SELF_IPI => {
                let delivery = Delivery { mode: DeliveryMode::Fixed, vector: value as u8, level: false };
                let ipi = Ipi {
                    delivery,
                    destination: Destination::Physical(self.state.id),
                    shorthand: Shorthand::Itself,
                };
                Some(self.checked(ipi))
            }
            _ => self.write_common(register, value as u32, now),
        }
    }

    /// Bits of IA32_APIC_BASE that must be 0.
    pub(super) fn base_reserved(&self) -> u64 {
        let address = ((1 << self.physical_bits) - 1) & !0xfff;
        let x2apic = if self.x2apic { base::X2APIC } else { 0 };
        !(address | base::BSP | base::ENABLE | x2apic)
    }

    /// IA32_APIC_BASE: address and mode (figure 11-26: which changes of mode are legal).
    fn write_base(&mut self, value: u64) -> Option<()> {
        const OFF: u64 = 0;
        const XAPIC: u64 = base::ENABLE;
        const X2APIC: u64 = base::ENABLE | base::X2APIC;
        if value & self.base_reserved() != 0 {
            return None;
        }
        let mode = |base: u64| base & X2APIC;
        match (mode(self.state.base), mode(value)) {
            (old, new) if old == new => {}
            (XAPIC | X2APIC, OFF) => {
                // Disabled, the APIC loses its state (§11.4.3).
                self.state.base = value;
                self.clear_registers();
            }
            (OFF, XAPIC) => {}
            (XAPIC, X2APIC) => {
                self.state.ldr = x2apic_ldr(self.state.id);
                self.state.icr &= 0xffff_ffff;
            }
            _ => return None,
        }
        self.state.base = value;
        Some(())
    }
}
