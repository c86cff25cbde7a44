//! Re-encoding: the guest's instruction with other registers in its fields, and its memory operand at an address that a
//! register holds.

use super::asm::{Asm, Mem, Piece, R8, R9, RSI};
use super::known::Text;
use super::table::{Field, Info};

/// An instruction's bytes, taken apart.
pub(super) struct Parts<'a> {
    /// 66, F2, F3 and F0, in order.
    prefixes: [u8; 14],
    prefix_count: usize,
    rex: u8,
    vex: &'a [u8],
    opcode: &'a [u8],
    modrm: Option<u8>,
    tail: &'a [u8],
}

/// Takes an instruction of 64-bit code apart. `None`: not as expected.
pub(super) fn split<'a>(bytes: &'a [u8], info: &Info) -> Option<Parts<'a>> {
    let mut parts =
        Parts { prefixes: [0; 14], prefix_count: 0, rex: 0, vex: &[], opcode: &[], modrm: None, tail: &[] };
    let mut at = 0;
    loop {
        let byte = *bytes.get(at)?;
        match byte {
            0x67 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => parts.rex = 0,
            0x66 | 0xf0 | 0xf2 | 0xf3 => {
                *parts.prefixes.get_mut(parts.prefix_count)? = byte;
                parts.prefix_count += 1;
                parts.rex = 0;
            }
            // One that another prefix follows does not count.
            0x40..=0x4f => parts.rex = byte,
            _ => break,
        }
        at += 1;
    }
    if info.vex {
        let len = match bytes[at] {
            0xc5 => 2,
            0xc4 => 3,
            0x62 => 4,
            _ => return None,
        };
        parts.vex = bytes.get(at..at + len)?;
        at += len;
        parts.opcode = bytes.get(at..=at)?;
    } else {
        let len = match bytes.get(at..)? {
            [0x0f, 0x38 | 0x3a, ..] => 3,
            [0x0f, ..] => 2,
            _ => 1,
        };
        parts.opcode = bytes.get(at..at + len)?;
    }
    at += parts.opcode.len();
    if info.modrm {
        let modrm = *bytes.get(at)?;
        parts.modrm = Some(modrm);
        at += 1 + operand_len(modrm, bytes.get(at + 1).copied());
    }
    parts.tail = bytes.get(at..)?;
    Some(parts)
}

fn operand_len(modrm: u8, sib: Option<u8>) -> usize {
    let (kind, rm) = (modrm >> 6, modrm & 7);
    if kind == 3 {
        return 0;
    }
    let has_sib = rm == 4;
    let no_base = if has_sib { sib.unwrap_or(0) & 7 == 5 } else { rm == 5 };
    let disp = match kind {
        0 if no_base => 4,
        0 => 0,
        1 => 1,
        _ => 4,
    };
    disp + usize::from(has_sib)
}

