//! The task-state segment (SDM vol. 3A chapter 8): where stacks of inner levels and the I/O permissions come from.
//!
//! Hardware task switches have their entry here and stop the machine: no system that this processor is for today uses
//! them. What they need (descriptors, the register image, the busy flag) is at hand in this module and its neighbours.

use skep_hv::state::Segment;

use super::descriptor::{index, is_null, system_type};
use crate::cpu::Cpu;
use crate::fault::{Abort, Exec, Raised, vector};

impl Cpu {
    /// Type of the current TSS: whether it is the 32-bit (in IA-32e mode 64-bit) kind.
    fn tss_is_wide(&self) -> bool {
        matches!(self.tr.access & 0xf, system_type::TSS | system_type::TSS_BUSY)
    }

    fn tss_fault(&mut self, ext: u32) -> Abort {
        let error = index(self.tr.selector) | ext;
        self.fault(vector::TS, error)
    }

    /// Linear address of `size` bytes of the TSS; #TS beyond its limit.
    fn tss_linear(&mut self, offset: u32, size: u32, ext: u32) -> Exec<u64> {
        if offset + size - 1 > self.tr.limit || self.tr.access & Segment::UNUSABLE != 0 {
            return Err(self.tss_fault(ext));
        }
        Ok(self.system_linear(self.tr.base.wrapping_add(u64::from(offset))))
    }

    /// SS:ESP of a privilege level (§8.2.1, figure 8-2).
    pub(super) fn tss_stack(&mut self, dpl: u8, ext: u32) -> Exec<(u16, u64)> {
        let level = u32::from(dpl);
        if self.tss_is_wide() {
            let linear = self.tss_linear(level * 8 + 4, 6, ext)?;
            let sp = self.read_system::<u32>(linear)?;
            let ss = self.read_system::<u16>(linear.wrapping_add(4))?;
            Ok((ss, u64::from(sp)))
        } else {
            let linear = self.tss_linear(level * 4 + 2, 4, ext)?;
            let sp = self.read_system::<u16>(linear)?;
            let ss = self.read_system::<u16>(linear.wrapping_add(2))?;
            Ok((ss, u64::from(sp)))
        }
    }

    /// A stack pointer of the 64-bit TSS (figure 8-11): RSP0 to RSP2 by 0 to 2, IST1 to IST7 by 4 to 10. One that is not
    /// canonical is #SS.
    pub(super) fn tss_stack64(&mut self, slot: u32, ext: u32) -> Exec<u64> {
        let linear = self.tss_linear(slot * 8 + 4, 8, ext)?;
        let value = self.read_system::<u64>(linear);
        let sp = self.table_fault(value)?;
        if !self.canonical(sp) {
            return Err(self.fault(vector::SS, ext));
        }
        Ok(sp)
    }

    /// The stack segment of an inner level, as the TSS names it (§6.12.1, §5.8.5).
    pub(super) fn inner_stack_segment(&mut self, selector: u16, dpl: u8, ext: u32) -> Exec<Segment> {
        if is_null(selector) {
            return Err(self.fault(vector::TS, ext));
        }
        let descriptor = self.descriptor(selector, vector::TS, ext)?;
        let matching = (selector & 3) as u8 == dpl && descriptor.dpl() == dpl;
        if !matching || !descriptor.is_data() || !descriptor.rw() {
            return Err(self.fault(vector::TS, index(selector) | ext));
        }
        if !descriptor.present() {
            return Err(self.fault(vector::SS, index(selector) | ext));
        }
        self.mark_accessed(&descriptor, selector)
    }

    /// Whether the TSS permits `size` bytes of I/O at `port` (vol. 1 §19.5.2).
    pub(super) fn tss_permits_io(&mut self, port: u16, size: u8) -> Exec<bool> {
        if !self.tss_is_wide() || self.tr.access & Segment::UNUSABLE != 0 || self.tr.limit < 0x67 {
            return Ok(false);
        }
        let base = self.tr.base;
        let map = self.read_system::<u16>(self.system_linear(base.wrapping_add(0x66)))?;
        let at = u32::from(map) + u32::from(port / 8);
        // Two bytes are read, whatever the port.
        if at + 1 > self.tr.limit {
            return Ok(false);
        }
        let bits = self.read_system::<u16>(self.system_linear(base.wrapping_add(u64::from(at))))?;
        Ok(bits >> (port % 8) & ((1 << size) - 1) == 0)
    }

    /// A switch to the task whose TSS `selector` names.
    pub(super) fn switch_task(&mut self, _selector: u16, _nested: bool, _ext: u32) -> Exec {
        self.raised = Raised::Failed("hardware task switches are not supported");
        Err(Abort)
    }
}
