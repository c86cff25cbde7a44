//! Values for registers and memory, biased to where arithmetic has corners.

use super::case::State;
use super::random::Random;

/// An integer.
pub(super) fn integer(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.pick(&[0, 1, 2, u64::MAX, u64::MAX - 1]),
        1 => random.pick(&[0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]),
        2 => random.pick(&[
            1 << 63,
            i64::MAX as u64,
            1 << 32,
            1 << 31,
            u64::MAX << 31,
            u64::MAX << 32,
            u64::MAX << 15,
        ]),
        3 => random.below(256),
        4 => 1 << random.below(64),
        5 => u64::MAX >> random.below(64),
        _ => random.next(),
    }
}

/// An IEEE single.
fn single(random: &mut Random) -> u32 {
    let sign = (random.next() as u32) & 1 << 31;
    sign | match random.below(16) {
        0 | 1 => 0,
        2 => 0x7f80_0000,
        3 => 0x7fc0_0000 | random.next() as u32 & 0x3f_ffff,
        4 => 0x7f80_0001 | random.next() as u32 & 0x3f_ffff,
        5 => random.next() as u32 & 0x7f_ffff,
        6 => random.pick(&[1, 0x7f_ffff, 0x80_0000, 0x7f7f_ffff]),
        7 | 8 => 0x3f80_0000,
        9 => random.pick(&[0x4f00_0000, 0x4eff_ffff, 0x5f00_0000, 0x5eff_ffff, 0x3f00_0000, 0x4b00_0000]),
        10..=12 => (random.next() as u32 & 0x7f_ffff) | (112 + random.below(32) as u32) << 23,
        _ => random.next() as u32 & 0x7fff_ffff,
    }
}

/// An IEEE double.
fn double(random: &mut Random) -> u64 {
    let sign = random.next() & 1 << 63;
    sign | match random.below(16) {
        0 | 1 => 0,
        2 => 0x7ff << 52,
        3 => 0xfff << 51 | random.next() >> 13,
        4 => 0x7ff << 52 | 1 | random.next() >> 13,
        5 => random.next() >> 12,
        6 => random.pick(&[
            1,
            (1 << 52) - 1,
            1 << 52,
            0x7fef_ffff_ffff_ffff,
            0x47ef_ffff_ffff_ffff,
            0x3690_0000_0000_0000,
        ]),
        7 | 8 => 0x3ff << 52,
        9 => random.pick(&[
            0x41df_ffff_ffc0_0000,
            0x43e0_0000_0000_0000,
            0x41e0_0000_0000_0000,
            0x3fe0_0000_0000_0000,
        ]),
        10..=12 => random.next() >> 12 | (1007 + random.below(64)) << 52,
        _ => random.next() >> 1,
    }
}

/// An 80-bit extended value.
fn extended(random: &mut Random) -> [u8; 10] {
    let sign = (random.next() as u16) & 1 << 15;
    let integer = 1u64 << 63;
    let (exponent, significand) = match random.below(16) {
        0 | 1 => (0, 0),
        2 => (0x7fff, integer),
        3 => (0x7fff, integer | 1 << 62 | random.next() >> 2),
        4 => (0x7fff, integer | 1 | random.next() >> 2),
        5 => (0, random.next() >> 1),
        6 => (0, integer | random.next() >> 1),
        7 => (random.next() as u16 & 0x7fff, random.next() >> 1),
        8 | 9 => (0x3fff, integer),
        10 => (0x4000, 0xc90f_daa2_2168_c235),
        11..=13 => (0x3fff - 32 + random.below(80) as u16, integer | random.next()),
        14 => (
            random.pick(&[1, 0x7ffe, 0x3fff + 62, 0x3fff + 63, 0x3fff - 64, 0x4000 + 1022, 0x4000 + 126]),
            integer | random.next(),
        ),
        _ => (random.next() as u16 & 0x7fff, random.next()),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&(sign | exponent).to_le_bytes());
    bytes
}

