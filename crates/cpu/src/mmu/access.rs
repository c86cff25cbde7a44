//! Reading and writing guest memory at linear addresses: the fast path over the soft TLB, and the slow path that walks,
//! fills, watches, and reaches devices.
#![expect(
    unsafe_code,
    reason = "loads, stores and locked operations on host addresses that the TLB vouches for"
)]

use std::arch::asm;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use skep_memory::{GuestMemory, HostPage};

use super::tlb::Code;
use super::{Access, Context, Found, Translation};
use crate::cpu::{Cpu, cr4};
use crate::fault::{Abort, Exec, Raised};
use crate::regs::Word;

const PAGE: u64 = 4096;

/// A width that memory can be accessed with in one piece.
pub(crate) trait MemWord: Word {
    /// Plain load, any alignment; one instruction, so never torn within what the processor guarantees.
    ///
    /// # Safety
    /// `at` is valid for reads of this width.
    unsafe fn load(at: *const u8) -> Self;
    /// Plain store, likewise.
    ///
    /// # Safety
    /// `at` is valid for writes of this width.
    unsafe fn store(at: *mut u8, value: Self);
    /// Locked compare-and-exchange, any alignment: the value found.
    ///
    /// # Safety
    /// `at` is valid for reads and writes of this width.
    unsafe fn locked_compare_exchange(at: *mut u8, old: Self, new: Self) -> Self;
}

macro_rules! mem_word {
    ($($t:ty, $atomic:ty, $class:ident, $m:literal, $a:tt;)*) => {$(
        impl MemWord for $t {
            #[inline(always)]
            unsafe fn load(at: *const u8) -> Self {
                let value: $t;
                // SAFETY: the caller vouches for the address. Assembly, as the guest's other processors may write.
                unsafe { asm!(concat!("mov {v", $m, "}, [{at}]"), v = out($class) value, at = in(reg) at, options(nostack, preserves_flags, readonly)) };
                value
            }
            #[inline(always)]
            unsafe fn store(at: *mut u8, value: Self) {
                // SAFETY: as above.
                unsafe { asm!(concat!("mov [{at}], {v", $m, "}"), v = in($class) value, at = in(reg) at, options(nostack, preserves_flags)) };
            }
            #[inline(always)]
            unsafe fn locked_compare_exchange(at: *mut u8, old: Self, new: Self) -> Self {
                if (at as usize).is_multiple_of(size_of::<$t>()) {
                    // SAFETY: valid by the caller, aligned by the check.
                    let atomic = unsafe { <$atomic>::from_ptr(at.cast()) };
                    match atomic.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst) {
                        Ok(found) | Err(found) => found,
                    }
                } else {
                    let found: $t;
                    // SAFETY: as above; LOCK works at any alignment.
                    unsafe { asm!(concat!("lock cmpxchg [{at}], {n", $m, "}"), n = in($class) new, at = in(reg) at, inout($a) old => found, options(nostack)) };
                    found
                }
            }
        }
    )*};
}
mem_word! {
    u8, AtomicU8, reg_byte, "", "al";
    u16, AtomicU16, reg, ":x", "ax";
    u32, AtomicU32, reg, ":e", "eax";
    u64, AtomicU64, reg, ":r", "rax";
}

/// Where one page's worth of an access goes.
#[derive(Clone, Copy)]
enum Place {
    Memory { page: HostPage, gpa: u64 },
    Io(u64),
}

impl Cpu {
    /// Reads at a linear address with the current privilege.
    #[inline(always)]
    pub(crate) fn read<T: MemWord>(&mut self, linear: u64) -> Exec<T> {
        match self.tlb.read(linear, size_of::<T>() as u64) {
            // SAFETY: the TLB holds only mapped host pages, and the access does not leave the page.
            Some(at) => Ok(unsafe { T::load(at) }),
            None => self.read_slow(self.tlb.context(), linear),
        }
    }

