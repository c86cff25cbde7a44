//! The pair of 8259A interrupt controllers (Intel 231468) with the edge/level control registers of ISA bridges
//! (82371 data sheet §4.1.6).

use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};

/// Which initialisation word comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum Expect {
    #[default]
    Operation,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Pic {
    /// Levels of the inputs.
    lines: u8,
    /// Interrupt request, mask and in-service registers.
    irr: u8,
    imr: u8,
    isr: u8,
    /// Inputs that are level-triggered (ELCR).
    elcr: u8,
    /// ICW1: all inputs are level-triggered.
    level_mode: bool,
    /// ICW1: no cascade, ICW3 is left out.
    single: bool,
    /// ICW1: ICW4 follows.
    icw4_follows: bool,
    expect: Expect,
    /// ICW2: vector of input 0.
    base: u8,
    /// ICW4.
    auto_eoi: bool,
    special_fully_nested: bool,
    /// OCW2: the input with the lowest priority, and whether it rotates at automatic EOIs.
    lowest: u8,
    rotate_auto: bool,
    /// OCW3.
    special_mask: bool,
    read_isr: bool,
    poll: bool,
}

impl Pic {
    /// As after RESET#; inputs and ELCR wiring stay for the caller to say.
    fn new(lines: u8) -> Self {
        Self { lines, lowest: 7, ..Self::default() }
    }

    fn level(&self) -> u8 {
        if self.level_mode { 0xff } else { self.elcr }
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        let was = self.lines & bit != 0;
        self.lines = if high { self.lines | bit } else { self.lines & !bit };
        if self.level() & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if high && !was {
            // The request stays latched when the input falls again: sources here make short pulses.
            self.irr |= bit;
        }
    }

    /// The input in `set` with the highest priority, and its distance from the top.
    fn first(&self, set: u8) -> Option<(u8, u8)> {
        let top = self.lowest.wrapping_add(1) & 7;
        let rotated = set.rotate_right(u32::from(top));
        (rotated != 0).then(|| {
            let rank = rotated.trailing_zeros() as u8;
            (rank, (top + rank) & 7)
        })
    }

    /// The input that INT stands for now.
    fn pending(&self, cascade: u8) -> Option<u8> {
        let (rank, input) = self.first(self.irr & !self.imr)?;
        let mut blocking = self.isr;
        if self.special_mask {
            blocking &= !self.imr;
        }
        if self.special_fully_nested {
            blocking &= !cascade;
        }
        self.first(blocking).is_none_or(|(in_service, _)| rank < in_service).then_some(input)
    }

    /// INTA for `input`.
    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level() & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_auto {
            self.lowest = input;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1 (figure 7): the edge-sense circuit, mask, priorities, special mask and ICW4 are reset.
            *self = Self {
                lines: self.lines,
                elcr: self.elcr,
                base: self.base,
                level_mode: value & 8 != 0,
                single: value & 2 != 0,
                icw4_follows: value & 1 != 0,
                expect: Expect::Icw2,
                ..Self::new(self.lines)
            };
            self.irr = self.lines & self.level();
        } else if value & 8 != 0 {
            // OCW3.
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        let (rotate, specific, eoi) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        if eoi {
            // A non-specific EOI passes over masked inputs in special mask mode.
            let candidates = if self.special_mask { self.isr & !self.imr } else { self.isr };
            let ended = if specific { Some(named) } else { self.first(candidates).map(|(_, input)| input) };
            if let Some(input) = ended {
                self.isr &= !(1 << input);
                if rotate {
                    self.lowest = input;
                }
            }
        } else if specific {
            if rotate {
                self.lowest = named;
            }
        } else {
            self.rotate_auto = rotate;
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.expect {
            Expect::Operation => self.imr = value,
            Expect::Icw2 => {
                self.base = value & 0xf8;
                self.expect = match (self.single, self.icw4_follows) {
                    (false, _) => Expect::Icw3,
                    (true, true) => Expect::Icw4,
                    (true, false) => Expect::Operation,
                };
            }
            // The cascade is wired, whatever ICW3 says.
            Expect::Icw3 => self.expect = if self.icw4_follows { Expect::Icw4 } else { Expect::Operation },
            Expect::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.expect = Expect::Operation;
            }
        }
    }

