//! Which back end runs the vCPUs.

use skep_cpu::Software;
use skep_hv::Hypervisor;
use skep_hv::cpuid::{CpuidTable, PolicyOptions, Provider, policy};
use skep_kvm::{Kvm, KvmOptions};

use crate::error::Error;
use crate::spec::{Accel, MachineSpec};

/// The back end that `spec` asks for.
///
/// # Errors
/// This host does not have it, or does not let this process use it; the text names the remedy.
pub fn hypervisor(spec: &MachineSpec) -> Result<Box<dyn Hypervisor>, Error> {
    match (spec.accel, spec.engine) {
        (Accel::Software, Some(engine)) => Ok(Box::new(Software::with_engine(engine.into()))),
        // A specification without an engine is not valid for the software CPU.
        (Accel::Software, None) => Err(Error::Internal("there is no engine to run".into())),
        (Accel::Kvm, _) => Ok(Box::new(Kvm::open(KvmOptions::default())?)),
    }
}

/// What CPUID shows to the guest of a back end that can give `host` and whose TSC runs at `tsc_hz`.
pub(crate) fn cpuid(spec: &MachineSpec, host: &CpuidTable, tsc_hz: u64) -> Result<CpuidTable, Error> {
    let options = PolicyOptions {
        provider: match spec.accel {
            Accel::Software => Provider::Software,
            Accel::Kvm => Provider::Hardware,
        },
        model: spec.cpu.model,
        features: spec.cpu.features.clone(),
        vcpus: spec.vcpus(),
        cores: spec.cpus.cores,
        threads: spec.cpus.threads,
        tsc_hz,
        hlt_exits: spec.exits.hlt,
        // What the chipset's local APICs count at.
        apic_hz: 1_000_000_000,
    };
    Ok(policy(host, &options)?)
}
