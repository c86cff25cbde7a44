//! The IOAPIC: Intel 82093AA data sheet (290566), with the EOI register of version 0x20 (82801 data sheets).

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skep_hv::irq::{MsiMessage, MsiSender};

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window, ones};

/// Redirection-table entry (§3.2.4).
mod entry {
    pub(super) const VECTOR: u64 = 0xff;
    pub(super) const MODE: u64 = 7 << 8;
    pub(super) const LOGICAL: u64 = 1 << 11;
    pub(super) const ACTIVE_LOW: u64 = 1 << 13;
    pub(super) const REMOTE_IRR: u64 = 1 << 14;
    pub(super) const LEVEL: u64 = 1 << 15;
    pub(super) const MASKED: u64 = 1 << 16;
    pub(super) const DESTINATION: u64 = 0xff << 56;
    /// All but delivery status, remote IRR and the reserved bits.
    pub(super) const WRITABLE: u64 = VECTOR | MODE | LOGICAL | ACTIVE_LOW | LEVEL | MASKED | DESTINATION;
}

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// Version 0x20, highest entry 23.
const VERSION: u32 = (IoApic::PINS as u32 - 1) << 16 | 0x20;

/// Saved state of [`IoApic`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    select: u8,
    id: u8,
    entries: [u64; IoApic::PINS as usize],
    /// Electrical levels, a bit per pin.
    pins: u32,
}

/// An IOAPIC of 24 pins.
pub struct IoApic {
    msi: Arc<dyn MsiSender>,
    state: IoApicState,
}

impl IoApic {
    /// Guest physical address of the register page.
    pub const BASE: u64 = 0xfec0_0000;
    /// Number of pins.
    pub const PINS: u8 = 24;
    /// Offset of the EOI register.
    pub const EOI: u64 = 0x40;

    /// `msi` takes the messages. Every pin is low and masked.
    pub fn new(msi: Arc<dyn MsiSender>) -> Self {
        let entries = [entry::MASKED; Self::PINS as usize];
        Self { msi, state: IoApicState { select: 0, id: 0, entries, pins: 0 } }
    }

    /// Drives input `pin` to an electrical level.
    pub fn set_pin(&mut self, pin: u8, high: bool) {
        let Some(&redirection) = self.state.entries.get(usize::from(pin)) else { return };
        let bit = 1 << pin;
        if (self.state.pins & bit != 0) == high {
            return;
        }
        self.state.pins ^= bit;
        if level_triggered(redirection) {
            self.sample(pin);
        } else if self.active(pin) && redirection & entry::MASKED == 0 {
            // Edges at a masked pin are lost (§3.2.4, interrupt mask).
            self.msi.send(message(redirection));
        }
    }

    /// Whether `pin` is at its active level.
    fn active(&self, pin: u8) -> bool {
        let low = self.state.entries[usize::from(pin)] & entry::ACTIVE_LOW != 0;
        (self.state.pins >> pin & 1 != 0) != low
    }

    /// Sends the interrupt of a level-triggered pin, if it is active and none is in service.
    fn sample(&mut self, pin: u8) {
        let active = self.active(pin);
        let redirection = &mut self.state.entries[usize::from(pin)];
        if active && level_triggered(*redirection) && *redirection & (entry::MASKED | entry::REMOTE_IRR) == 0
        {
            *redirection |= entry::REMOTE_IRR;
            self.msi.send(message(*redirection));
        }
    }

    /// The pins, a bit each, whose level-triggered interrupt with this vector is in service.
    pub fn in_service(&self, vector: u8) -> u32 {
        let serves = |redirection: &u64| {
            redirection & entry::REMOTE_IRR != 0 && (redirection & entry::VECTOR) as u8 == vector
        };
        let entries = (0..).zip(&self.state.entries);
        entries.filter(|(_, redirection)| serves(redirection)).fold(0, |pins, (pin, _)| pins | 1 << pin)
    }

    /// A level-triggered interrupt with this vector has ended: pins that are still active send again.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        let pins = self.in_service(vector);
        for pin in (0..Self::PINS).filter(|pin| pins >> pin & 1 != 0) {
            self.state.entries[usize::from(pin)] &= !entry::REMOTE_IRR;
            self.sample(pin);
        }
    }

    fn read_window(&self) -> u32 {
        match self.state.select {
            0x00 | 0x02 => u32::from(self.state.id) << 24,
            0x01 => VERSION,
            select @ 0x10.. => {
                let redirection =
                    self.state.entries.get(usize::from((select - 0x10) / 2)).copied().unwrap_or(0);
                if select & 1 == 0 { redirection as u32 } else { (redirection >> 32) as u32 }
            }
            _ => 0,
        }
    }

    fn write_window(&mut self, value: u32) {
        match self.state.select {
            0x00 => self.state.id = (value >> 24) as u8 & 0xf,
            select @ 0x10.. => {
                let pin = (select - 0x10) / 2;
                let Some(redirection) = self.state.entries.get_mut(usize::from(pin)) else { return };
                let old = *redirection;
                let new = if select & 1 == 0 {
                    old & !0xffff_ffff | u64::from(value)
                } else {
                    old & 0xffff_ffff | u64::from(value) << 32
                };
                *redirection = new & entry::WRITABLE;
                self.msi.announce_pin(pin, ending(new));
                // Remote IRR means nothing to an edge-triggered pin: going there and back clears it, which is
                // how an interrupt is ended at IOAPICs without an EOI register.
                if level_triggered(new) {
                    *redirection |= old & entry::REMOTE_IRR;
                    self.sample(pin);
                }
            }
            _ => {}
        }
    }
}

