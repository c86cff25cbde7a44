//! `/dev/kvm`.

use std::sync::Arc;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm as KvmFd, VmFd};
use skep_hv::cpuid::{CpuidLeaf, CpuidTable};
use skep_hv::{HvError, Hypervisor, Probe, Vm, VmOptions};
use skep_memory::GuestMemory;

use crate::capabilities::Capabilities;
use crate::error::Tried;
use crate::vm::KvmVm;

/// What can be chosen about KVM itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KvmOptions {
    /// Log written pages in rings of this many entries, one for each vCPU (rounded down to a power of two, and to what
    /// the kernel allows), and not in bitmaps: what a sync costs then grows with the number of pages written, not with
    /// the size of memory. 0 for bitmaps, which cost nothing while nobody asks.
    pub dirty_ring: u32,
}

/// Linux KVM.
pub struct Kvm {
    fd: KvmFd,
    capabilities: Capabilities,
    options: KvmOptions,
    tsc_khz: u64,
}

impl Kvm {
    /// Opens `/dev/kvm` and looks at what it can do.
    ///
    /// # Errors
    /// It is not there, may not be opened, or lacks something that every machine needs; the text says which.
    pub fn open(options: KvmOptions) -> Result<Self, HvError> {
        let fd = KvmFd::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => HvError::Unsupported(
                "there is no /dev/kvm: load the kernel's module (sudo modprobe kvm_intel, or kvm_amd) and enable \
                 virtualization in the firmware's set-up, or use accel \"software\""
                    .into(),
            ),
            libc::EACCES | libc::EPERM => HvError::Unsupported(
                "/dev/kvm exists but may not be opened: add yourself to group kvm (sudo usermod -aG kvm $USER) and log \
                 in again"
                    .into(),
            ),
            _ => HvError::Os { what: "open /dev/kvm", source: error.into() },
        })?;
        let capabilities = Capabilities::probe(&fd)?;
        let vm = fd.create_vm().tried("KVM_CREATE_VM")?;
        let tsc_khz = tsc_khz(&vm);
        Ok(Self { fd, capabilities, options, tsc_khz })
    }
}

/// The frequency at which guests' TSCs run unless told otherwise, in kHz. Takes a VM that nobody else uses.
fn tsc_khz(vm: &VmFd) -> u64 {
    // Older kernels answer for vCPUs only.
    let khz = crate::ioctl::vm_tsc_khz(vm).ok().filter(|&khz| khz != 0);
    let khz = khz.or_else(|| vm.create_vcpu(0).ok()?.get_tsc_khz().ok());
    khz.map_or(1_000_000, u64::from)
}

impl Hypervisor for Kvm {
    fn probe(&self) -> Probe {
        Probe { name: "kvm", available: true, reason: "/dev/kvm has all that is needed".into() }
    }

    fn tsc_hz(&self) -> u64 {
        self.tsc_khz * 1000
    }

    fn cpuid(&self) -> Result<CpuidTable, HvError> {
        let entries = self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).tried("KVM_GET_SUPPORTED_CPUID")?;
        let mut table = CpuidTable::default();
        for entry in entries.as_slice() {
            let leaf = CpuidLeaf { eax: entry.eax, ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx };
            table.set(entry.function, entry.index, leaf);
        }
        // The brand string is not KVM's to say.
        let own = skep_hv::cpuid::host();
        for function in 0x8000_0002..=0x8000_0004 {
            table.set(function, 0, own.get(function, 0).unwrap_or_default());
        }
        // This one has a capability of its own.
        if let Some(mut leaf) = table.get(1, 0) {
            let deadline = 1 << 24;
            leaf.ecx = leaf.ecx & !deadline | if self.capabilities.tsc_deadline { deadline } else { 0 };
            table.set(1, 0, leaf);
        }
        Ok(table)
    }

    fn create_vm(&self, memory: GuestMemory, options: VmOptions) -> Result<Arc<dyn Vm>, HvError> {
        let hz = options.tsc_hz.unwrap_or(self.tsc_hz());
        if hz.abs_diff(self.tsc_hz()) > self.tsc_hz() / 4000 && !self.capabilities.tsc_scaling {
            let text = format!(
                "a TSC of {} MHz: this host's processor cannot scale its own {} MHz",
                hz / 1_000_000,
                self.tsc_khz / 1000
            );
            return Err(HvError::Unsupported(text));
        }
        let vm = KvmVm::create(&self.fd, self.capabilities, self.options.dirty_ring, hz, memory, options)?;
        Ok(Arc::new(vm))
    }
}
