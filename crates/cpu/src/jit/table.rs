//! What the translator knows of each instruction code, found out when the code is first met.

use iced_x86::{
    Code, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind, OpKind,
};
use skep_hv::cpuid::CpuidTable;

use super::operands::memory_operand;
use crate::native::{self, X87};

/// How an instruction is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Runs as it is, with its operands put in place.
    Plain,
    /// Does nothing.
    Nothing,
    /// LEA.
    Lea,
    Push,
    Pop,
    Leave,
    /// DIV and IDIV of 32 and 64 bits.
    Divide,
    /// Direct jump.
    Jump,
    /// Conditional jump.
    Branch,
    /// Direct call.
    Call,
    /// Near return.
    Return,
    JumpIndirect,
    CallIndirect,
    /// Moves and fills by REP.
    Repeated,
    /// FLDCW.
    LoadControl,
    /// Runs in the interpreter's handler.
    Handler,
}

/// Which field of the encoding names an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    /// None, or no general register.
    None,
    Reg,
    Rm,
    Vvvv,
    Opcode,
}

/// What follows from an instruction's code.
#[derive(Debug, Clone, Copy)]
pub(super) struct Info {
    pub(super) class: Class,
    pub(super) fields: [Field; 4],
    /// The operand in ModRM's second field may be in memory too.
    pub(super) rm_or_mem: bool,
    /// Operands that are written, by bit.
    pub(super) written: u8,
    /// VEX- or EVEX-encoded; else legacy.
    pub(super) vex: bool,
    /// Has a ModRM byte.
    pub(super) modrm: bool,
    /// Status flags change only if a count in CL is not zero.
    pub(super) counted: bool,
    pub(super) vector: bool,
    pub(super) avx: bool,
    /// Needs the vector and opmask registers that AVX-512 adds.
    pub(super) avx512: bool,
    /// Needs their upper halves too.
    pub(super) wide: bool,
    /// Depends on MXCSR.
    pub(super) arithmetic: bool,
    /// The memory operand must be aligned.
    pub(super) aligned: bool,
    /// Works on x87 registers.
    pub(super) x87: Option<X87>,
    /// A high byte may be among its operands.
    pub(super) narrow: bool,
    /// It is not made of its operands alone, or of operands that no code is made for.
    pub(super) strange: bool,
    /// It has an operand in memory.
    pub(super) memory: bool,
    /// Without one, nothing but its length can be in the way of its translation.
    pub(super) simple: bool,
    /// What it writes is not far from what was there.
    pub(super) steps: bool,
    /// Status flags, as RFLAGS bits.
    pub(super) flags_read: u16,
    pub(super) flags_changed: u16,
}

impl Info {
    /// Of something that only its handler knows.
    pub(super) const HANDLER: Self = Self {
        class: Class::Handler,
        fields: [Field::None; 4],
        rm_or_mem: false,
        written: 0,
        vex: false,
        modrm: false,
        counted: false,
        vector: false,
        avx: false,
        avx512: false,
        wide: false,
        arithmetic: false,
        aligned: false,
        x87: None,
        narrow: false,
        strange: false,
        memory: false,
        simple: false,
        steps: false,
        flags_read: 0,
        flags_changed: 0,
    };
}

/// The status flags in RFLAGS.
pub(super) const STATUS_FLAGS: u16 = 0x8d5;

/// All that is known so far.
pub(super) struct Table {
    known: Vec<Option<Info>>,
    factory: InstructionInfoFactory,
}

impl Table {
    pub(super) fn new() -> Self {
        Self { known: vec![None; 2 * Code::values().len()], factory: InstructionInfoFactory::new() }
    }

    #[inline(always)]
    pub(super) fn get(&mut self, insn: &Instruction, cpuid: &CpuidTable) -> &Info {
        let Self { known, factory } = self;
        // With an operand in memory it may be quite another thing.
        let memory = memory_operand(insn).is_some();
        known[2 * insn.code() as usize + usize::from(memory)]
            .get_or_insert_with(|| look(insn, cpuid, factory))
    }
}

