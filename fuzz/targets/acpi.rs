//! ACPI power management and the reset register.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skep_chipset::{AcpiPm, ResetControl};
use skep_fuzz::{Script, drive, drive_registers, line};

fuzz_target!(|script: Script| {
    drive(&mut AcpiPm::new(line()), &script, |acpi, what, value, _now| match what % 3 {
        0 => acpi.power_button(),
        1 => acpi.raise_gpe(value as u8),
        _ => drop(acpi.enabled()),
    });
    drive_registers(&mut ResetControl::new(), &script, |_, _, _| {});
});
