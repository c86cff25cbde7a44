//! Executable memory that is never writable and executable at the same address: one memfd, mapped twice.
#![expect(unsafe_code, reason = "memory mappings, and calls into the code that lies in them")]

use std::arch::asm;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use super::fpu::Frame;
use crate::cpu::Cpu;

/// Bytes of code that fit. A guest uses a few thousand distinct re-encoded instructions at most.
const SIZE: usize = 1 << 20;
/// What is kept free for the instructions of one block.
const RESERVE: usize = 64 << 10;

/// Both views of the memory, and how much is used.
pub(super) struct Arena {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    used: usize,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for Arena {}

impl Arena {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: a plain system call; the name is a C string.
        let fd = unsafe { libc::memfd_create(c"skep-thunks".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a plain system call.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), SIZE as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let writable = map(&fd, libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = match map(&fd, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(at) => at,
            Err(error) => {
                // SAFETY: mapped above, not used since.
                unsafe { libc::munmap(writable.as_ptr().cast(), SIZE) };
                return Err(error);
            }
        };
        Ok(Self { writable, executable, used: 0 })
    }

    /// Adds code; its offset. `None`: no room.
    pub(super) fn add(&mut self, code: &[u8]) -> Option<u32> {
        let at = self.used;
        if code.len() > SIZE - at {
            return None;
        }
        // SAFETY: within the mapping by the check; nobody executes what is not handed out yet.
        unsafe { self.writable.as_ptr().add(at).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        self.used = (at + code.len()).next_multiple_of(32).min(SIZE);
        Some(at as u32)
    }

    /// Little room is left.
    pub(super) fn full(&self) -> bool {
        SIZE - self.used < RESERVE
    }

    /// Forgets all code.
    pub(super) fn clear(&mut self) {
        self.used = 0;
    }

    /// Address of the code at `offset`.
    #[inline(always)]
    pub(super) fn address(&self, offset: u32) -> u64 {
        self.executable.as_ptr() as u64 + u64::from(offset)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        for view in [self.writable, self.executable] {
            // SAFETY: mapped by `new`; whoever could run code from it is gone with its owner.
            unsafe { libc::munmap(view.as_ptr().cast(), SIZE) };
        }
    }
}

fn map(fd: &OwnedFd, protection: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh mapping at an address of the system's choice.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), SIZE, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
    NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED).ok_or_else(io::Error::last_os_error)
}

impl Cpu {
    /// Runs the thunk at `offset`.
    #[inline(always)]
    pub(super) fn call_thunk(&mut self, offset: u32) {
        let address = self.thunks.address(offset) as *const ();
        let cpu: *mut Cpu = self;
        // SAFETY: offsets come from `Thunks` alone (decoded blocks are dropped before it forgets code), which emits
        // functions of this type that touch the frame, the general registers and the status flags of `cpu`, and
        // run one instruction that `gate` offers and `encode` has verified.
        unsafe {
            let frame: *mut Frame = &raw mut (*cpu).fpu.frame;
            let thunk: extern "sysv64" fn(*mut Frame, *mut Cpu) = std::mem::transmute(address);
            thunk(frame, cpu);
        }
    }

    /// Runs the thunk at `offset`, an instruction that depends on MXCSR, under the guest's.
    ///
    /// Loading MXCSR costs more than most instructions. So as long as the host's control bits are the guest's, as they
    /// nearly always are, the host's MXCSR is left as the guest's: its exception flags are not preserved across calls
    /// anyway. Flags that the host has raised meanwhile are kept from the guest.
    #[inline(always)]
    pub(super) fn call_arithmetic(&mut self, offset: u32) {
        let guest = self.fpu.frame.mxcsr;
        let host = mxcsr();
        if (guest ^ host) & !FLAGS == 0 {
            if host & !guest != 0 {
                set_mxcsr(guest);
            }
            self.call_thunk(offset);
            self.fpu.frame.mxcsr = guest | mxcsr();
        } else {
            set_mxcsr(guest);
            self.call_thunk(offset);
            self.fpu.frame.mxcsr = mxcsr();
            set_mxcsr(host);
        }
    }
}

/// MXCSR: exception flags.
const FLAGS: u32 = 0x3f;

/// The host's MXCSR.
#[inline(always)]
fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores four bytes.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// Sets the host's MXCSR, to what it was or, for the length of a thunk, to the guest's.
#[inline(always)]
fn set_mxcsr(value: u32) {
    // SAFETY: loads four bytes; the guest's MXCSR has no reserved bits set. Nothing between a load of the guest's and
    // the load of the host's computes with floating point.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
}
