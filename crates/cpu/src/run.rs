//! The loop around it all: find a block, run it, and between blocks look at what else wants attention.
#![expect(
    unsafe_code,
    reason = "blocks and the machine's callbacks are reached by pointer while the loop runs"
)]

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use skep_hv::{IoFlow, Pending, RunEnd, Startup, VcpuIo, monotonic_ns};

use crate::block::{Block, Key};
use crate::cpu::{CodeSize, Cpu, fl, seg};
use crate::decode::Fresh;
use crate::fault::{Abort, Exception, Exec, Raised, vector};
use crate::regs::BLOCK_RIP;
use crate::vm::mail;

/// Instructions between two looks at the clock.
const POLL_INSTRUCTIONS: u64 = 4096;

/// DR6.BS: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;

/// The machine's callbacks while a run lasts.
pub(crate) struct IoSlot(Option<NonNull<dyn VcpuIo>>);

// SAFETY: the pointer is set and cleared within one call of `Cpu::with_io`, on one thread; between runs it is `None`.
unsafe impl Send for IoSlot {}

impl IoSlot {
    pub(crate) const fn empty() -> Self {
        Self(None)
    }
}

/// A machine without devices, for when none is attached.
pub(crate) struct Nowhere;

impl VcpuIo for Nowhere {
    fn port_read(&mut self, _: u16, width: u8) -> u32 {
        u32::MAX >> (32 - 8 * u32::from(width.clamp(1, 4)))
    }
    fn port_write(&mut self, _: u16, _: u8, _: u32) -> IoFlow {
        IoFlow::Continue
    }
    fn memory_read(&mut self, _: u64, width: u8) -> u64 {
        u64::MAX >> (64 - 8 * u32::from(width.clamp(1, 8)))
    }
    fn memory_write(&mut self, _: u64, _: u8, _: u64) -> IoFlow {
        IoFlow::Continue
    }
    fn interrupts(&mut self) -> Pending {
        Pending { next_ns: u64::MAX, ..Pending::default() }
    }
    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
    fn acknowledge_nmi(&mut self) {}
    fn acknowledge_startup(&mut self) -> Option<Startup> {
        None
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _: u8) {}
    fn apic_msr_read(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn apic_msr_write(&mut self, _: u32, _: u64) -> Option<IoFlow> {
        None
    }
    fn send_ipis(&mut self, _: u64, _: &mut dyn Iterator<Item = u32>) {}
}

/// How one step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The instruction is done.
    Done,
    /// It raised this; nothing was delivered, RIP is at the instruction.
    Raised(Exception),
    /// The processor cannot go on.
    Failed(&'static str),
}

impl Cpu {
    /// The machine.
    pub(crate) fn io(&mut self) -> &mut dyn VcpuIo {
        match self.io.0 {
            // SAFETY: set by `with_io` for its own duration, from an exclusive borrow that it holds.
            Some(mut io) => unsafe { io.as_mut() },
            None => Box::leak(Box::new(Nowhere)),
        }
    }

    /// To be called with the machine's answer to a write: interrupts may have changed, or it wants us to leave.
    pub(crate) fn after_io(&mut self, flow: IoFlow) {
        self.look = true;
        self.ask_apic = true;
        self.leave |= flow == IoFlow::Leave;
    }

    /// Lends the processor a machine while `f` lasts.
    pub(crate) fn with_io<T>(&mut self, io: &mut dyn VcpuIo, f: impl FnOnce(&mut Self) -> T) -> T {
        // SAFETY: only the lifetime changes; the slot is emptied below, before the borrow ends.
        let io: NonNull<dyn VcpuIo> = unsafe { std::mem::transmute(NonNull::from(io)) };
        self.io = IoSlot(Some(io));
        let result = f(self);
        self.io = IoSlot::empty();
        result
    }

