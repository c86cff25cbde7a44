//! The region list and everything that is done through it.
#![expect(unsafe_code, reason = "turns checked guest addresses into host pointers")]

use std::fs::File;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Weak};

use crate::backing::{Backing, GIGANTIC_PAGE, LARGE_PAGE, PageSize};
use crate::map::{Mapping, Pair};
use crate::pages::{self, Books, CodeChanges, CodeListener, HostPage};
use crate::{MemoryError, PAGE_SIZE};

/// What a region is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionKind {
    /// Readable and writable by guest and devices.
    Ram,
    /// Readable; writes by guest and devices are refused. The machine fills it through [`GuestMemory::load_rom`].
    Rom,
}

/// A region to be made. Start and size are multiples of [`PAGE_SIZE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest physical address.
    pub start: u64,
    /// Size in bytes, not zero.
    pub size: u64,
    /// Kind.
    pub kind: RegionKind,
}

/// A region as made, for back ends that map it (KVM memory slots).
#[derive(Debug, Clone, Copy)]
pub struct RegionInfo {
    /// First guest physical address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// Kind.
    pub kind: RegionKind,
    /// Where it is mapped in this process: equal to `start` modulo [`LARGE_PAGE`], so that second-level address translation
    /// can map 2 MiB at once (1 GiB where pages of that size back the region).
    pub host: NonNull<u8>,
    /// Offset of its first byte in the memfd (or the mapping, where there is no memfd), equal to `start` as `host` is.
    pub offset: u64,
}

struct Region {
    start: u64,
    size: u64,
    kind: RegionKind,
    offset: u64,
}

struct Inner {
    regions: Vec<Region>,
    books: Books,
    map: Mapping,
}

/// All memory of one VM. Clones share it; the last one gives it back to the host.
#[derive(Clone)]
pub struct GuestMemory(Arc<Inner>);

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.regions().map(|r| (r.start, r.size, r.kind))).finish()
    }
}

/// A piece of an access that lies in one page.
struct Piece {
    page: HostPage,
    offset: u64,
    len: usize,
}

impl GuestMemory {
    /// Allocates the regions, zeroed, of small pages. Host memory is taken only when touched.
    pub fn new(specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        Self::with_backing(specs, Backing::default())
    }

    /// Allocates the regions, zeroed.
    ///
    /// # Errors
    /// The regions contradict each other, or the host refuses memory of that kind; [`MemoryError`] says what would help.
    pub fn with_backing(specs: &[RegionSpec], backing: Backing) -> Result<Self, MemoryError> {
        let mut regions: Vec<Region> = Vec::with_capacity(specs.len());
        let mut sorted = specs.to_vec();
        sorted.sort_by_key(|s| s.start);
        let mut end = 0u64;
        for spec in &sorted {
            let bad = |why| MemoryError::Layout { start: spec.start, size: spec.size, why };
            if spec.size == 0 {
                return Err(bad("a region cannot be empty"));
            }
            if !(spec.start | spec.size).is_multiple_of(PAGE_SIZE) {
                return Err(bad("start and size must be multiples of 4096"));
            }
            if spec.start.checked_add(spec.size).is_none_or(|end| end > 1 << 52) {
                return Err(bad("it ends beyond the 52-bit physical address space"));
            }
            if regions.last().is_some_and(|r| r.start + r.size > spec.start) {
                return Err(bad("it overlaps another region"));
            }
            let offset = place(spec, end, backing.pages);
            regions.push(Region { start: spec.start, size: spec.size, kind: spec.kind, offset });
            end = offset + spec.size;
        }
        if regions.is_empty() {
            return Err(MemoryError::Layout { start: 0, size: 0, why: "there must be at least one region" });
        }
        let used: Vec<_> = regions.iter().map(|r| r.offset..r.offset + r.size).collect();
        let map = Mapping::new(end, backing, &used)?;
        let books = Books::new((end / PAGE_SIZE) as usize);
        Ok(Self(Arc::new(Inner { regions, books, map })))
    }

