//! What firmware leaves behind for the operating system: the BIOS data area, ACPI and SMBIOS.

use skep_memory::GuestMemory;

use crate::bytes::put;
use crate::error::BootError;
use crate::layout::{ACPI_TABLES, COM_PORTS, EBDA, MemoryLayout, SMBIOS_TABLES};
use crate::{MAX_CPUS, Platform, acpi, smbios};

/// First byte of the BIOS data area.
const BDA: u64 = 0x400;

/// Writes everything; returns the address of the ACPI root pointer.
pub(crate) fn write(
    memory: &GuestMemory,
    layout: &MemoryLayout,
    platform: &Platform,
) -> Result<u64, BootError> {
    let count = platform.apic_ids.len() as u64;
    if count == 0 || count > MAX_CPUS.into() {
        return Err(BootError::Cpus { count, limit: MAX_CPUS });
    }
    memory.write(BDA, &bios_data(platform))?;
    // The first byte of the extended area is its size in KiB.
    memory.write(EBDA, &[1, 0, 0, 0])?;
    memory.write(ACPI_TABLES, &acpi::build(ACPI_TABLES as u32, platform))?;
    memory.write(SMBIOS_TABLES, &smbios::build(SMBIOS_TABLES, layout, platform))?;
    Ok(ACPI_TABLES)
}

/// The BIOS data area: serial ports, where the extended area is, how much base memory there is.
fn bios_data(platform: &Platform) -> [u8; 0x100] {
    let mut area = [0; 0x100];
    let ports = COM_PORTS.iter().zip(platform.serial).filter(|(_, exists)| *exists);
    let mut count = 0u16;
    for (slot, (port, _)) in ports.enumerate() {
        put(&mut area, slot * 2, port.to_le_bytes());
        count += 1;
    }
    put(&mut area, 0x0e, ((EBDA >> 4) as u16).to_le_bytes());
    // Equipment: number of serial ports, an FPU.
    put(&mut area, 0x10, (count << 9 | 1 << 1).to_le_bytes());
    put(&mut area, 0x13, ((EBDA >> 10) as u16).to_le_bytes());
    area
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bios_data_area_lists_the_ports_that_exist() {
        let platform = Platform { serial: [true, false, true, false], ..Platform::new(1) };
        let area = bios_data(&platform);
        assert_eq!(area[..8], [0xf8, 3, 0xe8, 3, 0, 0, 0, 0]);
        assert_eq!(area[0x0e..0x15], [0xc0, 0x9f, 0x02, 0x04, 0, 0x7f, 0x02]);
    }

    #[test]
    fn a_machine_has_1_to_512_processors() {
        let layout = MemoryLayout::new(1 << 20, 0).unwrap();
        let memory = GuestMemory::new(&layout.regions()).unwrap();
        assert_eq!(write(&memory, &layout, &Platform::new(0)).unwrap_err().code(), "ERR_CPUS_RANGE");
        assert_eq!(write(&memory, &layout, &Platform::new(513)).unwrap_err().code(), "ERR_CPUS_RANGE");
        let at = write(&memory, &layout, &Platform::new(512)).unwrap();
        assert_eq!(memory.read_array(at).unwrap(), *b"RSD PTR ");
        assert_eq!(memory.read_array(SMBIOS_TABLES).unwrap(), *b"_SM3_");
    }
}
