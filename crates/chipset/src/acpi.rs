//! ACPI fixed hardware (ACPI 6.5 §4.8): PM timer, PM1 and GPE0 blocks, SMI command port, and the reset register.

use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window, ones};
use crate::time::{since, ticks, ticks_to_ns};

/// Bits of PM1 status and enable (§4.8.3.1).
mod event {
    /// The top bit of the PM timer has changed.
    pub(super) const TIMER: u16 = 1;
    pub(super) const GLOBAL_LOCK: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    pub(super) const SLEEP_BUTTON: u16 = 1 << 9;
    pub(super) const RTC: u16 = 1 << 10;
    pub(super) const ENABLES: u16 = TIMER | GLOBAL_LOCK | POWER_BUTTON | SLEEP_BUTTON | RTC;
}

/// Bits of PM1 control (§4.8.3.2).
mod control {
    /// Events raise SCI; only the SMI command changes it.
    pub(super) const SCI_ENABLE: u16 = 1;
    pub(super) const BUS_MASTER_RELOAD: u16 = 2;
    pub(super) const SLEEP_TYPE: u16 = 7 << 10;
    pub(super) const SLEEP_ENABLE: u16 = 1 << 13;
    /// What a write sets: global release and sleep enable do something and read as 0.
    pub(super) const STORED: u16 = BUS_MASTER_RELOAD | SLEEP_TYPE;
}

/// Registers as 32-bit words by offset in the device.
mod register {
    /// PM1 status, enable.
    pub(super) const EVENTS: u64 = 0;
    pub(super) const CONTROL: u64 = 4;
    pub(super) const TIMER: u64 = 8;
    /// GPE0 status, enable.
    pub(super) const GPE: u64 = 12;
    /// SMI command, status.
    pub(super) const SMI: u64 = 16;
}

/// Saved state of [`AcpiPm`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AcpiPmState {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    smi: [u8; 2],
    /// When the PM timer was 0.
    start: u64,
    /// Changes of the timer's top bit that have been noticed.
    wraps: u64,
}

impl AcpiPmState {
    fn new(start: u64) -> Self {
        Self { start, ..Self::default() }
    }
}

/// The ACPI register blocks.
pub struct AcpiPm {
    sci: Irq,
    state: AcpiPmState,
}

impl AcpiPm {
    /// Port of the PM1a event block: status, enable (2 bytes each).
    pub const PM1_EVENT: u16 = 0x600;
    /// Port of the PM1a control block (2 bytes).
    pub const PM1_CONTROL: u16 = 0x604;
    /// Port of the PM timer (4 bytes, a 32-bit counter: FADT flag TMR_VAL_EXT).
    pub const PM_TIMER: u16 = 0x608;
    /// Port of the GPE0 block: status, enable (2 bytes each; 16 events).
    pub const GPE0: u16 = 0x620;
    /// Length of the GPE0 block.
    pub const GPE0_LENGTH: u8 = 4;
    /// SMI command port (the status port follows).
    pub const SMI_COMMAND: u16 = 0xb2;
    /// Value for [`Self::SMI_COMMAND`] that turns ACPI on.
    pub const ACPI_ENABLE: u8 = 0xa1;
    /// Value for [`Self::SMI_COMMAND`] that turns ACPI off.
    pub const ACPI_DISABLE: u8 = 0xa0;
    /// The SCI's ISA interrupt (level-triggered, active high).
    pub const SCI: u8 = 9;
    /// SLP_TYP of S5, for the `\_S5` package.
    pub const S5: u8 = 5;
    /// Frequency of the PM timer in Hz.
    pub const TIMER_HZ: u64 = 3_579_545;

    /// `sci` is the system control interrupt. The timer counts from time 0.
    pub fn new(sci: Irq) -> Self {
        Self { sci, state: AcpiPmState::new(0) }
    }

    /// Presses and releases the power button. An operating system that has not taken over ACPI
    /// ([`enabled`](Self::enabled)) hears of it when it does.
    pub fn power_button(&mut self) {
        self.state.status |= event::POWER_BUTTON;
        self.update_line();
    }

