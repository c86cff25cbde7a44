//! Getting a vCPU out of KVM_RUN, without losing a kick and without stopping for nothing.
//!
//! Who kicks leaves a note first ([`Kicker::notes`]), then sets `immediate_exit` in the page that KVM shares with us, and
//! if the vCPU's thread is in KVM_RUN or about to be, sends it a signal that does nothing but interrupt. The vCPU clears
//! `immediate_exit` before it looks at the notes: a note that it does not see was left later, and then KVM_RUN returns at
//! once.
#![expect(unsafe_code, reason = "signals, timers and the byte that is shared with the kernel")]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use skep_hv::Kick;

/// Bits of [`Kicker::notes`].
pub(crate) mod note {
    /// Leave the guest.
    pub(crate) const KICK: u32 = 1;
    /// Look at interrupts.
    pub(crate) const WAKE: u32 = 2;
    /// Come out once, so that the kernel writes down what it remembers of written pages.
    pub(crate) const FLUSH: u32 = 4;
}

/// The signal that interrupts KVM_RUN.
fn signal() -> io::Result<i32> {
    static SIGNAL: OnceLock<Result<i32, i32>> = OnceLock::new();
    let chosen = SIGNAL.get_or_init(|| take_signal().map_err(|error| error.raw_os_error().unwrap_or(0)));
    chosen.map_err(io::Error::from_raw_os_error)
}

extern "C" fn nothing(_: libc::c_int) {}

/// Takes the first real-time signal that nobody in this process has a handler for. Whoever embeds us may use some.
fn take_signal() -> io::Result<i32> {
    for signal in libc::SIGRTMIN() + 4..=libc::SIGRTMAX() {
        // SAFETY: all zeros is a valid value of this plain C structure.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: asks only; the pointer leads to a live structure.
        if unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if action.sa_sigaction != libc::SIG_DFL {
            continue;
        }
        // Without SA_RESTART, so that KVM_RUN is interrupted.
        action.sa_sigaction = nothing as *const () as usize;
        // SAFETY: the handler does nothing, so it is safe at any time on any thread.
        if unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        return Ok(signal);
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// Where a vCPU runs now.
struct Seat {
    thread: libc::pid_t,
    /// `kvm_run.immediate_exit`.
    immediate_exit: NonNull<AtomicU8>,
}

// SAFETY: the pointer is used only while the seat is taken, with its lock held, and the page outlives that.
unsafe impl Send for Seat {}

/// Stops or wakes one vCPU from any thread.
pub(crate) struct Kicker {
    notes: AtomicU32,
    /// The thread is in KVM_RUN, or on its way there.
    inside: AtomicBool,
    /// How often it has come out of KVM_RUN.
    rounds: AtomicU64,
    seat: Mutex<Option<Seat>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kicker {
    pub(crate) fn new() -> Self {
        let (notes, inside, rounds) = (AtomicU32::new(0), AtomicBool::new(false), AtomicU64::new(0));
        Self { notes, inside, rounds, seat: Mutex::new(None) }
    }

    /// Leaves a note and gets the vCPU to look at it.
    pub(crate) fn post(&self, notes: u32) {
        self.notes.fetch_or(notes, Ordering::SeqCst);
        let seat = lock(&self.seat);
        let Some(seat) = &*seat else { return };
        // SAFETY: while the seat is taken, its vCPU, and with it the page, lives.
        unsafe { seat.immediate_exit.as_ref() }.store(1, Ordering::SeqCst);
        if self.inside.load(Ordering::SeqCst)
            && let Ok(signal) = signal()
        {
            // SAFETY: the thread is of this process and cannot end while the seat is taken; the signal's handler does
            // nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), seat.thread, signal) };
        }
    }

    /// Whether the vCPU is in the guest or about to be.
    pub(crate) fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }

    /// How often the vCPU has come out of the guest.
    pub(crate) fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::SeqCst)
    }

    fn note_taken(&self) -> u32 {
        self.notes.swap(0, Ordering::SeqCst)
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        self.post(note::KICK);
    }

    fn wake(&self) {
        self.post(note::WAKE);
    }
}

/// A vCPU's stay in its run loop, on this thread.
pub(crate) struct Stay<'a> {
    kicker: &'a Kicker,
    immediate_exit: NonNull<AtomicU8>,
}

impl<'a> Stay<'a> {
    /// Takes the seat. `vcpu` must outlive the stay.
    pub(crate) fn begin(kicker: &'a Kicker, vcpu: &mut VcpuFd) -> io::Result<Self> {
        let signal = signal()?;
        unblock(signal)?;
        let page: *mut kvm_run = vcpu.get_kvm_run();
        // SAFETY: the page is mapped, so the field's address is not null and valid; bytes can be atomic.
        let immediate_exit =
            unsafe { NonNull::new_unchecked((&raw mut (*page).immediate_exit).cast::<AtomicU8>()) };
        // SAFETY: takes no argument.
        let thread = unsafe { libc::syscall(libc::SYS_gettid) } as libc::pid_t;
        *lock(&kicker.seat) = Some(Seat { thread, immediate_exit });
        Ok(Self { kicker, immediate_exit })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped as long as the vCPU's descriptor lives, which outlives the stay.
        unsafe { self.immediate_exit.as_ref() }
    }

    /// Reads the notes and announces that KVM_RUN follows. What is posted from now on interrupts it.
    pub(crate) fn enter(&self) -> u32 {
        self.kicker.inside.store(true, Ordering::SeqCst);
        self.immediate_exit().store(0, Ordering::SeqCst);
        self.kicker.note_taken()
    }

    /// KVM_RUN is over, or is not going to be.
    pub(crate) fn leave(&self) {
        self.kicker.inside.store(false, Ordering::SeqCst);
        self.kicker.rounds.fetch_add(1, Ordering::SeqCst);
    }

    /// Makes the next KVM_RUN do no more than end what the last one has begun.
    pub(crate) fn finish_only(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        self.leave();
        *lock(&self.kicker.seat) = None;
        self.immediate_exit().store(0, Ordering::SeqCst);
    }
}

/// Lets `signal` through to this thread; threads may begin with everything blocked.
fn unblock(signal: i32) -> io::Result<()> {
    // SAFETY: the set is a plain C structure that sigemptyset initializes, and the mask is this thread's own.
    let result = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Interrupts a thread's KVM_RUN at intervals: a vCPU that halts for good stays in the kernel, and only looking tells.
pub(crate) struct Tick(libc::timer_t);

// SAFETY: a timer's name is a number to the kernel, which any thread may use.
unsafe impl Send for Tick {}

impl Tick {
    /// For the thread that calls, not yet ticking.
    pub(crate) fn new() -> io::Result<Self> {
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: all zeros is a valid value of this plain C structure.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal()?;
        // SAFETY: takes no argument.
        event.sigev_notify_thread_id = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
        // SAFETY: both pointers lead to live values.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(timer))
    }

    /// Ticks from now on; zero stops.
    pub(crate) fn every(&self, interval: Duration) {
        let time =
            libc::timespec { tv_sec: interval.as_secs() as i64, tv_nsec: interval.subsec_nanos().into() };
        let setting = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: the timer is ours, and the pointer leads to a live value.
        unsafe { libc::timer_settime(self.0, 0, &setting, std::ptr::null_mut()) };
    }
}

impl Drop for Tick {
    fn drop(&mut self) {
        // SAFETY: the timer is ours.
        unsafe { libc::timer_delete(self.0) };
    }
}
