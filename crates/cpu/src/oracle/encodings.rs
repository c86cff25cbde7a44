//! Encodings of every instruction that user code can execute, made from the decoder's own tables.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, MandatoryPrefix, Mnemonic, OpCodeInfo, OpCodeOperandKind,
    OpCodeTableKind,
};

use super::random::Random;

/// All codes that can be tested.
pub(super) fn testable() -> Vec<Code> {
    Code::values().filter(|&code| is_testable(code)).collect()
}

fn is_testable(code: Code) -> bool {
    let info = code.op_code();
    info.is_instruction()
        && info.mode64()
        && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX)
        && info.op_code() <= 0xffff
        && code.cpuid_features().iter().all(|&f| known_feature(f))
        && !excluded(code.mnemonic())
        && info.decoder_option() == 0
        && info
            .op_kinds()
            .iter()
            .all(|kind| !matches!(kind, OpCodeOperandKind::farbr2_2 | OpCodeOperandKind::farbr4_2))
}

/// Whether an instruction, from whatever bytes, can be compared.
pub(super) fn comparable(insn: &Instruction, bytes: &[u8]) -> bool {
    use OpCodeOperandKind as K;
    if insn.is_invalid() {
        return !undocumented(bytes);
    }
    let to_segment = insn
        .op_code()
        .op_kinds()
        .first()
        .is_some_and(|k| matches!(k, K::seg_reg | K::fs | K::gs | K::ss | K::ds | K::es));
    // With both prefixes that widen it, this processor moves it in halves, as faults show.
    let in_halves =
        insn.mnemonic() == Mnemonic::Movbe && insn.memory_size().size() == 8 && bytes.contains(&0x66);
    let far = insn.is_jmp_far_indirect() || insn.is_call_far_indirect();
    let loads_segment = to_segment && matches!(insn.mnemonic(), Mnemonic::Mov | Mnemonic::Pop);
    matches!(insn.code().encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX)
        && insn.cpuid_features().iter().all(|&f| known_feature(f))
        && !(far || loads_segment || in_halves || excluded(insn.mnemonic()))
}

/// Bytes that no manual gives a meaning to, but processors do: VEX-encoded 0F AE.
fn undocumented(bytes: &[u8]) -> bool {
    bytes.windows(4).any(|w| w[0] == 0xc4 && w[1] & 0x1f == 1 && w[3] == 0xae)
        || bytes.windows(3).any(|w| w[0] == 0xc5 && w[2] == 0xae)
}

/// Features that guest and host agree on. What is not named here is either hidden from the guest and there on the host,
/// or the other way round, or unknown.
fn known_feature(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CX8
            | F::CMPXCHG16B
            | F::MULTIBYTENOP
            | F::FSGSBASE
            | F::PAUSE
            | F::SMAP
    ) || crate::native::runs_natively(feature)
}

/// What cannot be compared: results that differ by nature (time, identity, random numbers), system calls, loads of
/// segments (descriptor tables differ), instructions that Linux emulates (UMIP), and what a hypervisor below would answer.
fn excluded(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Rdtsc
            | M::Rdtscp
            | M::Rdpid
            | M::Rdpmc
            | M::Cpuid
            | M::Xgetbv
            | M::Rdrand
            | M::Rdseed
            | M::Syscall
            | M::Sysenter
            | M::Sysexit
            | M::Sysexitq
            | M::Sysret
            | M::Sysretq
            | M::Int
            | M::Int3
            | M::Int1
            | M::Into
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Jmpe
            | M::Retf
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Rdpkru
            | M::Wrpkru
            | M::Getsec
            | M::Vmcall
            | M::Vmmcall
            | M::Wait
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstors
            | M::Xrstors64
            | M::Loadall
            | M::Invlpga
            | M::Umov
    )
}

/// Whether there is a ModRM byte.
fn has_modrm(info: &OpCodeInfo) -> bool {
    use OpCodeOperandKind as K;
    info.group_index() >= 0
        || info.rm_group_index() >= 0
        || info.op_kinds().iter().any(|kind| {
            !matches!(
                kind,
                K::None
                    | K::imm8
                    | K::imm8_const_1
                    | K::imm8sex16
                    | K::imm8sex32
                    | K::imm8sex64
                    | K::imm16
                    | K::imm32
                    | K::imm32sex64
                    | K::imm64
                    | K::al
                    | K::cl
                    | K::ax
                    | K::dx
                    | K::eax
                    | K::rax
                    | K::st0
                    | K::sti_opcode
                    | K::es
                    | K::cs
                    | K::ss
                    | K::ds
                    | K::fs
                    | K::gs
                    | K::seg_rSI
                    | K::es_rDI
                    | K::seg_rBX_al
                    | K::br16_1
                    | K::br32_1
                    | K::br64_1
                    | K::br16_2
                    | K::br32_4
                    | K::br64_4
                    | K::xbegin_2
                    | K::xbegin_4
                    | K::brdisp_2
                    | K::brdisp_4
                    | K::mem_offs
                    | K::r8_opcode
                    | K::r16_opcode
                    | K::r32_opcode
                    | K::r64_opcode
                    | K::xmm_is4
                    | K::ymm_is4
                    | K::xmm_is5
                    | K::ymm_is5
                    | K::imm4_m2z
            )
        })
}

