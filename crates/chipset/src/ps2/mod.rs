//! The keyboard controller (Intel 8042 as in the IBM PS/2, "Keyboard/Auxiliary Device Controller") with a keyboard and
//! a mouse, and port 0x92.
//!
//! The A20 gate reads back what was written and gates nothing: processors have had no A20M# pin since 2013.

mod keyboard;
mod mouse;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use keyboard::Keyboard;
use mouse::Mouse;
use serde::{Deserialize, Serialize};
use skep_hv::irq::Irq;

use crate::device::{Access, Device, Effect, RestoreError, Snapshot, Window};

/// Offsets of the ports within the device: 0x60, 0x64, 0x92.
const DATA: u64 = 0;
const COMMAND: u64 = 4;
const PORT_92: u64 = 5;

/// Status register.
mod status {
    pub(super) const OUTPUT_FULL: u8 = 0x01;
    pub(super) const SYSTEM: u8 = 0x04;
    pub(super) const COMMAND_LAST: u8 = 0x08;
    /// The keyboard is not locked.
    pub(super) const UNLOCKED: u8 = 0x10;
    pub(super) const FROM_MOUSE: u8 = 0x20;
}

/// Command byte.
mod mode {
    pub(super) const KEYBOARD_INTERRUPT: u8 = 0x01;
    pub(super) const MOUSE_INTERRUPT: u8 = 0x02;
    pub(super) const SYSTEM: u8 = 0x04;
    pub(super) const KEYBOARD_OFF: u8 = 0x10;
    pub(super) const MOUSE_OFF: u8 = 0x20;
    pub(super) const TRANSLATE: u8 = 0x40;
    /// As firmware leaves it: the keyboard works, the mouse is off.
    pub(super) const FIRMWARE: u8 = KEYBOARD_INTERRUPT | SYSTEM | MOUSE_OFF | TRANSLATE;
}

/// Output port: reset line (active low), A20, and the states of the interrupt lines.
mod output {
    pub(super) const NOT_RESET: u8 = 0x01;
    pub(super) const A20: u8 = 0x02;
    pub(super) const KEYBOARD_FULL: u8 = 0x10;
    pub(super) const MOUSE_FULL: u8 = 0x20;
    /// Unused pins and the wires to the devices, at rest.
    pub(super) const REST: u8 = 0xcc;
}

/// Bytes of controller memory, the command byte among them.
const MEMORY: usize = 32;
/// Answers of the controller that wait at most.
const ANSWERS: usize = 4;

/// Where a byte in the output buffer came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Origin {
    Keyboard,
    Mouse,
}

/// Saved state of [`Ps2`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ps2State {
    /// Controller memory; the first byte is the command byte.
    memory: [u8; MEMORY],
    /// The controller command whose argument comes next.
    command: Option<u8>,
    /// The last write was to the command port.
    command_last: bool,
    /// The output buffer, until it is read.
    full: Option<Origin>,
    buffer: u8,
    answers: VecDeque<(Origin, u8)>,
    /// A break prefix has been swallowed by translation.
    release: bool,
    a20: bool,
    keyboard: Keyboard,
    mouse: Mouse,
}

impl Ps2State {
    fn new() -> Self {
        let mut memory = [0; MEMORY];
        memory[0] = mode::FIRMWARE;
        Self {
            memory,
            command: None,
            command_last: false,
            full: None,
            buffer: 0,
            answers: VecDeque::with_capacity(ANSWERS),
            release: false,
            a20: true,
            keyboard: Keyboard::new(),
            mouse: Mouse::new(),
        }
    }

    fn mode(&self, bit: u8) -> bool {
        self.memory[0] & bit != 0
    }

    fn answer(&mut self, origin: Origin, byte: u8) {
        if self.answers.len() < ANSWERS {
            self.answers.push_back((origin, byte));
        }
    }

