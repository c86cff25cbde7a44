//! Executing one instruction for a back end that cannot.
//!
//! KVM runs most instructions on the processor, and the few that it must take apart by itself (those that touch
//! memory-mapped registers, those in modes that the processor does not virtualize) with an emulator that does not know
//! all of them. What it gives up on, somebody else executes on the same state and the same memory.

use skep_memory::GuestMemory;

use crate::cpuid::CpuidTable;
use crate::state::{CpuState, StateGroups};
use crate::{HvError, VcpuIo};

/// What came of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The instruction has been executed, or its exception or interrupt gate entered: the state is the one after it.
    Done,
    /// As above, and [`VcpuIo`] answered [`crate::IoFlow::Leave`].
    Leave,
    /// A triple fault.
    TripleFault,
    /// It cannot be executed here either. Nothing has changed. The text is for a person.
    Failed(String),
}

/// Executes single instructions of one vCPU.
///
/// Others write the same memory meanwhile, page tables and code included, and not through this process: a step keeps
/// nothing that it has read or decoded before.
pub trait Stepper: Send {
    /// The groups of state that [`Stepper::step`] needs, and that it may change.
    fn groups(&self) -> StateGroups;
    /// Executes the instruction at the state's RIP, with its repetitions (a bounded number of them: RIP stays, if more are
    /// left). Does not look for interrupts. Ports and memory without backing are reached through `io`.
    fn step(&mut self, state: &mut CpuState, io: &mut dyn VcpuIo) -> Step;
}

/// Makes steppers.
pub trait StepperFactory: Send + Sync {
    /// One for vCPU `id` of a VM with this memory, this CPUID and a TSC of `tsc_hz`.
    fn create(
        &self,
        id: u32,
        memory: &GuestMemory,
        cpuid: &CpuidTable,
        tsc_hz: u64,
    ) -> Result<Box<dyn Stepper>, HvError>;
}
