//! What the firmware tables tell of the machine.

/// Most processors that the firmware tables have room for.
pub const MAX_CPUS: u32 = 512;

/// The machine as ACPI and SMBIOS describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Local APIC IDs in the order of the processors; the first is the boot processor's.
    pub apic_ids: Vec<u32>,
    /// Processor packages.
    pub sockets: u32,
    /// Cores in each package.
    pub cores: u32,
    /// Threads in each core.
    pub threads: u32,
    /// Which of COM1 to COM4 exist.
    pub serial: [bool; 4],
    /// System UUID, in the order in which it is written.
    pub uuid: [u8; 16],
}

impl Platform {
    /// `cpus` processors with APIC IDs from 0, one package each, and all four serial ports.
    pub fn new(cpus: u32) -> Self {
        Self {
            apic_ids: (0..cpus).collect(),
            sockets: cpus,
            cores: 1,
            threads: 1,
            serial: [true; 4],
            uuid: [0; 16],
        }
    }
}
