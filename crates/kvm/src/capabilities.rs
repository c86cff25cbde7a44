//! What this KVM can do.

use kvm_bindings::*;
use kvm_ioctls::Kvm as KvmFd;
use skep_hv::HvError;

/// The only version of the API that there has been since Linux 2.6.22.
pub const API_VERSION: i32 = 12;

/// Something that every machine needs of KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needed {
    /// Its number, for KVM_CHECK_EXTENSION.
    pub number: u32,
    /// Its name in linux/kvm.h.
    pub name: &'static str,
    /// The Linux that has had it since.
    pub since: &'static str,
}

macro_rules! needed {
    ($($name:ident since $since:literal;)*) => {
        &[$(Needed { number: $name, name: stringify!($name), since: $since }),*]
    };
}

/// What every machine needs.
pub const NEEDED: &[Needed] = needed! {
    KVM_CAP_USER_MEMORY since "2.6.22";
    KVM_CAP_SET_TSS_ADDR since "2.6.24";
    KVM_CAP_EXT_CPUID since "2.6.25";
    KVM_CAP_MP_STATE since "2.6.26";
    KVM_CAP_USER_NMI since "2.6.28";
    KVM_CAP_IRQ_ROUTING since "2.6.30";
    KVM_CAP_IRQFD since "2.6.32";
    KVM_CAP_IOEVENTFD since "2.6.32";
    KVM_CAP_SET_IDENTITY_MAP_ADDR since "2.6.32";
    KVM_CAP_VCPU_EVENTS since "2.6.33";
    KVM_CAP_DEBUGREGS since "2.6.35";
    KVM_CAP_XSAVE since "2.6.36";
    KVM_CAP_XCRS since "2.6.36";
    KVM_CAP_SIGNAL_MSI since "3.5";
    KVM_CAP_READONLY_MEM since "3.8";
    KVM_CAP_SPLIT_IRQCHIP since "4.4";
    KVM_CAP_IMMEDIATE_EXIT since "4.13";
};

/// Bits of KVM_CAP_X86_DISABLE_EXITS.
pub(crate) const DISABLE_HLT: u64 = 1 << 1;
pub(crate) const DISABLE_PAUSE: u64 = 1 << 2;

/// Optional abilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// Most vCPUs of a VM.
    pub(crate) max_vcpus: u32,
    /// The guest's TSC can have a frequency other than the host's.
    pub(crate) tsc_scaling: bool,
    /// The APIC timer has the TSC-deadline mode.
    pub(crate) tsc_deadline: bool,
    /// Doorbells of any width.
    pub(crate) any_length: bool,
    /// 32-bit APIC IDs and no quirk about broadcasts.
    pub(crate) x2apic_api: bool,
    /// Which exits can be switched off.
    pub(crate) disable_exits: u64,
    /// Polling of halted vCPUs can be set.
    pub(crate) halt_poll: bool,
    /// Most bytes of a dirty ring; 0 for none.
    pub(crate) dirty_ring: u32,
    /// The kernel's own counters can be read.
    pub(crate) statistics: bool,
    /// A failed emulation is always an exit, and leaves the guest's state as it was.
    pub(crate) exit_on_emulation_failure: bool,
}

impl Capabilities {
    /// Asks.
    ///
    /// # Errors
    /// Something is missing that every machine needs.
    pub(crate) fn probe(kvm: &KvmFd) -> Result<Self, HvError> {
        let version = kvm.get_api_version();
        if version != API_VERSION {
            let text = format!(
                "/dev/kvm speaks version {version} of its API, not {API_VERSION}; use accel \"software\""
            );
            return Err(HvError::Unsupported(text));
        }
        let get = |number: u32| kvm.check_extension_raw(number.into()).max(0) as u32;
        if let Some(Needed { name, since, .. }) = NEEDED.iter().find(|needed| get(needed.number) == 0) {
            let text = format!(
                "this host's KVM lacks {name} (Linux has it since {since}); use a newer kernel, or accel \"software\""
            );
            return Err(HvError::Unsupported(text));
        }
        Ok(Self {
            max_vcpus: get(KVM_CAP_MAX_VCPUS).clamp(1, 255),
            tsc_scaling: get(KVM_CAP_TSC_CONTROL) != 0,
            tsc_deadline: get(KVM_CAP_TSC_DEADLINE_TIMER) != 0,
            any_length: get(KVM_CAP_IOEVENTFD_ANY_LENGTH) != 0,
            x2apic_api: get(KVM_CAP_X2APIC_API) != 0,
            disable_exits: get(KVM_CAP_X86_DISABLE_EXITS).into(),
            halt_poll: get(KVM_CAP_HALT_POLL) != 0,
            dirty_ring: get(KVM_CAP_DIRTY_LOG_RING),
            statistics: get(KVM_CAP_BINARY_STATS_FD) != 0,
            exit_on_emulation_failure: get(KVM_CAP_EXIT_ON_EMULATION_FAILURE) != 0,
        })
    }
}
