//! The memfd and its mapping.
#![expect(unsafe_code, reason = "mmap, munmap and memfd_create are calls into the operating system")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;

use crate::MemoryError;

/// One shared mapping of a whole memfd; unmapped on drop.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    file: File,
}

// SAFETY: the mapping is plain memory owned by this value; all access goes through raw pointers with atomics or
// volatile copies, and the address stays valid for the value's lifetime whatever thread holds it.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` only hands out the base address.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(size: u64) -> Result<Self, MemoryError> {
        let host = |what, source| MemoryError::Host { what, size, source };
        let len = usize::try_from(size)
            .ok()
            .filter(|&len| len <= isize::MAX as usize)
            .ok_or_else(|| host("mapping", io::Error::from(io::ErrorKind::OutOfMemory)))?;
        // SAFETY: the name is a NUL-terminated literal.
        let fd = unsafe { libc::memfd_create(c"skep-guest".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(host("memfd_create", io::Error::last_os_error()));
        }
        // SAFETY: `fd` was just returned by the kernel and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).map_err(|e| host("sizing a memfd", e))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(host("mmap", io::Error::last_os_error()));
        }
        let base =
            NonNull::new(base.cast::<u8>()).ok_or_else(|| host("mmap", io::Error::other("address zero")))?;
        // SAFETY: the range is exactly the mapping made above. Advice may be refused; it is only advice. A dump of
        // the process need not hold the guest's memory.
        unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_DONTDUMP) };
        Ok(Self { base, len, file })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Gives whole pages back to the host; they read as zero afterwards.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: a system call on our own descriptor; the kernel checks the range.
        let rc = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Two pages of a memfd, mapped one behind the other; unmapped on drop where that took a mapping of their own.
pub(crate) struct Pair {
    base: NonNull<u8>,
    own: bool,
}

const PAGE: usize = crate::PAGE_SIZE as usize;

impl Pair {
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Mapping {
    /// Pages number `first` and `second`, which must exist, side by side.
    pub(crate) fn pair(&self, first: usize, second: usize) -> io::Result<Pair> {
        let pages = self.len / PAGE;
        if first >= pages || second >= pages {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if second == first + 1 {
            // SAFETY: the page lies in the mapping.
            return Ok(Pair { base: unsafe { self.base.add(first * PAGE) }, own: false });
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
        let base = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), 2 * PAGE, libc::PROT_NONE, flags, -1, 0)
        };
        let pair = match NonNull::new(base.cast::<u8>()) {
            Some(at) if base != libc::MAP_FAILED => Pair { base: at, own: true },
            _ => return Err(io::Error::last_os_error()),
        };
        for (n, page) in [first, second].into_iter().enumerate() {
            // SAFETY: replaces a page of the mapping made above; the offset lies in the file, as pages are numbered by it.
            let at = unsafe {
                libc::mmap(
                    base.cast::<u8>().add(n * PAGE).cast(),
                    PAGE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    self.file.as_raw_fd(),
                    (page * PAGE) as libc::off_t,
                )
            };
            if at == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(pair)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if self.own {
            // SAFETY: a mapping of two pages that this value made and nothing uses once it is gone.
            unsafe { libc::munmap(self.base.as_ptr().cast(), 2 * PAGE) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping, which nothing uses once its owner is gone.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
