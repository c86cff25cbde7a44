//! The platform's one timer thread: sleeps until the first device is due. Waking a thread on another CPU costs tens of
//! microseconds, so it is woken only when a deadline moves before the one it sleeps for; one that moves back costs
//! nothing but a look when the old one passes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use skep_hv::monotonic_ns;

use crate::bus::lock;

/// What the timer thread is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Nothing: the machine stands still.
    Idle,
    /// Keep the deadlines.
    Run,
    /// End.
    Quit,
}

/// The timer thread's side of the agreement.
pub(crate) struct Timer {
    mode: Mutex<Mode>,
    changed: Condvar,
    /// What it sleeps for.
    wake_at: AtomicU64,
}

impl Default for Timer {
    fn default() -> Self {
        // Before the thread has looked at any deadline, none can be earlier.
        Self { mode: Mutex::new(Mode::Idle), changed: Condvar::new(), wake_at: AtomicU64::new(0) }
    }
}

impl Timer {
    /// Some deadline is now `deadline` and was later before.
    pub(crate) fn earlier(&self, deadline: u64) {
        if deadline < self.wake_at.load(Ordering::SeqCst) {
            // With the lock, so that it cannot fall between the thread's last look and its sleep.
            let _mode = lock(&self.mode);
            self.changed.notify_one();
        }
    }

    fn set(&self, mode: Mode) {
        let mut current = lock(&self.mode);
        if *current != Mode::Quit {
            *current = mode;
        }
        self.changed.notify_one();
    }

    /// Starts keeping deadlines.
    pub(crate) fn resume(&self) {
        self.set(Mode::Run);
    }

    /// Stops keeping them; what falls due meanwhile is done on [`Timer::resume`].
    pub(crate) fn pause(&self) {
        self.set(Mode::Idle);
    }

    /// Makes [`Timer::run`] return.
    pub(crate) fn quit(&self) {
        self.set(Mode::Quit);
    }

    /// The thread: calls `advance` whenever `next` (a deadline in [`monotonic_ns`]) has come.
    pub(crate) fn run(&self, next: impl Fn() -> u64, advance: impl Fn()) {
        let mut mode = lock(&self.mode);
        loop {
            let deadline = match *mode {
                Mode::Quit => return,
                Mode::Idle => {
                    self.wake_at.store(0, Ordering::SeqCst);
                    mode = self.changed.wait(mode).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                Mode::Run => {
                    // Announce a time first, then look: whoever moves a deadline does it in the opposite order.
                    self.wake_at.store(u64::MAX, Ordering::SeqCst);
                    let deadline = next();
                    self.wake_at.store(deadline, Ordering::SeqCst);
                    deadline
                }
            };
            let now = monotonic_ns();
            if deadline <= now {
                drop(mode);
                advance();
                mode = lock(&self.mode);
            } else if deadline == u64::MAX {
                mode = self.changed.wait(mode).unwrap_or_else(PoisonError::into_inner);
            } else {
                let sleep = Duration::from_nanos(deadline - now);
                mode = self.changed.wait_timeout(mode, sleep).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn fires_re_arms_pauses_and_quits() {
        let timer = Arc::new(Timer::default());
        let deadline = Arc::new(AtomicU64::new(u64::MAX));
        let (fired, seen) = mpsc::channel();
        let thread = std::thread::spawn({
            let (timer, deadline, due) = (timer.clone(), deadline.clone(), deadline.clone());
            move || {
                timer.run(
                    || deadline.load(Ordering::SeqCst),
                    || {
                        due.store(u64::MAX, Ordering::SeqCst);
                        fired.send(monotonic_ns()).unwrap();
                    },
                );
            }
        });
        let arm = |at| {
            deadline.store(at, Ordering::SeqCst);
            timer.earlier(at);
        };
        timer.resume();
        for delay in [0, 1_000_000, 3_000_000] {
            let at = monotonic_ns() + delay;
            arm(at);
            assert!(seen.recv().unwrap() >= at);
        }
        // An hour away, then moved to now: the sleeper is woken.
        arm(monotonic_ns() + 3_600_000_000_000);
        arm(monotonic_ns());
        seen.recv().unwrap();
        timer.pause();
        arm(monotonic_ns());
        timer.resume();
        seen.recv().unwrap();
        timer.quit();
        thread.join().unwrap();
        assert!(seen.recv().is_err());
    }
}
