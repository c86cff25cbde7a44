//! Where translated code lies: one memfd, mapped writable at one address and executable at another.
#![expect(unsafe_code, reason = "memory mappings")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// Bytes of code kept before all of it is dropped and translated anew as it is needed.
pub(super) const SIZE: usize = 64 << 20;

/// Both views of the memory, and how much is used.
pub(super) struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    used: usize,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: a plain system call; the name is a C string.
        let fd = unsafe { libc::memfd_create(c"skep-jit".as_ptr(), libc::MFD_CLOEXEC) };
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
        match map(&fd, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(executable) => Ok(Self { writable, executable, used: 0 }),
            Err(error) => {
                // SAFETY: mapped above, not used since.
                unsafe { libc::munmap(writable.as_ptr().cast(), SIZE) };
                Err(error)
            }
        }
    }

    /// Where the next code will be executed.
    pub(super) fn next(&self) -> u64 {
        self.executable.as_ptr() as u64 + self.used as u64
    }

    /// Bytes left.
    pub(super) fn room(&self) -> usize {
        SIZE - self.used
    }

    /// Bytes used.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Adds code that was made for [`CodeMemory::next`]. False: no room.
    #[must_use]
    pub(super) fn add(&mut self, code: &[u8]) -> bool {
        if code.len() > self.room() {
            return false;
        }
        // SAFETY: within the mapping by the check; nobody executes what is not handed out yet.
        unsafe { self.writable.as_ptr().add(self.used).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        self.used = (self.used + code.len()).next_multiple_of(16).min(SIZE);
        true
    }

    /// Drops what lies behind the first `keep` bytes.
    pub(super) fn truncate(&mut self, keep: usize) {
        self.used = keep.min(self.used);
    }

    /// Changes the displacement of a jump, which ends at `end`, to lead to `target`. Only the thread that runs the code may.
    pub(super) fn link(&mut self, end: u64, target: u64) {
        let offset = end.wrapping_sub(self.executable.as_ptr() as u64) as usize;
        if !(4..=self.used).contains(&offset) {
            return;
        }
        let distance = target.wrapping_sub(end) as u32;
        // SAFETY: within the mapping by the check. The processor that runs this thread sees its own stores.
        unsafe { self.writable.as_ptr().add(offset - 4).cast::<u32>().write_unaligned(distance) };
    }

    /// The bytes from `from` on, for people.
    pub(super) fn bytes(&self, from: u64, len: usize) -> &[u8] {
        let offset = (from.wrapping_sub(self.executable.as_ptr() as u64) as usize).min(self.used);
        // SAFETY: within what is used; only this value's owner writes.
        unsafe { std::slice::from_raw_parts(self.writable.as_ptr().add(offset), len.min(self.used - offset)) }
    }
}

impl Drop for CodeMemory {
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
