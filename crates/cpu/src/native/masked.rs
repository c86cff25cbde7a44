//! Instructions that touch memory element by element: masked moves and gathers. Elements that the mask leaves out cannot
//! fault; a fault in a gather leaves the elements before it done (SDM vol. 2, VMASKMOV, MASKMOVDQU, VGATHER).

use iced_x86::{CpuidFeature, Instruction, Mnemonic, Register};
use skep_hv::cpuid::CpuidTable;

use super::gate;
use super::plain::vector_number;
use crate::cpu::{CodeSize, Cpu};
use crate::fault::Exec;
use crate::mmu::Access;
use crate::op::{Handler, Op};
use crate::regs::at;

/// What the handlers need, packed into [`Op::imm`].
#[derive(Debug, Clone, Copy)]
struct Plan {
    /// Destination (or, for stores, source).
    data: u8,
    mask: u8,
    /// Vector of indices.
    index: u8,
    /// Elements.
    count: u8,
    /// Bytes of an index.
    index_size: u8,
    /// Elements of the mask register.
    mask_count: u8,
}

impl Plan {
    fn pack(self) -> u64 {
        u64::from_le_bytes([
            self.data,
            self.mask,
            self.index,
            self.count,
            self.index_size,
            self.mask_count,
            0,
            0,
        ])
    }

    fn of(op: &Op) -> Self {
        let [data, mask, index, count, index_size, mask_count, ..] = op.imm.to_le_bytes();
        Self {
            data: data & 15,
            mask: mask & 15,
            index: index & 15,
            count: count.min(8),
            index_size,
            mask_count: mask_count.min(8),
        }
    }
}

/// Handlers for masked moves and gathers.
pub(super) fn select(insn: &Instruction, op: &mut Op, cpuid: &CpuidTable) -> Option<Handler> {
    use Mnemonic as M;
    let size = match insn.mnemonic() {
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => return mask_bytes(insn, op, cpuid),
        M::Vmaskmovps | M::Vpmaskmovd | M::Vgatherdps | M::Vgatherqps | M::Vpgatherdd | M::Vpgatherqd => 4,
        M::Vmaskmovpd | M::Vpmaskmovq | M::Vgatherdpd | M::Vgatherqpd | M::Vpgatherdq | M::Vpgatherqq => 8,
        _ => return None,
    };
    if insn.code().encoding() != iced_x86::EncodingKind::VEX || !gate::offered(insn, cpuid) {
        return None;
    }
    let index = insn.memory_index();
    if index.is_vector_register() {
        return gather(insn, op, size);
    }
    let loads = insn.op0_register() != Register::None;
    let data = if loads { insn.op0_register() } else { insn.op2_register() };
    let count = (data.size() / size) as u8;
    let plan = Plan {
        data: vector_number(data)?,
        mask: vector_number(insn.op1_register())?,
        index: 0,
        count,
        index_size: 0,
        mask_count: count,
    };
    op.imm = plan.pack();
    Some(match (loads, size) {
        (true, 4) => load_masked::<4>,
        (true, _) => load_masked::<8>,
        (false, 4) => store_masked::<4>,
        (false, _) => store_masked::<8>,
    })
}

fn gather(insn: &Instruction, op: &mut Op, size: usize) -> Option<Handler> {
    use Mnemonic as M;
    let index = insn.memory_index();
    let by_quadword =
        matches!(insn.mnemonic(), M::Vgatherqps | M::Vgatherqpd | M::Vpgatherqd | M::Vpgatherqq);
    let index_size = if by_quadword { 8 } else { 4 };
    let data = insn.op0_register();
    let plan = Plan {
        data: vector_number(data)?,
        mask: vector_number(insn.op2_register())?,
        index: vector_number(index)?,
        count: (data.size() / size).min(index.size() / index_size) as u8,
        index_size: index_size as u8,
        mask_count: (data.size().max(index.size()) / size) as u8,
    };
    if plan.data == plan.mask || plan.data == plan.index || plan.mask == plan.index {
        return None;
    }
    op.imm = plan.pack();
    if insn.memory_base() == Register::None && insn.memory_displ_size() == 4 {
        op.attr |= Op::A32;
    }
    op.scale = insn.memory_index_scale().trailing_zeros() as u8;
    Some(if size == 4 { gather_elements::<4> } else { gather_elements::<8> })
}

