//! The processor underneath: runs one instruction at a time, with complete state before and after, in a child process.
//!
//! The child lives in a signal handler. Returning from it loads the state of a case from the signal frame and runs the
//! instruction; whatever ends it (the breakpoint behind it, the single-step trap, or the fault it raises) enters the
//! handler again, with the state after in the signal frame. System calls are forbidden to it but for the few that it
//! needs for this.
#![expect(unsafe_code, reason = "a child process, signal frames, fixed mappings")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use super::case::{
    CODE, Case, Event, FS_BASE, GS_BASE, Outcome, Patch, State, WINDOW, WINDOW_SIZE, WRITABLE, has_avx512,
    pattern,
};

/// Cases that are handed over at a time.
pub const BATCH: usize = 512;
const PAGE: usize = 4096;
const SIGNAL_STACK: usize = 128 << 10;
/// Longest wait for a batch. A case takes microseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// What parent and child share.
#[repr(C)]
struct Channel {
    /// Batches handed over.
    posted: AtomicU32,
    /// Batches done.
    done: AtomicU32,
    /// Cases of this batch that were begun.
    begun: AtomicU32,
    count: u32,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
    pattern: [u64; WINDOW_SIZE / 8],
}

/// The child's view, for its signal handler.
static CHANNEL: AtomicPtr<Channel> = AtomicPtr::new(std::ptr::null_mut());
/// Writable view of the code page, in the child.
static CODE_VIEW: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
/// Writable view of the window, in the child.
static WINDOW_VIEW: AtomicPtr<u64> = AtomicPtr::new(std::ptr::null_mut());

/// The processor underneath.
pub struct Hardware {
    channel: NonNull<Channel>,
    child: libc::pid_t,
    posted: u32,
}

/// The child is gone or stuck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    /// Index of the case in the batch that it had begun.
    pub at: usize,
    /// The signal that ended it; `None`: it is stuck.
    pub signal: Option<i32>,
}

impl Hardware {
    /// Starts the child.
    pub fn new() -> io::Result<Self> {
        let channel = shared(size_of::<Channel>())?.cast::<Channel>();
        // SAFETY: zeroed shared memory of this size, not shared yet; all-zero bits are valid for every field.
        unsafe { (*channel.as_ptr()).pattern.copy_from_slice(&pattern()) };
        let child = spawn(channel)?;
        Ok(Self { channel, child, posted: 0 })
    }

    /// Hands over up to [`BATCH`] cases.
    pub fn post(&mut self, cases: &[Case]) {
        let cases = &cases[..cases.len().min(BATCH)];
        let channel = self.channel.as_ptr();
        // SAFETY: the child waits for `posted` to change before it looks at anything else.
        unsafe {
            (&mut (*channel).cases)[..cases.len()].copy_from_slice(cases);
            (*channel).count = cases.len() as u32;
            (*channel).begun.store(0, Ordering::SeqCst);
        }
        self.posted = self.posted.wrapping_add(1);
        // SAFETY: the field is atomic.
        let posted = unsafe { &(*channel).posted };
        posted.store(self.posted, Ordering::SeqCst);
        futex(posted, libc::FUTEX_WAKE, 1, None);
    }

    /// Waits for what was posted.
    pub fn collect(&mut self) -> Result<&[Outcome], Lost> {
        let channel = self.channel.as_ptr();
        // SAFETY: the fields are atomic.
        let (done, begun) = unsafe { (&(*channel).done, &(*channel).begun) };
        let started = std::time::Instant::now();
        loop {
            let now = done.load(Ordering::SeqCst);
            if now == self.posted {
                break;
            }
            futex(done, libc::FUTEX_WAIT, now, Some(Duration::from_millis(100)));
            let mut status = 0;
            // SAFETY: a plain system call about our own child.
            let gone = unsafe { libc::waitpid(self.child, &mut status, libc::WNOHANG) } != 0;
            if gone || started.elapsed() > PATIENCE {
                let at = begun.load(Ordering::SeqCst).saturating_sub(1) as usize;
                return Err(Lost { at, signal: gone.then_some(libc::WTERMSIG(status)) });
            }
        }
        // SAFETY: the child has written them and waits for the next post.
        let (outcomes, count) = unsafe { (&(*channel).outcomes, (*channel).count as usize) };
        Ok(&outcomes[..count.min(BATCH)])
    }