    /// Runs until there is a reason to stop.
    pub(crate) fn run(&mut self, io: &mut dyn VcpuIo) -> RunEnd {
        self.with_io(io, |cpu| {
            cpu.enter_guest();
            cpu.ask_apic = true;
            let end = loop {
                if let Some(end) = cpu.service() {
                    break end;
                }
                cpu.make_room_for_all();
                if !cpu.translates() {
                    cpu.execute();
                } else if cpu.lockstep.is_none() {
                    cpu.execute_translated();
                } else if let Some(end) = cpu.execute_lockstep() {
                    break end;
                }
            };
            cpu.mailbox.in_guest.store(false, Ordering::SeqCst);
            end
        })
    }

    /// Looks at everything that can happen between two instructions, in the order of SDM vol. 3A table 6-2.
    fn service(&mut self) -> Option<RunEnd> {
        loop {
            self.look = false;
            if let Some(end) = self.read_mail() {
                return Some(end);
            }
            if let Raised::Failed(why) = self.raised {
                self.raised = Raised::None;
                return Some(self.failed(why));
            }
            if self.shutdown {
                return Some(RunEnd::TripleFault);
            }
            if std::mem::take(&mut self.leave) {
                return Some(RunEnd::Kicked);
            }
            if self.ask_apic || self.clock_reached() {
                self.ask_apic = false;
                self.pending = self.io().interrupts();
                self.deadline = self.pending.next_ns;
                if self.shared.uses_alarm {
                    self.shared.alarm.set(self.id, self.deadline);
                }
            }
            if self.pending.startup {
                self.take_startup();
                continue;
            }
            if self.wait_for_sipi {
                self.sleep();
                continue;
            }
            if self.debug_trap != 0 && !self.mov_ss_shadow {
                self.dr6 |= std::mem::take(&mut self.debug_trap);
                self.deliver_exception(Exception { vector: vector::DB, error: None });
                continue;
            }
            if self.pending.nmi && !self.nmi_blocked && !self.mov_ss_shadow {
                self.io().acknowledge_nmi();
                self.ask_apic = true;
                self.halted = false;
                self.stats.interrupts += 1;
                self.deliver_nmi();
                continue;
            }
            if self.pending.maskable && self.flag(fl::IF) && !self.sti_shadow && !self.mov_ss_shadow {
                self.ask_apic = true;
                if let Some(vector) = self.io().acknowledge() {
                    self.halted = false;
                    self.stats.interrupts += 1;
                    self.deliver_interrupt(vector);
                }
                continue;
            }
            if self.halted {
                if !self.flag(fl::IF) && !self.pending.nmi {
                    return Some(RunEnd::Halted);
                }
                self.sleep();
                continue;
            }
            if self.sti_shadow || self.mov_ss_shadow || self.flag(fl::TF) || self.dr7 & 0xff != 0 {
                self.step_and_deliver();
                continue;
            }
            if !self.look {
                return None;
            }
        }
    }

    fn read_mail(&mut self) -> Option<RunEnd> {
        let mail = self.mailbox.attention.swap(0, Ordering::SeqCst);
        if mail == 0 {
            return None;
        }
        if mail & mail::FLUSH != 0 {
            self.answer_flush();
        }
        if mail & mail::STAND_STILL != 0 {
            self.mailbox.in_guest.store(false, Ordering::SeqCst);
            self.enter_guest();
        }
        if mail & mail::WAKE != 0 {
            self.ask_apic = true;
        }
        (mail & mail::KICK != 0).then_some(RunEnd::Kicked)
    }

    fn take_startup(&mut self) {
        self.ask_apic = true;
        match self.io().acknowledge_startup() {
            Some(Startup::Init) => {
                self.init_reset();
                self.wait_for_sipi = self.id != 0;
                self.halted = false;
            }
            Some(Startup::Sipi(vector)) if self.wait_for_sipi => self.sipi(vector),
            _ => {}
        }
    }

    /// Waits for mail or the APIC's next deadline.
    fn sleep(&mut self) {
        let since = monotonic_ns();
        self.mailbox.in_guest.store(false, Ordering::SeqCst);
        self.stats.halts += 1;
        self.kvm_going_to_sleep();
        self.mailbox.wait(self.deadline);
        self.enter_guest();
        self.kvm_woken();
        self.ask_apic = true;
        self.stats.halted_ns += monotonic_ns().saturating_sub(since);
    }

