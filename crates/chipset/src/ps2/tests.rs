use std::sync::Arc;

use super::*;
use crate::testing::Line;

struct Bench {
    ps2: Ps2,
    irq1: Arc<Line>,
    irq12: Arc<Line>,
}

impl Bench {
    fn new() -> Self {
        let (irq1, irq12) = (Arc::new(Line::default()), Arc::new(Line::default()));
        Self { ps2: Ps2::new(irq1.clone(), irq12.clone()), irq1, irq12 }
    }

    fn write(&mut self, offset: u64, value: u8) {
        assert_eq!(self.ps2.write(offset, 1, value.into(), 0), Effect::None);
    }

    fn command(&mut self, command: u8) {
        self.write(COMMAND, command);
    }

    fn status(&mut self) -> u8 {
        self.ps2.read(COMMAND, 1, 0) as u8
    }

    /// Everything there is to read, with whether it came from the mouse.
    fn drain(&mut self) -> Vec<(u8, bool)> {
        let mut bytes = Vec::new();
        loop {
            let status = self.status();
            if status & 1 == 0 {
                return bytes;
            }
            bytes.push((self.ps2.read(DATA, 1, 0) as u8, status & 0x20 != 0));
        }
    }

    fn keyboard(&mut self, bytes: &[u8]) -> Vec<u8> {
        bytes.iter().for_each(|&byte| self.write(DATA, byte));
        self.drain()
            .into_iter()
            .map(|(byte, mouse)| if mouse { panic!("from the mouse") } else { byte })
            .collect()
    }

    fn mouse(&mut self, byte: u8) -> Vec<u8> {
        self.command(0xd4);
        self.write(DATA, byte);
        self.drain()
            .into_iter()
            .map(|(byte, mouse)| if mouse { byte } else { panic!("not from the mouse") })
            .collect()
    }
}

#[test]
fn linux_finds_the_controller() {
    let mut b = Bench::new();
    assert_eq!(b.status(), 0x14, "nothing to flush, not locked");
    b.command(0x20);
    assert_eq!(b.drain(), [(0x65, false)]);
    b.command(0xaa);
    assert_eq!(b.drain(), [(0x55, false)]);
    // The loop test of the mouse port; the multiplexer's knock comes back as it was.
    for byte in [0x5a, 0xf0, 0x56, 0xa4] {
        b.command(0xd3);
        b.write(DATA, byte);
        assert_eq!(b.drain(), [(byte, true)]);
    }
    for (command, bit) in [(0xa7, 0x20), (0xa8, 0)] {
        b.command(command);
        b.command(0x20);
        assert_eq!(b.drain()[0].0 & 0x20, bit);
    }
    for command in [0xa9, 0xab] {
        b.command(command);
        assert_eq!(b.drain(), [(0, false)]);
    }
    b.command(0x60);
    b.write(DATA, 0x47);
    b.command(0x20);
    assert_eq!(b.drain(), [(0x47, false)]);
}

#[test]
fn keyboard_commands() {
    let mut b = Bench::new();
    b.command(0x60);
    b.write(DATA, 0x01); // no translation
    assert_eq!(b.keyboard(&[0xff]), [0xfa, 0xaa]);
    assert_eq!(b.keyboard(&[0xf2]), [0xfa, 0xab, 0x83]);
    assert_eq!(b.keyboard(&[0xed]), [0xfa]);
    assert_eq!(b.keyboard(&[0x07]), [0xfa]);
    assert_eq!(b.keyboard(&[0xf0]), [0xfa]);
    assert_eq!(b.keyboard(&[0x00]), [0xfa, 0x02]);
    assert_eq!(b.keyboard(&[0xf3]), [0xfa]);
    assert_eq!(b.keyboard(&[0x20]), [0xfa]);
    assert_eq!(b.keyboard(&[0xee]), [0xee]);
    assert_eq!(b.keyboard(&[0x01]), [0xfe]);
    assert_eq!(b.keyboard(&[0xed, 0xf4]), [0xfa, 0xfa], "a command in the place of an argument");
}

