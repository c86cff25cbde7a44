//! The 8259 pair and the IOAPIC, alone and behind their common handle, with lines driven from outside.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use skep_chipset::{IoApic, PicPair};
use skep_fuzz::{NoMessages, Script, drive, line};

fuzz_target!(|script: Script| {
    drive(&mut PicPair::new(line()), &script, |pic, what, value, _now| match what % 2 {
        0 => pic.set_line(value as u8, value & 0x100 != 0),
        _ => drop(pic.acknowledge()),
    });
    drive(&mut IoApic::new(Arc::new(NoMessages)), &script, |ioapic, what, value, _now| match what % 2 {
        0 => ioapic.set_pin(value as u8, value & 0x100 != 0),
        _ => ioapic.end_of_interrupt(value as u8),
    });
});
