//! The contract that every way of running a CPU satisfies.
//!
//! A back end (the software CPU, Linux KVM) is reached in three steps: [`Hypervisor::probe`] says whether and how
//! well it works here, [`Hypervisor::create_vm`] binds guest memory, [`Vm::create_vcpu`] makes processors. A vCPU
//! runs itself on the thread that calls [`Vcpu::run`] and calls back through [`VcpuIo`] for what it cannot do
//! alone. No back end's exit codes cross this contract.
//!
//! The room also holds what machine and devices share with a back end: interrupt lines, message-signalled interrupts
//! and doorbells ([`irq`]), typed processor state ([`state`]), counters ([`stats`]), and the CPUID policy ([`cpuid`]).

pub mod cpuid;
pub mod irq;
pub mod state;
pub mod stats;
pub mod step;

use std::sync::Arc;

use skep_memory::GuestMemory;

use crate::irq::{BackEndApics, Doorbell, Signal};
use crate::state::{CpuState, StateError, StateGroups};
pub use crate::stats::{Compared, Translations, VcpuStats};
use crate::step::StepperFactory;

/// How a back end would run on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Short name: `software`, `kvm`.
    pub name: &'static str,
    /// True if guests can run at all.
    pub available: bool,
    /// Why it is (not) available, one sentence for a person.
    pub reason: String,
}

/// Settings that hold for every vCPU of a VM.
#[derive(Clone)]
pub struct VmOptions {
    /// Number of vCPUs that will be created, 1 to 255.
    pub vcpus: u32,
    /// What CPUID shows (already filtered by policy).
    pub cpuid: cpuid::CpuidTable,
    /// Guest TSC frequency in Hz; `None` takes the host's.
    pub tsc_hz: Option<u64>,
    /// What leaves the guest.
    pub exits: ExitControls,
    /// Finishes instructions that the back end cannot. A back end that can do all by itself does not use it.
    pub stepper: Option<Arc<dyn StepperFactory>>,
}

impl Default for VmOptions {
    /// One vCPU that shows nothing in CPUID, at the host's TSC frequency.
    fn default() -> Self {
        let exits = ExitControls::default();
        Self { vcpus: 1, cpuid: cpuid::CpuidTable::default(), tsc_hz: None, exits, stepper: None }
    }
}

/// What a waiting guest does to the host's processor. A back end without hardware virtualization ignores these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitControls {
    /// HLT leaves the guest, so that the host's processor can do other work (bhyve's `-H`). Without it a halted vCPU
    /// keeps its host processor.
    pub hlt: bool,
    /// PAUSE leaves the guest when it is run in a loop, so that the host can run the vCPU which is waited for (bhyve's
    /// `-P`).
    pub pause: bool,
    /// For how long, in ns, a halted vCPU polls for work before its thread sleeps; `None` leaves it to the host.
    pub halt_poll_ns: Option<u32>,
}

impl Default for ExitControls {
    /// Both leave, and the host decides about polling.
    fn default() -> Self {
        Self { hlt: true, pause: true, halt_poll_ns: None }
    }
}

/// One way of running CPUs.
pub trait Hypervisor {
    /// Looks at the host without leaving anything behind.
    fn probe(&self) -> Probe;
    /// The TSC frequency in Hz at which guests run best here: the host's, where it can be had. What CPUID tells the
    /// guest must be known before the VM exists, and [`VmOptions::tsc_hz`] asks for the same.
    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }
    /// What CPUID may show: the host's own table, less what this back end cannot give to guests.
    fn cpuid(&self) -> Result<cpuid::CpuidTable, HvError> {
        Ok(cpuid::host())
    }
    /// Creates a VM over `memory`. Nothing runs yet.
    fn create_vm(&self, memory: GuestMemory, options: VmOptions) -> Result<Arc<dyn Vm>, HvError>;
}

