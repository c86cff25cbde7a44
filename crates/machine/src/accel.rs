//! Which back end runs the vCPUs.

use skep_cpu::Software;
use skep_hv::Hypervisor;
use skep_hv::cpuid::CpuidTable;

use crate::spec::{Accel, Engine, MachineSpec};

/// The back end that `spec` asks for.
pub fn hypervisor(spec: &MachineSpec) -> Box<dyn Hypervisor> {
    match (spec.accel, spec.engine) {
        (Accel::Software, Engine::Interpreter) => Box::new(Software::new()),
    }
}

/// What CPUID shows to the guest.
pub(crate) fn cpuid(_spec: &MachineSpec) -> CpuidTable {
    CpuidTable::default()
}
