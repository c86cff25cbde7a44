//! Decoded code, kept by guest physical address; and the jump cache in front of it, by linear address.
//!
//! A block is a run of instructions that lie in one page (or one instruction that straddles two) and end with a control
//! transfer or whatever else must be looked at. It is valid while the version of its page is the one it was decoded under:
//! whoever writes to decoded bytes raises the version ([`skep_memory::GuestMemory::watch`]).
#![expect(unsafe_code, reason = "blocks are reached by pointer from the jump cache, versions from the block")]

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::cpu::CodeSize;
use crate::op::Op;

/// Instructions in a block at most.
pub(crate) const MAX_OPS: usize = 48;
/// Decoded instructions kept before everything is dropped and starts anew (about 50 bytes each).
const CAPACITY: usize = 2 << 20;
const JUMPS: usize = 16384;

/// Everything but the address that decides what bytes mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Default sizes.
    pub(crate) code: CodeSize,
    /// CPL 3 (fetch permissions differ).
    pub(crate) user: bool,
    /// One instruction only.
    pub(crate) single: bool,
}

impl Key {
    fn bits(self) -> u64 {
        self.code as u64 | u64::from(self.user) << 2 | u64::from(self.single) << 3
    }
}

/// A run of decoded instructions.
pub(crate) struct Block {
    /// The instructions.
    pub(crate) ops: Box<[Op]>,
    /// Length in bytes.
    pub(crate) len: u16,
    /// Pages it lies on (twice the same, mostly) and their versions when it was decoded.
    pages: [(usize, u32, *const AtomicU32); 2],
}

// SAFETY: the version pointers lead into guest memory's books, which outlive the processor that owns the block.
unsafe impl Send for Block {}

impl Block {
    /// `versions` are those of the pages' counters in guest memory, which must outlive the block.
    pub(crate) fn new(ops: Vec<Op>, len: u16, pages: [(usize, u32, &AtomicU32); 2]) -> Self {
        Self {
            ops: ops.into_boxed_slice(),
            len,
            pages: pages.map(|(page, version, at)| (page, version, std::ptr::from_ref(at))),
        }
    }

    #[inline(always)]
    fn valid(&self) -> bool {
        let [first, second] = self.pages;
        Self::current(first) && (second.0 == first.0 || Self::current(second))
    }

    fn current((_, version, at): (usize, u32, *const AtomicU32)) -> bool {
        // SAFETY: the processor that owns this block owns a handle to guest memory and with it the counters.
        unsafe { &*at }.load(Ordering::Acquire) == version
    }
}

#[derive(Clone, Copy)]
struct Jump {
    linear: u64,
    /// TLB stamp and key; all ones matches nothing.
    stamp: u64,
    block: *const Block,
}

const NO_JUMP: Jump = Jump { linear: 0, stamp: u64::MAX, block: std::ptr::null() };

/// All decoded code of one vCPU.
pub(crate) struct Blocks {
    jumps: Box<[Jump]>,
    by_address: HashMap<u64, *const Block, BuildHasherDefault<Mix>>,
    #[expect(clippy::vec_box, reason = "blocks are pointed to and must not move when the arena grows")]
    arena: Vec<Box<Block>>,
    ops: usize,
    running: *const Block,
}

// SAFETY: all pointers lead into `arena`, which this value owns.
unsafe impl Send for Blocks {}

impl Blocks {
    pub(crate) fn new() -> Self {
        Self {
            jumps: vec![NO_JUMP; JUMPS].into_boxed_slice(),
            by_address: HashMap::default(),
            arena: Vec::new(),
            ops: 0,
            running: std::ptr::null(),
        }
    }

    #[inline(always)]
    fn slot(linear: u64) -> usize {
        (linear ^ linear >> 14) as usize & (JUMPS - 1)
    }

    #[inline(always)]
    fn stamp(stamp: u64, key: Key) -> u64 {
        stamp << 4 | key.bits()
    }

    /// The block at a linear address, if it was run there under this TLB stamp, which changes with every change of code.
    #[inline(always)]
    pub(crate) fn jump(&self, linear: u64, stamp: u64, key: Key) -> Option<*const Block> {
        // SAFETY: the index is masked to the table's length.
        let jump = unsafe { self.jumps.get_unchecked(Self::slot(linear)) };
        (jump.linear == linear && jump.stamp == Self::stamp(stamp, key)).then_some(jump.block)
    }

    /// The block at a guest physical address.
    pub(crate) fn find(&self, gpa: u64, key: Key) -> Option<*const Block> {
        let block = *self.by_address.get(&(gpa << 4 | key.bits()))?;
        // SAFETY: the map is cleared whenever the arena is.
        unsafe { &*block }.valid().then_some(block)
    }

    /// Remembers where a block was found.
    pub(crate) fn remember(&mut self, linear: u64, stamp: u64, key: Key, block: *const Block) {
        self.jumps[Self::slot(linear)] = Jump { linear, stamp: Self::stamp(stamp, key), block };
    }

    /// Keeps a block; one that straddles pages has no physical address of its own.
    pub(crate) fn insert(&mut self, gpa: Option<u64>, key: Key, block: Block) -> *const Block {
        if self.ops > CAPACITY {
            self.clear();
        }
        self.ops += block.ops.len() + 4;
        let block = Box::new(block);
        let at: *const Block = &raw const *block;
        self.arena.push(block);
        if let Some(gpa) = gpa {
            self.by_address.insert(gpa << 4 | key.bits(), at);
        }
        at
    }

    /// Drops everything. Not while a block runs.
    pub(crate) fn clear(&mut self) {
        self.jumps.fill(NO_JUMP);
        self.by_address.clear();
        self.arena.clear();
        self.ops = 0;
        self.running = std::ptr::null();
    }

    /// Says which block runs (for [`Blocks::runs_on`]).
    #[inline(always)]
    pub(crate) fn set_running(&mut self, block: *const Block) {
        self.running = block;
    }

    /// Whether the running block lies on a page.
    pub(crate) fn runs_on(&self, page: usize) -> bool {
        // SAFETY: set by the run loop to a block of the arena, which is cleared only between blocks.
        unsafe { self.running.as_ref() }.is_some_and(|b| b.pages.iter().any(|p| p.0 == page))
    }

    /// Whether code of the running block has been overwritten since it was decoded, by whomever.
    pub(crate) fn running_stale(&self) -> bool {
        // SAFETY: as above.
        unsafe { self.running.as_ref() }.is_some_and(|b| !b.valid())
    }

    /// Whether the running block is a single instruction.
    pub(crate) fn running_alone(&self) -> bool {
        // SAFETY: as above.
        unsafe { self.running.as_ref() }.is_none_or(|b| b.ops.len() == 1)
    }

    /// Decoded instructions kept.
    #[allow(dead_code, reason = "for statistics and tests")]
    pub(crate) fn len(&self) -> usize {
        self.ops
    }
}

/// Multiplicative hashing: addresses are not chosen by an adversary who gains by collisions in his own cache.
#[derive(Default)]
pub(crate) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}