fn is_vsib(kind: &OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        kind,
        K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y | K::mem_vsib32z | K::mem_vsib64z
    )
}

fn needs_memory(info: &OpCodeInfo) -> bool {
    use OpCodeOperandKind as K;
    info.op_kinds().iter().any(|k| matches!(k, K::mem | K::mem_mpx | K::mem_mib | K::sibmem) || is_vsib(k))
}

fn needs_register(info: &OpCodeInfo) -> bool {
    use OpCodeOperandKind as K;
    info.op_kinds().iter().any(|k| {
        matches!(
            k,
            K::r16_rm
                | K::r32_rm
                | K::r64_rm
                | K::mm_rm
                | K::xmm_rm
                | K::ymm_rm
                | K::zmm_rm
                | K::k_rm
                | K::cr_reg
                | K::dr_reg
        )
    })
}

fn needs_sib(info: &OpCodeInfo) -> bool {
    use OpCodeOperandKind as K;
    info.op_kinds().iter().any(|k| matches!(k, K::sibmem | K::mem_mib) || is_vsib(k))
}

fn immediate_len(kind: OpCodeOperandKind) -> usize {
    use OpCodeOperandKind as K;
    match kind {
        K::imm8
        | K::imm8sex16
        | K::imm8sex32
        | K::imm8sex64
        | K::br16_1
        | K::br32_1
        | K::br64_1
        | K::xmm_is4
        | K::ymm_is4 => 1,
        K::imm16 | K::br16_2 | K::xbegin_2 | K::brdisp_2 => 2,
        K::imm32 | K::imm32sex64 | K::br32_4 | K::br64_4 | K::xbegin_4 | K::brdisp_4 => 4,
        K::imm64 | K::mem_offs => 8,
        _ => 0,
    }
}

/// One encoding of `code`, everything that the table leaves open at random.
pub(super) fn encode(code: Code, random: &mut Random) -> Vec<u8> {
    let info = code.op_code();
    let mut out = Vec::with_capacity(16);
    if random.one_in(12) {
        stray_prefixes(random, &mut out);
    }
    // Most memory operands are in plain segments; FS and GS are tried often enough.
    if random.one_in(16) {
        out.push(random.pick(&[0x64, 0x65, 0x64, 0x65, 0x2e, 0x36, 0x3e, 0x26]));
    }
    if info.address_size() == 32 || (info.address_size() == 0 && random.one_in(24)) {
        out.push(0x67);
    }
    if info.can_use_lock_prefix() && random.one_in(3) {
        out.push(0xf0);
    }
    if (info.can_use_rep_prefix() || info.can_use_repne_prefix()) && random.one_in(2) {
        out.push(random.pick(&[0xf2, 0xf3]));
    }
    let modrm = has_modrm(info).then(|| modrm(info, random));
    match info.encoding() {
        EncodingKind::VEX => vex(info, random, &mut out),
        EncodingKind::EVEX => evex(info, random, modrm.is_some_and(|m| m >> 6 != 3), &mut out),
        _ => legacy(info, random, &mut out),
    }
    let low = if info.op_kinds().iter().any(|k| {
        use OpCodeOperandKind as K;
        matches!(k, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode)
    }) {
        random.below(8) as u8
    } else {
        0
    };
    let opcode = info.op_code();
    if info.op_code_len() == 2 {
        out.extend([(opcode >> 8) as u8, opcode as u8 | low]);
    } else {
        out.push(opcode as u8 | low);
    }
    if let Some(modrm) = modrm {
        out.push(modrm);
        if modrm >> 6 != 3 {
            let sib = if modrm & 7 == 4 { Some(random.next() as u8) } else { None };
            out.extend(sib);
            let disp = match modrm >> 6 {
                0 if modrm & 7 == 5 || sib.is_some_and(|s| s & 7 == 5) => 4,
                0 => 0,
                1 => 1,
                _ => 4,
            };
            out.extend(&random.next().to_le_bytes()[..disp]);
        }
    }
    for &kind in info.op_kinds() {
        let len = immediate_len(kind);
        let value = if random.one_in(2) {
            random.next()
        } else {
            random.pick(&[0, 1, 7, 0x7f, 0x80, u64::MAX, 31, 63, 64])
        };
        out.extend(&value.to_le_bytes()[..len]);
    }
    if random.one_in(16) && !out.is_empty() {
        let at = random.below(out.len() as u64) as usize;
        out[at] ^= 1 << random.below(8);
    }
    out
}

fn stray_prefixes(random: &mut Random, out: &mut Vec<u8>) {
    for _ in 0..=random.below(3) {
        out.push(random.pick(&[0x66, 0x66, 0xf2, 0xf3, 0x67, 0xf0, 0x2e, 0x3e, 0x40, 0x48, 0x4f]));
    }
}

