//! SMBIOS structures (DMTF DSP0134, version 3.0): what management tools say of the machine.

use crate::bytes::{Writer, checksum};
use crate::layout::FOUR_GIB;
use crate::{MemoryLayout, Platform};

/// Length of the 64-bit entry point, §5.2.2.
const ENTRY_LEN: usize = 24;
/// Where the structures begin, from the entry point.
const STRUCTURES: usize = 32;
const MANUFACTURER: &str = "Skep";
/// Handle of the physical memory array.
const MEMORY_ARRAY: u16 = 0x1000;
/// "No error information", §7.17.
const NO_ERROR_INFO: u16 = 0xfffe;
/// "Not provided", for handles and widths.
const NONE: u16 = 0xffff;

/// A structure: header, formatted area, strings (§6.1).
fn structure(kind: u8, handle: u16, body: Writer, strings: &[&str]) -> Vec<u8> {
    let body = body.finish();
    let mut bytes = Writer::default().u8(kind).u8((4 + body.len()) as u8).u16(handle).bytes(&body).finish();
    for text in strings {
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
    }
    bytes.resize(bytes.len() + if strings.is_empty() { 2 } else { 1 }, 0);
    bytes
}

/// Firmware, §7.1.
fn firmware() -> Vec<u8> {
    let body = Writer::default()
        .bytes(&[1, 2]) // vendor, version
        .u16(0xe000)
        .u8(3) // date
        .u8(0)
        .u64(1 << 3) // characteristics are not given
        .bytes(&[0x01, 0x10]) // ACPI; a virtual machine
        .bytes(&[0xff; 4]); // releases: not given
    structure(0, 0, body, &[MANUFACTURER, env!("CARGO_PKG_VERSION"), "01/01/2025"])
}

/// System, §7.2.
fn system(uuid: [u8; 16]) -> Vec<u8> {
    // The first three fields of the UUID are little-endian numbers, §7.2.1.
    let [a, b, c, d, e, f, g, h, rest @ ..] = uuid;
    let body = Writer::default()
        .bytes(&[1, 2, 3, 0])
        .bytes(&[d, c, b, a, f, e, h, g])
        .bytes(&rest)
        .bytes(&[6, 0, 0]); // woken by the power switch; SKU, family
    structure(1, 0x100, body, &[MANUFACTURER, "Skep virtual machine", env!("CARGO_PKG_VERSION")])
}

/// Enclosure, §7.4.
fn enclosure() -> Vec<u8> {
    // Manufacturer; type "other"; strings; boot-up, power supply and thermal state "safe"; security "none".
    let body = Writer::default().bytes(&[1, 1, 0, 0, 0, 3, 3, 3, 3]).u32(0).bytes(&[0; 5]);
    structure(3, 0x300, body, &[MANUFACTURER])
}

/// A processor package, §7.5.
fn processor(socket: u16, platform: &Platform) -> Vec<u8> {
    let count = |n: u32| (u8::try_from(n).unwrap_or(0xff), u16::try_from(n).unwrap_or(0xffff));
    let cores = count(platform.cores);
    let threads = count(platform.cores.saturating_mul(platform.threads));
    let body = Writer::default()
        .bytes(&[1, 3, 2, 2]) // designation, central processor, family unknown, manufacturer
        .u64(0)
        .u8(3)
        .zeros(1 + 6) // voltage, speeds
        .bytes(&[0x41, 1]) // populated and enabled; upgrade "other"
        .u16(NONE)
        .u16(NONE)
        .u16(NONE)
        .bytes(&[0, 0, 0, cores.0, cores.0, threads.0])
        .u16(1 << 2) // 64-bit capable
        .u16(2)
        .u16(cores.1)
        .u16(cores.1)
        .u16(threads.1);
    structure(4, 0x400 + socket, body, &[&format!("CPU {socket}"), MANUFACTURER, "x86-64"])
}

/// All memory as one array of one module, §7.17, §7.18.
fn memory(size: u64) -> Vec<u8> {
    let array = Writer::default()
        .bytes(&[3, 3, 3]) // system board, system memory, no error correction
        .u32(0x8000_0000) // the extended field has it
        .u16(NO_ERROR_INFO)
        .u16(1)
        .u64(size);
    // In MiB; from 32 GiB - 1 MiB on in the extended field.
    let mib = size >> 20;
    let short = if mib < 0x7fff { mib as u16 } else { 0x7fff };
    let module = Writer::default()
        .u16(MEMORY_ARRAY)
        .u16(NO_ERROR_INFO)
        .u16(NONE)
        .u16(NONE)
        .u16(short)
        .bytes(&[9, 0, 1, 0, 7]) // DIMM, no set, locator, bank, RAM
        .u16(1 << 1)
        .u16(0)
        .bytes(&[2, 0, 0, 0, 0]) // manufacturer, strings, attributes
        .u32(if short == 0x7fff { mib as u32 } else { 0 })
        .zeros(8); // speed, voltages
    let mut bytes = structure(16, MEMORY_ARRAY, array, &[]);
    bytes.extend(structure(17, 0x1100, module, &["DIMM 0", MANUFACTURER]));
    bytes
}

