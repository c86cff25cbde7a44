//! Machine code, as far as the translator writes it itself: everything else is the guest's own, re-encoded.

/// Numbers of general registers.
pub(super) const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
pub(super) const RDX: u8 = 2;
pub(super) const RBX: u8 = 3;
pub(super) const RSP: u8 = 4;
pub(super) const RBP: u8 = 5;
pub(super) const RSI: u8 = 6;
pub(super) const RDI: u8 = 7;
pub(super) const R8: u8 = 8;
pub(super) const R9: u8 = 9;
pub(super) const R10: u8 = 10;
pub(super) const R11: u8 = 11;
pub(super) const R15: u8 = 15;

/// Conditions, by encoding.
pub(super) const BELOW: u8 = 2;
pub(super) const EQUAL: u8 = 4;
pub(super) const NOT_EQUAL: u8 = 5;
pub(super) const ABOVE: u8 = 7;

/// Bytes that processors keep decoded together.
const LINE: usize = 32;
/// Instructions of 1, 2, 3 and so on bytes that do nothing.
const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// A memory operand.
#[derive(Debug, Clone, Copy)]
pub(super) enum Mem {
    /// A field of the processor, which GS points to.
    Cpu(i32),
    /// Register and displacement.
    At(u8, i32),
    /// Base, index and log2 of its scale, displacement.
    Sum(Option<u8>, Option<(u8, u8)>, i32),
}

/// Up to eight bytes of an instruction.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    bytes: u64,
    len: usize,
}

impl Piece {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self { bytes: 0, len: 0 }
    }

    #[inline(always)]
    pub(super) fn byte_if(&mut self, there: bool, byte: u8) {
        self.bytes |= if there { u64::from(byte) << (8 * self.len) } else { 0 };
        self.len += usize::from(there);
    }

    #[inline(always)]
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.byte_if(true, byte);
        }
    }

    /// Bytes that are in one number already.
    #[inline(always)]
    pub(super) fn packed(&mut self, bytes: u32, len: u8) {
        self.bytes |= u64::from(bytes) << (8 * self.len);
        self.len += usize::from(len);
    }

    /// Some of the low bytes of a number.
    #[inline(always)]
    pub(super) fn of(bytes: u64, len: usize) -> Self {
        Self { bytes, len }
    }
}

/// Code that will stand at a known address.
pub(super) struct Asm {
    /// The code so far.
    pub(super) code: Vec<u8>,
    /// Where its first byte will be executed.
    pub(super) origin: u64,
    /// Offsets of the last instruction, which a conditional jump may be fused with: its first byte, and what follows it.
    last: (usize, usize),
    /// Jumps are kept off the ends of lines.
    aligns: bool,
}

/// A forward jump that awaits its target: where its 32-bit displacement ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Forward(pub(super) usize);

impl Asm {
    pub(super) fn new(origin: u64) -> Self {
        Self::within(Vec::with_capacity(1024), origin)
    }

    /// The same, with room for it.
    pub(super) fn within(mut room: Vec<u8>, origin: u64) -> Self {
        room.clear();
        Self { code: room, origin, last: (0, 0), aligns: true }
    }

    /// Code that seldom runs.
    pub(super) fn aside(room: Vec<u8>, origin: u64) -> Self {
        Self { aligns: false, ..Self::within(room, origin) }
    }

    pub(super) fn here(&self) -> u64 {
        self.origin + self.code.len() as u64
    }

    #[inline(always)]
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    #[inline(always)]
    pub(super) fn byte(&mut self, byte: u8) {
        self.code.push(byte);
    }

    #[inline(always)]
    pub(super) fn imm32(&mut self, value: u32) {
        self.code.extend_from_slice(&value.to_le_bytes());
    }

    /// The first of 16 bytes, by one store.
    #[inline(always)]
    pub(super) fn first_of(&mut self, bytes: &[u8; 16], len: usize) {
        let end = self.code.len() + len;
        self.code.extend_from_slice(bytes);
        self.code.truncate(end);
    }

    /// One store for all of it: bytes behind its end do no harm.
    #[inline(always)]
    pub(super) fn piece(&mut self, piece: Piece) {
        let end = self.code.len() + piece.len;
        self.code.extend_from_slice(&piece.bytes.to_le_bytes());
        self.code.truncate(end);
    }

