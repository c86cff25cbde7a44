//! The real-time clock and CMOS memory (Motorola MC146818).

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};
use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

/// Saved state of [`Rtc`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RtcState {}

/// What an RTC shows at power-on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RtcConfig {
    /// Time of day: nanoseconds since 1970-01-01 00:00 in the zone the guest is to see (UTC, or local time).
    pub time: i64,
    /// Guest memory below 4 GiB in bytes, from address 0.
    pub memory_below_4g: u64,
    /// Guest memory above 4 GiB in bytes.
    pub memory_above_4g: u64,
}

/// An MC146818 with 128 bytes, and its IRQ 8.
pub struct Rtc {
    _irq8: Irq,
}

impl Rtc {
    /// `irq8` is the IRQ output (give it [`crate::LegacyGate::guard`]ed if there is an HPET).
    pub fn new(_config: RtcConfig, irq8: Irq, _now: u64) -> Self {
        Self { _irq8: irq8 }
    }

    /// Sets the clock, as in [`RtcConfig::time`].
    pub fn set_time(&mut self, _time: i64, _now: u64) {}

    /// The clock's time, as in [`RtcConfig::time`].
    pub fn time(&self, _now: u64) -> i64 {
        0
    }
}

impl Device for Rtc {
    fn name(&self) -> &'static str {
        "rtc"
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(0x70, 2, 0)]
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

impl Snapshot for Rtc {
    type State = RtcState;
    fn save(&self, _now: u64) -> RtcState {
        RtcState::default()
    }
    fn restore(&mut self, _state: &RtcState, _now: u64) -> Result<(), RestoreError> {
        Ok(())
    }
}