    /// Writes at a linear address with the current privilege.
    #[inline(always)]
    pub(crate) fn write<T: MemWord>(&mut self, linear: u64, value: T) -> Exec {
        match self.tlb.write(linear, size_of::<T>() as u64) {
            Some(at) => {
                // SAFETY: as in `read`.
                unsafe { T::store(at, value) };
                Ok(())
            }
            None => self.write_slow(self.tlb.context(), linear, value),
        }
    }

    /// Read-modify-write: `f` gets the old value and the status flags, and may be called again if `locked` and another
    /// processor was faster. A plain one is a load and a store, as on the real thing.
    #[inline(always)]
    pub(crate) fn modify<T: MemWord>(
        &mut self,
        linear: u64,
        locked: bool,
        f: impl Fn(T, &mut u16) -> T,
    ) -> Exec<T> {
        match self.tlb.write(linear, size_of::<T>() as u64) {
            Some(at) if !locked => {
                // SAFETY: as in `read`; a page that may be written may be read.
                let old = unsafe { T::load(at) };
                let new = f(old, &mut self.status);
                // SAFETY: as above.
                unsafe { T::store(at, new) };
                Ok(old)
            }
            // SAFETY: as above.
            Some(at) => Ok(unsafe { locked_modify(at, &mut self.status, &f) }),
            None => self.modify_slow(linear, locked, &f),
        }
    }

    /// Implicit supervisor read: descriptor tables, task state (SDM vol. 3A §4.6: CPL and AC do not count).
    pub(crate) fn read_system<T: MemWord>(&mut self, linear: u64) -> Exec<T> {
        let context = self.system_context();
        match self.tlb.look(context, linear, size_of::<T>() as u64, false) {
            // SAFETY: as in `read`.
            Some(at) => Ok(unsafe { T::load(at) }),
            None => self.read_slow(context, linear),
        }
    }

    /// Implicit supervisor write.
    pub(crate) fn write_system<T: MemWord>(&mut self, linear: u64, value: T) -> Exec {
        let context = self.system_context();
        match self.tlb.look(context, linear, size_of::<T>() as u64, true) {
            Some(at) => {
                // SAFETY: as in `read`.
                unsafe { T::store(at, value) };
                Ok(())
            }
            None => self.write_slow(context, linear, value),
        }
    }

    fn system_context(&self) -> Context {
        if self.cr4 & cr4::SMAP != 0 { Context::Kernel } else { Context::KernelAll }
    }

    /// What lies at an address, if that is known without a walk, and without any trace of having been read.
    pub(crate) fn glimpse(&self, linear: u64, size: usize) -> Option<u64> {
        let at = || self.tlb.read_in_stretch(linear).or_else(|| self.tlb.read(linear, size as u64));
        // SAFETY: as in `read`; and all of a stretch is mapped memory, of which what is seen ends well before it does.
        unsafe {
            match size {
                1 => Some(u8::load(at()?).into()),
                2 => Some(u16::load(at()?).into()),
                4 => Some(u32::load(at()?).into()),
                8 => Some(u64::load(at()?)),
                _ => None,
            }
        }
    }

    /// Reads any number of bytes at the current privilege. Nothing has been read from devices if it faults.
    pub(crate) fn read_bytes(&mut self, linear: u64, into: &mut [u8]) -> Exec {
        let context = self.tlb.context();
        self.check_range(context, linear, into.len() as u64, Access::Read)?;
        let mut done = 0;
        while done < into.len() {
            let at = linear.wrapping_add(done as u64);
            let len = ((PAGE - at % PAGE) as usize).min(into.len() - done);
            let piece = &mut into[done..done + len];
            match self.place(context, at, Access::Read)? {
                Place::Memory { page, gpa } => self.copy(page, gpa, |memory, gpa| memory.read(gpa, piece)),
                Place::Io(gpa) => self.io_read_bytes(gpa, piece),
            }
            done += len;
        }
        self.check_breakpoints(context, linear, into.len() as u64, false);
        Ok(())
    }