    /// The regions in address order.
    pub fn regions(&self) -> impl Iterator<Item = RegionInfo> + '_ {
        self.0.regions.iter().map(|r| RegionInfo {
            start: r.start,
            size: r.size,
            kind: r.kind,
            host: self.host(r.offset),
            offset: r.offset,
        })
    }

    /// The memfd behind all regions, to be shared with another process. There may be none behind memory that was allowed to be
    /// [private](Backing::private).
    pub fn file(&self) -> Option<&File> {
        self.0.map.file()
    }

    fn host(&self, offset: u64) -> NonNull<u8> {
        // SAFETY: offsets come from the region list, and the mapping reaches to the end of the last region.
        unsafe { self.0.map.base().add(offset as usize) }
    }

    fn region(&self, gpa: u64) -> Option<&Region> {
        let at = self.0.regions.partition_point(|r| r.start <= gpa);
        self.0.regions[..at].last().filter(|r| gpa - r.start < r.size)
    }

    /// The page that holds `gpa`, if memory backs it.
    pub fn page(&self, gpa: u64) -> Option<HostPage> {
        let region = self.region(gpa)?;
        let offset = region.offset + ((gpa & !(PAGE_SIZE - 1)) - region.start);
        Some(HostPage {
            host: self.host(offset),
            index: (offset / PAGE_SIZE) as usize,
            writable: region.kind == RegionKind::Ram,
        })
    }

    /// Two pages (by index) as if one followed the other, for an operation that the host must do across both at once. An
    /// error where the host cannot map them so.
    pub fn side_by_side(&self, first: usize, second: usize) -> std::io::Result<PagePair<'_>> {
        Ok(PagePair { pair: self.0.map.pair(first, second)?, memory: PhantomData })
    }

    /// Splits a range into pages, checking all of it before anything is touched.
    fn pieces(
        &self,
        gpa: u64,
        len: usize,
        write: bool,
    ) -> Result<impl Iterator<Item = Piece> + '_, MemoryError> {
        let unbacked = || MemoryError::Unbacked { gpa, len: len as u64 };
        let end = gpa.checked_add(len as u64).ok_or_else(unbacked)?;
        let mut at = gpa;
        while at < end {
            let region = self.region(at).ok_or_else(unbacked)?;
            if write && region.kind == RegionKind::Rom {
                return Err(MemoryError::ReadOnly { gpa, len: len as u64 });
            }
            at = region.start + region.size;
        }
        let mut at = gpa;
        Ok(std::iter::from_fn(move || {
            (at < end).then_some(())?;
            let page = self.page(at)?;
            let offset = at % PAGE_SIZE;
            let len = (PAGE_SIZE - offset).min(end - at);
            at += len;
            Some(Piece { page, offset, len: len as usize })
        }))
    }

    /// Copies `into.len()` bytes at `gpa` out of guest memory. Nothing is copied on error.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        for piece in self.pieces(gpa, into.len(), false)? {
            // SAFETY: `pieces` checked that the range is in the mapping.
            unsafe {
                let from = piece.page.host.add(piece.offset as usize).as_ptr();
                pages::copy_out(from, &mut into[done..done + piece.len]);
            }
            done += piece.len;
        }
        Ok(())
    }

    /// Copies `from` into guest memory at `gpa`. Nothing is copied on error. Marks dirty, honours watches.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<(), MemoryError> {
        let pieces = self.pieces(gpa, from.len(), true)?;
        self.store(pieces, from);
        Ok(())
    }

    /// As [`GuestMemory::write`], but reaches read-only regions: how the machine fills a ROM.
    pub fn load_rom(&self, gpa: u64, from: &[u8]) -> Result<(), MemoryError> {
        let pieces = self.pieces(gpa, from.len(), false)?;
        self.store(pieces, from);
        Ok(())
    }

    fn store(&self, pieces: impl Iterator<Item = Piece>, from: &[u8]) {
        let mut done = 0;
        for piece in pieces {
            // SAFETY: `pieces` checked that the range is in the mapping, which is writable for us throughout.
            unsafe {
                let to = piece.page.host.add(piece.offset as usize).as_ptr();
                pages::copy_in(to, &from[done..done + piece.len]);
            }
            self.0.books.written(piece.page.index, piece.offset, piece.len as u64);
            done += piece.len;
        }
    }

    /// Reads `N` bytes.
    pub fn read_array<const N: usize>(&self, gpa: u64) -> Result<[u8; N], MemoryError> {
        let mut bytes = [0; N];
        self.read(gpa, &mut bytes)?;
        Ok(bytes)
    }

    /// Zeroes a range; whole pages are given back to the host, unless they are wired or come from its pool of huge pages.
    pub fn zero(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        let len = usize::try_from(len).map_err(|_| MemoryError::Unbacked { gpa, len })?;
        let mut hole = 0..0;
        for piece in self.pieces(gpa, len, true)? {
            let page = piece.page.index;
            if piece.len as u64 == PAGE_SIZE && !self.0.map.keeps() {
                if page != hole.end {
                    self.give_back(std::mem::replace(&mut hole, page..page));
                }
                hole.end += 1;
            } else {
                self.clear(page, piece.offset, piece.len);
            }
        }
        self.give_back(hole);
        Ok(())
    }

    /// Zeroes whole pages (by index) by letting the host have them.
    fn give_back(&self, pages: Range<usize>) {
        if pages.is_empty() {
            return;
        }
        let punched = self.0.map.punch(pages.start as u64 * PAGE_SIZE, pages.len() as u64 * PAGE_SIZE);
        for page in pages {
            match punched {
                Ok(()) => self.0.books.written(page, 0, PAGE_SIZE),
                Err(_) => self.clear(page, 0, PAGE_SIZE as usize),
            }
        }
    }

    /// Zeroes bytes of one page (by index) of a region.
    fn clear(&self, page: usize, offset: u64, len: usize) {
        const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        let host = self.host(page as u64 * PAGE_SIZE + offset);
        // SAFETY: callers pass pages of regions and ranges that lie within one, all of which is mapped.
        unsafe { pages::copy_in(host.as_ptr(), &ZEROS[..len]) };
        self.0.books.written(page, offset, len as u64);
    }

    /// How many pages the books have: [`HostPage::index`] is less.
    pub fn page_count(&self) -> usize {
        self.0.books.pages()
    }

    /// The watch mask of a page (by [`HostPage::index`]): one bit per [`crate::WATCH_GRANULE`] bytes that hold decoded
    /// code. A write to a watched granule clears the mask and raises [`GuestMemory::version`].
    pub fn watch(&self, page: usize) -> &AtomicU64 {
        self.0.books.watch(page)
    }

    /// Watches `len` bytes at `offset` of a page: whether nothing on it was watched before, so that somebody may still write
    /// without looking at the mask, and the page's version, which a write to these bytes from now on raises.
    pub fn start_watching(&self, page: usize, offset: u64, len: u64) -> (bool, u32) {
        self.0.books.start_watching(page, offset, len)
    }

    /// Counts how often watched code on a page was overwritten.
    pub fn version(&self, page: usize) -> &AtomicU32 {
        self.0.books.version(page)
    }

    /// Changes whenever any page's version does: who has seen this number need not look at versions.
    #[inline(always)]
    pub fn epoch(&self) -> u32 {
        self.0.books.epoch()
    }

    /// Which pages' versions have risen since [`GuestMemory::epoch`] was `since`. Who keeps the epoch that comes with the
    /// answer misses nothing.
    pub fn changed_since(&self, since: u32) -> CodeChanges {
        self.0.books.changed_since(since)
    }

    /// Has `listener` called whenever watched code was overwritten, by the thread that did it, after the epoch has changed.
    /// It must be quick and must not wait for that thread. Memory does not keep it alive.
    pub fn on_code_change(&self, listener: Weak<CodeListener>) {
        self.0.books.listen(listener);
    }

    /// Watch bits for `len` bytes at `offset` within a page (ranges that leave the page count to its end).
    pub fn watch_mask(offset: u64, len: u64) -> u64 {
        pages::mask(offset, len)
    }

    /// To be called by a back end after it wrote to a page by itself: dirty log and watch.
    pub fn written(&self, page: usize, offset: u64, len: u64) {
        self.0.books.written(page, offset, len);
    }

    /// Starts or stops the dirty log. Back ends must be told ([`GuestMemory::dirty_logging`] is what they ask) by a
    /// sync of theirs before the log is complete.
    pub fn set_dirty_logging(&self, on: bool) {
        self.0.books.set_logging(on);
    }

    /// Whether writes are logged.
    pub fn dirty_logging(&self) -> bool {
        self.0.books.logging()
    }

    /// Marks one page (by index) dirty.
    pub fn mark_dirty(&self, page: usize) {
        self.0.books.mark_dirty(page);
    }

    /// Takes and clears the dirty log: guest physical addresses of dirty pages, ascending within each region.
    pub fn take_dirty(&self) -> Vec<u64> {
        let mut dirty = Vec::new();
        for word in 0..self.0.books.dirty_words() {
            let mut bits = self.0.books.take_dirty(word);
            while bits != 0 {
                let offset = (word as u64 * 64 + u64::from(bits.trailing_zeros())) * PAGE_SIZE;
                bits &= bits - 1;
                if let Some(r) =
                    self.0.regions.iter().find(|r| offset >= r.offset && offset - r.offset < r.size)
                {
                    dirty.push(r.start + (offset - r.offset));
                }
            }
        }
        dirty
    }
}

