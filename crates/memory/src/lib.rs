//! Guest-physical memory: regions backed by a memfd or anonymous memory, bounds-checked copies, typed little-endian access, the dirty log,
//! and the watch that tells a software CPU when somebody writes to code it has decoded.
//!
//! Guest memory is never a Rust reference: other threads and the guest itself change it at any time. Everything
//! goes through copies and atomics on raw pointers, and every access is bounds-checked against the region list.

mod backing;
mod map;
mod pages;
mod region;

pub use backing::{Backing, GIGANTIC_PAGE, LARGE_PAGE, LockLimit, PageSize, Pool, PoolShortage};
pub use pages::{CodeChanges, CodeListener, HostPage, WATCH_GRANULE};
pub use region::{GuestMemory, PagePair, RegionInfo, RegionKind, RegionSpec};

/// Size of a page in bytes: the unit of the dirty log and of the watch.
pub const PAGE_SIZE: u64 = 4096;

/// A failed access or set-up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Some byte of the range is backed by no region.
    #[error("guest physical range {gpa:#x}+{len:#x} is not memory")]
    Unbacked {
        /// First byte of the access.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A write to a read-only region.
    #[error("guest physical range {gpa:#x}+{len:#x} is read-only")]
    ReadOnly {
        /// First byte of the access.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// An atomic access that is not naturally aligned.
    #[error("guest physical address {0:#x} is not aligned for an atomic access")]
    Misaligned(u64),
    /// Regions overlap, are empty, or are not page-aligned.
    #[error("region {start:#x}+{size:#x}: {why}")]
    Layout {
        /// Start of the offending region.
        start: u64,
        /// Its size in bytes.
        size: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// The host's pool has too few huge pages.
    #[error(transparent)]
    Pool(PoolShortage),
    /// The host gives no transparent huge pages to shared memory, which guest memory is.
    #[error(
        "this host gives no transparent huge pages to guest memory: {file} says \"{setting}\"; allow them: echo advise | \
         sudo tee {file}"
    )]
    NotTransparent {
        /// The file that has the setting.
        file: String,
        /// The setting.
        setting: String,
    },
    /// The limit on locked memory is too low.
    #[error(transparent)]
    LockLimit(LockLimit),
    /// The host refused.
    #[error("{what} of {size} bytes for guest memory: {source}")]
    Host {
        /// The call.
        what: &'static str,
        /// Bytes asked for.
        size: u64,
        /// The error.
        source: std::io::Error,
    },
}
