//! Port and memory-mapped I/O dispatch. Every device sits behind its own lock, so vCPUs that talk to different devices
//! do not wait for each other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use skep_chipset::{Device, Effect, Space, Window};
use skep_hv::monotonic_ns;

use crate::harness::Doorbells;
use crate::timer::Timer;

/// A device on the buses.
pub(crate) struct Slot {
    /// [`Device::name`], with a number where there are several.
    pub(crate) name: String,
    /// When [`Device::advance`] is due, `u64::MAX` for never. Written with the device's lock held.
    deadline: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    device: Arc<Mutex<dyn Device>>,
}

/// Counters of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceStats {
    /// Its name.
    pub name: String,
    /// Register reads by vCPUs.
    pub reads: u64,
    /// Register writes by vCPUs.
    pub writes: u64,
}

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// What the device asks for.
    pub(crate) effect: Effect,
    /// The device's place in [`Bus::slots`].
    pub(crate) slot: usize,
}

#[derive(Clone, Copy)]
struct Entry {
    base: u64,
    /// Last address.
    last: u64,
    offset: u64,
    slot: usize,
}

/// All devices of a machine by address.
pub(crate) struct Bus {
    slots: Vec<Slot>,
    /// One more than the place in `port_entries`, by port; 0 for none.
    ports: Box<[u8]>,
    port_entries: Vec<Entry>,
    /// Sorted by `base`, disjoint.
    memory: Vec<Entry>,
    timer: Arc<Timer>,
    doorbells: Arc<Doorbells>,
}

