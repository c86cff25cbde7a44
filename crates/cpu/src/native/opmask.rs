//! AVX-512 and memory: elements that an opmask leaves out are neither read nor written, and cannot fault (SDM vol. 2A
//! §2.7.8); gathers and scatters, which go element by element and show in the opmask how far they came.

use std::sync::LazyLock;

use iced_x86::{EncodingKind, Instruction, MemorySize, Mnemonic, OpKind, Register};
use skep_hv::cpuid::CpuidTable;

use super::gate;
use super::plain::{Plan, vector_number};
use crate::cpu::{CodeSize, Cpu};
use crate::fault::Exec;
use crate::mmu::Access;
use crate::op::{Handler, Op};

/// How an opmask selects parts of a memory operand. Stands in [`Op::dst`] and [`Op::src`], which thunks have no use for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Elements {
    /// Bytes of one; 0: the operand is accessed whatever the opmask says.
    size: u8,
    /// The selected ones stand side by side in memory.
    packed: bool,
    /// It faults as if all were accessed.
    probes_all: bool,
    /// Bits of the opmask that count.
    bits: u8,
}

impl Elements {
    const PACKED: u8 = 0x80;
    const PROBES_ALL: u8 = 0x40;

    fn of(op: &Op) -> Self {
        let (packed, probes_all) = (op.dst & Self::PACKED != 0, op.dst & Self::PROBES_ALL != 0);
        Self { size: op.dst & 0xf, packed, probes_all, bits: op.src }
    }

    fn put(self, op: &mut Op) {
        let flag = |is: bool, bit: u8| if is { bit } else { 0 };
        op.dst = self.size | flag(self.packed, Self::PACKED) | flag(self.probes_all, Self::PROBES_ALL);
        op.src = self.bits;
    }

    /// Which elements of an operand of `len` bytes `mask` selects, by bit.
    fn selected(self, mask: u64, len: u64) -> u64 {
        let mask = mask & ones(self.bits.into());
        if self.packed {
            return ones(mask.count_ones());
        }
        let there = (len / u64::from(self.size.max(1))).clamp(1, 64) as u32;
        // An operand with fewer elements than the opmask is repeated.
        let mut rest = mask;
        let mut all = 0;
        while rest != 0 {
            all |= rest & ones(there);
            rest = rest.checked_shr(there).unwrap_or(0);
        }
        all
    }
}

fn ones(count: u32) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

fn bits(set: u64) -> impl Iterator<Item = usize> {
    (0..64).filter(move |n| set >> n & 1 != 0)
}

/// Notes for [`load`] and [`store`] how the opmask selects parts of the memory operand.
pub(super) fn describe(insn: &Instruction, op: &mut Op) {
    elements(insn).put(op);
}

fn elements(insn: &Instruction) -> Elements {
    let whole = Elements { size: 0, packed: false, probes_all: false, bits: 0 };
    let memory = insn.memory_size();
    if insn.op_mask() == Register::None || memory == MemorySize::Unknown || reads_all(insn) {
        return whole;
    }
    let (size, bits) = if insn.is_broadcast() {
        (memory.size(), broadcast_size(memory) / memory.size().max(1))
    } else if repeats(insn.mnemonic()) {
        (memory.element_size(), insn.op0_register().size() / memory.element_size().max(1))
    } else {
        let size = masked_size(insn.mnemonic()).unwrap_or(memory.element_size());
        (size, memory.size() / size.max(1))
    };
    let packed = matches!(
        insn.mnemonic(),
        Mnemonic::Vcompressps
            | Mnemonic::Vcompresspd
            | Mnemonic::Vpcompressd
            | Mnemonic::Vpcompressq
            | Mnemonic::Vexpandps
            | Mnemonic::Vexpandpd
            | Mnemonic::Vpexpandd
            | Mnemonic::Vpexpandq
    );
    Elements { size: size as u8, packed, probes_all: probes_all(insn.mnemonic()), bits: bits as u8 }
}