/// Two pages of guest memory side by side ([`GuestMemory::side_by_side`]).
pub struct PagePair<'a> {
    pair: Pair,
    memory: PhantomData<&'a GuestMemory>,
}

impl PagePair<'_> {
    /// First byte of the first page in this process; the second page follows it. Writes are not logged.
    pub fn host(&self) -> NonNull<u8> {
        self.pair.base()
    }
}

macro_rules! typed {
    ($($read:ident, $write:ident, $load:ident, $store:ident, $cas:ident, $int:ty, $raw_load:ident, $raw_store:ident, $raw_cas:ident;)*) => {
        impl GuestMemory {$(
            /// Reads a little-endian integer, any alignment.
            pub fn $read(&self, gpa: u64) -> Result<$int, MemoryError> {
                Ok(<$int>::from_le_bytes(self.read_array(gpa)?))
            }
            /// Writes a little-endian integer, any alignment.
            pub fn $write(&self, gpa: u64, value: $int) -> Result<(), MemoryError> {
                self.write(gpa, &value.to_le_bytes())
            }
            /// Atomic load (sequentially consistent), naturally aligned.
            pub fn $load(&self, gpa: u64) -> Result<$int, MemoryError> {
                let at = self.aligned(gpa, size_of::<$int>(), false)?.0;
                // SAFETY: `aligned` checked range and alignment.
                Ok(unsafe { pages::$raw_load(at.as_ptr()) })
            }
            /// Atomic store (sequentially consistent), naturally aligned.
            pub fn $store(&self, gpa: u64, value: $int) -> Result<(), MemoryError> {
                let (at, page) = self.aligned(gpa, size_of::<$int>(), true)?;
                // SAFETY: `aligned` checked range and alignment.
                unsafe { pages::$raw_store(at.as_ptr(), value) };
                self.0.books.written(page, gpa % PAGE_SIZE, size_of::<$int>() as u64);
                Ok(())
            }
            /// Atomic compare-and-exchange, naturally aligned: `Ok(Ok(old))` if exchanged, `Ok(Err(found))` if not.
            pub fn $cas(&self, gpa: u64, old: $int, new: $int) -> Result<Result<$int, $int>, MemoryError> {
                let (at, page) = self.aligned(gpa, size_of::<$int>(), true)?;
                // SAFETY: `aligned` checked range and alignment.
                let result = unsafe { pages::$raw_cas(at.as_ptr(), old, new) };
                if result.is_ok() {
                    self.0.books.written(page, gpa % PAGE_SIZE, size_of::<$int>() as u64);
                }
                Ok(result)
            }
        )*}
    };
}

