//! The mouse (IBM PS/2 Technical Reference, "Auxiliary Device"): two axes, three buttons, three-byte packets.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const TEST_PASSED: u8 = 0xaa;
/// A plain mouse.
const IDENTITY: u8 = 0x00;

/// Bytes of packets that wait to be sent at most.
const PACKETS: usize = 48;
/// Answers that wait to be sent at most; a command gets four.
const ANSWERS: usize = 8;

/// A mouse's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mouse {
    answers: VecDeque<u8>,
    packets: VecDeque<u8>,
    command: Option<u8>,
    last_sent: u8,
    reporting: bool,
    remote: bool,
    /// Everything is echoed.
    wrap: bool,
    /// Scaling 2:1.
    scaled: bool,
    resolution: u8,
    rate: u8,
    /// Movement that no packet has told of; right and up are positive.
    dx: i32,
    dy: i32,
    buttons: u8,
}

impl Mouse {
    /// After power-on.
    pub(super) fn new() -> Self {
        Self {
            answers: VecDeque::with_capacity(ANSWERS),
            packets: VecDeque::with_capacity(PACKETS),
            command: None,
            last_sent: 0,
            reporting: false,
            remote: false,
            wrap: false,
            scaled: false,
            resolution: 2,
            rate: 100,
            dx: 0,
            dy: 0,
            buttons: 0,
        }
    }

    /// Moves the mouse and sets its buttons.
    pub(super) fn push(&mut self, dx: i32, dy: i32, buttons: u8) {
        // Far more than any screen; keeps the sums in range.
        let add = |sum: i32, delta: i32| sum.saturating_add(delta).clamp(-0xffff, 0xffff);
        (self.dx, self.dy) = (add(self.dx, dx), add(self.dy, dy));
        let mut changed = self.buttons != buttons & 7;
        self.buttons = buttons & 7;
        if !self.reporting || self.remote || self.wrap {
            return;
        }
        while (changed || self.dx != 0 || self.dy != 0) && self.packets.len() + 3 <= PACKETS {
            let packet = self.packet();
            self.packets.extend(packet);
            changed = false;
        }
    }

    /// A packet of as much movement as one can tell of.
    fn packet(&mut self) -> [u8; 3] {
        let (dx, dy) = (self.dx.clamp(-255, 255), self.dy.clamp(-255, 255));
        self.dx -= dx;
        self.dy -= dy;
        let signs = u8::from(dx < 0) << 4 | u8::from(dy < 0) << 5;
        [8 | self.buttons | signs, dx as u8, dy as u8]
    }

    /// The next byte for the controller.
    pub(super) fn pop(&mut self) -> Option<u8> {
        let byte = self.answers.pop_front().or_else(|| self.packets.pop_front())?;
        if byte != RESEND {
            self.last_sent = byte;
        }
        Some(byte)
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.answers.len() + bytes.len() <= ANSWERS {
            self.answers.extend(bytes);
        }
    }

    fn defaults(&mut self) {
        *self = Self { last_sent: self.last_sent, buttons: self.buttons, ..Self::new() };
    }

    /// A byte from the controller.
    pub(super) fn write(&mut self, byte: u8) {
        self.answers.clear();
        if self.wrap && byte != 0xec && byte != 0xff {
            return self.answer(&[byte]);
        }
        match self.command.take() {
            Some(0xe8) => {
                self.resolution = byte & 3;
                return self.answer(&[ACK]);
            }
            Some(_) => {
                self.rate = byte;
                return self.answer(&[ACK]);
            }
            None => {}
        }
        if byte != 0xfe && byte != 0xeb {
            // A command ends the packet under way.
            self.packets.clear();
        }
        match byte {
            0xe6 | 0xe7 => self.scaled = byte == 0xe7,
            // Resolution, sample rate: an argument follows.
            0xe8 | 0xf3 => self.command = Some(byte),
            0xe9 => {
                let mode =
                    u8::from(self.remote) << 6 | u8::from(self.reporting) << 5 | u8::from(self.scaled) << 4;
                // Here the order is left, middle, right.
                let pressed = |button: u8| self.buttons >> button & 1;
                let buttons = pressed(0) << 2 | pressed(2) << 1 | pressed(1);
                return self.answer(&[ACK, mode | buttons, self.resolution, self.rate]);
            }
            0xea => self.remote = false,
            0xeb => {
                let [status, x, y] = self.packet();
                return self.answer(&[ACK, status, x, y]);
            }
            0xec => self.wrap = false,
            0xee => self.wrap = true,
            0xf0 => self.remote = true,
            0xf2 => return self.answer(&[ACK, IDENTITY]),
            0xf4 => self.reporting = true,
            0xf5 => self.reporting = false,
            0xf6 => self.defaults(),
            0xfe => return self.answer(&[self.last_sent]),
            0xff => {
                self.defaults();
                return self.answer(&[ACK, TEST_PASSED, IDENTITY]);
            }
            _ => return self.answer(&[RESEND]),
        }
        self.answer(&[ACK]);
    }

    /// Whether a saved mouse is one.
    pub(super) fn valid(&self) -> bool {
        let near = |sum: i32| sum.unsigned_abs() <= 0xffff;
        self.answers.len() <= ANSWERS && self.packets.len() <= PACKETS && near(self.dx) && near(self.dy)
    }
}
