//! Cases from a seed: an encoding, registers biased to corners, and memory operands that mostly lie in the window.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::case::{CODE, Case, FS_BASE, GS_BASE, LONGEST, Patch, State, WINDOW, WINDOW_SIZE, WRITABLE};
use super::encodings;
use super::random::Random;
use super::values;

const PAGE: u64 = 4096;
/// RFLAGS that programs can change: status flags, DF, AC.
const STATUS: u64 = 0x8d5;
const DF: u64 = 1 << 10;
const AC: u64 = 1 << 18;

/// Makes cases.
pub struct Generator {
    codes: Vec<Code>,
    random: Random,
}

impl Generator {
    /// The cases of a seed: all codes, or those whose name contains `only`.
    pub fn new(seed: u64, only: Option<&str>) -> Self {
        let mut codes = encodings::testable();
        if let Some(part) = only {
            let part = part.to_lowercase();
            codes.retain(|code| format!("{code:?}").to_lowercase().contains(&part));
        }
        Self { codes, random: Random::new(seed) }
    }

    /// Codes that cases are made of.
    pub fn codes(&self) -> usize {
        self.codes.len()
    }

    /// The bytes of the next instruction, whatever it meets, and what they are. Invalid ones are among them.
    pub(super) fn next_instruction(&mut self) -> (Vec<u8>, Instruction) {
        loop {
            if let Some(made) = instruction(&self.codes, &mut Random::new(self.random.next())) {
                return made;
            }
        }
    }

    /// Another state.
    pub(super) fn next_state(&mut self) -> State {
        let mut state = State::initial();
        registers(&mut Random::new(self.random.next()), &mut state);
        state
    }

    /// The next case.
    pub fn next_case(&mut self) -> Case {
        loop {
            // Each case has numbers of its own, so that a change to one kind of case does not change all others.
            let mut random = Random::new(self.random.next());
            if let Some(case) = make(&self.codes, &mut random) {
                return case;
            }
        }
    }
}

fn decode(bytes: &[u8], rip: u64) -> Instruction {
    Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE).decode()
}

/// The bytes of an instruction that can be compared, and what they are.
fn instruction(codes: &[Code], random: &mut Random) -> Option<(Vec<u8>, Instruction)> {
    let mut bytes = encodings::encode(random.pick(codes), random);
    // Whatever a stray prefix makes of the instruction, there are bytes enough for it.
    bytes.extend(random.next().to_le_bytes());
    bytes.extend(random.next().to_le_bytes());
    bytes.truncate(LONGEST);
    let insn = decode(&bytes, 0);
    if !encodings::comparable(&insn, &bytes) {
        return None;
    }
    // An invalid instruction is as long as its bytes; where the processor stops reading is its own affair.
    let len = if insn.is_invalid() { bytes.len() } else { insn.len() };
    bytes.truncate(len);
    Some((bytes, insn))
}

fn make(codes: &[Code], random: &mut Random) -> Option<Case> {
    let (mut bytes, insn) = instruction(codes, random)?;
    let len = bytes.len();
    let mut case = Case {
        state: State::initial(),
        code: [0; 16],
        len: len as u8,
        steps: insn.flow_control() != FlowControl::Next && !insn.is_invalid(),
        patches: [Patch::NONE; 3],
    };
    let page_end = CODE + PAGE;
    case.state.rip = match random.below(32) {
        // How many bytes of an invalid instruction are fetched is the processor's own affair.
        _ if insn.is_invalid() || !crate::native::runs_here(&insn) => CODE + 0x400,
        0 => page_end - len as u64,
        1 => page_end - 1 - random.below(len as u64),
        _ => CODE + 0x400 + 16 * random.below(64),
    };
    registers(random, &mut case.state);
    operands(random, &insn, &mut bytes, &mut case);
    special(random, &insn, &mut case);
    stack(random, &insn, &mut case);
    case.code[..bytes.len()].copy_from_slice(&bytes);
    Some(case)
}

fn registers(random: &mut Random, state: &mut State) {
    for register in &mut state.gpr {
        *register = values::integer(random);
    }
    state.gpr[4] = WINDOW + 0x800 + 8 * random.below(0x180);
    state.rflags = 0x202 | random.next() & STATUS;
    if random.one_in(8) {
        state.rflags |= DF;
    }
    if random.one_in(32) {
        state.rflags |= AC;
    }
    values::vectors(random, state);
    state.set_mxcsr(values::mxcsr(random));
    if random.one_in(4) {
        values::x87(random, state);
    } else {
        for register in state.x87[32..].chunks_exact_mut(16) {
            values::fill(random, &mut register[..10]);
        }
        state.x87[4] = random.pick(&[0, 0xff, 0xff]);
    }
}

