//! FXSAVE, FXRSTOR and the XSAVE family (SDM vol. 1 chapter 13).

use iced_x86::{Code, CpuidFeature, Instruction};
use skep_hv::cpuid::CpuidTable;

use super::area::{COMPONENTS, Component};
use super::fpu::{
    AREA, EXTENDED, LEGACY, MXCSR_INIT, MXCSR_MASK, component, fx, image_mxcsr, put_image_mxcsr,
};
use super::gate;
use crate::cpu::{CodeSize, Cpu};
use crate::fault::{Abort, Exec, Raised};
use crate::mmu::Access;
use crate::op::{Handler, Op};
use crate::regs::at;

/// XCOMP_BV: the compacted format.
const COMPACTED: u64 = 1 << 63;

/// Handlers for FXSAVE, FXRSTOR, XSAVE, XSAVEOPT, XSAVEC and XRSTOR. [`Op::imm`] is 1 for the forms with REX.W.
pub(super) fn select(insn: &Instruction, op: &mut Op, cpuid: &CpuidTable) -> Option<Handler> {
    use CpuidFeature as F;
    let (handler, feature, wide): (Handler, _, _) = match insn.code() {
        Code::Fxsave_m512byte => (fxsave, F::FXSR, false),
        Code::Fxsave64_m512byte => (fxsave, F::FXSR, true),
        Code::Fxrstor_m512byte => (fxrstor, F::FXSR, false),
        Code::Fxrstor64_m512byte => (fxrstor, F::FXSR, true),
        Code::Xsave_mem => (xsave::<{ Kind::PLAIN }>, F::XSAVE, false),
        Code::Xsave64_mem => (xsave::<{ Kind::PLAIN }>, F::XSAVE, true),
        Code::Xsaveopt_mem => (xsave::<{ Kind::OPTIMIZED }>, F::XSAVEOPT, false),
        Code::Xsaveopt64_mem => (xsave::<{ Kind::OPTIMIZED }>, F::XSAVEOPT, true),
        Code::Xsavec_mem => (xsave::<{ Kind::COMPACTED }>, F::XSAVEC, false),
        Code::Xsavec64_mem => (xsave::<{ Kind::COMPACTED }>, F::XSAVEC, true),
        Code::Xrstor_mem if gate::feature(F::XSAVEC, cpuid) => (xrstor::<true>, F::XSAVE, false),
        Code::Xrstor64_mem if gate::feature(F::XSAVEC, cpuid) => (xrstor::<true>, F::XSAVE, true),
        Code::Xrstor_mem => (xrstor::<false>, F::XSAVE, false),
        Code::Xrstor64_mem => (xrstor::<false>, F::XSAVE, true),
        _ => return None,
    };
    op.imm = u64::from(wide);
    gate::feature(feature, cpuid).then_some(handler)
}

/// Which way of saving.
struct Kind;

impl Kind {
    const PLAIN: u8 = 0;
    const OPTIMIZED: u8 = 1;
    const COMPACTED: u8 = 2;
}

impl Cpu {
    /// Registers of each of XMM and YMM that the mode has.
    fn vector_count(&self) -> usize {
        if self.mode.code == CodeSize::Bits64 { 16 } else { 8 }
    }

    /// The components that an instruction asks for in EDX:EAX and XCR0 enables.
    fn requested(&self) -> u64 {
        let mask = u64::from(self.regs.get::<u32>(at::RDX)) << 32 | u64::from(self.regs.get::<u32>(at::RAX));
        mask & self.xcr0
    }

    fn area_address(&mut self, op: &Op, size: usize, align: u64, access: Access) -> Exec<u64> {
        let linear = self.linear(op, size as u64, access)?;
        self.check_alignment(linear, 4)?;
        if linear.is_multiple_of(align) {
            Ok(linear)
        } else if self.canonical(linear) {
            Err(self.gp(0))
        } else {
            self.raised = Raised::NonCanonical;
            Err(Abort)
        }
    }

    /// Linear address of `len` bytes at an offset of the area. Each part has an effective address of its own.
    fn area_part(&mut self, op: &Op, at: usize, len: usize, access: Access) -> Exec<u64> {
        let offset = self.offset(op).wrapping_add(at as u64) & op.amask();
        self.seg_linear(op.seg as usize, offset, len as u64, access)
    }