#[test]
fn scan_codes_are_translated() {
    let mut b = Bench::new();
    assert_eq!(b.ps2.push_scancodes(&[0x1c, 0xf0, 0x1c, 0xe0, 0x75, 0xe0, 0xf0, 0x75]), 8);
    assert!(b.irq1.high());
    let codes: Vec<u8> = b.drain().into_iter().map(|(byte, _)| byte).collect();
    assert_eq!(codes, [0x1e, 0x9e, 0xe0, 0x48, 0xe0, 0xc8]);
    assert_eq!(b.irq1.edges(), 6, "an edge for every byte");
    assert!(!b.irq1.high());
    assert_eq!(b.ps2.read(DATA, 1, 0), 0xc8, "the last byte stays readable");
}

#[test]
fn translation_is_one_to_one() {
    let mut seen = std::collections::HashSet::new();
    assert!((0..0x80).all(|code| seen.insert(keyboard::translate(code))));
}

#[test]
fn a_full_keyboard_refuses() {
    let mut b = Bench::new();
    b.command(0xad);
    assert_eq!(b.ps2.push_scancodes(&[0x1c; 20]), 16);
    assert_eq!(b.ps2.push_scancodes(&[0x1c]), 0);
    assert_eq!(b.status() & 1, 0, "the keyboard is off");
    b.command(0xae);
    assert_eq!(b.drain().len(), 16);
    b.keyboard(&[0xf5]);
    assert_eq!(b.ps2.push_scancodes(&[0x1c; 20]), 20);
    assert_eq!(b.drain(), []);
}

#[test]
fn mouse_commands() {
    let mut b = Bench::new();
    b.command(0x60);
    b.write(DATA, 0x47);
    assert_eq!(b.mouse(0xff), [0xfa, 0xaa, 0x00]);
    assert_eq!(b.irq12.edges(), 3);
    assert_eq!(b.mouse(0xf2), [0xfa, 0x00]);
    assert_eq!(b.mouse(0xe8), [0xfa]);
    assert_eq!(b.mouse(3), [0xfa]);
    assert_eq!(b.mouse(0xf3), [0xfa]);
    assert_eq!(b.mouse(200), [0xfa]);
    assert_eq!(b.mouse(0xe7), [0xfa]);
    assert_eq!(b.mouse(0xf4), [0xfa]);
    assert_eq!(b.mouse(0xe9), [0xfa, 0x30, 3, 200]);
    assert_eq!(b.mouse(0xee), [0xfa]);
    assert_eq!(b.mouse(0xf2), [0xf2], "wrapped");
    assert_eq!(b.mouse(0xec), [0xfa]);
    assert_eq!(b.mouse(0x00), [0xfe]);
}

#[test]
fn mouse_packets() {
    let mut b = Bench::new();
    b.ps2.push_motion(5, 5, 0);
    b.mouse(0xf6);
    assert_eq!(b.drain(), [], "not reporting");
    b.mouse(0xf4);
    b.ps2.push_motion(10, -3, 1);
    b.ps2.push_motion(300, 0, 1);
    b.ps2.push_motion(0, 0, 0);
    let bytes: Vec<u8> = b.drain().into_iter().map(|(byte, _)| byte).collect();
    assert_eq!(bytes, [0x29, 10, 0xfd, 9, 255, 0, 9, 45, 0, 8, 0, 0]);
    b.ps2.push_motion(0, 0, 6);
    b.drain();
    assert_eq!(b.mouse(0xe9)[1], 0x23, "buttons in the order of the status byte");
}

#[test]
fn reset_lines() {
    let mut b = Bench::new();
    assert_eq!(b.ps2.write(COMMAND, 1, 0xfe, 0), Effect::Reset);
    b.command(0xff);
    b.command(0xd1);
    b.write(DATA, 0xdf);
    b.command(0xd1);
    assert_eq!(b.ps2.write(DATA, 1, 0xde, 0), Effect::Reset);
    b.write(PORT_92, 2);
    assert_eq!(b.ps2.write(PORT_92, 1, 1, 0), Effect::Reset);
}

#[test]
fn a20_reads_back_everywhere() {
    let mut b = Bench::new();
    for (command, bit) in [(0xdd, 0), (0xdf, 2)] {
        b.command(command);
        assert_eq!(b.ps2.read(PORT_92, 1, 0), bit);
        b.command(0xd0);
        assert_eq!(u64::from(b.drain()[0].0) & 3, bit | 1);
    }
    b.write(PORT_92, 0);
    b.command(0xd0);
    assert_eq!(b.drain()[0].0 & 2, 0);
}
