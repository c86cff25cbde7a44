//! The general register file, addressed by byte offset so that one accessor serves AL, AH, AX, EAX and RAX.
#![expect(unsafe_code, reason = "sub-register access by byte offset into a fixed array")]

/// Slots of 8 bytes: 16 general registers, then what addressing needs to be uniform.
pub(crate) const SLOTS: usize = 18;
/// Slot that always reads zero: the absent base or index.
pub(crate) const ZERO: u8 = 16 * 8;
/// Slot that holds RIP at the start of the running block: the base of RIP-relative operands.
pub(crate) const BLOCK_RIP: u8 = 17 * 8;

/// Byte offsets of the registers that instructions use implicitly.
pub(crate) mod at {
    #![allow(dead_code, reason = "a complete list reads better than a partial one")]
    pub(crate) const RAX: u8 = 0;
    pub(crate) const AH: u8 = 1;
    pub(crate) const RCX: u8 = 8;
    pub(crate) const RDX: u8 = 16;
    pub(crate) const RBX: u8 = 24;
    pub(crate) const RSP: u8 = 32;
    pub(crate) const RBP: u8 = 40;
    pub(crate) const RSI: u8 = 48;
    pub(crate) const RDI: u8 = 56;
    pub(crate) const R11: u8 = 88;
}

/// General registers RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15, and the two helper slots.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct Regs([u64; SLOTS]);

impl Regs {
    pub(crate) const fn new() -> Self {
        Self([0; SLOTS])
    }

    /// Whole register by byte offset (a multiple of 8).
    #[inline(always)]
    pub(crate) fn r64(&self, at: u8) -> u64 {
        self.get::<u64>(at)
    }

    /// Sets a whole register by byte offset.
    #[inline(always)]
    pub(crate) fn set64(&mut self, at: u8, value: u64) {
        self.put::<u64>(at, value);
    }

    /// By register number 0-15.
    pub(crate) fn gpr(&self, number: usize) -> u64 {
        self.0[number & 15]
    }

    /// By register number 0-15.
    pub(crate) fn set_gpr(&mut self, number: usize, value: u64) {
        self.0[number & 15] = value;
    }

    /// The sub-register of width `T` at a byte offset.
    #[inline(always)]
    pub(crate) fn get<T: Word>(&self, at: u8) -> T {
        debug_assert!(at as usize + size_of::<T>() <= SLOTS * 8);
        // SAFETY: decode only makes offsets of whole or sub-registers within the array (checked in debug builds),
        // and every bit pattern is a valid integer.
        unsafe { self.0.as_ptr().cast::<u8>().add(at as usize).cast::<T>().read_unaligned() }
    }

    /// Sets the sub-register of width `T`; a 32-bit write clears the upper half (SDM vol. 1 §3.4.1.1).
    #[inline(always)]
    pub(crate) fn set<T: Word>(&mut self, at: u8, value: T) {
        if size_of::<T>() == 4 {
            self.put::<u64>(at, value.to_u64());
        } else {
            self.put::<T>(at, value);
        }
    }

    #[inline(always)]
    fn put<T: Word>(&mut self, at: u8, value: T) {
        debug_assert!(at as usize + size_of::<T>() <= SLOTS * 8);
        // SAFETY: as in `get`.
        unsafe { self.0.as_mut_ptr().cast::<u8>().add(at as usize).cast::<T>().write_unaligned(value) }
    }
}

/// An operand width.
pub(crate) trait Word:
    Copy + Eq + Ord + Default + std::fmt::LowerHex + std::fmt::Debug + Send + Sync + 'static
{
    /// Width in bits.
    const BITS: u32;
    /// Zero-extends.
    fn to_u64(self) -> u64;
    /// Sign-extends.
    fn to_i64(self) -> i64;
    /// Truncates.
    fn of(value: u64) -> Self;
}

macro_rules! word {
    ($($t:ty, $s:ty;)*) => {$(
        impl Word for $t {
            const BITS: u32 = <$t>::BITS;
            #[inline(always)]
            fn to_u64(self) -> u64 { self as u64 }
            #[inline(always)]
            fn to_i64(self) -> i64 { self as $s as i64 }
            #[inline(always)]
            fn of(value: u64) -> Self { value as $t }
        }
    )*};
}
word! { u8, i8; u16, i16; u32, i32; u64, i64; }
