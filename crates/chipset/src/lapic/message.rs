//! Interrupt messages: the interrupt command register (SDM vol. 3A §11.6.1), MSI address and data (§11.11), and
//! which APICs a destination means (§11.6.2).

use skep_hv::irq::MsiMessage;

/// What a message does to the processor that gets it (delivery mode).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryMode {
    /// Vector to every target.
    Fixed,
    /// Vector to the target with the lowest priority.
    LowestPriority,
    /// System-management interrupt: there is no SMM here, it does nothing.
    Smi,
    /// Reserved encoding: does nothing.
    Reserved,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI.
    StartUp,
    /// The vector comes from the 8259 pair.
    ExtInt,
}

impl DeliveryMode {
    /// From the three-bit field (bits 10:8 of ICR, LVT, MSI data).
    pub fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => Self::Reserved,
        }
    }
}

/// What arrives at one APIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// Mode. Lowest-priority has been arbitrated and is like fixed.
    pub mode: DeliveryMode,
    /// Vector.
    pub vector: u8,
    /// Level-triggered: the end of the interrupt is broadcast to IOAPICs.
    pub level: bool,
}

/// Whom a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// Every APIC.
    All,
    /// The APIC with this ID.
    Physical(u32),
    /// APICs whose logical ID matches.
    Logical(u32),
}

impl Destination {
    /// From an eight-bit destination field, where all ones is everybody.
    pub fn from_xapic(id: u8, logical: bool) -> Self {
        match (id, logical) {
            (0xff, _) => Self::All,
            (id, true) => Self::Logical(id.into()),
            (id, false) => Self::Physical(id.into()),
        }
    }

    /// From a 32-bit destination field, where all ones is everybody.
    pub fn from_x2apic(id: u32, logical: bool) -> Self {
        match (id, logical) {
            (u32::MAX, _) => Self::All,
            (id, true) => Self::Logical(id),
            (id, false) => Self::Physical(id),
        }
    }
}

/// Destination shorthand of the ICR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shorthand {
    /// The destination field counts.
    None,
    /// The sender.
    Itself,
    /// Everybody.
    All,
    /// Everybody but the sender.
    Others,
}

/// An interprocessor interrupt on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipi {
    /// What it does.
    pub delivery: Delivery,
    /// Whom it is for, if there is no shorthand.
    pub destination: Destination,
    /// Shorthand.
    pub shorthand: Shorthand,
}

impl Ipi {
    /// From the interrupt command register. `None` for an INIT level de-assert, which processors since the
    /// Pentium 4 ignore (§11.6.1).
    pub fn from_icr(icr: u64, x2apic: bool) -> Option<Self> {
        let low = icr as u32;
        let mode = DeliveryMode::from_bits(low >> 8);
        let (assert, level) = (low & 1 << 14 != 0, low & 1 << 15 != 0);
        if mode == DeliveryMode::Init && level && !assert {
            return None;
        }
        let logical = low & 1 << 11 != 0;
        let destination = if x2apic {
            Destination::from_x2apic((icr >> 32) as u32, logical)
        } else {
            Destination::from_xapic((icr >> 56) as u8, logical)
        };
        let shorthand = match low >> 18 & 3 {
            0 => Shorthand::None,
            1 => Shorthand::Itself,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        // IPIs other than INIT de-assert are edge-triggered whatever the trigger bit says (table 11-3).
        Some(Self { delivery: Delivery { mode, vector: low as u8, level: false }, destination, shorthand })
    }
}

/// Takes an MSI apart; `None` if it does not go to local APICs or is a level de-assert.
pub(super) fn decode_msi(message: MsiMessage) -> Option<(Delivery, Destination)> {
    if message.address >> 20 != 0xfee {
        return None;
    }
    let (address, data) = (message.address as u32, message.data);
    let level = data & 1 << 15 != 0;
    if level && data & 1 << 14 == 0 {
        return None;
    }
    // The redirection hint asks for one of several logical targets.
    let mode = match DeliveryMode::from_bits(data >> 8) {
        DeliveryMode::Fixed if address & 1 << 3 != 0 => DeliveryMode::LowestPriority,
        mode => mode,
    };
    let destination = Destination::from_xapic((address >> 12) as u8, address & 1 << 2 != 0);
    Some((Delivery { mode, vector: data as u8, level }, destination))
}

/// How one APIC is addressed: a copy of the registers that decide it, in one atomic word, so that finding the
/// targets of a message takes no lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Route {
    /// x2APIC mode.
    pub x2apic: bool,
    /// The logical destination register.
    pub ldr: u32,
    /// DFR says flat model, not cluster.
    pub flat: bool,
    /// Enabled by SVR and IA32_APIC_BASE: takes part in lowest-priority arbitration.
    pub enabled: bool,
}

impl Route {
    /// As one word.
    pub(super) fn pack(self) -> u64 {
        u64::from(self.ldr)
            | u64::from(self.x2apic) << 32
            | u64::from(self.flat) << 33
            | u64::from(self.enabled) << 34
    }

    /// From one word.
    pub(super) fn unpack(word: u64) -> Self {
        Self {
            ldr: word as u32,
            x2apic: word >> 32 & 1 != 0,
            flat: word >> 33 & 1 != 0,
            enabled: word >> 34 & 1 != 0,
        }
    }

    /// Whether a logical destination means this APIC (§11.6.2.2 flat and cluster, §11.12.10 x2APIC).
    pub(super) fn matches_logical(self, destination: u32) -> bool {
        if self.x2apic {
            return destination >> 16 == self.ldr >> 16 && destination & self.ldr & 0xffff != 0;
        }
        let ldr = self.ldr >> 24;
        if destination > 0xff {
            false
        } else if self.flat {
            destination & ldr != 0
        } else {
            (destination >> 4 == ldr >> 4 || destination >> 4 == 0xf) && destination & ldr & 0xf != 0
        }
    }
}
