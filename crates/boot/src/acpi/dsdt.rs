//! The differentiated system description table: devices that cannot be found otherwise, in AML.

use acpi_tables::aml::{Device, EISAName, IO, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope};
use acpi_tables::{Aml, AmlSink};

use super::table;
use crate::Platform;
use crate::layout::{
    COM_IRQS, COM_PORTS, GPE0, GPE0_LEN, HPET, IOAPIC, KEYBOARD_IRQ, LOCAL_APIC, MOUSE_IRQ, PM_TIMER,
    PM1A_CONTROL, PM1A_EVENT, RESET_PORT, RTC_IRQ, SLP_TYP_S5, SMI_COMMAND,
};

/// An ISA interrupt, edge, active high: the small IRQ descriptor without flags, §6.4.2.1.
struct Irq(u8);

impl Aml for Irq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1 << (self.0 & 15));
    }
}

/// A range of ports.
fn ports(start: u16, count: u8) -> IO {
    IO::new(start, start, 1, count)
}

/// A device with a plug-and-play ID, the `uid`-th of its kind, and its resources.
fn device(name: &str, id: &str, uid: u8, resources: Vec<&dyn Aml>) -> Vec<u8> {
    let mut bytes = Vec::new();
    Device::new(
        Path::new(name),
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

/// A processor, §8.4: its `_UID` is what the MADT has for it.
fn processor(uid: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    Device::new(
        Path::new(&format!("C{:03X}", uid & 0xfff)),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &uid)],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

/// Everything under `\_SB_`.
fn devices(platform: &Platform) -> Vec<u8> {
    let mut devices: Vec<u8> = (0u32..).zip(&platform.apic_ids).flat_map(|(uid, _)| processor(uid)).collect();
    let names = ["COM1", "COM2", "COM3", "COM4"];
    for (index, name) in (0u8..).zip(names).filter(|(index, _)| platform.serial[usize::from(*index)]) {
        let at = usize::from(index);
        devices.extend(device(
            name,
            "PNP0501",
            index + 1,
            vec![&ports(COM_PORTS[at], 8), &Irq(COM_IRQS[at])],
        ));
    }
    devices.extend(device("PS2K", "PNP0303", 0, vec![&ports(0x60, 1), &ports(0x64, 1), &Irq(KEYBOARD_IRQ)]));
    devices.extend(device("PS2M", "PNP0F13", 0, vec![&Irq(MOUSE_IRQ)]));
    devices.extend(device("RTC_", "PNP0B00", 0, vec![&ports(0x70, 2), &Irq(RTC_IRQ)]));
    devices.extend(device("PIT_", "PNP0100", 0, vec![&ports(0x40, 4), &Irq(0)]));
    let pic: [&dyn Aml; 4] = [&ports(0x20, 2), &ports(0xa0, 2), &ports(0x4d0, 2), &Irq(2)];
    devices.extend(device("PIC_", "PNP0000", 0, pic.to_vec()));
    devices.extend(device("SPKR", "PNP0800", 0, vec![&ports(0x61, 1)]));
    devices.extend(device("HPET", "PNP0103", 0, vec![&Memory32Fixed::new(true, HPET as u32, 0x400)]));
    let reserved: [&dyn Aml; 9] = [
        &ports(0x80, 1),
        &ports(SMI_COMMAND, 2),
        &ports(PM1A_EVENT, 4),
        &ports(PM1A_CONTROL, 2),
        &ports(PM_TIMER, 4),
        &ports(GPE0, GPE0_LEN),
        &ports(RESET_PORT, 1),
        &Memory32Fixed::new(true, IOAPIC as u32, 0x1000),
        &Memory32Fixed::new(true, LOCAL_APIC as u32, 0x1000),
    ];
    devices.extend(device("RESV", "PNP0C02", 0, reserved.to_vec()));
    devices
}

/// The table.
pub(super) fn dsdt(platform: &Platform) -> Vec<u8> {
    let mut aml = Vec::new();
    // SLP_TYP for PM1a and PM1b, §7.4.2.6.
    let soft_off = Package::new(vec![&SLP_TYP_S5, &SLP_TYP_S5, &0u8, &0u8]);
    Name::new("\\_S5_".into(), &soft_off).to_aml_bytes(&mut aml);
    aml.extend(Scope::raw("\\_SB_".into(), devices(platform)));
    table(b"DSDT", 2, &aml)
}
