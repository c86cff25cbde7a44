//! The keyboard controller with keyboard and mouse.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skep_chipset::Ps2;
use skep_fuzz::{Script, drive, line};

fuzz_target!(|script: Script| {
    drive(&mut Ps2::new(line(), line()), &script, |ps2, what, value, _now| match what % 2 {
        0 => drop(ps2.push_scancodes(&value.to_le_bytes())),
        _ => ps2.push_motion(value as i32, (value >> 32) as i32, what),
    });
});