typed! {
    read_u8, write_u8, load_u8, store_u8, compare_exchange_u8, u8, load_u8, store_u8, cas_u8;
    read_u16, write_u16, load_u16, store_u16, compare_exchange_u16, u16, load_u16, store_u16, cas_u16;
    read_u32, write_u32, load_u32, store_u32, compare_exchange_u32, u32, load_u32, store_u32, cas_u32;
    read_u64, write_u64, load_u64, store_u64, compare_exchange_u64, u64, load_u64, store_u64, cas_u64;
}

impl GuestMemory {
    fn aligned(&self, gpa: u64, size: usize, write: bool) -> Result<(NonNull<u8>, usize), MemoryError> {
        if !gpa.is_multiple_of(size as u64) {
            return Err(MemoryError::Misaligned(gpa));
        }
        let page = self.page(gpa).ok_or(MemoryError::Unbacked { gpa, len: size as u64 })?;
        if write && !page.writable {
            return Err(MemoryError::ReadOnly { gpa, len: size as u64 });
        }
        // SAFETY: the offset lies within the page.
        Ok((unsafe { page.host.add((gpa % PAGE_SIZE) as usize) }, page.index))
    }
}

/// The offset in the memfd of a region that comes after what ends at `end`: the least that lets the host map it with pages as
/// large as it could hold.
fn place(spec: &RegionSpec, end: u64, pages: PageSize) -> u64 {
    let holds = |page: u64| spec.start.next_multiple_of(page) + page <= spec.start + spec.size;
    let align = if pages == PageSize::Huge1G && holds(GIGANTIC_PAGE) { GIGANTIC_PAGE } else { LARGE_PAGE };
    end + (spec.start.wrapping_sub(end) & (align - 1))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    fn memory() -> GuestMemory {
        let ram = |start, size| RegionSpec { start, size, kind: RegionKind::Ram };
        GuestMemory::new(&[
            ram(0x10_0000, 0x2000),
            ram(0, 0x2000),
            ram(0x2000, 0x1000),
            RegionSpec { start: 0xffff_f000, size: 0x1000, kind: RegionKind::Rom },
        ])
        .unwrap()
    }

    #[test]
    fn copies_cross_pages_and_touching_regions_but_not_holes() {
        let m = memory();
        let data: Vec<u8> = (0..0x1800u32).map(|i| i as u8).collect();
        m.write(0x1000, &data).unwrap();
        let mut back = vec![0; data.len()];
        m.read(0x1000, &mut back).unwrap();
        assert_eq!(back, data);
        assert!(matches!(m.write(0x2fff, &[1, 2]), Err(MemoryError::Unbacked { .. })));
        assert_eq!(m.read_u8(0x2fff).unwrap(), 0, "nothing is written on error");
        assert!(m.read_u8(u64::MAX).is_err());
        assert!(m.read(u64::MAX, &mut [0; 2]).is_err());
        m.read(0x3000, &mut []).unwrap();
    }

    #[test]
    fn rom_is_read_only_but_for_the_loader() {
        let m = memory();
        assert!(matches!(m.write_u8(0xffff_fff0, 1), Err(MemoryError::ReadOnly { .. })));
        assert!(matches!(m.store_u32(0xffff_fff0, 1), Err(MemoryError::ReadOnly { .. })));
        m.load_rom(0xffff_fff0, &[0xea]).unwrap();
        assert_eq!(m.read_u8(0xffff_fff0).unwrap(), 0xea);
    }

    #[test]
    #[expect(unsafe_code, reason = "reads and writes the pages that are shown side by side")]
    fn any_two_pages_can_be_seen_side_by_side() {
        let m = memory();
        let page = |gpa| m.page(gpa).unwrap().index;
        for (first, second) in [(0, 0x1000), (0x1000, 0), (0x10_1000, 0x2000), (0, 0)] {
            m.write_u8(first + 0xfff, 1).unwrap();
            m.write_u8(second, 2).unwrap();
            let pair = m.side_by_side(page(first), page(second)).unwrap();
            // SAFETY: the last byte of the first page and the first of the second.
            unsafe {
                assert_eq!(pair.host().add(0xfff).cast::<[u8; 2]>().read(), [1, 2]);
                pair.host().add(0xfff).cast::<[u8; 2]>().write([3, 4]);
            }
            assert_eq!((m.read_u8(first + 0xfff).unwrap(), m.read_u8(second).unwrap()), (3, 4));
        }
        assert!(m.side_by_side(0, 1 << 30).is_err());
    }

    #[test]
    fn atomics_want_alignment() {
        let m = memory();
        m.store_u64(8, 5).unwrap();
        assert_eq!(m.compare_exchange_u64(8, 5, 6).unwrap(), Ok(5));
        assert_eq!(m.compare_exchange_u64(8, 5, 7).unwrap(), Err(6));
        assert_eq!(m.load_u64(8).unwrap(), 6);
        assert!(matches!(m.load_u32(2), Err(MemoryError::Misaligned(2))));
    }

    #[test]
    fn the_dirty_log_names_each_page_once() {
        let m = memory();
        m.write_u8(0x10, 1).unwrap();
        assert!(m.take_dirty().is_empty(), "off by default");
        m.set_dirty_logging(true);
        m.write(0x1fff, &[1, 2]).unwrap();
        m.store_u8(0x10_0000, 1).unwrap();
        assert_eq!(m.take_dirty(), [0x1000, 0x2000, 0x10_0000]);
        assert!(m.take_dirty().is_empty());
    }

    #[test]
    fn a_write_to_watched_bytes_raises_the_version() {
        let m = memory();
        let page = m.page(0x1000).unwrap().index;
        m.watch(page).store(GuestMemory::watch_mask(0x80, 16), Ordering::SeqCst);
        m.write_u32(0x1000, 1).unwrap();
        assert_eq!(m.version(page).load(Ordering::SeqCst), 0);
        m.write_u32(0x107e, 1).unwrap();
        assert_eq!(m.version(page).load(Ordering::SeqCst), 1);
        assert_eq!(m.watch(page).load(Ordering::SeqCst), 0);
        assert_eq!(m.epoch(), 1);
    }

    #[test]
    fn changes_of_watched_code_are_told_and_remembered() {
        let m = memory();
        let calls = Arc::new(AtomicU32::new(0));
        let listener: Arc<CodeListener> = {
            let (calls, m) = (calls.clone(), m.clone());
            // Called after the change can be seen.
            Arc::new(move || assert!(calls.fetch_add(1, Ordering::SeqCst) < m.epoch()))
        };
        m.on_code_change(Arc::downgrade(&listener));
        let change = |gpa: u64| {
            let page = m.page(gpa).unwrap().index;
            m.watch(page).store(1, Ordering::SeqCst);
            m.write_u8(gpa, 1).unwrap();
            page
        };
        let at = |epoch, pages: &[usize]| CodeChanges { epoch, pages: Some(pages.to_vec()) };
        assert_eq!(m.changed_since(0), at(0, &[]));
        let (a, b) = (change(0x1000), change(0x10_0000));
        m.write_u8(0x1000, 2).unwrap();
        assert_eq!(m.changed_since(0), at(2, &[a, b]));
        assert_eq!(m.changed_since(1), at(2, &[b]));
        assert_eq!(m.changed_since(2), at(2, &[]));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        drop(listener);
        for _ in 0..63 {
            change(0x2000);
        }
        let CodeChanges { epoch: 65, pages: Some(pages) } = m.changed_since(1) else { panic!() };
        assert_eq!((pages.len(), pages[0]), (64, b));
        assert_eq!(m.changed_since(0), CodeChanges { epoch: 65, pages: None });
        assert_eq!(calls.load(Ordering::SeqCst), 2, "nobody listens any more");
    }

    #[test]
    fn a_reader_misses_no_change_of_several_writers() {
        let m = memory();
        let over = std::sync::atomic::AtomicBool::new(false);
        let pages = [0, 0x1000, 0x2000, 0x10_0000].map(|gpa| m.page(gpa).unwrap().index);
        let mut seen = vec![0; m.page_count()];
        std::thread::scope(|s| {
            let writers = [0u64, 0x1000, 0x2000, 0x10_0000].map(|gpa| {
                let m = &m;
                s.spawn(move || {
                    let page = m.page(gpa).unwrap().index;
                    for _ in 0..5000 {
                        m.watch(page).store(1, Ordering::SeqCst);
                        m.write_u8(gpa, 1).unwrap();
                    }
                })
            });
            let (m, over, seen) = (&m, &over, &mut seen);
            let reader = s.spawn(move || {
                let mut epoch = 0;
                loop {
                    let last = over.load(Ordering::SeqCst);
                    let changes = m.changed_since(epoch);
                    match changes.pages {
                        Some(changed) => {
                            assert_eq!(changed.len() as u32, changes.epoch - epoch);
                            for page in changed {
                                seen[page] = m.version(page).load(Ordering::SeqCst);
                            }
                        }
                        None => pages.iter().for_each(|&p| seen[p] = m.version(p).load(Ordering::SeqCst)),
                    }
                    epoch = changes.epoch;
                    if last {
                        break epoch;
                    }
                }
            });
            writers.into_iter().for_each(|w| w.join().unwrap());
            over.store(true, Ordering::SeqCst);
            assert_eq!(reader.join().unwrap(), 20_000);
        });
        assert!(pages.iter().all(|&page| seen[page] == 5000));
    }

    #[test]
    fn zero_gives_whole_pages_back() {
        let m = memory();
        m.write(0, &[7; 0x3000]).unwrap();
        m.zero(0x800, 0x2000).unwrap();
        let mut back = vec![0; 0x3000];
        m.read(0, &mut back).unwrap();
        assert!(back[..0x800].iter().chain(&back[0x2800..]).all(|&b| b == 7));
        assert!(back[0x800..0x2800].iter().all(|&b| b == 0));
    }

    #[test]
    fn zeroing_over_regions_touches_nothing_else() {
        let ram = |start| RegionSpec { start, size: 0x2000, kind: RegionKind::Ram };
        let m = GuestMemory::new(&[ram(0), ram(0x2000), ram(0x20_4000)]).unwrap();
        let page = m.page(0x1000).unwrap().index;
        m.set_dirty_logging(true);
        m.watch(page).store(u64::MAX, Ordering::SeqCst);
        for at in [0, 0x2000, 0x20_4000] {
            m.write(at, &[7; 0x2000]).unwrap();
        }
        assert!(m.zero(0x1000, 0x20_4000).is_err(), "there is a hole");
        assert_eq!(m.take_dirty().len(), 6);
        m.zero(0xfff, 0x2002).unwrap();
        let mut back = vec![0; 0x4000];
        m.read(0, &mut back).unwrap();
        assert!(back[..0xfff].iter().chain(&back[0x3001..]).all(|&b| b == 7));
        assert!(back[0xfff..0x3001].iter().all(|&b| b == 0));
        assert_eq!(m.take_dirty(), [0, 0x1000, 0x2000, 0x3000]);
        assert_eq!(m.version(page).load(Ordering::SeqCst), 1);
        assert_eq!(m.read_u8(0x20_4000).unwrap(), 7);
    }

    #[test]
    fn guest_and_host_addresses_agree_modulo_a_large_page() {
        let ram = |start, size| RegionSpec { start, size, kind: RegionKind::Ram };
        let rom = RegionSpec { start: 0xfffe_0000, size: 0x2_0000, kind: RegionKind::Rom };
        let specs = [ram(0, 0xa_0000), ram(0xc_0000, 0x34_0000), rom, ram(1 << 32, 0x10_0000)];
        let m = GuestMemory::new(&specs).unwrap();
        for r in m.regions() {
            assert_eq!(r.start % LARGE_PAGE, r.host.addr().get() as u64 % LARGE_PAGE, "{:#x}", r.start);
            assert_eq!(r.start % LARGE_PAGE, r.offset % LARGE_PAGE, "{:#x}", r.start);
            m.load_rom(r.start, &[1]).unwrap();
        }
        let offsets: Vec<u64> = m.regions().map(|r| r.offset).collect();
        assert_eq!(offsets, [0, 0xc_0000, 0x5e_0000, 0x60_0000]);
        m.set_dirty_logging(true);
        m.write_u8(1 << 32, 1).unwrap();
        assert_eq!(m.take_dirty(), [1 << 32]);
    }

    #[test]
    fn gigantic_pages_are_not_spent_on_small_regions() {
        let at =
            |start, size, end, pages| place(&RegionSpec { start, size, kind: RegionKind::Ram }, end, pages);
        let end = 3 << 30;
        // A whole page of 1 GiB fits, so it gets one; a ROM stays close to what comes before it.
        assert_eq!(at((4 << 30) + 0xc_0000, 2 << 30, end, PageSize::Huge1G), end + 0xc_0000);
        assert_eq!(at((5 << 30) - 0x2_0000, 0x2_0000, end, PageSize::Huge1G), end + 0x1e_0000);
        assert_eq!(at((4 << 30) + 0x20_0000, 2 << 30, end, PageSize::Huge2M), end);
    }

    #[test]
    fn bad_layouts_are_refused() {
        let one = |start, size| GuestMemory::new(&[RegionSpec { start, size, kind: RegionKind::Ram }]);
        assert!(one(0, 0).is_err());
        assert!(one(1, 4096).is_err());
        assert!(one(0, 100).is_err());
        assert!(one(1 << 52, 4096).is_err());
        assert!(one(u64::MAX - 4095, 4096).is_err());
        assert!(GuestMemory::new(&[]).is_err());
        let twice = RegionSpec { start: 0, size: 8192, kind: RegionKind::Ram };
        assert!(GuestMemory::new(&[twice, RegionSpec { start: 4096, ..twice }]).is_err());
        assert!(one(0, 1 << 51).is_err(), "2 PiB do not fit");
    }
}