    /// Starts a new child in place of a lost one.
    pub fn restart(&mut self) -> io::Result<()> {
        self.stop();
        // SAFETY: no child is there to look.
        unsafe {
            (*self.channel.as_ptr()).posted.store(0, Ordering::SeqCst);
            (*self.channel.as_ptr()).done.store(0, Ordering::SeqCst);
        }
        self.posted = 0;
        self.child = spawn(self.channel)?;
        Ok(())
    }

    fn stop(&mut self) {
        // SAFETY: plain system calls about our own child.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
        }
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        self.stop();
        // SAFETY: mapped by `new`, and nobody else has it any more.
        unsafe { libc::munmap(self.channel.as_ptr().cast(), size_of::<Channel>()) };
    }
}

fn failed() -> io::Error {
    io::Error::last_os_error()
}

/// Zeroed memory that survives a fork as one.
fn shared(size: usize) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping at an address of the system's choice.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED).ok_or_else(failed)
}

fn futex(word: &AtomicU32, operation: i32, value: u32, timeout: Option<Duration>) {
    let time =
        timeout.map(|t| libc::timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
    let time = time.as_ref().map_or(0, |t| std::ptr::from_ref(t) as u64);
    syscall(libc::SYS_futex, [word.as_ptr() as u64, operation as u64, value.into(), time]);
}

/// A system call that touches no thread-local storage: the child has none.
fn syscall(number: i64, arguments: [u64; 4]) -> i64 {
    let result;
    // SAFETY: callers pass valid arguments of the calls they name.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") number => result, in("rdi") arguments[0], in("rsi") arguments[1],
            in("rdx") arguments[2], in("r10") arguments[3], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

fn spawn(channel: NonNull<Channel>) -> io::Result<libc::pid_t> {
    let code = memory_file(PAGE)?;
    let window = memory_file(WINDOW_SIZE)?;
    find_wide();
    // SAFETY: the child only makes calls that are allowed after a fork of a process with threads, and never returns.
    match unsafe { libc::fork() } {
        -1 => Err(failed()),
        0 => {
            let status = i32::from(live(channel, &code, &window).is_none());
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(status) }
        }
        child => Ok(child),
    }
}

fn memory_file(size: usize) -> io::Result<OwnedFd> {
    // SAFETY: plain system calls; the descriptor is new.
    unsafe {
        let fd = libc::memfd_create(c"oracle".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(failed());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        if libc::ftruncate(fd.as_raw_fd(), size as libc::off_t) != 0 {
            return Err(failed());
        }
        Ok(fd)
    }
}

/// The child: sets itself up and enters its handler, for good.
fn live(channel: NonNull<Channel>, code: &OwnedFd, window: &OwnedFd) -> Option<()> {
    use libc::{PROT_EXEC, PROT_READ, PROT_WRITE};
    // SAFETY: fresh mappings, those at fixed addresses refused if something is there; a handler of the right type;
    // system calls with valid arguments.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        CODE_VIEW.store(map(0, PAGE, PROT_READ | PROT_WRITE, code, 0)?, Ordering::SeqCst);
        WINDOW_VIEW.store(map(0, WINDOW_SIZE, PROT_READ | PROT_WRITE, window, 0)?.cast(), Ordering::SeqCst);
        map(CODE, PAGE, PROT_READ | PROT_EXEC, code, 0)?;
        map(WINDOW, WRITABLE, PROT_READ | PROT_WRITE, window, 0)?;
        map(WINDOW + WRITABLE as u64, WINDOW_SIZE - WRITABLE, PROT_READ, window, WRITABLE)?;
        CODE_VIEW.load(Ordering::SeqCst).write_bytes(0xcc, PAGE);
        let pattern = (&raw const (*channel.as_ptr()).pattern).cast::<u64>();
        WINDOW_VIEW.load(Ordering::SeqCst).copy_from_nonoverlapping(pattern, WINDOW_SIZE / 8);
        CHANNEL.store(channel.as_ptr(), Ordering::SeqCst);

        let stack = libc::stack_t {
            ss_sp: shared(SIGNAL_STACK).ok()?.as_ptr().cast(),
            ss_flags: 0,
            ss_size: SIGNAL_STACK,
        };
        if libc::sigaltstack(&stack, std::ptr::null_mut()) != 0 {
            return None;
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut action.sa_mask);
        for signal in [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGBUS, libc::SIGTRAP] {
            if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
                return None;
            }
        }
        let filter =
            allow(&[libc::SYS_rt_sigreturn, libc::SYS_futex, libc::SYS_arch_prctl, libc::SYS_exit_group]);
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        // Where filters are not to be had the child does without: cases with system calls are not generated.
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program);
        syscall(libc::SYS_arch_prctl, [ARCH_SET_GS, GS_BASE, 0, 0]);
        syscall(libc::SYS_arch_prctl, [ARCH_SET_FS, FS_BASE, 0, 0]);
        std::arch::asm!("ud2", options(noreturn));
    }
}

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;

