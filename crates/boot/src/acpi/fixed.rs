//! The tables of fixed form: FACS, FADT, MADT, HPET.

use super::table;
use crate::bytes::Writer;
use crate::layout::{
    ACPI_DISABLE, ACPI_ENABLE, CMOS_CENTURY, GPE0, GPE0_LEN, HPET, HPET_BLOCK_ID, IOAPIC, IOAPIC_ID,
    LOCAL_APIC, PIT_GSI, PM_TIMER, PM1A_CONTROL, PM1A_EVENT, RESET_PORT, RESET_VALUE, SCI_IRQ, SMI_COMMAND,
};

/// Firmware ACPI control structure, §5.2.10: no waking vector, the global lock free.
pub(super) fn facs() -> Vec<u8> {
    Writer::default().bytes(b"FACS").u32(64).zeros(24).u8(2).zeros(31).finish()
}

/// A register in I/O space as a generic address structure, §5.2.3.2; `access` is 1 for byte to 3 for dword.
fn port(writer: Writer, address: u16, bits: u8, access: u8) -> Writer {
    writer.u8(1).u8(bits).u8(0).u8(access).u64(address.into())
}

/// Fixed feature flags, §5.2.9, table 5.10.
mod flags {
    pub(super) const WBINVD: u32 = 1 << 0;
    pub(super) const PROC_C1: u32 = 1 << 2;
    /// There is no sleep button among the fixed events. (PWR_BUTTON, bit 4, is clear: there is a power button.)
    pub(super) const SLP_BUTTON: u32 = 1 << 5;
    /// Waking by the RTC is not among the fixed events.
    pub(super) const FIX_RTC: u32 = 1 << 6;
    /// The power management timer has 32 bits.
    pub(super) const TMR_VAL_EXT: u32 = 1 << 8;
    pub(super) const RESET_REG_SUP: u32 = 1 << 10;
}

/// Boot architecture flags, §5.2.9.3: ISA devices, a keyboard controller, no VGA.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 1 | 1 << 2;
/// Latencies that say that C2 and C3 are not there.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// Fixed ACPI description table, §5.2.9.
pub(super) fn fadt(facs: u32, dsdt: u32) -> Vec<u8> {
    let flags = flags::WBINVD
        | flags::PROC_C1
        | flags::SLP_BUTTON
        | flags::FIX_RTC
        | flags::TMR_VAL_EXT
        | flags::RESET_REG_SUP;
    let w = Writer::default()
        .u32(facs)
        .u32(dsdt)
        .u8(0) // reserved
        .u8(0) // Preferred_PM_Profile: unspecified
        .u16(SCI_IRQ.into())
        .u32(SMI_COMMAND.into())
        .u8(ACPI_ENABLE)
        .u8(ACPI_DISABLE)
        .u8(0) // S4BIOS_REQ
        .u8(0) // PSTATE_CNT
        .u32(PM1A_EVENT.into())
        .u32(0)
        .u32(PM1A_CONTROL.into())
        .u32(0)
        .u32(0) // PM2_CNT_BLK
        .u32(PM_TIMER.into())
        .u32(GPE0.into())
        .u32(0)
        .u8(4) // PM1_EVT_LEN
        .u8(2) // PM1_CNT_LEN
        .u8(0) // PM2_CNT_LEN
        .u8(4) // PM_TMR_LEN
        .u8(GPE0_LEN)
        .zeros(3) // GPE1_BLK_LEN, GPE1_BASE, CST_CNT
        .u16(NO_C2)
        .u16(NO_C3)
        .zeros(4) // FLUSH_SIZE, FLUSH_STRIDE
        .zeros(4) // DUTY_OFFSET, DUTY_WIDTH, DAY_ALRM, MON_ALRM
        .u8(CMOS_CENTURY)
        .u16(BOOT_ARCH)
        .u8(0)
        .u32(flags);
    let w = port(w, RESET_PORT, 8, 1)
        .u8(RESET_VALUE)
        .u16(0) // ARM_BOOT_ARCH
        .u8(5) // FADT minor version
        .u64(0) // X_FIRMWARE_CTRL: FIRMWARE_CTRL holds
        .u64(dsdt.into());
    let w = port(w, PM1A_EVENT, 32, 2).zeros(12);
    let w = port(w, PM1A_CONTROL, 16, 2).zeros(12).zeros(12);
    let w = port(w, PM_TIMER, 32, 3);
    let w = port(w, GPE0, GPE0_LEN * 8, 1).zeros(12);
    let w = w.zeros(24).bytes(b"SKEP").zeros(4); // SLEEP_*_REG, Hypervisor Vendor Identity
    table(b"FACP", 6, &w.finish())
}

/// Multiple APIC description table, §5.2.12.
pub(super) fn madt(apic_ids: &[u32]) -> Vec<u8> {
    // PCAT_COMPAT: there are two 8259s as well.
    let mut w = Writer::default().u32(LOCAL_APIC as u32).u32(1);
    let mut wide = false;
    for (uid, &id) in (0u32..).zip(apic_ids) {
        w = match (u8::try_from(uid), u8::try_from(id)) {
            // 255 is "all processors" in both fields.
            (Ok(uid @ ..=254), Ok(id @ ..=254)) => w.u8(0).u8(8).u8(uid).u8(id).u32(1),
            _ => {
                wide = true;
                w.u8(9).u8(16).u16(0).u32(id).u32(1).u32(uid)
            }
        };
    }
    w = w.u8(1).u8(12).u8(IOAPIC_ID).u8(0).u32(IOAPIC as u32).u32(0);
    // Interrupt source overrides: the 8254 is not at its ISA line's input; the SCI is level, active high.
    w = w.u8(2).u8(10).u8(0).u8(0).u32(PIT_GSI).u16(0);
    w = w.u8(2).u8(10).u8(0).u8(SCI_IRQ).u32(SCI_IRQ.into()).u16(0b1101);
    // NMI at LINT1 of every processor.
    w = w.u8(4).u8(6).u8(0xff).u16(0).u8(1);
    if wide {
        w = w.u8(10).u8(12).u16(0).u32(u32::MAX).u8(1).zeros(3);
    }
    table(b"APIC", 5, &w.finish())
}

/// High-precision event timer table, IA-PC HPET 1.0a §3.2.4.
pub(super) fn hpet() -> Vec<u8> {
    let w = Writer::default()
        .u32(HPET_BLOCK_ID)
        .bytes(&[0, 64, 0, 0])
        .u64(HPET)
        .u8(0) // number
        .u16(0x80) // fewest ticks of a periodic interrupt
        .u8(0); // page protection: none
    table(b"HPET", 1, &w.finish())
}
