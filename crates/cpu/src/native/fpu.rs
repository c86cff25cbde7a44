//! The x87, SSE and AVX state of one processor, laid out for thunks.

use skep_hv::state::StateError;

/// Components of the extended state as bits of XCR0, XSTATE_BV and XINUSE (SDM vol. 1 §13.1).
pub(crate) mod component {
    /// x87 state.
    pub(crate) const X87: u64 = 1 << 0;
    /// XMM registers (and MXCSR, after a fashion).
    pub(crate) const SSE: u64 = 1 << 1;
    /// Upper halves of the YMM registers.
    pub(crate) const AVX: u64 = 1 << 2;
    /// Everything this processor has.
    pub(crate) const ALL: u64 = X87 | SSE | AVX;
}

/// MXCSR after reset: all exceptions masked, round to nearest.
pub(crate) const MXCSR_INIT: u32 = 0x1f80;
/// The bits that MXCSR has.
pub(crate) const MXCSR_MASK: u32 = 0xffff;

/// Bytes of the legacy region of an XSAVE area.
pub(super) const LEGACY: usize = 512;
/// Where the XSAVE header ends and extended components begin.
pub(super) const EXTENDED: usize = LEGACY + 64;
/// Offset of the AVX component, in the standard format and (as nothing precedes it) in the compacted one.
pub(super) const AVX_AT: usize = EXTENDED;
/// Size of the AVX component.
pub(super) const AVX_SIZE: usize = 256;
/// Length of a standard-format area with all components.
pub(super) const AREA: usize = AVX_AT + AVX_SIZE;

/// Registers and scratch space of a thunk, at offsets that generated code knows.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct Frame {
    /// Vector registers, 64 bytes each so that wider ones have their place.
    pub(super) vector: [[u64; 8]; 32],
    /// Where the memory operand of a re-encoded instruction lies.
    pub(super) operand: [u8; 64],
    /// x87 and MMX registers and their environment as an FXSAVE64 image. XMM registers and MXCSR in it mean nothing.
    pub(super) x87: [u8; LEGACY],
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

/// FSW: an unmasked exception is pending.
pub(super) const FSW_ES: u16 = 1 << 7;
/// FSW: busy, a copy of ES.
pub(super) const FSW_B: u16 = 1 << 15;