    pub(crate) fn clock_reached(&mut self) -> bool {
        self.deadline != u64::MAX && monotonic_ns() >= self.deadline
    }

    fn failed(&mut self, why: &str) -> RunEnd {
        let linear = self.segs[seg::CS].base.wrapping_add(self.rip);
        let linear = if self.mode.code == CodeSize::Bits64 { self.rip } else { linear };
        let mut bytes = String::new();
        for i in 0..15 {
            match self.read_system::<u8>(linear.wrapping_add(i)) {
                Ok(byte) => bytes.push_str(&format!(" {byte:02x}")),
                Err(Abort) => break,
            }
        }
        self.raised = Raised::None;
        RunEnd::Failed(format!("{why} at RIP {:#x} (instruction bytes{bytes})", self.rip))
    }

    /// Runs blocks until something wants to be looked at.
    fn execute(&mut self) {
        let mut poll = self.stats.instructions + POLL_INSTRUCTIONS;
        while !self.look && self.mailbox.attention.load(Ordering::Relaxed) == 0 && !self.translates() {
            if self.stats.instructions >= poll {
                if self.clock_reached() {
                    return;
                }
                poll = self.stats.instructions + POLL_INSTRUCTIONS;
            }
            let key = Key { code: self.mode.code, user: self.mode.cpl == 3, single: false };
            let linear = self.code_linear();
            self.notice_changed_code();
            let block = match self.blocks.jump(linear, self.tlb.stamp(), key) {
                Some(block) => block,
                None => {
                    if let Err(Abort) = self.fetch(linear, key) {
                        self.deliver_raised(None);
                    }
                    // Decoding may have let others flush us: look at the mail before running anything.
                    continue;
                }
            };
            if let Err(op_seg) = self.run_block(block) {
                if self.raised == Raised::Restart {
                    self.step_and_deliver();
                } else {
                    self.deliver_raised(Some(op_seg));
                }
            }
        }
    }

    #[inline(always)]
    pub(crate) fn code_linear(&self) -> u64 {
        match self.mode.code {
            CodeSize::Bits64 => self.rip,
            _ => self.segs[seg::CS].base.wrapping_add(self.rip) & 0xffff_ffff,
        }
    }

    fn fetch(&mut self, linear: u64, key: Key) -> Exec<*const Block> {
        self.check_code_limit()?;
        self.find_block(linear, key)
    }

    /// #GP(0) if RIP is beyond the limit of CS.
    pub(crate) fn check_code_limit(&mut self) -> Exec {
        if self.mode.code != CodeSize::Bits64 && self.rip > u64::from(self.segs[seg::CS].limit) {
            return Err(self.gp(0));
        }
        Ok(())
    }

    /// Runs one block. On `Err`, RIP is at the instruction that was abandoned; the segment of its operand comes with it.
    #[inline(always)]
    fn run_block(&mut self, block: *const Block) -> Result<(), u8> {
        self.blocks.set_running(block);
        // SAFETY: the arena of blocks is only ever cleared by decoding, which does not happen while one runs.
        let block = unsafe { &*block };
        let start = self.rip;
        self.regs.set64(BLOCK_RIP, start);
        self.rip = self.advance(start, block.len);
        for (i, op) in block.ops.iter().enumerate() {
            if (op.run)(self, op).is_err() {
                self.stats.instructions += i as u64;
                self.rip = self.advance(start, op.end - u16::from(op.len));
                return Err(op.seg);
            }
        }
        self.stats.instructions += block.ops.len() as u64;
        Ok(())
    }

    #[inline(always)]
    pub(crate) fn advance(&self, rip: u64, bytes: u16) -> u64 {
        let next = rip.wrapping_add(u64::from(bytes));
        match self.mode.code {
            CodeSize::Bits64 => next,
            CodeSize::Bits32 => next & 0xffff_ffff,
            // IP wraps only through an address-size override or at the limit, where the next fetch faults.
            CodeSize::Bits16 => next & 0xffff_ffff,
        }
    }

