//! The high-precision event timers (IA-PC HPET 1.0a).

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use serde::{Deserialize, Serialize};
use skep_hv::irq::{Irq, MsiSender};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Saved state of [`Hpet`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HpetState {}

/// The switch that takes IRQ 0 and IRQ 8 from 8254 and RTC while the HPET's legacy replacement is on.
#[derive(Debug, Clone, Default)]
pub struct LegacyGate {
    _replaced: Arc<AtomicBool>,
}

impl LegacyGate {
    /// `line`, cut off while legacy replacement is on.
    pub fn guard(&self, line: Irq) -> Irq {
        line
    }
}

/// Where an HPET's interrupts go.
pub struct HpetLines {
    /// IOAPIC pins by GSI; timers may be routed to those that are `Some`.
    pub gsi: [Option<Irq>; 24],
    /// IRQ 0 and IRQ 8, for legacy replacement.
    pub legacy: [Irq; 2],
    /// Takes messages of timers set to FSB delivery.
    pub msi: Arc<dyn MsiSender>,
}

/// An HPET of three 64-bit timers.
pub struct Hpet {
    _lines: HpetLines,
}

impl Hpet {
    /// Guest physical address of the registers.
    pub const BASE: u64 = 0xfed0_0000;
    /// Frequency of the main counter in Hz.
    pub const HZ: u64 = 10_000_000;
    /// General capabilities, low half (event timer block ID of the ACPI HPET table).
    pub const BLOCK_ID: u32 = 0x8086_a201;

    /// `gate` is the one that guards IRQ 0 of the 8254 and IRQ 8 of the RTC.
    pub fn new(lines: HpetLines, _gate: LegacyGate) -> Self {
        Self { _lines: lines }
    }
}

impl Device for Hpet {
    fn name(&self) -> &'static str {
        "hpet"
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::memory(Self::BASE, 0x400)]
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

impl Snapshot for Hpet {
    type State = HpetState;
    fn save(&self, _now: u64) -> HpetState {
        HpetState::default()
    }
    fn restore(&mut self, _state: &HpetState, _now: u64) -> Result<(), RestoreError> {
        Ok(())
    }
}