    /// The same for two, of which the first has from one to seven bytes.
    #[inline(always)]
    fn pieces(&mut self, first: Piece, second: Piece) {
        let bits = 8 * first.len;
        let low = first.bytes | second.bytes << bits;
        let all = u128::from(second.bytes >> (64 - bits)) << 64 | u128::from(low);
        let end = self.code.len() + first.len + second.len;
        self.code.extend_from_slice(&all.to_le_bytes());
        self.code.truncate(end);
    }

    /// An instruction on a register and memory: prefixes, REX, opcode, ModRM, SIB, displacement.
    #[inline(always)]
    pub(super) fn mem(&mut self, prefix: &[u8], wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        let (base, index) = match mem {
            Mem::Cpu(_) => (None, None),
            Mem::At(base, _) => (Some(base), None),
            Mem::Sum(base, index, _) => (base, index),
        };
        let start = self.code.len();
        let mut head = Piece::new();
        head.byte_if(matches!(mem, Mem::Cpu(_)), 0x65);
        head.bytes(prefix);
        let high = |r: Option<u8>| r.map_or(0, |r| r >> 3);
        let rex = u8::from(wide) << 3 | reg >> 3 << 2 | high(index.map(|i| i.0)) << 1 | high(base);
        head.byte_if(rex != 0, 0x40 | rex);
        head.bytes(opcode);
        self.pieces(head, Self::operand_at(reg, mem, true));
        self.one_since(start);
    }

    /// ModRM, SIB and displacement.
    #[inline(always)]
    pub(super) fn operand(&mut self, reg: u8, mem: Mem) {
        self.piece(Self::operand_at(reg, mem, true));
    }

    /// The same for EVEX-encoded instructions, which take a displacement of one byte for a multiple.
    pub(super) fn unscaled_operand(&mut self, reg: u8, mem: Mem) {
        self.piece(Self::operand_at(reg, mem, false));
    }

    #[inline(always)]
    fn operand_at(reg: u8, mem: Mem, short: bool) -> Piece {
        let reg = (reg & 7) << 3;
        let (base, index, disp) = match mem {
            Mem::Cpu(disp) => (None, None, disp),
            Mem::At(base, disp) => (Some(base), None, disp),
            Mem::Sum(base, index, disp) => (base, index, disp),
        };
        let has_sib = index.is_some() || base.is_none_or(|base| base & 7 == 4);
        let (index, scale) = index.unwrap_or((RSP, 0));
        let (kind, disp_len) = match (base, disp) {
            (None, _) => (0, 4),
            (Some(base), 0) if base & 7 != 5 => (0, 0),
            (_, -128..=127) if short => (0x40, 1),
            _ => (0x80, 4),
        };
        let base = base.unwrap_or(5) & 7;
        let mut piece = Piece::new();
        piece.byte_if(true, kind | reg | if has_sib { 4 } else { base });
        piece.byte_if(has_sib, scale << 6 | (index & 7) << 3 | base);
        piece.bytes |= u64::from(disp as u32) << (8 * piece.len);
        piece.len += disp_len;
        piece
    }

    /// A 64-bit instruction on a register and memory near by.
    pub(super) fn near(&mut self, opcode: u8, reg: u8, address: u64) {
        self.bytes(&[0x48 | reg >> 3 << 2, opcode, (reg & 7) << 3 | 5]);
        self.relative(address);
    }

    /// An instruction on two registers.
    #[inline(always)]
    pub(super) fn regs(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        let start = self.code.len();
        let rex = u8::from(wide) << 3 | reg >> 3 << 2 | rm >> 3;
        let mut piece = Piece::new();
        piece.byte_if(rex != 0, 0x40 | rex);
        piece.bytes(opcode);
        piece.byte_if(true, 0xc0 | (reg & 7) << 3 | rm & 7);
        self.piece(piece);
        self.one_since(start);
    }

    #[inline(always)]
    pub(super) fn load(&mut self, reg: u8, mem: Mem) {
        self.mem(&[], true, &[0x8b], reg, mem);
    }

    #[inline(always)]
    pub(super) fn load32(&mut self, reg: u8, mem: Mem) {
        self.mem(&[], false, &[0x8b], reg, mem);
    }

    #[inline(always)]
    pub(super) fn store(&mut self, mem: Mem, reg: u8) {
        self.mem(&[], true, &[0x89], reg, mem);
    }

    #[inline(always)]
    pub(super) fn lea(&mut self, reg: u8, mem: Mem) {
        self.mem(&[], true, &[0x8d], reg, mem);
    }

