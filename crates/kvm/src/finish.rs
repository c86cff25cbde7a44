//! Instructions that KVM's emulator does not know.
//!
//! KVM takes instructions apart when they touch memory without backing, and in modes that the processor does not
//! virtualize. Its emulator lacks most of SSE and AVX and some more, and then gives up on the guest
//! (KVM_EXIT_INTERNAL_ERROR). The stepper executes that one instruction on the same state and memory, and KVM goes on.

use kvm_ioctls::VcpuFd;
use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{CpuState, StateGroups};
use skep_hv::step::{Step, Stepper};
use skep_hv::{IoFlow, RunEnd, VcpuIo};

use crate::state;
use crate::vm::Shared;

/// KVM_INTERNAL_ERROR_EMULATION.
const EMULATION: u32 = 1;
/// #UD, which kernels without KVM_CAP_EXIT_ON_EMULATION_FAILURE raise as well.
const UNDEFINED: u8 = 6;

/// Executes what KVM cannot, for one vCPU.
pub(crate) struct Finisher {
    id: u32,
    /// Made when it is first needed, which most guests never do.
    stepper: Option<Box<dyn Stepper>>,
}

impl Finisher {
    pub(crate) fn new(id: u32) -> Self {
        Self { id, stepper: None }
    }

    fn stepper(&mut self, shared: &Shared) -> Result<&mut dyn Stepper, String> {
        if self.stepper.is_none() {
            let factory = shared.options.stepper.as_ref().ok_or("there is no interpreter to help it")?;
            let made = factory.create(self.id, &shared.memory, &shared.seen, shared.tsc_hz);
            self.stepper = Some(made.map_err(|error| error.to_string())?);
        }
        self.stepper.as_deref_mut().map(|stepper| stepper as _).ok_or_else(|| "no interpreter".into())
    }

    /// Executes the instruction that KVM has given up on.
    pub(crate) fn finish(
        &mut self,
        vcpu: &VcpuFd,
        shared: &Shared,
        suberror: u32,
        io: &mut dyn VcpuIo,
    ) -> Result<IoFlow, RunEnd> {
        let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
        let fail = |what: &str, why: &str| {
            RunEnd::Failed(format!("KVM cannot execute the instruction at {rip:#x}{what}: {why}"))
        };
        if suberror != EMULATION {
            return Err(fail("", &format!("internal error {suberror}")));
        }
        let stepper = self.stepper(shared).map_err(|why| fail("", &why))?;
        let mut groups = stepper.groups();
        // The events in any case: KVM may have put one there.
        let read = |groups| state::get(vcpu, StateGroups { events: true, ..groups }, &shared.shape);
        let mut state = read(groups).map_err(|error| fail("", &error.to_string()))?;
        let mut foreign = hide_foreign(&mut state, &shared.seen);
        let fetched = stepper.fetch(&state);
        let bytes = fetched.bytes.iter().map(|byte| format!(" {byte:02x}")).collect::<String>();
        let fail = |why: &str| fail(&bytes, why);
        if fetched.groups != groups {
            groups = fetched.groups;
            state = read(groups).map_err(|error| fail(&error.to_string()))?;
            foreign = hide_foreign(&mut state, &shared.seen);
        }
        if let Some(events) = &mut state.events
            && events.exception.is_some_and(|exception| exception.vector == UNDEFINED)
        {
            events.exception = None;
        }
        let events = state.events;
        let step = stepper.step(&mut state, io);
        let flow = match step {
            Step::Done | Step::Flushed => IoFlow::Continue,
            Step::Leave => IoFlow::Leave,
            Step::TripleFault => return Err(RunEnd::TripleFault),
            Step::Failed(why) => return Err(fail(&why)),
        };
        // What has not changed is not there; KVM's #UD is to go in any case.
        state.events = state.events.or(events);
        if let Some(system) = &mut state.system {
            system.cr4 |= foreign;
        }
        state::set(vcpu, &state, &shared.shape).map_err(|error| fail(&error.to_string()))?;
        if step == Step::Flushed {
            state::flush_translations(vcpu).map_err(|error| fail(&error.to_string()))?;
        }
        io.emulated(fetched.rip, &fetched.bytes);
        Ok(flow)
    }
}

/// Features whose instructions the interpreter executes without any state but the general and the SSE registers, by leaf: ECX,
/// EDX and EBX of it (SDM vol. 2A, CPUID).
const STATELESS: [(u32, [u32; 3]); 3] = [
    // SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, PCID, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, RDRAND.
    (1, [1 << 0 | 1 << 1 | 1 << 9 | 1 << 13 | 1 << 17 | 0b11 << 19 | 0b11 << 22 | 1 << 25 | 1 << 30, 0, 0]),
    // UMIP, RDPID; FSGSBASE, BMI1, SMEP, BMI2, INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA.
    (7, [1 << 2 | 1 << 22, 0, 1 << 0 | 1 << 3 | 0b11 << 7 | 1 << 10 | 0b111 << 18 | 0b11 << 23 | 1 << 29]),
    // LAHF in 64-bit mode, LZCNT, PREFETCHW; RDTSCP.
    (0x8000_0001, [1 << 0 | 1 << 5 | 1 << 8, 1 << 27, 0]),
];