/// An address for a memory operand of `size` bytes.
pub(super) fn target(random: &mut Random, size: u64) -> u64 {
    let size = size.clamp(1, 1024);
    let middle = WINDOW + 0x200;
    match random.below(40) {
        0..=23 => middle + 64 * random.below(0x60),
        24..=28 => middle + random.below(0x1800),
        29..=31 => WINDOW + PAGE - 1 - random.below(size.min(64)),
        32 => WINDOW + WRITABLE as u64 - 1 - random.below(size.min(64)),
        33 => WINDOW + WRITABLE as u64 + 64 * random.below(32),
        34 => WINDOW + WINDOW_SIZE as u64 - 1 - random.below(size.min(64)),
        35 => WINDOW + WINDOW_SIZE as u64 - size,
        36 => WINDOW - random.below(64),
        37 => random.pick(&[
            0x8000_0000_0000,
            0x7fff_ffff_fff8,
            1 << 63,
            0xffff_7fff_ffff_ffff,
            0x7fff_ffff_f000,
        ]),
        _ => middle + 16 * random.below(0x180),
    }
}

pub(super) fn number(register: Register) -> usize {
    register.full_register().number() & 15
}

/// Makes the explicit memory operand point somewhere sensible, and puts interesting values there.
fn operands(random: &mut Random, insn: &Instruction, bytes: &mut [u8], case: &mut Case) {
    if insn.is_invalid() || !insn.op_kinds().any(|kind| kind == OpKind::Memory) {
        return;
    }
    let size = insn.memory_size().size() as u64;
    let mut wanted = target(random, size);
    let segment = match insn.memory_segment() {
        Register::FS => FS_BASE,
        Register::GS => GS_BASE,
        _ => 0,
    };
    if insn.is_save_restore_instruction() && wanted < segment {
        // Where in a large operand a short address wraps is more than anybody promises.
        wanted = segment.next_multiple_of(64);
    }
    let offset = wanted.wrapping_sub(segment);
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let scale = u64::from(insn.memory_index_scale());
    let gpr = &mut case.state.gpr;
    let bit_string = matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if bit_string && insn.op1_kind() == OpKind::Register && !random.one_in(8) {
        gpr[number(insn.op1_register())] = random.below(0x800).wrapping_sub(0x400);
    }
    if index.is_vector_register() {
        let small = !random.one_in(6);
        for lane in &mut case.state.vector[index.number() & 31] {
            let value = |random: &mut Random| {
                if small { random.below(0x80).wrapping_sub(0x20) } else { random.next() }
            };
            *lane = if random.one_in(2) {
                value(random)
            } else {
                value(random) & 0xffff_ffff | value(random) << 32
            };
        }
        if base.is_gpr() {
            gpr[number(base)] = offset.wrapping_sub(insn.memory_displacement64());
        }
    } else if base == Register::RIP
        || base == Register::EIP
        || (base == Register::None && index == Register::None)
    {
        let constants = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
        let mut decoder = constants;
        let again = decoder.decode();
        let at = decoder.get_constant_offsets(&again);
        let value = if base == Register::None {
            offset
        } else {
            offset.wrapping_sub(case.state.rip).wrapping_sub(u64::from(case.len))
        };
        let (from, len) = (at.displacement_offset(), at.displacement_size());
        if let Some(displacement) = bytes.get_mut(from..from + len) {
            displacement.copy_from_slice(&value.to_le_bytes()[..len]);
        }
    } else {
        if index.is_gpr() && index.full_register() != base.full_register() {
            gpr[number(index)] = if random.one_in(8) {
                values::integer(random)
            } else {
                random.below(0x100).wrapping_sub(0x40)
            };
        }
        let disp = insn.memory_displacement64();
        if base.is_gpr() && index.full_register() == base.full_register() {
            gpr[number(base)] = offset.wrapping_sub(disp) / (1 + scale);
        } else if base.is_gpr() {
            let scaled = if index.is_gpr() { gpr[number(index)].wrapping_mul(scale) } else { 0 };
            gpr[number(base)] = offset.wrapping_sub(disp).wrapping_sub(scaled);
        } else if index.is_gpr() {
            gpr[number(index)] = offset.wrapping_sub(disp) / scale.max(1);
        }
    }
    if !random.one_in(4) {
        patch(random, case, 0, wanted, size.clamp(1, 64) as u16);
    }
}

/// Puts values at an address, if it is in the window.
fn patch(random: &mut Random, case: &mut Case, slot: usize, address: u64, len: u16) {
    let at = address.wrapping_sub(WINDOW);
    if at < WINDOW_SIZE as u64 {
        let patch = &mut case.patches[slot];
        (patch.at, patch.len) = (at as u16, len);
        values::fill(random, &mut patch.bytes[..len as usize]);
    }
}

