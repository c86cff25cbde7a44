//! Handlers that run a thunk on general, vector, MMX or x87 registers, with or without a memory operand.

use iced_x86::{
    CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
    RoundingControl,
};
use skep_hv::cpuid::CpuidTable;

use super::gate::{self, Unit};
use super::thunk::{Thunks, uses_mxcsr};
use super::x87::{self, X87};
use super::{moves, opmask};
use crate::cpu::{CodeSize, Cpu};
use crate::fault::{Exec, vector};
use crate::mmu::Access;
use crate::op::{Handler, Op};

/// What a handler needs to know, packed into [`Op::imm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan(pub(super) u64);

impl Plan {
    const ALIGNED: u64 = 1 << 40;
    const ARITHMETIC: u64 = 1 << 41;
    /// Alignment is never checked.
    const UNCHECKED: u64 = 1 << 44;
    /// Runs under the guest's MXCSR.
    const WANTS_MXCSR: u64 = 1 << 46;
    /// Flushes to zero without ever raising underflow.
    const NO_UNDERFLOW: u64 = 1 << 47;
    /// VCVTPS2PH.
    const NARROWING: u64 = 1 << 45;
    /// x87: does not wait for pending exceptions.
    const NO_WAIT: u64 = 1 << 42;
    /// x87: stores whatever exceptions are pending.
    const STORES_ALWAYS: u64 = 1 << 43;

    fn new(offset: u32, size: usize, instruction: u8, modrm: u8) -> Self {
        let size = (size as u64).min(64);
        Self(u64::from(offset) | size << 32 | u64::from(instruction) << 48 | u64::from(modrm) << 56)
    }

    /// The thunk.
    #[inline(always)]
    pub(super) fn thunk(self) -> u32 {
        self.0 as u32 & 0xf_ffff
    }

    /// VCVTPS2PH: the register that it writes, 32 for memory.
    fn narrowing(self) -> Option<usize> {
        (self.0 & Self::NARROWING != 0).then_some((self.0 >> 24) as usize & 0x3f)
    }

    /// Number of the opmask register; 0: none.
    pub(super) fn opmask(self) -> usize {
        (self.0 >> 20) as usize & 7
    }

    /// Bytes of the memory operand.
    #[inline(always)]
    pub(super) fn size(self) -> u64 {
        self.0 >> 32 & 0x7f
    }

    /// The memory operand must be aligned to its size.
    #[inline(always)]
    pub(super) fn aligned(self) -> bool {
        self.0 & Self::ALIGNED != 0
    }

    /// Alignment is never checked, not even where RFLAGS.AC asks for it.
    #[inline(always)]
    pub(super) fn unchecked(self) -> bool {
        self.0 & Self::UNCHECKED != 0
    }

    /// May raise SIMD floating-point exceptions.
    #[inline(always)]
    pub(super) fn arithmetic(self) -> bool {
        self.0 & Self::ARITHMETIC != 0
    }

    /// Runs under the guest's MXCSR.
    #[inline(always)]
    fn wants_mxcsr(self) -> bool {
        self.0 & Self::WANTS_MXCSR != 0
    }

    /// Does not wait for pending x87 exceptions.
    #[inline(always)]
    pub(super) fn no_wait(self) -> bool {
        self.0 & Self::NO_WAIT != 0
    }

    /// Stores whatever x87 exceptions are pending.
    pub(super) fn stores_always(self) -> bool {
        self.0 & Self::STORES_ALWAYS != 0
    }

    /// Offset of the instruction in the thunk.
    pub(super) fn instruction(self) -> u64 {
        self.0 >> 48 & 0xff
    }

    /// The guest's ModRM byte.
    pub(super) fn modrm(self) -> u8 {
        (self.0 >> 56) as u8
    }
}

/// What happens to the memory operand.
pub(super) const NO_MEMORY: u8 = 0;
pub(super) const READ: u8 = 1;
pub(super) const WRITE: u8 = 2;

