//! The x87, SSE and AVX state of one processor, laid out for thunks.

/// Components of the extended state as bits of XCR0, XSTATE_BV and XINUSE (SDM vol. 1 §13.1).
pub(crate) mod component {
    /// x87 state.
    pub(crate) const X87: u64 = 1 << 0;
    /// XMM registers (and MXCSR, after a fashion).
    pub(crate) const SSE: u64 = 1 << 1;
    /// Upper halves of the YMM registers.
    pub(crate) const AVX: u64 = 1 << 2;
    /// Opmask registers.
    pub(crate) const OPMASK: u64 = 1 << 5;
    /// Upper halves of the first 16 ZMM registers.
    pub(crate) const ZMM_HIGH: u64 = 1 << 6;
    /// The other 16 ZMM registers.
    pub(crate) const HI16: u64 = 1 << 7;
    /// What AVX-512 adds.
    pub(crate) const AVX512: u64 = OPMASK | ZMM_HIGH | HI16;
    /// What every processor's area has room for.
    pub(crate) const BASIC: u64 = X87 | SSE | AVX;
    /// Everything this processor may have.
    pub(crate) const ALL: u64 = BASIC | AVX512;
}

/// MXCSR after reset: all exceptions masked, round to nearest.
pub(crate) const MXCSR_INIT: u32 = 0x1f80;
/// The bits that MXCSR has.
pub(crate) const MXCSR_MASK: u32 = 0xffff;

/// Bytes of the legacy region of an XSAVE area.
pub(super) const LEGACY: usize = 512;
/// Where the XSAVE header ends and extended components begin.
pub(super) const EXTENDED: usize = LEGACY + 64;
/// Most bytes of an area with all components.
pub(super) const AREA: usize = 2688;

/// Registers and scratch space of a thunk, at offsets that generated code knows.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct Frame {
    /// Vector registers, 64 bytes each so that wider ones have their place.
    pub(super) vector: [[u64; 8]; 32],
    /// Opmask registers.
    pub(super) opmask: [u64; 8],
    /// Where the memory operand of a re-encoded instruction lies.
    pub(super) operand: [u8; 64],
    /// x87 and MMX registers and their environment as an FXSAVE64 image. XMM registers and MXCSR in it mean nothing.
    pub(super) x87: [u8; LEGACY],
    /// The header that makes an XSAVE area of that image.
    pub(super) header: [u64; 8],
    /// MXCSR.
    pub(super) mxcsr: u32,
    /// The host's MXCSR while a thunk runs.
    pub(super) host_mxcsr: u32,
}

/// Where translated code finds the vector registers, from the start of [`Fpu`].
pub(crate) struct FrameLayout;

impl FrameLayout {
    /// 64 bytes for each register.
    pub(crate) const VECTOR: i32 =
        (std::mem::offset_of!(Fpu, frame) + std::mem::offset_of!(Frame, vector)) as i32;
    /// Opmask registers.
    pub(crate) const OPMASK: i32 =
        (std::mem::offset_of!(Fpu, frame) + std::mem::offset_of!(Frame, opmask)) as i32;
    /// The XSAVE area of x87.
    pub(crate) const X87: i32 = (std::mem::offset_of!(Fpu, frame) + std::mem::offset_of!(Frame, x87)) as i32;
    /// Its XSTATE_BV.
    pub(crate) const X87_COMPONENTS: i32 =
        (std::mem::offset_of!(Fpu, frame) + std::mem::offset_of!(Frame, header)) as i32;
    /// The pointer to the last instruction.
    pub(crate) const FIP: i32 = Self::X87 + fx::FIP as i32;
    /// MXCSR.
    pub(crate) const MXCSR: i32 =
        (std::mem::offset_of!(Fpu, frame) + std::mem::offset_of!(Frame, mxcsr)) as i32;
    /// What MXCSR is outside of guest code.
    pub(crate) const HOST_MXCSR: i32 =
        (std::mem::offset_of!(Fpu, frame) + std::mem::offset_of!(Frame, host_mxcsr)) as i32;
}