    /// The next byte from the keyboard, translated if that is on.
    fn keyboard_byte(&mut self) -> Option<u8> {
        loop {
            let byte = self.keyboard.pop()?;
            if !self.mode(mode::TRANSLATE) {
                return Some(byte);
            }
            if byte == 0xf0 {
                // The break prefix becomes the top bit of the code that follows.
                self.release = true;
                continue;
            }
            let release = std::mem::take(&mut self.release);
            return Some(keyboard::translate(byte) | if release { 0x80 } else { 0 });
        }
    }

    /// Fills the output buffer if it is empty and somebody has something.
    fn fill(&mut self) {
        if self.full.is_some() {
            return;
        }
        let mut next = self.answers.pop_front();
        if next.is_none() && !self.mode(mode::KEYBOARD_OFF) {
            next = self.keyboard_byte().map(|byte| (Origin::Keyboard, byte));
        }
        if next.is_none() && !self.mode(mode::MOUSE_OFF) {
            next = self.mouse.pop().map(|byte| (Origin::Mouse, byte));
        }
        if let Some((origin, byte)) = next {
            self.full = Some(origin);
            self.buffer = byte;
        }
    }

    fn status(&self) -> u8 {
        let full = match self.full {
            None => 0,
            Some(Origin::Keyboard) => status::OUTPUT_FULL,
            Some(Origin::Mouse) => status::OUTPUT_FULL | status::FROM_MOUSE,
        };
        let system = if self.mode(mode::SYSTEM) { status::SYSTEM } else { 0 };
        let last = if self.command_last { status::COMMAND_LAST } else { 0 };
        full | system | last | status::UNLOCKED
    }

    fn output_port(&self) -> u8 {
        let full = match self.full {
            None => 0,
            Some(Origin::Keyboard) => output::KEYBOARD_FULL,
            Some(Origin::Mouse) => output::MOUSE_FULL,
        };
        output::REST | output::NOT_RESET | full | if self.a20 { output::A20 } else { 0 }
    }

    /// A write of the command port.
    fn write_command(&mut self, command: u8) -> Effect {
        self.command = None;
        match command {
            0x20..=0x3f => self.answer(Origin::Keyboard, self.memory[usize::from(command & 0x1f)]),
            // Write memory, output port, output buffers, mouse: an argument follows.
            0x60..=0x7f | 0xd1..=0xd4 => self.command = Some(command),
            0xa7 => self.memory[0] |= mode::MOUSE_OFF,
            0xa8 => self.memory[0] &= !mode::MOUSE_OFF,
            // Tests of the wires to mouse and keyboard: nothing wrong.
            0xa9 | 0xab => self.answer(Origin::Keyboard, 0x00),
            0xaa => {
                self.memory[0] |= mode::SYSTEM;
                self.answer(Origin::Keyboard, 0x55);
            }
            0xad => self.memory[0] |= mode::KEYBOARD_OFF,
            0xae => self.memory[0] &= !mode::KEYBOARD_OFF,
            // Input port: keyboard not locked, no manufacturing jumper.
            0xc0 => self.answer(Origin::Keyboard, 0xa0),
            0xd0 => self.answer(Origin::Keyboard, self.output_port()),
            0xdd => self.a20 = false,
            0xdf => self.a20 = true,
            // Test inputs: the clocks of keyboard and mouse.
            0xe0 => self.answer(Origin::Keyboard, 0x03),
            // Pulse the output port's lines whose bits are 0; the first is the reset line.
            0xf0..=0xff if command & output::NOT_RESET == 0 => return Effect::Reset,
            _ => {}
        }
        Effect::None
    }

