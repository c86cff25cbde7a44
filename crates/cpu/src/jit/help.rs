//! What translated code asks of Rust: translations of addresses, and instructions that only their handlers can execute.
#![expect(unsafe_code, reason = "called from translated code, with pointers that it was given")]

use super::glue::Verdict;
use crate::cpu::Cpu;
use crate::fault::Abort;
use crate::op::Op;
use crate::regs::BLOCK_RIP;
use crate::run::Step;

/// What an access wants, and which instruction it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted(pub(super) u32);

impl Wanted {
    pub(super) const WRITE: u32 = 1 << 23;
    const ON_STACK: u32 = 1 << 24;
    pub(super) const ALIGNED: u32 = 1 << 25;
    const MASKED: u32 = 1 << 26;

    /// An access of `size` bytes by the instruction at `at` of its page, which is `len` long.
    pub(super) fn new(at: u16, len: u8, size: u8, write: bool) -> Self {
        let place = u32::from(at) | u32::from(len) << 12 | u32::from(size) << 16;
        Self(place | if write { Self::WRITE } else { 0 })
    }

    /// Through SS.
    pub(super) fn on_stack(self, yes: bool) -> Self {
        Self(self.0 | if yes { Self::ON_STACK } else { 0 })
    }

    /// Must be aligned to its size.
    pub(super) fn aligned(self, yes: bool) -> Self {
        Self(self.0 | if yes { Self::ALIGNED } else { 0 })
    }

    /// Parts of it may be left out.
    pub(super) fn masked(self, yes: bool) -> Self {
        Self(self.0 | if yes { Self::MASKED } else { 0 })
    }

    pub(super) fn is_write(self) -> bool {
        self.0 & Self::WRITE != 0
    }

    pub(super) fn is_aligned(self) -> bool {
        self.0 & Self::ALIGNED != 0
    }

    pub(super) fn size(self) -> u64 {
        u64::from(self.0 >> 16 & 0x7f)
    }

    fn at(self) -> u64 {
        u64::from(self.0 & 0xfff)
    }

    fn len(self) -> u16 {
        (self.0 >> 12 & 0xf) as u16
    }

    fn segment(self) -> u8 {
        if self.0 & Self::ON_STACK != 0 { crate::cpu::seg::SS as u8 } else { crate::cpu::seg::DS as u8 }
    }
}

/// Finds the host's address for an access, or completes the instruction.
///
/// # Safety
/// `cpu` is the processor whose translated code calls.
pub(super) unsafe extern "sysv64" fn access(cpu: *mut Cpu, linear: u64, wanted: u32) -> Verdict {
    // SAFETY: the processor runs translated code through `Cpu::enter`, which lends it for as long.
    let cpu = unsafe { &mut *cpu };
    let wanted = Wanted(wanted);
    let start = cpu.hot.base.wrapping_add(wanted.at());
    cpu.rip = start;
    let cr2 = cpu.cr2;
    let misplaced = wanted.is_aligned() && !linear.is_multiple_of(wanted.size());
    if !misplaced {
        match cpu.host_range(linear, wanted.size(), wanted.is_write()) {
            Ok(Some(host)) => return Verdict { what: Verdict::GO_ON, value: host as u64 },
            Ok(None) => {}
            // The interpreter knows whether what is not there is wanted.
            Err(Abort) if wanted.0 & Wanted::MASKED != 0 => {
                (cpu.cr2, cpu.raised) = (cr2, crate::fault::Raised::None);
            }
            Err(Abort) => return cpu.raised_in_code(Some(wanted.segment())),
        }
    }
    let step = cpu.step();
    let next = cpu.advance(start, wanted.len());
    cpu.stepped(step, next)
}

/// Runs an operation's handler.
///
/// # Safety
/// As for [`access`]; `op` was given to the translator for this code.
pub(super) unsafe extern "sysv64" fn handler(cpu: *mut Cpu, op: u64, _: u32) -> Verdict {
    // SAFETY: as above; operations live as long as the code that names them.
    let (cpu, op) = unsafe { (&mut *cpu, &*(op as *const Op)) };
    let base = cpu.hot.base;
    let next = cpu.advance(base, op.end);
    cpu.blocks.set_running(std::ptr::null());
    cpu.regs.set64(BLOCK_RIP, base);
    cpu.rip = next;
    cpu.stats.instructions += 1;
    match (op.run)(cpu, op) {
        Ok(()) => cpu.go_on(next),
        Err(Abort) => {
            cpu.rip = cpu.advance(base, op.end - u16::from(op.len));
            cpu.raised_in_code(Some(op.seg))
        }
    }
}

impl Cpu {
    /// An instruction was executed by the interpreter; where it should have led to if it led nowhere else.
    fn stepped(&mut self, step: Step, next: u64) -> Verdict {
        match step {
            Step::Done => match self.go_on(next) {
                Verdict { what: Verdict::GO_ON, value } => Verdict { what: Verdict::DONE, value },
                other => other,
            },
            Step::Raised(exception) => {
                self.raised = crate::fault::Raised::Exception(exception);
                self.raised_in_code(None)
            }
            Step::Failed(why) => {
                self.raised = crate::fault::Raised::Failed(why);
                self.look = true;
                Verdict { what: Verdict::LEAVE, value: 0 }
            }
        }
    }

    /// Delivers what was raised by the instruction at RIP.
    fn raised_in_code(&mut self, segment: Option<u8>) -> Verdict {
        if self.hot.keep_raised {
            self.raised = self.settle(segment);
            return Verdict { what: Verdict::LEAVE, value: 0 };
        }
        self.deliver_raised(segment);
        // Never back to the instruction behind the one that raised.
        match self.go_on(!self.rip) {
            Verdict { what: Verdict::GO_ON, value } => Verdict { what: Verdict::DISPATCH, value },
            other => other,
        }
    }

    /// Whether translated code may go on, and where.
    fn go_on(&mut self, next: u64) -> Verdict {
        if self.look || self.attention() || !self.translates() {
            return Verdict { what: Verdict::LEAVE, value: 0 };
        }
        self.notice_changed_code();
        let stamp = self.code_stamp();
        let same = stamp == self.hot.stamp && self.rip == next;
        self.hot.stamp = stamp;
        Verdict { what: if same { Verdict::GO_ON } else { Verdict::DISPATCH }, value: 0 }
    }
}