fn modrm(info: &OpCodeInfo, random: &mut Random) -> u8 {
    let mut byte = random.next() as u8;
    if needs_memory(info) {
        byte = byte & 0x3f | (random.below(3) as u8) << 6;
    } else if needs_register(info) {
        byte |= 0xc0;
    }
    if needs_sib(info) {
        byte = byte & 0xf8 | 4;
    }
    if info.group_index() >= 0 {
        byte = byte & 0xc7 | (info.group_index() as u8) << 3;
    }
    if info.rm_group_index() >= 0 {
        byte = byte & 0xf8 | info.rm_group_index() as u8;
    }
    byte
}

fn legacy(info: &OpCodeInfo, random: &mut Random, out: &mut Vec<u8>) {
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => out.push(0x66),
        MandatoryPrefix::PF3 => out.push(0xf3),
        MandatoryPrefix::PF2 => out.push(0xf2),
        _ => {}
    }
    if info.operand_size() == 16 && info.mandatory_prefix() != MandatoryPrefix::P66 {
        out.push(0x66);
    }
    let wide = info.operand_size() == 64;
    if wide || random.one_in(3) {
        out.push(
            0x40 | (random.next() as u8 & 7)
                | u8::from(wide || (info.operand_size() == 0 && random.one_in(4))) << 3,
        );
    }
    match info.table() {
        OpCodeTableKind::T0F => out.push(0x0f),
        OpCodeTableKind::T0F38 => out.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => out.extend([0x0f, 0x3a]),
        _ => {}
    }
}

fn vex(info: &OpCodeInfo, random: &mut Random, out: &mut Vec<u8>) {
    use OpCodeOperandKind as K;
    let named = info
        .op_kinds()
        .iter()
        .any(|k| matches!(k, K::r32_vvvv | K::r64_vvvv | K::xmm_vvvv | K::ymm_vvvv | K::k_vvvv));
    let vvvv = if named { random.next() as u8 & 15 } else { 15 };
    let l = if info.is_lig() { random.below(2) as u8 } else { info.l() as u8 };
    let w = if info.is_wig() { random.below(2) as u8 } else { info.w() as u8 };
    let pp = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    let map = match info.table() {
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        _ => 1,
    };
    let rxb = random.next() as u8 & 0xe0;
    let tail = vvvv << 3 | l << 2 | pp;
    if map == 1 && w == 0 && random.one_in(2) {
        out.extend([0xc5, rxb & 0x80 | tail]);
    } else {
        out.extend([0xc4, rxb | map, w << 7 | tail]);
    }
}

fn evex(info: &OpCodeInfo, random: &mut Random, memory: bool, out: &mut Vec<u8>) {
    use OpCodeOperandKind as K;
    let any = |wanted: &[OpCodeOperandKind]| info.op_kinds().iter().any(|k| wanted.contains(k));
    let named = any(&[K::xmm_vvvv, K::ymm_vvvv, K::zmm_vvvv, K::xmmp3_vvvv, K::zmmp3_vvvv]);
    let vvvv = if named { random.next() as u8 & 15 } else { 15 };
    // The fifth bits of registers; general and opmask registers have none.
    let vsib = info.op_kinds().iter().any(is_vsib);
    let v = if named || vsib { random.next() as u8 & 8 } else { 8 };
    let small = any(&[K::r32_reg, K::r64_reg, K::r32_rm, K::r64_rm, K::k_reg, K::kp1_reg]);
    let rxb = random.next() as u8 & 0xf0 | if small { 0x10 } else { 0 };
    let rxb = rxb | if any(&[K::k_reg, K::kp1_reg]) { 0x80 } else { 0 };
    let w = if info.is_wig() { random.below(2) as u8 } else { info.w() as u8 };
    let pp = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    let map = match info.table() {
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        OpCodeTableKind::MAP5 => 5,
        OpCodeTableKind::MAP6 => 6,
        _ => 1,
    };
    let may = if memory {
        info.can_broadcast()
    } else {
        info.can_use_rounding_control() || info.can_suppress_all_exceptions()
    };
    let b = may && random.one_in(2);
    let length = match () {
        () if b && !memory && info.can_use_rounding_control() => random.below(4) as u8,
        () if info.is_lig() => random.below(3) as u8,
        () => info.l() as u8,
    };
    let mask = match () {
        () if info.require_op_mask_register() => 1 + random.below(7) as u8,
        () if info.can_use_op_mask_register() && !random.one_in(3) => random.below(8) as u8,
        () => 0,
    };
    let zeroes = mask != 0 && info.can_use_zeroing_masking() && random.one_in(2);
    out.extend([
        0x62,
        rxb | map,
        w << 7 | vvvv << 3 | 4 | pp,
        u8::from(zeroes) << 7 | length << 5 | u8::from(b) << 4 | v | mask,
    ]);
}
