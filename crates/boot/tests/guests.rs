//! Loads images that other tools have made: the test guests, and distribution kernels where a folder is named.
#![allow(missing_docs, reason = "a test")]

use std::path::{Path, PathBuf};
use std::process::Command;

use skep_boot::{
    BootError, BootKind, BootOptions, BootPaths, Loaded, MemoryLayout, Payload, Platform, load, load_bytes,
};
use skep_memory::GuestMemory;

fn boot(paths: &BootPaths, size: u64) -> Result<(GuestMemory, Loaded), BootError> {
    let payload = Payload::open(paths)?;
    let layout = MemoryLayout::new(size, payload.rom_size())?;
    let memory = GuestMemory::new(&layout.regions())?;
    let loaded = load(&memory, &BootOptions { payload, layout, platform: Platform::new(2) })?;
    Ok((memory, loaded))
}

fn kernel(path: PathBuf) -> BootPaths {
    BootPaths { kernel: Some(path), cmdline: "console=ttyS0".into(), ..BootPaths::default() }
}

/// The guests, built into a folder of this test's own.
fn guests(name: &str) -> PathBuf {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../test/guests/build.sh");
    assert!(Command::new(script).arg(&out).status().is_ok_and(|status| status.success()));
    out
}

#[test]
fn every_guest_is_recognised_and_entered_where_its_linker_put_the_entry() {
    let out = guests("recognised");
    for (name, kind) in [
        ("hello-multiboot.elf", BootKind::Multiboot),
        ("hello-multiboot64.elf", BootKind::Multiboot),
        ("hello-multiboot.bin", BootKind::Multiboot),
        ("hello-pvh.elf", BootKind::Pvh),
        ("exceptions.elf", BootKind::Multiboot),
    ] {
        let (memory, loaded) = boot(&kernel(out.join(name)), 4 << 20).unwrap();
        assert_eq!(loaded.kind, kind, "{name}");
        // All of them begin with CLI, CLD.
        assert_eq!(memory.read_array(loaded.entry).unwrap(), [0xfa, 0xfc], "{name}");
    }
    let rom = BootPaths { rom: Some(out.join("hello.rom")), ..BootPaths::default() };
    let (memory, loaded) = boot(&rom, 1 << 20).unwrap();
    assert_eq!(loaded.kind, BootKind::Rom);
    assert_eq!(memory.read_u8(loaded.entry).unwrap(), 0xea, "a far jump");
    assert_eq!(memory.read_u8(0xf_fff0).unwrap(), 0xea);
}

#[test]
fn real_images_with_flipped_bits_never_panic() {
    let out = guests("flipped");
    let layout = MemoryLayout::new(2 << 20, 0).unwrap();
    let memory = GuestMemory::new(&layout.regions()).unwrap();
    let mut seed = 1u64;
    let mut random = |limit: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % limit
    };
    for name in ["hello-multiboot.elf", "hello-multiboot64.elf", "hello-multiboot.bin", "hello-pvh.elf"] {
        let image = std::fs::read(out.join(name)).unwrap();
        load_bytes(&memory, layout, &image, Some(b"initrd"), "x").unwrap();
        let mut loaded = 0;
        for _ in 0..500 {
            let mut image = image.clone();
            for _ in 0..=random(3) {
                // Half of the damage goes to the headers, where it counts.
                let limit = if random(2) == 0 { 300 } else { image.len() };
                image[random(limit)] ^= 1 << random(8);
            }
            if random(4) == 0 {
                image.truncate(random(image.len()) + 1);
            }
            loaded += usize::from(load_bytes(&memory, layout, &image, Some(b"initrd"), "x").is_ok());
        }
        assert!((1..500).contains(&loaded), "{name}: {loaded} of 500 still load");
    }
}

/// `SKEP_BOOT_FILES` names a folder with `vmlinuz*` and `memtest86+{x64,ia32}.bin`, as in Debian's `/boot`.
#[test]
#[ignore = "needs a folder of kernels, named by SKEP_BOOT_FILES"]
fn distribution_kernels_load() {
    let folder = PathBuf::from(std::env::var_os("SKEP_BOOT_FILES").expect("SKEP_BOOT_FILES names a folder"));
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let (kind, entry) = match name.as_str() {
            "memtest86+x64.bin" => (BootKind::Linux64, 0x10_0200),
            "memtest86+ia32.bin" => (BootKind::Linux32, 0x10_0000),
            _ if name.starts_with("vmlinuz") => (BootKind::Linux64, 0x100_0200),
            _ => continue,
        };
        let initrd = Some(path.clone());
        let (_, loaded) = boot(&BootPaths { initrd, ..kernel(path) }, 256 << 20).unwrap();
        assert_eq!((loaded.kind, loaded.entry), (kind, entry), "{name}");
        seen += 1;
    }
    assert!(seen > 0, "no kernel that this test knows");
}
