//! The arithmetic of the guest is the host's: every operation runs as the same instruction on the same operands, so
//! results and all flags, the undefined ones included, are those of the processor underneath.
//!
//! Status flags are kept as LAHF and SETO leave them in AX: AH holds SF ZF 0 AF 0 PF 1 CF, AL holds OF.
#![expect(unsafe_code, reason = "single arithmetic instructions with their flags")]

use std::arch::asm;

use crate::regs::Word;

/// Bits of the status word.
pub(crate) mod st {
    pub(crate) const OF: u16 = 1 << 0;
    pub(crate) const CF: u16 = 1 << 8;
    pub(crate) const PF: u16 = 1 << 10;
    pub(crate) const ZF: u16 = 1 << 14;
    pub(crate) const SF: u16 = 1 << 15;
}

/// Status word to RFLAGS bits.
pub(crate) fn status_to_rflags(status: u16) -> u64 {
    u64::from(status >> 8 & 0xd5) | u64::from(status & 1) << 11
}

/// RFLAGS bits to status word.
pub(crate) fn rflags_to_status(rflags: u64) -> u16 {
    ((rflags & 0xd5) as u16) << 8 | 0x200 | (rflags >> 11 & 1) as u16
}

/// The sixteen conditions of Jcc, SETcc and CMOVcc by encoding (SDM vol. 1 appendix B).
#[inline(always)]
pub(crate) fn condition<const CC: u8>(status: u16) -> bool {
    let is = |bit: u16| status & bit != 0;
    let less = || (status >> 15 ^ status) & 1 != 0;
    let yes = match CC >> 1 {
        0 => is(st::OF),
        1 => is(st::CF),
        2 => is(st::ZF),
        3 => status & (st::CF | st::ZF) != 0,
        4 => is(st::SF),
        5 => is(st::PF),
        6 => less(),
        _ => is(st::ZF) || less(),
    };
    yes != (CC & 1 == 1)
}

macro_rules! declare {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty;)*) => {
        /// An operand width with its arithmetic.
        pub(crate) trait AluWord: Word {
            $($(#[$doc])* fn $name($($arg: $ty,)* status: &mut u16) -> $ret;)*
        }
    };
}

declare! {
    /// ADD.
    fn add(a: Self, b: Self) -> Self;
    /// ADC.
    fn adc(a: Self, b: Self) -> Self;
    /// SUB, CMP.
    fn sub(a: Self, b: Self) -> Self;
    /// SBB.
    fn sbb(a: Self, b: Self) -> Self;
    /// AND, TEST.
    fn and(a: Self, b: Self) -> Self;
    /// OR.
    fn or(a: Self, b: Self) -> Self;
    /// XOR.
    fn xor(a: Self, b: Self) -> Self;
    /// INC.
    fn inc(a: Self) -> Self;
    /// DEC.
    fn dec(a: Self) -> Self;
    /// NEG.
    fn neg(a: Self) -> Self;
    /// SHL by CL.
    fn shl(a: Self, count: u8) -> Self;
    /// SHR by CL.
    fn shr(a: Self, count: u8) -> Self;
    /// SAR by CL.
    fn sar(a: Self, count: u8) -> Self;
    /// ROL by CL.
    fn rol(a: Self, count: u8) -> Self;
    /// ROR by CL.
    fn ror(a: Self, count: u8) -> Self;
    /// RCL by CL.
    fn rcl(a: Self, count: u8) -> Self;
    /// RCR by CL.
    fn rcr(a: Self, count: u8) -> Self;
    /// MUL: (low, high).
    fn mul(a: Self, b: Self) -> (Self, Self);
    /// IMUL with one operand: (low, high).
    fn imul_wide(a: Self, b: Self) -> (Self, Self);
}

/// Arithmetic that exists for 16 bits and wider only.
pub(crate) trait WideWord: AluWord {
    /// IMUL with two operands.
    fn imul(a: Self, b: Self, status: &mut u16) -> Self;
    /// SHLD by CL.
    fn shld(a: Self, b: Self, count: u8, status: &mut u16) -> Self;
    /// SHRD by CL.
    fn shrd(a: Self, b: Self, count: u8, status: &mut u16) -> Self;
    /// BT, flags only.
    fn bt(a: Self, bit: Self, status: &mut u16);
    /// BTS.
    fn bts(a: Self, bit: Self, status: &mut u16) -> Self;
    /// BTR.
    fn btr(a: Self, bit: Self, status: &mut u16) -> Self;
    /// BTC.
    fn btc(a: Self, bit: Self, status: &mut u16) -> Self;
    /// BSF: the destination stays if the source is zero.
    fn bsf(dst: Self, src: Self, status: &mut u16) -> Self;
    /// BSR, likewise.
    fn bsr(dst: Self, src: Self, status: &mut u16) -> Self;
}

/// Two operands; flags out only.
macro_rules! binary {
    ($name:ident, $t:ty, $class:ident, $text:expr) => {
        #[inline(always)]
        fn $name(a: $t, b: $t, status: &mut u16) -> $t {
            let mut r = a;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!($text, "lahf", "seto al", a = inout($class) r, b = in($class) b, out("ax") *status, options(nomem, nostack, pure));
            }
            r
        }
    };
}

