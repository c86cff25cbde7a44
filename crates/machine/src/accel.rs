//! Which back end runs the vCPUs.

use skep_cpu::Software;
use skep_hv::cpuid::{self, CpuidTable, PolicyOptions, policy};
use skep_hv::{HvError, Hypervisor};

use crate::error::Error;
use crate::spec::{Accel, Engine, MachineSpec};

/// The back end that `spec` asks for.
///
/// # Errors
/// This host has not what it takes.
pub fn hypervisor(spec: &MachineSpec) -> Result<Box<dyn Hypervisor>, Error> {
    match (spec.accel, spec.engine) {
        (Accel::Software, Some(Engine::Interpreter)) => Ok(Box::new(Software::new())),
        // A specification without an engine is not valid for the software CPU.
        (Accel::Software, None) => Err(Error::Internal("there is no engine to run".into())),
        (Accel::Kvm, _) => {
            let message = "this version of skep cannot run processors on KVM; use accel \"software\"";
            Err(Error::Hypervisor(HvError::Unsupported(message.into())))
        }
    }
}

/// What CPUID shows to the guest of a back end whose TSC runs at `tsc_hz`.
pub(crate) fn cpuid(spec: &MachineSpec, tsc_hz: u64) -> CpuidTable {
    let options = PolicyOptions {
        vcpus: spec.vcpus(),
        cores: spec.cpus.cores,
        threads: spec.cpus.threads,
        tsc_hz,
        // What the chipset's local APICs count at.
        apic_hz: 1_000_000_000,
        ..PolicyOptions::default()
    };
    policy(&cpuid::host(), &options)
}
