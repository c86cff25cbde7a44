//! Effective and linear addresses.

use crate::cpu::{CodeSize, Cpu, seg};
use crate::fault::{Exec, vector};
use crate::mmu::Access;
use crate::op::Op;

/// How a memory operand's linear address is made: fixed when the instruction is decoded.
pub(crate) trait Addressing {
    /// Linear address of the operand, `size` bytes long.
    fn linear(cpu: &mut Cpu, op: &Op, size: u64, access: Access) -> Exec<u64>;
}

/// 64-bit mode, 64-bit addresses, no FS or GS.
pub(crate) struct Flat;
/// Everything else.
pub(crate) struct General;

impl Addressing for Flat {
    #[inline(always)]
    fn linear(cpu: &mut Cpu, op: &Op, _size: u64, _access: Access) -> Exec<u64> {
        Ok(cpu.sum(op))
    }
}

impl Addressing for General {
    fn linear(cpu: &mut Cpu, op: &Op, size: u64, access: Access) -> Exec<u64> {
        cpu.linear(op, size, access)
    }
}

impl Cpu {
    #[inline(always)]
    fn sum(&self, op: &Op) -> u64 {
        self.regs.r64(op.base).wrapping_add(self.regs.r64(op.index) << op.scale).wrapping_add(op.disp)
    }

    /// Effective address: offset within its segment.
    #[inline(always)]
    pub(crate) fn offset(&self, op: &Op) -> u64 {
        self.sum(op) & op.amask()
    }

    /// Linear address of the memory operand.
    pub(crate) fn linear(&mut self, op: &Op, size: u64, access: Access) -> Exec<u64> {
        self.seg_linear(op.seg as usize, self.offset(op), size, access)
    }

    /// Linear address of `offset` in a segment, with the checks of SDM vol. 3A §5.3 and §5.5.
    pub(crate) fn seg_linear(&mut self, segment: usize, offset: u64, size: u64, access: Access) -> Exec<u64> {
        if self.mode.code == CodeSize::Bits64 {
            return Ok(match segment {
                seg::FS | seg::GS => self.segs[segment].base.wrapping_add(offset),
                _ => offset,
            });
        }
        self.legacy_linear(segment, offset, size, access)
    }

    #[inline(never)]
    fn legacy_linear(&mut self, segment: usize, offset: u64, size: u64, access: Access) -> Exec<u64> {
        let s = self.segs[segment];
        let (access_type, code) = (s.access & 0xf, s.access & 8 != 0);
        let allowed = if !self.mode.protected || self.mode.v86 {
            true
        } else if s.access & skep_hv::state::Segment::UNUSABLE != 0 {
            false
        } else if access == Access::Write {
            !code && access_type & 2 != 0
        } else {
            !code || access_type & 2 != 0 || access == Access::Fetch
        };
        let last = offset.wrapping_add(size.max(1) - 1);
        let limit = u64::from(s.limit);
        let inside = if !code && access_type & 4 != 0 && self.mode.protected && !self.mode.v86 {
            // Expand-down: valid offsets lie above the limit.
            let top = if s.access & 1 << 14 != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top && last >= offset
        } else {
            last <= limit && last >= offset
        };
        if !(allowed && inside) {
            return Err(if segment == seg::SS { self.fault(vector::SS, 0) } else { self.gp(0) });
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }
}
