//! What backs guest memory, as the kernel sees it. Parts that this host does not allow are skipped, and say so.
#![expect(unsafe_code, reason = "capabilities and limits are set by system calls")]

use std::fs;
use std::io;
use std::path::Path;

use skep_memory::{
    Backing, GuestMemory, LARGE_PAGE, MemoryError, PAGE_SIZE, PageSize, Pool, RegionKind, RegionSpec,
};

const RESERVE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

const SHARED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const ANONYMOUS: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// What a machine of 8 MiB with a ROM has.
fn regions() -> Vec<RegionSpec> {
    let ram = |start, size| RegionSpec { start, size, kind: RegionKind::Ram };
    let rom = RegionSpec { start: 0xffff_0000, size: 0x1_0000, kind: RegionKind::Rom };
    vec![ram(0, 0xa_0000), ram(0xc_0000, 0x74_0000), rom]
}

/// The sum of a field of `/proc/self/smaps`, in bytes, over the mappings of these regions.
fn smaps(memory: &GuestMemory, field: &str) -> u64 {
    let bases: Vec<u64> = memory.regions().map(|r| r.host.addr().get() as u64).collect();
    let (mut ours, mut sum) = (false, 0);
    for line in fs::read_to_string("/proc/self/smaps").expect("smaps").lines() {
        let (head, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some((from, to)) = head.split_once('-') {
            let number = |text| u64::from_str_radix(text, 16).expect("an address");
            let range = number(from)..number(to);
            ours = bases.iter().any(|base| range.contains(base));
        } else if ours && head.strip_suffix(':') == Some(field) {
            let kib = rest.trim().strip_suffix(" kB").expect("a size");
            sum += kib.parse::<u64>().expect("a number") << 10;
        }
    }
    sum
}

fn kernel_page(memory: &GuestMemory) -> u64 {
    smaps(memory, "KernelPageSize")
}

/// Every region can be used to its last byte, and zeroing zeroes exactly what it is asked to.
fn works(memory: &GuestMemory) {
    for r in memory.regions() {
        assert_eq!(r.start % LARGE_PAGE, r.host.addr().get() as u64 % LARGE_PAGE);
        memory.load_rom(r.start, &vec![0xa5; r.size as usize]).expect("all of it is memory");
    }
    let (from, len) = (0x1f_f800, 0x20_1000);
    memory.zero(from, len).expect("memory");
    let mut back = vec![0; (len + 2 * PAGE_SIZE) as usize];
    memory.read(from - PAGE_SIZE, &mut back).expect("memory");
    let (before, rest) = back.split_at(PAGE_SIZE as usize);
    let (zeroed, after) = rest.split_at(len as usize);
    assert!(before.iter().chain(after).all(|&byte| byte == 0xa5), "what lies beside it stays");
    assert!(zeroed.iter().all(|&byte| byte == 0));
    assert_eq!(memory.read_u8(0xffff_ffff).expect("the ROM"), 0xa5);
}

#[test]
fn small_pages_are_taken_when_touched_and_given_back_when_zeroed() {
    let memory = GuestMemory::new(&regions()).expect("8 MiB");
    assert_eq!(smaps(&memory, "Rss"), 0);
    works(&memory);
    let total: u64 = memory.regions().map(|r| r.size).sum();
    // The two pages at the edges keep what was beside the zeroed range. Reading has mapped the rest again.
    memory.zero(0x20_0000, 0x20_0000).expect("memory");
    assert_eq!(smaps(&memory, "Rss"), total - 0x20_0000);
}

/// One test, since what it changes (settings of the host, a limit of the process) is shared.
#[test]
fn huge_pages_and_wiring() {
    // A setting of the whole host is changed only for somebody who asks for it.
    let changed = std::env::var_os("SKEP_TEST_HOST").and_then(|_| Setting::change(SHARED, "advise"));
    transparent_huge_pages();
    wired();
    drop(changed);
    transparent_huge_pages();
    huge_pages();
    lock_limit();
}

/// A setting of the host that is put back when this goes.
struct Setting {
    file: &'static str,
    before: String,
}

impl Setting {
    fn change(file: &'static str, value: &str) -> Option<Self> {
        let text = fs::read_to_string(file).ok()?;
        let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(word, _)| word);
        let before = chosen.unwrap_or(text.trim()).to_owned();
        fs::write(file, value).ok()?;
        Some(Self { file, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.file, &self.before) {
            eprintln!("{} stays changed, it was {}: {error}", self.file, self.before);
        }
    }
}

fn transparent_huge_pages() {
    let backing = Backing { pages: PageSize::Transparent, ..Backing::default() };
    let memory = match GuestMemory::with_backing(&regions(), backing) {
        Err(error @ MemoryError::NotTransparent { .. }) => {
            let text = error.to_string();
            assert!(text.contains("echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/"), "{text}");
            let file = fs::read_to_string(SHARED).unwrap_or_default();
            assert!(!file.contains("[advise]"), "{text}, and not {file}");
            eprintln!("skipped: {text}");
            return;
        }
        other => other.expect("8 MiB"),
    };
    memory.write_u8(0x20_0000, 1).expect("memory");
    assert_eq!(smaps(&memory, "Rss"), LARGE_PAGE, "one touch brings 2 MiB");
    assert_eq!(smaps(&memory, "ShmemPmdMapped"), LARGE_PAGE);
    works(&memory);
}

#[test]
fn automatic_pages_are_never_refused() {
    for private in [false, true] {
        let backing = Backing { pages: PageSize::Automatic, private, ..Backing::default() };
        let memory = GuestMemory::with_backing(&regions(), backing).expect("8 MiB");
        works(&memory);
    }
}

#[test]
fn private_memory_gets_the_huge_pages_of_anonymous_memory() {
    let setting = fs::read_to_string(ANONYMOUS).unwrap_or_else(|_| "[never]".into());
    if setting.contains("[never]") {
        eprintln!("skipped: {ANONYMOUS} says {setting}");
        return;
    }
    for pages in [PageSize::Automatic, PageSize::Transparent] {
        let backing = Backing { pages, private: true, ..Backing::default() };
        let memory = GuestMemory::with_backing(&regions(), backing).expect("8 MiB");
        assert!(memory.file().is_none());
        assert_eq!(smaps(&memory, "Rss"), 0);
        memory.write_u8(0x20_0000, 1).expect("memory");
        let huge = smaps(&memory, "AnonHugePages");
        assert_eq!(
            smaps(&memory, "Rss"),
            huge.max(PAGE_SIZE),
            "one touch brings 2 MiB, if there is a free one"
        );
        works(&memory);
        let total: u64 = memory.regions().map(|r| r.size).sum();
        memory.zero(0x20_0000, 0x20_0000).expect("memory");
        assert!(smaps(&memory, "Rss") <= total.next_multiple_of(LARGE_PAGE), "zeroing gives back");
        let page = |gpa| memory.page(gpa).expect("memory").index;
        assert!(memory.side_by_side(page(0x10_0000), page(0x10_1000)).is_ok(), "neighbours");
        let apart = memory.side_by_side(page(0x10_0000), page(0x30_0000));
        assert_eq!(apart.err().map(|e| e.kind()), Some(io::ErrorKind::Unsupported));
    }
    let small = Backing { private: true, ..Backing::default() };
    let memory = GuestMemory::with_backing(&regions(), small).expect("8 MiB");
    assert!(memory.file().is_some(), "private is leave, not an order");
}

fn huge_pages() {
    let backing = Backing { pages: PageSize::Huge2M, wired: true, private: true };
    let Some(before) = Pool::of(LARGE_PAGE) else {
        let error = GuestMemory::with_backing(&regions(), backing).expect_err("there is no pool");
        assert!(error.to_string().contains("none of that size"), "{error}");
        eprintln!("skipped: {error}");
        return;
    };
    // More than any host has: refused, and nothing is taken.
    let large = RegionSpec { start: 0, size: 1 << 46, kind: RegionKind::Ram };
    let error = GuestMemory::with_backing(&[large], backing).expect_err("64 TiB");
    let text = error.to_string();
    assert!(text.contains("needs 33554432 huge pages of 2 MiB") && text.contains(RESERVE), "{text}");
    assert_eq!(Pool::of(LARGE_PAGE), Some(before));

    // 4 pages of RAM, and one for the ROM.
    let more = 5u64.saturating_sub(before.available);
    let _changed = (more > 0).then(|| Setting::change(RESERVE, &(before.total + more).to_string()));
    let pool = Pool::of(LARGE_PAGE).expect("a pool");
    if pool.available < 5 {
        eprintln!("skipped: {RESERVE} gives no 5 free pages");
        return;
    }
    let memory = GuestMemory::with_backing(&regions(), backing).expect("5 huge pages");
    assert_eq!(kernel_page(&memory), LARGE_PAGE);
    assert_eq!(Pool::of(LARGE_PAGE).expect("a pool").available, pool.available - 5, "all taken at once");
    assert_eq!(memory.file().expect("a memfd").metadata().expect("its size").len(), 5 * LARGE_PAGE);
    works(&memory);
    memory.zero(0x20_0000, 0x20_0000).expect("memory");
    assert_eq!(Pool::of(LARGE_PAGE).expect("a pool").available, pool.available - 5, "none is given back");
    drop(memory);
    assert_eq!(Pool::of(LARGE_PAGE), Some(pool), "all are given back");
}

fn wired() {
    let total: u64 = regions().iter().map(|r| r.size).sum();
    let shared = [PageSize::Small, PageSize::Automatic, PageSize::Transparent].map(|pages| (pages, false));
    for (pages, private) in shared.into_iter().chain([(PageSize::Automatic, true)]) {
        let memory = match GuestMemory::with_backing(&regions(), Backing { pages, wired: true, private }) {
            Err(error @ (MemoryError::LockLimit(_) | MemoryError::NotTransparent { .. })) => {
                eprintln!("skipped: {error}");
                continue;
            }
            other => other.expect("8 MiB"),
        };
        assert_eq!(smaps(&memory, "Locked"), total, "{pages:?}");
        let taken = smaps(&memory, "Rss");
        assert_eq!(taken, total, "{pages:?}");
        works(&memory);
        assert_eq!(smaps(&memory, "Rss"), taken, "zeroing gives no wired page back");
    }
    assert!(locked() < total, "nothing stays locked");
}

/// Bytes that this process has locked.
fn locked() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("VmLck");
    line.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok()).expect("a size") << 10
}

