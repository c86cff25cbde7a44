//! What guest memory is made of, and what the host has to say about it.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

use crate::MemoryError;

/// Bytes of a page of 2 MiB: what second-level address translation maps at once where guest-physical and host-virtual
/// addresses agree modulo this.
pub const LARGE_PAGE: u64 = 2 << 20;
/// Bytes of a page of 1 GiB.
pub const GIGANTIC_PAGE: u64 = 1 << 30;

/// The host's pages that back guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PageSize {
    /// 4 KiB, taken when touched.
    #[default]
    Small,
    /// Transparent huge pages where the host's settings give this memory some, else small ones.
    Automatic,
    /// Transparent huge pages: the kernel backs an aligned 2 MiB with one page where it has one.
    Transparent,
    /// 2 MiB from the host's pool (hugetlb), all taken at once.
    Huge2M,
    /// 1 GiB from the host's pool (hugetlb), all taken at once.
    Huge1G,
}

impl PageSize {
    /// Bytes of a page of the host's pool; `None` if memory does not come from there.
    pub fn pool(self) -> Option<u64> {
        match self {
            Self::Small | Self::Automatic | Self::Transparent => None,
            Self::Huge2M => Some(LARGE_PAGE),
            Self::Huge1G => Some(GIGANTIC_PAGE),
        }
    }
}

/// How guest memory is backed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backing {
    /// The pages.
    pub pages: PageSize,
    /// All memory is taken at once and locked: the host never pages it out.
    pub wired: bool,
    /// Nobody but this process needs the memory, nor any of it at two addresses. Then it need not be a memfd, and is none where
    /// that brings transparent huge pages: most hosts give them to anonymous memory, and few to a memfd.
    pub private: bool,
}

/// The host's pool has too few huge pages, or none of that size.
#[derive(Debug)]
pub struct PoolShortage {
    /// Bytes of a page.
    pub page: u64,
    /// Pages that guest memory takes.
    pub needed: u64,
    /// The pool, if the host has one.
    pub pool: Option<Pool>,
    /// What the kernel said.
    pub source: io::Error,
}

/// A pool of huge pages, counted in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// All of them.
    pub total: u64,
    /// Those that can be had: free, and promised to nobody.
    pub available: u64,
}

/// The folder in which the kernel tells of the pool of pages of `page` bytes.
fn pool_folder(page: u64) -> PathBuf {
    PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10))
}

impl Pool {
    /// The pool of pages of `page` bytes; `None` if this host has none.
    pub fn of(page: u64) -> Option<Self> {
        let folder = pool_folder(page);
        let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
        let promised = number("resv_hugepages").unwrap_or(0);
        Some(Self {
            total: number("nr_hugepages")?,
            available: number("free_hugepages")?.saturating_sub(promised),
        })
    }
}

/// `1 huge page of 2 MiB`, `8 huge pages of 1 GiB`.
fn counted(count: u64, page: u64) -> String {
    let size = if page == GIGANTIC_PAGE { "1 GiB" } else { "2 MiB" };
    format!("{count} huge page{} of {size}", if count == 1 { "" } else { "s" })
}

impl fmt::Display for PoolShortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page, needed, pool, source } = self;
        let wanted = counted(*needed, *page);
        let Some(Pool { total, available }) = *pool else {
            return write!(
                f,
                "guest memory needs {wanted}, and this host has none of that size ({source}): its processor or its kernel lacks them; use pages of \
                 another size, or transparent ones"
            );
        };
        let folder = pool_folder(*page);
        if available >= *needed {
            let group = if *page == GIGANTIC_PAGE { "1GB" } else { "2MB" };
            return write!(
                f,
                "guest memory needs {wanted}, of which {available} are free, but the kernel refused \
                 them: {source}; raise the control group's limit (hugetlb.{group}.max)"
            );
        }
        write!(
            f,
            "guest memory needs {wanted}, and of the {total} in the host's pool {available} are free; \
             reserve more: echo {} | sudo tee {}",
            total + (needed - available),
            folder.join("nr_hugepages").display()
        )?;
        if *page == GIGANTIC_PAGE {
            write!(
                f,
                ", or hugepagesz=1G hugepages=N on the host's kernel command line where memory is fragmented"
            )?;
        }
        Ok(())
    }
}

