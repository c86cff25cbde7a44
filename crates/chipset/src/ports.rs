//! Ports of one register: debug exit and POST code.

use crate::device::{Access, Device, Effect, Window};

/// The debug-exit port, QEMU's `isa-debug-exit`: writing `value` ends the machine with status `(value << 1) | 1`.
#[derive(Debug, Clone, Copy)]
pub struct DebugExit {
    port: u16,
}

impl DebugExit {
    /// Where test kernels look for it.
    pub const PORT: u16 = 0xf4;

    /// The port at `port`, four bytes wide.
    pub fn new(port: u16) -> Self {
        Self { port }
    }
}

impl Device for DebugExit {
    fn name(&self) -> &'static str {
        "debug-exit"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(self.port, 4, 0)]
    }

    fn access(&self) -> Access {
        Access { min: 1, max: 4 }
    }

    fn read_register(&mut self, _offset: u64, _width: u8, _now: u64) -> u64 {
        0
    }

    fn write_register(&mut self, _offset: u64, _width: u8, value: u64, _now: u64) -> Effect {
        Effect::Exit((value << 1) as u8 | 1)
    }

    fn reset(&mut self, _now: u64) {}
}

/// Port 0x80: the last POST code. Linux also writes it to pass time.
#[derive(Debug, Clone, Copy, Default)]
pub struct PostPort {
    code: u8,
}

impl PostPort {
    /// The port.
    pub const PORT: u16 = 0x80;

    /// The port, showing 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// The last code written.
    pub fn code(&self) -> u8 {
        self.code
    }
}

impl Device for PostPort {
    fn name(&self) -> &'static str {
        "post"
    }

    fn windows(&self) -> Vec<Window> {
        vec![Window::ports(Self::PORT, 1, 0)]
    }

    fn access(&self) -> Access {
        Access::BYTE
    }

    fn read_register(&mut self, _offset: u64, _width: u8, _now: u64) -> u64 {
        self.code.into()
    }

    fn write_register(&mut self, _offset: u64, _width: u8, value: u64, _now: u64) -> Effect {
        self.code = value as u8;
        Effect::None
    }

    fn reset(&mut self, _now: u64) {
        self.code = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_exit_status_is_odd() {
        let mut port = DebugExit::new(DebugExit::PORT);
        assert_eq!(port.write(0, 1, 0, 0), Effect::Exit(1));
        assert_eq!(port.write(0, 4, 0x10, 0), Effect::Exit(0x21));
        assert_eq!(port.write(0, 2, 0xff, 0), Effect::Exit(0xff));
    }

    #[test]
    fn post_code_reads_back() {
        let mut port = PostPort::new();
        assert_eq!(port.write(0, 1, 0x1a5, 0), Effect::None);
        assert_eq!((port.read(0, 1, 0), port.code()), (0xa5, 0xa5));
        port.reset(0);
        assert_eq!(port.code(), 0);
    }
}