/// The handler of an instruction that the host's own units execute.
pub(super) fn select(
    insn: &Instruction,
    bytes: &[u8],
    op: &mut Op,
    code: CodeSize,
    thunks: &mut Thunks,
    cpuid: &CpuidTable,
) -> Option<Handler> {
    let hidden_count = matches!(insn.mnemonic(), Mnemonic::Lzcnt | Mnemonic::Tzcnt);
    if !gate::offered(insn, cpuid) {
        // Without the feature F3 means nothing: BSR and BSF.
        if !hidden_count || !gate::offered_by_kind(insn) {
            return None;
        }
        let at = bytes.iter().position(|&b| b == 0xf3)?;
        let without: Vec<u8> = [&bytes[..at], &bytes[at + 1..]].concat();
        let bits = [16, 32, 64][code as usize];
        let scan = iced_x86::Decoder::new(bits, &without, iced_x86::DecoderOptions::NONE).decode();
        return thunk(&scan, &without, op, code, thunks);
    }
    if insn.is_save_restore_instruction() || insn.memory_size().size() > 64 {
        return None;
    }
    if insn.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::XSAVE | CpuidFeature::FXSR)) {
        return None;
    }
    moves::select(insn, op).or_else(|| thunk(insn, bytes, op, code, thunks))
}

fn thunk(
    insn: &Instruction,
    bytes: &[u8],
    op: &mut Op,
    code: CodeSize,
    thunks: &mut Thunks,
) -> Option<Handler> {
    use Mnemonic as M;
    let unit = unit(insn);
    let made = thunks.get(insn, bytes, code, unit)?;
    let access = memory_access(insn)?;
    let mut plan = Plan::new(made.offset, insn.memory_size().size(), made.instruction, made.modrm);
    if must_be_aligned(insn) {
        plan.0 |= Plan::ALIGNED;
    }
    if uses_mxcsr(insn.mnemonic()) {
        // Thunks with an x87 image load MXCSR themselves, behind the image's.
        plan.0 |= if raises_exceptions(insn) { Plan::ARITHMETIC } else { 0 };
        plan.0 |= if matches!(insn.mnemonic(), M::Vreduceps | M::Vreducepd | M::Vreducess | M::Vreducesd) {
            Plan::NO_UNDERFLOW
        } else {
            0
        };
        plan.0 |= if unit == Unit::MmxSse { 0 } else { Plan::WANTS_MXCSR };
    }
    if matches!(insn.mnemonic(), Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph) {
        plan.0 |= Plan::UNCHECKED;
    }
    if insn.mnemonic() == Mnemonic::Vcvtps2ph {
        plan.0 |= Plan::NARROWING | u64::from(vector_number(insn.op0_register()).unwrap_or(32)) << 24;
    }
    if x87::no_wait(insn.mnemonic()) {
        plan.0 |= Plan::NO_WAIT;
    }
    if unit == Unit::Avx512 {
        opmask::describe(insn, op);
        if insn.op_mask() != Register::None {
            plan.0 |= (insn.op_mask().number() as u64 & 7) << 20;
        }
    }
    if unit != Unit::X87 || x87::no_wait(insn.mnemonic()) {
        plan.0 |= Plan::STORES_ALWAYS;
    }
    op.imm = plan.0;
    Some(handler(unit, access))
}

/// Whether an instruction that depends on MXCSR may raise exceptions there.
fn raises_exceptions(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let approximates = matches!(
        insn.mnemonic(),
        M::Vrcp14ps
            | M::Vrcp14pd
            | M::Vrcp14ss
            | M::Vrcp14sd
            | M::Vrsqrt14ps
            | M::Vrsqrt14pd
            | M::Vrsqrt14ss
            | M::Vrsqrt14sd
    );
    let suppressed = insn.suppress_all_exceptions() || insn.rounding_control() != RoundingControl::None;
    !approximates && !suppressed
}

