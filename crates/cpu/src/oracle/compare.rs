//! What must be equal, and what need not be.

use std::fmt;

use super::case::{CODE, Case, Event, Outcome, Patch, State};

/// One thing that is not equal: what, on the hardware, in the interpreter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What.
    pub what: String,
    /// On the hardware.
    pub hardware: String,
    /// In the interpreter.
    pub interpreter: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10} hardware {}  interpreter {}", self.what, self.hardware, self.interpreter)
    }
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
/// Status flags, DF, AC. TF serves the harness, RF is the exception's own, NT and ID belong to the kernel.
const FLAGS: u64 = 0x4_0cd5;

/// Everything that is not equal.
pub fn differences(case: &Case, hardware: &Outcome, interpreter: &Outcome) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut check = |what: &str, hardware: String, interpreter: String| {
        if hardware != interpreter {
            found.push(Difference { what: what.into(), hardware, interpreter });
        }
    };
    check("event", event(case, &hardware.event), event(case, &interpreter.event));
    let (a, b) = (&hardware.state, &interpreter.state);
    check("rip", offset(a.rip, case), offset(b.rip, case));
    for (i, name) in NAMES.iter().enumerate() {
        if a.gpr[i] != b.gpr[i] {
            check(name, format!("{:#x}", a.gpr[i]), format!("{:#x}", b.gpr[i]));
        }
    }
    let registers = !may_be_half_done(case, hardware);
    check("rflags", format!("{:#x}", a.rflags & FLAGS), format!("{:#x}", b.rflags & FLAGS));
    for i in 0..32 {
        if registers && a.vector[i] != b.vector[i] {
            check(&format!("zmm{i}"), vector(&a.vector[i]), vector(&b.vector[i]));
        }
    }
    for i in 0..8 {
        if registers && a.opmask[i] != b.opmask[i] {
            check(&format!("k{i}"), format!("{:#x}", a.opmask[i]), format!("{:#x}", b.opmask[i]));
        }
    }
    if registers {
        check("mxcsr", format!("{:#x}", mxcsr(hardware)), format!("{:#x}", mxcsr(interpreter)));
    }
    if registers && a.x87 != b.x87 {
        let fields =
            [("fcw", 0, 2), ("fsw", 2, 2), ("ftw", 4, 1), ("fop", 6, 2), ("fip", 8, 8), ("fdp", 16, 8)];
        for (name, at, len) in fields {
            check(name, hex(&a.x87[at..at + len]), hex(&b.x87[at..at + len]));
        }
        for i in 0..8 {
            let range = 32 + 16 * i..42 + 16 * i;
            check(&format!("st{i}"), hex(&a.x87[range.clone()]), hex(&b.x87[range]));
        }
    }
    if hardware.changed != interpreter.changed || hardware.changes() != interpreter.changes() {
        let of = |o: &Outcome, p: &Outcome| {
            let own = o.changes().iter().filter(|c| !p.changes().contains(c));
            own.take(6).map(|(at, value)| format!("{at:#x}={value:#x} ")).collect::<String>()
        };
        check("memory", of(hardware, interpreter), of(interpreter, hardware));
    }
    found
}

/// Where the child process has memory of its own, at addresses that differ from run to run.
const ELSEWHERE: std::ops::Range<u64> = 0x5000_0000_0000..USER_END;

/// Whether a case tells nothing: its access may have met memory that the child has for itself, or it has no meaning.
fn tells_nothing(case: &Case, hardware: &Outcome, interpreter: &Outcome) -> bool {
    let elsewhere = interpreter.event.vector == 14 && ELSEWHERE.contains(&interpreter.event.cr2);
    // How long an invalid instruction would be, were it not invalid, only the processor knows.
    let too_long = case.len == 15 && hardware.event.vector == 13 && interpreter.event.vector == 6;
    elsewhere || too_long
}

/// Whether there is any difference: as [`differences`], without words.
pub fn equal(case: &Case, hardware: &Outcome, interpreter: &Outcome) -> bool {
    let (a, b) = (&hardware.state, &interpreter.state);
    let same = a.gpr == b.gpr
        && a.rip == b.rip
        && (a.rflags ^ b.rflags) & FLAGS == 0
        && a.vector == b.vector
        && a.opmask == b.opmask
        && a.x87 == b.x87
        && hardware.event == interpreter.event
        && hardware.changed == interpreter.changed
        && hardware.changes() == interpreter.changes();
    same || tells_nothing(case, hardware, interpreter) || differences(case, hardware, interpreter).is_empty()
}

/// MXCSR, without what cannot be told: when an unmasked overflow or underflow is raised, whether the result would have been inexact
/// had there been no limit to its exponent (PE) shows in no masked run.
fn mxcsr(outcome: &Outcome) -> u32 {
    const RANGE: u32 = 3 << 3;
    const PRECISION: u32 = 1 << 5;
    let value = outcome.state.mxcsr();
    let raised = outcome.event.vector == 19 && value & !(value >> 7) & RANGE != 0;
    if raised { value & !PRECISION } else { value }
}

/// Where Linux ends user space.
const USER_END: u64 = 0x7fff_ffff_f000;

