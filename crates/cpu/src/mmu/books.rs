//! What the soft TLB knows about its own contents, so that forgetting costs what was filled and no more.

use super::tlb::ENTRIES;

/// Filled indices noted one by one; with more, everything is looked at.
const NOTED: usize = ENTRIES / 2;

/// Which indices of an array may be filled.
pub(super) struct Log {
    filled: Vec<u16>,
    all: bool,
}

impl Log {
    pub(super) const fn new() -> Self {
        Self { filled: Vec::new(), all: false }
    }

    /// An index that was empty is filled.
    pub(super) fn note(&mut self, at: usize) {
        if self.filled.len() < NOTED {
            // `ENTRIES` is small enough (asserted where it is defined).
            self.filled.push(at as u16);
        } else {
            self.all = true;
        }
    }

    /// Every index that may be filled, some of them more than once.
    pub(super) fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        let (noted, rest) = if self.all { (&[][..], 0..ENTRIES) } else { (&self.filled[..], 0..0) };
        noted.iter().map(|&at| usize::from(at)).chain(rest)
    }

    /// Nothing is filled any more.
    pub(super) fn clear(&mut self) {
        self.filled.clear();
        self.all = false;
    }
}

/// Where translations from pages larger than 4 KiB may be cached.
pub(super) struct LargePages {
    /// Regions of 2 MiB, hashed.
    mid: [u64; 64],
    /// Regions of 1 GiB, hashed.
    giant: [u64; 16],
}

impl LargePages {
    pub(super) const fn none() -> Self {
        Self { mid: [0; 64], giant: [0; 16] }
    }

    /// Part of a page of `1 << shift` bytes is cached.
    pub(super) fn note(&mut self, linear: u64, shift: u8) {
        match shift {
            ..=12 => {}
            30.. => set(&mut self.giant, linear >> 30),
            22 => {
                set(&mut self.mid, linear >> 21 & !1);
                set(&mut self.mid, linear >> 21 | 1);
            }
            _ => set(&mut self.mid, linear >> 21),
        }
    }

    /// Whether part of a large page around `linear` may be.
    pub(super) fn may_hold(&self, linear: u64) -> bool {
        get(&self.mid, linear >> 21) || get(&self.giant, linear >> 30)
    }
}

/// A set of pages that may claim one it does not have.
pub(super) struct PageFilter {
    bits: Box<[u64; 512]>,
    any: bool,
}

impl PageFilter {
    pub(super) fn new() -> Self {
        Self { bits: Box::new([0; 512]), any: false }
    }

    fn hash(linear: u64) -> u64 {
        (linear / 4096).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32
    }

    pub(super) fn insert(&mut self, linear: u64) {
        self.any = true;
        set(&mut self.bits, Self::hash(linear));
    }

    pub(super) fn may_hold(&self, linear: u64) -> bool {
        self.any && get(&self.bits, Self::hash(linear))
    }

    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.any) {
            self.bits.fill(0);
        }
    }
}

fn set<const N: usize>(bits: &mut [u64; N], at: u64) {
    let at = at as usize % (64 * N);
    bits[at / 64] |= 1 << (at % 64);
}

fn get<const N: usize>(bits: &[u64; N], at: u64) -> bool {
    let at = at as usize % (64 * N);
    bits[at / 64] & 1 << (at % 64) != 0
}

/// For each page of guest memory, where in the TLB's arrays it may be cached as writable.
pub(super) struct WriteHints(Vec<u16>);

/// Where a page may be writable.
pub(super) enum Writable {
    Nowhere,
    /// At one index of any array.
    At(usize),
    Anywhere,
}

const ANYWHERE: u16 = u16::MAX;

impl WriteHints {
    /// For this many pages of guest memory.
    pub(super) fn new(pages: usize) -> Self {
        // Zeroed memory that the host provides as it is touched.
        Self(vec![0; pages])
    }

    /// A page (by its number in the books of guest memory) is cached as writable.
    pub(super) fn note(&mut self, page: usize, at: usize) {
        if let Some(hint) = self.0.get_mut(page) {
            let new = at as u16 + 1;
            *hint = if *hint == 0 || *hint == new { new } else { ANYWHERE };
        }
    }

    /// Where it may be, which the caller makes untrue.
    pub(super) fn take(&mut self, page: usize) -> Writable {
        match self.0.get_mut(page).map(std::mem::take) {
            Some(0) => Writable::Nowhere,
            Some(ANYWHERE) | None => Writable::Anywhere,
            Some(at) => Writable::At(usize::from(at) - 1),
        }
    }
}
