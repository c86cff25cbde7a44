//! Thunks: small functions that load the guest's registers, run one re-encoded instruction, and store what it wrote.

use std::collections::HashMap;
use std::io;
use std::mem::offset_of;

use iced_x86::{
    CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use skep_hv::cpuid::CpuidTable;

use super::arena::Arena;
use super::encode::{self, Target};
use super::fpu::Frame;
use super::gate::{self, Unit};
use crate::cpu::{CodeSize, Cpu};

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
const RSP: u8 = 4;
const RBP: u8 = 5;
const RSI: u8 = 6;
const RDI: u8 = 7;

/// A thunk as handlers use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Thunk {
    /// Offset in the arena.
    pub(super) offset: u32,
    /// Where in the thunk the instruction itself stands.
    pub(super) instruction: u8,
    /// ModRM byte of the guest's instruction.
    pub(super) modrm: u8,
}

/// All thunks of one processor.
pub(crate) struct Thunks {
    arena: Arena,
    /// By the code of the whole thunk: instructions that differ in their memory operand alone share one.
    known: HashMap<Box<[u8]>, u32>,
    /// The guest has AVX-512: what a VEX-encoded instruction writes it clears as far up as ZMM registers go.
    wide: bool,
    factory: InstructionInfoFactory,
}

impl Thunks {
    /// Makes an empty store. Fails where the system denies executable memory.
    pub(crate) fn new(cpuid: &CpuidTable) -> io::Result<Self> {
        let wide = gate::feature(CpuidFeature::AVX512F, cpuid);
        let factory = InstructionInfoFactory::new();
        Ok(Self { arena: Arena::new()?, known: HashMap::new(), wide, factory })
    }

    /// Little room is left: drop all decoded blocks, then [`Thunks::clear`], before decoding another block.
    pub(crate) fn full(&self) -> bool {
        self.arena.full()
    }

    /// Forgets all thunks. No [`crate::op::Op`] that was made before may run after.
    pub(crate) fn clear(&mut self) {
        self.arena.clear();
        self.known.clear();
    }

    /// Address of a thunk's code.
    #[inline(always)]
    pub(super) fn address(&self, offset: u32) -> u64 {
        self.arena.address(offset)
    }

    /// The thunk for an instruction that [`super::gate`] offers. `None` if it cannot be re-encoded, or there is no room.
    pub(super) fn get(
        &mut self,
        insn: &Instruction,
        bytes: &[u8],
        code: CodeSize,
        unit: Unit,
    ) -> Option<Thunk> {
        let uses = Uses::of(insn, unit, self.wide, &mut self.factory)?;
        let target = Target { base: uses.frame, disp: OPERAND, instead_of_rsp: uses.instead_of_rsp };
        let encoded = encode::encode(insn, bytes, code, target)?;
        let (body, instruction) = uses.emit(&encoded.bytes);
        let offset = match self.known.get(body.as_slice()) {
            Some(&offset) => offset,
            None => {
                let offset = self.arena.add(&body)?;
                self.known.insert(body.into_boxed_slice(), offset);
                offset
            }
        };
        Some(Thunk { offset, instruction, modrm: encoded.modrm })
    }
}

const OPERAND: i32 = offset_of!(Frame, operand) as i32;
const X87: i32 = offset_of!(Frame, x87) as i32;
const MXCSR: i32 = offset_of!(Frame, mxcsr) as i32;
const HOST_MXCSR: i32 = offset_of!(Frame, host_mxcsr) as i32;
const REGS: i32 = offset_of!(Cpu, regs) as i32;
const STATUS: i32 = offset_of!(Cpu, status) as i32;

/// How much of a vector register is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Xmm,
    Ymm,
    Zmm,
}

fn opmask_at(n: u8) -> i32 {
    (offset_of!(Frame, opmask) + 8 * n as usize) as i32
}

fn vector_at(n: u8) -> i32 {
    (offset_of!(Frame, vector) + 64 * n as usize) as i32
}

