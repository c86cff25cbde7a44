//! The HPET: three timers, legacy replacement, comparators in the past.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use skep_chipset::{Hpet, HpetLines, LegacyGate};
use skep_fuzz::{NoMessages, Script, drive, line};

fuzz_target!(|script: Script| {
    let gate = LegacyGate::default();
    // Every other pin: routing to one that is not there has to come to nothing.
    let gsi = std::array::from_fn(|pin| (pin % 2 == 0).then(line));
    let lines = HpetLines { gsi, legacy: [line(), line()], msi: Arc::new(NoMessages) };
    drive(&mut Hpet::new(lines, gate), &script, |_, _, _, _| {});
});
