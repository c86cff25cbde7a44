//! The few requests that kvm-ioctls has no method for.
#![expect(unsafe_code, reason = "ioctl is a C function with a variable argument list")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use kvm_bindings::{KVMIO, kvm_interrupt, kvm_ioeventfd};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Gives the vCPU an external interrupt, which must be ready for it.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let request = kvm_interrupt { irq: vector.into() };
    // SAFETY: the descriptor is a vCPU's, and the request reads a structure of this type.
    check(unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &request) }).map(drop)
}

/// Attaches or detaches a doorbell.
pub(crate) fn io_event(vm: &VmFd, request: &kvm_ioeventfd) -> io::Result<()> {
    // SAFETY: the descriptor is a VM's, and the request reads a structure of this type.
    check(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), request) }).map(drop)
}

/// The TSC frequency of the VM in kHz (since Linux 5.18).
pub(crate) fn vm_tsc_khz(vm: &VmFd) -> io::Result<u32> {
    // SAFETY: the descriptor is a VM's, and the request takes no argument.
    check(unsafe { ioctl(vm, KVM_GET_TSC_KHZ()) }).map(|khz| khz as u32)
}

/// A descriptor from which the vCPU's counters can be read.
pub(crate) fn statistics(vcpu: &VcpuFd) -> io::Result<File> {
    // SAFETY: the descriptor is a vCPU's, and the request takes no argument.
    let fd: RawFd = check(unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) })?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Write-protects again what the rings have told; how many entries that were.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> io::Result<u32> {
    // SAFETY: the descriptor is a VM's, and the request takes no argument.
    check(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) }).map(|count| count as u32)
}

/// The descriptor's number, for mapping it.
pub(crate) fn raw(vcpu: &VcpuFd) -> RawFd {
    vcpu.as_raw_fd()
}