/// What an instruction reads and writes, and which registers of the host serve it.
struct Uses {
    /// General registers, by bit.
    gpr: u16,
    /// Those it may write.
    gpr_written: u16,
    /// Vector registers, by bit.
    vector: u32,
    /// Those it may write.
    vector_written: u32,
    /// Opmask registers, by bit.
    opmask: u32,
    /// Those it may write.
    opmask_written: u32,
    /// Status flags matter, in or out.
    flags: bool,
    /// Status flags change.
    flags_written: bool,
    /// MXCSR is loaded and stored here: elsewhere that is the caller's affair.
    mxcsr: bool,
    x87: bool,
    /// How much of a vector register is loaded, and how much is stored.
    loaded: Width,
    stored: Width,
    /// Host register that points to the frame.
    frame: u8,
    /// Host register that points to the processor.
    cpu: u8,
    /// Host register that holds the guest's RSP.
    instead_of_rsp: u8,
}

impl Uses {
    fn of(insn: &Instruction, unit: Unit, wide: bool, factory: &mut InstructionInfoFactory) -> Option<Self> {
        let (loaded, stored) = match (insn.code().encoding(), unit) {
            (_, Unit::Avx512) => (Width::Zmm, Width::Zmm),
            (EncodingKind::VEX, Unit::Avx) => (Width::Ymm, if wide { Width::Zmm } else { Width::Ymm }),
            _ => (Width::Xmm, Width::Xmm),
        };
        let mut uses = Self {
            gpr: 0,
            gpr_written: 0,
            vector: 0,
            vector_written: 0,
            opmask: 0,
            opmask_written: 0,
            flags: (insn.rflags_read() | insn.rflags_modified()) & STATUS_FLAGS != 0,
            flags_written: insn.rflags_modified() & STATUS_FLAGS != 0,
            mxcsr: uses_mxcsr(insn.mnemonic()) && unit == Unit::MmxSse,
            x87: matches!(unit, Unit::X87 | Unit::Mmx | Unit::MmxSse),
            loaded,
            stored,
            frame: RDI,
            cpu: RSI,
            instead_of_rsp: RSP,
        };
        let has_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        let info = factory.info(insn);
        for used in info.used_registers() {
            let register = used.register();
            let written = matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            if register.is_gpr() {
                let bit = 1u16.checked_shl(register.full_register().number() as u32)?;
                uses.gpr |= bit;
                uses.gpr_written |= if written { bit } else { 0 };
                continue;
            }
            let (all, out) = if register.is_vector_register() {
                (&mut uses.vector, &mut uses.vector_written)
            } else if register.is_k() {
                (&mut uses.opmask, &mut uses.opmask_written)
            } else {
                continue;
            };
            let bit = 1u32.checked_shl(register.number() as u32)?;
            *all |= bit;
            if written {
                *out |= bit;
            }
        }
        // The registers of the memory operand's address are not the instruction's own.
        if has_memory {
            for register in [insn.memory_base(), insn.memory_index()] {
                if register.is_gpr() && !names(insn, register) {
                    let bit = 1u16.checked_shl(register.full_register().number() as u32)?;
                    if uses.gpr_written & bit == 0 && !reads_implicitly(insn.mnemonic(), register) {
                        uses.gpr &= !bit;
                    }
                }
            }
        }
        let mut taken = uses.gpr | 1 << RSP;
        if uses.flags {
            taken |= 1 << RAX;
        }
        let mut choose = |from: &[u8]| {
            let chosen = from.iter().copied().find(|&r| taken & 1 << r == 0)?;
            taken |= 1 << chosen;
            Some(chosen)
        };
        // The one in the memory operand must do without REX.B, which other operands may not bear.
        uses.frame = choose(if has_memory { &[RDI, RDX, RCX, RAX] } else { &[RDI, RDX, RCX, RAX, 8, 9] })?;
        uses.cpu = choose(&[RSI, 10, 11, 8, 9])?;
        if uses.gpr & 1 << RSP != 0 {
            uses.instead_of_rsp = choose(&[RAX, RCX, RDX, RBX, RBP, RSI, RDI])?;
        }
        Some(uses)
    }

    /// Host register for guest register `n`.
    fn host(&self, n: u8) -> u8 {
        if n == RSP { self.instead_of_rsp } else { n }
    }