fn event(case: &Case, event: &Event) -> String {
    if *event == Event::NONE {
        return "none".into();
    }
    // Linux says "protection violation" for every address that is not the user's, so that users cannot probe.
    let error = if event.vector == 14 && event.cr2 >= USER_END { event.error | 1 } else { event.error };
    // In which order an instruction touches the parts of a large operand is the microcode's affair: the page counts.
    let cr2 = match moves_state(case) {
        Pieces::No => event.cr2,
        Pieces::InOrder => event.cr2 & !0xfff,
        Pieces::InAnyOrder => 0,
    };
    if matches!(moves_state(case), Pieces::InAnyOrder) && (12..=14).contains(&event.vector) {
        return "fault".into();
    }
    format!("#{} error {:#x} cr2 {:#x}", event.vector, error, cr2)
}

/// What a fault may leave half done, or find half way.
///
/// XRSTOR that faults may have loaded some components (SDM vol. 1 §13.8.3), and which is the microcode's affair. Dot products
/// stop at the first of their steps that raises an unmasked exception: which flags they set shows in no masked run;
/// nor does it which VCVTPS2PH sets, as it knows no flush to zero.
fn may_be_half_done(case: &Case, hardware: &Outcome) -> bool {
    use iced_x86::Mnemonic as M;
    let insn = iced_x86::Decoder::with_ip(64, case.bytes(), 0, iced_x86::DecoderOptions::NONE).decode();
    hardware.event != Event::NONE
        && matches!(
            insn.mnemonic(),
            M::Xrstor | M::Xrstor64 | M::Dpps | M::Dppd | M::Vdpps | M::Vdppd | M::Vcvtps2ph
        )
}

/// How an operand is accessed.
enum Pieces {
    /// In one piece.
    No,
    /// In many, the first page first.
    InOrder,
    /// In many, whichever comes first: a bad address, a missing page, a bad header.
    InAnyOrder,
}

fn moves_state(case: &Case) -> Pieces {
    use iced_x86::Mnemonic as M;
    let insn = iced_x86::Decoder::with_ip(64, case.bytes(), 0, iced_x86::DecoderOptions::NONE).decode();
    match insn.mnemonic() {
        M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xrstor
        | M::Xrstor64 => Pieces::InAnyOrder,
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => Pieces::InOrder,
        M::Fnstenv
        | M::Fldenv
        | M::Fnsave
        | M::Frstor
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64 => Pieces::InOrder,
        _ if insn.op_mask() != iced_x86::Register::None && !insn.is_vsib() => Pieces::InOrder,
        _ => Pieces::No,
    }
}

fn offset(rip: u64, case: &Case) -> String {
    match rip.wrapping_sub(case.state.rip) {
        near if rip.wrapping_sub(CODE) < 0x2000 => format!("+{near:#x}"),
        _ => format!("{rip:#x}"),
    }
}

fn vector(words: &[u64; 8]) -> String {
    words.iter().rev().map(|w| format!("{w:016x}")).collect::<Vec<_>>().join("_")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

/// A case for people: code, bytes, and what of the state is not initial.
pub fn describe(case: &Case) -> String {
    instruction(case.bytes(), case.state.rip) + &situation(&case.state, &case.patches)
}

/// An instruction for people.
pub(super) fn instruction(bytes: &[u8], rip: u64) -> String {
    let insn = iced_x86::Decoder::with_ip(64, bytes, rip, iced_x86::DecoderOptions::NONE).decode();
    let bytes: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!("{:?} [{}] at {rip:#x}\n", insn.code(), bytes.join(" "))
}

/// Instructions in a row for people.
pub(super) fn unit(bytes: &[u8], rip: u64) -> String {
    let mut decoder = iced_x86::Decoder::with_ip(64, bytes, rip, iced_x86::DecoderOptions::NONE);
    let mut text = String::new();
    while decoder.can_decode() {
        let at = decoder.position();
        let _ = decoder.decode();
        text += &instruction(&bytes[at..decoder.position()], rip + at as u64);
    }
    text
}

/// For people, what of a state is not initial, and what else is in the window.
pub(super) fn situation(state: &State, patches: &[Patch]) -> String {
    let initial = State::initial();
    let mut text = String::new();
    for (i, name) in NAMES.iter().enumerate() {
        if state.gpr[i] != 0 {
            text += &format!("  {name} = {:#x}\n", state.gpr[i]);
        }
    }
    text += &format!("  rflags = {:#x}, mxcsr = {:#x}\n", state.rflags, state.mxcsr());
    for (i, words) in state.vector.iter().enumerate() {
        if *words != [0; 8] {
            text += &format!("  zmm{i} = {}\n", vector(words));
        }
    }
    for (i, word) in state.opmask.iter().enumerate().filter(|(_, word)| **word != 0) {
        text += &format!("  k{i} = {word:#x}\n");
    }
    if state.x87[..24] != initial.x87[..24] || state.x87[32..] != initial.x87[32..] {
        text +=
            &format!("  x87 control (fcw fsw ftw fop fip fdp, from the end) = {}\n", hex(&state.x87[..24]));
        for i in 0..8 {
            text += &format!("  st{i} = {}\n", hex(&state.x87[32 + 16 * i..42 + 16 * i]));
        }
    }
    for patch in patches.iter().filter(|p| p.len != 0) {
        text += &format!("  window+{:#x} = {}\n", patch.at, hex(&patch.bytes[..patch.range().len()]));
    }
    text
}
