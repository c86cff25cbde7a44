//! Raw access to one page's bytes, and the per-page books: dirty bits, watches and versions.
#![expect(unsafe_code, reason = "guest memory is reached through raw pointers, never through references")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes that one bit of a page's watch mask stands for.
pub const WATCH_GRANULE: u64 = crate::PAGE_SIZE / 64;

/// The host side of one guest page, for a back end's soft TLB. Valid while the [`crate::GuestMemory`] it came from lives.
#[derive(Debug, Clone, Copy)]
pub struct HostPage {
    /// First byte of the page in this process.
    pub host: NonNull<u8>,
    /// Number of the page in the books ([`crate::GuestMemory::watch`] and friends).
    pub index: usize,
    /// False for read-only regions.
    pub writable: bool,
}

/// Changes of watched code that are remembered.
const CHANGES: usize = 64;

/// Told after watched code was overwritten ([`crate::GuestMemory::on_code_change`]).
pub type CodeListener = dyn Fn() + Send + Sync;

/// What has happened to watched code lately ([`crate::GuestMemory::changed_since`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodeChanges {
    /// [`crate::GuestMemory::epoch`] that this is up to date with.
    pub epoch: u32,
    /// The pages whose version has risen, oldest first; `None` if that is not known any more: it may be any.
    pub pages: Option<Vec<usize>>,
}

/// Books kept per page of backing store.
pub(crate) struct Books {
    watch: Box<[AtomicU64]>,
    version: Box<[AtomicU32]>,
    dirty: Box<[AtomicU64]>,
    /// Changes so far; raised under the lock of `changes`.
    epoch: AtomicU32,
    /// The page of change number `n` is at `n % CHANGES`.
    changes: Mutex<[usize; CHANGES]>,
    listeners: Mutex<Vec<Weak<CodeListener>>>,
    logging: AtomicBool,
}

impl Books {
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            watch: zeroed(pages),
            version: zeroed(pages),
            dirty: zeroed(pages.div_ceil(64)),
            epoch: AtomicU32::new(0),
            changes: Mutex::new([0; CHANGES]),
            listeners: Mutex::new(Vec::new()),
            logging: AtomicBool::new(false),
        }
    }

    pub(crate) fn pages(&self) -> usize {
        self.watch.len()
    }

    pub(crate) fn watch(&self, page: usize) -> &AtomicU64 {
        &self.watch[page]
    }

    pub(crate) fn version(&self, page: usize) -> &AtomicU32 {
        &self.version[page]
    }

    pub(crate) fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn logging(&self) -> bool {
        self.logging.load(Ordering::SeqCst)
    }

    pub(crate) fn set_logging(&self, on: bool) {
        self.logging.store(on, Ordering::SeqCst);
    }

    pub(crate) fn mark_dirty(&self, page: usize) {
        self.dirty[page / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
    }

    /// Reads and clears 64 pages' dirty bits.
    pub(crate) fn take_dirty(&self, word: usize) -> u64 {
        self.dirty[word].swap(0, Ordering::Relaxed)
    }

    pub(crate) fn dirty_words(&self) -> usize {
        self.dirty.len()
    }

    /// After bytes `offset..offset+len` of a page were written: logs, and retires decoded code that was there.
    pub(crate) fn written(&self, page: usize, offset: u64, len: u64) {
        if self.logging.load(Ordering::Relaxed) {
            self.mark_dirty(page);
        }
        // A decoder sets the watch, then reads the bytes; we have written the bytes and read the watch: one of us must see
        // the other, which takes a full barrier on both sides.
        fence(Ordering::SeqCst);
        if self.watch[page].load(Ordering::SeqCst) & mask(offset, len) != 0 {
            self.code_changed(page);
        }
    }

    /// Watches bytes of a page: whether nothing on it was watched, and the version that a later write to these bytes raises.
    pub(crate) fn start_watching(&self, page: usize, offset: u64, len: u64) -> (bool, u32) {
        let mask = mask(offset, len);
        if mask == 0 {
            return (false, self.version[page].load(Ordering::SeqCst));
        }
        let _whole = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.watch[page].fetch_or(mask, Ordering::SeqCst);
        (before == 0, self.version[page].load(Ordering::SeqCst))
    }

    /// Who sees the epoch that this makes also sees the version and the entry that came before it. Who finds the mask cleared
    /// sees the epoch: that there is something to be noticed. And nobody begins to watch halfway through.
    #[cold]
    fn code_changed(&self, page: usize) {
        {
            let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
            self.version[page].fetch_add(1, Ordering::SeqCst);
            let number = self.epoch.load(Ordering::SeqCst);
            changes[number as usize % CHANGES] = page;
            self.epoch.store(number.wrapping_add(1), Ordering::SeqCst);
            self.watch[page].store(0, Ordering::SeqCst);
        }
        let listeners: Vec<Arc<CodeListener>> = {
            let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
            listeners.iter().filter_map(Weak::upgrade).collect()
        };
        for listener in listeners {
            listener();
        }
    }

    pub(crate) fn changed_since(&self, since: u32) -> CodeChanges {
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let epoch = self.epoch.load(Ordering::SeqCst);
        let count = epoch.wrapping_sub(since);
        let page = |back: u32| changes[epoch.wrapping_sub(back) as usize % CHANGES];
        let pages = (count as usize <= CHANGES).then(|| (1..=count).rev().map(page).collect());
        CodeChanges { epoch, pages }
    }

    pub(crate) fn listen(&self, listener: Weak<CodeListener>) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|l| l.strong_count() > 0);
        listeners.push(listener);
    }
}