    /// Reads a part of the area.
    fn read_part(&mut self, op: &Op, at: usize, into: &mut [u8]) -> Exec {
        let linear = self.area_part(op, at, into.len(), Access::Read)?;
        self.read_bytes(linear, into)
    }

    /// Raises what a write to a part of the area raises.
    fn probe_part(&mut self, op: &Op, at: usize, len: usize) -> Exec {
        let linear = self.area_part(op, at, len, Access::Write)?;
        self.probe(linear, len as u64, Access::Write)
    }

    /// Processors look at the end of what is asked for of AVX-512's state, even if none of it is moved. `format`: the components
    /// of the compacted format, if it is that.
    fn probe_end(
        &mut self,
        op: &Op,
        requested: u64,
        format: Option<u64>,
        count: usize,
        access: Access,
    ) -> Exec {
        let there = |c: &Component| requested & component::AVX512 & c.bit != 0 && c.len(count) != 0;
        let end = |c: &Component| format.map_or(c.standard(), |f| c.compacted(f)) + c.len(count);
        match COMPONENTS.iter().filter(|c| there(c)).map(end).max() {
            Some(end) => {
                let linear = self.area_part(op, end - 1, 1, access)?;
                self.probe(linear, 1, access)
            }
            None => Ok(()),
        }
    }

    /// Writes parts of `area`, all or nothing.
    fn write_parts(&mut self, op: &Op, area: &[u8], parts: &[(usize, usize)]) -> Exec {
        for &(at, len) in parts {
            self.probe_part(op, at, len)?;
        }
        for &(at, len) in parts {
            let linear = self.area_part(op, at, len, Access::Write)?;
            self.write_bytes(linear, &area[at..at + len])?;
        }
        Ok(())
    }
}

fn fxsave(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.x87()?;
    cpu.area_address(op, LEGACY, 16, Access::Write)?;
    let count = cpu.vector_count();
    let mut area = [0; LEGACY];
    cpu.fpu.put_x87(&mut area, op.imm != 0);
    put_image_mxcsr(&mut area, cpu.fpu.frame.mxcsr);
    cpu.fpu.put_xmm(&mut area, count);
    let end = fx::XMM + 16 * count;
    // Processors look at the end first.
    cpu.probe_part(op, LEGACY - 1, 1)?;
    cpu.write_parts(op, &area, &[(0, end)])
}

fn fxrstor(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.x87()?;
    let linear = cpu.area_address(op, LEGACY, 16, Access::Read)?;
    let count = cpu.vector_count();
    let mut area = [0; LEGACY];
    cpu.read_bytes(linear, &mut area)?;
    let mxcsr = image_mxcsr(&area);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.fpu.get_x87(&area, op.imm != 0);
    cpu.fpu.frame.mxcsr = mxcsr;
    cpu.fpu.get_xmm(&area, count);
    Ok(())
}

/// XSAVE, XSAVEOPT, XSAVEC (SDM vol. 1 §13.7, §13.9, §13.10).
fn xsave<const KIND: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.xsave_enabled()?;
    cpu.area_address(op, EXTENDED, 64, Access::Write)?;
    let requested = cpu.requested();
    let count = cpu.vector_count();
    let mut inuse = cpu.fpu.xinuse(requested);
    if KIND == Kind::COMPACTED && requested & component::SSE != 0 && cpu.fpu.frame.mxcsr != MXCSR_INIT {
        inuse |= component::SSE;
    }
    let saved = if KIND == Kind::PLAIN { requested } else { inuse };

    let mut area = [0; AREA];
    let mut parts = Vec::with_capacity(9);
    let header = (LEGACY, if KIND == Kind::COMPACTED { 16 } else { 8 });
    cpu.probe_part(op, LEGACY, header.1)?;
    let format = (KIND == Kind::COMPACTED).then_some(requested);
    cpu.probe_end(op, requested, format, count, Access::Write)?;
    let present = if KIND == Kind::COMPACTED {
        area[LEGACY + 8..LEGACY + 16].copy_from_slice(&(COMPACTED | requested).to_le_bytes());
        inuse
    } else {
        let mut old = [0; 8];
        cpu.read_part(op, LEGACY, &mut old)?;
        u64::from_le_bytes(old) & !requested | inuse
    };
    area[LEGACY..LEGACY + 8].copy_from_slice(&present.to_le_bytes());
    if saved & component::X87 != 0 {
        cpu.fpu.put_x87(&mut area, op.imm != 0);
        parts.extend([(0, fx::MXCSR), (fx::ST, fx::XMM - fx::ST)]);
    }
    let wants_mxcsr = match KIND {
        Kind::COMPACTED => saved & component::SSE,
        Kind::OPTIMIZED => requested & (component::SSE | component::AVX),
        _ => saved & (component::SSE | component::AVX),
    };
    if wants_mxcsr != 0 {
        put_image_mxcsr(&mut area, cpu.fpu.frame.mxcsr);
        parts.push((fx::MXCSR, 8));
    }
    if saved & component::SSE != 0 {
        cpu.fpu.put_xmm(&mut area, count);
        parts.push((fx::XMM, 16 * count));
    }
    for component in COMPONENTS.iter().filter(|c| saved & c.bit != 0 && c.len(count) != 0) {
        let at = format.map_or(component.standard(), |format| component.compacted(format));
        cpu.fpu.put_component(*component, count, &mut area[at..]);
        parts.push((at, component.len(count)));
    }
    parts.push(header);
    cpu.write_parts(op, &area, &parts)
}

