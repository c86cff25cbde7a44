//! The memory that the host gives, and its mapping.
#![expect(unsafe_code, reason = "mmap and what goes with it are calls into the operating system")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;

use crate::MemoryError;
use crate::backing::{
    Backing, GIGANTIC_PAGE, LARGE_PAGE, PageSize, Pool, PoolShortage, check_transparent, gives_transparent,
    lock_failure,
};

/// What guest memory is called in the kernel's lists of mappings and files.
const NAME: &std::ffi::CStr = c"skep-guest";

/// One shared mapping of a whole memfd, or a private one of anonymous memory; unmapped on drop. Its address is a multiple of [`LARGE_PAGE`], with pages of the pool
/// of theirs.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// The memfd; none behind private memory.
    file: Option<File>,
    keeps: bool,
}

// SAFETY: the mapping is plain memory owned by this value; all access goes through raw pointers with atomics or
// volatile copies, and the address stays valid for the value's lifetime whatever thread holds it.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` only hands out the base address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` bytes, of which `used` (by offset, whole pages) are guest memory and the rest is never touched.
    pub(crate) fn new(size: u64, backing: Backing, used: &[Range<u64>]) -> Result<Self, MemoryError> {
        let mapping = match backing.pages.pool() {
            Some(page) => Self::from_pool(size, page)?,
            None if backing.private && backing.pages != PageSize::Small && gives_transparent() => {
                Self::from_anonymous_memory(size, backing)?
            }
            None => Self::from_shared_memory(size, backing)?,
        };
        // SAFETY: the range is exactly the mapping. Advice may be refused; it is only advice. A dump of the process
        // need not hold the guest's memory.
        unsafe { libc::madvise(mapping.base.as_ptr().cast(), mapping.len, libc::MADV_DONTDUMP) };
        // Pages of the pool are there from the start and never leave memory.
        if backing.wired && backing.pages.pool().is_none() {
            mapping.wire(used)?;
        }
        Ok(mapping)
    }

    fn from_shared_memory(size: u64, backing: Backing) -> Result<Self, MemoryError> {
        let host = |what, source| MemoryError::Host { what, size, source };
        let len = addressable(size).ok_or_else(|| host("mapping", io::ErrorKind::OutOfMemory.into()))?;
        if backing.pages == PageSize::Transparent {
            check_transparent()?;
        }
        let file = memfd(0).map_err(|e| host("memfd_create", e))?;
        file.set_len(size).map_err(|e| host("sizing a memfd", e))?;
        let base = map_aligned(Some(&file), len).map_err(|e| host("mmap", e))?;
        let mapping = Self { base, len, file: Some(file), keeps: backing.wired };
        mapping
            .ask_for_transparent(backing.pages)
            .map_err(|e| host("asking for transparent huge pages", e))?;
        Ok(mapping)
    }

    fn from_anonymous_memory(size: u64, backing: Backing) -> Result<Self, MemoryError> {
        let host = |what, source| MemoryError::Host { what, size, source };
        let len = addressable(size).ok_or_else(|| host("mapping", io::ErrorKind::OutOfMemory.into()))?;
        let base = map_aligned(None, len).map_err(|e| host("mmap", e))?;
        let mapping = Self { base, len, file: None, keeps: backing.wired };
        mapping
            .ask_for_transparent(backing.pages)
            .map_err(|e| host("asking for transparent huge pages", e))?;
        let at = base.as_ptr().cast::<libc::c_void>();
        // SAFETY: the range is exactly the mapping. A child that this process forks must not get a copy of what the guest
        // writes meanwhile, nor make the guest's pages copies. The name is for people; kernels may have no room for it.
        unsafe {
            if libc::madvise(at, len, libc::MADV_DONTFORK) != 0 {
                return Err(host("keeping it out of forks", io::Error::last_os_error()));
            }
            let kind = libc::c_ulong::from(libc::PR_SET_VMA_ANON_NAME as u32);
            libc::prctl(libc::PR_SET_VMA, kind, at, len, NAME.as_ptr());
        }
        Ok(mapping)
    }

    /// Asks for transparent huge pages, if these are the pages that are wanted.
    fn ask_for_transparent(&self, pages: PageSize) -> io::Result<()> {
        if !matches!(pages, PageSize::Automatic | PageSize::Transparent) {
            return Ok(());
        }
        // SAFETY: the range is exactly the mapping.
        let rc = unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, libc::MADV_HUGEPAGE) };
        if rc == 0 || pages == PageSize::Automatic { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Takes all pages at once: the pool could be empty when the guest touches one, which would end the process.
    fn from_pool(size: u64, page: u64) -> Result<Self, MemoryError> {
        let refused = |source| {
            let needed = size.div_ceil(page);
            MemoryError::Pool(PoolShortage { page, needed, pool: Pool::of(page), source })
        };
        let size = size.next_multiple_of(page);
        let len = addressable(size).ok_or_else(|| refused(io::ErrorKind::OutOfMemory.into()))?;
        let kind = if page == GIGANTIC_PAGE { libc::MFD_HUGE_1GB } else { libc::MFD_HUGE_2MB };
        let file = memfd(libc::MFD_HUGETLB | kind).map_err(refused)?;
        file.set_len(size).map_err(refused)?;
        // Mapping reserves, and fails at once when there are too few; the kernel aligns it.
        let base = map(None, len, Some(&file), libc::MAP_SHARED).map_err(refused)?;
        let allocated = allocate(&file, 0, size, 0);
        let mapping = Self { base, len, file: Some(file), keeps: true };
        allocated.map_err(refused)?;
        Ok(mapping)
    }

    /// Takes and locks the used ranges.
    fn wire(&self, used: &[Range<u64>]) -> Result<(), MemoryError> {
        let needed = used.iter().map(|range| range.end - range.start).sum();
        let each = |call: &dyn Fn(*mut libc::c_void, usize) -> i32| {
            used.iter().try_for_each(|range| {
                // SAFETY: used ranges lie within the mapping.
                let at = unsafe { self.base.add(range.start as usize) };
                let rc = call(at.as_ptr().cast(), (range.end - range.start) as usize);
                if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
            })
        };
        // First the limit, which costs nothing to ask; then the pages, writable from the start.
        // SAFETY: `each` passes ranges of the mapping; locking does not change what is there.
        let limit = each(&|at, len| unsafe { libc::mlock2(at, len, libc::MLOCK_ONFAULT) });
        if let Err(error) = limit {
            // What has been locked so far must not be counted as somebody else's.
            // SAFETY: the range is exactly the mapping.
            unsafe { libc::munlock(self.base.as_ptr().cast(), self.len) };
            return Err(lock_failure(needed, error));
        }
        // SAFETY: as above; populating does not change what is there.
        let populated = each(&|at, len| unsafe { libc::madvise(at, len, libc::MADV_POPULATE_WRITE) });
        match populated {
            // Linux before 5.14 does not know it; locking populates there.
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => {
                return Err(MemoryError::Host { what: "taking all pages", size: needed, source: error });
            }
            _ => {}
        }
        // SAFETY: as above.
        let locked = each(&|at, len| unsafe { libc::mlock(at, len) });
        locked.map_err(|e| lock_failure(needed, e))
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Whether pages stay once they have been taken: wired ones, and those of the pool, which might not be had again. Punching
    /// 4 KiB out of a larger page of the pool would leave it as it was.
    pub(crate) fn keeps(&self) -> bool {
        self.keeps
    }

    /// Gives whole pages back to the host; they read as zero afterwards.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if let Some(file) = &self.file {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            return allocate(file, offset, len, mode);
        }
        let end = offset.checked_add(len).filter(|&end| end <= self.len as u64);
        end.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range lies in the mapping, as was just checked; the memory is the guest's, and zero is what it is to be.
        let rc = unsafe {
            let at = self.base.add(offset as usize).as_ptr();
            libc::madvise(at.cast(), len as usize, libc::MADV_DONTNEED)
        };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn allocate(file: &File, offset: u64, len: u64, mode: i32) -> io::Result<()> {
    loop {
        // SAFETY: a system call on our own descriptor; the kernel checks the range.
        let rc = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) };
        if rc == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
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
    /// Pages number `first` and `second`, which must exist, side by side. Private memory can show only neighbours so.
    pub(crate) fn pair(&self, first: usize, second: usize) -> io::Result<Pair> {
        let pages = self.len / PAGE;
        if first >= pages || second >= pages {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if second == first + 1 {
            // SAFETY: the page lies in the mapping.
            return Ok(Pair { base: unsafe { self.base.add(first * PAGE) }, own: false });
        }
        let file = self.file.as_ref().ok_or(io::ErrorKind::Unsupported)?;
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
                    file.as_raw_fd(),
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
        unsafe { unmap(self.base.as_ptr(), self.len) };
    }
}

/// Bytes that this process may lock (RLIMIT_MEMLOCK); `None` for as many as it likes.
pub(crate) fn lock_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live structure of the type that the call fills.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    (rc == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

fn addressable(size: u64) -> Option<usize> {
    usize::try_from(size).ok().filter(|&len| len <= isize::MAX as usize - LARGE_PAGE as usize)
}

fn memfd(flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated literal.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by the kernel and has no other owner.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Maps a file, or anonymous memory, at a multiple of [`LARGE_PAGE`], without setting swap space aside for it.
fn map_aligned(file: Option<&File>, len: usize) -> io::Result<NonNull<u8>> {
    let align = LARGE_PAGE as usize;
    let whole = len + align;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = start.cast::<u8>();
    let before = start.addr().next_multiple_of(align) - start.addr();
    // SAFETY: all three lie in the range that was set aside above, which is ours and which nothing else uses.
    unsafe {
        let at = start.add(before);
        unmap(start, before);
        unmap(at.add(len), whole - before - len);
        let kind = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        let mapped = map(NonNull::new(at), len, file, kind | libc::MAP_NORESERVE | libc::MAP_FIXED);
        if mapped.is_err() {
            unmap(at, len);
        }
        mapped
    }
}

/// Maps a file from its start, or what `flags` say. An address with `MAP_FIXED` must be the caller's own.
fn map(at: Option<NonNull<u8>>, len: usize, file: Option<&File>, flags: i32) -> io::Result<NonNull<u8>> {
    let hint = at.map_or(std::ptr::null_mut(), |at| at.as_ptr().cast());
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: without an address the mapping replaces nothing; with one it replaces what the caller owns.
    let base = unsafe { libc::mmap(hint, len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("address zero"))
}

/// # Safety
/// The range is a mapping, or part of one, that nothing uses.
unsafe fn unmap(at: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: the caller's.
        unsafe { libc::munmap(at.cast(), len) };
    }
}
