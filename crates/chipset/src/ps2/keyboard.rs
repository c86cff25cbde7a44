//! The keyboard (IBM PS/2 Technical Reference, "Keyboard"): scan code set 2 on its wire.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Acknowledge, resend, self-test passed, echo.
const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const TEST_PASSED: u8 = 0xaa;
const ECHO: u8 = 0xee;

/// Scan codes that wait to be sent at most; a keyboard has 16 bytes.
const CODES: usize = 16;
/// Answers that wait to be sent at most; a command gets three.
const ANSWERS: usize = 8;

/// A keyboard's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Keyboard {
    /// Answers go before scan codes.
    answers: VecDeque<u8>,
    codes: VecDeque<u8>,
    /// The command whose argument comes next.
    command: Option<u8>,
    last_sent: u8,
    scanning: bool,
    leds: u8,
    set: u8,
}

impl Keyboard {
    /// After power-on.
    pub(super) fn new() -> Self {
        Self {
            answers: VecDeque::with_capacity(ANSWERS),
            codes: VecDeque::with_capacity(CODES),
            command: None,
            last_sent: 0,
            scanning: true,
            leds: 0,
            set: 2,
        }
    }

    /// Feeds scan codes; how many were taken. They are lost while scanning is off.
    pub(super) fn push(&mut self, codes: &[u8]) -> usize {
        if !self.scanning {
            return codes.len();
        }
        let taken = codes.len().min(CODES.saturating_sub(self.codes.len()));
        self.codes.extend(codes.iter().take(taken));
        taken
    }

    /// The next byte for the controller.
    pub(super) fn pop(&mut self) -> Option<u8> {
        let byte = self.answers.pop_front().or_else(|| self.codes.pop_front())?;
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

    fn defaults(&mut self, scanning: bool) {
        self.codes.clear();
        self.scanning = scanning;
        self.set = 2;
    }

    /// A byte from the controller.
    pub(super) fn write(&mut self, byte: u8) {
        // A command supersedes the answer to the one before, and also takes the place of an argument.
        self.answers.clear();
        if let Some(command) = self.command.take().filter(|_| byte < 0x80) {
            return self.argument(command, byte);
        }
        match byte {
            // LEDs, scan code set, typematic rate; key types of set 3: an argument follows.
            0xed | 0xf0 | 0xf3 | 0xfb..=0xfd => {
                self.command = Some(byte);
                self.answer(&[ACK]);
            }
            ECHO => self.answer(&[ECHO]),
            // Identification: an MF2 keyboard.
            0xf2 => self.answer(&[ACK, 0xab, 0x83]),
            0xf4 => {
                self.codes.clear();
                self.scanning = true;
                self.answer(&[ACK]);
            }
            0xf5 | 0xf6 => {
                self.defaults(byte == 0xf6);
                self.answer(&[ACK]);
            }
            // All keys typematic, make-break and so on, of set 3.
            0xf7..=0xfa => self.answer(&[ACK]),
            0xfe => self.answer(&[self.last_sent]),
            0xff => {
                self.defaults(true);
                self.leds = 0;
                self.answer(&[ACK, TEST_PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn argument(&mut self, command: u8, byte: u8) {
        match (command, byte) {
            (0xed, _) => {
                self.leds = byte & 7;
                self.answer(&[ACK]);
            }
            (0xf0, 0) => self.answer(&[ACK, self.set]),
            (0xf0, 1..=3) => {
                self.set = byte;
                self.answer(&[ACK]);
            }
            (0xf0, _) => self.answer(&[RESEND]),
            _ => self.answer(&[ACK]),
        }
    }

    /// Whether a saved keyboard is one.
    pub(super) fn valid(&self) -> bool {
        self.answers.len() <= ANSWERS && self.codes.len() <= CODES
    }
}

/// What the controller makes of set 2: set 1, for the codes up to 0x7f.
const SET_1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59, 0x65,
    0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b, 0x67, 0x2e,
    0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d, 0x69, 0x31, 0x30,
    0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f, 0x6b, 0x33, 0x25, 0x17,
    0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61, 0x6d, 0x73, 0x28, 0x74, 0x1a,
    0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, 0x55, 0x56, 0x77, 0x78, 0x79, 0x7a,
    0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, 0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01,
    0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

/// Translates one byte; bytes that are no scan codes stay.
pub(super) fn translate(byte: u8) -> u8 {
    match byte {
        0x83 => 0x41,
        0x84 => 0x54,
        _ => SET_1.get(usize::from(byte)).copied().unwrap_or(byte),
    }
}