    /// The thunk's code, and where the instruction stands in it.
    fn emit(&self, instruction: &[u8]) -> (Vec<u8>, u8) {
        let mut e = Emitter(Vec::with_capacity(128));
        let hosts = bits(self.gpr.into()).fold(0u16, |set, n| set | 1 << self.host(n));
        let saved: Vec<u8> = bits((hosts & CALLEE_SAVED).into()).collect();
        for &r in &saved {
            e.push(r);
        }
        // Neither chosen register is the other's argument register, unless it is its own.
        if self.frame != RDI {
            e.mov(self.frame, RDI);
        }
        if self.cpu != RSI {
            e.mov(self.cpu, RSI);
        }
        if self.x87 {
            // FXRSTOR loads MXCSR too.
            e.mxcsr(3, self.frame, HOST_MXCSR);
            e.fxstate(1, self.frame, X87);
        }
        for n in bits(self.vector) {
            e.vector(self.loaded, false, n, self.frame, vector_at(n));
        }
        for n in bits(self.opmask) {
            e.opmask(false, n, self.frame, opmask_at(n));
        }
        if self.mxcsr {
            e.mxcsr(2, self.frame, MXCSR);
        }
        if self.flags {
            e.load_flags(self.cpu, STATUS);
        }
        for n in bits(self.gpr.into()) {
            e.load(self.host(n), self.cpu, REGS + 8 * i32::from(n));
        }
        let at = e.0.len() as u8;
        e.0.extend(instruction);
        for n in bits(self.gpr_written.into()) {
            e.store(self.host(n), self.cpu, REGS + 8 * i32::from(n));
        }
        if self.flags_written {
            e.store_flags(self.cpu, STATUS);
        }
        for n in bits(self.vector_written) {
            e.vector(self.stored, true, n, self.frame, vector_at(n));
        }
        for n in bits(self.opmask_written) {
            e.opmask(true, n, self.frame, opmask_at(n));
        }
        if self.mxcsr {
            e.mxcsr(3, self.frame, MXCSR);
        }
        if self.x87 {
            e.fxstate(0, self.frame, X87);
            e.0.extend([0xdb, 0xe3]); // fninit
            e.mxcsr(2, self.frame, HOST_MXCSR);
        }
        if self.loaded != Width::Xmm {
            e.0.extend([0xc5, 0xf8, 0x77]); // vzeroupper
        }
        for &r in saved.iter().rev() {
            e.pop(r);
        }
        e.0.push(0xc3); // ret
        (e.0, at)
    }
}

const STATUS_FLAGS: u32 = iced_x86::RflagsBits::CF
    | iced_x86::RflagsBits::PF
    | iced_x86::RflagsBits::AF
    | iced_x86::RflagsBits::ZF
    | iced_x86::RflagsBits::SF
    | iced_x86::RflagsBits::OF;

/// RBX, RBP, R12-R15.
const CALLEE_SAVED: u16 = 0xf028;

fn bits(set: u32) -> impl Iterator<Item = u8> {
    (0..32).filter(move |n| set >> n & 1 != 0)
}

/// Whether an explicit operand is `register` (or a part of it).
fn names(insn: &Instruction, register: Register) -> bool {
    (0..insn.op_count()).any(|i| {
        insn.op_kind(i) == OpKind::Register && insn.op_register(i).full_register() == register.full_register()
    })
}

/// Registers read without being named.
fn reads_implicitly(mnemonic: Mnemonic, register: Register) -> bool {
    use Mnemonic as M;
    match register.full_register() {
        Register::RAX | Register::RDX if is_explicit_length(mnemonic) => true,
        Register::RDX => mnemonic == M::Mulx,
        _ => false,
    }
}

fn is_explicit_length(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Pcmpestri
            | M::Pcmpestrm
            | M::Vpcmpestri
            | M::Vpcmpestrm
            | M::Pcmpestri64
            | M::Pcmpestrm64
            | M::Vpcmpestri64
            | M::Vpcmpestrm64
    )
}

/// Whether an SSE or AVX instruction depends on MXCSR or raises exceptions there (SDM vol. 2, "SIMD Floating-Point
/// Exceptions" of each).
pub(super) fn uses_mxcsr(mnemonic: Mnemonic) -> bool {
    use std::sync::LazyLock;
    static TABLE: LazyLock<Vec<bool>> =
        LazyLock::new(|| Mnemonic::values().map(arithmetic_by_name).collect());
    TABLE.get(mnemonic as usize).is_some_and(|&uses| uses)
}

