//! ACPI fixed hardware: PM timer, PM1 and GPE blocks, SMI command port, reset register (ACPI 6.5 §4.8).

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

/// Saved state of [`AcpiPm`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AcpiPmState {}

/// The ACPI register blocks.
pub struct AcpiPm {
    _sci: Irq,
}

impl AcpiPm {
    /// Port of the PM1a event block: status, enable (2 bytes each).
    pub const PM1_EVENT: u16 = 0x400;
    /// Port of the PM1a control block (2 bytes).
    pub const PM1_CONTROL: u16 = 0x404;
    /// Port of the PM timer (4 bytes, 32-bit counter).
    pub const PM_TIMER: u16 = 0x408;
    /// Port of the GPE0 block: status, enable (2 bytes each; 16 events).
    pub const GPE0: u16 = 0x40c;
    /// Length of the GPE0 block.
    pub const GPE0_LENGTH: u8 = 4;
    /// SMI command port (the status port follows).
    pub const SMI_COMMAND: u16 = 0xb2;
    /// Value for [`Self::SMI_COMMAND`] that turns ACPI on.
    pub const ACPI_ENABLE: u8 = 0xa0;
    /// Value for [`Self::SMI_COMMAND`] that turns ACPI off.
    pub const ACPI_DISABLE: u8 = 0xa1;
    /// The SCI's ISA interrupt (level-triggered, active high).
    pub const SCI: u8 = 9;
    /// SLP_TYP of S5, for the \\_S5 package.
    pub const S5: u8 = 5;
    /// Frequency of the PM timer in Hz.
    pub const TIMER_HZ: u64 = 3_579_545;

    /// `sci` is the system control interrupt.
    pub fn new(sci: Irq) -> Self {
        Self { _sci: sci }
    }

    /// Presses and releases the power button.
    pub fn power_button(&mut self) {}

    /// Raises general-purpose event `event` (0-15).
    pub fn raise_gpe(&mut self, _event: u8) {}

    /// Whether the operating system has taken over ACPI (SCI_EN).
    pub fn enabled(&self) -> bool {
        false
    }
}

/// Port 0xcf9, the PC's reset control register.
#[derive(Debug, Default)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    /// The port: FADT RESET_REG.
    pub const PORT: u16 = 0xcf9;
    /// What to write: FADT RESET_VALUE.
    pub const VALUE: u8 = 0x06;

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
    fn write_register(&mut self, _offset: u64, _width: u8, _value: u64, _now: u64) -> Effect {
        Effect::None
    }
    fn reset(&mut self, _now: u64) {}
}

impl Device for AcpiPm {
    fn name(&self) -> &'static str {
        "acpi-pm"
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(Self::PM1_EVENT, 16, 0), Window::ports(Self::SMI_COMMAND, 2, 16)]
    }
    fn access(&self) -> Access {
        Access::BYTE
    }
    fn read_register(&mut self, _offset: u64, _width: u8, _now: u64) -> u64 {
        0xff
    }
    fn write_register(&mut self, _offset: u64, _width: u8, _value: u64, _now: u64) -> Effect {
        Effect::None
    }
    fn reset(&mut self, _now: u64) {}
}

impl Snapshot for AcpiPm {
    type State = AcpiPmState;
    fn save(&self, _now: u64) -> AcpiPmState {
        AcpiPmState::default()
    }
    fn restore(&mut self, _state: &AcpiPmState, _now: u64) -> Result<(), RestoreError> {
        Ok(())
    }
}
