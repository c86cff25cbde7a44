//! What every device with registers is: windows in the I/O spaces, reads and writes, effects, time, saved state.

use serde::{Serialize, de::DeserializeOwned};

/// What a write asks of the whole machine.
#[must_use = "an effect that is dropped never happens"]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Effect {
    /// Nothing beyond the device.
    #[default]
    None,
    /// Switch the machine off (ACPI S5).
    PowerOff,
    /// Reset the whole machine: processors, chipset and devices.
    Reset,
    /// End the machine with this process status (debug-exit port).
    Exit(u8),
}

impl Effect {
    /// The first of two effects that is one: a wide write to several registers has at most one effect.
    pub fn or(self, other: Self) -> Self {
        if self == Self::None { other } else { self }
    }
}

/// One of the two I/O spaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    /// Port I/O.
    Port,
    /// Memory-mapped I/O: guest physical addresses.
    Memory,
}

/// A stretch of an I/O space that a device answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    /// Which space.
    pub space: Space,
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub length: u64,
    /// The offset under which the device knows the first byte: an access to `base + n` is offset `offset + n`.
    pub offset: u64,
}

impl Window {
    /// A window of ports.
    pub const fn ports(base: u16, length: u64, offset: u64) -> Self {
        Self { space: Space::Port, base: base as u64, length, offset }
    }

    /// A window of memory.
    pub const fn memory(base: u64, length: u64) -> Self {
        Self { space: Space::Memory, base, length, offset: 0 }
    }
}

/// The access widths that a device's registers take, in bytes: powers of two up to 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Narrowest native access. A narrower read gets its part of the register around it; a narrower write is
    /// dropped (the data sheets leave it undefined).
    pub min: u8,
    /// Widest native access. A wider one is split into pieces of this width, lowest address first.
    pub max: u8,
}

impl Access {
    /// Byte registers, as on the ISA bus: wider accesses become consecutive byte accesses.
    pub const BYTE: Self = Self { min: 1, max: 1 };
}

/// A device with registers.
///
/// The bus calls [`read`](Device::read), [`write`](Device::write) with whatever the guest did. A device implements
/// [`read_register`](Device::read_register), [`write_register`](Device::write_register), which see only naturally
/// aligned accesses of a width within [`access`](Device::access).
///
/// `now` is [`skep_hv::monotonic_ns`] and never goes back. After any call that takes `now`,
/// [`next_deadline`](Device::next_deadline) may have changed.
pub trait Device: Send {
    /// Short name for logs and errors: `uart`, `hpet`.
    fn name(&self) -> &'static str;

    /// Where the device answers.
    fn windows(&self) -> Vec<Window>;

    /// The widths that registers take.
    fn access(&self) -> Access;

    /// A native read. Offsets with no register read as the data sheet says, else as all ones.
    fn read_register(&mut self, offset: u64, width: u8, now: u64) -> u64;

    /// A native write.
    fn write_register(&mut self, offset: u64, width: u8, value: u64, now: u64) -> Effect;

    /// Back to the state after RESET#. Backends (collected output, NVRAM, the time of day) stay.
    fn reset(&mut self, now: u64);

    /// When [`advance`](Device::advance) has something to do next; `None` for never.
    fn next_deadline(&self) -> Option<u64> {
        None
    }

    /// Does what has become due by `now`.
    fn advance(&mut self, now: u64) {
        let _ = now;
    }

    /// A read of `width` bytes (1, 2, 4 or 8) at `offset`, of any alignment.
    fn read(&mut self, offset: u64, width: u8, now: u64) -> u64 {
        let access = self.access();
        if width >= access.min && width <= access.max && offset & (u64::from(width) - 1) == 0 {
            return self.read_register(offset, width, now);
        }
        let mut value = 0;
        let mut done = 0;
        while done < width {
            let piece = Piece::next(access, offset.wrapping_add(u64::from(done)), width - done);
            let register = self.read_register(piece.register, piece.width, now);
            let part = register >> (piece.skip * 8) & ones(piece.bytes);
            value |= part << (done * 8);
            done += piece.bytes;
        }
        value
    }

    /// A write of `width` bytes (1, 2, 4 or 8) at `offset`, of any alignment. Bits of `value` above `width` are
    /// ignored.
    fn write(&mut self, offset: u64, width: u8, value: u64, now: u64) -> Effect {
        let access = self.access();
        if width >= access.min && width <= access.max && offset & (u64::from(width) - 1) == 0 {
            return self.write_register(offset, width, value & ones(width), now);
        }
        let mut effect = Effect::None;
        let mut done = 0;
        while done < width {
            let piece = Piece::next(access, offset.wrapping_add(u64::from(done)), width - done);
            if piece.bytes == piece.width {
                let part = value >> (done * 8) & ones(piece.bytes);
                effect = effect.or(self.write_register(piece.register, piece.width, part, now));
            }
            done += piece.bytes;
        }
        effect
    }
}

