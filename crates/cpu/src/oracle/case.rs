//! One test: an instruction and the state it meets; and what became of both.

/// Where code stands: one page, executable, with nothing mapped round it.
pub const CODE: u64 = 0x1000_0000;
/// Where data stands: two writable pages and a read-only one, with nothing mapped round them.
pub const WINDOW: u64 = 0x1002_0000;
/// Bytes of the window.
pub const WINDOW_SIZE: usize = 3 * 4096;
/// Bytes of the window that may be written.
pub const WRITABLE: usize = 2 * 4096;
/// Base of FS.
pub const FS_BASE: u64 = WINDOW + 0x100;
/// Base of GS.
pub const GS_BASE: u64 = WINDOW + 0x1100;

/// Longest instruction.
pub const LONGEST: usize = 15;
/// Changed quadwords of the window that an outcome can hold.
pub const CHANGES: usize = 352;

/// Registers that an instruction can see.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ZMM0 to ZMM31. On processors without AVX-512 only the YMM registers in them count.
    pub vector: [[u64; 8]; 32],
    /// K0 to K7.
    pub opmask: [u64; 8],
    /// FXSAVE64 image up to the XMM registers; MXCSR in its place.
    pub x87: [u8; 160],
}

/// Where MXCSR stands in [`State::x87`].
const MXCSR: usize = 24;

impl State {
    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| self.x87[MXCSR + i]);
        u32::from_le_bytes([a, b, c, d])
    }

    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.x87[MXCSR..MXCSR + 4].copy_from_slice(&value.to_le_bytes());
        self.x87[MXCSR + 4..MXCSR + 8].copy_from_slice(&0xffffu32.to_le_bytes());
    }

    /// Everything as a processor has it after reset, flags as a program has them.
    pub fn initial() -> Self {
        let mut state =
            Self { gpr: [0; 16], rip: 0, rflags: 0x202, vector: [[0; 8]; 32], opmask: [0; 8], x87: [0; 160] };
        state.x87[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        state.set_mxcsr(0x1f80);
        state
    }
}

/// Whether the processor underneath has AVX-512, enabled.
pub fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512bw")
}

/// Bytes put into the window before the instruction runs.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patch {
    /// Offset in the window.
    pub at: u16,
    /// How many bytes; 0: no patch.
    pub len: u16,
    /// The bytes.
    pub bytes: [u8; 64],
}

impl Patch {
    /// None.
    pub const NONE: Self = Self { at: 0, len: 0, bytes: [0; 64] };

    /// The range of the window, cut to it.
    pub fn range(&self) -> std::ops::Range<usize> {
        let at = (self.at as usize).min(WINDOW_SIZE);
        at..(at + (self.len as usize).min(64)).min(WINDOW_SIZE)
    }
}

/// A test case.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// State before; RIP is where the instruction stands.
    pub state: State,
    /// The instruction.
    pub code: [u8; 16],
    /// Its length, as a decoder sees it.
    pub len: u8,
    /// It transfers control: single-step it. (Others run into a breakpoint: a string instruction would be stepped through
    /// one iteration at a time.)
    pub steps: bool,
    /// Contents of the window beside the pattern.
    pub patches: [Patch; 3],
}

impl Case {
    /// Which of the components are not in their initial configuration, as bits of XSTATE_BV.
    pub fn inuse(&self) -> u64 {
        let (state, initial) = (&self.state, State::initial());
        let x87 =
            state.x87[..MXCSR] != initial.x87[..MXCSR] || state.x87[MXCSR + 8..] != initial.x87[MXCSR + 8..];
        let (low, high) = state.vector.split_at(16);
        let any = |from: usize, to: usize| low.iter().any(|r| r[from..to].iter().any(|&w| w != 0));
        u64::from(x87)
            | u64::from(any(0, 2)) << 1
            | u64::from(any(2, 4)) << 2
            | u64::from(state.opmask != [0; 8]) << 5
            | u64::from(any(4, 8)) << 6
            | u64::from(high.iter().any(|r| *r != [0; 8])) << 7
    }

    /// The instruction's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.code[..(self.len as usize).min(LONGEST)]
    }
}

/// An exception.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Vector; [`Event::NONE`] if there was none.
    pub vector: u32,
    /// Error code, or 0.
    pub error: u32,
    /// For page faults the address, else 0.
    pub cr2: u64,
}

impl Event {
    /// The instruction was executed.
    pub const NONE: Self = Self { vector: u32::MAX, error: 0, cr2: 0 };
}

/// What became of a case.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// State after.
    pub state: State,
    /// How it ended.
    pub event: Event,
    /// How many quadwords of the window differ from the pattern.
    pub changed: u32,
    /// The first of them: offset and value.
    pub changes: [(u64, u64); CHANGES],
}

impl Outcome {
    /// Those that are recorded.
    pub fn changes(&self) -> &[(u64, u64)] {
        &self.changes[..(self.changed as usize).min(CHANGES)]
    }

    /// Records how `window` differs from `pattern`.
    pub fn record(&mut self, window: &[u8], pattern: &[u8]) {
        const AT_ONCE: usize = 512;
        self.changed = 0;
        for (n, (now, before)) in window.chunks(AT_ONCE).zip(pattern.chunks(AT_ONCE)).enumerate() {
            if now != before {
                self.record_part(AT_ONCE * n, now, before);
            }
        }
    }

    /// Likewise a part that begins at the offset `first`.
    fn record_part(&mut self, first: usize, window: &[u8], pattern: &[u8]) {
        for (i, (now, before)) in window.chunks_exact(8).zip(pattern.chunks_exact(8)).enumerate() {
            if now != before {
                if let Some(change) = self.changes.get_mut(self.changed as usize) {
                    *change =
                        ((first + 8 * i) as u64, u64::from_le_bytes(now.try_into().unwrap_or_default()));
                }
                self.changed += 1;
            }
        }
    }
}

/// What the window holds when nothing else is said: numbers without a pattern, but the same each time.
pub fn pattern() -> Vec<u64> {
    let mut random = super::random::Random::new(0x5eed);
    (0..WINDOW_SIZE / 8).map(|_| random.next()).collect()
}
