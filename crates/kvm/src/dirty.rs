//! The dirty log: which pages vCPUs have written, from the kernel's bitmaps or from rings that it fills.
#![expect(unsafe_code, reason = "rings are mapped from vCPUs' descriptors")]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};
use skep_hv::HvError;
use skep_memory::{GuestMemory, PAGE_SIZE, RegionKind};

use crate::error::Tried;
use crate::ioctl;
use crate::kick::{Kicker, note};

/// Flags of a ring's entry (linux/kvm.h): the kernel has filled it; we have taken it.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// The dirty log of one VM.
pub(crate) struct DirtyLog {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    /// Entries of every ring; 0 if there are bitmaps instead.
    entries: u32,
    rings: Mutex<Vec<Ring>>,
    /// The slots are being logged.
    logging: AtomicBool,
}

impl DirtyLog {
    pub(crate) fn new(vm: Arc<VmFd>, memory: GuestMemory, entries: u32) -> Self {
        let (rings, logging) = (Mutex::default(), AtomicBool::new(false));
        Self { vm, memory, entries, rings, logging }
    }

    fn rings(&self) -> MutexGuard<'_, Vec<Ring>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU has been made.
    pub(crate) fn add(&self, vcpu: &VcpuFd) -> io::Result<()> {
        if self.entries != 0 {
            let ring = Ring::map(vcpu, self.entries)?;
            self.rings().push(ring);
        }
        Ok(())
    }

    /// Whether memory slots are to be made with logging on.
    pub(crate) fn is_logging(&self) -> bool {
        self.logging.load(Ordering::SeqCst)
    }

    /// Brings the log of guest memory up to date. `restart` changes whether slots are logged.
    pub(crate) fn sync(
        &self,
        kickers: &[Arc<Kicker>],
        restart: impl FnOnce() -> Result<(), HvError>,
    ) -> Result<(), HvError> {
        let wanted = self.memory.dirty_logging();
        if self.logging.swap(wanted, Ordering::SeqCst) != wanted {
            restart()?;
        }
        if !wanted {
            return Ok(());
        }
        if self.entries == 0 {
            return self.sync_bitmaps();
        }
        // What a processor has written but not yet told comes out with it.
        for kicker in kickers.iter().filter(|kicker| kicker.is_inside()) {
            let before = kicker.rounds();
            kicker.post(note::FLUSH);
            while kicker.is_inside() && kicker.rounds() == before {
                std::thread::yield_now();
            }
        }
        self.harvest()
    }

    fn sync_bitmaps(&self) -> Result<(), HvError> {
        for (slot, region) in (0..).zip(self.memory.regions()) {
            if region.kind == RegionKind::Rom {
                continue;
            }
            let bitmap = self.vm.get_dirty_log(slot, region.size as usize).tried("KVM_GET_DIRTY_LOG")?;
            let first = (region.offset / PAGE_SIZE) as usize;
            for (word, mut bits) in bitmap.into_iter().enumerate() {
                while bits != 0 {
                    self.memory.mark_dirty(first + word * 64 + bits.trailing_zeros() as usize);
                    bits &= bits - 1;
                }
            }
        }
        Ok(())
    }

    /// Empties all rings into the log. Also what a vCPU does whose ring is full.
    pub(crate) fn harvest(&self) -> Result<(), HvError> {
        let first: Vec<_> = self
            .memory
            .regions()
            .map(|region| (region.offset / PAGE_SIZE, region.size / PAGE_SIZE))
            .collect();
        let mut rings = self.rings();
        for ring in rings.iter_mut() {
            ring.take(|slot, page| {
                if let Some((first, _)) = first.get(slot as usize & 0xffff).filter(|(_, pages)| page < *pages)
                {
                    self.memory.mark_dirty((first + page) as usize);
                }
            });
        }
        // With the rings' lock held: the kernel expects nobody else to read them meanwhile.
        ioctl::reset_dirty_rings(&self.vm)
            .map(drop)
            .map_err(|source| HvError::Os { what: "KVM_RESET_DIRTY_RINGS", source })
    }
}

/// One vCPU's ring, mapped.
struct Ring {
    base: NonNull<kvm_dirty_gfn>,
    entries: u32,
    /// The next entry to look at; counts on without end.
    next: u32,
}

// SAFETY: the mapping is this process's, not one thread's, and the ring is used with its lock held.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, entries: u32) -> io::Result<Self> {
        let length = entries as usize * size_of::<kvm_dirty_gfn>();
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        // SAFETY: a new mapping, where the kernel likes.
        let at = unsafe {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            libc::mmap(std::ptr::null_mut(), length, protection, flags, ioctl::raw(vcpu), offset)
        };
        match NonNull::new(at.cast::<kvm_dirty_gfn>()) {
            Some(base) if at != libc::MAP_FAILED => Ok(Self { base, entries, next: 0 }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Takes every entry that is there: slot, page in the slot.
    fn take(&mut self, mut each: impl FnMut(u32, u64)) {
        // At most one round: the kernel cannot go on before they are reset.
        for _ in 0..self.entries {
            let at = (self.next % self.entries) as usize;
            // SAFETY: within the mapping; the kernel writes an entry before its flag.
            let (flags, entry) = unsafe {
                let entry = self.base.add(at).as_ptr();
                (&*(&raw const (*entry).flags).cast::<AtomicU32>(), entry)
            };
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                break;
            }
            // SAFETY: as above; the flag says that the entry is whole and stays until it is reset.
            let (slot, offset) = unsafe { ((*entry).slot, (*entry).offset) };
            each(slot, offset);
            flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.entries as usize * size_of::<kvm_dirty_gfn>())
        };
    }
}
