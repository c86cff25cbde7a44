//! Assembly of a machine from its specification, and its life from then on.
//!
//! [`MachineSpec`] is the machine as data. [`Machine::create`] checks it, allocates memory, loads what is booted, wires the
//! devices and starts the threads; from then on the machine takes commands and tells events to an [`EventSink`]. Dropping
//! the handle ends everything.
//!
//! # Threads
//!
//! * The **owner** is the only one that changes the machine's state, one command at a time.
//! * Every **vCPU** has a thread that runs the guest and dispatches its register accesses to the devices, each behind
//!   its own lock.
//! * The **timer** sleeps until the next device is due. Local APIC timers are the vCPUs' own business.
//! * The **pump** carries bytes between the serial ports and what is behind them.
//!
//! Locks are taken in this order: a device, the interrupt controllers, one local APIC; then leaves (the pump's state, the
//! timer's). The owner thread is reached by messages alone, so that no lock is ever held while it is waited for.
//!
//! Guest time goes on while a machine is paused: clocks show the host's time when it is resumed.

mod accel;
mod apics;
mod board;
mod bus;
mod clock;
mod error;
mod event;
mod harness;
pub mod host;
mod machine;
mod owner;
mod registers;
mod serial;
pub mod spec;
mod timer;
mod vcpu;

pub use accel::hypervisor;
pub use bus::DeviceStats;
pub use error::Error;
pub use event::{End, Event, EventSink, Reason, ResetCause, State};
pub use harness::{DoorbellHandle, Harness};
pub use machine::{Command, MAX_TRANSFER, Machine, Reply, Stats, VcpuCount};
pub use serial::CONSOLE_WINDOW;
pub use spec::MachineSpec;
