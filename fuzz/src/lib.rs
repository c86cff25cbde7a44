//! What the fuzz targets share: a way to drive any device of the chipset, interrupt lines that can be looked at.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arbitrary::Arbitrary;
use skep_chipset::{Device, Snapshot};
use skep_hv::irq::{Irq, IrqLine, MsiMessage, MsiSender};

/// Something that happens to a device.
#[derive(Debug, Arbitrary)]
pub enum Step {
    /// The guest reads: a window (modulo their number), a place in it (modulo its length), log2 of the width.
    Read(u8, u16, u8),
    /// The guest writes.
    Write(u8, u16, u8, u64),
    /// Time passes, ns.
    Wait(u32),
    /// Time passes, up to the device's own deadline.
    WaitForDeadline,
    /// A long time passes, ms.
    Sleep(u32),
    /// RESET#.
    Reset,
    /// The state is saved and restored.
    Migrate,
    /// Whatever else the device's owner can do, see the target.
    Host(u8, u64),
}

/// A sequence of steps, and the time at which it starts.
#[derive(Debug, Arbitrary)]
pub struct Script {
    /// Start, ns.
    pub start: u32,
    /// What happens.
    pub steps: Vec<Step>,
}

/// Longest run of deadlines that one wait may go through: a timer in its fastest mode.
const MAX_DEADLINES: usize = 10_000;

/// Runs `script` on `device` and checks what holds for every device: reads fit their width, time that was waited for is
/// over, a restored state is the one that was saved.
pub fn drive<D: Device + Snapshot>(
    device: &mut D,
    script: &Script,
    mut host: impl FnMut(&mut D, u8, u64, u64),
) {
    let now = drive_registers(device, script, |device, step, now| match *step {
        Step::Migrate => {
            let saved = device.save(now);
            device.restore(&saved, now).expect("a state that was saved can be restored");
            assert_eq!(device.save(now), saved);
        }
        Step::Host(what, value) => host(device, what, value, now),
        _ => {}
    });
    let saved = device.save(now);
    assert_eq!(device.save(now), saved, "saving changes nothing");
}

/// As [`drive`], for a device whose state is saved elsewhere. Returns the time at the end.
pub fn drive_registers<D: Device>(
    device: &mut D,
    script: &Script,
    mut other: impl FnMut(&mut D, &Step, u64),
) -> u64 {
    let windows = device.windows();
    assert!(windows.iter().all(|window| window.length > 0));
    let place = |window: u8, at: u16| {
        let window = &windows[usize::from(window) % windows.len()];
        window.offset + u64::from(at) % window.length
    };
    let mut now = u64::from(script.start);
    for step in &script.steps {
        match *step {
            Step::Read(window, at, width) => {
                let width = 1 << (width % 4);
                let value = device.read(place(window, at), width, now);
                assert!(width == 8 || value >> (width * 8) == 0, "a read of {width} bytes gave {value:#x}");
            }
            Step::Write(window, at, width, value) => {
                let _ = device.write(place(window, at), 1 << (width % 4), value, now);
            }
            Step::Wait(ns) => {
                now += u64::from(ns);
                device.advance(now);
            }
            Step::WaitForDeadline => {
                for _ in 0..MAX_DEADLINES {
                    let Some(deadline) =
                        device.next_deadline().filter(|&deadline| deadline < now + 1_000_000_000)
                    else {
                        break;
                    };
                    now = now.max(deadline);
                    device.advance(now);
                    assert!(
                        device.next_deadline().is_none_or(|next| next > now),
                        "a deadline that has passed stays"
                    );
                }
            }
            Step::Sleep(ms) => {
                now += u64::from(ms) * 1_000_000;
                device.advance(now);
                assert!(
                    device.next_deadline().is_none_or(|next| next > now),
                    "a deadline that has passed stays"
                );
            }
            Step::Reset => device.reset(now),
            Step::Migrate | Step::Host(..) => other(device, step, now),
        }
    }
    now
}

/// A line that remembers its level.
#[derive(Debug, Default)]
pub struct Line {
    level: AtomicBool,
    changes: AtomicU64,
}

impl Line {
    /// A line, and the same as a capability.
    pub fn new() -> (Arc<Self>, Irq) {
        let line = Arc::new(Self::default());
        (line.clone(), line)
    }

    /// Its level.
    pub fn is_high(&self) -> bool {
        self.level.load(Ordering::Relaxed)
    }

    /// How often it was driven.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }
}

impl IrqLine for Line {
    fn set(&self, high: bool) {
        self.level.store(high, Ordering::Relaxed);
        self.changes.fetch_add(1, Ordering::Relaxed);
    }
}

/// A line nobody looks at.
pub fn line() -> Irq {
    Line::new().1
}

/// Takes messages and forgets them.
#[derive(Debug, Default)]
pub struct NoMessages;

impl MsiSender for NoMessages {
    fn send(&self, _message: MsiMessage) {}
}