#[cold]
fn look(insn: &Instruction, cpuid: &CpuidTable, factory: &mut InstructionInfoFactory) -> Info {
    let encoding = insn.code().encoding();
    let kinds = insn.op_code();
    let mut info = Info {
        fields: std::array::from_fn(|i| kinds.op_kinds().get(i).map_or(Field::None, |&k| field(k))),
        // What rounds in an EVEX prefix broadcasts with an operand in memory.
        rm_or_mem: encoding != EncodingKind::EVEX
            && kinds.op_kinds().iter().any(|&k| {
                use OpCodeOperandKind as K;
                matches!(k, K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem)
            }),
        vex: matches!(encoding, EncodingKind::VEX | EncodingKind::EVEX),
        modrm: has_modrm(insn),
        narrow: kinds.op_kinds().iter().any(|&k| {
            use OpCodeOperandKind as K;
            matches!(k, K::r8_or_mem | K::r8_reg | K::r8_opcode)
        }),
        strange: is_strange(insn),
        memory: memory_operand(insn).is_some(),
        steps: matches!(
            insn.mnemonic(),
            Mnemonic::Add | Mnemonic::Sub | Mnemonic::Inc | Mnemonic::Dec | Mnemonic::Lea
        ),
        flags_read: flags(insn.rflags_read()),
        flags_changed: flags(insn.rflags_modified()),
        ..Info::HANDLER
    };
    if !matches!(encoding, EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX) {
        return info;
    }
    let used = factory.info(insn);
    for i in 0..insn.op_count().min(4) {
        let writes = matches!(
            used.op_access(i),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        info.written |= u8::from(writes) << i;
    }
    if let Some(changed) = counted(insn) {
        // What an instruction says of itself depends on its count.
        info.counted = true;
        info.flags_changed = changed;
        info.flags_read = if matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) { 1 } else { 0 };
    }
    if matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc) {
        // The others are undefined by the book and stay what they are on every processor.
        info.flags_changed = 1;
    }
    info.class = class(insn);
    if info.class != Class::Handler || is_general(insn) {
        if is_general(insn) {
            info.class = Class::Plain;
            info.simple = !info.strange && !info.narrow && insn.mnemonic() != Mnemonic::Xchg;
        }
        return info;
    }
    if let Some(direct) = native::direct(insn, cpuid) {
        info.class = Class::Plain;
        (info.vector, info.avx, info.avx512) = (direct.vector, direct.avx, direct.avx512);
        info.wide = direct.wide;
        (info.arithmetic, info.aligned) = (direct.arithmetic, direct.aligned);
        info.x87 = direct.x87;
        if direct.x87 == Some(X87::Loads) {
            info.class = Class::LoadControl;
        }
    }
    info
}

/// Whether an instruction as it stands for its code must be left to its handler.
fn is_strange(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let memory = memory_operand(insn).is_some();
    let bit_string = matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && memory
        && insn.op_kind(1) == OpKind::Register;
    let implicit = insn.op_kinds().any(|k| k > OpKind::Immediate32to64 && k != OpKind::Memory);
    let size = insn.memory_size().size();
    let short = insn.mnemonic() == M::Lea && insn.op0_register().size() == 2;
    bit_string || implicit || short || insn.mnemonic() != M::Lea && memory && (size == 0 || size > 64)
}

fn flags(bits: u32) -> u16 {
    use iced_x86::RflagsBits as B;
    [(B::CF, 1), (B::PF, 4), (B::AF, 0x10), (B::ZF, 0x40), (B::SF, 0x80), (B::OF, 0x800)]
        .iter()
        .filter(|(bit, _)| bits & bit != 0)
        .fold(0, |all, (_, flag)| all | flag)
}

/// What has a form of its own.
fn class(insn: &Instruction) -> Class {
    use Mnemonic as M;
    // Each of these exists either in 64-bit or in 32-bit code.
    let near = matches!(insn.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32);
    match insn.mnemonic() {
        M::Lea => Class::Lea,
        M::Nop | M::Endbr64 | M::Endbr32 | M::Rdsspd | M::Rdsspq => Class::Nothing,
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw | M::Prefetch => {
            Class::Nothing
        }
        M::Push => match insn.code() {
            Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm8 | Code::Pushq_imm32 => Class::Push,
            Code::Push_r32 | Code::Push_rm32 | Code::Pushd_imm8 | Code::Pushd_imm32 => Class::Push,
            _ => Class::Handler,
        },
        M::Pop if matches!(insn.code(), Code::Pop_r64 | Code::Pop_rm64 | Code::Pop_r32 | Code::Pop_rm32) => {
            Class::Pop
        }
        M::Leave if matches!(insn.code(), Code::Leaveq | Code::Leaved) => Class::Leave,
        M::Div | M::Idiv
            if matches!(insn.code(), Code::Div_rm32 | Code::Div_rm64 | Code::Idiv_rm32 | Code::Idiv_rm64) =>
        {
            Class::Divide
        }
        M::Jmp => match insn.code() {
            _ if near => Class::Jump,
            Code::Jmp_rm64 | Code::Jmp_rm32 => Class::JumpIndirect,
            _ => Class::Handler,
        },
        M::Call => match insn.code() {
            _ if near => Class::Call,
            Code::Call_rm64 | Code::Call_rm32 => Class::CallIndirect,
            _ => Class::Handler,
        },
        M::Ret
            if matches!(insn.code(), Code::Retnq | Code::Retnq_imm16 | Code::Retnd | Code::Retnd_imm16) =>
        {
            Class::Return
        }
        M::Movsb | M::Movsw | M::Movsd | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq
            if insn.is_string_instruction() =>
        {
            Class::Repeated
        }
        _ if insn.code().is_jcc_short_or_near() && near => Class::Branch,
        _ => Class::Handler,
    }
}

