//! A set of interrupt vectors: IRR, ISR, TMR.

use serde::{Deserialize, Serialize};

/// 256 bits, one per vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VectorSet([u64; 4]);

impl VectorSet {
    /// Whether `vector` is in the set.
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] >> (vector & 63) & 1 != 0
    }

    /// Adds `vector`.
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    /// Takes `vector` out.
    pub fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    /// Adds or removes `vector`.
    pub fn set(&mut self, vector: u8, present: bool) {
        if present { self.insert(vector) } else { self.remove(vector) }
    }

    /// The highest vector.
    pub fn highest(&self) -> Option<u8> {
        (0..4u8).rev().find_map(|i| {
            let word = self.0[usize::from(i)];
            (word != 0).then(|| i * 64 + 63 - word.leading_zeros() as u8)
        })
    }

    /// Whether no vector is in the set.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// Vectors `32 * index` to `32 * index + 31` as a register shows them; `index` below 8.
    pub fn word(&self, index: u32) -> u32 {
        (self.0[(index / 2 % 4) as usize] >> (index % 2 * 32)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_follows_insertions_and_removals() {
        let mut set = VectorSet::default();
        assert_eq!(set.highest(), None);
        for vector in [0, 31, 32, 63, 64, 200, 255] {
            set.insert(vector);
            assert_eq!(set.highest(), Some(vector));
            assert_eq!(set.word(u32::from(vector) / 32) >> (vector % 32), 1);
        }
        for vector in [255, 200, 64, 63, 32, 31, 0] {
            assert_eq!(set.highest(), Some(vector));
            assert!(set.contains(vector));
            set.remove(vector);
        }
        assert!(set.is_empty());
    }
}