/// Bytes of the vector that a broadcast operand makes.
fn broadcast_size(memory: MemorySize) -> usize {
    static SIZES: LazyLock<Vec<usize>> = LazyLock::new(|| {
        let bits = |name: String| {
            let digits: String =
                name.strip_prefix("Broadcast")?.chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<usize>().ok()
        };
        MemorySize::values().map(|size| bits(format!("{size:?}")).unwrap_or(0) / 8).collect()
    });
    SIZES.get(memory as usize).copied().unwrap_or(0)
}

/// Broadcasts that are instructions of their own.
fn repeats(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Vbroadcastss
            | M::Vbroadcastsd
            | M::Vbroadcastf32x2
            | M::Vbroadcastf32x4
            | M::Vbroadcastf32x8
            | M::Vbroadcastf64x2
            | M::Vbroadcastf64x4
            | M::Vbroadcasti32x2
            | M::Vbroadcasti32x4
            | M::Vbroadcasti32x8
            | M::Vbroadcasti64x2
            | M::Vbroadcasti64x4
            | M::Vpbroadcastb
            | M::Vpbroadcastw
            | M::Vpbroadcastd
            | M::Vpbroadcastq
    )
}

/// Bytes of memory for each bit of the opmask, where the elements in memory are smaller.
fn masked_size(mnemonic: Mnemonic) -> Option<usize> {
    use Mnemonic as M;
    match mnemonic {
        M::Vpmaddwd | M::Vpdpbusd | M::Vpdpbusds | M::Vpdpwssd | M::Vpdpwssds => Some(4),
        M::Vpmaddubsw => Some(2),
        M::Vpmuldq | M::Vpmuludq => Some(8),
        _ => None,
    }
}

/// Instructions that read all of their memory operand whatever the opmask says: those of exception classes E4NF, E5NF and
/// E6NF (SDM vol. 2A §2.8).
fn reads_all(insn: &Instruction) -> bool {
    use Mnemonic as M;
    match insn.mnemonic() {
        // A count in memory; or else what is shifted.
        M::Vpsllw
        | M::Vpslld
        | M::Vpsllq
        | M::Vpsraw
        | M::Vpsrad
        | M::Vpsraq
        | M::Vpsrlw
        | M::Vpsrld
        | M::Vpsrlq => insn.op_kind(2) == OpKind::Memory,
        M::Valignd
        | M::Valignq
        | M::Vdbpsadbw
        | M::Vinsertf32x4
        | M::Vinsertf32x8
        | M::Vinsertf64x2
        | M::Vinsertf64x4
        | M::Vinserti32x4
        | M::Vinserti32x8
        | M::Vinserti64x2
        | M::Vinserti64x4
        | M::Vmovddup
        | M::Vmovshdup
        | M::Vmovsldup
        | M::Vpackssdw
        | M::Vpacksswb
        | M::Vpackusdw
        | M::Vpackuswb
        | M::Vpalignr
        | M::Vpconflictd
        | M::Vpconflictq
        | M::Vpermd
        | M::Vpermi2d
        | M::Vpermi2pd
        | M::Vpermi2ps
        | M::Vpermi2q
        | M::Vpermi2w
        | M::Vpermilpd
        | M::Vpermilps
        | M::Vpermpd
        | M::Vpermps
        | M::Vpermq
        | M::Vpermt2d
        | M::Vpermt2pd
        | M::Vpermt2ps
        | M::Vpermt2q
        | M::Vpermt2w
        | M::Vpermw
        | M::Vpmaddubsw
        | M::Vpmaddwd
        | M::Vpshufb
        | M::Vpshufd
        | M::Vpshufhw
        | M::Vpshuflw
        | M::Vpunpckhbw
        | M::Vpunpckhdq
        | M::Vpunpckhqdq
        | M::Vpunpckhwd
        | M::Vpunpcklbw
        | M::Vpunpckldq
        | M::Vpunpcklqdq
        | M::Vpunpcklwd
        | M::Vshuff32x4
        | M::Vshuff64x2
        | M::Vshufi32x4
        | M::Vshufi64x2
        | M::Vshufpd
        | M::Vshufps
        | M::Vunpckhpd
        | M::Vunpckhps
        | M::Vunpcklpd
        | M::Vunpcklps => true,
        _ => false,
    }
}