    /// A write of the data port.
    fn write_data(&mut self, byte: u8) -> Effect {
        match self.command.take() {
            None => {
                // Speaking to the keyboard turns it on.
                self.memory[0] &= !mode::KEYBOARD_OFF;
                self.keyboard.write(byte);
            }
            Some(0xd1) => {
                self.a20 = byte & output::A20 != 0;
                if byte & output::NOT_RESET == 0 {
                    return Effect::Reset;
                }
            }
            Some(0xd2) => self.answer(Origin::Keyboard, byte),
            Some(0xd3) => self.answer(Origin::Mouse, byte),
            Some(0xd4) => {
                self.memory[0] &= !mode::MOUSE_OFF;
                self.mouse.write(byte);
            }
            Some(command) => self.memory[usize::from(command & 0x1f)] = byte,
        }
        Effect::None
    }
}

/// The keyboard controller with its keyboard and mouse.
pub struct Ps2 {
    irq1: Irq,
    irq12: Irq,
    state: Ps2State,
}

impl Ps2 {
    /// `irq1` is the keyboard's interrupt, `irq12` the mouse's.
    pub fn new(irq1: Irq, irq12: Irq) -> Self {
        Self { irq1, irq12, state: Ps2State::new() }
    }

    /// Types: feeds scan codes of set 2 as the keyboard sends them. Returns how many bytes were taken; none is taken
    /// twice, and while the guest has turned scanning off they are taken and lost.
    pub fn push_scancodes(&mut self, codes: &[u8]) -> usize {
        let taken = self.state.keyboard.push(codes);
        self.update();
        taken
    }

    /// Moves the mouse by counts (right and up are positive) and sets its buttons (bit 0 left, 1 right, 2 middle).
    pub fn push_motion(&mut self, dx: i32, dy: i32, buttons: u8) {
        self.state.mouse.push(dx, dy, buttons);
        self.update();
    }

    fn update(&mut self) {
        self.state.fill();
        self.drive();
    }

    fn drive(&self) {
        let s = &self.state;
        self.irq1.set(s.full == Some(Origin::Keyboard) && s.mode(mode::KEYBOARD_INTERRUPT));
        self.irq12.set(s.full == Some(Origin::Mouse) && s.mode(mode::MOUSE_INTERRUPT));
    }
}

impl Device for Ps2 {
    fn name(&self) -> &'static str {
        "ps2"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(0x60, 1, DATA), Window::ports(0x64, 1, COMMAND), Window::ports(0x92, 1, PORT_92)]
    }

    fn access(&self) -> Access {
        Access::BYTE
    }

    fn read_register(&mut self, offset: u64, _width: u8, _now: u64) -> u64 {
        let value = match offset {
            DATA => {
                let byte = self.state.buffer;
                if self.state.full.take().is_some() {
                    // The line falls before the next byte raises it: interrupts here are edges.
                    self.drive();
                    self.update();
                }
                byte
            }
            COMMAND => self.state.status(),
            PORT_92 => u8::from(self.state.a20) << 1,
            _ => 0xff,
        };
        value.into()
    }

    fn write_register(&mut self, offset: u64, _width: u8, value: u64, _now: u64) -> Effect {
        let value = value as u8;
        let effect = match offset {
            DATA | COMMAND => {
                self.state.command_last = offset == COMMAND;
                if offset == COMMAND { self.state.write_command(value) } else { self.state.write_data(value) }
            }
            PORT_92 => {
                self.state.a20 = value & 2 != 0;
                if value & 1 != 0 { Effect::Reset } else { Effect::None }
            }
            _ => Effect::None,
        };
        self.update();
        effect
    }

    fn reset(&mut self, _now: u64) {
        self.state = Ps2State::new();
        self.drive();
    }
}

impl Snapshot for Ps2 {
    type State = Ps2State;

    fn save(&self, _now: u64) -> Ps2State {
        self.state.clone()
    }

    fn restore(&mut self, state: &Ps2State, _now: u64) -> Result<(), RestoreError> {
        if state.answers.len() > ANSWERS || !state.keyboard.valid() || !state.mouse.valid() {
            return Err(RestoreError { device: "ps2", what: "a queue is too long" });
        }
        self.state = state.clone();
        self.update();
        Ok(())
    }
}