    /// Writes any number of bytes at the current privilege. Nothing has been written if it faults.
    pub(crate) fn write_bytes(&mut self, linear: u64, from: &[u8]) -> Exec {
        let context = self.tlb.context();
        self.check_range(context, linear, from.len() as u64, Access::Write)?;
        let mut done = 0;
        while done < from.len() {
            let at = linear.wrapping_add(done as u64);
            let len = ((PAGE - at % PAGE) as usize).min(from.len() - done);
            if let Place::Memory { page, .. } = self.place(context, at, Access::Write)? {
                self.about_to_write(page, at % PAGE, len as u64)?;
            }
            done += len;
        }
        let mut done = 0;
        while done < from.len() {
            let at = linear.wrapping_add(done as u64);
            let len = ((PAGE - at % PAGE) as usize).min(from.len() - done);
            let piece = &from[done..done + len];
            match self.place(context, at, Access::Write)? {
                Place::Memory { page, gpa } => self.copy(page, gpa, |memory, gpa| memory.write(gpa, piece)),
                Place::Io(gpa) => self.io_write_bytes(gpa, piece),
            }
            done += len;
        }
        self.check_breakpoints(context, linear, from.len() as u64, true);
        Ok(())
    }

    /// Checks that a range may be accessed (faulting as the access would) without touching it.
    pub(crate) fn probe(&mut self, linear: u64, len: u64, access: Access) -> Exec {
        self.check_range(self.tlb.context(), linear, len, access)
    }

    /// Host address of a range that lies in one page of plain memory and is cached for the access, after trying to
    /// cache it: for REP string chunks. `None`: take the ordinary path.
    pub(crate) fn host_range(&mut self, linear: u64, len: u64, write: bool) -> Exec<Option<*mut u8>> {
        if len == 0 || linear % PAGE + len > PAGE || self.tlb.context() == Context::Slow {
            return Ok(None);
        }
        let cached = |tlb: &super::Tlb| if write { tlb.write(linear, len) } else { tlb.read(linear, len) };
        if let Some(at) = cached(&self.tlb) {
            return Ok(Some(at));
        }
        let access = if write { Access::Write } else { Access::Read };
        self.place(self.tlb.context(), linear, access)?;
        Ok(cached(&self.tlb))
    }

    /// The page that holds the code at `linear`, walked and cached at the current privilege.
    pub(crate) fn code_page(&mut self, linear: u64) -> Exec<Code> {
        let user = self.mode.cpl == 3;
        if let Some(code) = self.tlb.code(linear, user) {
            return Ok(code);
        }
        self.stats.tlb_misses += 1;
        if !self.canonical(linear) {
            return Err(self.gp(0));
        }
        let found = self.walk(linear, Access::Fetch, user, false)?;
        let Some(page) = self.memory.page(found.gpa) else {
            self.raised = Raised::Failed("instruction fetch from an address that is not memory");
            return Err(Abort);
        };
        Ok(self.tlb.fill_code(linear, user, (found.gpa, found.shift), page))
    }

    /// Whether an address is canonical for the paging mode in use.
    pub(crate) fn canonical(&self, linear: u64) -> bool {
        if !self.mode.long {
            return true;
        }
        let bits = if self.cr4 & cr4::LA57 != 0 { 57 } else { 48 };
        let shift = 64 - bits;
        ((linear << shift) as i64 >> shift) as u64 == linear
    }

    fn check_range(&mut self, context: Context, linear: u64, len: u64, access: Access) -> Exec {
        // An operand that ends in non-canonical space faults as a whole.
        if !self.canonical(linear.wrapping_add(len.saturating_sub(1))) {
            self.raised = Raised::NonCanonical;
            return Err(Abort);
        }
        let mut at = linear;
        let mut left = len;
        while left > 0 {
            let step = (PAGE - at % PAGE).min(left);
            self.place(context, at, access)?;
            at = at.wrapping_add(step);
            left -= step;
        }
        Ok(())
    }