/// What the guest finds when it executes CPUID. Where the host's processor virtualizes nothing, KVM is a paravirtual one, and CPUID
/// tells the guest of that processor whatever the guest's table says. It uses what it sees, of which KVM's emulator knows
/// little.
pub(crate) fn seen(table: &CpuidTable, host: &CpuidTable) -> CpuidTable {
    let leaf = |function| host.get(function, 0).unwrap_or_default();
    let (vmx, svm) = (leaf(1).ecx & 1 << 5, leaf(0x8000_0001).ecx & 1 << 2);
    let mut seen = table.clone();
    if vmx == 0 && svm == 0 {
        for (function, [ecx, edx, ebx]) in STATELESS {
            let mut its = table.get(function, 0).unwrap_or_default();
            its.ecx |= leaf(function).ecx & ecx;
            its.edx |= leaf(function).edx & edx;
            its.ebx |= leaf(function).ebx & ebx;
            seen.set(function, 0, its);
        }
    }
    seen
}

/// Bits of CR4 that processors have only with a feature, and where CPUID announces it.
const CR4_FEATURES: [(u32, Announced); 7] = [
    (11, Announced { function: 7, ecx: 1 << 2, ebx: 0 }), // UMIP
    (16, Announced { function: 7, ecx: 0, ebx: 1 << 0 }), // FSGSBASE
    (17, Announced { function: 1, ecx: 1 << 17, ebx: 0 }), // PCIDE
    (18, Announced { function: 1, ecx: 1 << 26, ebx: 0 }), // OSXSAVE
    (20, Announced { function: 7, ecx: 0, ebx: 1 << 7 }), // SMEP
    (21, Announced { function: 7, ecx: 0, ebx: 1 << 20 }), // SMAP
    (22, Announced { function: 7, ecx: 1 << 3, ebx: 0 }), // PKE
];

struct Announced {
    function: u32,
    ecx: u32,
    ebx: u32,
}

/// Takes out of CR4 what is not [seen] in CPUID or has more state: guests may have turned it on all the same. The bits that were taken
/// out; the instruction is executed without what they check.
fn hide_foreign(state: &mut CpuState, cpuid: &CpuidTable) -> u64 {
    let Some(system) = &mut state.system else { return 0 };
    let unannounced = |feature: &Announced| {
        let leaf = cpuid.get(feature.function, 0).unwrap_or_default();
        leaf.ecx & feature.ecx == 0 && leaf.ebx & feature.ebx == 0
    };
    let bits = CR4_FEATURES.iter().filter(|(_, feature)| unannounced(feature)).map(|(bit, _)| 1 << bit);
    let foreign = system.cr4 & bits.fold(0, |all, bit: u64| all | bit);
    system.cr4 &= !foreign;
    foreign
}

#[cfg(test)]
mod tests {
    use skep_hv::cpuid::CpuidLeaf;
    use skep_hv::state::System;

    use super::*;

    #[test]
    fn what_cpuid_does_not_announce_is_hidden() {
        let hidden = |cr4, table: &CpuidTable| {
            let mut state =
                CpuState { system: Some(System { cr4, ..System::default() }), ..CpuState::default() };
            let foreign = hide_foreign(&mut state, table);
            (foreign, state.system.unwrap().cr4)
        };
        let mut table = CpuidTable::default();
        assert_eq!(hidden(0x35_0eb0, &table), (0x35_0800, 0x06b0));
        // FSGSBASE and SMAP, but not SMEP; XSAVE.
        table.set(7, 0, CpuidLeaf { ebx: 1 | 1 << 20, ..CpuidLeaf::default() });
        table.set(1, 0, CpuidLeaf { ecx: 1 << 26, ..CpuidLeaf::default() });
        assert_eq!(hidden(0x35_0eb0, &table), (0x10_0800, 0x25_06b0));
        assert_eq!(hide_foreign(&mut CpuState::default(), &table), 0);
    }

    #[test]
    fn a_paravirtual_kvm_shows_the_host_s_processor() {
        let leaf = |ecx, edx, ebx| CpuidLeaf { ecx, edx, ebx, ..CpuidLeaf::default() };
        let mut table = CpuidTable::default();
        table.set(1, 0, leaf(1 << 31, 1, 7));
        // SSE3, XSAVE, OSXSAVE, AVX; SMEP, AVX2, SMAP, AVX512F; RDTSCP.
        let mut host = CpuidTable::default();
        host.set(1, 0, leaf(1 | 0b111 << 26, u32::MAX, u32::MAX));
        host.set(7, 0, leaf(0, 0, 1 << 7 | 1 << 5 | 1 << 20 | 1 << 16));
        host.set(0x8000_0001, 0, leaf(0, 1 << 27, 0));
        let its = seen(&table, &host);
        assert_eq!(its.get(1, 0), Some(leaf(1 << 31 | 1, 1, 7)));
        assert_eq!(its.get(7, 0), Some(leaf(0, 0, 1 << 7 | 1 << 20)));
        assert_eq!(its.get(0x8000_0001, 0), Some(leaf(0, 1 << 27, 0)));
        // One with virtualization shows the table.
        host.set(1, 0, leaf(1 | 1 << 5, 0, 0));
        assert_eq!(seen(&table, &host), table);
    }
}
