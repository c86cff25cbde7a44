//! The soft TLB: direct-mapped, one set of arrays for each address space, in it one for each way of looking at memory.
#![expect(unsafe_code, reason = "host addresses of guest pages are raw pointers, indices are masked")]

use std::ptr::NonNull;
use std::sync::OnceLock;

use skep_memory::HostPage;

use super::books::{LargePages, Log, PageFilter, Writable, WriteHints};
use super::global::{Found, Globals};
use super::linear::{Seen, Stretch, Stretches};

/// Entries per array: a power of two.
pub(crate) const ENTRIES: usize = 8192;
const PAGE: u64 = 4096;
/// An entry that matches nothing: pages have zero in their low 12 bits.
pub(crate) const INVALID: u64 = u64::MAX;
/// Address spaces that are remembered at once.
const SPACES: usize = 8;
/// Instruction pages remembered per address space: a power of two.
const CODE_ENTRIES: usize = 2048;

const _: () = assert!(ENTRIES.is_power_of_two() && ENTRIES < 1 << 16 && CODE_ENTRIES.is_power_of_two());

/// One cached translation. A tag is the page's linear address.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Entry {
    /// Tag of a page that may be read.
    pub(crate) read: u64,
    /// Tag of a page that may be written.
    pub(crate) write: u64,
    /// Host address minus linear address.
    pub(crate) delta: u64,
    /// log2 of the size of the page that maps it if that is more than 4 KiB, else 0.
    pub(crate) flags: u64,
}

const EMPTY: Entry = Entry { read: INVALID, write: INVALID, delta: 0, flags: 0 };

/// Which array is looked at: privilege and what SMAP makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub(crate) enum Context {
    /// CPL 3.
    User = 0,
    /// Supervisor that may touch user pages (no SMAP, or RFLAGS.AC).
    KernelAll = 1,
    /// Supervisor that may not.
    Kernel = 2,
    /// Never filled: every access takes the slow path (alignment checks, data breakpoints).
    Slow = 3,
}

/// A page of guest memory: its first byte in this process, and its number in the books.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) host: u64,
    pub(crate) index: usize,
}

/// A cached instruction page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Code {
    linear: u64,
    /// [`Space::life`] in which it was cached.
    life: u64,
    shift: u8,
    /// Guest physical address of the page.
    pub(crate) gpa: u64,
    /// Its first byte in this process.
    pub(crate) host: NonNull<u8>,
    /// Its number in the books of guest memory.
    pub(crate) index: usize,
}

impl Code {
    /// The page of guest memory.
    pub(crate) fn frame(&self) -> Frame {
        Frame { host: self.host.as_ptr() as u64, index: self.index }
    }
}

/// The array of one way of looking at one address space.
struct Array {
    /// `ENTRIES` of them, owned.
    at: NonNull<Entry>,
    log: Log,
}

impl Array {
    fn new() -> Self {
        let entries = Box::leak(vec![EMPTY; ENTRIES].into_boxed_slice());
        Self { at: NonNull::from(entries).cast(), log: Log::new() }
    }

    fn get(&self, at: usize) -> Entry {
        // SAFETY: the index is masked to the array's length.
        unsafe { self.at.add(at & (ENTRIES - 1)).read() }
    }

    fn set(&mut self, at: usize, entry: Entry) {
        // SAFETY: as above, and we are exclusive.
        unsafe { self.at.add(at & (ENTRIES - 1)).write(entry) }
    }

    fn fill(&mut self, at: usize, entry: Entry) {
        if self.get(at).read == INVALID {
            self.log.note(at);
        }
        self.set(at, entry);
    }

    fn clear(&mut self) {
        let log = std::mem::replace(&mut self.log, Log::new());
        for at in log.indices() {
            self.set(at, EMPTY);
        }
        self.log = log;
        self.log.clear();
    }

    /// Replaces every filled entry by what `f` makes of it.
    fn change(&mut self, f: impl Fn(Entry) -> Entry) {
        let log = std::mem::replace(&mut self.log, Log::new());
        for at in log.indices() {
            self.set(at, f(self.get(at)));
        }
        self.log = log;
    }

    fn forget_write(&mut self, at: usize, frame: Frame) {
        self.set(at, self.get(at).without_write_to(frame));
    }
}