/// Only fixed and lowest-priority interrupts can be level-triggered; the others are edges whatever is programmed.
fn level_triggered(redirection: u64) -> bool {
    redirection & entry::LEVEL != 0 && redirection & entry::MODE <= 1 << 8
}

/// The message of a redirection entry (SDM vol. 3A §11.11).
fn message(redirection: u64) -> MsiMessage {
    let logical = redirection & entry::LOGICAL != 0;
    let address = 0xfee0_0000 | redirection >> 56 << 12 | u64::from(logical) << 2;
    let mut data = (redirection & (entry::VECTOR | entry::MODE)) as u32;
    if level_triggered(redirection) {
        data |= 1 << 15 | 1 << 14;
    }
    MsiMessage { address, data }
}

/// The message whose end of interrupt this pin waits for: also while it is masked, since one may be in service.
fn ending(redirection: u64) -> Option<MsiMessage> {
    level_triggered(redirection).then(|| message(redirection))
}

impl Device for IoApic {
    fn name(&self) -> &'static str {
        "ioapic"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::memory(Self::BASE, 0x1000)]
    }

    fn access(&self) -> Access {
        Access { min: 1, max: 4 }
    }

    fn read_register(&mut self, offset: u64, width: u8, _now: u64) -> u64 {
        let value = match offset & !3 {
            SELECT => self.state.select.into(),
            WINDOW => self.read_window(),
            _ => 0,
        };
        u64::from(value) >> ((offset & 3) * 8) & ones(width)
    }

    fn write_register(&mut self, offset: u64, width: u8, value: u64, _now: u64) -> Effect {
        match (offset, width) {
            (SELECT, _) => self.state.select = value as u8,
            (WINDOW, 4) => self.write_window(value as u32),
            (Self::EOI, _) => self.end_of_interrupt(value as u8),
            _ => {}
        }
        Effect::None
    }

    fn reset(&mut self, _now: u64) {
        let pins = self.state.pins;
        let entries = [entry::MASKED; Self::PINS as usize];
        self.state = IoApicState { select: 0, id: 0, entries, pins };
        (0..Self::PINS).for_each(|pin| self.msi.announce_pin(pin, None));
    }
}

impl Snapshot for IoApic {
    type State = IoApicState;

    fn save(&self, _now: u64) -> IoApicState {
        self.state.clone()
    }