/// Two operands; the carry flag goes in.
macro_rules! carry {
    ($name:ident, $t:ty, $class:ident, $text:expr) => {
        #[inline(always)]
        fn $name(a: $t, b: $t, status: &mut u16) -> $t {
            let mut r = a;
            // SAFETY: register arithmetic only; bit 8 of the status word is CF.
            unsafe {
                asm!("bt eax, 8", $text, "lahf", "seto al", a = inout($class) r, b = in($class) b, inout("ax") *status, options(nomem, nostack, pure));
            }
            r
        }
    };
}

/// One operand; the carry flag goes in (INC and DEC keep it).
macro_rules! unary {
    ($name:ident, $t:ty, $class:ident, $text:expr) => {
        #[inline(always)]
        fn $name(a: $t, status: &mut u16) -> $t {
            let mut r = a;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("bt eax, 8", $text, "lahf", "seto al", a = inout($class) r, inout("ax") *status, options(nomem, nostack, pure));
            }
            r
        }
    };
}

/// Shift or rotate by CL; all flags go in, as a count of zero keeps them.
macro_rules! shift {
    ($name:ident, $t:ty, $class:ident, $text:expr) => {
        #[inline(always)]
        fn $name(a: $t, count: u8, status: &mut u16) -> $t {
            let mut r = a;
            // SAFETY: register arithmetic only. Adding 127 to AL restores OF, SAHF the others.
            unsafe {
                asm!("add al, 127", "sahf", $text, "lahf", "seto al", a = inout($class) r, in("cl") count, inout("ax") *status, options(nomem, nostack, pure));
            }
            r
        }
    };
}

macro_rules! alu_word {
    ($t:ty, $class:ident, $m:literal, $mul:ident) => {
        impl AluWord for $t {
            binary!(add, $t, $class, concat!("add {a", $m, "}, {b", $m, "}"));
            binary!(sub, $t, $class, concat!("sub {a", $m, "}, {b", $m, "}"));
            binary!(and, $t, $class, concat!("and {a", $m, "}, {b", $m, "}"));
            binary!(or, $t, $class, concat!("or {a", $m, "}, {b", $m, "}"));
            binary!(xor, $t, $class, concat!("xor {a", $m, "}, {b", $m, "}"));
            carry!(adc, $t, $class, concat!("adc {a", $m, "}, {b", $m, "}"));
            carry!(sbb, $t, $class, concat!("sbb {a", $m, "}, {b", $m, "}"));
            unary!(inc, $t, $class, concat!("inc {a", $m, "}"));
            unary!(dec, $t, $class, concat!("dec {a", $m, "}"));
            unary!(neg, $t, $class, concat!("neg {a", $m, "}"));
            shift!(shl, $t, $class, concat!("shl {a", $m, "}, cl"));
            shift!(shr, $t, $class, concat!("shr {a", $m, "}, cl"));
            shift!(sar, $t, $class, concat!("sar {a", $m, "}, cl"));
            shift!(rol, $t, $class, concat!("rol {a", $m, "}, cl"));
            shift!(ror, $t, $class, concat!("ror {a", $m, "}, cl"));
            shift!(rcl, $t, $class, concat!("rcl {a", $m, "}, cl"));
            shift!(rcr, $t, $class, concat!("rcr {a", $m, "}, cl"));
            $mul!($t);
        }
    };
}

macro_rules! mul8 {
    ($t:ty) => {
        mul8!(mul, "mul {b}");
        mul8!(imul_wide, "imul {b}");
    };
    ($name:ident, $text:literal) => {
        #[inline(always)]
        fn $name(a: u8, b: u8, status: &mut u16) -> (u8, u8) {
            let product: u16;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!($text, "mov {p:x}, ax", "lahf", "seto al", b = in(reg_byte) b, p = out(reg) product,
                    inout("ax") u16::from(a) => *status, options(nomem, nostack, pure));
            }
            (product as u8, (product >> 8) as u8)
        }
    };
}
macro_rules! mul_rdx {
    ($t:ty, $m:literal) => {
        mul_rdx!($t, mul, concat!("mul {b", $m, "}"), $m);
        mul_rdx!($t, imul_wide, concat!("imul {b", $m, "}"), $m);
    };
    ($t:ty, $name:ident, $text:expr, $m:literal) => {
        #[inline(always)]
        fn $name(a: $t, b: $t, status: &mut u16) -> ($t, $t) {
            let (low, high, flags): (u64, u64, u64);
            // SAFETY: register arithmetic only.
            unsafe {
                asm!($text, "mov {low}, rax", "lahf", "seto al", b = in(reg) b, low = out(reg) low,
                    inout("rax") a as u64 => flags, out("rdx") high, options(nomem, nostack, pure));
            }
            *status = flags as u16;
            (low as $t, high as $t)
        }
    };
}
macro_rules! mul16 {
    ($t:ty) => {
        mul_rdx!($t, ":x");
    };
}
macro_rules! mul32 {
    ($t:ty) => {
        mul_rdx!($t, ":e");
    };
}
macro_rules! mul64 {
    ($t:ty) => {
        mul_rdx!($t, ":r");
    };
}

