//! The 16550: any accesses, input from outside, output taken or not.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use skep_chipset::{NoSignal, Uart};
use skep_fuzz::{Script, drive, line};

fuzz_target!(|script: Script| {
    let mut uart = Uart::new(Uart::COM1, line(), Arc::new(NoSignal));
    drive(&mut uart, &script, |uart, what, value, _now| match what % 5 {
        0 => {
            let room = uart.input_room();
            let taken = uart.push_input(&value.to_le_bytes());
            assert!(taken <= 8 && taken <= room.max(8));
        }
        1 => drop(uart.take_output()),
        2 => uart.push_break(),
        3 => uart.set_connected(value & 1 != 0),
        _ => assert_eq!(uart.has_output(), !uart.take_output().is_empty()),
    });
});
