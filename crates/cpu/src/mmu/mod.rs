//! The only way to guest memory: linear address → soft TLB → host page, with a walk of the guest's page tables and
//! the I/O path behind it.

mod access;
mod books;
mod global;
mod linear;
#[cfg(test)]
mod tests;
mod tlb;
mod walk;

pub(crate) use access::MemWord;
pub(crate) use global::Found;
pub(crate) use linear::Stretch;
pub(crate) use tlb::{Code, Context, Frame, Tlb, TlbLayout};

/// What an access wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Data read.
    Read,
    /// Data write (or read-modify-write).
    Write,
    /// Instruction fetch.
    Fetch,
}

/// The result of a walk: where one 4 KiB page of linear address space lies, and what may be done with it later
/// without another walk, at the privilege that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Translation {
    /// Guest physical address of the 4 KiB page.
    pub(crate) gpa: u64,
    /// Writes are allowed and the dirty bit is set already.
    pub(crate) writable: bool,
    /// log2 of the size of the page that maps it: 12, 21, 22 or 30.
    pub(crate) shift: u8,
    /// The page is the same in every address space.
    pub(crate) global: bool,
}