/// Locks a device. A panic with the lock held is a defect that has been reported already; the data are plain.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// Puts `devices` on the buses. Fails with a description if two windows overlap.
    pub(crate) fn new(
        devices: Vec<(String, Arc<Mutex<dyn Device>>)>,
        timer: Arc<Timer>,
        doorbells: Arc<Doorbells>,
    ) -> Result<Self, String> {
        let mut bus = Self {
            slots: Vec::with_capacity(devices.len()),
            ports: vec![0; 1 << 16].into_boxed_slice(),
            port_entries: Vec::new(),
            memory: Vec::new(),
            timer,
            doorbells,
        };
        for (name, device) in devices {
            let slot = bus.slots.len();
            for window in lock(&device).windows() {
                bus.map(slot, window).map_err(|why| format!("window {window:x?} of {name} {why}"))?;
            }
            let (deadline, reads, writes) = (AtomicU64::new(u64::MAX), AtomicU64::new(0), AtomicU64::new(0));
            bus.slots.push(Slot { name, deadline, reads, writes, device });
        }
        bus.memory.sort_by_key(|entry| entry.base);
        if bus.memory.windows(2).any(|pair| pair[1].base <= pair[0].last) {
            return Err("two devices share a memory address".into());
        }
        Ok(bus)
    }

    fn map(&mut self, slot: usize, window: Window) -> Result<(), &'static str> {
        let last = window.length.checked_sub(1).and_then(|n| window.base.checked_add(n));
        let last = last.ok_or("is empty or wraps")?;
        let entry = Entry { base: window.base, last, offset: window.offset, slot };
        match window.space {
            Space::Memory => self.memory.push(entry),
            Space::Port => {
                self.port_entries.push(entry);
                let number = u8::try_from(self.port_entries.len()).map_err(|_| "is one too many")?;
                let ports = self
                    .ports
                    .get_mut(window.base as usize..=last as usize)
                    .ok_or("leaves the port space")?;
                if ports.iter().any(|&n| n != 0) {
                    return Err("overlaps another device's");
                }
                ports.fill(number);
            }
        }
        Ok(())
    }

    /// The devices.
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Counters of every device.
    pub(crate) fn stats(&self) -> Vec<DeviceStats> {
        let stats = |slot: &Slot| DeviceStats {
            name: slot.name.clone(),
            reads: slot.reads.load(Ordering::Relaxed),
            writes: slot.writes.load(Ordering::Relaxed),
        };
        self.slots.iter().map(stats).collect()
    }

    fn find(&self, space: Space, address: u64) -> Option<&Entry> {
        match space {
            Space::Port => {
                let number = usize::from(*self.ports.get(address as usize)?);
                self.port_entries.get(number.checked_sub(1)?)
            }
            Space::Memory => {
                let at = self.memory.partition_point(|entry| entry.base <= address);
                self.memory[..at].last().filter(|entry| address <= entry.last)
            }
        }
    }

    /// A read of `width` bytes (1, 2, 4, 8). What no device claims reads as ones. Bits above `width` are zero.
    pub(crate) fn read(&self, space: Space, address: u64, width: u8) -> u64 {
        match self.find(space, address) {
            Some(entry) if entry.last - address >= u64::from(width) - 1 => {
                self.read_entry(entry, address, width)
            }
            None if width == 1 => 0xff,
            // Nothing at the first byte, or the device's window ends inside the access: each byte on its own.
            found => (0..width).fold(0, |value, i| {
                let at = address.wrapping_add(u64::from(i));
                let byte = match found.filter(|entry| at <= entry.last).or_else(|| self.find(space, at)) {
                    Some(entry) => self.read_entry(entry, at, 1) & 0xff,
                    None => 0xff,
                };
                value | byte << (i * 8)
            }),
        }
    }

    fn read_entry(&self, entry: &Entry, address: u64, width: u8) -> u64 {
        let slot = &self.slots[entry.slot];
        slot.reads.fetch_add(1, Ordering::Relaxed);
        let mut device = lock(&slot.device);
        let value = device.read(entry.offset.wrapping_add(address - entry.base), width, monotonic_ns());
        self.rearm(slot, &*device);
        value
    }

    /// A write of `width` bytes (1, 2, 4, 8). What no device claims is lost.
    pub(crate) fn write(&self, space: Space, address: u64, width: u8, value: u64) -> Outcome {
        let mut outcome = Outcome { effect: Effect::None, slot: 0 };
        if self.doorbells.ring(space, address, width, value) {
            return outcome;
        }
        match self.find(space, address) {
            Some(entry) if entry.last - address >= u64::from(width) - 1 => {
                self.write_entry(entry, address, width, value)
            }
            None if width == 1 => outcome,
            _ => {
                for i in 0..width {
                    let at = address.wrapping_add(u64::from(i));
                    let Some(entry) = self.find(space, at) else { continue };
                    let piece = self.write_entry(entry, at, 1, value >> (i * 8) & 0xff);
                    if outcome.effect == Effect::None {
                        outcome = piece;
                    }
                }
                outcome
            }
        }
    }

    fn write_entry(&self, entry: &Entry, address: u64, width: u8, value: u64) -> Outcome {
        let slot = &self.slots[entry.slot];
        slot.writes.fetch_add(1, Ordering::Relaxed);
        let mut device = lock(&slot.device);
        let offset = entry.offset.wrapping_add(address - entry.base);
        let effect = device.write(offset, width, value, monotonic_ns());
        self.rearm(slot, &*device);
        Outcome { effect, slot: entry.slot }
    }

    /// Takes note of a device's deadline after a call into it, with its lock held.
    fn rearm(&self, slot: &Slot, device: &dyn Device) {
        let deadline = device.next_deadline().unwrap_or(u64::MAX);
        if slot.deadline.swap(deadline, Ordering::SeqCst) > deadline {
            self.timer.earlier(deadline);
        }
    }

    /// Runs `f` on a device outside of a vCPU's access.
    pub(crate) fn with<D: Device, R>(&self, device: &Mutex<D>, f: impl FnOnce(&mut D, u64) -> R) -> R {
        let mut guard = lock(device);
        let result = f(&mut guard, monotonic_ns());
        let place = std::ptr::from_ref(device).cast::<()>();
        if let Some(slot) = self.slots.iter().find(|slot| Arc::as_ptr(&slot.device).cast::<()>() == place) {
            self.rearm(slot, &*guard);
        }
        result
    }

    /// When the first device is due.
    pub(crate) fn next_deadline(&self) -> u64 {
        self.slots.iter().map(|slot| slot.deadline.load(Ordering::SeqCst)).min().unwrap_or(u64::MAX)
    }

    /// Advances every device that is due by now.
    pub(crate) fn advance(&self) {
        for slot in &self.slots {
            let now = monotonic_ns();
            if slot.deadline.load(Ordering::SeqCst) <= now {
                let mut device = lock(&slot.device);
                device.advance(now);
                self.rearm(slot, &*device);
            }
        }
    }

    /// Resets every device.
    pub(crate) fn reset(&self) {
        for slot in &self.slots {
            let mut device = lock(&slot.device);
            device.reset(monotonic_ns());
            self.rearm(slot, &*device);
        }
    }
}

#[cfg(test)]
mod tests {
    use skep_chipset::Access;

    use super::*;

    /// Eight byte registers that count up, at a window each for two halves, and a deadline that is what was written.
    struct Scratch {
        windows: Vec<Window>,
        bytes: [u8; 8],
        deadline: Option<u64>,
        advanced: Option<u64>,
    }

