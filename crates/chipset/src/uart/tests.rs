use super::*;
use crate::testing::{Bell, Line};

struct Bench {
    uart: Uart,
    irq: Arc<Line>,
    bell: Arc<Bell>,
}

impl Bench {
    fn new() -> Self {
        let (irq, bell) = (Arc::new(Line::default()), Arc::new(Bell::default()));
        Self { uart: Uart::new(Uart::COM1, irq.clone(), bell.clone()), irq, bell }
    }

    fn read(&mut self, offset: u64) -> u8 {
        self.uart.read(offset, 1, 0) as u8
    }

    fn write(&mut self, offset: u64, value: u8) {
        assert_eq!(self.uart.write(offset, 1, value.into(), 0), Effect::None);
    }
}

#[test]
fn reset_values() {
    let mut b = Bench::new();
    let values: Vec<u8> = (1..8).map(|offset| b.read(offset)).collect();
    assert_eq!(values, [0, 1, 0, 0, 0x60, 0xb0, 0]);
}

#[test]
fn output_is_collected_and_announced_once() {
    let mut b = Bench::new();
    for byte in *b"hello" {
        assert_eq!(b.read(5), 0x60);
        b.write(0, byte);
    }
    assert_eq!(b.bell.rings(), 1);
    assert!(b.uart.has_output());
    assert_eq!(b.uart.take_output(), b"hello");
    assert!(!b.uart.has_output());
}

#[test]
fn full_output_makes_the_transmitter_busy_and_loses_nothing() {
    let mut b = Bench::new();
    b.write(2, 1);
    b.write(1, ier::TRANSMITTER_EMPTY);
    let mut written = 0;
    while b.read(5) & 0x20 != 0 {
        b.write(0, written as u8);
        written += 1;
    }
    assert_eq!(written, Uart::OUTPUT_CAPACITY + 1);
    b.read(2);
    assert!(!b.irq.high());
    assert_eq!(b.uart.take_output().len(), Uart::OUTPUT_CAPACITY);
    assert!(b.irq.high(), "the transmitter has emptied");
    assert_eq!(b.uart.take_output(), [(written - 1) as u8]);
}

#[test]
fn transmitter_empty_interrupt() {
    let mut b = Bench::new();
    b.write(1, ier::TRANSMITTER_EMPTY);
    assert!(b.irq.high(), "enabling it raises it");
    assert_eq!(b.read(2), 2);
    assert!(!b.irq.high(), "reading IIR clears it");
    assert_eq!(b.read(2), 1);
    b.write(1, ier::TRANSMITTER_EMPTY);
    assert!(!b.irq.high(), "it was enabled already");
    b.write(0, b'x');
    assert!(b.irq.high());
}

#[test]
fn received_data_without_fifos() {
    let mut b = Bench::new();
    b.write(1, ier::RECEIVED);
    assert_eq!(b.uart.push_input(b"ab"), 1);
    assert_eq!((b.read(2), b.read(5)), (4, 0x61));
    assert_eq!(b.uart.push_input(b"b"), 0);
    assert_eq!(b.bell.rings(), 0);
    assert_eq!(b.read(0), b'a');
    assert_eq!(b.bell.rings(), 1, "there is room again");
    assert!(!b.irq.high());
    assert_eq!(b.uart.push_input(b"b"), 1);
    assert_eq!(b.read(0), b'b');
    assert_eq!(b.bell.rings(), 0, "nothing was refused");
}

#[test]
fn fifo_trigger_and_time_out() {
    let mut b = Bench::new();
    b.write(2, 0x81); // trigger at 8
    b.write(1, ier::RECEIVED);
    assert_eq!(b.uart.push_input(&[7; 20]), 16);
    assert_eq!(b.read(2), 0xc4);
    for _ in 0..9 {
        assert_eq!(b.read(0), 7);
    }
    assert_eq!(b.read(2), 0xcc, "below the trigger: time-out");
    for _ in 0..7 {
        assert_eq!(b.read(0), 7);
    }
    assert_eq!(b.read(2), 0xc1);
    assert_eq!(b.read(0), 0);
    assert!(!b.irq.high());
}