/// Instructions that write what the opmask selects, and fault as if they wrote all.
fn probes_all(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Vextractf32x4
            | M::Vextractf32x8
            | M::Vextractf64x2
            | M::Vextractf64x4
            | M::Vextracti32x4
            | M::Vextracti32x8
            | M::Vextracti64x2
            | M::Vextracti64x4
    )
}

impl Cpu {
    /// The opmask of an instruction that has one.
    pub(super) fn opmask(&self, plan: Plan) -> u64 {
        match plan.opmask() {
            0 => u64::MAX,
            k => self.fpu.frame.opmask[k & 7],
        }
    }

    /// Linear address of an operand, not checked for anything.
    fn masked_operand(&mut self, op: &Op, access: Access) -> Exec<u64> {
        let offset = self.offset(op);
        let linear = match self.mode.code {
            CodeSize::Bits64 => self.seg_linear(op.seg as usize, offset, 1, access)?,
            _ => self.segs[op.seg as usize].base.wrapping_add(offset) & 0xffff_ffff,
        };
        Ok(linear)
    }

    /// The checks of alignment, which nothing fails that accesses nothing. Operands of vectors are aligned if their instruction
    /// says so, smaller ones if RFLAGS.AC does.
    fn check_masked(&mut self, plan: Plan, elements: Elements, linear: u64, selected: u64) -> Exec {
        if selected == 0 {
            return Ok(());
        }
        let first = linear.wrapping_add(u64::from(selected.trailing_zeros()) * u64::from(elements.size));
        if plan.aligned() && linear & (plan.size() - 1) != 0 {
            return Err(self.gp(0));
        }
        if plan.size() > 8 || plan.unchecked() {
            return Ok(());
        }
        // What is left out need not have an address.
        self.check_alignment(first & !7 | linear & 7, plan.size())
    }

    /// Linear address of `size` bytes of an operand. The address size cuts the operand's address, not its elements'.
    fn element_address(&mut self, op: &Op, at: u64, size: u64, access: Access) -> Exec<u64> {
        let offset = self.offset(op);
        if self.mode.code == CodeSize::Bits64 {
            return Ok(self.seg_linear(op.seg as usize, offset, size, access)?.wrapping_add(at));
        }
        self.seg_linear(op.seg as usize, offset.wrapping_add(at), size, access)
    }

    /// Before anything is accessed: whether the addresses of all selected elements are canonical.
    fn check_canonical(&mut self, linear: u64, size: u64, selected: u64, access: Access) -> Exec {
        if self.mode.code == CodeSize::Bits64 {
            for i in bits(selected) {
                let last = linear.wrapping_add(i as u64 * size + size - 1);
                if !self.canonical(last) {
                    return self.probe(last, 1, access);
                }
            }
        }
        Ok(())
    }

    /// Reads the selected elements of an operand into the frame.
    #[cold]
    #[inline(never)]
    fn load_elements(&mut self, op: &Op, elements: Elements, linear: u64, selected: u64) -> Exec {
        let size = u64::from(elements.size);
        self.check_canonical(linear, size, selected, Access::Read)?;
        let mut operand = [0; 64];
        for i in bits(selected) {
            let at = i as u64 * size;
            let linear = self.element_address(op, at, size, Access::Read)?;
            if let Some(element) = operand.get_mut(at as usize..(at + size) as usize) {
                self.read_bytes(linear, element)?;
            }
        }
        self.fpu.frame.operand = operand;
        Ok(())
    }

    /// Writes the selected elements of an operand from the frame, all or none.
    fn store_elements(&mut self, op: &Op, elements: Elements, linear: u64, selected: u64) -> Exec {
        let size = u64::from(elements.size);
        self.check_canonical(linear, size, selected, Access::Write)?;
        let mut addresses = [0; 64];
        for i in bits(selected) {
            addresses[i] = self.element_address(op, i as u64 * size, size, Access::Write)?;
            self.probe_store(addresses[i], size)?;
        }
        let operand = self.fpu.frame.operand;
        for i in bits(selected) {
            let at = i * size as usize;
            if let Some(element) = operand.get(at..at + size as usize) {
                self.write_element(addresses[i], element)?;
            }
        }
        Ok(())
    }

