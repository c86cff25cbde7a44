//! The soft TLB: direct-mapped, one array for each way of looking at memory, tagged with an address-space number.
#![expect(unsafe_code, reason = "host addresses of guest pages are raw pointers, indices are masked")]

use std::ptr::NonNull;

/// Entries per array.
const ENTRIES: usize = 4096;
const PAGE: u64 = 4096;
/// An entry that matches nothing: no address-space number is all ones.
const INVALID: u64 = u64::MAX;
/// Address-space numbers before a real flush is needed; all ones stays free.
const ASIDS: u64 = 0xffe;

/// One cached translation. A tag is the page's linear address with the address-space number in its low 12 bits.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Entry {
    read: u64,
    write: u64,
    /// Host address minus linear address.
    delta: u64,
    /// Bit 0: the mapping page is larger than 4 KiB.
    large: u64,
}

const EMPTY: Entry = Entry { read: INVALID, write: INVALID, delta: 0, large: 0 };

/// Which array is looked at: privilege and what SMAP makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// A cached instruction page.
#[derive(Clone, Copy)]
pub(crate) struct Code {
    tag: u64,
    /// Guest physical address of the page.
    pub(crate) gpa: u64,
    /// Its first byte in this process.
    pub(crate) host: NonNull<u8>,
    /// Its number in the books of guest memory.
    pub(crate) index: usize,
}

const CODE_ENTRIES: usize = 512;

/// All translations of one vCPU.
pub(crate) struct Tlb {
    /// Array in use.
    current: NonNull<Entry>,
    /// Address-space number in use.
    asid: u64,
    context: Context,
    arrays: Box<[[Entry; ENTRIES]; 4]>,
    code: Box<[Option<Code>; CODE_ENTRIES]>,
    /// PCID to address-space number, for those that may still have entries.
    pcids: Vec<(u16, u64)>,
    next_asid: u64,
    /// 2 MiB regions (hashed) that may have entries from large pages.
    large: [u64; 16],
    /// Counts everything that may invalidate a linear-to-physical translation.
    pub(crate) generation: u32,
}

// SAFETY: `current` points into `arrays`, which this value owns; `Code::host` points into guest memory, which the
// processor that owns this value keeps alive.
unsafe impl Send for Tlb {}

impl Tlb {
    pub(crate) fn new() -> Self {
        let mut arrays = alloc_arrays();
        let current = NonNull::from(&mut arrays[Context::Kernel as usize]).cast();
        Self {
            current,
            asid: 0,
            context: Context::Kernel,
            arrays,
            code: Box::new([None; CODE_ENTRIES]),
            pcids: vec![(0, 0)],
            next_asid: 1,
            large: [0; 16],
            generation: 0,
        }
    }

    /// Chooses the array.
    pub(crate) fn select(&mut self, context: Context) {
        self.context = context;
        self.current = NonNull::from(&mut self.arrays[context as usize]).cast();
    }

    pub(crate) fn context(&self) -> Context {
        self.context
    }

    /// A number that differs whenever a cached linear-to-physical translation might: for the jump cache.
    #[inline(always)]
    pub(crate) fn stamp(&self) -> u64 {
        u64::from(self.generation) << 16 | self.asid
    }

    #[inline(always)]
    fn tag(&self, linear: u64) -> u64 {
        (linear & !(PAGE - 1)) | self.asid
    }

    #[inline(always)]
    fn entry(&self, linear: u64) -> &Entry {
        let at = (linear / PAGE) as usize & (ENTRIES - 1);
        // SAFETY: the index is masked to the array's length, and `current` points to an array of ours.
        unsafe { &*self.current.as_ptr().add(at) }
    }

    /// Host address for reading `size` bytes, if cached and within one page.
    #[inline(always)]
    pub(crate) fn read(&self, linear: u64, size: u64) -> Option<*mut u8> {
        let entry = self.entry(linear);
        (entry.read == self.tag(linear.wrapping_add(size - 1)))
            .then(|| entry.delta.wrapping_add(linear) as *mut u8)
    }

    /// Host address for writing `size` bytes, if cached and within one page.
    #[inline(always)]
    pub(crate) fn write(&self, linear: u64, size: u64) -> Option<*mut u8> {
        let entry = self.entry(linear);
        (entry.write == self.tag(linear.wrapping_add(size - 1)))
            .then(|| entry.delta.wrapping_add(linear) as *mut u8)
    }

    /// As [`Tlb::read`] and [`Tlb::write`], looking at another array.
    pub(crate) fn look(&self, context: Context, linear: u64, size: u64, write: bool) -> Option<*mut u8> {
        let entry = &self.arrays[context as usize][(linear / PAGE) as usize & (ENTRIES - 1)];
        let found = if write { entry.write } else { entry.read };
        (found == self.tag(linear.wrapping_add(size - 1)))
            .then(|| entry.delta.wrapping_add(linear) as *mut u8)
    }

    /// Remembers a data translation.
    pub(crate) fn fill(
        &mut self,
        context: Context,
        linear: u64,
        host: NonNull<u8>,
        writable: bool,
        shift: u8,
    ) {
        if context == Context::Slow {
            return;
        }
        let tag = self.tag(linear);
        if shift > 12 {
            let bit = large_bit(linear);
            self.large[bit / 64] |= 1 << (bit % 64);
        }
        let page = linear & !(PAGE - 1);
        self.arrays[context as usize][(linear / PAGE) as usize & (ENTRIES - 1)] = Entry {
            read: tag,
            write: if writable { tag } else { INVALID },
            delta: (host.as_ptr() as u64).wrapping_sub(page),
            large: u64::from(shift > 12),
        };
    }