    /// Translates one address, raising what the access raises, and fills the TLB where a later access may skip this.
    fn place(&mut self, context: Context, linear: u64, access: Access) -> Exec<Place> {
        let linear = if self.mode.long { linear } else { linear & 0xffff_ffff };
        if !self.canonical(linear) {
            self.raised = Raised::NonCanonical;
            return Err(Abort);
        }
        if let Some(found) = self.tlb.global(context, linear, access == Access::Write) {
            return Ok(Place::Memory { page: found.page, gpa: found.gpa | linear % PAGE });
        }
        self.stats.tlb_misses += 1;
        let (user, smap) = match context {
            Context::User => (true, false),
            Context::KernelAll => (false, false),
            Context::Kernel => (false, true),
            Context::Slow => (self.mode.cpl == 3, self.smap_active()),
        };
        let Translation { gpa, writable, shift, global } = self.walk(linear, access, user, smap)?;
        let Some(page) = self.memory.page(gpa) else {
            return self.device(gpa | linear % PAGE);
        };
        if access == Access::Write && !page.writable {
            return self.device(gpa | linear % PAGE);
        }
        let logged = self.memory.dirty_logging();
        if logged && access == Access::Write {
            self.memory.mark_dirty(page.index);
        }
        // Another processor may have cleared the mask under the code that runs here.
        let watched = self.memory.watch(page.index).load(Ordering::SeqCst) != 0
            || self.blocks.runs_on(page.index) && self.blocks.running_stale()
            || self.jit.is_some() && self.memory.epoch() != self.code_epoch;
        let free = writable && page.writable && !watched && (!logged || access == Access::Write);
        self.tlb.fill(context, linear, Found { gpa, page, free, shift }, global);
        // Where a large page is, there are others.
        if global && shift > 12 && access == Access::Read && self.jit.is_some() {
            self.find_stretch(linear);
        }
        Ok(Place::Memory { page, gpa: gpa | linear % PAGE })
    }

    /// Remembers what lies around a large page in one piece with it, if that is not known.
    fn find_stretch(&mut self, linear: u64) {
        if self.tlb.stretch(linear).is_none()
            && let Some(stretch) = self.stretch_around(linear)
        {
            self.tlb.put_stretch(stretch);
        }
    }

    /// An access leads to a device, which lockstep does not repeat.
    fn device(&mut self, gpa: u64) -> Exec<Place> {
        if self.lockstep.as_mut().is_some_and(|l| l.refuses_device()) {
            self.raised = Raised::Failed("lockstep met a device");
            return Err(Abort);
        }
        Ok(Place::Io(gpa))
    }

    /// Lockstep wants to know of bytes that are about to be overwritten.
    #[inline(always)]
    fn note_write(&mut self, page: HostPage, offset: u64, len: usize) {
        if let Some(lockstep) = &mut self.lockstep {
            lockstep.note_write(page.host.as_ptr().wrapping_add(offset as usize), len);
        }
    }