impl std::error::Error for PoolShortage {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// The limit on locked memory is too low.
#[derive(Debug)]
pub struct LockLimit {
    /// Bytes to be locked.
    pub needed: u64,
    /// Bytes that this process may lock (RLIMIT_MEMLOCK).
    pub allowed: u64,
    /// Bytes that it has locked already.
    pub held: u64,
}

impl fmt::Display for LockLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { needed, allowed, held } = self;
        write!(
            f,
            "wiring guest memory locks {needed} bytes, but this process may lock {allowed} bytes (RLIMIT_MEMLOCK), of which \
             {held} are locked already; raise the limit (ulimit -l {}, or memlock in /etc/security/limits.conf), or give it \
             the capability CAP_IPC_LOCK",
            (needed + held).div_ceil(1024)
        )
    }
}

impl std::error::Error for LockLimit {}

/// The host's setting that decides about transparent huge pages for memory of one kind, and where it stands: `name` is `enabled`
/// for anonymous memory, `shmem_enabled` for shared memory. `None` if this kernel has none.
fn transparent_setting(name: &str) -> Option<(String, String)> {
    let folder = "/sys/kernel/mm/transparent_hugepage";
    let own = format!("{folder}/hugepages-2048kB/{name}");
    let general = format!("{folder}/{name}");
    let chosen = |file: &str| {
        let text = fs::read_to_string(file).ok()?;
        Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
    };
    // The setting of that size decides, unless it hands on to the general one (as it does from Linux 6.11 on).
    match chosen(&own) {
        Some(value) if value != "inherit" => Some((own, value)),
        _ => chosen(&general).map(|value| (general, value)),
    }
}

/// Whether the host gives transparent huge pages to anonymous memory that asks.
pub(crate) fn gives_transparent() -> bool {
    transparent_setting("enabled").is_some_and(|(_, setting)| setting != "never")
}

/// Refuses transparent huge pages where the host's setting says that shared memory never gets them.
pub(crate) fn check_transparent() -> Result<(), MemoryError> {
    match transparent_setting("shmem_enabled") {
        Some((file, setting)) if setting == "never" || setting == "deny" => {
            Err(MemoryError::NotTransparent { file, setting })
        }
        _ => Ok(()),
    }
}

/// What explains a refusal to lock `needed` bytes: the limit, if it is that.
pub(crate) fn lock_failure(needed: u64, source: io::Error) -> MemoryError {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status
        .lines()
        .find_map(|line| line.strip_prefix("VmLck:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib << 10);
    match crate::map::lock_limit() {
        Some(allowed) if held.saturating_add(needed) > allowed => {
            MemoryError::LockLimit(LockLimit { needed, allowed, held })
        }
        _ => MemoryError::Host { what: "locking", size: needed, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shortage(page: u64, pool: Option<Pool>) -> String {
        PoolShortage { page, needed: 8, pool, source: io::Error::from_raw_os_error(libc::ENOMEM) }.to_string()
    }

    #[test]
    fn a_shortage_says_how_many_are_needed_and_how_to_get_them() {
        let text = shortage(LARGE_PAGE, Some(Pool { total: 16, available: 3 }));
        assert!(
            text.contains("needs 8 huge pages of 2 MiB, and of the 16 in the host's pool 3 are free"),
            "{text}"
        );
        assert!(
            text.ends_with("echo 21 | sudo tee /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"),
            "{text}"
        );
        let text = shortage(GIGANTIC_PAGE, Some(Pool { total: 0, available: 0 }));
        assert!(
            text.contains("echo 8 | sudo tee /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"),
            "{text}"
        );
        assert!(text.contains("hugepagesz=1G"), "{text}");
        assert!(shortage(LARGE_PAGE, Some(Pool { total: 9, available: 9 })).contains("hugetlb.2MB.max"));
        assert!(
            shortage(GIGANTIC_PAGE, None)
                .contains("8 huge pages of 1 GiB, and this host has none of that size")
        );
    }

    #[test]
    fn a_lock_limit_counts_what_is_locked_already() {
        let text = LockLimit { needed: 4096, allowed: 8192, held: 4097 }.to_string();
        assert!(text.contains("locks 4096 bytes") && text.contains("may lock 8192 bytes"), "{text}");
        assert!(text.contains("ulimit -l 9,") && text.contains("CAP_IPC_LOCK"), "{text}");
    }
}