fn handler(unit: Unit, access: u8) -> Handler {
    match (unit, access) {
        (Unit::General, NO_MEMORY) => registers::<{ Unit::GENERAL }>,
        (Unit::General, READ) => load::<{ Unit::GENERAL }>,
        (Unit::General, _) => store::<{ Unit::GENERAL }>,
        (Unit::GeneralVex, NO_MEMORY) => registers::<{ Unit::GENERAL_VEX }>,
        (Unit::GeneralVex, READ) => load::<{ Unit::GENERAL_VEX }>,
        (Unit::GeneralVex, _) => store::<{ Unit::GENERAL_VEX }>,
        (Unit::Sse, NO_MEMORY) => registers::<{ Unit::SSE }>,
        (Unit::Sse, READ) => load::<{ Unit::SSE }>,
        (Unit::Sse, _) => store::<{ Unit::SSE }>,
        (Unit::Avx, NO_MEMORY) => registers::<{ Unit::AVX }>,
        (Unit::Avx, READ) => load::<{ Unit::AVX }>,
        (Unit::Avx, _) => store::<{ Unit::AVX }>,
        (Unit::Avx512, NO_MEMORY) => registers::<{ Unit::AVX_512 }>,
        (Unit::Avx512, READ) => opmask::load,
        (Unit::Avx512, _) => opmask::store,
        (Unit::X87, access) => x87::handler::<{ Unit::FLOAT }>(access),
        (Unit::Mmx, access) => x87::handler::<{ Unit::MMX }>(access),
        (Unit::MmxSse, access) => x87::handler::<{ Unit::MMX_SSE }>(access),
    }
}

/// What the instruction runs on.
fn unit(insn: &Instruction) -> Unit {
    let registers =
        || (0..insn.op_count()).filter(|&i| insn.op_kind(i) == OpKind::Register).map(|i| insn.op_register(i));
    let vex = insn.code().encoding() == EncodingKind::VEX;
    let features = insn.cpuid_features();
    if insn.code().encoding() == EncodingKind::EVEX || registers().any(|r| r.is_k()) {
        return Unit::Avx512;
    }
    let mmx = registers().any(|r| r.is_mm()) || insn.mnemonic() == Mnemonic::Emms;
    if mmx && (registers().any(|r| r.is_xmm()) || uses_mxcsr(insn.mnemonic())) {
        return Unit::MmxSse;
    }
    if mmx {
        return Unit::Mmx;
    }
    if features.contains(&CpuidFeature::FPU)
        || features.iter().any(|f| matches!(f, CpuidFeature::FPU287 | CpuidFeature::FPU387))
    {
        return Unit::X87;
    }
    let general =
        matches!(
            features,
            [CpuidFeature::BMI1
                | CpuidFeature::BMI2
                | CpuidFeature::ADX
                | CpuidFeature::POPCNT
                | CpuidFeature::LZCNT
                | CpuidFeature::MOVBE
                | CpuidFeature::RDRAND
                | CpuidFeature::RDSEED]
        ) || matches!(insn.mnemonic(), Mnemonic::Crc32 | Mnemonic::Movnti | Mnemonic::Bsf | Mnemonic::Bsr);
    match (general, vex) {
        (true, false) => Unit::General,
        (true, true) => Unit::GeneralVex,
        (false, false) => Unit::Sse,
        (false, true) => Unit::Avx,
    }
}