/// Integer instructions that every processor has and that need nothing but their operands.
fn is_general(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let general = |i: u32| insn.op_kind(i) != OpKind::Register || insn.op_register(i).is_gpr();
    match insn.mnemonic() {
        M::Add
        | M::Adc
        | M::Sub
        | M::Sbb
        | M::And
        | M::Or
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Mul
        | M::Imul
        | M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd
        | M::Bt
        | M::Bts
        | M::Btr
        | M::Btc
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Xchg
        | M::Xadd
        | M::Cmpxchg
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Clc
        | M::Stc
        | M::Cmc
        | M::Lahf
        | M::Sahf
        | M::Lfence
        | M::Mfence
        | M::Sfence => true,
        M::Bswap => insn.op0_register().size() > 2,
        // Not to control, debug and segment registers, nor the forms with a 64-bit address.
        M::Mov => {
            general(0)
                && general(1)
                && !matches!(
                    insn.code(),
                    Code::Mov_AL_moffs8
                        | Code::Mov_AX_moffs16
                        | Code::Mov_EAX_moffs32
                        | Code::Mov_RAX_moffs64
                        | Code::Mov_moffs8_AL
                        | Code::Mov_moffs16_AX
                        | Code::Mov_moffs32_EAX
                        | Code::Mov_moffs64_RAX
                )
        }
        _ => is_conditional(insn),
    }
}

/// CMOVcc and SETcc.
fn is_conditional(insn: &Instruction) -> bool {
    insn.condition_code() != iced_x86::ConditionCode::None
        && insn.flow_control() == iced_x86::FlowControl::Next
        && !insn
            .op_kinds()
            .any(|k| matches!(k, OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64))
        && insn.code().encoding() == EncodingKind::Legacy
        && (0..insn.op_count()).all(|i| insn.op_kind(i) != OpKind::Register || insn.op_register(i).is_gpr())
}

/// The status flags that shifts and rotates change, if they shift at all.
fn counted(insn: &Instruction) -> Option<u16> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd => Some(STATUS_FLAGS),
        // CF and OF.
        M::Rol | M::Ror | M::Rcl | M::Rcr => Some(0x801),
        _ => None,
    }
}

fn field(kind: OpCodeOperandKind) -> Field {
    use OpCodeOperandKind as K;
    match kind {
        K::r8_reg
        | K::r16_reg
        | K::r32_reg
        | K::r64_reg
        | K::r16_reg_mem
        | K::r32_reg_mem
        | K::r64_reg_mem => Field::Reg,
        K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::r16_rm | K::r32_rm | K::r64_rm => {
            Field::Rm
        }
        K::r32_or_mem_mpx | K::r64_or_mem_mpx => Field::Rm,
        K::r32_vvvv | K::r64_vvvv => Field::Vvvv,
        K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode => Field::Opcode,
        _ => Field::None,
    }
}

fn has_modrm(insn: &Instruction) -> bool {
    let info = insn.op_code();
    info.group_index() >= 0
        || info.rm_group_index() >= 0
        || info.op_kinds().iter().any(|kind| {
            use OpCodeOperandKind as K;
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
                    | K::r8_opcode
                    | K::r16_opcode
                    | K::r32_opcode
                    | K::r64_opcode
                    | K::xbegin_2
                    | K::xbegin_4
                    | K::br64_1
                    | K::br64_4
            )
        })
}