/// What some instructions need to be worth running.
fn special(random: &mut Random, insn: &Instruction, case: &mut Case) {
    use Mnemonic as M;
    if insn.is_invalid() {
        return;
    }
    if insn.is_string_instruction() {
        for register in [6, 7] {
            case.state.gpr[register] =
                if random.one_in(2) { target(random, 8) } else { WINDOW + 0x400 + random.below(0x1800) };
        }
        if !random.one_in(16) {
            case.state.gpr[1] = random.below(40);
        }
    }
    let wanted = case.patches[0].at;
    match insn.mnemonic() {
        M::Xlatb => case.state.gpr[3] = target(random, 1).wrapping_sub(random.below(256)),
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => case.state.gpr[7] = target(random, 16),
        M::Enter | M::Leave => case.state.gpr[5] = target(random, 8),
        // Quotients that fit are rare among random dividends.
        M::Div | M::Idiv if !random.one_in(4) => {
            case.state.gpr[2] = random.pick(&[0, 0, u64::MAX, 1]);
            if random.one_in(4) {
                case.state.gpr[0] = values::integer(random) >> 32;
            }
        }
        // Nested tasks, identification and single steps are between the kernel and the processor.
        M::Popf | M::Popfd | M::Popfq => {
            let value = random.next() & (STATUS | DF | AC | 0x3202);
            case.patches[0] = Patch { at: (case.state.gpr[4] - WINDOW) as u16, len: 8, bytes: [0; 64] };
            case.patches[0].bytes[..8].copy_from_slice(&value.to_le_bytes());
        }
        M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b if random.one_in(2) => {
            case.patches[0].bytes[..8].copy_from_slice(&case.state.gpr[0].to_le_bytes());
            if insn.mnemonic() == M::Cmpxchg8b {
                case.patches[0].bytes[4..8].copy_from_slice(&(case.state.gpr[2] as u32).to_le_bytes());
            } else {
                case.patches[0].bytes[8..16].copy_from_slice(&case.state.gpr[2].to_le_bytes());
            }
        }
        M::Ldmxcsr | M::Vldmxcsr if !random.one_in(4) => {
            let value = values::mxcsr(random);
            case.patches[0].bytes[..4].copy_from_slice(&value.to_le_bytes());
        }
        M::Fxrstor | M::Fxrstor64 => {
            let value = image(random);
            case.patches[0] = Patch { at: wanted, len: 32, bytes: value };
        }
        M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xrstor
        | M::Xrstor64 => {
            xsave(random, case);
        }
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
            mask(random, insn.op1_register(), case)
        }
        _ if insn.memory_index().is_vector_register() && insn.op_mask() == Register::None => {
            mask(random, insn.op2_register(), case)
        }
        _ => {}
    }
}

/// Stacks that are not where they should be. POPF must pop what it may.
fn stack(random: &mut Random, insn: &Instruction, case: &mut Case) {
    let flags = matches!(insn.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq);
    if insn.is_invalid() || !insn.is_stack_instruction() || flags {
        return;
    }
    match random.below(32) {
        0..=3 => case.state.gpr[4] = target(random, 8),
        4 => case.state.gpr[4] = 1 << 63 | random.next() >> 2,
        _ => {}
    }
}

/// A mask register with more ones than chance has.
fn mask(random: &mut Random, register: Register, case: &mut Case) {
    for word in &mut case.state.vector[register.number() & 31] {
        *word = random.pick(&[u64::MAX, u64::MAX, 0, 1 << 63, 0x8000_0000, random.clone().next()]);
        random.next();
    }
}

/// The beginning of a legacy region that can be loaded.
pub(super) fn image(random: &mut Random) -> [u8; 64] {
    let mut state = State::initial();
    values::x87(random, &mut state);
    if random.one_in(8) {
        values::fill(random, &mut state.x87[..24]);
        // Pointers are canonical.
        state.x87[14..16].fill(0);
        state.x87[22..24].fill(0);
    }
    state.set_mxcsr(values::mxcsr(random) | if random.one_in(16) { 1 << 17 } else { 0 });
    let mut bytes = [0; 64];
    bytes[..32].copy_from_slice(&state.x87[..32]);
    bytes
}

/// An XSAVE area that can be loaded, mostly. Only components that the interpreter has are named.
fn xsave(random: &mut Random, case: &mut Case) {
    case.state.gpr[0] = random.next() & 0xe7;
    case.state.gpr[2] = 0;
    if random.one_in(4) {
        // Parts of the state in their initial configuration.
        if random.one_in(2) {
            case.state.vector = [[0; 8]; 32];
        } else {
            let from = random.pick(&[2, 4]);
            for register in &mut case.state.vector[..16] {
                register[from..].fill(0);
            }
        }
        if random.one_in(2) {
            case.state.vector[16..].fill([0; 8]);
        }
        if random.one_in(2) {
            case.state.opmask = [0; 8];
        }
        if random.one_in(2) {
            case.state.x87 = State::initial().x87;
        }
        if random.one_in(2) {
            case.state.set_mxcsr(0x1f80);
        }
    }
    let at = case.patches[0].at;
    if case.patches[0].len == 0 {
        return;
    }
    case.patches[0] = Patch { at, len: 32, bytes: image(random) };
    let mut header = Patch { at: at.saturating_add(512), len: 64, bytes: [0; 64] };
    header.bytes[0] = random.next() as u8 & 0xe7;
    if random.one_in(3) {
        header.bytes[8] = random.pick(&[0xe7, header.bytes[0], random.clone().next() as u8 & 0xe7]);
        header.bytes[15] = 0x80;
    }
    if random.one_in(8) {
        let at = random.below(63) as usize;
        header.bytes[if matches!(at, 0 | 1 | 8 | 9) { 24 } else { at }] = 1 << 6;
    }
    case.patches[1] = header;
}