    /// A cached instruction page. `user` is CPL 3.
    pub(crate) fn code(&self, linear: u64, user: bool) -> Option<Code> {
        let tag = self.tag(linear);
        self.code[code_slot(linear, user)].filter(|c| c.tag == tag)
    }

    /// Remembers an instruction page.
    pub(crate) fn fill_code(
        &mut self,
        linear: u64,
        user: bool,
        gpa: u64,
        host: NonNull<u8>,
        index: usize,
    ) -> Code {
        let code = Code { tag: self.tag(linear), gpa, host, index };
        self.code[code_slot(linear, user)] = Some(code);
        code
    }

    /// Forgets everything.
    pub(crate) fn flush_all(&mut self) {
        self.pcids.clear();
        self.new_asid(0);
    }

    /// Forgets one PCID's translations; if it is the current one, the caller must [`Tlb::switch`] to it anew.
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        self.pcids.retain(|p| p.0 != pcid);
        self.generation = self.generation.wrapping_add(1);
    }

    /// Switches to the address space `pcid`, keeping what is cached for it if `keep`.
    pub(crate) fn switch(&mut self, pcid: u16, keep: bool) {
        match self.pcids.iter().find(|p| p.0 == pcid) {
            Some(&(_, asid)) if keep => self.asid = asid,
            _ => {
                self.flush_pcid(pcid);
                self.new_asid(pcid);
            }
        }
    }

    fn new_asid(&mut self, pcid: u16) {
        self.generation = self.generation.wrapping_add(1);
        if self.next_asid >= ASIDS {
            self.arrays.as_flattened_mut().fill(EMPTY);
            self.code.fill(None);
            self.pcids.clear();
            self.large = [0; 16];
            self.next_asid = 0;
        }
        self.asid = self.next_asid;
        self.next_asid += 1;
        self.pcids.push((pcid, self.asid));
        // Few address spaces are alive at once; the oldest loses its entries.
        if self.pcids.len() > 64 {
            self.pcids.remove(0);
        }
    }

    /// Forgets one page in every address space (INVLPG; a large page goes whole).
    pub(crate) fn flush_page(&mut self, linear: u64) {
        self.generation = self.generation.wrapping_add(1);
        let bit = large_bit(linear);
        if self.large[bit / 64] & 1 << (bit % 64) != 0 {
            // Any page around may come from the same large page, up to 1 GiB of it.
            for entry in self.arrays.as_flattened_mut() {
                if entry.large != 0 && (entry.read ^ linear) >> 30 == 0 {
                    *entry = EMPTY;
                }
            }
            self.code.fill(None);
        }
        for array in self.arrays.iter_mut() {
            array[(linear / PAGE) as usize & (ENTRIES - 1)] = EMPTY;
        }
        for user in [false, true] {
            self.code[code_slot(linear, user)] = None;
        }
    }

    /// Makes every write take the slow path once more: somebody watches a page, or the dirty log was taken.
    pub(crate) fn forget_writes(&mut self) {
        for entry in self.arrays.as_flattened_mut() {
            entry.write = INVALID;
        }
    }

    /// As [`Tlb::forget_writes`], for one page of guest memory.
    pub(crate) fn forget_writes_to(&mut self, host: NonNull<u8>) {
        let host = host.as_ptr() as u64;
        for entry in self.arrays.as_flattened_mut() {
            if entry.write != INVALID && entry.delta.wrapping_add(entry.write & !(PAGE - 1)) == host {
                entry.write = INVALID;
            }
        }
    }
}

fn large_bit(linear: u64) -> usize {
    (linear >> 30) as usize & 1023
}

fn code_slot(linear: u64, user: bool) -> usize {
    ((linear / PAGE) as usize ^ usize::from(user) << 8) & (CODE_ENTRIES - 1)
}

fn alloc_arrays() -> Box<[[Entry; ENTRIES]; 4]> {
    let flat: Box<[[Entry; ENTRIES]]> = vec![[EMPTY; ENTRIES]; 4].into_boxed_slice();
    match flat.try_into() {
        Ok(arrays) => arrays,
        Err(_) => unreachable!("four arrays were made"),
    }
}

/// Where translated code finds translations.
pub(crate) struct TlbLayout;

impl TlbLayout {
    /// The array in use, from the start of [`Tlb`].
    pub(crate) const CURRENT: usize = std::mem::offset_of!(Tlb, current);
    /// log2 of the size of an entry.
    pub(crate) const SHIFT: u8 = size_of::<Entry>().trailing_zeros() as u8;
    /// Byte offsets of entries, as a mask.
    pub(crate) const MASK: i32 = ((ENTRIES - 1) * size_of::<Entry>()) as i32;
    /// Offsets in an entry: tag of pages that may be read, tag of pages that may be written, what to add.
    pub(crate) const READ: i32 = std::mem::offset_of!(Entry, read) as i32;
    pub(crate) const WRITE: i32 = std::mem::offset_of!(Entry, write) as i32;
    pub(crate) const DELTA: i32 = std::mem::offset_of!(Entry, delta) as i32;
}
