//! Which back end runs the vCPUs.

use skep_cpu::Software;
use skep_hv::Hypervisor;
use skep_hv::cpuid::{self, CpuidTable, PolicyOptions, policy};
use skep_kvm::{Kvm, KvmOptions};

use crate::error::Error;
use crate::spec::{Accel, Engine, MachineSpec};

/// The back end that `spec` asks for.
///
/// # Errors
/// This host does not have it, or does not let this process use it; the text names the remedy.
pub fn hypervisor(spec: &MachineSpec) -> Result<Box<dyn Hypervisor>, Error> {
    Ok(match (spec.accel, spec.engine) {
        (Accel::Software, Engine::Interpreter) => Box::new(Software::new()),
        (Accel::Kvm, _) => Box::new(Kvm::open(KvmOptions::default())?),
    })
}

/// What CPUID shows to the guest of a back end whose TSC runs at `tsc_hz`.
pub(crate) fn cpuid(spec: &MachineSpec, hypervisor: &dyn Hypervisor, tsc_hz: u64) -> CpuidTable {
    let options = PolicyOptions {
        vcpus: spec.vcpus(),
        cores: spec.cpus.cores,
        threads: spec.cpus.threads,
        tsc_hz,
        // What the chipset's local APICs count at.
        apic_hz: 1_000_000_000,
        ..PolicyOptions::default()
    };
    let mut table = policy(&cpuid::host(), &options);
    if spec.accel == Accel::Kvm {
        let can = hypervisor.cpuid().unwrap();
        for (f, i) in [(1, 0), (7, 0), (7, 2), (0xd, 1), (0x8000_0001, 0), (0x4000_0001, 0)] {
            let (mut leaf, can) = (table.get(f, i).unwrap_or_default(), can.get(f, i).unwrap_or_default());
            if f != 1 {
                if f != 7 {
                    leaf.eax &= can.eax;
                }
                leaf.ebx &= can.ebx;
            }
            leaf.ecx &= can.ecx | 1 << 31;
            leaf.edx &= can.edx;
            table.set(f, i, leaf);
        }
    }
    table
}