    fn write_elcr(&mut self, value: u8, wired: u8) {
        self.elcr = value & wired;
        self.irr = self.irr & !self.elcr | self.lines & self.elcr;
    }

    fn valid(&self, wired: u8) -> bool {
        self.lowest < 8 && self.base & 7 == 0 && self.elcr & !wired == 0
    }
}

/// The master input that the slave's INT drives.
const CASCADE: u8 = 2;
/// Inputs that may be level-triggered: not timer, keyboard and cascade; not RTC and FPU error.
const MASTER_ELCR: u8 = 0xf8;
const SLAVE_ELCR: u8 = 0xde;

/// Saved state of [`PicPair`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicPairState {
    master: Pic,
    slave: Pic,
}

/// Two 8259A in cascade.
pub struct PicPair {
    intr: Irq,
    output: bool,
    master: Pic,
    slave: Pic,
}

impl PicPair {
    /// `intr` is driven by the INTR output.
    pub fn new(intr: Irq) -> Self {
        Self { intr, output: false, master: Pic::new(0), slave: Pic::new(0) }
    }

    /// Drives input `irq` (0-15; 2 is the cascade and is not connected).
    pub fn set_line(&mut self, irq: u8, high: bool) {
        match irq {
            CASCADE => return,
            0..8 => self.master.set_line(irq, high),
            8..16 => self.slave.set_line(irq - 8, high),
            _ => return,
        }
        self.update();
    }

    /// Whether INTR is asserted.
    pub fn output(&self) -> bool {
        self.output
    }

    /// Brings the cascade and INTR up to date.
    fn update(&mut self) {
        let cascade = self.slave.pending(0).is_some();
        self.master.set_line(CASCADE, cascade);
        if !cascade {
            // Unlike the other inputs' pulses, a slave's request that has gone is no request.
            self.master.irr &= !(1 << CASCADE);
        }
        let output = self.master.pending(1 << CASCADE).is_some();
        if output != self.output {
            self.output = output;
            self.intr.set(output);
        }
    }

    /// INTA: the vector of the interrupt with the highest priority, or a spurious one (input 7).
    pub fn acknowledge(&mut self) -> u8 {
        // INT falls with INTA and may rise again at once: edge-triggered listeners see both.
        if self.output {
            self.output = false;
            self.intr.set(false);
        }
        let vector = match self.master.pending(1 << CASCADE) {
            Some(CASCADE) => {
                let input = self.slave.pending(0);
                if let Some(input) = input {
                    self.slave.acknowledge(input);
                }
                // The slave's INT falls with INTA, so that the next one is an edge at the master.
                self.master.set_line(CASCADE, false);
                self.master.acknowledge(CASCADE);
                self.slave.base | input.unwrap_or(7)
            }
            Some(input) => {
                self.master.acknowledge(input);
                self.master.base | input
            }
            None => self.master.base | 7,
        };
        self.update();
        vector
    }

    /// A read of a chip in poll mode: INTA by register (figure 10, poll command).
    fn poll(&mut self, slave: bool) -> u8 {
        let pending = if slave { self.slave.pending(0) } else { self.master.pending(1 << CASCADE) };
        let chip = if slave { &mut self.slave } else { &mut self.master };
        chip.poll = false;
        let Some(input) = pending else { return 0 };
        chip.acknowledge(input);
        if slave {
            self.master.set_line(CASCADE, false);
        }
        self.update();
        0x80 | input
    }
}