impl Parts<'_> {
    /// Exchanges the two register operands of an instruction that exists with either as its destination: its opcode. False: it
    /// is not such.
    pub(super) fn exchange(&mut self, last: &mut u8) -> bool {
        let Some(modrm) = self.modrm.filter(|m| m >> 6 == 3) else { return false };
        if !self.vex.is_empty() || self.opcode.len() != 1 {
            return false;
        }
        match self.opcode[0] {
            0x00..=0x3f if self.opcode[0] & 4 == 0 => *last = self.opcode[0] ^ 2,
            0x88..=0x8b => *last = self.opcode[0] ^ 2,
            0x84 | 0x85 => *last = self.opcode[0],
            _ => return false,
        }
        self.modrm = Some(0xc0 | (modrm & 7) << 3 | modrm >> 3 & 7);
        self.rex = self.rex & !5 | (self.rex & 1) << 2 | self.rex >> 2 & 1;
        true
    }

    /// The operand in the ModRM byte is memory.
    pub(super) fn memory(&self) -> bool {
        self.modrm.is_some_and(|m| m >> 6 != 3)
    }

    /// Writes the instruction with what `registers` has for an operand in its field, and `mem` for its memory operand, which is
    /// `[r8]` if `high`: then a high byte register is among the operands, so there must be no REX prefix. A field of the
    /// processor stands for the register in ModRM's second field. `exchanged` is the opcode of an instruction that was
    /// [exchanged](Self::exchange).
    pub(super) fn emit(
        &self,
        asm: &mut Asm,
        info: &Info,
        high: bool,
        mem: Mem,
        exchanged: Option<u8>,
        registers: [Option<u8>; 4],
    ) {
        let (mut rex, mut modrm) = (self.rex, self.modrm.unwrap_or(0));
        // VEX in its long form, or EVEX: R, X and B inverted.
        let (mut vex, vex_len) = match *self.vex {
            [_, second] => ([0xc4, second & 0x80 | 0x61, second & 0x7f, 0], 3),
            [_, second, third] => ([0xc4, second, third, 0], 3),
            [_, second, third, fourth] => ([0x62, second, third, fourth], 4),
            _ => ([0; 4], 0),
        };
        let mut last = exchanged.unwrap_or(*self.opcode.last().unwrap_or(&0));
        let mut need_rex = false;
        for (i, field) in info.fields.iter().enumerate() {
            if *field == Field::None {
                continue;
            }
            let Some(n) = registers[i] else { continue };
            need_rex |= n > 3;
            let field = match field {
                Field::Reg if exchanged.is_some() => Field::Rm,
                Field::Rm if exchanged.is_some() => Field::Reg,
                &field => field,
            };
            match field {
                Field::None => {}
                Field::Reg => {
                    modrm = modrm & 0xc7 | (n & 7) << 3;
                    rex = rex & !4 | n >> 3 << 2;
                    vex[1] = vex[1] & 0x7f | (n >> 3 ^ 1) << 7;
                }
                Field::Rm => {
                    modrm = modrm & 0xf8 | n & 7;
                    rex = rex & !1 | n >> 3;
                    vex[1] = vex[1] & 0xdf | (n >> 3 ^ 1) << 5;
                }
                Field::Vvvv => vex[2] = vex[2] & 0x87 | (!n & 0xf) << 3,
                Field::Opcode => {
                    last = last & 0xf8 | n & 7;
                    rex = rex & !1 | n >> 3;
                }
            }
        }
        let in_home = matches!(mem, Mem::Cpu(_));
        let memory = self.memory() || in_home;
        if memory {
            // A base without REX, if there must be none: RSI, which no high byte lies in.
            if high {
                asm.mov(R9, RSI);
                asm.mov(RSI, R8);
            } else {
                let (base, index) = match mem {
                    Mem::Sum(base, index, _) => (base.unwrap_or(0), index.map_or(0, |i| i.0)),
                    Mem::At(base, _) => (base, 0),
                    Mem::Cpu(_) => (0, 0),
                };
                rex = rex & !3 | index >> 3 << 1 | base >> 3;
                vex[1] = vex[1] & !0x60 | (index >> 3 ^ 1) << 6 | (base >> 3 ^ 1) << 5;
            }
        }
        let start = asm.code.len();
        let mut head = Piece::new();
        head.byte_if(in_home, 0x65);
        if self.prefix_count == 1 {
            head.byte_if(true, self.prefixes[0]);
        } else if self.prefix_count > 1 {
            asm.bytes(&self.prefixes[..self.prefix_count]);
        }
        if self.vex.is_empty() {
            head.byte_if((rex & 0xf != 0 || self.rex != 0 || need_rex) && !high, 0x40 | rex & 0xf);
            head.bytes(&self.opcode[..self.opcode.len() - 1]);
        } else {
            head.bytes(&vex[..vex_len]);
        }
        head.byte_if(true, last);
        asm.piece(head);
        if memory {
            let (reg, mem) = (modrm >> 3 & 7, if high { Mem::At(RSI, 0) } else { mem });
            if vex_len == 4 { asm.unscaled_operand(reg, mem) } else { asm.operand(reg, mem) }
        } else if self.modrm.is_some() {
            asm.byte(modrm);
        }
        if !self.tail.is_empty() {
            asm.bytes(self.tail);
        }
        asm.one_since(start);
        if memory && high {
            asm.mov(RSI, R9);
        }
    }
}