impl Drop for Array {
    fn drop(&mut self) {
        // SAFETY: this is the slice that `new` leaked.
        drop(unsafe { Box::from_raw(NonNull::slice_from_raw_parts(self.at, ENTRIES).as_ptr()) });
    }
}

impl Entry {
    fn without_write(self) -> Self {
        Self { write: INVALID, ..self }
    }

    fn without_write_to(self, frame: Frame) -> Self {
        let same = self.write != INVALID && self.delta.wrapping_add(self.write) == frame.host;
        if same { self.without_write() } else { self }
    }

    /// Drops what comes from a large page that `linear` is part of.
    fn without_large(self, linear: u64) -> Self {
        let around = self.flags != 0 && (self.read ^ linear) >> self.flags == 0;
        if around { EMPTY } else { self }
    }
}

/// What is cached for one address space.
struct Space {
    pcid: Option<u16>,
    /// For [`Context::User`], `KernelAll` and `Kernel`; made when first filled.
    arrays: [Option<Array>; 3],
    /// Instruction pages of this and earlier lives; empty until the first.
    code: Vec<Option<Code>>,
    /// Changes when everything is forgotten.
    life: u64,
    /// See [`Tlb::stamp`]; zero if a new one is due.
    stamp: u64,
    /// Every instruction page that was asked for since the stamp is what it is.
    seen: PageFilter,
    /// When it was switched to.
    used: u64,
}

impl Space {
    fn new() -> Self {
        Self {
            pcid: None,
            arrays: [None, None, None],
            code: Vec::new(),
            life: 0,
            stamp: 0,
            seen: PageFilter::new(),
            used: 0,
        }
    }

    fn clear(&mut self, life: u64) {
        self.arrays.iter_mut().flatten().for_each(Array::clear);
        self.life = life;
        self.stamp = 0;
    }

    fn flush_page(&mut self, linear: u64, large: bool, large_code: bool) {
        let page = page_of(linear);
        for array in self.arrays.iter_mut().flatten() {
            if array.get(index(linear)).read == page {
                array.set(index(linear), EMPTY);
            }
            if large {
                array.change(|entry| entry.without_large(linear));
            }
        }
        if self.seen.may_hold(linear) {
            self.stamp = 0;
        }
        if self.code.is_empty() {
            return;
        }
        for user in [false, true] {
            let code = &mut self.code[code_slot(linear, user)];
            if code.is_some_and(|c| c.linear == page) {
                *code = None;
            }
        }
        if large_code {
            for code in &mut self.code {
                let life = self.life;
                let around = |c: Code| c.life == life && c.shift > 12 && (c.linear ^ linear) >> c.shift == 0;
                if code.is_some_and(around) {
                    *code = None;
                }
            }
            // Other parts of the page may have been evicted while the jump cache still knows them.
            self.stamp = 0;
        }
    }
}

/// A page that is in the array in use and may be written: its linear address, and what to add to that for the host's. A copy,
/// which goes whenever translations do.
#[derive(Clone, Copy)]
#[repr(C)]
struct StackPage {
    page: u64,
    delta: u64,
}

const NO_STACK: StackPage = StackPage { page: INVALID, delta: 0 };

/// All translations of one vCPU.
#[repr(C)]
pub(crate) struct Tlb {
    /// Array in use. Generated code looks here.
    pub(crate) current: NonNull<Entry>,
    /// The page that the stack was last in. Generated code looks here, and fills it.
    stack: StackPage,
    /// What generated code that reads for a supervisor may find without `current`.
    stretches: Stretches,
    /// Array in which the interpreter looks before it writes: `current`, or none.
    writing: NonNull<Entry>,
    /// The interpreter's writes take the slow path, all of them.
    writes_slowly: bool,
    stamp: u64,
    context: Context,
    /// Index of the address space in use.
    space: usize,
    spaces: Vec<Space>,
    globals: Globals,
    hints: WriteHints,
    /// Large pages in `spaces` and `globals`.
    large: LargePages,
    /// Large pages in the spaces' code.
    large_code: LargePages,
    /// Numbers stamps, lives and switches; never repeats.
    counter: u64,
}

// SAFETY: `current` points into an array of `spaces`, which this value owns, or to `nothing()`, which is never written;
// `HostPage::host` and `Code::host` point into guest memory, which the processor that owns this value keeps alive.
unsafe impl Send for Tlb {}