/// The floating-point and vector state of one processor.
#[derive(Clone)]
pub(crate) struct Fpu {
    pub(super) frame: Frame,
    /// Selector of the last x87 instruction, on processors that still keep it.
    pub(super) fcs: u16,
    /// Selector of its operand, likewise.
    pub(super) fds: u16,
    /// Whether this processor keeps them (CPUID.7:EBX bit 13 is clear).
    pub(super) selectors: bool,
}

/// Offsets in an FXSAVE image (SDM vol. 1 table 10-2).
pub(super) mod fx {
    pub(in crate::native) const FCW: usize = 0;
    pub(in crate::native) const FSW: usize = 2;
    pub(in crate::native) const FTW: usize = 4;
    pub(in crate::native) const FOP: usize = 6;
    pub(in crate::native) const FIP: usize = 8;
    pub(in crate::native) const FCS: usize = 12;
    pub(in crate::native) const FDP: usize = 16;
    pub(in crate::native) const FDS: usize = 20;
    pub(in crate::native) const MXCSR: usize = 24;
    pub(in crate::native) const MXCSR_MASK: usize = 28;
    pub(in crate::native) const ST: usize = 32;
    pub(in crate::native) const XMM: usize = 160;
}

/// FCW: exception masks.
pub(crate) const FCW_MASKS: u16 = 0x3f;
/// FSW: an unmasked exception is pending.
pub(super) const FSW_ES: u16 = 1 << 7;
/// FSW: busy, a copy of ES.
pub(super) const FSW_B: u16 = 1 << 15;

impl Fpu {
    /// The state after reset.
    pub(crate) fn new() -> Self {
        let frame = Frame {
            vector: [[0; 8]; 32],
            opmask: [0; 8],
            operand: [0; 64],
            x87: [0; LEGACY],
            header: [0; 8],
            mxcsr: MXCSR_INIT,
            host_mxcsr: MXCSR_INIT,
        };
        let selectors = std::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 13 == 0;
        let mut fpu = Self { frame, fcs: 0, fds: 0, selectors };
        fpu.reset();
        fpu
    }

    /// Power-on reset (SDM vol. 3A table 11-1, except that x87 comes up as FNINIT leaves it, which every firmware
    /// and every virtual machine monitor counts on). INIT leaves this state alone.
    pub(crate) fn reset(&mut self) {
        self.init_x87();
        self.frame.vector = [[0; 8]; 32];
        self.frame.opmask = [0; 8];
        self.frame.mxcsr = MXCSR_INIT;
    }

    /// Whether no floating-point exception is unmasked, neither in MXCSR nor in FCW.
    #[inline(always)]
    pub(crate) fn masked(&self) -> bool {
        self.frame.mxcsr & 0x1f80 == 0x1f80 && self.word(fx::FCW) & FCW_MASKS == FCW_MASKS
    }

    /// x87 component in its initial configuration (SDM vol. 1 §13.6).
    pub(super) fn init_x87(&mut self) {
        self.frame.x87 = [0; LEGACY];
        self.set_word(fx::FCW, 0x37f);
        self.set_image_mxcsr();
        self.fcs = 0;
        self.fds = 0;
    }

    /// The first `count` XMM registers zero.
    pub(super) fn init_sse(&mut self, count: usize) {
        for register in &mut self.frame.vector[..count] {
            register[..2].fill(0);
        }
    }

    /// FXRSTOR loads MXCSR from the image: it must hold something valid.
    fn set_image_mxcsr(&mut self) {
        self.frame.x87[fx::MXCSR..fx::MXCSR + 4].copy_from_slice(&MXCSR_INIT.to_le_bytes());
    }

    /// Which of the components `among` differ from their initial configuration. MXCSR does not count.
    pub(crate) fn xinuse(&self, among: u64) -> u64 {
        let (low, high) = self.frame.vector.split_at(16);
        let any =
            |range: std::ops::Range<usize>| low.iter().any(|v| v[range.clone()].iter().any(|&w| w != 0));
        let in_use = |component| match component {
            component::X87 => !self.x87_is_initial(),
            component::SSE => any(0..2),
            component::AVX => any(2..4),
            component::OPMASK => self.frame.opmask != [0; 8],
            component::ZMM_HIGH => any(4..8),
            component::HI16 => high.iter().any(|v| *v != [0; 8]),
            _ => false,
        };
        (0..8).map(|n| 1 << n).filter(|&bit| among & bit != 0 && in_use(bit)).sum()
    }