impl Cpu {
    /// Element `i` of `SIZE` bytes of a vector register.
    fn element<const SIZE: usize>(&self, register: u8, i: usize) -> u64 {
        let vector = &self.fpu.frame.vector[register as usize & 31];
        if SIZE == 8 { vector[i & 7] } else { vector[i / 2 & 7] >> (32 * (i % 2)) & 0xffff_ffff }
    }

    fn set_element<const SIZE: usize>(&mut self, register: u8, i: usize, value: u64) {
        let word =
            &mut self.fpu.frame.vector[register as usize & 31][if SIZE == 8 { i & 7 } else { i / 2 & 7 }];
        if SIZE == 8 {
            *word = value;
        } else {
            let shift = 32 * (i % 2);
            *word = *word & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift;
        }
    }

    fn selected<const SIZE: usize>(&self, mask: u8, i: usize) -> bool {
        self.element::<SIZE>(mask, i) >> (8 * SIZE - 1) & 1 != 0
    }

    /// Before any element of a masked move is translated: whether the addresses of all that are wanted are canonical.
    fn check_span<const SIZE: usize>(&mut self, op: &Op, plan: Plan, offset: u64, access: Access) -> Exec {
        if self.mode.code != CodeSize::Bits64 {
            return Ok(());
        }
        let first = self.seg_linear(op.seg as usize, offset, 1, access)?;
        for i in (0..plan.count as usize).filter(|&i| self.selected::<SIZE>(plan.mask, i)).collect::<Vec<_>>()
        {
            let last = first.wrapping_add((i * SIZE + SIZE - 1) as u64);
            if !self.canonical(last) {
                return self.probe(last, 1, access);
            }
        }
        Ok(())
    }

    /// Linear address of element `i` of an operand at `offset`. The address size cuts the operand's address, not the
    /// elements'.
    fn span_element<const SIZE: usize>(
        &mut self,
        op: &Op,
        offset: u64,
        i: usize,
        access: Access,
    ) -> Exec<u64> {
        let at = (i * SIZE) as u64;
        if self.mode.code == CodeSize::Bits64 {
            return Ok(self.seg_linear(op.seg as usize, offset, SIZE as u64, access)?.wrapping_add(at));
        }
        self.seg_linear(op.seg as usize, offset.wrapping_add(at), SIZE as u64, access)
    }

    fn read_element<const SIZE: usize>(&mut self, linear: u64) -> Exec<u64> {
        // Alignment is not checked.
        let mut bytes = [0; SIZE];
        match self.tlb.read(linear, SIZE as u64) {
            Some(_) if SIZE == 8 => self.read::<u64>(linear),
            Some(_) => self.read::<u32>(linear).map(u64::from),
            None => {
                self.read_bytes(linear, &mut bytes)?;
                Ok(bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b)))
            }
        }
    }
}

fn load_masked<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.avx()?;
    let plan = Plan::of(op);
    let offset = cpu.offset(op);
    cpu.check_span::<SIZE>(op, plan, offset, Access::Read)?;
    let mut value = [0u64; 4];
    for i in 0..plan.count as usize {
        if cpu.selected::<SIZE>(plan.mask, i) {
            let linear = cpu.span_element::<SIZE>(op, offset, i, Access::Read)?;
            let element = cpu.read_element::<SIZE>(linear)?;
            let at = i * SIZE;
            value[at / 8 & 3] |= element << (8 * (at % 8));
        }
    }
    let data = &mut cpu.fpu.frame.vector[plan.data as usize];
    data[..4].copy_from_slice(&value);
    data[4..].fill(0);
    Ok(())
}

fn store_masked<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.avx()?;
    let plan = Plan::of(op);
    let offset = cpu.offset(op);
    let mut addresses = [None; 8];
    cpu.check_span::<SIZE>(op, plan, offset, Access::Write)?;
    for (i, address) in addresses.iter_mut().enumerate().take(plan.count as usize) {
        if cpu.selected::<SIZE>(plan.mask, i) {
            let linear = cpu.span_element::<SIZE>(op, offset, i, Access::Write)?;
            cpu.probe_store(linear, SIZE as u64)?;
            *address = Some(linear);
        }
    }
    for (i, address) in addresses.iter().enumerate() {
        if let Some(linear) = *address {
            let value = cpu.element::<SIZE>(plan.data, i);
            // Alignment is not checked.
            match cpu.tlb.write(linear, SIZE as u64) {
                Some(_) if SIZE == 8 => cpu.write(linear, value)?,
                Some(_) => cpu.write(linear, value as u32)?,
                None => cpu.write_bytes(linear, &value.to_le_bytes()[..SIZE])?,
            }
        }
    }
    Ok(())
}