/// Floating-point instructions are named systematically.
fn arithmetic_by_name(mnemonic: Mnemonic) -> bool {
    let name = format!("{mnemonic:?}").to_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    if name.starts_with("cvt") {
        return true;
    }
    let scalar_or_packed = ["ps", "pd", "ss", "sd"].iter().any(|suffix| name.ends_with(suffix));
    let stems = [
        "add", "sub", "mul", "div", "sqrt", "max", "min", "cmp", "com", "ucom", "round", "dp", "hadd",
        "hsub", "fmadd", "fmsub", "fnmadd", "fnmsub", "getexp", "getmant", "fixupimm", "fpclass", "range",
        "reduce", "rndscale", "scalef", "rcp14", "rsqrt14",
    ];
    scalar_or_packed && stems.iter().any(|stem| name.starts_with(stem))
}

/// Machine code, as far as thunks need it.
struct Emitter(Vec<u8>);

impl Emitter {
    /// Prefixes, opcode, ModRM and displacement of an instruction on `reg` and `[base + disp]`. `base` is not RSP or R12.
    fn memory(&mut self, prefix: Option<u8>, wide: bool, opcode: &[u8], reg: u8, base: u8, disp: i32) {
        self.0.extend(prefix);
        let rex = u8::from(wide) << 3 | reg >> 3 << 2 | base >> 3;
        if rex != 0 {
            self.0.push(0x40 | rex);
        }
        self.0.extend(opcode);
        self.0.push(0x80 | (reg & 7) << 3 | base & 7);
        self.0.extend(disp.to_le_bytes());
    }

    fn load(&mut self, reg: u8, base: u8, disp: i32) {
        self.memory(None, true, &[0x8b], reg, base, disp);
    }

    fn store(&mut self, reg: u8, base: u8, disp: i32) {
        self.memory(None, true, &[0x89], reg, base, disp);
    }

    fn mov(&mut self, to: u8, from: u8) {
        self.0.extend([0x48 | from >> 3 << 2 | to >> 3, 0x89, 0xc0 | (from & 7) << 3 | to & 7]);
    }

    fn push(&mut self, reg: u8) {
        if reg > 7 {
            self.0.push(0x41);
        }
        self.0.push(0x50 | reg & 7);
    }

    fn pop(&mut self, reg: u8) {
        if reg > 7 {
            self.0.push(0x41);
        }
        self.0.push(0x58 | reg & 7);
    }

    /// LDMXCSR (2) or STMXCSR (3).
    fn mxcsr(&mut self, which: u8, base: u8, disp: i32) {
        self.memory(None, false, &[0x0f, 0xae], which, base, disp);
    }

    /// FXSAVE64 (0) or FXRSTOR64 (1).
    fn fxstate(&mut self, which: u8, base: u8, disp: i32) {
        self.memory(None, true, &[0x0f, 0xae], which, base, disp);
    }

    /// MOVUPS of an XMM register, or VMOVUPS of a wider one.
    fn vector(&mut self, width: Width, store: bool, reg: u8, base: u8, disp: i32) {
        let opcode = 0x10 | u8::from(store);
        let rxb = (reg >> 3 & 1 ^ 1) << 7 | 0x40 | (base >> 3 ^ 1) << 5;
        match width {
            Width::Xmm => return self.memory(None, false, &[0x0f, opcode], reg, base, disp),
            Width::Ymm => self.0.extend([0xc4, rxb | 1, 0x7c, opcode]),
            Width::Zmm => self.0.extend([0x62, rxb | (reg >> 4 ^ 1) << 4 | 1, 0x7c, 0x48, opcode]),
        }
        self.0.push(0x80 | (reg & 7) << 3 | base & 7);
        self.0.extend(disp.to_le_bytes());
    }

    /// KMOVQ of an opmask register.
    fn opmask(&mut self, store: bool, reg: u8, base: u8, disp: i32) {
        self.0.extend([0xc4, 0xc1 | (base >> 3 ^ 1) << 5, 0xf8, 0x90 | u8::from(store)]);
        self.0.push(0x80 | (reg & 7) << 3 | base & 7);
        self.0.extend(disp.to_le_bytes());
    }

    /// Status word to flags: adding 127 to AL restores OF, SAHF the others. AX is lost.
    fn load_flags(&mut self, base: u8, disp: i32) {
        self.memory(None, false, &[0x0f, 0xb7], RAX, base, disp);
        self.0.extend([0x04, 0x7f, 0x9e]);
    }

    /// Flags to status word. AX is lost.
    fn store_flags(&mut self, base: u8, disp: i32) {
        self.0.extend([0x9f, 0x0f, 0x90, 0xc0]);
        self.memory(Some(0x66), false, &[0x89], RAX, base, disp);
    }
}
