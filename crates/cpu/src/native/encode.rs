//! Re-encoding in place: the instruction keeps its opcode, prefixes and operands, but its memory operand becomes
//! `[base + disp32]`, RSP as an operand becomes another register, and the whole becomes valid in 64-bit mode.

use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix, OpCodeOperandKind, OpKind,
    Register,
};

use crate::cpu::CodeSize;

/// Longest instruction.
const LONGEST: usize = 15;

/// A re-encoded instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Encoded {
    pub(super) bytes: Vec<u8>,
    /// ModRM byte of the original (for FOP).
    pub(super) modrm: u8,
}

/// What to change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    /// Number (0-7, neither RSP) of the register that points to the frame.
    pub(super) base: u8,
    /// Where the memory operand lies from there.
    pub(super) disp: i32,
    /// Number (0-7) of the register to stand in for RSP.
    pub(super) instead_of_rsp: u8,
}

/// The parts of an instruction.
struct Parts<'a> {
    /// Legacy prefixes that stay, in order.
    prefixes: Vec<u8>,
    /// REX, if present (64-bit mode).
    rex: Option<u8>,
    /// VEX or EVEX bytes, if so encoded.
    vex: &'a [u8],
    /// Escape and opcode bytes.
    opcode: &'a [u8],
    modrm: Option<u8>,
    /// Immediates.
    tail: &'a [u8],
}

/// Splits `bytes` up. `None` if they are not what [`encode`] is for.
fn split<'a>(insn: &Instruction, bytes: &'a [u8], code: CodeSize) -> Option<Parts<'a>> {
    let mut at = 0;
    let mut prefixes = Vec::new();
    let mut address_override = false;
    loop {
        match *bytes.get(at)? {
            0x67 => address_override = true,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
            prefix @ (0x66 | 0xf2 | 0xf3) => prefixes.push(prefix),
            _ => break,
        }
        at += 1;
    }
    let mut rex = None;
    if code == CodeSize::Bits64 && bytes.get(at)? & 0xf0 == 0x40 {
        rex = Some(bytes[at]);
        at += 1;
        // A REX prefix that another prefix follows does not count; then decoding goes on behind it.
        if matches!(bytes.get(at)?, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf2 | 0xf3 | 0x40..=0x4f) {
            let mut rest = split(insn, &bytes[at..], code)?;
            prefixes.append(&mut rest.prefixes);
            rest.prefixes = prefixes;
            return Some(rest);
        }
    }
    let mut vex: &[u8] = &[];
    let opcode;
    match insn.code().encoding() {
        EncodingKind::VEX => {
            let len = match bytes.get(at)? {
                0xc5 => 2,
                0xc4 => 3,
                _ => return None,
            };
            vex = bytes.get(at..at + len)?;
            at += len;
            opcode = bytes.get(at..=at)?;
        }
        EncodingKind::EVEX => {
            vex = bytes.get(at..at + 4)?;
            at += vex.len();
            opcode = bytes.get(at..=at)?;
        }
        EncodingKind::Legacy => {
            let len = match bytes.get(at..)? {
                [0x0f, 0x38 | 0x3a, ..] => 3,
                [0x0f, ..] => 2,
                _ => 1,
            };
            opcode = bytes.get(at..at + len)?;
        }
        _ => return None,
    }
    at += opcode.len();
    let mut modrm = None;
    if has_modrm(insn) {
        let byte = *bytes.get(at)?;
        modrm = Some(byte);
        let sixteen = match code {
            CodeSize::Bits16 => !address_override,
            CodeSize::Bits32 => address_override,
            CodeSize::Bits64 => false,
        };
        at += 1 + operand_len(byte, bytes.get(at + 1), sixteen)?;
    }
    let tail = bytes.get(at..)?;
    Some(Parts { prefixes, rex, vex, opcode, modrm, tail })
}