/// A seccomp filter that kills for every system call but these.
fn allow(calls: &[i64]) -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut filter = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for &call in calls {
        let mut test = statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call as u32);
        test.jf = 1;
        filter.push(test);
        filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    }
    filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_KILL_PROCESS));
    filter
}

/// # Safety
/// A fixed address must be this child's to use.
unsafe fn map(at: u64, size: usize, protection: i32, fd: &OwnedFd, offset: usize) -> Option<*mut u8> {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    // Page faults of the system's own making would show in error codes.
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE | fixed;
    // SAFETY: the caller's promise; an occupied address is refused.
    let got =
        unsafe { libc::mmap(at as *mut _, size, protection, flags, fd.as_raw_fd(), offset as libc::off_t) };
    (got != libc::MAP_FAILED && (at == 0 || got as u64 == at)).then_some(got.cast())
}

/// Registers in a signal frame, in encoding order.
const GREGS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

const TF: u64 = 1 << 8;
/// Vectors.
const DEBUG: u64 = 1;
const BREAKPOINT: u64 = 3;
const PAGE_FAULT: u64 = 14;
/// Page-fault error code: instruction fetch.
const FETCH: u64 = 1 << 4;

/// The handler: RFLAGS.AC may come in from the case, and not everything here is aligned.
#[unsafe(naked)]
unsafe extern "C" fn on_signal(number: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    std::arch::naked_asm!("pushfq", "and dword ptr [rsp], ~0x40000", "popfq", "jmp {}", sym turn)
}

/// Ends one case and begins the next.
unsafe extern "C" fn turn(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the signal frame; channel and views were set before the first signal; the parent touches
    // cases and outcomes only between batches. Nothing here uses thread-local storage or can panic.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let channel = CHANNEL.load(Ordering::Relaxed);
        let begun = (*channel).begun.load(Ordering::Relaxed);
        let mut next = begun as usize;
        let posted = (*channel).posted.load(Ordering::Acquire);
        let busy = posted != (*channel).done.load(Ordering::Relaxed);
        if busy && next > 0 {
            finish(
                context,
                &raw mut (*channel).outcomes[(next - 1) % BATCH],
                &raw const (*channel).cases[(next - 1) % BATCH],
            );
            clean_up(
                channel,
                &raw const (*channel).cases[(next - 1) % BATCH],
                &raw mut (*channel).outcomes[(next - 1) % BATCH],
            );
        }
        if !busy || next >= (*channel).count as usize {
            if busy {
                (*channel).done.store(posted, Ordering::SeqCst);
                futex(&(*channel).done, libc::FUTEX_WAKE, 1, None);
            }
            let done = (*channel).done.load(Ordering::Relaxed);
            while (*channel).posted.load(Ordering::SeqCst) == done {
                futex(&(*channel).posted, libc::FUTEX_WAIT, done, None);
            }
            next = 0;
        }
        (*channel).begun.store(next as u32 + 1, Ordering::SeqCst);
        begin(context, &raw const (*channel).cases[next % BATCH]);
    }
}

