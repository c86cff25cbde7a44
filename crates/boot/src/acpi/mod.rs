//! ACPI tables (ACPI Specification 6.5): how the guest learns of processors, interrupt controllers, timers, ports
//! and the ways to turn the machine off.

mod dsdt;
mod fixed;

use crate::Platform;
use crate::bytes::{Writer, checksum, put};

const OEM_ID: &[u8; 6] = b"SKEP  ";
const OEM_TABLE_ID: &[u8; 8] = b"SKEPVM  ";
const CREATOR_ID: &[u8; 4] = b"SKEP";
/// Bytes of the header that every table but RSDP and FACS begins with (§5.2.6).
const HEADER: usize = 36;
/// The RSDP's length, §5.2.5.3.
const RSDP_LEN: usize = 36;
/// The FACS wants 64-byte alignment (§5.2.10); the others get it as well.
const ALIGN: usize = 64;

/// Puts a header before `body` and sums up.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Writer::default()
        .bytes(signature)
        .u32((HEADER + body.len()) as u32)
        .u8(revision)
        .u8(0)
        .bytes(OEM_ID)
        .bytes(OEM_TABLE_ID)
        .u32(1)
        .bytes(CREATOR_ID)
        .u32(1)
        .bytes(body)
        .finish();
    bytes[9] = checksum(&bytes);
    bytes
}

/// The root system description pointer, §5.2.5.3.
fn rsdp(rsdt: u32, xsdt: u64) -> Vec<u8> {
    let mut bytes = Writer::default()
        .bytes(b"RSD PTR ")
        .u8(0)
        .bytes(OEM_ID)
        .u8(2)
        .u32(rsdt)
        .u32(RSDP_LEN as u32)
        .u64(xsdt)
        .zeros(4)
        .finish();
    bytes[8] = checksum(&bytes[..20]);
    bytes[32] = checksum(&bytes);
    bytes
}

