//! Segment descriptors: SDM vol. 3A §3.4.5, §3.5, §5.8.3.

use skep_hv::state::Segment;

use super::mode::access;
use crate::cpu::Cpu;
use crate::fault::{Abort, Exec, Raised, vector};

/// Types of system descriptors (table 3-2).
pub(super) mod system_type {
    pub(crate) const TSS16: u32 = 1;
    pub(crate) const LDT: u32 = 2;
    pub(crate) const TSS16_BUSY: u32 = 3;
    pub(crate) const CALL_GATE16: u32 = 4;
    pub(crate) const TASK_GATE: u32 = 5;
    pub(crate) const INTERRUPT_GATE16: u32 = 6;
    pub(crate) const TRAP_GATE16: u32 = 7;
    pub(crate) const TSS: u32 = 9;
    pub(crate) const TSS_BUSY: u32 = 11;
    pub(crate) const CALL_GATE: u32 = 12;
    pub(crate) const INTERRUPT_GATE: u32 = 14;
    pub(crate) const TRAP_GATE: u32 = 15;
}

/// Eight bytes of a descriptor table, and where they lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) raw: u64,
    pub(super) linear: u64,
}

/// A selector without its RPL: what error codes hold.
pub(super) fn index(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// Whether a selector is null.
pub(super) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

impl Descriptor {
    /// Access rights as [`Segment::access`] has them.
    pub(super) fn access(&self) -> u32 {
        (self.raw >> 40) as u32 & 0xf0ff
    }

    pub(super) fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }

    pub(super) fn present(&self) -> bool {
        self.access() & access::PRESENT != 0
    }

    /// Code or data.
    pub(super) fn is_segment(&self) -> bool {
        self.access() & access::S != 0
    }

    pub(super) fn is_code(&self) -> bool {
        self.access() & (access::S | access::CODE) == access::S | access::CODE
    }

    pub(super) fn is_conforming(&self) -> bool {
        self.is_code() && self.access() & access::EC != 0
    }

    pub(super) fn is_data(&self) -> bool {
        self.access() & (access::S | access::CODE) == access::S
    }

    /// Data segment that may be written, or code segment that may be read.
    pub(super) fn rw(&self) -> bool {
        self.access() & access::RW != 0
    }

    /// Type of a system descriptor.
    pub(super) fn system_type(&self) -> u32 {
        self.access() & 0xf
    }

    pub(super) fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | (self.raw >> 56 & 0xff) << 24
    }

    /// Limit in bytes.
    pub(super) fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.access() & access::G != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The segment register that loading this gives.
    pub(super) fn segment(&self, selector: u16) -> Segment {
        Segment { selector, base: self.base(), limit: self.limit(), access: self.access() }
    }
}

/// A gate: call, interrupt, trap or task.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gate {
    pub(super) selector: u16,
    pub(super) offset: u64,
    /// Bits 36:32: parameter count, or interrupt stack table.
    pub(super) count: u8,
}

impl Gate {
    /// `high` is the upper half of a 16-byte gate.
    pub(super) fn new(raw: u64, high: u64) -> Self {
        Self {
            selector: (raw >> 16) as u16,
            offset: raw & 0xffff | (raw >> 48) << 16 | high << 32,
            count: (raw >> 32 & 0x1f) as u8,
        }
    }
}

impl Cpu {
    /// Reads the descriptor that a selector (not null) names. Outside of its table: `fault` with the selector. `ext` goes
    /// into the error code.
    pub(super) fn descriptor(&mut self, selector: u16, fault: u8, ext: u32) -> Exec<Descriptor> {
        match self.find_descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => Err(self.fault(fault, index(selector) | ext)),
        }
    }

    /// As above; `None` outside of its table.
    pub(super) fn find_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        let Some(linear) = self.descriptor_address(selector, 8) else { return Ok(None) };
        let raw = self.read_table(linear)?;
        Ok(Some(Descriptor { raw, linear }))
    }

    /// Linear address of `size` bytes at a selector, if within its table.
    pub(super) fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.access & Segment::UNUSABLE == 0 {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            return None;
        };
        (offset + size - 1 <= limit).then(|| self.system_linear(base.wrapping_add(offset)))
    }

    /// Addresses of system structures are 32 bits wide outside of IA-32e mode.
    pub(super) fn system_linear(&self, linear: u64) -> u64 {
        if self.mode.long { linear } else { linear & 0xffff_ffff }
    }

    /// Reads eight bytes of a table; a non-canonical address is #GP(0).
    pub(super) fn read_table(&mut self, linear: u64) -> Exec<u64> {
        let value = self.read_system::<u64>(linear);
        self.table_fault(value)
    }

    /// Turns a non-canonical access to a table into #GP(0).
    pub(super) fn table_fault<T>(&mut self, done: Result<T, Abort>) -> Exec<T> {
        if done.is_err() && self.raised == Raised::NonCanonical {
            return Err(self.gp(0));
        }
        done
    }

    /// The upper eight bytes of a 16-byte system descriptor, whose type field must be zero (§3.5.2: else #GP).
    pub(super) fn upper_half(&mut self, selector: u16, fault: u8, ext: u32) -> Exec<u64> {
        let Some(linear) = self.descriptor_address(selector, 16) else {
            return Err(self.fault(fault, index(selector) | ext));
        };
        let high = self.read_table(linear.wrapping_add(8))?;
        if high >> 40 & 0x1f != 0 {
            return Err(self.fault(fault, index(selector) | ext));
        }
        Ok(high)
    }

    /// Sets the accessed flag of a segment's descriptor, unless it is set: the segment as it is to be loaded.
    pub(super) fn mark_accessed(&mut self, descriptor: &Descriptor, selector: u16) -> Exec<Segment> {
        let mut segment = descriptor.segment(selector);
        if segment.access & access::ACCESSED == 0 {
            let rights = (descriptor.raw >> 40) as u8 | access::ACCESSED as u8;
            let done = self.write_system(descriptor.linear.wrapping_add(5), rights);
            self.table_fault(done)?;
            segment.access |= access::ACCESSED;
        }
        Ok(segment)
    }

    /// The code segment that a transfer is to go to, checked but for privilege: `fault` is what a wrong selector raises.
    pub(super) fn code_descriptor(&mut self, selector: u16, fault: u8, ext: u32) -> Exec<Descriptor> {
        if is_null(selector) {
            return Err(self.fault(fault, ext));
        }
        let descriptor = self.descriptor(selector, fault, ext)?;
        if !descriptor.is_code() {
            return Err(self.fault(fault, index(selector) | ext));
        }
        Ok(descriptor)
    }

    /// L and D of a code segment exclude each other in IA-32e mode.
    pub(super) fn check_long_code(&mut self, descriptor: &Descriptor, selector: u16, ext: u32) -> Exec {
        let both = access::L | access::DB;
        if self.mode.long && descriptor.access() & both == both {
            return Err(self.fault(vector::GP, index(selector) | ext));
        }
        Ok(())
    }
}
