//! The hypervisor contract ([`skep_hv`]) on Linux KVM.
//!
//! Guest memory becomes memory slots, from which the host's kernel makes the nested page tables (EPT, NPT). vCPUs run in
//! [`KVM_RUN`](https://docs.kernel.org/virt/kvm/api.html), with their local APICs in the kernel: interprocessor interrupts,
//! timers and end of interrupt need no exit to this process. The 8259 pair, the IOAPIC and the 8254 stay in the machine
//! (KVM calls that a split irqchip), so that their state is the same whatever runs the processors, and the kernel has less
//! that a guest can attack; what guests do often, message-signalled interrupts, does not pass through them.
//!
//! * [`Kvm`] opens `/dev/kvm` and says whether it will do, and makes VMs.
//! * `vm` holds memory slots, doorbells and the clock; `apics` the way to the local APICs; `dirty` the dirty log.
//! * `vcpu` is the run loop; `run` reads what KVM left in the shared page; `kick` gets a vCPU out of the guest; `state`
//!   and `msrs` convert registers; `finish` has instructions executed that KVM's emulator does not know.

mod apics;
mod capabilities;
mod dirty;
mod error;
mod finish;
mod host;
mod ioctl;
mod kick;
mod msrs;
mod run;
mod state;
mod statistics;
mod vcpu;
mod vm;

pub use capabilities::{API_VERSION, NEEDED, Needed};
pub use host::{Kvm, KvmOptions};