/// A VM: guest memory as the back end sees it, and its vCPUs.
pub trait Vm: Send + Sync {
    /// Creates vCPU `id` (its APIC ID; 0 is the bootstrap processor) in its reset state, SDM vol. 3A §11.1.1.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, HvError>;
    /// The back end's own local APICs. `None`: the machine supplies them, and vCPUs ask through [`VcpuIo`].
    fn apics(&self) -> Option<Arc<dyn BackEndApics>> {
        None
    }
    /// Tells the back end that the region layout of guest memory has changed (all vCPUs are out of the guest).
    fn memory_changed(&self) -> Result<(), HvError>;
    /// Brings the dirty log of guest memory up to date with every write that a vCPU has made so far, and makes
    /// sure that later writes are logged again. Callable while vCPUs run.
    fn sync_dirty_log(&self) -> Result<(), HvError>;
    /// Asks for `event` to be signalled without leaving the guest when the guest writes `doorbell`; the event must have
    /// a descriptor ([`Signal::event_fd`]). A back end that has no such path says `false`, and the write reaches
    /// [`VcpuIo`] as any other.
    fn attach_doorbell(&self, doorbell: Doorbell, event: &Arc<dyn Signal>) -> Result<bool, HvError> {
        let _ = (doorbell, event);
        Ok(false)
    }
    /// Takes back a doorbell that was attached.
    fn detach_doorbell(&self, doorbell: Doorbell, event: &Arc<dyn Signal>) {
        let _ = (doorbell, event);
    }
    /// Frequency of the guest's TSC in Hz.
    fn tsc_hz(&self) -> u64;
    /// The TSC of `vcpu` now, as RDTSC would show it; any thread may ask. The machine converts TSC deadlines to host
    /// time relative to it. Without a back end's own answer: [`monotonic_ns`] at [`Vm::tsc_hz`].
    fn tsc(&self, vcpu: u32) -> u64 {
        let _ = vcpu;
        (u128::from(monotonic_ns()) * u128::from(self.tsc_hz()) / 1_000_000_000) as u64
    }
}

/// Stops [`Vcpu::run`] from any thread.
pub trait Kick: Send + Sync {
    /// Makes a current or the next `run` return [`RunEnd::Kicked`]. Never lost, never blocks.
    fn kick(&self);
    /// Makes a vCPU that runs or halts look at its interrupts again; `run` does not return.
    fn wake(&self);
}

/// Why [`Vcpu::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunEnd {
    /// [`Kick::kick`] was called, or [`VcpuIo`] answered [`IoFlow::Leave`]. State is at an instruction boundary.
    Kicked,
    /// HLT with interrupts disabled and nothing that could end it.
    Halted,
    /// Triple fault (SDM vol. 3A §6.15, interrupt 8): the vCPU is in shutdown.
    TripleFault,
    /// The back end cannot go on. The text is for a person, with the instruction pointer and bytes where known.
    Failed(String),
}

/// One virtual processor.
pub trait Vcpu: Send {
    /// Runs until there is a reason to stop. `io` is called on this thread.
    fn run(&mut self, io: &mut dyn VcpuIo) -> RunEnd;
    /// A handle that stops or wakes this vCPU from elsewhere.
    fn kicker(&self) -> Arc<dyn Kick>;
    /// Reads the named groups of state. Only between runs.
    fn get_state(&mut self, groups: StateGroups) -> Result<CpuState, StateError>;
    /// Writes the groups that `state` holds. Only between runs.
    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError>;
    /// Resets to the power-on state (SDM vol. 3A table 11-1).
    fn reset(&mut self);
    /// Counters since creation.
    fn stats(&self) -> VcpuStats;
}

/// What the machine answers to a vCPU's request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoFlow {
    /// Go on in the guest.
    Continue,
    /// Finish this instruction, then return [`RunEnd::Kicked`].
    Leave,
}

/// What a vCPU waits for after INIT, as its APIC tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Startup {
    /// INIT arrived: reset and wait for a start-up IPI.
    Init,
    /// A start-up IPI arrived with this vector.
    Sipi(u8),
}

