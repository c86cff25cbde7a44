//! A FIFO of 16 bytes, each with a mark.

use serde::{Deserialize, Serialize};

/// Receiver or transmitter FIFO. The mark of a byte says that it was a break.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Fifo {
    bytes: [u8; Self::SIZE],
    /// A bit per slot.
    marks: u16,
    head: u8,
    length: u8,
}

impl Fifo {
    pub(super) const SIZE: usize = 16;

    pub(super) fn len(&self) -> usize {
        self.length.into()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    fn slot(&self, index: u8) -> usize {
        usize::from(self.head.wrapping_add(index)) % Self::SIZE
    }

    /// Appends a byte; false if there is no room within `capacity`.
    pub(super) fn push(&mut self, byte: u8, mark: bool, capacity: usize) -> bool {
        if self.len() >= capacity.min(Self::SIZE) {
            return false;
        }
        let slot = self.slot(self.length);
        self.bytes[slot] = byte;
        self.marks = self.marks & !(1 << slot) | u16::from(mark) << slot;
        self.length += 1;
        true
    }

    pub(super) fn pop(&mut self) -> Option<u8> {
        let slot = self.slot(0);
        self.length = self.length.checked_sub(1)?;
        self.marks &= !(1 << slot);
        self.head = (self.head + 1) % Self::SIZE as u8;
        Some(self.bytes[slot])
    }

    /// Whether the byte at the front is marked.
    pub(super) fn front_marked(&self) -> bool {
        !self.is_empty() && self.marks >> self.slot(0) & 1 != 0
    }

    /// Takes the mark off the byte at the front.
    pub(super) fn unmark_front(&mut self) {
        let slot = self.slot(0);
        self.marks &= !(1 << slot);
    }

    /// Whether any byte is marked.
    pub(super) fn any_marked(&self) -> bool {
        self.marks != 0
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether a saved FIFO is one.
    pub(super) fn valid(&self) -> bool {
        let used = (0..self.length).fold(0u16, |used, index| used | 1 << self.slot(index));
        usize::from(self.head) < Self::SIZE && self.len() <= Self::SIZE && self.marks & !used == 0
    }
}