impl Tlb {
    /// For a processor whose guest memory has this many pages in its books.
    pub(crate) fn new(pages: usize) -> Self {
        let mut tlb = Self {
            current: nothing(),
            stack: NO_STACK,
            stretches: Stretches::none(),
            writing: nothing(),
            writes_slowly: false,
            stamp: 0,
            context: Context::Kernel,
            space: 0,
            spaces: (0..SPACES).map(|_| Space::new()).collect(),
            globals: Globals::new(),
            hints: WriteHints::new(pages),
            large: LargePages::none(),
            large_code: LargePages::none(),
            counter: 0,
        };
        tlb.flush_all();
        tlb
    }

    /// Chooses the array.
    #[inline]
    pub(crate) fn select(&mut self, context: Context) {
        self.context = context;
        self.point();
    }

    pub(crate) fn context(&self) -> Context {
        self.context
    }

    /// A number that is another one whenever an instruction page that was asked for ([`Tlb::code`]) under it may lie
    /// elsewhere, and in every address space: for the jump cache. It never repeats.
    #[inline(always)]
    pub(crate) fn stamp(&self) -> u64 {
        self.stamp
    }

    /// Makes all writes of the interpreter take the slow path, or lets them go.
    pub(crate) fn write_slowly(&mut self, slowly: bool) {
        self.writes_slowly = slowly;
        self.writing = if slowly { nothing() } else { self.current };
    }

    #[inline(always)]
    fn entry(&self, linear: u64) -> &Entry {
        // SAFETY: the index is masked to the array's length, and `current` points to an array that lives.
        unsafe { &*self.current.as_ptr().add(index(linear)) }
    }

    /// Host address for reading `size` bytes, if cached and within one page.
    #[inline(always)]
    pub(crate) fn read(&self, linear: u64, size: u64) -> Option<*mut u8> {
        let entry = self.entry(linear);
        (entry.read == page_of(linear.wrapping_add(size - 1)))
            .then(|| entry.delta.wrapping_add(linear) as *mut u8)
    }

    /// Host address for writing `size` bytes, if cached and within one page.
    #[inline(always)]
    pub(crate) fn write(&self, linear: u64, size: u64) -> Option<*mut u8> {
        // SAFETY: as in `entry`; `writing` points to the same array, or to `nothing()`.
        let entry = unsafe { &*self.writing.as_ptr().add(index(linear)) };
        (entry.write == page_of(linear.wrapping_add(size - 1)))
            .then(|| entry.delta.wrapping_add(linear) as *mut u8)
    }

    /// As [`Tlb::read`] and [`Tlb::write`], looking at another array.
    pub(crate) fn look(&self, context: Context, linear: u64, size: u64, write: bool) -> Option<*mut u8> {
        let entry = self.spaces[self.space].arrays.get(context as usize)?.as_ref()?.get(index(linear));
        let found = if write { entry.write } else { entry.read };
        (found == page_of(linear.wrapping_add(size - 1))).then(|| entry.delta.wrapping_add(linear) as *mut u8)
    }

    /// Remembers a data translation; one that is `global`, for every address space.
    pub(crate) fn fill(&mut self, context: Context, linear: u64, found: Found, global: bool) {
        if context == Context::Slow {
            return;
        }
        let Found { page, free, shift, .. } = found;
        self.large.note(linear, shift);
        if free {
            self.hints.note(page.index, index(linear));
        }
        if global {
            self.globals.put(context, linear, found);
        }
        let tag = page_of(linear);
        let entry = Entry {
            read: tag,
            write: if free { tag } else { INVALID },
            delta: (page.host.as_ptr() as u64).wrapping_sub(tag),
            flags: if shift > 12 { u64::from(shift) } else { 0 },
        };
        let array = &mut self.spaces[self.space].arrays[context as usize];
        let made = array.is_none();
        array.get_or_insert_with(Array::new).fill(index(linear), entry);
        if made {
            self.point();
        }
    }

    /// A global translation that lets a supervisor read (or `write`) without a walk; it is [filled](Tlb::fill) by this.
    pub(crate) fn global(&mut self, context: Context, linear: u64, write: bool) -> Option<Found> {
        let found = self.globals.get(context, linear, write)?;
        self.fill(context, linear, found, false);
        Some(found)
    }

