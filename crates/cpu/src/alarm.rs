//! Wakes vCPUs that execute when their local APIC has something to do: translated code looks at its mailbox and at no clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use skep_hv::{Kick, monotonic_ns};

use crate::vm::Mailbox;

/// No deadline.
const NEVER: u64 = u64::MAX;

/// The alarm clock of a VM. Its thread starts with the first deadline and ends with this value.
pub(crate) struct Alarm(Arc<Clock>);

struct Clock {
    mailboxes: Arc<[Arc<Mailbox>]>,
    /// When each vCPU wants to be woken, monotonic ns.
    deadlines: Box<[AtomicU64]>,
    /// What the thread sleeps for; [`NEVER`] also if there is none.
    next: AtomicU64,
    thread: Mutex<Thread>,
    bell: Condvar,
}

struct Thread {
    handle: Option<JoinHandle<()>>,
    quit: bool,
}

impl Alarm {
    /// For the vCPUs that these mailboxes belong to.
    pub(crate) fn new(mailboxes: Arc<[Arc<Mailbox>]>) -> Self {
        Self(Arc::new(Clock {
            deadlines: mailboxes.iter().map(|_| AtomicU64::new(NEVER)).collect(),
            mailboxes,
            next: AtomicU64::new(NEVER),
            thread: Mutex::new(Thread { handle: None, quit: false }),
            bell: Condvar::new(),
        }))
    }

    /// Has a vCPU woken at `deadline` (monotonic ns) instead of when it wanted before; all ones is never. Once it was woken
    /// it must ask again.
    #[inline]
    pub(crate) fn set(&self, vcpu: u32, deadline: u64) {
        let Some(at) = self.0.deadlines.get(vcpu as usize) else { return };
        if at.load(Ordering::Relaxed) != deadline {
            // Either the thread sees this before it sleeps, or we see what it sleeps for.
            at.store(deadline, Ordering::SeqCst);
            if deadline < self.0.next.load(Ordering::SeqCst) {
                self.hurry();
            }
        }
    }

    /// The thread sleeps too long, or is not there yet.
    #[cold]
    fn hurry(&self) {
        let mut thread = self.0.lock();
        if thread.handle.is_none() {
            let clock = self.0.clone();
            // If the host has no thread to give, the next deadline tries again.
            thread.handle =
                std::thread::Builder::new().name("skep-alarm".into()).spawn(move || clock.run()).ok();
        } else {
            self.0.bell.notify_one();
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        let handle = {
            let mut thread = self.0.lock();
            thread.quit = true;
            self.0.bell.notify_one();
            thread.handle.take()
        };
        if let Some(handle) = handle {
            // It could only have panicked; there is nobody left to tell.
            let _ = handle.join();
        }
    }
}

impl Clock {
    fn lock(&self) -> MutexGuard<'_, Thread> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut thread = self.lock();
        while !thread.quit {
            self.ring();
            let next = self.earliest();
            self.next.store(next, Ordering::SeqCst);
            // Somebody may have set an earlier one before we said what we sleep for.
            let now = monotonic_ns();
            if self.earliest() < next || next <= now {
                continue;
            }
            thread = if next == NEVER {
                self.bell.wait(thread).unwrap_or_else(PoisonError::into_inner)
            } else {
                let nap = Duration::from_nanos(next - now);
                self.bell.wait_timeout(thread, nap).unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    fn earliest(&self) -> u64 {
        self.deadlines.iter().map(|d| d.load(Ordering::SeqCst)).min().unwrap_or(NEVER)
    }

    /// Wakes those whose time has come.
    fn ring(&self) {
        let now = monotonic_ns();
        for (deadline, mailbox) in self.deadlines.iter().zip(&*self.mailboxes) {
            let due = deadline.load(Ordering::SeqCst);
            let reached = due <= now
                && deadline.compare_exchange(due, NEVER, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            if reached {
                mailbox.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::vm::mail;

    const MS: u64 = 1_000_000;

    fn alarm(vcpus: usize) -> (Alarm, Arc<[Arc<Mailbox>]>) {
        let mailboxes: Arc<[_]> = (0..vcpus).map(|_| Arc::new(Mailbox::new())).collect();
        (Alarm::new(mailboxes.clone()), mailboxes)
    }

    fn rung(mailbox: &Mailbox) -> bool {
        mailbox.attention.load(Ordering::SeqCst) & mail::WAKE != 0
    }

    /// When it rang, or `None` if it did not for a while.
    fn when(mailbox: &Mailbox) -> Option<u64> {
        let start = Instant::now();
        while !rung(mailbox) {
            if start.elapsed() > Duration::from_secs(2) {
                return None;
            }
            std::thread::yield_now();
        }
        mailbox.attention.store(0, Ordering::SeqCst);
        Some(monotonic_ns())
    }

    #[test]
    fn it_rings_at_the_deadline_and_not_before() {
        let (alarm, mailboxes) = alarm(2);
        for nap in [5 * MS, 0, MS, 20 * MS] {
            let deadline = monotonic_ns() + nap;
            // A far deadline, then an earlier one that must wake the thread.
            alarm.set(0, deadline + 3_600_000 * MS);
            alarm.set(1, deadline);
            alarm.set(1, deadline);
            let late = when(&mailboxes[1]).expect("it rings") as i64 - deadline as i64;
            assert!(late >= 0);
            assert!(late < 500 * MS as i64, "{late} ns late on a busy host");
        }
        assert!(!rung(&mailboxes[0]));
    }

    #[test]
    fn it_can_be_put_off_and_cancelled() {
        let (alarm, mailboxes) = alarm(1);
        let start = monotonic_ns();
        alarm.set(0, start + 20 * MS);
        alarm.set(0, NEVER);
        std::thread::sleep(Duration::from_millis(40));
        assert!(!rung(&mailboxes[0]));
        alarm.set(0, start + 80 * MS);
        alarm.set(0, start + 120 * MS);
        assert!(when(&mailboxes[0]).expect("it rings") >= start + 120 * MS);
    }

    #[test]
    fn every_deadline_rings_however_they_race() {
        let (alarm, mailboxes) = alarm(3);
        std::thread::scope(|s| {
            for (vcpu, mailbox) in mailboxes.iter().enumerate() {
                let alarm = &alarm;
                s.spawn(move || {
                    for i in 0..300u64 {
                        let deadline = monotonic_ns() + i * 37 % 50 * 1000;
                        alarm.set(vcpu as u32, deadline);
                        assert!(when(mailbox).expect("it rings") >= deadline);
                    }
                });
            }
        });
    }

    #[test]
    fn its_thread_ends_with_it() {
        let (alarm, mailboxes) = alarm(1);
        let clock = Arc::downgrade(&alarm.0);
        assert!(alarm.0.lock().handle.is_none(), "nothing was set");
        alarm.set(0, NEVER);
        assert!(alarm.0.lock().handle.is_none(), "nor was this");
        alarm.set(0, monotonic_ns() + 3_600_000 * MS);
        drop(alarm);
        assert!(clock.upgrade().is_none());
        assert_eq!(Arc::strong_count(&mailboxes), 1);
    }
}