    fn x87_is_initial(&self) -> bool {
        let image = &self.frame.x87;
        self.word(fx::FCW) == 0x37f
            && image[fx::FSW..fx::MXCSR].iter().all(|&b| b == 0)
            && image[fx::ST..fx::XMM].iter().all(|&b| b == 0)
            && self.fcs == 0
            && self.fds == 0
    }

    /// A 16-bit field of the x87 image.
    #[inline(always)]
    pub(super) fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.frame.x87[at], self.frame.x87[at + 1]])
    }

    /// Sets one.
    pub(super) fn set_word(&mut self, at: usize, value: u16) {
        self.frame.x87[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// FIP or FDP.
    pub(super) fn pointer(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.frame.x87[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    /// Sets one.
    pub(super) fn set_pointer(&mut self, at: usize, value: u64) {
        self.frame.x87[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Makes FSW.ES and B follow from the exception flags and masks.
    pub(super) fn summarize(&mut self) {
        let (fcw, fsw) = (self.word(fx::FCW), self.word(fx::FSW));
        let pending = fsw & !fcw & 0x3f != 0;
        let summary = if pending { FSW_ES | FSW_B } else { 0 };
        self.set_word(fx::FSW, fsw & !(FSW_ES | FSW_B) | summary);
    }

    /// Sets what a program can see: an FXSAVE64 image up to the XMM registers, with MXCSR, the vector registers and the
    /// opmask registers.
    pub(crate) fn set_visible(&mut self, image: &[u8; 160], vector: &[[u64; 8]; 32], opmask: &[u64; 8]) {
        self.get_x87(image, true);
        self.frame.mxcsr = image_mxcsr(image) & MXCSR_MASK;
        self.frame.vector = *vector;
        self.frame.opmask = *opmask;
    }

    /// What a program can see, likewise.
    pub(crate) fn visible(&self, image: &mut [u8; 160], vector: &mut [[u64; 8]; 32], opmask: &mut [u64; 8]) {
        self.put_x87(image, true);
        put_image_mxcsr(image, self.frame.mxcsr);
        *vector = self.frame.vector;
        *opmask = self.frame.opmask;
    }

    /// Says what of another state is not as in this one, the interpreter's.
    pub(crate) fn differences(&self, translated: &Self, differences: &mut Vec<String>) {
        let (ours, theirs) = (&self.frame, &translated.frame);
        for (n, (a, b)) in ours.vector.iter().zip(&theirs.vector).enumerate().filter(|(_, (a, b))| a != b) {
            differences.push(format!("vector {n}: interpreter {a:x?}, translated {b:x?}"));
        }
        if ours.opmask != theirs.opmask {
            let (a, b) = (ours.opmask, theirs.opmask);
            differences.push(format!("opmask: interpreter {a:x?}, translated {b:x?}"));
        }
        if ours.mxcsr != theirs.mxcsr {
            differences.push(format!("mxcsr: interpreter {:#x}, translated {:#x}", ours.mxcsr, theirs.mxcsr));
        }
        let image = |fpu: &Self| {
            let mut image = [0; fx::XMM];
            fpu.put_x87(&mut image, true);
            (image, fpu.fcs, fpu.fds)
        };
        if image(self) != image(translated) {
            let (a, b) = (image(self), image(translated));
            differences.push(format!("x87: interpreter {a:x?}, translated {b:x?}"));
        }
    }

    /// XMM register `n` as bytes.
    pub(super) fn xmm(&self, n: usize) -> [u8; 16] {
        join(&self.frame.vector[n & 31][..2])
    }

    /// Sets XMM register `n`, leaving what lies above.
    pub(super) fn set_xmm(&mut self, n: usize, value: &[u8; 16]) {
        split(value, &mut self.frame.vector[n & 15][..2]);
    }

    /// Vector register `n` as bytes.
    pub(super) fn bytes(&self, n: usize) -> [u8; 64] {
        join(&self.frame.vector[n & 31])
    }

    /// Sets all of a vector register.
    pub(super) fn set_bytes(&mut self, n: usize, value: &[u8; 64]) {
        split(value, &mut self.frame.vector[n & 31]);
    }

    /// Writes the x87 component into a legacy region, with 64-bit pointers if `wide`, else with offsets and selectors;
    /// MXCSR's eight bytes stay.
    pub(super) fn put_x87(&self, area: &mut [u8], wide: bool) {
        area[..fx::MXCSR].copy_from_slice(&self.frame.x87[..fx::MXCSR]);
        area[fx::FTW + 1] = 0;
        if !wide {
            area[fx::FCS..fx::FCS + 4].copy_from_slice(&u32::from(self.fcs).to_le_bytes());
            area[fx::FDS..fx::FDS + 4].copy_from_slice(&u32::from(self.fds).to_le_bytes());
        }
        area[fx::ST..fx::XMM].copy_from_slice(&self.frame.x87[fx::ST..fx::XMM]);
        for n in 0..8 {
            area[fx::ST + 16 * n + 10..][..6].fill(0);
        }
    }

    /// Reads the x87 component from a legacy region.
    pub(super) fn get_x87(&mut self, area: &[u8], wide: bool) {
        self.frame.x87[..fx::MXCSR].copy_from_slice(&area[..fx::MXCSR]);
        self.frame.x87[fx::FTW + 1] = 0;
        (self.fcs, self.fds) = (0, 0);
        if wide {
            // FIP has as many bits as addresses have; FDP has all that were written.
            let canonical = (self.pointer(fx::FIP) << 16) as i64 >> 16;
            self.set_pointer(fx::FIP, canonical as u64);
        }
        if !wide {
            if self.selectors {
                self.fcs = u16::from_le_bytes([area[fx::FCS], area[fx::FCS + 1]]);
                self.fds = u16::from_le_bytes([area[fx::FDS], area[fx::FDS + 1]]);
            }
            self.frame.x87[fx::FCS..fx::FDP].fill(0);
            self.frame.x87[fx::FDS..fx::MXCSR].fill(0);
        }
        self.frame.x87[fx::ST..fx::XMM].copy_from_slice(&area[fx::ST..fx::XMM]);
        for n in 0..8 {
            self.frame.x87[fx::ST + 16 * n + 10..][..6].fill(0);
        }
        // Bit 6 of FCW reads as one; the reserved bits of FCW and FOP do not exist.
        let fcw = self.word(fx::FCW);
        self.set_word(fx::FCW, fcw & 0x1f7f | 0x40);
        let fop = self.word(fx::FOP);
        self.set_word(fx::FOP, fop & 0x7ff);
        self.set_image_mxcsr();
        self.summarize();
    }

    /// Writes the first `count` XMM registers into a legacy region.
    pub(super) fn put_xmm(&self, area: &mut [u8], count: usize) {
        for n in 0..count {
            area[fx::XMM + 16 * n..][..16].copy_from_slice(&self.xmm(n));
        }
    }

    /// Reads the first `count` XMM registers from a legacy region.
    pub(super) fn get_xmm(&mut self, area: &[u8], count: usize) {
        for n in 0..count {
            if let Some(value) = area[fx::XMM + 16 * n..].first_chunk() {
                self.set_xmm(n, value);
            }
        }
    }
}

/// MXCSR in a legacy region.
pub(super) fn image_mxcsr(area: &[u8]) -> u32 {
    u32::from_le_bytes([area[fx::MXCSR], area[fx::MXCSR + 1], area[fx::MXCSR + 2], area[fx::MXCSR + 3]])
}

/// Puts MXCSR and its mask into a legacy region.
pub(super) fn put_image_mxcsr(area: &mut [u8], mxcsr: u32) {
    area[fx::MXCSR..fx::MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
    area[fx::MXCSR_MASK..fx::MXCSR_MASK + 4].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

pub(super) fn join<const N: usize>(words: &[u64]) -> [u8; N] {
    let mut bytes = [0; N];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

pub(super) fn split(bytes: &[u8], words: &mut [u64]) {
    for (word, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = from.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    }
}
