//! The stepper: random code step by step must do what the interpreter does by itself, and a state that makes no sense must
//! end in a step or in words.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [choice, data @ ..] = data else { return };
    if choice % 2 == 0 {
        skep_cpu::drive::lockstep(data);
    } else {
        skep_cpu::drive::hostile_state(data);
    }
});
