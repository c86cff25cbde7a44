//! The 8254 and port 0x61.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skep_chipset::Pit;
use skep_fuzz::{Script, drive, line};

fuzz_target!(|script: Script| {
    drive(&mut Pit::new(line()), &script, |_, _, _, _| {});
});