/// XRSTOR (SDM vol. 1 §13.8).
fn xrstor<const COMPACTION: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.xsave_enabled()?;
    cpu.area_address(op, EXTENDED, 64, Access::Read)?;
    let requested = cpu.requested();
    let count = cpu.vector_count();
    let mut area = [0; AREA];
    cpu.read_part(op, LEGACY, &mut area[LEGACY..EXTENDED])?;
    let word =
        |area: &[u8; AREA], at: usize| area[at..at + 8].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    let (present, format) = (word(&area, LEGACY), word(&area, LEGACY + 8));
    let compacted = format & COMPACTED != 0;
    let valid = if compacted {
        COMPACTION
            && format & !COMPACTED & !cpu.xcr0 == 0
            && present & !format == 0
            && present & COMPACTED == 0
            && area[LEGACY + 16..EXTENDED].iter().all(|&b| b == 0)
    } else {
        present & !cpu.xcr0 == 0 && format == 0 && area[LEGACY + 16..LEGACY + 24].iter().all(|&b| b == 0)
    };
    if !valid {
        return Err(cpu.gp(0));
    }
    let looked_at = if compacted { requested & format } else { requested };
    cpu.probe_end(op, looked_at, compacted.then_some(format), count, Access::Read)?;
    let load = requested & present;
    let reset = requested & !present;

    // MXCSR belongs to SSE in the compacted format, to SSE and AVX (and no bit of XSTATE_BV) in the standard one.
    let mxcsr_from_memory = if compacted {
        load & component::SSE != 0
    } else {
        requested & (component::SSE | component::AVX) != 0
    };
    if load & component::X87 != 0 {
        cpu.read_part(op, 0, &mut area[..fx::MXCSR])?;
        cpu.read_part(op, fx::ST, &mut area[fx::ST..fx::XMM])?;
    }
    if mxcsr_from_memory {
        cpu.read_part(op, fx::MXCSR, &mut area[fx::MXCSR..fx::MXCSR_MASK])?;
    }
    if load & component::SSE != 0 {
        cpu.read_part(op, fx::XMM, &mut area[fx::XMM..fx::XMM + 16 * count])?;
    }
    let place = |c: &Component| if compacted { c.compacted(format) } else { c.standard() };
    for component in COMPONENTS.iter().filter(|c| load & c.bit != 0 && c.len(count) != 0) {
        let at = place(component);
        cpu.read_part(op, at, &mut area[at..at + component.len(count)])?;
    }
    let mxcsr = image_mxcsr(&area);
    if mxcsr_from_memory && mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }

    let fpu = &mut cpu.fpu;
    if load & component::X87 != 0 {
        fpu.get_x87(&area, op.imm != 0);
    } else if reset & component::X87 != 0 {
        fpu.init_x87();
    }
    if load & component::SSE != 0 {
        fpu.get_xmm(&area, count);
    } else if reset & component::SSE != 0 {
        fpu.init_sse(count);
    }
    for component in COMPONENTS {
        if load & component.bit != 0 {
            fpu.get_component(component, count, &area[place(&component)..]);
        } else if reset & component.bit != 0 {
            fpu.init_component(component, count);
        }
    }
    if mxcsr_from_memory {
        fpu.frame.mxcsr = mxcsr;
    } else if compacted && reset & component::SSE != 0 {
        fpu.frame.mxcsr = MXCSR_INIT;
    }
    Ok(())
}