/// Fills bytes with values of one kind.
pub(super) fn fill(random: &mut Random, bytes: &mut [u8]) {
    let kind = random.below(5);
    for chunk in bytes.chunks_mut(16) {
        let mut value = [0; 16];
        match kind {
            0 => {
                for lane in value.chunks_mut(4) {
                    lane.copy_from_slice(&single(random).to_le_bytes());
                }
            }
            1 => {
                for lane in value.chunks_mut(8) {
                    lane.copy_from_slice(&double(random).to_le_bytes());
                }
            }
            2 => value[..10].copy_from_slice(&extended(random)),
            3 => {
                for lane in value.chunks_mut(8) {
                    lane.copy_from_slice(&integer(random).to_le_bytes());
                }
            }
            _ => {
                for lane in value.chunks_mut(2) {
                    lane.copy_from_slice(
                        &(random.pick(&[0u64, 1, 0x7fff, 0x8000, 0xffff, 0x80, 0x7f, random.clone().next()])
                            as u16)
                            .to_le_bytes(),
                    );
                    random.next();
                }
            }
        }
        let len = chunk.len();
        chunk.copy_from_slice(&value[..len]);
    }
}

/// Vector registers.
pub(super) fn vectors(random: &mut Random, state: &mut State) {
    for register in &mut state.vector {
        let mut bytes = [0; 64];
        fill(random, &mut bytes);
        for (word, from) in register.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = from.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        }
        if random.one_in(8) {
            *register = [0; 8];
        }
    }
    if random.one_in(8) {
        let other = state.vector[0];
        state.vector[1 + random.below(31) as usize] = other;
    }
    for register in &mut state.opmask {
        *register = match random.below(8) {
            0 => u64::MAX,
            1 => 0,
            2 => integer(random),
            3 => u64::MAX << random.below(64),
            _ => random.next(),
        };
    }
}

/// An MXCSR.
pub(super) fn mxcsr(random: &mut Random) -> u32 {
    match random.below(8) {
        0..=3 => 0x1f80,
        4 => 0x1f80 | random.next() as u32 & 0xe07f,
        5 => 0x1f80 | random.next() as u32 & 0x3f,
        _ => random.next() as u32 & 0xffff,
    }
}

/// The x87 state.
pub(super) fn x87(random: &mut Random, state: &mut State) {
    let fcw = if random.one_in(2) { 0x37f } else { random.next() as u16 & 0x1f3f | 0x40 };
    let top = if random.one_in(2) { 0 } else { random.below(8) as u16 };
    let mut fsw = top << 11 | random.next() as u16 & 0x4700;
    if random.one_in(3) {
        fsw |= random.next() as u16 & 0x7f;
    } else {
        fsw |= random.next() as u16 & 0x7f & fcw & 0x3f;
    }
    if random.one_in(3) {
        // A pending exception is rare enough.
        fsw &= !(!fcw & 0x3f);
    }
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    let tags = random.pick(&[0xffu8, 0xff, 0xff, 0, 0x80, random.clone().next() as u8]);
    random.next();
    state.x87[..2].copy_from_slice(&fcw.to_le_bytes());
    state.x87[2..4].copy_from_slice(&fsw.to_le_bytes());
    state.x87[4] = tags;
    if random.one_in(4) {
        let fop = random.next() as u16 & 0x7ff;
        state.x87[6..8].copy_from_slice(&fop.to_le_bytes());
        let pointers = [random.next() & 0x7fff_ffff_ffff, random.next() & 0x7fff_ffff_ffff];
        state.x87[8..16].copy_from_slice(&pointers[0].to_le_bytes());
        state.x87[16..24].copy_from_slice(&pointers[1].to_le_bytes());
    }
    for register in state.x87[32..].chunks_exact_mut(16) {
        register[..10].copy_from_slice(&extended(random));
    }
}