    /// A cached instruction page. `user` is CPL 3.
    pub(crate) fn code(&mut self, linear: u64, user: bool) -> Option<Code> {
        let space = &mut self.spaces[self.space];
        let code = (*space.code.get(code_slot(linear, user))?)?;
        (code.linear == page_of(linear) && code.life == space.life).then(|| {
            space.seen.insert(linear);
            code
        })
    }

    /// Remembers an instruction page, which a page of `1 << shift` bytes maps.
    pub(crate) fn fill_code(
        &mut self,
        linear: u64,
        user: bool,
        (gpa, shift): (u64, u8),
        page: HostPage,
    ) -> Code {
        self.large_code.note(linear, shift);
        let space = &mut self.spaces[self.space];
        if space.code.is_empty() {
            space.code.resize(CODE_ENTRIES, None);
        }
        let (host, index) = (page.host, page.index);
        let code = Code { linear: page_of(linear), life: space.life, shift, gpa, host, index };
        space.code[code_slot(linear, user)] = Some(code);
        space.seen.insert(linear);
        code
    }

    /// Remembers global translations that a supervisor may read by, many at once.
    pub(crate) fn put_stretch(&mut self, stretch: Stretch) {
        self.stretches.put(stretch);
    }

    /// The number of the stretch that an address lies in.
    pub(crate) fn stretch(&self, linear: u64) -> Option<usize> {
        self.stretches.find(linear)
    }

    /// Where in this process an address lies that generated code finds in a stretch.
    pub(crate) fn read_in_stretch(&self, linear: u64) -> Option<*mut u8> {
        self.stretches.read(linear)
    }

    /// Forgets everything.
    pub(crate) fn flush_all(&mut self) {
        self.flush_spaces();
        self.globals.clear();
        self.stretches.clear();
        self.large = LargePages::none();
    }

    /// Forgets everything but global translations; the address space in use is then that of PCID 0.
    pub(crate) fn flush_spaces(&mut self) {
        for space in 0..self.spaces.len() {
            self.clear_space(space);
            self.spaces[space].pcid = None;
        }
        self.large_code = LargePages::none();
        self.spaces[0].pcid = Some(0);
        self.use_space(0);
    }

    /// Forgets one PCID's translations.
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        if let Some(space) = self.find(pcid) {
            self.clear_space(space);
            self.restamp();
        }
    }

    /// Switches to the address space `pcid`, keeping what is cached for it if `keep`.
    pub(crate) fn switch(&mut self, pcid: u16, keep: bool) {
        let space = match self.find(pcid) {
            Some(space) => {
                if !keep {
                    self.clear_space(space);
                }
                space
            }
            None => {
                let oldest = (0..self.spaces.len()).min_by_key(|&at| {
                    let space = &self.spaces[at];
                    (space.pcid.is_some(), space.used)
                });
                let space = oldest.unwrap_or_default();
                self.clear_space(space);
                self.spaces[space].pcid = Some(pcid);
                space
            }
        };
        self.use_space(space);
    }

    /// Forgets one page in every address space (INVLPG; a large page goes whole).
    pub(crate) fn flush_page(&mut self, linear: u64) {
        self.stack = NO_STACK;
        let large = self.large.may_hold(linear);
        let large_code = self.large_code.may_hold(linear);
        for space in &mut self.spaces {
            space.flush_page(linear, large, large_code);
        }
        self.globals.drop_page(linear, large);
        self.stretches.drop_page(linear);
        self.restamp();
    }

    /// Decoded code has changed somewhere: what the jump cache knows must be found anew.
    pub(crate) fn code_changed(&mut self) {
        for space in &mut self.spaces {
            space.stamp = 0;
        }
        self.restamp();
    }

    /// Makes every write take the slow path once more: somebody watches a page, or the dirty log was taken.
    pub(crate) fn forget_writes(&mut self) {
        self.stack = NO_STACK;
        for array in self.spaces.iter_mut().flat_map(|s| s.arrays.iter_mut().flatten()) {
            array.change(Entry::without_write);
        }
        self.globals.forget_writes();
    }

    /// As [`Tlb::forget_writes`], for one page of guest memory.
    pub(crate) fn forget_writes_to(&mut self, frame: Frame) {
        self.stack = NO_STACK;
        let only = match self.hints.take(frame.index) {
            Writable::Nowhere => return,
            Writable::At(at) => Some(at),
            Writable::Anywhere => None,
        };
        for array in self.spaces.iter_mut().flat_map(|s| s.arrays.iter_mut().flatten()) {
            match only {
                Some(at) => array.forget_write(at, frame),
                None => array.change(|entry| entry.without_write_to(frame)),
            }
        }
        self.globals.forget_writes_to(frame, only);
    }

    fn find(&self, pcid: u16) -> Option<usize> {
        self.spaces.iter().position(|s| s.pcid == Some(pcid))
    }

    fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn clear_space(&mut self, space: usize) {
        self.stack = NO_STACK;
        let life = self.next();
        self.spaces[space].clear(life);
    }

    fn use_space(&mut self, space: usize) {
        self.space = space;
        self.spaces[space].used = self.next();
        self.restamp();
        self.point();
    }

    /// Gives the address space in use a new stamp if one is due.
    fn restamp(&mut self) {
        let new = self.counter + 1;
        let space = &mut self.spaces[self.space];
        if space.stamp == 0 {
            self.counter = new;
            space.stamp = new;
            space.seen.clear();
        }
        self.stamp = space.stamp;
    }

    /// Brings `current` up to date.
    fn point(&mut self) {
        self.stack = NO_STACK;
        self.stretches.show(matches!(self.context, Context::Kernel | Context::KernelAll));
        let array = self.spaces[self.space].arrays.get(self.context as usize).and_then(Option::as_ref);
        self.current = array.map_or_else(nothing, |array| array.at);
        self.write_slowly(self.writes_slowly);
    }
}

