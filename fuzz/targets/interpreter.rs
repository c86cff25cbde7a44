//! The interpreter on random bytes in every mode: whatever the guest runs, it ends in the guest.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| skep_cpu::drive::run(data));