/// An instruction none of whose registers stays in memory, with other registers in its fields where they stand elsewhere: all
/// of it but for where its memory operand is, and its immediate.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// Prefixes, then the opcode, and how many bytes each has.
    prefixes: u32,
    opcode: u32,
    prefixes_len: u8,
    opcode_len: u8,
    rex: u8,
    /// There is a REX prefix whatever its bits are.
    needs_rex: bool,
    modrm: Option<u8>,
    memory: bool,
    /// Bytes of the immediate.
    tail: u8,
}

impl Form {
    /// `bytes` are the guest's, `registers` what stands for its operands.
    pub(super) fn of(bytes: &[u8], info: &Info, registers: [Option<u8>; 4]) -> Option<Self> {
        let parts = split(bytes, info)?;
        if info.vex || parts.prefix_count > 3 {
            return None;
        }
        let (mut rex, mut modrm, mut needs_rex) = (parts.rex, parts.modrm.unwrap_or(0), parts.rex != 0);
        let (mut opcode, last) = (packed(parts.opcode), 8 * (parts.opcode.len() - 1));
        for (&field, &register) in info.fields.iter().zip(&registers) {
            let (Some(n), true) = (register, field != Field::None) else { continue };
            needs_rex |= n > 3;
            let low = n & 7;
            match field {
                Field::None | Field::Vvvv => {}
                Field::Reg => (modrm, rex) = (modrm & 0xc7 | low << 3, rex & !4 | n >> 3 << 2),
                Field::Rm => (modrm, rex) = (modrm & 0xf8 | low, rex & !1 | n >> 3),
                Field::Opcode => {
                    opcode = opcode & !(7 << last) | u32::from(low) << last;
                    rex = rex & !1 | n >> 3;
                }
            }
        }
        Some(Self {
            prefixes: packed(&parts.prefixes[..parts.prefix_count]),
            opcode,
            prefixes_len: parts.prefix_count as u8,
            opcode_len: parts.opcode.len() as u8,
            rex: rex & 0xf,
            needs_rex,
            modrm: parts.modrm.map(|_| modrm),
            memory: parts.memory(),
            tail: parts.tail.len() as u8,
        })
    }

    /// Writes the instruction whose bytes for the guest are `text`.
    pub(super) fn emit(&self, asm: &mut Asm, text: &Text, mem: Mem) {
        let start = asm.code.len();
        let mut rex = self.rex;
        if self.memory {
            let (base, index) = match mem {
                Mem::Sum(base, index, _) => (base.unwrap_or(0), index.map_or(0, |i| i.0)),
                Mem::At(base, _) => (base, 0),
                Mem::Cpu(_) => (0, 0),
            };
            rex = rex & !3 | index >> 3 << 1 | base >> 3;
        }
        let mut head = Piece::new();
        head.packed(self.prefixes, self.prefixes_len);
        head.byte_if(rex != 0 || self.needs_rex, 0x40 | rex);
        head.packed(self.opcode, self.opcode_len);
        match self.modrm {
            Some(modrm) if self.memory => {
                asm.piece(head);
                asm.operand(modrm >> 3 & 7, mem);
            }
            Some(modrm) => {
                head.byte_if(true, modrm);
                asm.piece(head);
            }
            None => asm.piece(head),
        }
        if self.tail != 0 {
            asm.piece(text.tail(usize::from(self.tail)));
        }
        asm.one_since(start);
    }
}

fn packed(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |all, &byte| all << 8 | u32::from(byte))
}