    /// Raises general-purpose event `event` (0-15).
    pub fn raise_gpe(&mut self, event: u8) {
        self.state.gpe_status |= 1u16.checked_shl(event.into()).unwrap_or(0);
        self.update_line();
    }

    /// Whether the operating system has taken over ACPI (SCI_EN).
    pub fn enabled(&self) -> bool {
        self.state.control & control::SCI_ENABLE != 0
    }

    fn update_line(&mut self) {
        let s = &self.state;
        let event = s.status & s.enable | s.gpe_status & s.gpe_enable;
        self.sci.set(self.enabled() && event != 0);
    }

    fn timer(&self, now: u64) -> u64 {
        ticks(since(self.state.start, now), Self::TIMER_HZ)
    }

    /// Notices changes of the timer's top bit.
    fn settle(&mut self, now: u64) {
        let wraps = self.timer(now) >> 31;
        if wraps != self.state.wraps {
            self.state.wraps = wraps;
            self.state.status |= event::TIMER;
            self.update_line();
        }
    }

    fn write_control(&mut self, value: u16, mask: u16) -> Effect {
        let stored = mask & control::STORED;
        self.state.control = self.state.control & !stored | value & stored;
        let sleep = value & mask & control::SLEEP_ENABLE != 0;
        let kind = (self.state.control & control::SLEEP_TYPE) >> 10;
        if sleep && kind == u16::from(Self::S5) { Effect::PowerOff } else { Effect::None }
    }

    fn write_smi(&mut self, value: u32, mask: u32) {
        for (index, byte) in self.state.smi.iter_mut().enumerate() {
            if mask >> (8 * index) & 0xff != 0 {
                *byte = (value >> (8 * index)) as u8;
            }
        }
        if mask & 0xff != 0 {
            match self.state.smi[0] {
                Self::ACPI_ENABLE => self.state.control |= control::SCI_ENABLE,
                Self::ACPI_DISABLE => self.state.control &= !control::SCI_ENABLE,
                _ => {}
            }
        }
    }
}

/// Clears the status bits and merges the enable bits of a status and enable pair.
fn write_events(status: &mut u16, enable: &mut u16, value: u32, mask: u32) {
    let (status_written, enable_mask) = ((value & mask) as u16, (mask >> 16) as u16);
    *status &= !status_written;
    *enable = *enable & !enable_mask | (value >> 16) as u16 & enable_mask;
}

impl Device for AcpiPm {
    fn name(&self) -> &'static str {
        "acpi-pm"
    }

    fn windows(&self) -> Vec<Window> {
        vec![
            Window::ports(Self::PM1_EVENT, 12, register::EVENTS),
            Window::ports(Self::GPE0, Self::GPE0_LENGTH.into(), register::GPE),
            Window::ports(Self::SMI_COMMAND, 2, register::SMI),
        ]
    }

    fn access(&self) -> Access {
        Access { min: 1, max: 4 }
    }

    fn read_register(&mut self, offset: u64, width: u8, now: u64) -> u64 {
        let register = offset & !3;
        let value = match register {
            register::TIMER => self.timer(now) as u32,
            register::EVENTS => {
                self.settle(now);
                u32::from(self.state.status) | u32::from(self.state.enable) << 16
            }
            register::CONTROL => self.state.control.into(),
            register::GPE => u32::from(self.state.gpe_status) | u32::from(self.state.gpe_enable) << 16,
            register::SMI => u16::from_le_bytes(self.state.smi).into(),
            _ => u32::MAX,
        };
        u64::from(value) >> ((offset & 3) * 8) & ones(width)
    }

    fn write_register(&mut self, offset: u64, width: u8, value: u64, now: u64) -> Effect {
        self.settle(now);
        let shift = (offset & 3) * 8;
        let (value, mask) = ((value << shift) as u32, (ones(width) << shift) as u32);
        let mut effect = Effect::None;
        let s = &mut self.state;
        match offset & !3 {
            register::EVENTS => {
                write_events(&mut s.status, &mut s.enable, value, mask);
                s.enable &= event::ENABLES;
            }
            register::CONTROL => effect = self.write_control(value as u16, mask as u16),
            register::GPE => write_events(&mut s.gpe_status, &mut s.gpe_enable, value, mask),
            register::SMI => self.write_smi(value, mask),
            // The PM timer is read-only.
            _ => {}
        }
        self.update_line();
        effect
    }

    fn reset(&mut self, now: u64) {
        self.state = AcpiPmState::new(now);
        self.update_line();
    }

    fn next_deadline(&self) -> Option<u64> {
        let s = &self.state;
        let wanted = s.enable & !s.status & event::TIMER != 0;
        let tick = s.wraps.wrapping_add(1).checked_mul(1 << 31)?;
        wanted.then(|| s.start.wrapping_add(ticks_to_ns(tick, Self::TIMER_HZ)))
    }

    fn advance(&mut self, now: u64) {
        self.settle(now);
    }
}

