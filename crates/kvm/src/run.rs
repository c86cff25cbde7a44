//! What KVM_RUN leaves in the page that it shares with us (`struct kvm_run` of linux/kvm.h).
#![expect(unsafe_code, reason = "the page holds a union, and data behind it")]

use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

/// Why KVM_RUN returned with success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// A port access: `count` items of `width` bytes at `offset` in the page.
    Port { port: u16, write: bool, width: u8, count: u32, offset: u64 },
    /// An access to memory without backing: at most 8 bytes.
    Memory { gpa: u64, write: bool, width: u8, data: u64 },
    /// HLT with nobody in the kernel to wait for an interrupt.
    Halt,
    /// Interrupts have become possible, as was asked for.
    InterruptWindow,
    /// A level-triggered interrupt of an IOAPIC input has ended.
    EndOfInterrupt(u8),
    /// A triple fault.
    Shutdown,
    /// A system event: reset, shutdown, crash (paravirtual; not used by our guests).
    SystemEvent(u32),
    /// The ring of dirty pages is full.
    DirtyRingFull,
    /// A signal.
    Interrupted,
    /// The processor refused to enter the guest: hardware's reason, CPU number.
    FailedEntry(u64, u32),
    /// KVM gave up, for this reason.
    InternalError(u32),
    /// Any other reason.
    Other(u32),
}

/// Name of the exit, for counting.
pub(crate) fn name(exit: &Exit) -> &'static str {
    match exit {
        Exit::Port { write: false, .. } => "portRead",
        Exit::Port { write: true, .. } => "portWrite",
        Exit::Memory { write: false, .. } => "memoryRead",
        Exit::Memory { write: true, .. } => "memoryWrite",
        Exit::Halt => "halt",
        Exit::InterruptWindow => "interruptWindow",
        Exit::EndOfInterrupt(_) => "endOfInterrupt",
        Exit::Shutdown => "shutdown",
        Exit::SystemEvent(_) => "systemEvent",
        Exit::DirtyRingFull => "dirtyRingFull",
        Exit::Interrupted => "interrupted",
        Exit::FailedEntry(..) => "failedEntry",
        Exit::InternalError(_) => "emulationFailure",
        Exit::Other(_) => "other",
    }
}

/// Reads the exit.
pub(crate) fn exit(vcpu: &mut VcpuFd) -> Exit {
    let run = vcpu.get_kvm_run();
    let union = &run.__bindgen_anon_1;
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the reason says that this is the union's member; all of its bits are valid.
            let io = unsafe { union.io };
            Exit::Port {
                port: io.port,
                write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
                width: io.size,
                count: io.count,
                offset: io.data_offset,
            }
        }
        KVM_EXIT_MMIO => {
            // SAFETY: as above.
            let mmio = unsafe { union.mmio };
            Exit::Memory {
                gpa: mmio.phys_addr,
                write: mmio.is_write != 0,
                width: mmio.len.min(8) as u8,
                data: u64::from_le_bytes(mmio.data),
            }
        }
        KVM_EXIT_HLT => Exit::Halt,
        KVM_EXIT_IRQ_WINDOW_OPEN => Exit::InterruptWindow,
        // SAFETY: as above.
        KVM_EXIT_IOAPIC_EOI => Exit::EndOfInterrupt(unsafe { union.eoi.vector }),
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        // SAFETY: as above.
        KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent(unsafe { union.system_event.type_ }),
        KVM_EXIT_DIRTY_RING_FULL => Exit::DirtyRingFull,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let entry = unsafe { union.fail_entry };
            Exit::FailedEntry(entry.hardware_entry_failure_reason, entry.cpu)
        }
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            Exit::InternalError(unsafe { union.internal.suberror })
        }
        reason => Exit::Other(reason),
    }
}

/// Answers a memory read.
pub(crate) fn set_memory_data(vcpu: &mut VcpuFd, value: u64) {
    let union = &mut vcpu.get_kvm_run().__bindgen_anon_1;
    union.mmio.data = value.to_le_bytes();
}

/// The bytes of a port access, to be read or to be filled.
pub(crate) fn port_data(vcpu: &mut VcpuFd, offset: u64, length: usize, page_size: usize) -> &mut [u8] {
    let run: *mut kvm_run = vcpu.get_kvm_run();
    let (offset, end) = (offset as usize, (offset as usize).saturating_add(length));
    if end > page_size {
        return &mut [];
    }
    // SAFETY: the mapping has `page_size` bytes and is borrowed with the vCPU; the kernel writes to it during KVM_RUN only.
    unsafe { std::slice::from_raw_parts_mut(run.cast::<u8>().add(offset), length) }
}
