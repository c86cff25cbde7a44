//! The small ports: debug exit and POST.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skep_chipset::{DebugExit, PostPort};
use skep_fuzz::{Script, drive_registers};

fuzz_target!(|script: Script| {
    drive_registers(&mut DebugExit::new(0xf4), &script, |_, _, _| {});
    drive_registers(&mut PostPort::new(), &script, |_, _, _| {});
});