/// Offsets in the XSAVE area of a signal frame.
const XMM: usize = 160;
const XSTATE_BV: usize = 512;
const YMM_HIGH: usize = 576;
/// Of opmask registers, upper halves of the first 16 ZMM registers and the other 16; 0: the processor has none.
static WIDE: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];

/// Finds out where the state of AVX-512 stands.
fn find_wide() {
    for (at, component) in WIDE.iter().zip(5..) {
        let place = std::arch::x86_64::__cpuid_count(0xd, component).ebx as usize;
        at.store(if has_avx512() { place } else { 0 }, Ordering::SeqCst);
    }
}

/// Where the components of AVX-512 stand.
fn wide() -> [usize; 3] {
    [WIDE[0].load(Ordering::Relaxed), WIDE[1].load(Ordering::Relaxed), WIDE[2].load(Ordering::Relaxed)]
}

/// Loads a case into the signal frame, its bytes into the code page, its patches into the window.
///
/// # Safety
/// Called from the handler.
unsafe fn begin(context: &mut libc::ucontext_t, case: *const Case) {
    // SAFETY: the handler's promises.
    unsafe {
        let state = &raw const (*case).state;
        let gregs = &mut context.uc_mcontext.gregs;
        let mut i = 0;
        while i < 16 {
            gregs[GREGS[i] as usize] = (*state).gpr[i] as i64;
            i += 1;
        }
        gregs[libc::REG_RIP as usize] = (*state).rip as i64;
        let trap = if (*case).steps { TF } else { 0 };
        gregs[libc::REG_EFL as usize] = ((*state).rflags & !TF | trap | 0x202) as i64;
        let area = context.uc_mcontext.fpregs.cast::<u8>();
        area.copy_from_nonoverlapping((&raw const (*state).x87).cast(), XMM);
        let mut n = 0;
        while n < 16 {
            let from = (&raw const (*state).vector[n]).cast::<u8>();
            area.add(XMM + 16 * n).copy_from_nonoverlapping(from, 16);
            area.add(YMM_HIGH + 16 * n).copy_from_nonoverlapping(from.add(16), 16);
            n += 1;
        }
        let [opmask, zmm_high, hi16] = wide();
        if hi16 != 0 {
            area.add(opmask).copy_from_nonoverlapping((&raw const (*state).opmask).cast(), 64);
            let mut n = 0;
            while n < 16 {
                let from = (&raw const (*state).vector[n]).cast::<u8>();
                area.add(zmm_high + 32 * n).copy_from_nonoverlapping(from.add(32), 32);
                n += 1;
            }
            area.add(hi16).copy_from_nonoverlapping((&raw const (*state).vector[16]).cast(), 1024);
        }
        let present = area.add(XSTATE_BV).cast::<u64>();
        let known = if hi16 != 0 { 0xe7 } else { 7 };
        // A component in its initial configuration is made so that the processor knows.
        present.write(present.read() & !known | (*case).inuse() & known);

        let offset = (*state).rip.wrapping_sub(CODE) as usize;
        if offset < PAGE {
            let len = ((*case).len as usize).min(PAGE - offset).min(15);
            CODE_VIEW
                .load(Ordering::Relaxed)
                .add(offset)
                .copy_from_nonoverlapping((&raw const (*case).code).cast(), len);
        }
        let window = WINDOW_VIEW.load(Ordering::Relaxed).cast::<u8>();
        let mut i = 0;
        while i < 3 {
            let patch: &Patch = &(*case).patches[i];
            let range = patch.range();
            window.add(range.start).copy_from_nonoverlapping(patch.bytes.as_ptr(), range.len());
            i += 1;
        }
    }
}