/// How the memory operand is accessed. `None`: in a way that no handler here knows.
pub(super) fn memory_access(insn: &Instruction) -> Option<u8> {
    if !(0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) {
        return Some(NO_MEMORY);
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(insn);
    match info.used_memory() {
        [one] => match one.access() {
            OpAccess::Read | OpAccess::CondRead => Some(READ),
            OpAccess::Write | OpAccess::CondWrite => Some(WRITE),
            _ => None,
        },
        _ => None,
    }
}

/// Legacy SSE instructions want operands of 16 bytes aligned, but for those made for others; VEX-encoded ones only where
/// the name says so (SDM vol. 1 §10.4.1.1, §14.9).
pub(super) fn must_be_aligned(insn: &Instruction) -> bool {
    use Mnemonic as M;
    if insn.code().encoding() != EncodingKind::Legacy {
        return matches!(
            insn.mnemonic(),
            M::Vmovaps
                | M::Vmovdqa32
                | M::Vmovdqa64
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        );
    }
    insn.memory_size().size() == 16
        && !matches!(
            insn.mnemonic(),
            M::Movups
                | M::Movupd
                | M::Movdqu
                | M::Lddqu
                | M::Pcmpestri
                | M::Pcmpestrm
                | M::Pcmpistri
                | M::Pcmpistrm
                | M::Pcmpestri64
                | M::Pcmpestrm64
        )
}

impl Cpu {
    /// Linear address of the memory operand, with the alignment check of vector instructions.
    #[inline(always)]
    pub(super) fn operand(&mut self, op: &Op, size: u64, aligned: bool, access: Access) -> Exec<u64> {
        let linear = self.linear(op, size, access)?;
        if aligned && linear & (size - 1) != 0 {
            return Err(self.gp(0));
        }
        Ok(linear)
    }

    /// Runs the thunk, raising SIMD floating-point exceptions.
    #[inline(always)]
    pub(super) fn run_thunk(&mut self, plan: Plan) -> Exec {
        if plan.arithmetic() && self.fpu.frame.mxcsr & MASKS != MASKS {
            return self.run_unmasked(plan);
        }
        self.call(plan);
        Ok(())
    }

    #[inline(always)]
    fn call(&mut self, plan: Plan) {
        if plan.wants_mxcsr() {
            self.call_arithmetic(plan.thunk());
        } else {
            self.call_thunk(plan.thunk());
        }
    }

    /// Some exception is unmasked: the instruction runs masked, and what it would have raised follows from the flags.
    #[cold]
    #[inline(never)]
    fn run_unmasked(&mut self, plan: Plan) -> Exec {
        let guest = self.fpu.frame.mxcsr;
        let never = if plan.0 & Plan::NO_UNDERFLOW != 0 { UNDERFLOW } else { 0 };
        let unmasked = !(guest >> 7) & FLAGS & !never;
        let before = Undo {
            vector: self.fpu.frame.vector,
            opmask: self.fpu.frame.opmask,
            x87: self.fpu.frame.x87,
            regs: self.regs.clone(),
            status: self.status,
        };
        let attempt = |cpu: &mut Self, flush: u32| {
            cpu.fpu.frame.mxcsr = guest & !(FLAGS | FLUSH_TO_ZERO) | MASKS | flush;
            cpu.call(plan);
            cpu.fpu.frame.mxcsr & FLAGS
        };
        let mut raised = 0;
        if unmasked & UNDERFLOW != 0 {
            // Unmasked, underflow is raised for tiny results even if they are exact. Flushing tells.
            raised |= attempt(self, FLUSH_TO_ZERO) & UNDERFLOW;
            before.restore(self);
        }
        // Flush-to-zero works only while underflow is masked.
        let flush = if unmasked & UNDERFLOW == 0 { guest & FLUSH_TO_ZERO } else { 0 };
        raised |= attempt(self, flush);
        if unmasked & UNDERFLOW != 0 && self.narrowed_to_denormal(plan, self.opmask(plan)) {
            raised |= UNDERFLOW;
        }
        if raised & unmasked == 0 {
            self.fpu.frame.mxcsr = guest | raised;
            return Ok(());
        }
        before.restore(self);
        // An unmasked exception found before computing keeps the rest from happening (SDM vol. 1 §11.5.2).
        if raised & unmasked & BEFORE != 0 {
            raised &= BEFORE;
        }
        self.fpu.frame.mxcsr = guest | raised;
        Err(self.simd_exception())
    }

    /// Whether VCVTPS2PH, which knows no flush to zero, has produced a denormal in an element that `mask` selects.
    fn narrowed_to_denormal(&self, plan: Plan, mask: u64) -> bool {
        let denormal = |lane: &[u8]| lane[1] & 0x7c == 0 && (lane[1] & 3 | lane[0]) != 0;
        let (bytes, size) = match plan.narrowing() {
            Some(32) => (self.fpu.frame.operand, plan.size() as usize),
            Some(n) => (self.fpu.bytes(n), 32),
            None => return false,
        };
        let mut lanes = bytes[..size.min(64)].chunks_exact(2).enumerate();
        lanes.any(|(i, lane)| mask >> i & 1 != 0 && denormal(lane))
    }

    #[cold]
    fn simd_exception(&mut self) -> crate::fault::Abort {
        let enabled = self.cr4 & crate::cpu::cr4::OSXMMEXCPT != 0;
        self.trap(if enabled { vector::XM } else { vector::UD })
    }
}

/// MXCSR: exception masks.
const MASKS: u32 = 0x1f80;
/// MXCSR: exception flags.
const FLAGS: u32 = 0x3f;
/// Invalid, denormal, divide by zero: found before computing.
const BEFORE: u32 = 0x7;
const UNDERFLOW: u32 = 0x10;
const FLUSH_TO_ZERO: u32 = 0x8000;

/// What a thunk may have written.
struct Undo {
    vector: [[u64; 8]; 32],
    opmask: [u64; 8],
    x87: [u8; 512],
    regs: crate::regs::Regs,
    status: u16,
}

impl Undo {
    fn restore(&self, cpu: &mut Cpu) {
        cpu.fpu.frame.vector = self.vector;
        cpu.fpu.frame.opmask = self.opmask;
        cpu.fpu.frame.x87 = self.x87;
        cpu.regs = self.regs.clone();
        cpu.status = self.status;
    }
}

/// Registers only.
fn registers<const UNIT: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.unit::<UNIT>()?;
    cpu.run_thunk(Plan(op.imm))
}