/// All tables as they stand in memory from `base` on, a multiple of 64 below 4 GiB: the RSDP first.
pub(crate) fn build(base: u32, platform: &Platform) -> Vec<u8> {
    let mut bytes = vec![0; RSDP_LEN];
    let mut place = |table: &[u8]| {
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        let address = base + bytes.len() as u32;
        bytes.extend_from_slice(table);
        address
    };
    let facs = place(&fixed::facs());
    let dsdt = place(&dsdt::dsdt(platform));
    let roots =
        [place(&fixed::fadt(facs, dsdt)), place(&fixed::madt(&platform.apic_ids)), place(&fixed::hpet())];
    let short = roots.iter().fold(Writer::default(), |w, &at| w.u32(at)).finish();
    let long = roots.iter().fold(Writer::default(), |w, &at| w.u64(at.into())).finish();
    // Kernels that predate ACPI 2.0, and many small ones, look for the RSDT only.
    let rsdt = place(&table(b"RSDT", 1, &short));
    let xsdt = place(&table(b"XSDT", 1, &long));
    put::<RSDP_LEN>(&mut bytes, 0, rsdp(rsdt, xsdt.into()).try_into().unwrap_or([0; RSDP_LEN]));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u16_at, u32_at, u64_at};
    use crate::layout::{self, HPET_BLOCK_ID};
    use crate::platform::MAX_CPUS;

    const BASE: u32 = layout::ACPI_TABLES as u32;

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, &b| sum.wrapping_add(b)) == 0
    }

    /// The table at a guest physical address.
    fn at(tables: &[u8], address: u64) -> &[u8] {
        let start = (address - u64::from(BASE)) as usize;
        let len = u32_at(tables, start + 4).unwrap() as usize;
        &tables[start..start + len]
    }

    /// The tables that the XSDT names.
    fn roots(tables: &[u8]) -> Vec<&[u8]> {
        let xsdt = at(tables, u64_at(tables, 24).unwrap());
        assert_eq!(&xsdt[..4], b"XSDT");
        xsdt[HEADER..].chunks(8).map(|entry| at(tables, u64_at(entry, 0).unwrap())).collect()
    }

    #[test]
    fn every_table_is_found_from_the_root_and_sums_up() {
        for cpus in [1, 2, 255, MAX_CPUS] {
            let tables = build(BASE, &Platform::new(cpus));
            assert!(tables.len() as u64 <= layout::SMBIOS_TABLES - layout::ACPI_TABLES, "{cpus} processors");
            assert!(sums_to_zero(&tables[..20]) && sums_to_zero(&tables[..36]));
            let rsdt = at(&tables, u32_at(&tables, 16).unwrap().into());
            assert_eq!(&rsdt[..4], b"RSDT");
            assert!(sums_to_zero(rsdt) && sums_to_zero(at(&tables, u64_at(&tables, 24).unwrap())));
            let roots = roots(&tables);
            assert_eq!(roots.iter().map(|t| &t[..4]).collect::<Vec<_>>(), [b"FACP", b"APIC", b"HPET"]);
            assert!(roots.iter().all(|t| sums_to_zero(t)));
            let fadt = roots[0];
            assert_eq!(fadt.len(), 276);
            let dsdt = at(&tables, u32_at(fadt, 40).unwrap().into());
            assert_eq!(&dsdt[..4], b"DSDT");
            assert!(sums_to_zero(dsdt));
            assert_eq!(u64_at(fadt, 140), u32_at(fadt, 40).map(u64::from), "X_DSDT");
            let facs = at(&tables, u32_at(fadt, 36).unwrap().into());
            assert_eq!((&facs[..4], facs.len()), (b"FACS".as_slice(), 64));
        }
    }

    #[test]
    fn the_fadt_names_the_ports_that_the_machine_has() {
        let tables = build(BASE, &Platform::new(1));
        let fadt = roots(&tables)[0];
        assert_eq!(u16_at(fadt, 46), Some(9));
        assert_eq!(u32_at(fadt, 48), Some(0xb2));
        assert_eq!(fadt[52..54], [0xa1, 0xa0]);
        let ports: Vec<_> = [56, 64, 76, 80].iter().map(|&p| u32_at(fadt, p).unwrap()).collect();
        assert_eq!(ports, [0x600, 0x604, 0x608, 0x620]);
        assert_eq!(fadt[88..93], [4, 2, 0, 4, 4]);
        assert_eq!(fadt[108], 0x32);
        assert_eq!((u64_at(fadt, 120), fadt[128]), (Some(0xcf9), 6));
        for (gas, port) in [(148, 0x600), (172, 0x604), (208, 0x608), (220, 0x620)] {
            assert_eq!((fadt[gas], u64_at(fadt, gas + 4)), (1, Some(port)));
        }
    }

    #[test]
    fn the_madt_lists_every_processor_once() {
        let platform = Platform { apic_ids: vec![0, 2, 254, 255, 0x1_0000], ..Platform::new(5) };
        let tables = build(BASE, &platform);
        let mut entries = &roots(&tables)[1][44..];
        let mut ids = Vec::new();
        let mut others = Vec::new();
        while let [kind, len, ..] = *entries {
            let (entry, rest) = entries.split_at(len.into());
            match kind {
                0 => ids.push((u32::from(entry[2]), u32::from(entry[3]))),
                9 => ids.push((u32_at(entry, 12).unwrap(), u32_at(entry, 4).unwrap())),
                other => others.push(other),
            }
            entries = rest;
        }
        assert_eq!(ids, [(0, 0), (1, 2), (2, 254), (3, 255), (4, 0x1_0000)]);
        assert_eq!(others, [1, 2, 2, 4, 10]);
    }

    #[test]
    fn the_hpet_table_is_of_the_timer() {
        let tables = build(BASE, &Platform::new(1));
        let hpet = roots(&tables)[2];
        assert_eq!(u32_at(hpet, 36), Some(HPET_BLOCK_ID));
        assert_eq!(u64_at(hpet, 44), Some(0xfed0_0000));
    }

    #[test]
    #[ignore = "needs iasl (package acpica-tools)"]
    fn the_reference_disassembler_reads_every_table() {
        let dir = std::env::temp_dir().join(format!("skep-acpi-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let tables = build(BASE, &Platform::new(300));
        let roots = roots(&tables);
        let facs = at(&tables, u32_at(roots[0], 36).unwrap().into());
        let dsdt = at(&tables, u32_at(roots[0], 40).unwrap().into());
        let xsdt = at(&tables, u64_at(&tables, 24).unwrap());
        for table in roots.iter().copied().chain([facs, dsdt, xsdt]) {
            let name = std::str::from_utf8(&table[..4]).unwrap();
            let (binary, source) = (dir.join(format!("{name}.dat")), dir.join(format!("{name}.dsl")));
            std::fs::write(&binary, table).unwrap();
            for args in [vec!["-d".as_ref(), binary.as_os_str()], vec!["-we".as_ref(), source.as_os_str()]] {
                let output = std::process::Command::new("iasl").args(&args).output().unwrap();
                let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "iasl {args:?}: {text}");
                assert!(!text.contains("Invalid") && !text.contains("Incorrect checksum"), "{text}");
            }
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
