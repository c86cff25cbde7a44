//! The vector registers, MXCSR and opmask registers between the frame and the host's, in steps: what AVX has, which nearly all
//! code that uses vectors makes do with; the registers that AVX-512 adds, of which code that was not written for 512 bits
//! uses 256; and the whole.
//!
//! Processors run slower for a while after they have touched 512 bits. So the upper halves are moved only where they hold
//! something or an instruction names them: in the first two steps they are zero, in the frame and in the host's registers, and
//! whatever writes to the lower ones clears them.

use std::mem::offset_of;

use super::asm::{Asm, BELOW, EQUAL, Mem, NOT_EQUAL, R10};
use super::glue::VECTORS;
use crate::cpu::Cpu;
use crate::native::{FrameLayout, component};

/// In [`super::Hot`]: the first 16 vector registers and MXCSR are the guest's.
pub(in crate::jit) const LOW_VECTORS: u8 = 1;
/// All vector registers and the opmask registers are; the upper halves are zero.
pub(in crate::jit) const MORE_VECTORS: u8 = 2;
/// All of them are, whole.
pub(in crate::jit) const WHOLE_VECTORS: u8 = 3;

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::jit) enum Widest {
    Xmm,
    Ymm,
    Zmm,
}

/// Addresses of the routines. R10 and flags are lost.
pub(super) struct Vectors {
    /// Load what a step makes the guest's, or what of it is not there yet.
    pub(super) load: [u64; 3],
    /// Loads what was saved.
    pub(super) reload: u64,
    /// Saves what was loaded.
    pub(super) save: u64,
}

/// Writes the routines.
pub(super) fn emit(asm: &mut Asm, widest: Widest) -> Vectors {
    let load = if widest == Widest::Zmm { loads(asm) } else { [load_low(asm, widest); 3] };
    let reload = if widest == Widest::Zmm { reload(asm, load) } else { load[0] };
    let save = asm.here();
    frame(asm);
    save_all(asm, widest);
    asm.mem(&[], false, &[0x0f, 0xae], 3, Mem::At(R10, FrameLayout::MXCSR));
    asm.mem(&[], false, &[0x0f, 0xae], 2, Mem::At(R10, FrameLayout::HOST_MXCSR));
    if widest != Widest::Xmm {
        zero_upper(asm);
    }
    asm.byte(0xc3);
    Vectors { load, reload, save }
}

/// Loads for hosts that have no more than AVX.
fn load_low(asm: &mut Asm, widest: Widest) -> u64 {
    let at = asm.here();
    frame(asm);
    load_mxcsr(asm);
    low(asm, widest);
    done(asm, LOW_VECTORS);
    at
}

/// Loads for hosts that have AVX-512.
fn loads(asm: &mut Asm) -> [u64; 3] {
    let all_whole = asm.here();
    (0..16).for_each(|n| register(asm, Widest::Zmm, n, false));
    let others_whole = asm.here();
    others(asm, Widest::Zmm, false);
    done(asm, WHOLE_VECTORS);

    let load = asm.here();
    frame(asm);
    load_mxcsr(asm);
    asm.test_byte(Mem::Cpu(offset_of!(Cpu, xcr0) as i32), component::ZMM_HIGH as u8);
    let hidden = asm.jcc_forward(EQUAL);
    test_upper_halves(asm, 0);
    asm.jcc(NOT_EQUAL, all_whole);
    asm.land(hidden);
    low(asm, Widest::Ymm);
    done(asm, LOW_VECTORS);

    let load_more = asm.here();
    asm.cmp_byte(VECTORS, LOW_VECTORS);
    let low = asm.jcc_forward(EQUAL);
    asm.call(load);
    asm.cmp_byte(VECTORS, WHOLE_VECTORS);
    let whole = asm.jcc_forward(EQUAL);
    asm.land(low);
    frame(asm);
    test_upper_halves(asm, 16);
    asm.jcc(NOT_EQUAL, others_whole);
    others(asm, Widest::Ymm, false);
    set(asm, MORE_VECTORS);
    asm.land(whole);
    asm.byte(0xc3);

    let load_whole = asm.here();
    frame(asm);
    asm.cmp_byte(VECTORS, LOW_VECTORS);
    asm.jcc(EQUAL, others_whole);
    let more = asm.jcc_forward(BELOW ^ 1);
    load_mxcsr(asm);
    asm.jmp(all_whole);
    asm.land(more);
    done(asm, WHOLE_VECTORS);
    [load, load_more, load_whole]
}

/// What was saved may have been changed since, upper halves too.
fn reload(asm: &mut Asm, [load, load_more, load_whole]: [u64; 3]) -> u64 {
    let at = asm.here();
    asm.cmp_byte(VECTORS, MORE_VECTORS);
    set(asm, 0);
    asm.jcc(BELOW, load);
    asm.jcc(EQUAL, load_more);
    asm.jmp(load_whole);
    at
}