/// An array for whatever was never filled: shared by all, never written.
fn nothing() -> NonNull<Entry> {
    static NOTHING: OnceLock<Box<[Entry]>> = OnceLock::new();
    NonNull::from(&**NOTHING.get_or_init(|| vec![EMPTY; ENTRIES].into_boxed_slice())).cast()
}

/// Linear address of the page that `linear` lies in.
#[inline(always)]
pub(super) fn page_of(linear: u64) -> u64 {
    linear & !(PAGE - 1)
}

/// Where a page is looked for.
#[inline(always)]
pub(super) fn index(linear: u64) -> usize {
    (linear / PAGE) as usize & (ENTRIES - 1)
}

fn code_slot(linear: u64, user: bool) -> usize {
    ((linear / PAGE) as usize ^ usize::from(user) << 8) & (CODE_ENTRIES - 1)
}

/// Where translated code finds translations.
pub(crate) struct TlbLayout;

impl TlbLayout {
    /// The array in use, from the start of [`Tlb`].
    pub(crate) const CURRENT: usize = std::mem::offset_of!(Tlb, current);
    /// Page and delta of the stack's page, likewise.
    pub(crate) const STACK_PAGE: usize = std::mem::offset_of!(Tlb, stack.page);
    pub(crate) const STACK_DELTA: usize = std::mem::offset_of!(Tlb, stack.delta);
    /// Fields of the first stretch, likewise, and how far the next one is.
    pub(crate) const STRETCH_BASE: usize =
        std::mem::offset_of!(Tlb, stretches.seen) + std::mem::offset_of!(Seen, base);
    pub(crate) const STRETCH_LEN: usize =
        std::mem::offset_of!(Tlb, stretches.seen) + std::mem::offset_of!(Seen, len);
    pub(crate) const STRETCH_DELTA: usize =
        std::mem::offset_of!(Tlb, stretches.seen) + std::mem::offset_of!(Seen, delta);
    pub(crate) const STRETCH_SIZE: usize = size_of::<u64>();
    /// log2 of the size of an entry.
    pub(crate) const SHIFT: u8 = size_of::<Entry>().trailing_zeros() as u8;
    /// Byte offsets of entries, as a mask.
    pub(crate) const MASK: i32 = ((ENTRIES - 1) * size_of::<Entry>()) as i32;
    /// Offsets in an entry: tag of pages that may be read, tag of pages that may be written, what to add.
    pub(crate) const READ: i32 = std::mem::offset_of!(Entry, read) as i32;
    pub(crate) const WRITE: i32 = std::mem::offset_of!(Entry, write) as i32;
    pub(crate) const DELTA: i32 = std::mem::offset_of!(Entry, delta) as i32;
}
