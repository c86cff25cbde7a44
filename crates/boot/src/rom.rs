//! A flat ROM at the reset vector: the processor starts in real mode, 16 bytes below 4 GiB (SDM vol. 3A §11.1.4).

use skep_memory::GuestMemory;

use crate::error::BootError;
use crate::layout::{FOUR_GIB, HIGH_MEMORY, MAX_ROM, MemoryLayout, ROM_MIRROR};
use crate::{BootKind, Input, Loaded};

/// Copies the image to where it ends at 4 GiB, and its end into RAM under 1 MiB, as a chipset shows it there.
pub(crate) fn load(memory: &GuestMemory, layout: &MemoryLayout, rom: &Input) -> Result<Loaded, BootError> {
    let size = rom.size();
    if size != layout.rom_size() || size == 0 || size > MAX_ROM {
        return Err(BootError::RomSize { name: rom.name().into(), size });
    }
    rom.copy_to(memory, layout.rom_start(), 0, size, "the ROM")?;
    let mirror = size.min(ROM_MIRROR);
    rom.copy_to(memory, HIGH_MEMORY - mirror, size - mirror, mirror, "the ROM")?;
    Ok(Loaded { kind: BootKind::Rom, boot_state: None, entry: FOUR_GIB - 16, rsdp: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::boot;
    use crate::{Payload, Role};

    fn rom(size: usize) -> (Vec<u8>, Payload) {
        let image: Vec<u8> = (0..size as u32).map(|i| ((i * 7) >> 4) as u8).collect();
        (image.clone(), Payload::Rom(Input::bytes(Role::Rom, "rom", image).unwrap()))
    }

    #[test]
    fn its_end_shows_under_1_mib() {
        for size in [0x1000, 0x1_0000, 0x2_0000, 0x4_0000] {
            let (image, payload) = rom(size);
            let booted = boot(payload, 1 << 20).unwrap();
            assert!(booted.loaded.boot_state.is_none());
            assert_eq!(booted.bytes(FOUR_GIB - size as u64, size), image);
            let mirror = size.min(0x2_0000);
            assert_eq!(booted.bytes(HIGH_MEMORY - mirror as u64, mirror), image[size - mirror..]);
            assert!(booted.memory.write_u8(FOUR_GIB - 1, 0).is_err(), "read-only");
            booted.memory.write_u8(HIGH_MEMORY - 1, 0).unwrap();
        }
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert_eq!(boot(rom(1000).1, 1 << 20).err().unwrap().code(), "ERR_ROM_SIZE");
        assert_eq!(boot(rom((16 << 20) + 4096).1, 1 << 20).err().unwrap().code(), "ERR_ROM_SIZE");
    }
}