fn gather_elements<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.avx()?;
    let plan = Plan::of(op);
    let base = cpu.offset(op);
    // Before anything else the mask becomes all ones or all zeros in each element; a fault lets one see.
    for i in 0..plan.mask_count as usize {
        let ones = if cpu.selected::<SIZE>(plan.mask, i) { u64::MAX } else { 0 };
        cpu.set_element::<SIZE>(plan.mask, i, ones);
    }
    for i in plan.mask_count as usize..64 / SIZE {
        cpu.set_element::<SIZE>(plan.mask, i, 0);
    }
    for i in 0..plan.count as usize {
        if cpu.selected::<SIZE>(plan.mask, i) {
            let index = match plan.index_size {
                8 => cpu.element::<8>(plan.index, i),
                _ => cpu.element::<4>(plan.index, i) as u32 as i32 as u64,
            };
            let at = base.wrapping_add(index << op.scale) & op.amask();
            let linear = cpu.seg_linear(op.seg as usize, at, SIZE as u64, Access::Read)?;
            let value = cpu.read_element::<SIZE>(linear)?;
            cpu.set_element::<SIZE>(plan.data, i, value);
            for i in plan.mask_count as usize..64 / SIZE {
                cpu.set_element::<SIZE>(plan.data, i, 0);
            }
        }
        cpu.set_element::<SIZE>(plan.mask, i, 0);
    }
    for i in plan.count as usize..64 / SIZE {
        cpu.set_element::<SIZE>(plan.data, i, 0);
    }
    cpu.fpu.frame.vector[plan.mask as usize].fill(0);
    Ok(())
}

/// MASKMOVQ, MASKMOVDQU and VMASKMOVDQU: bytes to DS:RDI.
fn mask_bytes(insn: &Instruction, op: &mut Op, cpuid: &CpuidTable) -> Option<Handler> {
    if !insn.cpuid_features().iter().all(|&f: &CpuidFeature| gate::feature(f, cpuid)) {
        return None;
    }
    op.base = at::RDI;
    op.dst = insn.op1_register().number() as u8;
    op.src = insn.op2_register().number() as u8;
    Some(match insn.mnemonic() {
        Mnemonic::Maskmovq => maskmovq,
        Mnemonic::Vmaskmovdqu => maskmovdqu::<true>,
        _ => maskmovdqu::<false>,
    })
}

fn maskmovdqu<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if VEX {
        cpu.avx()?
    } else {
        cpu.sse()?
    }
    let (data, mask) = (cpu.fpu.xmm(op.dst as usize), cpu.fpu.xmm(op.src as usize));
    store_bytes(cpu, op, &data, &mask)
}

fn maskmovq(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.mmx()?;
    cpu.x87_pending()?;
    let (data, mask) = (cpu.fpu.mmx(op.dst as usize), cpu.fpu.mmx(op.src as usize));
    // The transition to MMX takes place even if the store faults.
    cpu.fpu.enter_mmx();
    store_bytes(cpu, op, &data, &mask)
}

fn store_bytes(cpu: &mut Cpu, op: &Op, data: &[u8], mask: &[u8]) -> Exec {
    let offset = cpu.offset(op);
    let address = |cpu: &mut Cpu, at: usize, size: u64| {
        let offset = offset.wrapping_add(at as u64) & op.amask();
        cpu.seg_linear(op.seg as usize, offset, size, Access::Write)
    };
    // What the mask leaves out may fault here, and does, the upper half first.
    for at in (0..data.len()).step_by(8).rev() {
        let linear = address(cpu, at, 8)?;
        cpu.check_alignment(linear, 8)?;
        cpu.probe_store(linear, 8)?;
    }
    for i in (0..data.len()).filter(|&i| mask[i] & 0x80 != 0) {
        let linear = address(cpu, i, 1)?;
        cpu.write(linear, data[i])?;
    }
    Ok(())
}