/// Reads the state after a case from the signal frame.
///
/// # Safety
/// Called from the handler.
unsafe fn finish(context: &libc::ucontext_t, outcome: *mut Outcome, case: *const Case) {
    // SAFETY: the handler's promises.
    unsafe {
        let state: &mut State = &mut (*outcome).state;
        let gregs = &context.uc_mcontext.gregs;
        let mut i = 0;
        while i < 16 {
            state.gpr[i] = gregs[GREGS[i] as usize] as u64;
            i += 1;
        }
        state.rip = gregs[libc::REG_RIP as usize] as u64;
        state.rflags = gregs[libc::REG_EFL as usize] as u64;
        let area = context.uc_mcontext.fpregs.cast::<u8>();
        let present = area.add(XSTATE_BV).cast::<u64>().read();
        (&raw mut state.x87).cast::<u8>().copy_from_nonoverlapping(area, XMM);
        if present & 1 == 0 {
            let mxcsr = state.mxcsr();
            state.x87.fill(0);
            state.x87[0] = 0x7f;
            state.x87[1] = 0x03;
            state.set_mxcsr(mxcsr);
        }
        let [opmask, zmm_high, hi16] = wide();
        (&raw mut state.vector).write_bytes(0, 1);
        (&raw mut state.opmask).write_bytes(0, 1);
        if hi16 != 0 && present >> 5 & 1 != 0 {
            (&raw mut state.opmask).cast::<u8>().copy_from_nonoverlapping(area.add(opmask), 64);
        }
        if hi16 != 0 && present >> 7 & 1 != 0 {
            (&raw mut state.vector[16]).cast::<u8>().copy_from_nonoverlapping(area.add(hi16), 1024);
        }
        let mut n = 0;
        while n < 16 {
            let to = (&raw mut state.vector[n]).cast::<u8>();
            if present & 2 != 0 {
                to.copy_from_nonoverlapping(area.add(XMM + 16 * n), 16);
            }
            if present & 4 != 0 {
                to.add(16).copy_from_nonoverlapping(area.add(YMM_HIGH + 16 * n), 16);
            }
            if hi16 != 0 && present >> 6 & 1 != 0 {
                to.add(32).copy_from_nonoverlapping(area.add(zmm_high + 32 * n), 32);
            }
            n += 1;
        }
        let vector = gregs[libc::REG_TRAPNO as usize] as u64;
        let error = gregs[libc::REG_ERR as usize] as u64;
        let cr2 = gregs[libc::REG_CR2 as usize] as u64;
        (*outcome).event = Event::NONE;
        let start = (*case).state.rip;
        if vector == DEBUG && (*case).steps {
            return;
        }
        if vector == BREAKPOINT && !(*case).steps {
            state.rip = state.rip.wrapping_sub(1);
            return;
        }
        // Behind the last byte of the page there is no breakpoint, but nothing either.
        if vector == PAGE_FAULT
            && error & FETCH != 0
            && cr2 == state.rip
            && cr2 == CODE + PAGE as u64
            && cr2 != start
        {
            return;
        }
        let (error, cr2) = match vector {
            PAGE_FAULT => (error, cr2),
            8 | 10..=13 | 17 => (error, 0),
            _ => (0, 0),
        };
        (*outcome).event = Event { vector: vector as u32, error: error as u32, cr2 };
    }
}

/// Records what became of the window, and restores it and the code page.
///
/// # Safety
/// Called from the handler.
unsafe fn clean_up(channel: *mut Channel, case: *const Case, outcome: *mut Outcome) {
    // SAFETY: the handler's promises.
    unsafe {
        let offset = (*case).state.rip.wrapping_sub(CODE) as usize;
        if offset < PAGE {
            CODE_VIEW.load(Ordering::Relaxed).add(offset).write_bytes(0xcc, 15.min(PAGE - offset));
        }
        let window = WINDOW_VIEW.load(Ordering::Relaxed);
        let pattern = (&raw const (*channel).pattern).cast::<u64>();
        let [now, before] = [window.cast_const(), pattern]
            .map(|words| std::slice::from_raw_parts(words.cast::<u8>(), WINDOW_SIZE));
        (*outcome).record(now, before);
        let changed = (*outcome).changed as usize;
        if changed > super::case::CHANGES {
            window.copy_from_nonoverlapping(pattern, WINDOW_SIZE / 8);
        } else {
            let mut i = 0;
            while i < changed {
                let at = ((*outcome).changes[i].0 / 8) as usize % (WINDOW_SIZE / 8);
                window.add(at).write(pattern.add(at).read());
                i += 1;
            }
        }
    }
}
