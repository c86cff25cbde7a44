//! A decoded instruction.

use crate::cpu::Cpu;
use crate::fault::Exec;

/// Executes one instruction. On `Err` nothing architectural has changed but what the instruction's definition allows
/// (a partly done REP string).
pub(crate) type Handler = fn(&mut Cpu, &Op) -> Exec;

/// One instruction, decoded: the handler and its operands. Meaning of the fields is the handler's; decode fills the
/// memory operand, and the first register operands, in one way for all.
#[derive(Clone)]
#[repr(C)]
pub(crate) struct Op {
    /// Handler.
    pub(crate) run: Handler,
    /// Immediate, sign-extended to the operand size and beyond; for near branches the displacement.
    pub(crate) imm: u64,
    /// Displacement of the memory operand (RIP-relative ones: relative to the start of the block).
    pub(crate) disp: u64,
    /// Offset of the following instruction from the start of the block.
    pub(crate) end: u16,
    /// Length of the instruction in bytes.
    pub(crate) len: u8,
    /// First register operand: byte offset into the register file; segment, control, debug registers: number.
    pub(crate) dst: u8,
    /// Second register operand, likewise.
    pub(crate) src: u8,
    /// Base register of the memory operand: byte offset ([`crate::regs::ZERO`] if none).
    pub(crate) base: u8,
    /// Index register, likewise.
    pub(crate) index: u8,
    /// log2 of the scale.
    pub(crate) scale: u8,
    /// Segment of the memory operand (for string instructions: of the source): ES, CS, SS, DS, FS, GS = 0..5.
    pub(crate) seg: u8,
    /// See the constants.
    pub(crate) attr: u8,
}

#[allow(dead_code, reason = "a complete list reads better than a partial one")]
impl Op {
    /// LOCK prefix (or XCHG with memory).
    pub(crate) const LOCK: u8 = 1 << 0;
    /// REP / REPE prefix (F3).
    pub(crate) const REP: u8 = 1 << 1;
    /// REPNE prefix (F2).
    pub(crate) const REPNE: u8 = 1 << 2;
    /// Address size: 16 bits.
    pub(crate) const A16: u8 = 1 << 3;
    /// Address size: 32 bits. Neither: 64.
    pub(crate) const A32: u8 = 1 << 4;
    /// Operand size 16.
    pub(crate) const O16: u8 = 1 << 5;
    /// Operand size 32.
    pub(crate) const O32: u8 = 1 << 6;
    /// Operand size 64. None of the three: 8, or not applicable.
    pub(crate) const O64: u8 = 1 << 7;

    pub(crate) fn has(&self, attr: u8) -> bool {
        self.attr & attr != 0
    }

    /// Operand size in bytes.
    pub(crate) fn osize(&self) -> u8 {
        match self.attr & (Self::O16 | Self::O32 | Self::O64) {
            Self::O16 => 2,
            Self::O32 => 4,
            Self::O64 => 8,
            _ => 1,
        }
    }

    /// Mask of the address size.
    #[inline(always)]
    pub(crate) fn amask(&self) -> u64 {
        match self.attr & (Self::A16 | Self::A32) {
            Self::A16 => 0xffff,
            Self::A32 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }
}
