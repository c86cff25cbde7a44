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
    /// As above, and it was one that invalidates cached translations (INVLPG, INVPCID, MOV to CR3): the back end must
    /// forget its own.
    Flushed,
    /// As [`Step::Done`], and [`VcpuIo`] answered [`crate::IoFlow::Leave`].
    Leave,
    /// A triple fault.
    TripleFault,
    /// It cannot be executed here either. The state has not changed. The text is for a person.
    Failed(String),
}

/// What stands at a state's RIP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Linear address of the instruction: the base of CS plus RIP.
    pub rip: u64,
    /// The bytes there, 15 at most; fewer where a page behind them cannot be fetched, none where the first cannot.
    pub bytes: Vec<u8>,
    /// Of [`Stepper::groups`], those that a step from here needs.
    pub groups: StateGroups,
}

/// Executes single instructions of one vCPU.
///
/// Others write the same memory meanwhile, page tables and code included, and not through this process: a step keeps
/// nothing that it has read or decoded before.
pub trait Stepper: Send {
    /// The groups of state that [`Stepper::step`] needs whatever the instruction is.
    fn groups(&self) -> StateGroups;
    /// What stands at the state's RIP, and which groups of state a step from here needs. Looks at the general and system
    /// registers alone.
    fn fetch(&mut self, state: &CpuState) -> Fetched;
    /// Executes the instruction at the state's RIP, with its repetitions (a bounded number of them: RIP stays, if more are
    /// left). If an exception waits in the state, delivers that instead. Does not look for interrupts. Ports and memory
    /// without backing are reached through `io`; CR8 and IA32_APIC_BASE are those of the state.
    ///
    /// Unless it fails, `state` then holds the general registers, and of the other groups those that have changed: `None`
    /// is unchanged. Of the MSRs it lists the changed ones.
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
