//! The 16550: any accesses at any time; a restored twin must show the same.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| skep_chipset::drive::run("uart", data));