    /// Reads an element in one piece, if it can be. Alignment is not checked.
    fn read_element_at(&mut self, linear: u64, size: u64) -> Exec<u64> {
        match (self.tlb.read(linear, size), size) {
            (Some(_), 8) => self.read::<u64>(linear),
            (Some(_), 4) => self.read::<u32>(linear).map(u64::from),
            _ => {
                let mut bytes = [0; 8];
                self.read_bytes(linear, &mut bytes[..(size as usize).min(8)])?;
                Ok(u64::from_le_bytes(bytes))
            }
        }
    }

    /// Writes one likewise.
    fn write_element(&mut self, linear: u64, element: &[u8]) -> Exec {
        let known = self.tlb.write(linear, element.len() as u64).is_some();
        match *element {
            [a] if known => self.write(linear, a),
            [a, b] if known => self.write(linear, u16::from_le_bytes([a, b])),
            [a, b, c, d] if known => self.write(linear, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if known => {
                self.write(linear, u64::from_le_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => self.write_bytes(linear, element),
        }
    }
}

/// Reads a memory operand.
pub(super) fn load(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.avx512()?;
    let (plan, elements) = (Plan(op.imm), Elements::of(op));
    if elements.size == 0 {
        let linear = cpu.operand(op, plan.size(), plan.aligned(), Access::Read)?;
        if plan.unchecked() {
            cpu.load_unchecked(linear, plan.size())?;
        } else {
            cpu.load_operand(linear, plan.size())?;
        }
        return cpu.run_thunk(plan);
    }
    let linear = cpu.masked_operand(op, Access::Read)?;
    let selected = elements.selected(cpu.opmask(plan), plan.size());
    cpu.check_masked(plan, elements, linear, selected)?;
    // Where all of it is memory, reading more than is wanted does no harm.
    if cpu.mode.code == CodeSize::Bits64 && cpu.tlb.read(linear, plan.size()).is_some() {
        cpu.load_operand(linear, plan.size())?;
    } else {
        cpu.load_elements(op, elements, linear, selected)?;
    }
    cpu.run_thunk(plan)
}

/// Writes a memory operand.
pub(super) fn store(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.avx512()?;
    let (plan, elements) = (Plan(op.imm), Elements::of(op));
    if elements.size == 0 {
        let linear = cpu.operand(op, plan.size(), plan.aligned(), Access::Write)?;
        // Exceptions of the computation come before those of the store, and its flags stay even if the store faults.
        cpu.run_thunk(plan)?;
        return if plan.unchecked() {
            cpu.store_unchecked(linear, plan.size())
        } else {
            cpu.store_operand(linear, plan.size())
        };
    }
    let linear = cpu.masked_operand(op, Access::Write)?;
    let selected = elements.selected(cpu.opmask(plan), plan.size());
    cpu.check_masked(plan, elements, linear, selected)?;
    cpu.run_thunk(plan)?;
    if elements.probes_all {
        let linear = cpu.operand(op, plan.size(), false, Access::Write)?;
        cpu.probe_store(linear, plan.size())?;
    }
    cpu.store_elements(op, elements, linear, selected)
}

/// What gathers and scatters need, packed into [`Op::imm`].
#[derive(Debug, Clone, Copy)]
struct Scattered {
    data: u8,
    opmask: u8,
    /// Vector of indices.
    index: u8,
    /// Elements.
    count: u8,
    /// Bytes of an index.
    index_size: u8,
    /// Bytes of an element.
    size: u8,
    /// Bytes of the longer of the vectors.
    length: u8,
}

impl Scattered {
    fn pack(self) -> u64 {
        let Self { data, opmask, index, count, index_size, size, length } = self;
        u64::from_le_bytes([data, opmask, index, count, index_size, size, length, 0])
    }

    fn of(op: &Op) -> Self {
        let [data, opmask, index, count, index_size, size, length, _] = op.imm.to_le_bytes();
        Self {
            data: data & 31,
            opmask: opmask & 7,
            index: index & 31,
            count: count.min(16),
            index_size,
            size,
            length: length.min(64),
        }
    }
}

/// Handlers of gathers and scatters.
pub(super) fn select(insn: &Instruction, op: &mut Op, cpuid: &CpuidTable) -> Option<Handler> {
    use Mnemonic as M;
    let (size, index_size) = match insn.mnemonic() {
        M::Vgatherdps | M::Vpgatherdd | M::Vscatterdps | M::Vpscatterdd => (4, 4),
        M::Vgatherqps | M::Vpgatherqd | M::Vscatterqps | M::Vpscatterqd => (4, 8),
        M::Vgatherdpd | M::Vpgatherdq | M::Vscatterdpd | M::Vpscatterdq => (8, 4),
        M::Vgatherqpd | M::Vpgatherqq | M::Vscatterqpd | M::Vpscatterqq => (8, 8),
        _ => return None,
    };
    if insn.code().encoding() != EncodingKind::EVEX || !gate::offered(insn, cpuid) {
        return None;
    }
    let gathers = insn.op0_register() != Register::None;
    let data = if gathers { insn.op0_register() } else { insn.op1_register() };
    let index = insn.memory_index();
    let plan = Scattered {
        data: vector_number(data)?,
        opmask: insn.op_mask().number() as u8,
        index: vector_number(index)?,
        count: (data.size() / size).min(index.size() / index_size) as u8,
        index_size: index_size as u8,
        size: size as u8,
        length: data.size().max(index.size()) as u8,
    };
    if gathers && plan.data == plan.index || insn.op_mask() == Register::None {
        return None;
    }
    op.imm = plan.pack();
    if insn.memory_base() == Register::None && insn.memory_displ_size() == 4 {
        op.attr |= Op::A32;
    }
    op.scale = insn.memory_index_scale().trailing_zeros() as u8;
    Some(if gathers { gather } else { scatter })
}

impl Cpu {
    /// Linear address of element `i`.
    fn scattered(&mut self, op: &Op, plan: Scattered, base: u64, i: usize, access: Access) -> Exec<u64> {
        let indices = &self.fpu.frame.vector[plan.index as usize];
        let index = match plan.index_size {
            8 => indices[i & 7],
            _ => (indices[i / 2 & 7] >> (32 * (i % 2))) as u32 as i32 as u64,
        };
        let offset = base.wrapping_add(index << op.scale) & op.amask();
        self.seg_linear(op.seg as usize, offset, plan.size.into(), access)
    }
}

fn gather(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.avx512()?;
    let plan = Scattered::of(op);
    let base = cpu.offset(op);
    let (data, k, size) = (plan.data as usize, plan.opmask as usize, plan.size as usize);
    for i in 0..plan.count as usize {
        if cpu.fpu.frame.opmask[k] >> i & 1 != 0 {
            let linear = cpu.scattered(op, plan, base, i, Access::Read)?;
            let value = cpu.read_element_at(linear, size as u64)?;
            let mut bytes = cpu.fpu.bytes(data);
            bytes[i * size..(i + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
            bytes[plan.length as usize..].fill(0);
            cpu.fpu.set_bytes(data, &bytes);
        }
        cpu.fpu.frame.opmask[k] &= !(1 << i);
    }
    cpu.fpu.frame.opmask[k] = 0;
    let mut bytes = cpu.fpu.bytes(data);
    bytes[plan.count as usize * size..].fill(0);
    cpu.fpu.set_bytes(data, &bytes);
    Ok(())
}

fn scatter(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.avx512()?;
    let plan = Scattered::of(op);
    let base = cpu.offset(op);
    let (k, size) = (plan.opmask as usize, plan.size as usize);
    for i in 0..plan.count as usize {
        if cpu.fpu.frame.opmask[k] >> i & 1 != 0 {
            let linear = cpu.scattered(op, plan, base, i, Access::Write)?;
            let bytes = cpu.fpu.bytes(plan.data as usize);
            cpu.write_element(linear, &bytes[i * size..(i + 1) * size])?;
        }
        cpu.fpu.frame.opmask[k] &= !(1 << i);
    }
    cpu.fpu.frame.opmask[k] = 0;
    Ok(())
}