/// Whether the instruction has a ModRM byte: all that come here do, but for EMMS, VZEROUPPER and their like.
fn has_modrm(insn: &Instruction) -> bool {
    let info = insn.op_code();
    info.group_index() >= 0
        || info.rm_group_index() >= 0
        || info.op_kinds().iter().any(|kind| {
            use OpCodeOperandKind as K;
            !matches!(
                kind,
                K::None | K::imm8 | K::imm16 | K::imm32 | K::al | K::ax | K::eax | K::rax | K::dx | K::cl | K::st0 | K::sti_opcode
            )
        })
        // x87 instructions on registers: the second byte is, in form, a ModRM byte.
        || insn.op_code().op_code_len() == 2
        || (insn.code().encoding() == EncodingKind::Legacy && (0xd8..=0xdf).contains(&(info.op_code() >> 8 & 0xff)))
}

/// Bytes of SIB and displacement behind a ModRM byte.
fn operand_len(modrm: u8, sib: Option<&u8>, sixteen: bool) -> Option<usize> {
    let (kind, rm) = (modrm >> 6, modrm & 7);
    Some(match (kind, sixteen) {
        (3, _) => 0,
        (0, true) => 2 * usize::from(rm == 6),
        (_, true) => usize::from(kind),
        (_, false) => {
            let sib_base = if rm == 4 { Some(sib? & 7) } else { None };
            let disp = match kind {
                0 if rm == 5 || sib_base == Some(5) => 4,
                0 => 0,
                1 => 1,
                _ => 4,
            };
            disp + usize::from(rm == 4)
        }
    })
}

/// Re-encodes. `None`: not an instruction that this can be done with.
pub(super) fn encode(insn: &Instruction, bytes: &[u8], code: CodeSize, target: Target) -> Option<Encoded> {
    if bytes.len() > LONGEST {
        return None;
    }
    let mut parts = split(insn, bytes, code)?;
    let original = parts.modrm.unwrap_or(0);
    let info = insn.op_code();
    let legacy_mode = code != CodeSize::Bits64;
    if legacy_mode && parts.vex.is_empty() && info.mandatory_prefix() != MandatoryPrefix::P66 {
        // 66 means "the other size": what it is here depends on the mode.
        parts.prefixes.retain(|&p| p != 0x66);
        if info.operand_size() == 16 {
            parts.prefixes.insert(0, 0x66);
        }
    }
    let memory = parts.modrm.is_some_and(|m| m >> 6 != 3);
    let rsp = RspFields::of(insn);
    if let Some(modrm) = &mut parts.modrm {
        if memory {
            *modrm = 0x80 | *modrm & 0x38 | target.base;
        }
        if rsp.reg {
            *modrm = *modrm & 0xc7 | target.instead_of_rsp << 3;
        }
        if rsp.rm {
            *modrm = *modrm & 0xf8 | target.instead_of_rsp;
        }
    }
    if let Some(rex) = &mut parts.rex
        && memory
    {
        *rex &= !3;
    }
    let mut out = Vec::with_capacity(LONGEST);
    // Of several prefixes the last F2 or F3 counts, and one 66.
    out.extend(parts.prefixes.iter().find(|&&p| p == 0x66));
    out.extend(parts.prefixes.iter().rfind(|&&p| p != 0x66));
    out.extend(parts.rex);
    match *parts.vex {
        [escape, mut r_vvvv] => {
            if legacy_mode {
                r_vvvv |= 0xc0;
            }
            if rsp.vvvv {
                r_vvvv = r_vvvv & 0x87 | (!target.instead_of_rsp & 0xf) << 3;
            }
            out.extend([escape, r_vvvv]);
        }
        [escape, mut rxb_map, mut w_vvvv] => {
            if legacy_mode {
                rxb_map |= 0xe0;
                w_vvvv |= 0x40;
                if !info.is_wig() {
                    w_vvvv = w_vvvv & 0x7f | (info.w() as u8) << 7;
                }
            }
            if memory {
                rxb_map |= 0x60;
            }
            if rsp.vvvv {
                w_vvvv = w_vvvv & 0x87 | (!target.instead_of_rsp & 0xf) << 3;
            }
            out.extend([escape, rxb_map, w_vvvv]);
        }
        [escape, mut rxb_map, mut w_vvvv, mut last] => {
            if legacy_mode {
                // Registers above 7 do not exist; where their bits are not ignored, they are all ones.
                rxb_map |= 0xf0;
                w_vvvv |= 0x40;
                last |= 8;
                if !info.is_wig() {
                    w_vvvv = w_vvvv & 0x7f | (info.w() as u8) << 7;
                }
            }
            if memory {
                rxb_map |= 0x60;
            }
            out.extend([escape, rxb_map, w_vvvv, last]);
        }
        _ => {}
    }
    out.extend(parts.opcode);
    out.extend(parts.modrm);
    if memory {
        out.extend(target.disp.to_le_bytes());
    }
    out.extend(parts.tail);
    if legacy_mode && is4(insn) {
        // The register in the immediate has three bits outside 64-bit mode.
        *out.last_mut()? &= 0x7f;
    }
    verify(insn, &out).then_some(Encoded { bytes: out, modrm: original })
}