/// Somebody without privileges and with a limit is told of both.
fn lock_limit() {
    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: libc::RLIM_INFINITY };
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointers are to live structures of the types that the calls take.
    let set = unsafe {
        libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut old);
        let limit = libc::rlimit { rlim_max: old.rlim_max, rlim_cur: limit.rlim_cur.min(old.rlim_max) };
        libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit)
    };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
    let refused = std::thread::spawn(|| {
        drop_capabilities();
        GuestMemory::with_backing(&regions(), Backing { wired: true, ..Backing::default() })
    });
    let error = refused.join().expect("no panic").expect_err("beyond the limit");
    // SAFETY: as above.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const old) };
    let needed: u64 = regions().iter().map(|r| r.size).sum();
    let MemoryError::LockLimit(limit) = error else { panic!("{error}") };
    assert_eq!((limit.needed, limit.held), (needed, locked()));
    assert!(limit.allowed <= 1 << 20);
    let text = limit.to_string();
    assert!(text.contains(&format!("ulimit -l {}", (needed + limit.held).div_ceil(1024))), "{text}");
}

/// Takes every capability from this thread.
fn drop_capabilities() {
    #[repr(C)]
    struct Header(u32, i32);
    // _LINUX_CAPABILITY_VERSION_3, and this thread.
    let header = Header(0x2008_0522, 0);
    let none = [[0u32; 3]; 2];
    // SAFETY: header and data have the layout that version 3 of the call takes.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const none) };
    assert_eq!(rc, 0, "{}", io::Error::last_os_error());
}

#[test]
fn a_host_without_gigantic_pages_says_so() {
    let backing = Backing { pages: PageSize::Huge1G, ..Backing::default() };
    let available = Pool::of(1 << 30).map(|pool| pool.available);
    match GuestMemory::with_backing(&regions(), backing) {
        Ok(memory) => {
            assert!(available > Some(0), "there were none");
            assert_eq!(kernel_page(&memory), 1 << 30);
            works(&memory);
        }
        Err(error) => {
            assert!(available < Some(1), "there are {available:?}: {error}");
            let known = Path::new("/sys/kernel/mm/hugepages/hugepages-1048576kB").exists();
            assert!(
                error.to_string().contains(if known { "echo 1 " } else { "none of that size" }),
                "{error}"
            );
        }
    }
}