#[test]
fn interrupt_priorities() {
    let mut b = Bench::new();
    b.write(2, 1);
    b.write(1, 0x0f);
    b.uart.set_connected(false);
    b.uart.push_break();
    assert_eq!(b.read(2), 0xc6);
    assert_eq!(b.read(5), 0xf1);
    assert_eq!(b.read(5), 0x61, "reading takes the break off");
    assert_eq!(b.read(2), 0xc4);
    assert_eq!(b.read(0), 0);
    assert_eq!(b.read(2), 0xc2);
    assert_eq!(b.read(2), 0xc0);
    assert_eq!(b.read(6), 0x0b);
    assert_eq!(b.read(6), 0);
    assert_eq!(b.read(2), 0xc1);
}

#[test]
fn break_is_reported_with_its_byte() {
    let mut b = Bench::new();
    b.write(2, 1);
    b.uart.push_input(b"a");
    b.uart.push_break();
    assert_eq!(b.read(5), 0xe1, "an error is in the FIFO, not at its front");
    b.read(0);
    assert_eq!(b.read(5), 0xf1);
}

#[test]
fn loop_back() {
    let mut b = Bench::new();
    b.write(4, 0x10);
    b.read(6);
    for (outputs, inputs) in [(1, 0x22), (2, 0x13), (4, 0x41), (8, 0x8c)] {
        b.write(4, 0x10 | outputs);
        // Each step drops the former output too; ring's leading edge is not a change.
        assert_eq!(b.read(6), inputs, "{outputs:#x}");
    }
    b.write(0, 0x5a);
    assert!(!b.uart.has_output());
    assert_eq!(b.read(5), 0x61);
    b.write(0, 0x5b);
    assert_eq!(b.read(5) & 2, 2, "overrun");
    assert_eq!(b.read(5) & 2, 0);
    assert_eq!(b.read(0), 0x5b);
    assert_eq!(b.uart.push_input(b"x"), 0);
    b.write(4, 0);
    assert_eq!(b.bell.rings(), 1);
    assert_eq!(b.uart.push_input(b"x"), 1);
}

#[test]
fn fifo_control() {
    let mut b = Bench::new();
    b.write(2, 1);
    assert_eq!(b.read(2), 0xc1);
    b.uart.push_input(b"abc");
    b.write(2, 3);
    assert_eq!(b.read(5), 0x60, "receiver cleared");
    b.uart.push_input(b"abc");
    b.write(2, 0);
    assert_eq!((b.read(2), b.read(5)), (1, 0x60), "switching clears both");
    b.write(2, 0xc0);
    assert_eq!(b.read(2), 1, "nothing is programmed without the enable bit");
}

#[test]
fn latches_scratch_and_masks() {
    let mut b = Bench::new();
    b.write(3, 0x83);
    b.write(0, 0x34);
    b.write(1, 0x12);
    assert_eq!((b.read(0), b.read(1)), (0x34, 0x12));
    b.write(3, 3);
    b.write(1, 0xff);
    b.write(4, 0xef);
    b.write(7, 0xa5);
    assert_eq!((b.read(1), b.read(4), b.read(7)), (0x0f, 0x0f, 0xa5));
    assert!(!b.uart.has_output());
}

#[test]
fn restore_drives_the_line_and_refuses_nonsense() {
    let mut b = Bench::new();
    b.write(1, ier::RECEIVED);
    b.uart.push_input(b"a");
    let state = b.uart.save(0);
    let mut c = Bench::new();
    c.uart.restore(&state, 0).unwrap();
    assert!(c.irq.high());
    let text = serde_json::to_string(&state).unwrap().replacen("\"length\":1", "\"length\":17", 1);
    let bad = serde_json::from_str(&text).unwrap();
    assert!(c.uart.restore(&bad, 0).is_err());
    assert_eq!(c.read(0), b'a');
}