impl Device for PicPair {
    fn name(&self) -> &'static str {
        "pic"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(0x20, 2, 0), Window::ports(0xa0, 2, 2), Window::ports(0x4d0, 2, 4)]
    }

    fn access(&self) -> Access {
        Access::BYTE
    }

    fn read_register(&mut self, offset: u64, _width: u8, _now: u64) -> u64 {
        let chip = if offset & 2 == 0 { &self.master } else { &self.slave };
        let value = match offset {
            0..4 if chip.poll => self.poll(offset & 2 != 0),
            0 | 2 if chip.read_isr => chip.isr,
            0 | 2 => chip.irr,
            1 | 3 => chip.imr,
            4 => self.master.elcr,
            5 => self.slave.elcr,
            _ => 0xff,
        };
        value.into()
    }

    fn write_register(&mut self, offset: u64, _width: u8, value: u64, _now: u64) -> Effect {
        let value = value as u8;
        match offset {
            0 => self.master.write_command(value),
            1 => self.master.write_data(value),
            2 => self.slave.write_command(value),
            3 => self.slave.write_data(value),
            4 => self.master.write_elcr(value, MASTER_ELCR),
            5 => self.slave.write_elcr(value, SLAVE_ELCR),
            _ => {}
        }
        self.update();
        Effect::None
    }

    fn reset(&mut self, _now: u64) {
        self.master = Pic::new(self.master.lines);
        self.slave = Pic::new(self.slave.lines);
        self.update();
    }
}

impl Snapshot for PicPair {
    type State = PicPairState;

    fn save(&self, _now: u64) -> PicPairState {
        PicPairState { master: self.master, slave: self.slave }
    }