/// A range of addresses that the array backs, §7.20.
fn mapped(index: u16, start: u64, end: u64) -> Vec<u8> {
    let body = Writer::default()
        .u32(u32::MAX) // the extended fields have it
        .u32(u32::MAX)
        .u16(MEMORY_ARRAY)
        .u8(1)
        .u64(start)
        .u64(end - 1);
    structure(19, 0x1300 + index, body, &[])
}

/// Entry point and structures as they stand in memory from `base` on.
pub(crate) fn build(base: u64, layout: &MemoryLayout, platform: &Platform) -> Vec<u8> {
    let mut structures = [firmware(), system(platform.uuid), enclosure()].concat();
    for socket in 0..platform.sockets.min(crate::MAX_CPUS) {
        structures.extend(processor(socket as u16, platform));
    }
    structures.extend(memory(layout.size()));
    structures.extend(mapped(0, 0, layout.low_end()));
    if layout.high_end() > FOUR_GIB {
        structures.extend(mapped(1, FOUR_GIB, layout.high_end()));
    }
    structures.extend(structure(32, 0x2000, Writer::default().zeros(7), &[]));
    structures.extend(structure(127, 0x7f00, Writer::default(), &[]));
    let mut bytes = Writer::default()
        .bytes(b"_SM3_")
        .u8(0)
        .u8(ENTRY_LEN as u8)
        .bytes(&[3, 0, 0, 1, 0]) // version 3.0, document revision, entry point revision
        .u32(structures.len() as u32)
        .u64(base + STRUCTURES as u64)
        .finish();
    bytes[5] = checksum(&bytes);
    bytes.resize(STRUCTURES, 0);
    bytes.extend(structures);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u16_at, u32_at, u64_at};
    use crate::layout::{HIGH_MEMORY, SMBIOS_TABLES};

    /// A structure and its strings.
    struct Found<'a>(&'a [u8], Vec<&'a str>);

    fn parse(bytes: &[u8]) -> Vec<Found<'_>> {
        let mut rest = &bytes[STRUCTURES..];
        assert_eq!(u32_at(bytes, 12), Some(rest.len() as u32));
        let mut found = Vec::new();
        while !rest.is_empty() {
            let len = usize::from(rest[1]);
            let end = len + rest[len..].windows(2).position(|w| w == [0, 0]).unwrap();
            let text = std::str::from_utf8(&rest[len..end]).unwrap();
            found.push(Found(&rest[..len], text.split('\0').collect()));
            rest = &rest[end + 2..];
        }
        found
    }

    #[test]
    fn structures_are_of_their_lengths_and_tell_the_machine() {
        let layout = MemoryLayout::new(40 << 30, 0).unwrap();
        let uuid = *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
        let platform = Platform { sockets: 2, cores: 3, threads: 2, uuid, ..Platform::new(12) };
        let bytes = build(SMBIOS_TABLES, &layout, &platform);
        assert_eq!(checksum(&bytes[..ENTRY_LEN]), 0);
        assert_eq!(u64_at(&bytes, 16), Some(SMBIOS_TABLES + 32));
        let found = parse(&bytes);
        let shapes: Vec<_> = found.iter().map(|f| (f.0[0], f.0.len())).collect();
        assert_eq!(
            shapes,
            [
                (0, 0x18),
                (1, 0x1b),
                (3, 0x16),
                (4, 0x30),
                (4, 0x30),
                (16, 0x17),
                (17, 0x28),
                (19, 0x1f),
                (19, 0x1f),
                (32, 0x0b),
                (127, 0x04)
            ]
        );
        assert_eq!(found[1].0[8..24], *b"\x33\x22\x11\x00\x55\x44\x77\x66\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
        assert_eq!(found[1].1[1], "Skep virtual machine");
        assert_eq!(found[3].0[0x23..0x26], [3, 3, 6]);
        assert_eq!(u64_at(found[5].0, 0x0f), Some(40 << 30));
        assert_eq!((u16_at(found[6].0, 0x0c), u32_at(found[6].0, 0x1c)), (Some(0x7fff), Some(40 << 10)));
        assert_eq!(u64_at(found[8].0, 0x17), Some(layout.high_end() - 1));
        let mut handles: Vec<_> = found.iter().map(|f| u16_at(f.0, 2).unwrap()).collect();
        handles.sort_unstable();
        handles.dedup();
        assert_eq!(handles.len(), found.len(), "handles are unique");
    }

    #[test]
    fn the_largest_machine_fits() {
        let layout = MemoryLayout::new(1 << 40, 0).unwrap();
        let bytes = build(SMBIOS_TABLES, &layout, &Platform::new(crate::MAX_CPUS));
        assert!(SMBIOS_TABLES + bytes.len() as u64 <= HIGH_MEMORY);
    }
}
