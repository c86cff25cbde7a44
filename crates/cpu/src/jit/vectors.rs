//! The vector registers, MXCSR and opmask registers between the frame and the host's, in two steps: what AVX has, which nearly all
//! code that uses vectors makes do with, and what AVX-512 adds.

use std::mem::offset_of;

use super::asm::{Asm, EQUAL, Mem, NOT_EQUAL, R10};
use super::glue::VECTORS;
use crate::cpu::Cpu;
use crate::native::{FrameLayout, component};

/// In [`super::Hot`]: the first 16 vector registers and MXCSR are the guest's.
pub(in crate::jit) const LOW_VECTORS: u8 = 1;
/// All vector registers and the opmask registers are.
pub(in crate::jit) const ALL_VECTORS: u8 = 2;

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::jit) enum Widest {
    Xmm,
    Ymm,
    Zmm,
}

/// Addresses of the routines. R10 and flags are lost.
pub(super) struct Vectors {
    /// Loads what AVX has.
    pub(super) load: u64,
    /// Loads all, or what is not there yet.
    pub(super) load_all: u64,
    /// Loads what was saved.
    pub(super) reload: u64,
    /// Saves what was loaded.
    pub(super) save: u64,
}

/// Writes the routines.
pub(super) fn emit(asm: &mut Asm, widest: Widest) -> Vectors {
    let load = asm.here();
    low(asm, widest, false);
    set(asm, LOW_VECTORS);
    asm.byte(0xc3);

    let load_all = asm.here();
    asm.cmp_byte(VECTORS, LOW_VECTORS);
    let there = asm.jcc_forward(EQUAL);
    low(asm, widest, false);
    asm.land(there);
    high(asm, widest, false);
    set(asm, ALL_VECTORS);
    asm.byte(0xc3);

    let reload = asm.here();
    low(asm, widest, false);
    high_if_used(asm, widest, false);
    asm.byte(0xc3);

    let save = asm.here();
    low(asm, widest, true);
    high_if_used(asm, widest, true);
    if widest != Widest::Xmm {
        asm.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
    asm.byte(0xc3);
    Vectors { load, load_all, reload, save }
}

fn set(asm: &mut Asm, value: u8) {
    asm.mem(&[], false, &[0xc6], 0, VECTORS);
    asm.byte(value);
}

fn frame(asm: &mut Asm) {
    asm.load(R10, Mem::Cpu(offset_of!(Cpu, fpu) as i32));
}

/// Moves the first 16 registers and MXCSR. With AVX-512 enabled they are moved whole: what VEX-encoded instructions write they
/// clear above.
fn low(asm: &mut Asm, widest: Widest, save: bool) {
    frame(asm);
    if !save {
        asm.mem(&[], false, &[0x0f, 0xae], 2, Mem::At(R10, FrameLayout::MXCSR));
    }
    if widest == Widest::Zmm {
        asm.test_byte(Mem::Cpu(offset_of!(Cpu, xcr0) as i32), component::ZMM_HIGH as u8);
        let narrow = asm.jcc_forward(EQUAL);
        (0..16).for_each(|n| zmm(asm, n, save));
        let done = asm.jmp_forward();
        asm.land(narrow);
        halves(asm, Widest::Ymm, save);
        asm.land(done);
    } else {
        halves(asm, widest, save);
    }
    if save {
        asm.mem(&[], false, &[0x0f, 0xae], 3, Mem::At(R10, FrameLayout::MXCSR));
        asm.mem(&[], false, &[0x0f, 0xae], 2, Mem::At(R10, FrameLayout::HOST_MXCSR));
    }
}

/// Moves 16 registers of at most 256 bits. Where no upper half holds anything they are cleared, not loaded: instructions without
/// VEX wait for upper halves that are in use.
fn halves(asm: &mut Asm, widest: Widest, save: bool) {
    if save || widest == Widest::Xmm {
        (0..16).for_each(|n| register(asm, widest, n, save));
        return;
    }
    let upper = |n: u8| Mem::At(R10, FrameLayout::VECTOR + 64 * i32::from(n) + 16);
    asm.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
    asm.mem(&[], false, &[0x0f, 0x10], 0, upper(0)); // movups xmm0
    for n in 1..16 {
        asm.mem(&[], false, &[0x0f, 0x10], 1, upper(n)); // movups xmm1
        asm.bytes(&[0x0f, 0x56, 0xc1]); // orps xmm0, xmm1
    }
    asm.bytes(&[0x66, 0x0f, 0x38, 0x17, 0xc0]); // ptest xmm0, xmm0
    let clear = asm.jcc_forward(EQUAL);
    (0..16).for_each(|n| register(asm, Widest::Ymm, n, false));
    let done = asm.jmp_forward();
    asm.land(clear);
    (0..16).for_each(|n| register(asm, Widest::Xmm, n, false));
    asm.land(done);
}

/// Moves the other registers.
fn high(asm: &mut Asm, widest: Widest, save: bool) {
    if widest != Widest::Zmm {
        return;
    }
    frame(asm);
    (16..32).for_each(|n| zmm(asm, n, save));
    for n in 0..8u8 {
        // kmovq k, [r10+disp]
        asm.bytes(&[0xc4, 0xc1, 0xf8, 0x90 | u8::from(save)]);
        asm.operand(n, Mem::At(R10, FrameLayout::OPMASK + 8 * i32::from(n)));
    }
}

fn high_if_used(asm: &mut Asm, widest: Widest, save: bool) {
    if widest == Widest::Zmm {
        asm.cmp_byte(VECTORS, ALL_VECTORS);
        let unused = asm.jcc_forward(NOT_EQUAL);
        high(asm, widest, save);
        asm.land(unused);
    }
}

fn place(n: u8) -> Mem {
    Mem::At(R10, FrameLayout::VECTOR + 64 * i32::from(n))
}

fn register(asm: &mut Asm, width: Widest, n: u8, save: bool) {
    let opcode = 0x10 | u8::from(save);
    if width == Widest::Ymm {
        // vmovups ymm, [r10+disp]
        asm.bytes(&[0xc4, (n >> 3 ^ 1) << 7 | 0x40 | 1, 0x7c, opcode]);
        asm.operand(n, place(n));
    } else {
        asm.mem(&[], false, &[0x0f, opcode], n, place(n));
    }
}

fn zmm(asm: &mut Asm, n: u8, save: bool) {
    // vmovups zmm, [r10+disp]
    let p0 = (n >> 3 & 1 ^ 1) << 7 | 0x40 | (n >> 4 ^ 1) << 4 | 1;
    asm.bytes(&[0x62, p0, 0x7c, 0x48, 0x10 | u8::from(save)]);
    asm.unscaled_operand(n, place(n));
}