/// The native access that serves the first bytes of an access which is not native.
struct Piece {
    /// Offset of the native access.
    register: u64,
    /// Its width in bytes.
    width: u8,
    /// Bytes of it below the ones wanted.
    skip: u8,
    /// Bytes of it that are wanted.
    bytes: u8,
}

impl Piece {
    fn next(access: Access, offset: u64, left: u8) -> Self {
        // The widest aligned native access that starts here and is wanted whole.
        let mut width = access.max;
        while width >= access.min {
            if width <= left && offset & (u64::from(width) - 1) == 0 {
                return Self { register: offset, width, skip: 0, bytes: width };
            }
            width /= 2;
        }
        // Else a part of the narrowest one.
        let skip = (offset & (u64::from(access.min) - 1)) as u8;
        Self {
            register: offset - u64::from(skip),
            width: access.min,
            skip,
            bytes: left.min(access.min - skip),
        }
    }
}

/// All ones in the low `bytes` bytes (at most 8).
pub(crate) const fn ones(bytes: u8) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (bytes * 8)) - 1 }
}

/// A device whose state can be saved and restored. Times in the state are relative to `now`, so that it can move to
/// another process or host.
pub trait Snapshot {
    /// The state, plain data.
    type State: Serialize + DeserializeOwned + Clone + PartialEq + std::fmt::Debug;

    /// The state at `now`. Does not change the device.
    fn save(&self, now: u64) -> Self::State;

    /// Takes on `state` and drives the device's interrupt lines to match. On an error nothing has changed.
    fn restore(&mut self, state: &Self::State, now: u64) -> Result<(), RestoreError>;
}

/// A state that a device cannot be in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("saved state of {device}: {what}")]
pub struct RestoreError {
    /// Name of the device.
    pub device: &'static str,
    /// What is wrong.
    pub what: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 16 bytes of registers that record how they are reached.
    struct Probe {
        access: Access,
        bytes: [u8; 32],
        log: Vec<(u64, u8)>,
    }

    impl Device for Probe {
        fn name(&self) -> &'static str {
            "probe"
        }
        fn windows(&self) -> Vec<Window> {
            vec![Window::memory(0, 16)]
        }
        fn access(&self) -> Access {
            self.access
        }
        fn read_register(&mut self, offset: u64, width: u8, _now: u64) -> u64 {
            assert_eq!(offset % u64::from(width), 0);
            assert!(width >= self.access.min && width <= self.access.max);
            self.log.push((offset, width));
            (0..width).fold(0, |v, i| v | u64::from(self.bytes[offset as usize + usize::from(i)]) << (i * 8))
        }
        fn write_register(&mut self, offset: u64, width: u8, value: u64, _now: u64) -> Effect {
            assert_eq!(offset % u64::from(width), 0);
            assert_eq!(value & !ones(width), 0);
            self.log.push((offset, width));
            for i in 0..width {
                self.bytes[offset as usize + usize::from(i)] = (value >> (i * 8)) as u8;
            }
            Effect::None
        }
        fn reset(&mut self, _now: u64) {}
    }

    fn probe(min: u8, max: u8) -> Probe {
        let bytes = std::array::from_fn(|i| i as u8);
        Probe { access: Access { min, max }, bytes, log: Vec::new() }
    }

    #[test]
    fn reads_of_every_shape_see_the_same_bytes() {
        for (min, max) in [(1, 1), (1, 4), (2, 4), (4, 4), (4, 8), (8, 8)] {
            for offset in 0..16 {
                for width in [1, 2, 4, 8] {
                    let expected = (0..width).fold(0, |v, i| v | (offset + u64::from(i)) << (i * 8));
                    assert_eq!(
                        probe(min, max).read(offset, width, 0),
                        expected,
                        "{min} {max} {offset} {width}"
                    );
                }
            }
        }
    }

    #[test]
    fn wide_accesses_split_lowest_address_first() {
        let mut p = probe(1, 1);
        assert_eq!(p.write(3, 4, 0xffff_ffff_4433_2211, 0), Effect::None);
        assert_eq!(p.log, [(3, 1), (4, 1), (5, 1), (6, 1)]);
        assert_eq!(p.bytes[2..8], [2, 0x11, 0x22, 0x33, 0x44, 7]);
        let mut p = probe(1, 4);
        let _ = p.write(6, 8, 0x8877_6655_4433_2211, 0);
        assert_eq!(p.log, [(6, 2), (8, 4), (12, 2)]);
    }

    #[test]
    fn narrow_writes_are_dropped() {
        let mut p = probe(4, 4);
        let _ = p.write(1, 2, 0xffff, 0);
        assert!(p.log.is_empty());
        let _ = p.write(2, 8, u64::MAX, 0);
        assert_eq!(p.log, [(4, 4)]);
    }

    #[test]
    fn the_first_effect_wins() {
        assert_eq!(Effect::None.or(Effect::Reset), Effect::Reset);
        assert_eq!(Effect::PowerOff.or(Effect::Reset), Effect::PowerOff);
    }
}
