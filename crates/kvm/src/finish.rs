//! Instructions that KVM's emulator does not know.
//!
//! KVM takes instructions apart when they touch memory without backing, and in modes that the processor does not
//! virtualize. Its emulator lacks most of SSE and AVX and some more, and then gives up on the guest
//! (KVM_EXIT_INTERNAL_ERROR). The stepper executes that one instruction on the same state and memory, and KVM goes on.

use kvm_ioctls::VcpuFd;
use skep_hv::state::{StateGroups, System};
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
            let made = factory.create(self.id, &shared.memory, &shared.options.cpuid, shared.tsc_hz);
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
        let fetched = stepper.fetch(&state);
        let bytes = fetched.bytes.iter().map(|byte| format!(" {byte:02x}")).collect::<String>();
        let fail = |why: &str| fail(&bytes, why);
        if fetched.groups != groups {
            groups = fetched.groups;
            state = read(groups).map_err(|error| fail(&error.to_string()))?;
        }
        if let Some(events) = &mut state.events
            && events.exception.is_some_and(|exception| exception.vector == UNDEFINED)
        {
            events.exception = None;
        }
        let events = state.events;
        let foreign = state.system.as_mut().map_or(0, |system| hide_foreign(system, shared));
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

/// Takes out of CR4 what the guest's CPUID does not announce: a paravirtual KVM shows FSGSBASE there, which is its own. The
/// bits that were taken out.
fn hide_foreign(system: &mut System, shared: &Shared) -> u64 {
    const FSGSBASE: u64 = 1 << 16;
    let announced = shared.options.cpuid.get(7, 0).unwrap_or_default().ebx & 1 != 0;
    let foreign = if announced { 0 } else { system.cr4 & FSGSBASE };
    system.cr4 &= !foreign;
    foreign
}