    impl Scratch {
        fn at(windows: Vec<Window>) -> Arc<Mutex<Self>> {
            let bytes = [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17];
            Arc::new(Mutex::new(Self { windows, bytes, deadline: None, advanced: None }))
        }
    }

    impl Device for Scratch {
        fn name(&self) -> &'static str {
            "scratch"
        }
        fn windows(&self) -> Vec<Window> {
            self.windows.clone()
        }
        fn access(&self) -> Access {
            Access::BYTE
        }
        fn read_register(&mut self, offset: u64, _width: u8, _now: u64) -> u64 {
            self.bytes[offset as usize].into()
        }
        fn write_register(&mut self, offset: u64, _width: u8, value: u64, now: u64) -> Effect {
            self.bytes[offset as usize] = value as u8;
            self.deadline = Some(now);
            if value == 0xee { Effect::Exit(3) } else { Effect::None }
        }
        fn reset(&mut self, _now: u64) {
            self.bytes = [0; 8];
            self.deadline = None;
        }
        fn next_deadline(&self) -> Option<u64> {
            self.deadline
        }
        fn advance(&mut self, now: u64) {
            self.advanced = Some(now);
            self.deadline = None;
        }
    }

    fn bus(devices: Vec<Arc<Mutex<Scratch>>>) -> Result<Bus, String> {
        let devices = devices.into_iter().map(|d| ("scratch".to_owned(), d as Arc<Mutex<dyn Device>>));
        Bus::new(devices.collect(), Arc::new(Timer::default()), Doorbells::new(None))
    }

    #[test]
    fn accesses_find_their_window_and_holes_read_as_ones() {
        let a = Scratch::at(vec![Window::ports(0x60, 1, 0), Window::ports(0x64, 1, 4)]);
        let b = Scratch::at(vec![Window::ports(0x61, 2, 1), Window::memory(0x1000, 8)]);
        let bus = bus(vec![a, b]).unwrap();
        assert_eq!(bus.read(Space::Port, 0x60, 4), 0xff12_1110, "three windows and a hole");
        assert_eq!(bus.read(Space::Port, 0x64, 1), 0x14);
        assert_eq!(bus.read(Space::Port, 0x5e, 4), 0x1110_ffff);
        assert_eq!(bus.read(Space::Port, 0xffff, 4), 0xffff_ffff);
        assert_eq!(bus.read(Space::Memory, 0x1000, 8), 0x1716_1514_1312_1110);
        assert_eq!(bus.read(Space::Memory, 0x1004, 8), 0xffff_ffff_1716_1514);
        assert_eq!(bus.read(Space::Memory, u64::MAX, 8), u64::MAX);
        assert_eq!(bus.read(Space::Memory, 0xfff, 1), 0xff);
        let outcome = bus.write(Space::Memory, 0x1006, 4, 0xee_eeee);
        assert_eq!(outcome, Outcome { effect: Effect::Exit(3), slot: 1 });
        assert_eq!(bus.write(Space::Memory, 0x2000, 8, 0).effect, Effect::None);
        assert!(bus.stats()[1].reads > 0);
    }

    #[test]
    fn overlaps_are_refused() {
        let a = || Scratch::at(vec![Window::memory(0x1000, 8)]);
        assert!(bus(vec![a(), a()]).is_err());
        let p = || Scratch::at(vec![Window::ports(0x1000, 8, 0)]);
        assert!(bus(vec![p(), p()]).is_err());
        assert!(bus(vec![Scratch::at(vec![Window::ports(0xffff, 2, 0)])]).is_err());
        assert!(bus(vec![Scratch::at(vec![Window::memory(u64::MAX, 2)])]).is_err());
        assert!(bus(vec![Scratch::at(vec![Window::memory(0, 0)])]).is_err());
    }

    #[test]
    fn deadlines_follow_every_access() {
        let a = Scratch::at(vec![Window::memory(0, 8)]);
        let bus = bus(vec![a.clone()]).unwrap();
        assert_eq!(bus.next_deadline(), u64::MAX);
        let _ = bus.write(Space::Memory, 0, 1, 1);
        assert!(bus.next_deadline() <= monotonic_ns());
        bus.advance();
        assert!(lock(&a).advanced.is_some());
        assert_eq!(bus.next_deadline(), u64::MAX);
        let _ = bus.write(Space::Memory, 0, 1, 1);
        bus.reset();
        assert_eq!(bus.next_deadline(), u64::MAX);
        bus.with(&a, |device, now| device.deadline = Some(now + 5));
        assert_ne!(bus.next_deadline(), u64::MAX);
    }
}