    fn restore(&mut self, state: &PicPairState, _now: u64) -> Result<(), RestoreError> {
        if !state.master.valid(MASTER_ELCR) || !state.slave.valid(SLAVE_ELCR) {
            return Err(RestoreError { device: "pic", what: "a register holds what it cannot" });
        }
        (self.master, self.slave) = (state.master, state.slave);
        self.update();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::Line;

    /// A pair as Linux sets it up: vectors 0x30 and 0x38, nothing masked.
    fn pair(icw4: u8) -> (PicPair, Arc<Line>) {
        let line = Arc::new(Line::default());
        let mut pair = PicPair::new(line.clone());
        for (port, value) in
            [(0, 0x11), (1, 0x30), (1, 4), (1, icw4), (2, 0x11), (3, 0x38), (3, 2), (3, icw4)]
        {
            out(&mut pair, port, value);
        }
        (pair, line)
    }

    fn out(pair: &mut PicPair, offset: u64, value: u8) {
        assert_eq!(pair.write(offset, 1, value.into(), 0), Effect::None);
    }

    #[test]
    fn vectors_of_both_chips() {
        let (mut pair, intr) = pair(1);
        pair.set_line(1, true);
        assert!(intr.high());
        assert_eq!(pair.acknowledge(), 0x31);
        assert!(!intr.high());
        pair.set_line(8, true);
        assert!(!intr.high(), "lower priority than the one in service");
        out(&mut pair, 0, 0x20);
        assert!(intr.high());
        assert_eq!(pair.acknowledge(), 0x38);
        assert_eq!((pair.read(0, 1, 0), pair.read(2, 1, 0)), (0, 0));
        out(&mut pair, 0, 0x0b);
        out(&mut pair, 2, 0x0b);
        assert_eq!((pair.read(0, 1, 0), pair.read(2, 1, 0)), (4, 1));
    }

    #[test]
    fn a_higher_priority_interrupts_a_lower_one() {
        let (mut pair, intr) = pair(1);
        pair.set_line(4, true);
        assert_eq!(pair.acknowledge(), 0x34);
        pair.set_line(1, true);
        assert!(intr.high());
        assert_eq!(pair.acknowledge(), 0x31);
        out(&mut pair, 0, 0x20); // ends 1
        out(&mut pair, 0, 0x0b);
        assert_eq!(pair.read(0, 1, 0), 0x10);
    }

    #[test]
    fn second_slave_interrupt_waits_for_master_unless_fully_nested() {
        let (mut pair, intr) = self::pair(1);
        pair.set_line(15, true);
        assert_eq!(pair.acknowledge(), 0x3f);
        pair.set_line(8, true);
        assert!(!intr.high());
        let (mut pair, intr) = self::pair(0x11);
        pair.set_line(15, true);
        assert_eq!(pair.acknowledge(), 0x3f);
        pair.set_line(8, true);
        assert!(intr.high());
        assert_eq!(pair.acknowledge(), 0x38);
    }

    #[test]
    fn masks_hold_back_and_release() {
        let (mut pair, intr) = pair(1);
        out(&mut pair, 1, 0xff);
        pair.set_line(0, true);
        pair.set_line(0, false);
        assert!(!intr.high());
        assert_eq!(pair.read(0, 1, 0), 1, "the edge is latched");
        out(&mut pair, 1, 0xfe);
        assert!(intr.high());
        assert_eq!(pair.read(1, 1, 0), 0xfe);
    }

    #[test]
    fn spurious_interrupts_are_input_seven_and_leave_no_service_bit() {
        let (mut pair, _) = pair(1);
        assert_eq!(pair.acknowledge(), 0x37);
        out(&mut pair, 4, 0x20); // IRQ 5 level-triggered
        pair.set_line(5, true);
        pair.set_line(5, false);
        assert_eq!(pair.acknowledge(), 0x37);
        out(&mut pair, 0, 0x0b);
        assert_eq!(pair.read(0, 1, 0), 0);
    }

    #[test]
    fn level_triggered_inputs_request_until_low() {
        let (mut pair, intr) = pair(1);
        out(&mut pair, 5, 0xff);
        assert_eq!(pair.read(5, 1, 0), 0xde);
        pair.set_line(10, true);
        assert_eq!(pair.acknowledge(), 0x3a);
        out(&mut pair, 2, 0x20);
        out(&mut pair, 0, 0x20);
        assert!(intr.high());
        pair.set_line(10, false);
        assert!(!intr.high());
    }

    #[test]
    fn automatic_eoi_and_its_rotation() {
        let (mut pair, _) = pair(3);
        out(&mut pair, 0, 0x80); // rotate in automatic EOI
        pair.set_line(0, true);
        pair.set_line(1, true);
        assert_eq!(pair.acknowledge(), 0x30);
        pair.set_line(0, false);
        pair.set_line(0, true);
        assert_eq!(pair.acknowledge(), 0x31, "0 has become the lowest");
        assert_eq!(pair.acknowledge(), 0x30);
        out(&mut pair, 0, 0x0b);
        assert_eq!(pair.read(0, 1, 0), 0);
    }

    #[test]
    fn priorities_can_be_set_and_rotate() {
        let (mut pair, _) = pair(1);
        out(&mut pair, 0, 0xc4); // 4 is the lowest: 5 is the highest
        for irq in [0, 4, 5] {
            pair.set_line(irq, true);
        }
        assert_eq!(pair.acknowledge(), 0x35);
        out(&mut pair, 0, 0xe5); // rotate on specific EOI of 5
        assert_eq!(pair.acknowledge(), 0x30);
        out(&mut pair, 0, 0xa0); // rotate on non-specific EOI
        assert_eq!(pair.acknowledge(), 0x34);
    }

    #[test]
    fn special_mask_lets_lower_priorities_through() {
        let (mut pair, intr) = pair(1);
        pair.set_line(1, true);
        assert_eq!(pair.acknowledge(), 0x31);
        pair.set_line(4, true);
        assert!(!intr.high());
        out(&mut pair, 1, 0x02);
        out(&mut pair, 0, 0x68);
        assert!(intr.high());
        assert_eq!(pair.acknowledge(), 0x34);
        out(&mut pair, 0, 0x20); // ends 4, not the masked 1
        out(&mut pair, 0, 0x0b);
        assert_eq!(pair.read(0, 1, 0), 2);
    }

    #[test]
    fn poll_acknowledges() {
        let (mut pair, intr) = pair(1);
        pair.set_line(3, true);
        out(&mut pair, 0, 0x0c);
        assert_eq!(pair.read(0, 1, 0), 0x83);
        assert!(!intr.high());
        out(&mut pair, 0, 0x0c);
        assert_eq!(pair.read(0, 1, 0), 0);
    }

    #[test]
    fn initialisation_clears_mask_and_requests() {
        let (mut pair, intr) = pair(1);
        pair.set_line(3, true);
        out(&mut pair, 1, 0x55);
        out(&mut pair, 0, 0x13); // single, ICW4
        out(&mut pair, 1, 0x40);
        out(&mut pair, 1, 0x01); // straight to ICW4
        assert_eq!(pair.read(1, 1, 0), 0);
        assert!(!intr.high(), "an edge has to come anew");
        pair.set_line(3, false);
        pair.set_line(3, true);
        assert_eq!(pair.acknowledge(), 0x43);
    }
}