/// The machine, as one vCPU's thread sees it. Every method is called on that thread.
///
/// `width` is 1, 2 or 4 bytes for ports and 1, 2, 4 or 8 for memory; wider or straddling guest accesses arrive in
/// naturally aligned pieces, lowest address first.
pub trait VcpuIo {
    /// IN. Unclaimed ports read as all ones.
    fn port_read(&mut self, port: u16, width: u8) -> u32;
    /// OUT.
    fn port_write(&mut self, port: u16, width: u8, value: u32) -> IoFlow;
    /// A read of a guest physical address that no memory backs. Unclaimed addresses read as all ones.
    fn memory_read(&mut self, gpa: u64, width: u8) -> u64;
    /// A write to a guest physical address that no (writable) memory backs.
    fn memory_write(&mut self, gpa: u64, width: u8, value: u64) -> IoFlow;

    // The local APIC. A back end with APICs of its own asks the first two for interrupts of the 8259 pair alone, tells
    // the third, and does not call the others.

    /// What the local APIC has for the processor now. Cheap: called after every wake and whenever interrupts
    /// become possible. Also the place where the APIC's timer is looked at.
    fn interrupts(&mut self) -> Pending;
    /// The processor takes the interrupt that [`Pending::vector`] announced: INTA. `None` if it has gone.
    fn acknowledge(&mut self) -> Option<u8>;
    /// A level-triggered interrupt with this vector has ended: told by back ends with APICs of their own, for the vectors of
    /// [`irq::MsiSender::announce_pin`].
    fn end_of_interrupt(&mut self, vector: u8) {
        let _ = vector;
    }
    /// The processor takes a pending NMI.
    fn acknowledge_nmi(&mut self);
    /// The processor acts on INIT or start-up.
    fn acknowledge_startup(&mut self) -> Option<Startup>;
    /// CR8, the task priority (bits 3:0).
    fn cr8(&mut self) -> u8;
    /// Writes CR8.
    fn set_cr8(&mut self, value: u8);
    /// IA32_APIC_BASE and the x2APIC MSRs (0x800 to 0x8ff), and IA32_TSC_DEADLINE (0x6e0). `None`: #GP(0).
    fn apic_msr_read(&mut self, msr: u32) -> Option<u64>;
    /// As above, write. `tsc` values are guest TSC values. `None`: #GP(0).
    fn apic_msr_write(&mut self, msr: u32, value: u64) -> Option<IoFlow>;
    /// Sends a fixed, lowest-priority or NMI IPI to the APIC IDs in `targets` (paravirtual send-IPI hypercall).
    fn send_ipis(&mut self, icr: u64, targets: &mut dyn Iterator<Item = u32>);

    /// The back end could not execute the instruction at `rip` (linear address; `bytes` as far as they can be read), and
    /// the stepper has. Told for every one.
    fn emulated(&mut self, rip: u64, bytes: &[u8]) {
        let _ = (rip, bytes);
    }
}

/// What waits at a local APIC, in the order of priority in which a processor looks at it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pending {
    /// INIT or start-up.
    pub startup: bool,
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// A maskable interrupt that the task priority lets through (ExtINT included).
    pub maskable: bool,
    /// Host time in ns (monotonic, [`monotonic_ns`]) at which to look again at the latest; `u64::MAX` for never.
    pub next_ns: u64,
}

/// Host monotonic time in ns: the one clock that devices and back ends share.
pub fn monotonic_ns() -> u64 {
    use std::sync::OnceLock;
    use std::time::Instant;
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// A back end's refusal or failure.
#[derive(Debug, thiserror::Error)]
pub enum HvError {
    /// The host cannot do this; the text names the remedy.
    #[error("{0}")]
    Unsupported(String),
    /// An operating-system call failed.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The error.
        source: std::io::Error,
    },
    /// The request makes no sense to this back end.
    #[error("{0}")]
    Invalid(String),
}