impl Snapshot for AcpiPm {
    type State = AcpiPmState;

    fn save(&self, now: u64) -> AcpiPmState {
        AcpiPmState { start: self.state.start.wrapping_sub(now), ..self.state.clone() }
    }

    fn restore(&mut self, state: &AcpiPmState, now: u64) -> Result<(), RestoreError> {
        let control = state.control & !(control::STORED | control::SCI_ENABLE);
        if control != 0 || state.enable & !event::ENABLES != 0 {
            return Err(RestoreError { device: "acpi-pm", what: "reserved bits are set" });
        }
        self.state = AcpiPmState { start: state.start.wrapping_add(now), ..state.clone() };
        self.update_line();
        Ok(())
    }
}

/// Port 0xcf9, the reset control register of PC chipsets (82371 data sheet §4.1.6.2).
#[derive(Debug, Clone, Default)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    /// The port: FADT RESET_REG.
    pub const PORT: u16 = 0xcf9;
    /// What to write: FADT RESET_VALUE.
    pub const VALUE: u8 = 0x06;
    /// Going from 0 to 1 resets.
    const RESET_CPU: u8 = 4;
    /// Kind of reset: hard, not soft; here they are the same.
    const STORED: u8 = 0x0a;

    /// The register at 0.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Device for ResetControl {
    fn name(&self) -> &'static str {
        "reset-control"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(Self::PORT, 1, 0)]
    }

    fn access(&self) -> Access {
        Access::BYTE
    }

    fn read_register(&mut self, _offset: u64, _width: u8, _now: u64) -> u64 {
        self.value.into()
    }

    fn write_register(&mut self, _offset: u64, _width: u8, value: u64, _now: u64) -> Effect {
        self.value = value as u8 & Self::STORED;
        if value as u8 & Self::RESET_CPU != 0 { Effect::Reset } else { Effect::None }
    }

    fn reset(&mut self, _now: u64) {
        self.value = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::Line;

    const CONTROL: u64 = register::CONTROL;
    const GPE: u64 = register::GPE;
    const SMI: u64 = register::SMI;

    fn acpi() -> (AcpiPm, Arc<Line>) {
        let line = Arc::new(Line::default());
        (AcpiPm::new(line.clone()), line)
    }

    fn write(acpi: &mut AcpiPm, offset: u64, width: u8, value: u64) {
        assert_eq!(acpi.write(offset, width, value, 0), Effect::None);
    }

    #[test]
    fn ports_lie_where_they_are_announced() {
        let (acpi, _) = acpi();
        let offset = |port: u16| {
            let windows = acpi.windows();
            let window = windows.iter().find(|w| (w.base..w.base + w.length).contains(&port.into())).unwrap();
            u64::from(port) - window.base + window.offset
        };
        let ports =
            [AcpiPm::PM1_EVENT, AcpiPm::PM1_CONTROL, AcpiPm::PM_TIMER, AcpiPm::GPE0, AcpiPm::SMI_COMMAND];
        assert_eq!(ports.map(offset), [0, CONTROL, register::TIMER, GPE, SMI]);
    }

    #[test]
    fn timer_counts_at_its_frequency_in_every_width() {
        let (mut acpi, _) = acpi();
        let now = 1_000_000_000 * 5000;
        let expected = (AcpiPm::TIMER_HZ * 5000) & 0xffff_ffff;
        assert_eq!(acpi.read(8, 4, now), expected);
        let bytes = (0..4).fold(0, |value, i| value | acpi.read(8 + i, 1, now) << (8 * i));
        assert_eq!(bytes, expected);
        write(&mut acpi, 8, 4, 0);
        assert_eq!(acpi.read(8, 4, now), expected);
    }

    #[test]
    fn timer_overflow_raises_sci() {
        let (mut acpi, sci) = acpi();
        write(&mut acpi, SMI, 1, AcpiPm::ACPI_ENABLE.into());
        assert_eq!(acpi.next_deadline(), None);
        write(&mut acpi, 2, 2, 1);
        let deadline = acpi.next_deadline().unwrap();
        assert_eq!(deadline, ticks_to_ns(1 << 31, AcpiPm::TIMER_HZ));
        acpi.advance(deadline - 1);
        assert!(!sci.high());
        acpi.advance(deadline);
        assert!(sci.high());
        assert_eq!(acpi.write(0, 2, 1, deadline), Effect::None);
        assert!(!sci.high());
        assert_eq!(acpi.next_deadline(), Some(ticks_to_ns(2 << 31, AcpiPm::TIMER_HZ)));
    }

    #[test]
    fn power_button() {
        let (mut acpi, sci) = acpi();
        assert!(!acpi.enabled());
        write(&mut acpi, 2, 2, 1 << 8);
        acpi.power_button();
        assert!(!sci.high(), "not under ACPI yet");
        write(&mut acpi, SMI, 1, AcpiPm::ACPI_ENABLE.into());
        assert!(acpi.enabled() && sci.high());
        assert_eq!(acpi.read(CONTROL, 2, 0), 1);
        assert_eq!(acpi.read(0, 2, 0), 1 << 8);
        write(&mut acpi, 1, 1, 1);
        assert!(!sci.high());
        write(&mut acpi, SMI, 1, AcpiPm::ACPI_DISABLE.into());
        assert!(!acpi.enabled());
    }

    #[test]
    fn sleeping_in_s5_is_power_off() {
        let (mut acpi, _) = acpi();
        assert_eq!(acpi.write(CONTROL, 2, 5 << 10, 0), Effect::None);
        assert_eq!(acpi.write(CONTROL, 2, 1 << 13 | 5 << 10, 0), Effect::PowerOff);
        assert_eq!(acpi.write(CONTROL, 2, 1 << 13 | 1 << 10, 0), Effect::None);
        assert_eq!(acpi.write(CONTROL + 1, 1, 0x34, 0), Effect::PowerOff);
        assert_eq!(acpi.read(CONTROL, 2, 0), 5 << 10, "SLP_EN reads as 0");
    }

    #[test]
    fn sci_enable_is_not_for_writing() {
        let (mut acpi, _) = acpi();
        write(&mut acpi, CONTROL, 2, 1);
        assert!(!acpi.enabled());
    }

    #[test]
    fn general_purpose_events() {
        let (mut acpi, sci) = acpi();
        write(&mut acpi, SMI, 1, AcpiPm::ACPI_ENABLE.into());
        write(&mut acpi, GPE + 2, 1, 0x10);
        acpi.raise_gpe(3);
        assert!(!sci.high());
        acpi.raise_gpe(4);
        acpi.raise_gpe(200);
        assert!(sci.high());
        assert_eq!(acpi.read(GPE, 2, 0), 0x18);
        write(&mut acpi, GPE, 2, 0x10);
        assert!(!sci.high());
        assert_eq!(acpi.read(GPE, 4, 0), 0x10_0008);
    }

    #[test]
    fn reset_control() {
        let mut reset = ResetControl::new();
        assert_eq!(reset.write(0, 1, 2, 0), Effect::None);
        assert_eq!(reset.write(0, 1, ResetControl::VALUE.into(), 0), Effect::Reset);
        assert_eq!(reset.read(0, 1, 0), 2);
    }
}