alu_word!(u8, reg_byte, "", mul8);
alu_word!(u16, reg, ":x", mul16);
alu_word!(u32, reg, ":e", mul32);
alu_word!(u64, reg, ":r", mul64);

/// Two operands where all flags go in (those that the instruction leaves alone stay).
macro_rules! keep {
    ($name:ident, $t:ty, $text:expr) => {
        #[inline(always)]
        fn $name(a: $t, b: $t, status: &mut u16) -> $t {
            let mut r = a;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("add al, 127", "sahf", $text, "lahf", "seto al", a = inout(reg) r, b = in(reg) b, inout("ax") *status, options(nomem, nostack, pure));
            }
            r
        }
    };
}
macro_rules! double_shift {
    ($name:ident, $t:ty, $text:expr) => {
        #[inline(always)]
        fn $name(a: $t, b: $t, count: u8, status: &mut u16) -> $t {
            let mut r = a;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("add al, 127", "sahf", $text, "lahf", "seto al", a = inout(reg) r, b = in(reg) b, in("cl") count, inout("ax") *status, options(nomem, nostack, pure));
            }
            r
        }
    };
}

macro_rules! wide_word {
    ($t:ty, $m:literal) => {
        impl WideWord for $t {
            keep!(imul, $t, concat!("imul {a", $m, "}, {b", $m, "}"));
            keep!(bts, $t, concat!("bts {a", $m, "}, {b", $m, "}"));
            keep!(btr, $t, concat!("btr {a", $m, "}, {b", $m, "}"));
            keep!(btc, $t, concat!("btc {a", $m, "}, {b", $m, "}"));
            keep!(bsf, $t, concat!("bsf {a", $m, "}, {b", $m, "}"));
            keep!(bsr, $t, concat!("bsr {a", $m, "}, {b", $m, "}"));
            double_shift!(shld, $t, concat!("shld {a", $m, "}, {b", $m, "}, cl"));
            double_shift!(shrd, $t, concat!("shrd {a", $m, "}, {b", $m, "}, cl"));
            #[inline(always)]
            fn bt(a: $t, bit: $t, status: &mut u16) {
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!("add al, 127", "sahf", concat!("bt {a", $m, "}, {b", $m, "}"), "lahf", "seto al", a = in(reg) a, b = in(reg) bit, inout("ax") *status, options(nomem, nostack, pure));
                }
            }
        }
    };
}
wide_word!(u16, ":x");
wide_word!(u32, ":e");
wide_word!(u64, ":r");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_come_out_where_the_status_word_says() {
        let mut s = 0;
        assert_eq!(u8::add(0x7f, 1, &mut s), 0x80);
        assert_eq!(status_to_rflags(s), 0x890, "SF AF OF");
        assert_eq!(u64::sub(0, 1, &mut s), u64::MAX);
        assert_eq!(status_to_rflags(s), 0x95, "CF PF AF SF");
        assert_eq!(u32::inc(u32::MAX, &mut s), 0);
        assert_eq!(status_to_rflags(s), 0x55, "CF kept, PF AF ZF");
        for flags in (0..0x1000u64).map(|f| f & 0x8d5) {
            assert_eq!(status_to_rflags(rflags_to_status(flags)), flags);
        }
    }

    #[test]
    fn a_shift_by_zero_keeps_every_flag() {
        for flags in (0..0x1000u64).map(|f| f & 0x8d5) {
            let mut s = rflags_to_status(flags);
            assert_eq!(u32::shl(5, 0, &mut s), 5);
            assert_eq!(u16::rcr(5, 32, &mut s), 5);
            assert_eq!(status_to_rflags(s), flags);
        }
    }

    #[test]
    fn multiplication_is_full_width() {
        let mut s = 0;
        assert_eq!(u8::mul(0xff, 0xff, &mut s), (1, 0xfe));
        assert_eq!(u8::imul_wide(0xff, 0xff, &mut s), (1, 0));
        assert_eq!(u16::mul(0xffff, 0xffff, &mut s), (1, 0xfffe));
        assert_eq!(u64::mul(u64::MAX, u64::MAX, &mut s), (1, u64::MAX - 1));
        assert_eq!(u32::imul_wide(u32::MAX, 2, &mut s), (0xffff_fffe, u32::MAX));
        assert_eq!(s & st::CF, 0);
    }

    #[test]
    fn conditions_follow_their_encoding() {
        let mut s = 0;
        u32::sub(3, 5, &mut s);
        assert!(condition::<2>(s) && !condition::<3>(s), "below");
        assert!(condition::<12>(s) && condition::<14>(s) && !condition::<15>(s), "less");
        u32::sub(0x8000_0000, 1, &mut s);
        assert!(condition::<12>(s) && condition::<0>(s) && condition::<7>(s));
    }
}