    /// Runs exactly one instruction and says how it ended; delivers nothing.
    pub(crate) fn step(&mut self) -> Step {
        self.raised = Raised::None;
        let key = Key { code: self.mode.code, user: self.mode.cpl == 3, single: true };
        let linear = self.code_linear();
        self.notice_changed_code();
        let found = match self.blocks.jump(linear, self.tlb.stamp(), key) {
            Some(block) => Ok(block),
            None => self.fetch(linear, key),
        };
        let result = match found {
            Ok(block) => {
                // Others may have flushed us while we decoded.
                if self.mailbox.attention.load(Ordering::SeqCst) & mail::FLUSH != 0 {
                    self.answer_flush();
                }
                self.run_block(block).map_err(Some)
            }
            Err(Abort) => Err(None),
        };
        match result {
            Ok(()) => Step::Done,
            Err(segment) => self.abandoned(segment),
        }
    }

    /// As [`Cpu::step`], for an instruction that was decoded for this one execution.
    pub(crate) fn step_fresh(&mut self, fresh: &Fresh) -> Step {
        self.raised = Raised::None;
        self.blocks.set_running(std::ptr::null());
        let start = self.rip;
        self.regs.set64(BLOCK_RIP, start);
        self.rip = self.advance(start, u16::from(fresh.op.len));
        if (fresh.op.run)(self, &fresh.op).is_ok() {
            self.stats.instructions += 1;
            return Step::Done;
        }
        self.rip = start;
        self.abandoned(Some(fresh.op.seg))
    }

    /// Says why an instruction was abandoned.
    pub(crate) fn abandoned(&mut self, segment: Option<u8>) -> Step {
        match self.settle(segment) {
            Raised::Exception(e) => Step::Raised(e),
            Raised::Failed(why) => Step::Failed(why),
            _ => Step::Failed("an instruction was abandoned without a reason"),
        }
    }

    /// One instruction under single step, interrupt shadow or breakpoints, with what follows from it.
    pub(crate) fn step_and_deliver(&mut self) {
        self.step_and_deliver_by(Self::step);
    }

    /// As above; `step` executes the instruction.
    pub(crate) fn step_and_deliver_by(&mut self, step: impl FnOnce(&mut Self) -> Step) {
        let linear = self.code_linear();
        if self.dr7 & 0xff != 0
            && !self.flag(fl::RF)
            && !self.mov_ss_shadow
            && self.instruction_breakpoint(linear)
        {
            self.deliver_exception(Exception { vector: vector::DB, error: None });
            return;
        }
        self.sti_shadow = false;
        self.mov_ss_shadow = false;
        self.stepping = self.flag(fl::TF);
        let resume = self.flag(fl::RF);
        match step(self) {
            Step::Done => {
                if resume {
                    self.rflags_rest &= !fl::RF;
                }
                if std::mem::take(&mut self.stepping) {
                    self.debug_trap |= DR6_BS;
                }
            }
            Step::Raised(e) => self.deliver_exception(e),
            Step::Failed(why) => self.raised = Raised::Failed(why),
        }
        self.stepping = false;
        self.look = true;
    }

    pub(crate) fn deliver_raised(&mut self, segment: Option<u8>) {
        match self.settle(segment) {
            Raised::Exception(e) => self.deliver_exception(e),
            Raised::Failed(why) => {
                self.raised = Raised::Failed(why);
                self.look = true;
            }
            Raised::None | Raised::Restart | Raised::NonCanonical => {}
        }
    }

    /// Takes what was raised; which exception a non-canonical address is depends on the operand's segment.
    pub(crate) fn settle(&mut self, segment: Option<u8>) -> Raised {
        match std::mem::replace(&mut self.raised, Raised::None) {
            Raised::NonCanonical => {
                let vector = if segment == Some(seg::SS as u8) { vector::SS } else { vector::GP };
                Raised::Exception(Exception { vector, error: Some(0) })
            }
            other => other,
        }
    }
}