impl Fpu {
    /// The state after reset.
    pub(crate) fn new() -> Self {
        let frame = Frame {
            vector: [[0; 8]; 32],
            operand: [0; 64],
            x87: [0; LEGACY],
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
        self.init_sse(16);
        self.init_avx(16);
        self.frame.mxcsr = MXCSR_INIT;
    }

    /// Whether no SIMD floating-point exception is unmasked.
    #[inline(always)]
    pub(crate) fn masked(&self) -> bool {
        self.frame.mxcsr & 0x1f80 == 0x1f80
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

    /// Upper halves of the first `count` YMM registers zero.
    pub(super) fn init_avx(&mut self, count: usize) {
        for register in &mut self.frame.vector[..count] {
            register[2..4].fill(0);
        }
    }

    /// FXRSTOR loads MXCSR from the image: it must hold something valid.
    fn set_image_mxcsr(&mut self) {
        self.frame.x87[fx::MXCSR..fx::MXCSR + 4].copy_from_slice(&MXCSR_INIT.to_le_bytes());
    }

    /// Which components differ from their initial configuration. MXCSR does not count.
    pub(crate) fn xinuse(&self) -> u64 {
        let vectors = &self.frame.vector[..16];
        let mut inuse = 0;
        if !self.x87_is_initial() {
            inuse |= component::X87;
        }
        if vectors.iter().any(|v| v[..2] != [0, 0]) {
            inuse |= component::SSE;
        }
        if vectors.iter().any(|v| v[2..4] != [0, 0]) {
            inuse |= component::AVX;
        }
        inuse
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

    /// Sets what a program can see: an FXSAVE64 image up to the XMM registers, with MXCSR, and the YMM registers.
    pub(crate) fn set_visible(&mut self, image: &[u8; 160], ymm: &[[u64; 4]; 16]) {
        self.get_x87(image, true);
        self.frame.mxcsr = image_mxcsr(image) & MXCSR_MASK;
        for (to, from) in self.frame.vector.iter_mut().zip(ymm) {
            to[..4].copy_from_slice(from);
        }
    }

    /// What a program can see, likewise.
    pub(crate) fn visible(&self, image: &mut [u8; 160], ymm: &mut [[u64; 4]; 16]) {
        self.put_x87(image, true);
        put_image_mxcsr(image, self.frame.mxcsr);
        for (to, from) in ymm.iter_mut().zip(&self.frame.vector) {
            to.copy_from_slice(&from[..4]);
        }
    }

    /// Says what of another state is not as in this one, the interpreter's.
    pub(crate) fn differences(&self, translated: &Self, differences: &mut Vec<String>) {
        let (ours, theirs) = (&self.frame, &translated.frame);
        for (n, (a, b)) in ours.vector.iter().zip(&theirs.vector).enumerate().filter(|(_, (a, b))| a != b) {
            differences.push(format!("vector {n}: interpreter {a:x?}, translated {b:x?}"));
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
        join(&self.frame.vector[n & 15][..2])
    }

    /// Sets XMM register `n`, leaving what lies above.
    pub(super) fn set_xmm(&mut self, n: usize, value: &[u8; 16]) {
        split(value, &mut self.frame.vector[n & 15][..2]);
    }

    /// Upper half of YMM register `n`.
    pub(super) fn ymm_high(&self, n: usize) -> [u8; 16] {
        join(&self.frame.vector[n & 15][2..4])
    }

    /// Sets the upper half of YMM register `n`.
    pub(super) fn set_ymm_high(&mut self, n: usize, value: &[u8; 16]) {
        split(value, &mut self.frame.vector[n & 15][2..4]);
    }

    /// YMM register `n` as bytes.
    pub(super) fn ymm(&self, n: usize) -> [u8; 32] {
        join(&self.frame.vector[n & 15][..4])
    }

    /// The whole state as a standard-format XSAVE area.
    pub(crate) fn save_area(&self) -> Vec<u8> {
        let mut area = vec![0; AREA];
        self.put_x87(&mut area, true);
        put_image_mxcsr(&mut area, self.frame.mxcsr);
        self.put_xmm(&mut area, 16);
        for n in 0..16 {
            area[AVX_AT + 16 * n..][..16].copy_from_slice(&self.ymm_high(n));
        }
        area[LEGACY..LEGACY + 8].copy_from_slice(&component::ALL.to_le_bytes());
        area
    }

    /// Loads the whole state from a standard-format XSAVE area.
    pub(crate) fn load_area(&mut self, area: &[u8]) -> Result<(), StateError> {
        let word = |at: usize| area[at..at + 8].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        if area.len() < EXTENDED {
            let value = area.len() as u64;
            return Err(StateError::Value {
                field: "fpu.xsave length",
                value,
                why: "an XSAVE area has 576 bytes at least",
            });
        }
        let (present, compacted) = (word(LEGACY), word(LEGACY + 8));
        if present & !component::ALL != 0 {
            return Err(StateError::Value {
                field: "fpu.xsave XSTATE_BV",
                value: present,
                why: "this processor has x87, SSE and AVX state only",
            });
        }
        if compacted != 0 || area[LEGACY + 16..EXTENDED].iter().any(|&b| b != 0) {
            let why = "the standard format has zeros in the rest of its header";
            return Err(StateError::Value { field: "fpu.xsave XCOMP_BV", value: compacted, why });
        }
        if present & component::AVX != 0 && area.len() < AREA {
            let value = area.len() as u64;
            return Err(StateError::Value {
                field: "fpu.xsave length",
                value,
                why: "too short for the AVX component",
            });
        }
        let mxcsr = image_mxcsr(area);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(StateError::Value {
                field: "fpu.xsave MXCSR",
                value: mxcsr.into(),
                why: "reserved bits are set",
            });
        }
        self.reset();
        self.frame.mxcsr = mxcsr;
        if present & component::X87 != 0 {
            self.get_x87(area, true);
        }
        if present & component::SSE != 0 {
            self.get_xmm(area, 16);
        }
        if present & component::AVX != 0 {
            self.get_avx(&area[AVX_AT..], 16);
        }
        Ok(())
    }

    /// As [`Fpu::load_area`], from an area that may hold components which this processor does not have.
    pub(crate) fn load_known(&mut self, area: &[u8]) -> Result<(), StateError> {
        let mut known = [0; AREA];
        let len = area.len().min(AREA);
        known[..len].copy_from_slice(&area[..len]);
        known[LEGACY] &= component::ALL as u8;
        known[LEGACY + 1..LEGACY + 8].fill(0);
        self.load_area(&known[..len])
    }

    /// Writes what is known into the area that [`Fpu::load_known`] was given; whether that changed it.
    pub(crate) fn store_known(&self, area: &mut [u8]) -> bool {
        let now = self.save_area();
        let was = u64::from(area[LEGACY]) & component::ALL;
        // Initial components that are marked as such stay so: the VM may not have them.
        let present = was | self.xinuse();
        let mut changed = false;
        let mut put = |at: usize, from: &[u8]| {
            if let Some(to) = area.get_mut(at..at + from.len())
                && to != from
            {
                to.copy_from_slice(from);
                changed = true;
            }
        };
        put(fx::MXCSR, &now[fx::MXCSR..fx::MXCSR_MASK]);
        for (bit, at, end) in [
            (component::X87, 0, fx::MXCSR),
            (component::X87, fx::ST, fx::XMM),
            (component::SSE, fx::XMM, fx::XMM + 256),
            (component::AVX, AVX_AT, AREA),
        ] {
            if present & bit != 0 {
                put(at, &now[at..end]);
            }
        }
        let marked = area[LEGACY] | present as u8;
        changed |= marked != area[LEGACY];
        area[LEGACY] = marked;
        changed
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

    /// Reads the upper halves of the first `count` YMM registers.
    pub(super) fn get_avx(&mut self, from: &[u8], count: usize) {
        for n in 0..count {
            if let Some(value) = from.get(16 * n..).and_then(|s| s.first_chunk()) {
                self.set_ymm_high(n, value);
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

fn join<const N: usize>(words: &[u64]) -> [u8; N] {
    let mut bytes = [0; N];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn split(bytes: &[u8], words: &mut [u64]) {
    for (word, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = from.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_survives_an_area() {
        let mut fpu = Fpu::new();
        assert_eq!(fpu.xinuse(), 0);
        for n in 0..16 {
            fpu.set_xmm(n, &[n as u8 + 1; 16]);
            fpu.set_ymm_high(n, &[n as u8 + 100; 16]);
        }
        fpu.frame.mxcsr = 0x1fa0;
        fpu.set_word(fx::FSW, 0x3800);
        fpu.set_pointer(fx::FIP, 0x1234_5678_9abc);
        fpu.frame.x87[fx::ST..fx::ST + 10].fill(7);
        let area = fpu.save_area();
        let mut copy = Fpu::new();
        copy.load_area(&area).expect("its own area");
        assert_eq!(copy.save_area(), area);
        assert_eq!(copy.xinuse(), component::ALL);
        copy.reset();
        assert_eq!(copy.xinuse(), 0);
    }

    #[test]
    fn hostile_areas_are_refused() {
        let good = Fpu::new().save_area();
        let mut fpu = Fpu::new();
        for length in 0..EXTENDED {
            assert!(fpu.load_area(&good[..length]).is_err());
        }
        assert!(fpu.load_area(&good[..AREA - 1]).is_err(), "AVX is said to be there");
        for (at, value) in
            [(fx::MXCSR + 2, 1), (LEGACY, 8), (LEGACY + 7, 0x80), (LEGACY + 15, 0x80), (LEGACY + 63, 1)]
        {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(fpu.load_area(&bad).is_err(), "byte {at}");
        }
        assert_eq!(fpu.save_area(), good, "nothing was loaded");
    }
}