    #[inline(always)]
    pub(super) fn mov(&mut self, to: u8, from: u8) {
        self.regs(true, &[0x89], from, to);
    }

    /// Zero-extends.
    pub(super) fn mov_imm32(&mut self, reg: u8, value: u32) {
        let mut piece = Piece::new();
        piece.byte_if(reg > 7, 0x41);
        piece.byte_if(true, 0xb8 | reg & 7);
        piece.bytes |= u64::from(value) << (8 * piece.len);
        piece.len += 4;
        self.piece(piece);
    }

    pub(super) fn mov_imm(&mut self, reg: u8, value: u64) {
        if let Ok(small) = u32::try_from(value) {
            self.mov_imm32(reg, small);
        } else if let Ok(small) = i32::try_from(value as i64) {
            self.bytes(&[0x48 | reg >> 3, 0xc7, 0xc0 | reg & 7]);
            self.imm32(small as u32);
        } else {
            self.bytes(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
            self.bytes(&value.to_le_bytes());
        }
    }

    /// Adds a constant to R8. R9 may be lost; flags stay.
    pub(super) fn add_to_r8(&mut self, value: i64) {
        if let Ok(disp) = i32::try_from(value) {
            self.lea(R8, Mem::At(R8, disp));
        } else {
            self.mov_imm(R9, value as u64);
            self.lea(R8, Mem::Sum(Some(R8), Some((R9, 0)), 0));
        }
    }

    /// Adds the offset of a jump's target to R8, in `small` code at 32 bits. R9 may be lost; flags stay.
    pub(super) fn add_target_to_r8(&mut self, target: i64, small: bool) {
        if small {
            self.lea32(R8, Mem::At(R8, target as i32));
        } else {
            self.add_to_r8(target);
        }
    }

    /// AND, sign-extended immediate.
    #[inline(always)]
    pub(super) fn and_imm(&mut self, wide: bool, reg: u8, value: i32) {
        let rex = 0x40 | u8::from(wide) << 3 | reg >> 3;
        let (opcode, len) = if i8::try_from(value).is_ok() { (0x83, 1) } else { (0x81, 4) };
        let mut piece = Piece::new();
        piece.byte_if(rex != 0x40, rex);
        piece.bytes(&[opcode, 0xe0 | reg & 7]);
        piece.bytes |= u64::from(value as u32) << (8 * piece.len);
        piece.len += len;
        self.piece(piece);
    }

    /// SHR of the low 32 bits.
    pub(super) fn shr32(&mut self, reg: u8, by: u8) {
        if reg > 7 {
            self.byte(0x41);
        }
        self.bytes(&[0xc1, 0xe8 | reg & 7, by]);
    }

    /// CMP of a byte in memory with an immediate.
    pub(super) fn cmp_byte(&mut self, mem: Mem, value: u8) {
        self.mem(&[], false, &[0x80], 7, mem);
        self.byte(value);
    }

    /// TEST of a byte in memory.
    pub(super) fn test_byte(&mut self, mem: Mem, value: u8) {
        self.mem(&[], false, &[0xf6], 0, mem);
        self.byte(value);
    }

    /// CMP of 32 bits in memory with a small immediate.
    pub(super) fn cmp_dword(&mut self, mem: Mem, value: u8) {
        self.mem(&[], false, &[0x83], 7, mem);
        self.byte(value);
    }

    pub(super) fn push(&mut self, reg: u8) {
        if reg > 7 {
            self.byte(0x41);
        }
        self.byte(0x50 | reg & 7);
    }

    pub(super) fn pop(&mut self, reg: u8) {
        if reg > 7 {
            self.byte(0x41);
        }
        self.byte(0x58 | reg & 7);
    }

    pub(super) fn ret(&mut self) {
        self.keep_off_line_ends(1, false);
        self.byte(0xc3);
    }

    fn relative(&mut self, target: u64) {
        let next = self.here() + 4;
        self.imm32(target.wrapping_sub(next) as u32);
    }

    /// A jump or call whose opcode has one byte.
    #[inline(always)]
    fn transfer(&mut self, opcode: u8, target: u64) {
        self.keep_off_line_ends(5, false);
        let distance = target.wrapping_sub(self.here() + 5) as u32;
        self.piece(Piece { bytes: u64::from(distance) << 8 | u64::from(opcode), len: 5 });
    }

    pub(super) fn jmp(&mut self, target: u64) {
        self.transfer(0xe9, target);
    }

    pub(super) fn call(&mut self, target: u64) {
        self.transfer(0xe8, target);
    }

    /// What comes next may be jumped to.
    pub(super) fn label(&mut self) -> usize {
        self.last = (0, 0);
        self.code.len()
    }

    /// What was written since `start` is one instruction.
    pub(super) fn one_since(&mut self, start: usize) {
        self.last = (start, self.code.len());
    }

    /// Keeps a jump of `len` bytes off the ends of lines, with the comparison in front of it if it is conditional: processors
    /// with the erratum SKX102 decode such lines anew each time.
    #[inline(always)]
    fn keep_off_line_ends(&mut self, len: usize, conditional: bool) {
        if !self.aligns {
            return;
        }
        let here = self.code.len();
        let at = if conditional && self.last.1 == here { self.last.0 } else { here };
        let start = (self.origin as usize + at) % LINE;
        let all = here - at + len;
        if start + all >= LINE && all < LINE {
            self.fill(at, LINE - start);
        }
    }

    /// Puts `count` bytes of instructions that do nothing, at most a line of them, in front of the last instruction, which
    /// begins at `at`.
    #[inline(never)]
    fn fill(&mut self, at: usize, count: usize) {
        let here = self.code.len();
        self.code.extend_from_slice(&[0; LINE]);
        self.code.truncate(here + count);
        self.code.copy_within(at..here, at + count);
        let (mut at, mut left) = (at, count);
        while left > 0 {
            // The last one comes first.
            let len = if left % NOPS.len() == 0 { NOPS.len() } else { left % NOPS.len() };
            self.code[at..at + len].copy_from_slice(NOPS[len - 1]);
            (at, left) = (at + len, left - len);
        }
    }

    pub(super) fn jcc(&mut self, condition: u8, target: u64) {
        self.keep_off_line_ends(6, true);
        let distance = target.wrapping_sub(self.here() + 6) as u32;
        self.jcc_by(condition, distance);
    }

    #[inline(always)]
    fn jcc_by(&mut self, condition: u8, distance: u32) {
        let bytes = u64::from(distance) << 16 | u64::from(0x80 | condition) << 8 | 0x0f;
        self.piece(Piece { bytes, len: 6 });
    }

    pub(super) fn jmp_forward(&mut self) -> Forward {
        self.keep_off_line_ends(5, false);
        self.piece(Piece { bytes: 0xe9, len: 5 });
        Forward(self.code.len())
    }

    pub(super) fn call_forward(&mut self) -> Forward {
        self.keep_off_line_ends(5, false);
        self.piece(Piece { bytes: 0xe8, len: 5 });
        Forward(self.code.len())
    }

    pub(super) fn jcc_forward(&mut self, condition: u8) -> Forward {
        self.keep_off_line_ends(6, true);
        self.jcc_by(condition, 0);
        Forward(self.code.len())
    }

    /// Lands a forward jump here.
    pub(super) fn land(&mut self, forward: Forward) {
        let here = self.code.len();
        self.land_at(forward, here);
    }

    /// Lands a forward jump at an address.
    pub(super) fn land_abroad(&mut self, forward: Forward, at: u64) {
        let distance = at.wrapping_sub(self.origin + forward.0 as u64) as u32;
        self.code[forward.0 - 4..forward.0].copy_from_slice(&distance.to_le_bytes());
    }

    /// Lands a forward jump at an offset in this code.
    pub(super) fn land_at(&mut self, forward: Forward, at: usize) {
        let distance = at as i64 - forward.0 as i64;
        self.code[forward.0 - 4..forward.0].copy_from_slice(&(distance as i32).to_le_bytes());
    }

    /// Stores the status flags as the processor keeps them. `scratch` is lost; flags and all else stay.
    pub(super) fn save_flags(&mut self, status: i32, scratch: u8) {
        self.mov(scratch, RAX);
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.mem(&[0x66], false, &[0x89], RAX, Mem::Cpu(status));
        self.mov(RAX, scratch);
    }

    /// Loads the status flags. `scratch` is lost.
    pub(super) fn load_flags(&mut self, status: i32, scratch: u8) {
        self.mov(scratch, RAX);
        self.mem(&[], false, &[0x0f, 0xb7], RAX, Mem::Cpu(status));
        self.bytes(&[0x04, 0x7f, 0x9e]); // add al, 127; sahf
        self.mov(RAX, scratch);
    }
}