/// Reads a memory operand.
fn load<const UNIT: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.unit::<UNIT>()?;
    let plan = Plan(op.imm);
    let linear = cpu.operand(op, plan.size(), plan.aligned(), Access::Read)?;
    if plan.unchecked() {
        cpu.load_unchecked(linear, plan.size())?;
    } else {
        cpu.load_operand(linear, plan.size())?;
    }
    cpu.run_thunk(plan)
}

/// Writes a memory operand.
fn store<const UNIT: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.unit::<UNIT>()?;
    let plan = Plan(op.imm);
    let linear = cpu.operand(op, plan.size(), plan.aligned(), Access::Write)?;
    // Exceptions of the computation come before those of the store, and its flags stay even if the store faults.
    cpu.run_thunk(plan)?;
    if plan.unchecked() {
        cpu.store_unchecked(linear, plan.size())
    } else {
        cpu.store_operand(linear, plan.size())
    }
}

/// Number of a vector register.
pub(super) fn vector_number(register: Register) -> Option<u8> {
    register.is_vector_register().then(|| (register.number() & 31) as u8)
}

/// What a translator must know to let an instruction run as it is, but for its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Direct {
    /// Works on vector registers.
    pub(crate) vector: bool,
    /// AVX: the upper halves must be enabled.
    pub(crate) avx: bool,
    /// AVX-512: the registers that it adds must be the guest's.
    pub(crate) avx512: bool,
    /// Has operands of 512 bits.
    pub(crate) wide: bool,
    /// Depends on MXCSR, or raises exceptions there.
    pub(crate) arithmetic: bool,
    /// The memory operand must be aligned to its size.
    pub(crate) aligned: bool,
    /// Works on x87 registers.
    pub(crate) x87: Option<X87>,
}

/// Whether the host's own units may execute `insn` on the guest's registers in place. `None`: only by its handler.
pub(crate) fn direct(insn: &Instruction, cpuid: &CpuidTable) -> Option<Direct> {
    use Mnemonic as M;
    let zeroes = matches!(insn.mnemonic(), M::Vzeroupper | M::Vzeroall);
    if !gate::offered(insn, cpuid) || insn.is_save_restore_instruction() || insn.memory_size().size() > 64 {
        return None;
    }
    let elsewhere = matches!(
        insn.mnemonic(),
        M::Ldmxcsr
            | M::Vldmxcsr
            | M::Stmxcsr
            | M::Vstmxcsr
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Clflush
            | M::Clflushopt
            | M::Clwb
            | M::Cldemote
            | M::Vcvtps2ph
            // Makes room for other processors now and then.
            | M::Pause
    ) || insn.is_vsib()
        || insn.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::XSAVE | CpuidFeature::FXSR));
    if elsewhere {
        return None;
    }
    let unit = unit(insn);
    let (vector, avx, avx512) = match unit {
        Unit::General | Unit::GeneralVex => (false, false, false),
        Unit::Sse => (true, false, false),
        Unit::Avx => (true, true, false),
        Unit::Avx512 => (true, true, true),
        Unit::X87 => (false, false, false),
        Unit::Mmx | Unit::MmxSse => return None,
    };
    let x87 = if unit == Unit::X87 { Some(x87::direct(insn)?) } else { None };
    if !zeroes && unit == Unit::Avx && insn.op_count() == 0 {
        return None;
    }
    memory_access(insn)?;
    let (arithmetic, aligned) = (uses_mxcsr(insn.mnemonic()), must_be_aligned(insn));
    let zmm = |i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_zmm();
    let wide = (0..insn.op_count()).any(zmm) || insn.memory_size().size() == 64;
    Some(Direct { vector, avx, avx512, wide, arithmetic, aligned, x87 })
}
