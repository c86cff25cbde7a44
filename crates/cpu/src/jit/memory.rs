//! Where translated code lies: in parts that are filled one after the other and, when all are full, emptied in the same order. In a
//! part, code that runs often grows from the bottom up, what stands out of its way from the top down. Where the host allows
//! it, one mapping that is writable and executable; else one memfd, mapped writable at one address and executable at
//! another.
#![expect(unsafe_code, reason = "memory mappings")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// Bytes of code kept before the oldest of it is dropped and translated anew as it is needed. The host gives memory as it is used.
pub(super) const SIZE: usize = 128 << 20;
/// Parts of it.
pub(super) const PARTS: usize = 8;
/// What large pages are aligned to.
const LARGE: usize = 2 << 20;

/// The memory, and how much is used.
pub(super) struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    /// What was mapped, to be given back.
    mapped: Vec<(NonNull<u8>, usize)>,
    size: usize,
    /// Bytes at the bottom that stay.
    floor: usize,
    /// The part that is being filled: its number, and where its room begins and ends.
    part: usize,
    low: usize,
    high: usize,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Of `size` bytes, which parts of whole pages have.
    pub(super) fn new(size: usize) -> io::Result<Self> {
        Self::both(size).or_else(|_| Self::split(size))
    }

    /// One mapping, of large pages if the host has them: code is spread over so much of it that small pages cost dearly.
    fn both(size: usize) -> io::Result<Self> {
        let len = size + LARGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let at = map(len, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, flags, -1)?;
        let skip = at.as_ptr().align_offset(LARGE);
        // SAFETY: within the mapping, which is longer by as much.
        let aligned = unsafe { at.add(skip.min(LARGE)) };
        // SAFETY: advice on our own mapping; refused, it costs nothing but speed.
        unsafe { libc::madvise(aligned.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        Ok(Self::of(aligned, aligned, size, vec![(at, len)]))
    }

    /// Two views of one memfd.
    fn split(size: usize) -> io::Result<Self> {
        // SAFETY: a plain system call; the name is a C string.
        let fd = unsafe { libc::memfd_create(c"skep-jit".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a plain system call.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let writable = map(size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd.as_raw_fd())?;
        let mut memory = Self::of(writable, writable, size, vec![(writable, size)]);
        memory.executable = map(size, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, fd.as_raw_fd())?;
        memory.mapped.push((memory.executable, size));
        Ok(memory)
    }

    fn of(
        writable: NonNull<u8>,
        executable: NonNull<u8>,
        size: usize,
        mapped: Vec<(NonNull<u8>, usize)>,
    ) -> Self {
        Self { writable, executable, mapped, size, floor: 0, part: 0, low: 0, high: size / PARTS }
    }

    /// Keeps bytes at the bottom for data; to be called before anything is added.
    pub(super) fn reserve(&mut self, len: usize) {
        self.low = len.min(self.high);
    }

    /// What was added so far stays.
    pub(super) fn keep(&mut self) {
        self.floor = self.low;
    }

    /// Where data at an offset is read by code.
    pub(super) fn data(&self, offset: usize) -> u64 {
        self.executable.as_ptr() as u64 + offset as u64
    }

    /// Writes a word of data.
    pub(super) fn set_data(&mut self, offset: usize, value: u64) {
        if offset + 8 <= self.floor {
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

    /// Bytes left in the part that is being filled.
    pub(super) fn room(&self) -> usize {
        self.high - self.low
    }

    /// The part that is being filled.
    pub(super) fn part(&self) -> usize {
        self.part
    }

    /// Where the part that is being filled lies.
    pub(super) fn range(&self) -> Range<u64> {
        let len = (self.size / PARTS) as u64;
        let begin = self.executable.as_ptr() as u64 + self.part as u64 * len;
        begin..begin + len
    }

    /// Which part holds the code at an address.
    pub(super) fn part_of(&self, address: u64) -> usize {
        address.wrapping_sub(self.executable.as_ptr() as u64) as usize / (self.size / PARTS)
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

    /// Goes on to the next part, which is empty from now on.
    pub(super) fn go_on(&mut self) {
        self.fill((self.part + 1) % PARTS);
    }

    /// Drops all but what stays.
    pub(super) fn empty(&mut self) {
        self.fill(0);
    }

    fn fill(&mut self, part: usize) {
        let len = self.size / PARTS;
        self.part = part;
        self.low = if part == 0 { self.floor } else { part * len };
        self.high = (part + 1) * len;
    }

    /// Changes the displacement of a jump, which ends at `end`, to lead to `target`. Only the thread that runs the code may.
    pub(super) fn link(&mut self, end: u64, target: u64) {
        let offset = end.wrapping_sub(self.executable.as_ptr() as u64) as usize;
        if !(4..=self.size).contains(&offset) {
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

    const SMALL: usize = 1 << 20;

    #[test]
    fn code_runs_in_either_kind_of_memory() {
        for memory in [CodeMemory::both(SMALL), CodeMemory::split(SMALL)] {
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
            code.resize(SMALL / PARTS, 0);
            assert!(!memory.add(&code, &[]));
            memory.empty();
            assert_eq!(memory.room(), SMALL / PARTS);
        }
    }

    #[test]
    fn parts_are_filled_in_turn_and_the_first_keeps_what_stays() {
        let mut memory = CodeMemory::new(SMALL).unwrap();
        memory.reserve(4096);
        assert!(memory.add(&[0xc3; 100], &[]));
        memory.keep();
        let first = memory.next();
        for turn in 0..2 * PARTS {
            let part = turn % PARTS;
            assert_eq!((memory.part(), memory.part_of(memory.next())), (part, part));
            let room = SMALL / PARTS - if part == 0 { 4096 + 112 } else { 0 };
            assert_eq!(memory.room(), room);
            assert!(memory.add(&vec![0xc3; room - 64], &[0xcc; 32]), "{turn}");
            assert_eq!(memory.part_of(memory.next_aside(0)), part);
            assert!(!memory.add(&[0xc3; 32], &[]), "{turn}");
            memory.go_on();
        }
        assert_eq!(memory.next(), first);
    }
}
