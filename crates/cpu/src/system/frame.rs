//! Stacks other than the one that SS:RSP is: those that control transfers build a frame on, or read one from, before they
//! commit to it.

use skep_hv::state::Segment;

use super::mode::access;
use crate::cpu::{Cpu, seg};
use crate::fault::{Abort, Exec, Raised, vector};
use crate::regs::at;

/// A stack in the making.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    segment: Segment,
    /// Stack pointer; moves with every push and pop.
    pub(super) sp: u64,
    /// Mask of the stack pointer; all ones in 64-bit mode, where the segment does not count.
    mask: u64,
    /// The accesses are those of a more privileged level than the current one.
    supervisor: bool,
    /// Error code of the #SS that an access may raise.
    error: u32,
}

/// Mask of the stack pointer for a stack segment outside of 64-bit mode.
pub(super) fn stack_mask(ss: &Segment) -> u64 {
    if ss.access & access::DB != 0 { 0xffff_ffff } else { 0xffff }
}

impl Frame {
    /// The current stack.
    pub(super) fn current(cpu: &Cpu, error: u32) -> Self {
        Self {
            segment: cpu.segs[seg::SS],
            sp: cpu.regs.r64(at::RSP),
            mask: cpu.mode.stack_mask,
            supervisor: false,
            error,
        }
    }

    /// A stack of a more privileged level outside of IA-32e mode.
    pub(super) fn inner(segment: Segment, sp: u64, error: u32) -> Self {
        Self { segment, sp, mask: stack_mask(&segment), supervisor: true, error }
    }

    /// A stack in 64-bit mode; `supervisor` if its level is more privileged than the current one.
    pub(super) fn wide(sp: u64, supervisor: bool, error: u32) -> Self {
        Self { segment: Segment::default(), sp, mask: u64::MAX, supervisor, error }
    }

    /// The stack pointer as RSP shall hold it: a 16-bit one leaves the rest of `old` alone.
    pub(super) fn pointer(&self, old: u64) -> u64 {
        if self.mask == 0xffff { old & !0xffff | self.sp & 0xffff } else { self.sp & self.mask }
    }

    fn linear(&self, offset: u64, size: u64) -> Option<u64> {
        if self.mask == u64::MAX {
            return Some(offset);
        }
        let last = offset.wrapping_add(size - 1);
        let limit = u64::from(self.segment.limit);
        let expand_down = self.segment.access & (access::CODE | access::EC) == access::EC;
        let inside = if expand_down {
            let top = if self.segment.access & access::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        inside.then(|| self.segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Pushes the low `size` bytes (2, 4, 8) of `value`.
    pub(super) fn push(&mut self, cpu: &mut Cpu, size: u64, value: u64) -> Exec {
        let sp = self.sp.wrapping_sub(size) & self.mask;
        let Some(linear) = self.linear(sp, size) else { return Err(cpu.fault(vector::SS, self.error)) };
        let done = match (size, self.supervisor) {
            (2, false) => cpu.write(linear, value as u16),
            (4, false) => cpu.write(linear, value as u32),
            (_, false) => cpu.write(linear, value),
            (2, true) => cpu.write_system(linear, value as u16),
            (4, true) => cpu.write_system(linear, value as u32),
            (_, true) => cpu.write_system(linear, value),
        };
        self.settle(cpu, done)?;
        self.sp = self.sp & !self.mask | sp;
        Ok(())
    }

    /// Pops `size` bytes (2, 4, 8), zero-extended.
    pub(super) fn pop(&mut self, cpu: &mut Cpu, size: u64) -> Exec<u64> {
        let value = self.peek(cpu, 0, size)?;
        self.skip(size);
        Ok(value)
    }

    /// Reads `size` bytes that lie `offset` above the top.
    pub(super) fn peek(&self, cpu: &mut Cpu, offset: u64, size: u64) -> Exec<u64> {
        let sp = self.sp.wrapping_add(offset) & self.mask;
        let Some(linear) = self.linear(sp, size) else { return Err(cpu.fault(vector::SS, self.error)) };
        let value = match size {
            2 => cpu.read::<u16>(linear).map(u64::from),
            4 => cpu.read::<u32>(linear).map(u64::from),
            _ => cpu.read::<u64>(linear),
        };
        self.settle(cpu, value)
    }

    /// Drops bytes from the top.
    pub(super) fn skip(&mut self, bytes: u64) {
        self.sp = self.sp & !self.mask | self.sp.wrapping_add(bytes) & self.mask;
    }

    /// A non-canonical stack address is #SS.
    fn settle<T>(&self, cpu: &mut Cpu, done: Result<T, Abort>) -> Exec<T> {
        if done.is_err() && cpu.raised == Raised::NonCanonical {
            return Err(cpu.fault(vector::SS, self.error));
        }
        done
    }
}
