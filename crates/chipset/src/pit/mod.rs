//! The 8254 programmable interval timer (Intel 231164) and port 0x61, by which a PC reaches its third counter.

mod channel;
#[cfg(test)]
mod tests;

use channel::Channel;
use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};

/// Port 0x61 (82371 data sheet, NMI status and control): GATE and output enable of counter 2 and two bits of ours.
mod speaker {
    pub(super) const GATE: u8 = 1;
    pub(super) const WRITABLE: u8 = 0x0f;
    /// Toggles with every refresh of memory.
    pub(super) const REFRESH: u8 = 0x10;
    pub(super) const OUT: u8 = 0x20;
}

/// Time between two memory refreshes in ns.
const REFRESH_PERIOD: u64 = 15_085;

/// Offset of port 0x61 within the device.
const SPEAKER: u64 = 4;
/// Offset of the control word register, port 0x43.
const CONTROL: u64 = 3;

/// Saved state of [`Pit`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    channels: [Channel; 3],
    speaker: u8,
}

impl PitState {
    fn new() -> Self {
        Self { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], speaker: 0 }
    }

    fn shifted(&self, by: u64) -> Self {
        Self { channels: std::array::from_fn(|i| self.channels[i].shifted(by)), speaker: self.speaker }
    }
}

/// An 8254: counter 0 drives IRQ 0, counter 2 the speaker, counter 1 nothing.
///
/// Periods that pass between two calls of [`Device::advance`] give one interrupt, not several.
pub struct Pit {
    irq0: Irq,
    state: PitState,
}

impl Pit {
    /// Input clock in Hz.
    pub const HZ: u64 = 1_193_182;

    /// `irq0` follows OUT of counter 0 (give it [`crate::LegacyGate::guard`]ed if there is an HPET). No counter runs.
    pub fn new(irq0: Irq) -> Self {
        Self { irq0, state: PitState::new() }
    }

    /// Lets counter 0's edges that have come reach IRQ 0, and drives the line.
    fn settle(&mut self, now: u64) {
        let timer = &mut self.state.channels[0];
        if timer.settle(now) {
            self.irq0.set(false);
            self.irq0.set(true);
        }
        // OUT falls without anyone having to look: only its rising edges are deadlines.
        self.irq0.set(timer.out(now));
    }

    fn read_back(&mut self, command: u8, now: u64) {
        for (index, channel) in self.state.channels.iter_mut().enumerate() {
            if command >> (index + 1) & 1 == 0 {
                continue;
            }
            if command & 0x20 == 0 {
                channel.latch_count(now);
            }
            if command & 0x10 == 0 {
                channel.latch_status(now);
            }
        }
    }
}

impl Device for Pit {
    fn name(&self) -> &'static str {
        "pit"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(0x40, 4, 0), Window::ports(0x61, 1, SPEAKER)]
    }

    fn access(&self) -> Access {
        Access::BYTE
    }

    fn read_register(&mut self, offset: u64, _width: u8, now: u64) -> u64 {
        let value = match offset {
            0..=2 => {
                if offset == 0 {
                    self.settle(now);
                }
                let channel = &mut self.state.channels[offset as usize];
                channel.settle(now);
                channel.read(now)
            }
            SPEAKER => {
                self.state.channels[2].settle(now);
                let refresh = if (now / REFRESH_PERIOD) & 1 != 0 { speaker::REFRESH } else { 0 };
                let out = if self.state.channels[2].out(now) { speaker::OUT } else { 0 };
                self.state.speaker | refresh | out
            }
            // The control word register cannot be read.
            _ => 0xff,
        };
        value.into()
    }

    fn write_register(&mut self, offset: u64, _width: u8, value: u64, now: u64) -> Effect {
        let value = value as u8;
        self.settle(now);
        for channel in &mut self.state.channels[1..] {
            channel.settle(now);
        }
        match (offset, value >> 6) {
            (0..=2, _) => self.state.channels[offset as usize].write(value, now),
            (CONTROL, 3) => self.read_back(value, now),
            (CONTROL, index) => self.state.channels[usize::from(index)].control(value, now),
            (SPEAKER, _) => {
                self.state.speaker = value & speaker::WRITABLE;
                self.state.channels[2].set_gate(value & speaker::GATE != 0, now);
            }
            _ => {}
        }
        self.irq0.set(self.state.channels[0].out(now));
        Effect::None
    }

    fn reset(&mut self, _now: u64) {
        self.state = PitState::new();
        self.irq0.set(false);
    }

    fn next_deadline(&self) -> Option<u64> {
        self.state.channels[0].next_edge()
    }

    fn advance(&mut self, now: u64) {
        self.settle(now);
    }
}

impl Snapshot for Pit {
    type State = PitState;

    fn save(&self, now: u64) -> PitState {
        self.state.shifted(now.wrapping_neg())
    }

    fn restore(&mut self, state: &PitState, now: u64) -> Result<(), RestoreError> {
        let [timer, refresh, tone] = &state.channels;
        let valid = state.channels.iter().all(Channel::valid) && state.speaker & !speaker::WRITABLE == 0;
        let gates = timer.gate() && refresh.gate() && tone.gate() == (state.speaker & speaker::GATE != 0);
        if !valid || !gates {
            return Err(RestoreError { device: "pit", what: "a counter holds what it cannot" });
        }
        self.state = state.shifted(now);
        self.settle(now);
        Ok(())
    }
}
