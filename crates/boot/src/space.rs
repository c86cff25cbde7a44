//! Which RAM is still free while a payload is put into place: nothing overlaps anything else.

use std::ops::Range;

use crate::BootError;
use crate::layout::{E820Kind, FOUR_GIB, HIGH_MEMORY, MemoryLayout, PCI_HOLE};

/// The page that holds the interrupt vectors and the BIOS data area: never given away.
const FIRST_PAGE: Range<u64> = 0..0x1000;

/// Usable RAM, and what of it is taken.
#[derive(Debug)]
pub(crate) struct Space {
    layout: MemoryLayout,
    ram: Vec<Range<u64>>,
    /// In address order, disjoint.
    taken: Vec<(Range<u64>, &'static str)>,
}

/// Why a range cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clash {
    /// It would be RAM if there were more: at least this many bytes.
    NeedsMemory(u64),
    /// It is no RAM, or RAM that firmware keeps.
    NotUsable,
    /// Something else is there.
    Taken(&'static str),
}

impl Space {
    pub(crate) fn new(layout: &MemoryLayout) -> Self {
        let ram = layout
            .e820()
            .iter()
            .filter(|e| e.kind == E820Kind::Usable)
            .map(|e| e.start..e.start + e.size)
            .collect();
        Self { layout: *layout, ram, taken: vec![(FIRST_PAGE, "interrupt vectors and BIOS data area")] }
    }

    /// Takes exactly `range`, which is not empty.
    pub(crate) fn claim(&mut self, range: Range<u64>, what: &'static str) -> Result<(), Clash> {
        if !self.ram.iter().any(|r| r.start <= range.start && range.end <= r.end) {
            let below_hole = range.start >= HIGH_MEMORY && range.end <= PCI_HOLE;
            return Err(if below_hole { Clash::NeedsMemory(range.end) } else { Clash::NotUsable });
        }
        let at = self.taken.partition_point(|(r, _)| r.end <= range.start);
        match self.taken.get(at) {
            Some((r, name)) if r.start < range.end => Err(Clash::Taken(name)),
            _ => {
                self.taken.insert(at, (range, what));
                Ok(())
            }
        }
    }

    /// The free ranges inside `within`, in address order.
    fn free(&self, within: Range<u64>) -> impl DoubleEndedIterator<Item = Range<u64>> {
        let mut free = Vec::new();
        for ram in &self.ram {
            let end = ram.end.min(within.end);
            let mut start = ram.start.max(within.start);
            for (taken, _) in &self.taken {
                if taken.end <= start || taken.start >= end {
                    continue;
                }
                free.push(start..taken.start);
                start = taken.end;
            }
            free.push(start..end);
        }
        free.into_iter().filter(|r| r.start < r.end)
    }

    /// Takes the lowest `size` bytes in `within` that start at a multiple of `align`, a power of two.
    pub(crate) fn lowest(
        &mut self,
        size: u64,
        align: u64,
        within: Range<u64>,
        what: &'static str,
    ) -> Option<u64> {
        let start = self.free(within).find_map(|r| {
            let start = r.start.checked_next_multiple_of(align)?;
            (start.checked_add(size)? <= r.end).then_some(start)
        })?;
        self.claim(start..start + size.max(1), what).ok().map(|()| start)
    }

    /// Takes the highest such bytes.
    pub(crate) fn highest(
        &mut self,
        size: u64,
        align: u64,
        within: Range<u64>,
        what: &'static str,
    ) -> Option<u64> {
        let start = self.free(within).rev().find_map(|r| {
            let start = r.end.checked_sub(size)? & !(align - 1);
            (start >= r.start).then_some(start)
        })?;
        self.claim(start..start + size.max(1), what).ok().map(|()| start)
    }

    /// The largest free range in `within`, in bytes.
    pub(crate) fn largest(&self, within: Range<u64>) -> u64 {
        self.free(within).map(|r| r.end - r.start).max().unwrap_or(0)
    }

    /// Takes room for a structure of ours: as low as possible, below 4 GiB, page-aligned.
    pub(crate) fn structure(&mut self, size: u64, what: &'static str) -> Result<u64, BootError> {
        self.lowest(size, 0x1000, 0..FOUR_GIB, what).ok_or_else(|| BootError::MemoryTooSmall {
            size: self.layout.size(),
            need: self.layout.size().saturating_add(size).next_multiple_of(1 << 20),
            what: format!("this payload and its {what}"),
        })
    }

    pub(crate) fn layout(&self) -> &MemoryLayout {
        &self.layout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(size: u64) -> Space {
        Space::new(&MemoryLayout::new(size, 0).unwrap())
    }

    #[test]
    fn what_is_taken_is_not_given_twice() {
        let mut s = space(16 << 20);
        s.claim(0x10_0000..0x20_0000, "kernel").unwrap();
        assert_eq!(s.claim(0x1f_ffff..0x20_0001, "x"), Err(Clash::Taken("kernel")));
        assert_eq!(s.claim(0x1000..0x10_1000, "x"), Err(Clash::NotUsable));
        assert_eq!(s.claim(0..0x10, "x"), Err(Clash::Taken("interrupt vectors and BIOS data area")));
        assert_eq!(s.claim(0x20_0000..0x200_0000, "x"), Err(Clash::NeedsMemory(0x200_0000)));
        assert_eq!(s.lowest(0x1000, 0x1000, 0..FOUR_GIB, "a"), Some(0x1000));
        assert_eq!(s.lowest(0x9_0000, 0x1000, 0..FOUR_GIB, "b"), Some(0x2000));
        assert_eq!(s.lowest(0x10_0000, 0x1000, 0..FOUR_GIB, "c"), Some(0x20_0000));
        assert_eq!(s.highest(1, 0x1000, 0..FOUR_GIB, "d"), Some((16 << 20) - 0x1000));
        assert_eq!(s.highest(0x1000, 0x1000, 0..FOUR_GIB, "e"), Some((16 << 20) - 0x2000));
        assert_eq!(s.highest(1 << 30, 1, 0..FOUR_GIB, "f"), None);
        assert_eq!(s.lowest(u64::MAX, 1, 0..u64::MAX, "g"), None);
        assert_eq!(s.largest(0..FOUR_GIB), (16 << 20) - 0x2000 - 0x30_0000);
    }

    #[test]
    fn any_sequence_of_requests_stays_disjoint_and_in_ram() {
        let mut random = crate::testing::Random(7);
        for _ in 0..200 {
            let mut s = space(8 << 20);
            for _ in 0..40 {
                let (a, b) = (random.below(9 << 20), random.below(9 << 20));
                let (size, align) = (random.below(1 << 20) + 1, 1 << random.below(14));
                match random.below(3) {
                    0 => drop(s.claim(a..a + size, "claim")),
                    1 => drop(s.lowest(size, align, a..b, "low")),
                    _ => drop(s.highest(size, align, a..b, "high")),
                }
            }
            assert!(s.taken.windows(2).all(|w| w[0].0.end <= w[1].0.start));
            let inside = |t: &Range<u64>| s.ram.iter().any(|r| r.start <= t.start && t.end <= r.end);
            assert!(s.taken.iter().all(|(t, _)| t.start < t.end && inside(t)));
        }
    }
}
