//! How many bytes frequent instructions have, found in less time than decoding them takes.

use super::known::LONGEST;

/// What follows an opcode, by bits. Zero: no opcode that is known here.
const KNOWN: u8 = 0x40;
const MODRM: u8 = 0x10;
/// An immediate as long as the operand, but of four bytes at most unless [`BYTES`] are set too.
const FULL: u8 = 0x20;
/// With ModRM: the immediate is there only if its register field is 0 or 1. Without: the immediate says where control goes.
const SPECIAL: u8 = 0x80;
/// Bytes of another immediate.
const BYTES: u8 = 0x0f;
/// These stand in front of an opcode.
const PREFIX: u8 = 1;
const REX: u8 = 2;

/// Opcodes of one byte.
const ONE: [u8; 256] = {
    let mut all = [0; 256];
    let mut i = 0;
    while i < 256 {
        all[i] = match i as u8 {
            0x66 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x3e | 0x64 | 0x65 => PREFIX,
            0x00..=0x3f => match i & 7 {
                0..=3 => KNOWN | MODRM,
                4 => KNOWN | 1,
                5 => KNOWN | FULL,
                _ => 0,
            },
            0x40..=0x4f => REX,
            0x50..=0x5f | 0x90..=0x99 | 0xa4..=0xa7 | 0xaa..=0xaf | 0xc3 | 0xc9 | 0xcc => KNOWN,
            0x63 | 0x84..=0x8e | 0xd0..=0xd3 | 0xd8..=0xdf | 0xfe | 0xff => KNOWN | MODRM,
            0xa9 => KNOWN | FULL,
            0x69 | 0x81 | 0xc7 => KNOWN | MODRM | FULL,
            0x6a | 0xa8 | 0xb0..=0xb7 => KNOWN | 1,
            0x70..=0x7f | 0xeb => KNOWN | SPECIAL | 1,
            0x6b | 0x80 | 0x83 | 0xc0 | 0xc1 | 0xc6 => KNOWN | MODRM | 1,
            0xb8..=0xbf => KNOWN | FULL | 8,
            0xe8 | 0xe9 => KNOWN | SPECIAL | 4,
            0xc2 => KNOWN | 2,
            0xf6 => KNOWN | MODRM | SPECIAL | 1,
            0xf7 => KNOWN | MODRM | SPECIAL | FULL,
            _ => 0,
        };
        i += 1;
    }
    all
};

/// Opcodes of two bytes, by the second.
const TWO: [u8; 256] = {
    let mut all = [0; 256];
    let mut i = 0;
    while i < 256 {
        all[i] = match i as u8 {
            0x10..=0x1f | 0x28..=0x2f | 0x40..=0x6f | 0x74..=0x76 | 0x7c..=0x7f | 0x90..=0x9f => {
                KNOWN | MODRM
            }
            0xa3 | 0xa5 | 0xab | 0xad..=0xb9 | 0xbb..=0xc1 | 0xc3 | 0xc7 | 0xd0..=0xfe => KNOWN | MODRM,
            0x70..=0x73 | 0xa4 | 0xac | 0xba | 0xc2 | 0xc4..=0xc6 => KNOWN | MODRM | 1,
            0x80..=0x8f => KNOWN | SPECIAL | 4,
            0x05 | 0x77 | 0xa2 | 0xc8..=0xcf => KNOWN,
            _ => 0,
        };
        i += 1;
    }
    all
};

/// Bytes of displacement that a ModRM byte makes follow, and whether there is a SIB byte, whose base may make it more.
const OPERAND: [u8; 256] = {
    let mut all = [0; 256];
    let mut i = 0;
    while i < 256 {
        let sib = if i & 7 == 4 { SIB } else { 0 };
        all[i] = match i >> 6 {
            0 if i & 7 == 5 => 4,
            0 => sib,
            1 => 1 | sib,
            2 => 4 | sib,
            _ => 0,
        };
        i += 1;
    }
    all
};
const SIB: u8 = 0x80;

/// What was found of an instruction.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) len: usize,
    /// Bytes in front of a displacement and of an immediate.
    pub(super) head: usize,
    /// Bytes of displacement.
    pub(super) displacement: usize,
    /// It is added to the address of what follows, for an operand in memory.
    pub(super) relative: bool,
    /// An immediate of one or two bytes.
    pub(super) immediate: u16,
}

/// The layout of the instruction of 64-bit code that `bytes` begin with, if it is one of those. Whether it is valid has not been
/// looked at.
#[inline(always)]
pub(super) fn of(bytes: &[u8; LONGEST]) -> Option<Layout> {
    let byte = |at: usize| bytes[at % LONGEST];
    let (mut at, mut short, mut wide) = (0, false, false);
    let mut kind = ONE[usize::from(byte(0))];
    while kind == PREFIX {
        short |= byte(at) == 0x66;
        at += 1;
        kind = ONE[usize::from(byte(at))];
        if at > 3 {
            return None;
        }
    }
    if kind == REX {
        wide = byte(at) & 8 != 0;
        at += 1;
        kind = ONE[usize::from(byte(at))];
    }
    at += 1;
    if kind & KNOWN == 0 {
        (kind, at) = match (byte(at - 1), byte(at)) {
            (0x0f, 0x38) => (KNOWN | MODRM, at + 2),
            (0x0f, 0x3a) => (KNOWN | MODRM | 1, at + 2),
            (0x0f, second) => (TWO[usize::from(second)], at + 1),
            // VEX.
            (0xc5, _) => (TWO[usize::from(byte(at + 1))], at + 2),
            (0xc4, map) => match map & 0x1f {
                1 => (TWO[usize::from(byte(at + 2))], at + 3),
                2 => (KNOWN | MODRM, at + 3),
                3 => (KNOWN | MODRM | 1, at + 3),
                _ => return None,
            },
            _ => return None,
        };
        if kind & KNOWN == 0 {
            return None;
        }
    }
    let (mut displacement, mut relative) = (0, false);
    let mut immediate = usize::from(kind & BYTES);
    let mut head = at;
    if kind & MODRM != 0 {
        let modrm = byte(at);
        let operand = OPERAND[usize::from(modrm)];
        displacement = usize::from(operand & BYTES);
        relative = modrm & 0xc7 == 5;
        head += 1;
        if operand & SIB != 0 {
            head += 1;
            if modrm >> 6 == 0 && byte(at + 1) & 7 == 5 {
                displacement = 4;
            }
        }
        if kind & SPECIAL != 0 && modrm >> 3 & 7 > 1 {
            return Some(Layout { len: head + displacement, head, displacement, relative, immediate: 0 });
        }
    } else if kind & SPECIAL != 0 {
        // Where control goes. What 66 means here differs.
        (displacement, immediate) = (immediate, 0);
        if short {
            return None;
        }
    }
    if kind & FULL != 0 {
        immediate = match (wide, short) {
            (true, _) if kind & MODRM == 0 && kind & BYTES != 0 => 8,
            (false, true) => 2,
            _ => 4,
        };
    }
    let behind = head + displacement;
    let len = behind + immediate;
    let immediate = match immediate {
        1 => u16::from(byte(behind)),
        2 => u16::from_le_bytes([byte(behind), byte(behind + 1)]),
        _ => 0,
    };
    (len < LONGEST).then_some(Layout { len, head, displacement, relative, immediate })
}