fn save_all(asm: &mut Asm, widest: Widest) {
    let low = |asm: &mut Asm, width: Widest| (0..16).for_each(|n| register(asm, width, n, true));
    if widest != Widest::Zmm {
        low(asm, widest);
        return;
    }
    asm.cmp_byte(VECTORS, MORE_VECTORS);
    let below = asm.jcc_forward(BELOW);
    let more = asm.jcc_forward(EQUAL);
    low(asm, Widest::Zmm);
    others(asm, Widest::Zmm, true);
    let whole = asm.jmp_forward();
    asm.land(more);
    others(asm, Widest::Ymm, true);
    asm.land(below);
    low(asm, Widest::Ymm);
    asm.land(whole);
}

fn done(asm: &mut Asm, value: u8) {
    set(asm, value);
    asm.byte(0xc3);
}

fn set(asm: &mut Asm, value: u8) {
    asm.mem(&[], false, &[0xc6], 0, VECTORS);
    asm.byte(value);
}

fn frame(asm: &mut Asm) {
    asm.load(R10, Mem::Cpu(offset_of!(Cpu, fpu) as i32));
}

fn load_mxcsr(asm: &mut Asm) {
    asm.mem(&[], false, &[0x0f, 0xae], 2, Mem::At(R10, FrameLayout::MXCSR));
}

/// Loads the first 16 registers. Where nothing lies above their lowest 128 bits, that is cleared, not loaded: instructions without
/// VEX wait for upper parts that are in use.
fn low(asm: &mut Asm, width: Widest) {
    let all = |asm: &mut Asm, width: Widest| (0..16).for_each(|n| register(asm, width, n, false));
    if width == Widest::Xmm {
        all(asm, width);
        return;
    }
    zero_upper(asm);
    for n in 0..16 {
        // vmovups xmm0, then vorps xmm0, xmm0
        asm.bytes(&[0xc4, 0xc1, 0x78, if n == 0 { 0x10 } else { 0x56 }]);
        asm.operand(0, part(n, 16));
    }
    asm.bytes(&[0xc4, 0xe2, 0x79, 0x17, 0xc0]); // vptest xmm0, xmm0
    let clear = asm.jcc_forward(EQUAL);
    all(asm, width);
    let done = asm.jmp_forward();
    asm.land(clear);
    all(asm, Widest::Xmm);
    asm.land(done);
}

fn zero_upper(asm: &mut Asm) {
    asm.bytes(&[0xc5, 0xf8, 0x77]);
}

/// Whether the frame has nothing in the upper halves of 16 registers: ZF. YMM16 and K1 are lost.
fn test_upper_halves(asm: &mut Asm, first: u8) {
    // vmovups ymm16, then vporq ymm16, ymm16
    asm.bytes(&[0x62, 0xc1, 0x7c, 0x28, 0x10]);
    asm.unscaled_operand(0, part(first, 32));
    for n in first + 1..first + 16 {
        asm.bytes(&[0x62, 0xc1, 0xfd, 0x20, 0xeb]);
        asm.unscaled_operand(0, part(n, 32));
    }
    asm.bytes(&[0x62, 0xb2, 0xfd, 0x20, 0x27, 0xc8]); // vptestmq k1, ymm16, ymm16
    asm.bytes(&[0xc5, 0xf8, 0x98, 0xc9]); // kortestw k1, k1
}

/// Moves the registers that AVX-512 adds.
fn others(asm: &mut Asm, width: Widest, save: bool) {
    (16..32).for_each(|n| register(asm, width, n, save));
    for n in 0..8u8 {
        // kmovq k, [r10+disp]
        asm.bytes(&[0xc4, 0xc1, 0xf8, 0x90 | u8::from(save)]);
        asm.operand(n, Mem::At(R10, FrameLayout::OPMASK + 8 * i32::from(n)));
    }
}

fn part(n: u8, offset: i32) -> Mem {
    Mem::At(R10, FrameLayout::VECTOR + 64 * i32::from(n) + offset)
}

fn register(asm: &mut Asm, width: Widest, n: u8, save: bool) {
    let (place, opcode) = (part(n, 0), 0x10 | u8::from(save));
    if width == Widest::Zmm || n > 15 {
        // EVEX vmovups, of 512 or 256 bits
        let p0 = (n >> 3 & 1 ^ 1) << 7 | 0x40 | (n >> 4 ^ 1) << 4 | 1;
        asm.bytes(&[0x62, p0, 0x7c, if width == Widest::Zmm { 0x48 } else { 0x28 }, opcode]);
        asm.unscaled_operand(n, place);
    } else if width == Widest::Ymm {
        // vmovups ymm, [r10+disp]
        asm.bytes(&[0xc4, (n >> 3 ^ 1) << 7 | 0x40 | 1, 0x7c, opcode]);
        asm.operand(n, place);
    } else {
        asm.mem(&[], false, &[0x0f, opcode], n, place);
    }
}
