//! Where translated code lies: code that runs often from the bottom up, what stands out of its way from the top down. Where the
//! host allows it, one mapping that is writable and executable; else one memfd, mapped writable at one address and
//! executable at another.
#![expect(unsafe_code, reason = "memory mappings")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// Bytes of code kept before all of it is dropped and translated anew as it is needed. The host gives memory as it is used.
pub(super) const SIZE: usize = 128 << 20;
/// What large pages are aligned to.
const LARGE: usize = 2 << 20;

/// The memory, and how much is used.
pub(super) struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    /// What was mapped, to be given back.
    mapped: Vec<(NonNull<u8>, usize)>,
    /// Bytes used at the bottom, and where the top's begin.
    low: usize,
    high: usize,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    pub(super) fn new() -> io::Result<Self> {
        Self::both().or_else(|_| Self::split())
    }

    /// One mapping, of large pages if the host has them: code is spread over so much of it that small pages cost dearly.
    fn both() -> io::Result<Self> {
        let len = SIZE + LARGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let at = map(len, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, flags, -1)?;
        let skip = at.as_ptr().align_offset(LARGE);
        // SAFETY: within the mapping, which is longer by as much.
        let aligned = unsafe { at.add(skip.min(LARGE)) };
        // SAFETY: advice on our own mapping; refused, it costs nothing but speed.
        unsafe { libc::madvise(aligned.as_ptr().cast(), SIZE, libc::MADV_HUGEPAGE) };
        Ok(Self { writable: aligned, executable: aligned, mapped: vec![(at, len)], low: 0, high: SIZE })
    }

    /// Two views of one memfd.
    fn split() -> io::Result<Self> {
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
        let writable = map(SIZE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd.as_raw_fd())?;
        let mut memory =
            Self { writable, executable: writable, mapped: vec![(writable, SIZE)], low: 0, high: SIZE };
        memory.executable = map(SIZE, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, fd.as_raw_fd())?;
        memory.mapped.push((memory.executable, SIZE));
        Ok(memory)
    }

    /// Keeps bytes at the bottom for data; to be called before anything is added.
    pub(super) fn reserve(&mut self, len: usize) {
        self.low = len.min(SIZE);
    }

    /// Where data at an offset is read by code.
    pub(super) fn data(&self, offset: usize) -> u64 {
        self.executable.as_ptr() as u64 + offset as u64
    }

    /// Writes a word of data.
    pub(super) fn set_data(&mut self, offset: usize, value: u64) {
        if offset + 8 <= self.low {
            // SAFETY: within the mapping by the check; only the thread that runs the code writes.
            unsafe { self.writable.as_ptr().add(offset).cast::<u64>().write_unaligned(value) };
        }
    }

    /// Where the next code will be executed.
    pub(super) fn next(&self) -> u64 {
        self.executable.as_ptr() as u64 + self.low as u64
    }

    /// Where code out of the way would be executed that is `len` bytes long.
    pub(super) fn next_aside(&self, len: usize) -> u64 {
        self.executable.as_ptr() as u64 + self.high.saturating_sub(len) as u64
    }

    /// Bytes left.
    pub(super) fn room(&self) -> usize {
        self.high - self.low
    }

    /// Bytes used at the bottom.
    pub(super) fn used(&self) -> usize {
        self.low
    }

    /// Adds code that was made for [`CodeMemory::next`], and what was made for [`CodeMemory::next_aside`]. False: no room.
    #[must_use]
    pub(super) fn add(&mut self, code: &[u8], aside: &[u8]) -> bool {
        if code.len() + aside.len() + 16 > self.room() {
            return false;
        }
        self.high -= aside.len();
        // SAFETY: within the mapping by the check; nobody executes what is not handed out yet.
        unsafe {
            self.writable.as_ptr().add(self.low).copy_from_nonoverlapping(code.as_ptr(), code.len());
            self.writable.as_ptr().add(self.high).copy_from_nonoverlapping(aside.as_ptr(), aside.len());
        }
        self.low = (self.low + code.len()).next_multiple_of(16);
        true
    }

    /// Drops all but the first `keep` bytes.
    pub(super) fn truncate(&mut self, keep: usize) {
        self.low = keep.min(self.low);
        self.high = SIZE;
    }

    /// Changes the displacement of a jump, which ends at `end`, to lead to `target`. Only the thread that runs the code may.
    pub(super) fn link(&mut self, end: u64, target: u64) {
        let offset = end.wrapping_sub(self.executable.as_ptr() as u64) as usize;
        if !(4..=SIZE).contains(&offset) {
            return;
        }
        let distance = target.wrapping_sub(end) as u32;
        // SAFETY: within the mapping by the check. The processor that runs this thread sees its own stores.
        unsafe { self.writable.as_ptr().add(offset - 4).cast::<u32>().write_unaligned(distance) };
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        for &(at, len) in &self.mapped {
            // SAFETY: mapped by `new`; whoever could run code from it is gone with its owner.
            unsafe { libc::munmap(at.as_ptr().cast(), len) };
        }
    }
}

fn map(len: usize, protection: libc::c_int, flags: libc::c_int, fd: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh mapping at an address of the system's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
    NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED).ok_or_else(io::Error::last_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_in_either_kind_of_memory() {
        for memory in [CodeMemory::both(), CodeMemory::split()] {
            let mut memory = memory.unwrap();
            // mov eax, edi; add eax, 1; jmp to what lies aside: ret
            let aside = memory.next_aside(1);
            let (at, end) = (memory.next(), memory.next() + 10);
            let mut code = vec![0x89, 0xf8, 0x83, 0xc0, 1, 0xe9, 0, 0, 0, 0];
            assert!(memory.add(&code, &[0xc3]));
            memory.link(end, aside);
            // SAFETY: the code above is such a function.
            let f: extern "sysv64" fn(u32) -> u32 = unsafe { std::mem::transmute(at as *const ()) };
            assert_eq!(f(41), 42);
            code.resize(SIZE, 0);
            assert!(!memory.add(&code, &[]));
            memory.truncate(0);
            assert_eq!((memory.used(), memory.room()), (0, SIZE));
        }
    }
}