    fn restore(&mut self, state: &IoApicState, _now: u64) -> Result<(), RestoreError> {
        let readable = entry::WRITABLE | entry::REMOTE_IRR;
        if state.entries.iter().any(|redirection| redirection & !readable != 0)
            || state.pins >> Self::PINS != 0
        {
            return Err(RestoreError { device: "ioapic", what: "reserved bits are set" });
        }
        self.state = state.clone();
        for (pin, &redirection) in (0..).zip(&self.state.entries) {
            self.msi.announce_pin(pin, ending(redirection));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Messages;

    fn ioapic() -> (IoApic, Arc<Messages>) {
        let messages = Arc::new(Messages::default());
        (IoApic::new(messages.clone()), messages)
    }

    fn program(ioapic: &mut IoApic, pin: u8, redirection: u64) {
        for half in 0..2 {
            let _ = ioapic.write(SELECT, 4, u64::from(0x10 + 2 * pin + half), 0);
            let _ = ioapic.write(WINDOW, 4, redirection >> (32 * half) & 0xffff_ffff, 0);
        }
    }

    fn read_low(ioapic: &mut IoApic, pin: u8) -> u64 {
        let _ = ioapic.write(SELECT, 4, u64::from(0x10 + 2 * pin), 0);
        ioapic.read(WINDOW, 4, 0)
    }

    #[test]
    fn identification() {
        let (mut ioapic, _) = ioapic();
        let _ = ioapic.write(SELECT, 4, 1, 0);
        assert_eq!(ioapic.read(WINDOW, 4, 0), 0x0017_0020);
        let _ = ioapic.write(SELECT, 1, 0, 0);
        let _ = ioapic.write(WINDOW, 4, 0xff00_0000, 0);
        assert_eq!(ioapic.read(WINDOW, 4, 0), 0x0f00_0000);
        assert_eq!(ioapic.read(WINDOW + 3, 1, 0), 0x0f);
    }

    #[test]
    fn edge_sends_once_per_rising_edge() {
        let (mut ioapic, messages) = ioapic();
        program(&mut ioapic, 4, 3 << 56 | 1 << 11 | 0x31);
        for high in [true, true, false, true] {
            ioapic.set_pin(4, high);
        }
        let expected = MsiMessage { address: 0xfee0_3004, data: 0x31 };
        assert_eq!(messages.take(), [expected, expected]);
    }

    #[test]
    fn masked_edges_are_lost() {
        let (mut ioapic, messages) = ioapic();
        program(&mut ioapic, 4, entry::MASKED | 0x31);
        ioapic.set_pin(4, true);
        program(&mut ioapic, 4, 0x31);
        assert_eq!(messages.take(), []);
    }

    #[test]
    fn level_waits_for_eoi_and_sends_again_while_active() {
        let (mut ioapic, messages) = ioapic();
        program(&mut ioapic, 9, entry::LEVEL | 0x41);
        ioapic.set_pin(9, true);
        let expected = MsiMessage { address: 0xfee0_0000, data: 0xc041 };
        assert_eq!(messages.take(), [expected]);
        assert_eq!(read_low(&mut ioapic, 9) & entry::REMOTE_IRR, entry::REMOTE_IRR);
        ioapic.set_pin(9, false);
        ioapic.set_pin(9, true);
        assert_eq!(messages.take(), []);
        ioapic.end_of_interrupt(0x40);
        assert_eq!(messages.take(), []);
        ioapic.end_of_interrupt(0x41);
        assert_eq!(messages.take(), [expected]);
        ioapic.set_pin(9, false);
        let _ = ioapic.write(IoApic::EOI, 4, 0x41, 0);
        assert_eq!(messages.take(), []);
        assert_eq!(read_low(&mut ioapic, 9) & entry::REMOTE_IRR, 0);
    }

    #[test]
    fn masked_level_is_sent_when_unmasked() {
        let (mut ioapic, messages) = ioapic();
        program(&mut ioapic, 9, entry::MASKED | entry::LEVEL | 0x41);
        ioapic.set_pin(9, true);
        assert_eq!(messages.take(), []);
        program(&mut ioapic, 9, entry::LEVEL | 0x41);
        assert_eq!(messages.take().len(), 1);
    }

    #[test]
    fn polarity_inverts() {
        let (mut ioapic, messages) = ioapic();
        ioapic.set_pin(16, true);
        program(&mut ioapic, 16, entry::LEVEL | entry::ACTIVE_LOW | 0x51);
        assert_eq!(messages.take(), []);
        ioapic.set_pin(16, false);
        assert_eq!(messages.take().len(), 1);
        let (mut ioapic, messages) = self::ioapic();
        program(&mut ioapic, 3, entry::ACTIVE_LOW | 0x51);
        ioapic.set_pin(3, true);
        assert_eq!(messages.take(), []);
        ioapic.set_pin(3, false);
        assert_eq!(messages.take().len(), 1);
    }

    #[test]
    fn switching_to_edge_clears_remote_irr() {
        let (mut ioapic, messages) = ioapic();
        program(&mut ioapic, 9, entry::LEVEL | 0x41);
        ioapic.set_pin(9, true);
        messages.take();
        program(&mut ioapic, 9, entry::MASKED | 0x41);
        program(&mut ioapic, 9, entry::LEVEL | 0x41);
        assert_eq!(messages.take().len(), 1);
    }

    #[test]
    fn special_modes_are_edges() {
        let (mut ioapic, messages) = ioapic();
        program(&mut ioapic, 0, entry::LEVEL | 7 << 8);
        ioapic.set_pin(0, true);
        assert_eq!(messages.take(), [MsiMessage { address: 0xfee0_0000, data: 0x700 }]);
        assert_eq!(read_low(&mut ioapic, 0) & entry::REMOTE_IRR, 0);
    }

    #[test]
    fn read_only_bits_do_not_stick() {
        let (mut ioapic, _) = ioapic();
        program(&mut ioapic, 5, u64::MAX);
        assert_eq!(read_low(&mut ioapic, 5), 0x1_afff);
        assert_eq!(
            {
                let _ = ioapic.write(SELECT, 4, 0x1b, 0);
                ioapic.read(WINDOW, 4, 0)
            },
            0xff00_0000
        );
    }

    #[test]
    fn entries_beyond_the_last_do_not_exist() {
        let (mut ioapic, messages) = ioapic();
        program(&mut ioapic, 24, 0x31);
        assert_eq!(read_low(&mut ioapic, 24), 0);
        ioapic.set_pin(24, true);
        ioapic.set_pin(255, true);
        assert_eq!(messages.take(), []);
    }
}