fn is4(insn: &Instruction) -> bool {
    insn.op_code()
        .op_kinds()
        .iter()
        .any(|k| matches!(k, OpCodeOperandKind::xmm_is4 | OpCodeOperandKind::ymm_is4))
}

/// Which fields of the encoding name RSP as an operand.
#[derive(Default)]
struct RspFields {
    reg: bool,
    rm: bool,
    vvvv: bool,
}

impl RspFields {
    fn of(insn: &Instruction) -> Self {
        use OpCodeOperandKind as K;
        let mut fields = Self::default();
        for (i, kind) in insn.op_code().op_kinds().iter().enumerate() {
            let i = i as u32;
            if insn.op_kind(i) != OpKind::Register || insn.op_register(i).full_register() != Register::RSP {
                continue;
            }
            match kind {
                K::r8_reg | K::r16_reg | K::r32_reg | K::r64_reg => fields.reg = true,
                K::r32_vvvv | K::r64_vvvv => fields.vvvv = true,
                _ => fields.rm = true,
            }
        }
        fields
    }
}

/// Whether the re-encoded bytes are the same instruction with the same vector registers. Nothing else reaches the host.
fn verify(insn: &Instruction, bytes: &[u8]) -> bool {
    let again = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    let same_code = again.code() == insn.code() && again.code() != Code::INVALID;
    let same_mask = again.op_mask() == insn.op_mask() && again.zeroing_masking() == insn.zeroing_masking();
    let same_rounding = again.rounding_control() == insn.rounding_control()
        && again.suppress_all_exceptions() == insn.suppress_all_exceptions()
        && again.is_broadcast() == insn.is_broadcast();
    same_code
        && same_mask
        && same_rounding
        && again.len() == bytes.len()
        && again.op_count() == insn.op_count()
        && (0..insn.op_count()).all(|i| match insn.op_kind(i) {
            OpKind::Register => {
                let (a, b) = (insn.op_register(i), again.op_register(i));
                again.op_kind(i) == OpKind::Register
                    && (a == b || a.full_register() == Register::RSP && b.is_gpr())
            }
            OpKind::Memory => again.op_kind(i) == OpKind::Memory,
            kind => again.op_kind(i) == kind && again.immediate(i) == insn.immediate(i),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Target = Target { base: 7, disp: 0x800, instead_of_rsp: 6 };

    fn encoded(code: CodeSize, bytes: &[u8]) -> Option<Vec<u8>> {
        let bits = [16, 32, 64][code as usize];
        let insn = Decoder::new(bits, bytes, DecoderOptions::NONE).decode();
        assert_eq!(insn.len(), bytes.len(), "{bytes:02x?} is {insn:?}");
        encode(&insn, bytes, code, TARGET).map(|e| e.bytes)
    }

    #[test]
    fn memory_operands_move_to_the_frame() {
        use CodeSize::{Bits16, Bits32, Bits64};
        let cases: &[(CodeSize, &[u8], &[u8])] = &[
            // addps xmm1, fs:[r12+r13*4+0x10]
            (Bits64, b"\x64\x43\x0f\x58\x4c\xac\x10", b"\x40\x0f\x58\x8f\x00\x08\x00\x00"),
            // addps xmm9, [rip+1]
            (Bits64, b"\x44\x0f\x58\x0d\x01\x00\x00\x00", b"\x44\x0f\x58\x8f\x00\x08\x00\x00"),
            // vaddps ymm1, ymm2, [r8]
            (Bits64, b"\xc4\xc1\x6c\x58\x08", b"\xc4\xe1\x6c\x58\x8f\x00\x08\x00\x00"),
            // pinsrd xmm0, esp, 3
            (Bits64, b"\x66\x0f\x3a\x22\xc4\x03", b"\x66\x0f\x3a\x22\xc6\x03"),
            // andn rsp, rsp, rsp
            (Bits64, b"\xc4\xe2\xd8\xf2\xe4", b"\xc4\xe2\xc8\xf2\xf6"),
            // fadd dword ptr [bx+si+1]
            (Bits16, b"\xd8\x40\x01", b"\xd8\x87\x00\x08\x00\x00"),
            // fadd dword ptr [1234h] with a 16-bit address
            (Bits32, b"\x67\xd8\x06\x34\x12", b"\xd8\x87\x00\x08\x00\x00"),
            // popcnt eax, ecx in a 16-bit segment
            (Bits16, b"\x66\xf3\x0f\xb8\xc1", b"\xf3\x0f\xb8\xc1"),
            // popcnt ax, cx in a 16-bit segment
            (Bits16, b"\xf3\x0f\xb8\xc1", b"\x66\xf3\x0f\xb8\xc1"),
            // emms; fsin
            (Bits32, b"\x0f\x77", b"\x0f\x77"),
            (Bits64, b"\xd9\xfe", b"\xd9\xfe"),
            // pshufd xmm1, [rsp], 0x1b
            (Bits64, b"\x66\x0f\x70\x0c\x24\x1b", b"\x66\x0f\x70\x8f\x00\x08\x00\x00\x1b"),
            // REX that does not count, before 66
            (Bits64, b"\x4f\x66\x0f\x58\xc1", b"\x66\x0f\x58\xc1"),
        ];
        for (code, from, to) in cases {
            assert_eq!(encoded(*code, from).as_deref(), Some(*to), "{from:02x?}");
        }
    }

    #[test]
    fn random_bytes_are_re_encoded_or_refused() {
        let mut seed = 1u64;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        let mut done = 0;
        for _ in 0..300_000 {
            let mut bytes = [0; 16];
            for chunk in bytes.chunks_mut(8) {
                chunk.copy_from_slice(&random().to_le_bytes());
            }
            let r = random();
            match r % 4 {
                0 => bytes[0] = 0x0f,
                1 => (bytes[0], bytes[1]) = (0x66, 0x0f),
                2 => bytes[0] = if r & 8 == 0 { 0xc4 } else { 0xc5 },
                _ => bytes[0] = 0xd8 | (r >> 8) as u8 & 7,
            }
            for code in [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64] {
                let bits = [16, 32, 64][code as usize];
                let insn = Decoder::new(bits, &bytes, DecoderOptions::NONE).decode();
                // Vectors of addresses and implicit memory operands have handlers of their own.
                let plain = insn.op_kinds().all(|k| k <= OpKind::Immediate32to64 || k == OpKind::Memory)
                    && !insn.memory_index().is_vector_register();
                if plain && !insn.is_invalid() && super::super::gate::offered_by_kind(&insn) {
                    let bytes = &bytes[..insn.len()];
                    let result = encode(&insn, bytes, code, TARGET);
                    assert!(result.is_some(), "{code:?} {bytes:02x?} {:?}", insn.code());
                    done += 1;
                }
            }
        }
        assert!(done > 10_000, "{done}");
    }
}