/// Watch bits for `len` bytes at `offset` of a page.
pub(crate) fn mask(offset: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    let first = (offset / WATCH_GRANULE).min(63);
    let last = ((offset + len - 1) / WATCH_GRANULE).min(63);
    (u64::MAX >> (63 - (last - first))) << first
}

/// A zeroed slice of atomics from untouched (lazily backed) memory.
fn zeroed<T: Zeroable>(len: usize) -> Box<[T]> {
    // SAFETY: `Zeroable` types are plain atomics, for which all-zero bytes are a valid value.
    unsafe { Box::<[T]>::new_zeroed_slice(len).assume_init() }
}

trait Zeroable {}
impl Zeroable for AtomicU64 {}
impl Zeroable for AtomicU32 {}

/// Copies out of guest memory. Each naturally aligned piece of up to 8 bytes is read whole.
///
/// # Safety
/// `from..from+into.len()` lies in a live mapping.
pub(crate) unsafe fn copy_out(from: *const u8, into: &mut [u8]) {
    // SAFETY: the caller vouches for the range; racing guest writes give torn data, never undefined values, as the
    // compiler cannot look through a volatile-equivalent intrinsic copy of raw bytes.
    unsafe { bulk(from, into.as_mut_ptr(), into.len()) }
}

/// Copies into guest memory.
///
/// # Safety
/// `to..to+from.len()` lies in a live writable mapping.
pub(crate) unsafe fn copy_in(to: *mut u8, from: &[u8]) {
    // SAFETY: as in `copy_out`.
    unsafe { bulk(from.as_ptr(), to, from.len()) }
}

/// The one byte mover. `rep movsb` is opaque to the compiler, so racing accesses stay what the processor makes of them.
///
/// # Safety
/// Both ranges are valid for `len` bytes.
unsafe fn bulk(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack, preserves_flags));
    }
}

macro_rules! atomic_access {
    ($($load:ident, $store:ident, $cas:ident, $int:ty, $atomic:ty;)*) => {$(
        /// # Safety
        /// `at` is aligned and lies in a live mapping.
        pub(crate) unsafe fn $load(at: *const u8) -> $int {
            // SAFETY: alignment and validity are the caller's; atomics tolerate racing access.
            unsafe { <$atomic>::from_ptr(at.cast_mut().cast()) }.load(Ordering::SeqCst)
        }
        /// # Safety
        /// `at` is aligned and lies in a live writable mapping.
        pub(crate) unsafe fn $store(at: *mut u8, value: $int) {
            // SAFETY: as above.
            unsafe { <$atomic>::from_ptr(at.cast()) }.store(value, Ordering::SeqCst)
        }
        /// # Safety
        /// `at` is aligned and lies in a live writable mapping.
        pub(crate) unsafe fn $cas(at: *mut u8, old: $int, new: $int) -> Result<$int, $int> {
            // SAFETY: as above.
            unsafe { <$atomic>::from_ptr(at.cast()) }.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
        }
    )*};
}

atomic_access! {
    load_u8, store_u8, cas_u8, u8, AtomicU8;
    load_u16, store_u16, cas_u16, u16, AtomicU16;
    load_u32, store_u32, cas_u32, u32, AtomicU32;
    load_u64, store_u64, cas_u64, u64, AtomicU64;
}

#[cfg(test)]
mod tests {
    use super::mask;

    #[test]
    fn a_mask_covers_exactly_the_granules_touched() {
        assert_eq!(mask(0, 1), 1);
        assert_eq!(mask(63, 2), 3);
        assert_eq!(mask(4095, 1), 1 << 63);
        assert_eq!(mask(0, 4096), u64::MAX);
        assert_eq!(mask(128, 0), 0);
    }
}