    #[cold]
    #[inline(never)]
    fn read_slow<T: MemWord>(&mut self, context: Context, linear: u64) -> Exec<T> {
        let size = size_of::<T>() as u64;
        self.check_explicit(context, linear, size)?;
        self.check_breakpoints(context, linear, size, false);
        if linear % PAGE + size > PAGE {
            let mut bytes = [0; 8];
            self.read_across(context, linear, &mut bytes[..size as usize])?;
            return Ok(T::of(u64::from_le_bytes(bytes)));
        }
        match self.place(context, linear, Access::Read)? {
            Place::Memory { page, .. } => {
                // SAFETY: the page is mapped and the access stays in it.
                Ok(unsafe { T::load(page.host.as_ptr().add((linear % PAGE) as usize)) })
            }
            Place::Io(gpa) => {
                let mut bytes = [0; 8];
                self.io_read_bytes(gpa, &mut bytes[..size as usize]);
                Ok(T::of(u64::from_le_bytes(bytes)))
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: MemWord>(&mut self, context: Context, linear: u64, value: T) -> Exec {
        let size = size_of::<T>() as u64;
        self.check_explicit(context, linear, size)?;
        if linear % PAGE + size > PAGE {
            let bytes = value.to_u64().to_le_bytes();
            self.write_across(context, linear, &bytes[..size as usize])?;
        } else {
            match self.place(context, linear, Access::Write)? {
                Place::Memory { page, .. } => {
                    self.about_to_write(page, linear % PAGE, size)?;
                    // SAFETY: the page is mapped, writable, and the access stays in it.
                    unsafe { T::store(page.host.as_ptr().add((linear % PAGE) as usize), value) };
                    self.memory.written(page.index, linear % PAGE, size);
                }
                Place::Io(gpa) => self.io_write_bytes(gpa, &value.to_u64().to_le_bytes()[..size as usize]),
            }
        }
        self.check_breakpoints(context, linear, size, true);
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn modify_slow<T: MemWord>(
        &mut self,
        linear: u64,
        locked: bool,
        f: &dyn Fn(T, &mut u16) -> T,
    ) -> Exec<T> {
        let size = size_of::<T>() as u64;
        let context = self.tlb.context();
        self.check_alignment(linear, size)?;
        if linear % PAGE + size > PAGE {
            self.check_range(context, linear, size, Access::Write)?;
            if locked
                && self.unseen_writers
                && let Some(old) = self.modify_across(context, linear, f)?
            {
                return Ok(old);
            }
            // Two host pages cannot be changed in one instruction: everybody else stands still meanwhile.
            let alone = locked.then(|| self.stand_alone());
            let mut bytes = [0; 8];
            self.read_across(context, linear, &mut bytes[..size as usize])?;
            let old = T::of(u64::from_le_bytes(bytes));
            let mut status = self.status;
            let new = f(old, &mut status).to_u64().to_le_bytes();
            self.write_across(context, linear, &new[..size as usize])?;
            drop(alone);
            self.status = status;
            self.check_breakpoints(context, linear, size, true);
            return Ok(old);
        }
        let old = match self.place(context, linear, Access::Write)? {
            Place::Memory { page, .. } => {
                self.about_to_write(page, linear % PAGE, size)?;
                // SAFETY: the page is mapped, writable, and the access stays in it.
                let old = unsafe {
                    locked_modify(page.host.as_ptr().add((linear % PAGE) as usize), &mut self.status, f)
                };
                self.memory.written(page.index, linear % PAGE, size);
                old
            }
            Place::Io(gpa) => {
                let mut bytes = [0; 8];
                self.io_read_bytes(gpa, &mut bytes[..size as usize]);
                let old = T::of(u64::from_le_bytes(bytes));
                let new = f(old, &mut self.status).to_u64().to_le_bytes();
                self.io_write_bytes(gpa, &new[..size as usize]);
                old
            }
        };
        self.check_breakpoints(context, linear, size, true);
        Ok(old)
    }

    /// A locked operation across two pages of memory by one instruction of the host, which sees them side by side. `None`:
    /// one is no memory, or the host cannot show them so.
    fn modify_across<T: MemWord>(
        &mut self,
        context: Context,
        linear: u64,
        f: &dyn Fn(T, &mut u16) -> T,
    ) -> Exec<Option<T>> {
        let size = size_of::<T>() as u64;
        let boundary = (linear | (PAGE - 1)).wrapping_add(1);
        let places =
            (self.place(context, linear, Access::Write)?, self.place(context, boundary, Access::Write)?);
        let (Place::Memory { page: first, .. }, Place::Memory { page: second, .. }) = places else {
            return Ok(None);
        };
        let Ok(pages) = self.memory.side_by_side(first.index, second.index) else { return Ok(None) };
        // SAFETY: both pages are mapped, one behind the other, while `pages` lives; the access begins in the first and
        // ends in the second.
        let old = unsafe {
            locked_modify(pages.host().as_ptr().add((linear % PAGE) as usize), &mut self.status, f)
        };
        let on_first = PAGE - linear % PAGE;
        self.memory.written(first.index, linear % PAGE, on_first);
        self.memory.written(second.index, 0, size - on_first);
        self.check_breakpoints(context, linear, size, true);
        Ok(Some(old))
    }

    /// Locked compare-and-exchange of 16 aligned bytes: the value found.
    pub(crate) fn compare_exchange_16(&mut self, linear: u64, old: u128, new: u128) -> Exec<u128> {
        if !linear.is_multiple_of(16) {
            return Err(self.gp(0));
        }
        match self.place(self.tlb.context(), linear, Access::Write)? {
            Place::Memory { page, .. } => {
                self.about_to_write(page, linear % PAGE, 16)?;
                let at = page.host.as_ptr().wrapping_add((linear % PAGE) as usize);
                let (mut low, mut high) = (old as u64, (old >> 64) as u64);
                // SAFETY: 16 aligned bytes of a mapped, writable page. RBX is the compiler's, so it is swapped in.
                unsafe {
                    asm!("xchg rbx, {n}", "lock cmpxchg16b [{at}]", "mov rbx, {n}",
                        n = inout(reg) new as u64 => _, at = in(reg) at, in("rcx") (new >> 64) as u64,
                        inout("rax") low, inout("rdx") high, options(nostack));
                }
                self.memory.written(page.index, linear % PAGE, 16);
                self.check_breakpoints(self.tlb.context(), linear, 16, true);
                Ok(u128::from(std::mem::take(&mut low)) | u128::from(std::mem::take(&mut high)) << 64)
            }
            Place::Io(gpa) => {
                let mut bytes = [0; 16];
                self.io_read_bytes(gpa, &mut bytes);
                let found = u128::from_le_bytes(bytes);
                let store = if found == old { new } else { found };
                self.io_write_bytes(gpa, &store.to_le_bytes());
                Ok(found)
            }
        }
    }

    fn read_across(&mut self, context: Context, linear: u64, into: &mut [u8]) -> Exec {
        self.check_range(context, linear, into.len() as u64, Access::Read)?;
        for (i, byte) in into.iter_mut().enumerate() {
            *byte = match self.place(context, linear.wrapping_add(i as u64), Access::Read)? {
                // SAFETY: one byte of a mapped page.
                Place::Memory { page, gpa } => unsafe {
                    u8::load(page.host.as_ptr().add((gpa % PAGE) as usize))
                },
                Place::Io(gpa) => self.io().memory_read(gpa, 1) as u8,
            };
        }
        Ok(())
    }

    fn write_across(&mut self, context: Context, linear: u64, from: &[u8]) -> Exec {
        self.check_range(context, linear, from.len() as u64, Access::Write)?;
        for i in 0..from.len() {
            if let Place::Memory { page, gpa } =
                self.place(context, linear.wrapping_add(i as u64), Access::Write)?
            {
                self.about_to_write(page, gpa % PAGE, 1)?;
            }
        }
        for (i, &byte) in from.iter().enumerate() {
            match self.place(context, linear.wrapping_add(i as u64), Access::Write)? {
                Place::Memory { page, gpa } => {
                    // SAFETY: one byte of a mapped, writable page.
                    unsafe { u8::store(page.host.as_ptr().add((gpa % PAGE) as usize), byte) };
                    self.memory.written(page.index, gpa % PAGE, 1);
                }
                Place::Io(gpa) => self.io_write_bytes(gpa, &[byte]),
            }
        }
        Ok(())
    }

    fn copy(
        &mut self,
        page: HostPage,
        gpa: u64,
        f: impl FnOnce(&GuestMemory, u64) -> Result<(), skep_memory::MemoryError>,
    ) {
        debug_assert!(self.memory.page(gpa).is_some_and(|p| p.index == page.index));
        // The page was looked up just now; memory does not lose regions while a processor runs.
        if f(&self.memory, gpa).is_err() {
            self.raised = Raised::Failed("guest memory went away under an access");
        }
    }

    /// Before bytes of a memory page are written on the slow path: an instruction that is about to change code behind it
    /// in its own block starts again, alone, so that the new code is what runs next.
    fn about_to_write(&mut self, page: HostPage, offset: u64, len: u64) -> Exec {
        let mask = GuestMemory::watch_mask(offset, len);
        let watched = self.memory.watch(page.index).load(Ordering::SeqCst) & mask != 0;
        if self.blocks.runs_on(page.index)
            && (watched || self.blocks.running_stale())
            && !self.blocks.running_alone()
        {
            self.raised = Raised::Restart;
            return Err(Abort);
        }
        self.note_write(page, offset, len as usize);
        Ok(())
    }

    /// #AC for an access of `size` bytes (a power of two) that is not aligned to it, where that is checked. What is wrong
    /// with the address itself comes first.
    pub(crate) fn check_alignment(&mut self, linear: u64, size: u64) -> Exec {
        if self.tlb.context() != Context::Slow || !self.alignment_checked() || linear.is_multiple_of(size) {
            return Ok(());
        }
        if !self.canonical(linear) {
            self.raised = Raised::NonCanonical;
            return Err(Abort);
        }
        Err(self.fault(crate::fault::vector::AC, 0))
    }

    /// As above, for an access that may be an implicit one of the supervisor's, whose alignment is never checked (SDM
    /// vol. 3A §6.15, interrupt 17).
    fn check_explicit(&mut self, context: Context, linear: u64, size: u64) -> Exec {
        if context == Context::Slow { self.check_alignment(linear, size) } else { Ok(()) }
    }

    fn check_breakpoints(&mut self, context: Context, linear: u64, size: u64, write: bool) {
        if context == Context::Slow && self.dr7 & 0xff != 0 {
            self.data_breakpoints(linear, size, write);
        }
    }

    /// Reads from a device in naturally aligned pieces.
    fn io_read_bytes(&mut self, gpa: u64, into: &mut [u8]) {
        self.stats.memory_io += 1;
        let mut done = 0;
        while done < into.len() {
            let at = gpa + done as u64;
            let width = piece(at, into.len() - done);
            let value = self.io().memory_read(at, width as u8).to_le_bytes();
            into[done..done + width].copy_from_slice(&value[..width]);
            done += width;
        }
    }

    /// Writes to a device (or to read-only memory, where it goes nowhere) in naturally aligned pieces.
    fn io_write_bytes(&mut self, gpa: u64, from: &[u8]) {
        self.stats.memory_io += 1;
        let mut done = 0;
        while done < from.len() {
            let at = gpa + done as u64;
            let width = piece(at, from.len() - done);
            let mut value = [0; 8];
            value[..width].copy_from_slice(&from[done..done + width]);
            let flow = self.io().memory_write(at, width as u8, u64::from_le_bytes(value));
            self.after_io(flow);
            done += width;
        }
    }
}

/// The largest naturally aligned access at `at` that `left` bytes allow.
fn piece(at: u64, left: usize) -> usize {
    let mut width = 8;
    while !at.is_multiple_of(width as u64) || width > left {
        width /= 2;
    }
    width
}

/// # Safety
/// `at` is valid for reads and writes of this width.
unsafe fn locked_modify<T: MemWord>(
    at: *mut u8,
    status: &mut u16,
    f: &(impl Fn(T, &mut u16) -> T + ?Sized),
) -> T {
    // SAFETY: the caller's promise.
    let mut old = unsafe { T::load(at) };
    loop {
        let mut flags = *status;
        let new = f(old, &mut flags);
        // SAFETY: the caller's promise.
        let found = unsafe { T::locked_compare_exchange(at, old, new) };
        if found == old {
            *status = flags;
            return old;
        }
        old = found;
    }
}
