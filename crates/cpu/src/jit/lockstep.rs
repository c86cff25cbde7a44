//! Lockstep: each translated block runs twice from the same state, in the interpreter and then as translated; what differs
//! ends the run with a report.
//!
//! The interpreter goes first, every write of its on the slow path, where what is about to be overwritten is recorded.
//! Its results are put aside, everything is undone, the translated block runs, and both results are compared. A block holds
//! only what can be repeated: what talks to devices, to the clock or to the system registers, and repeated string
//! instructions, which may pause anywhere, are executed by the interpreter alone; so are blocks that reach a device's
//! memory or change code.
//!
//! Memory may change in between after all, by a device's doing. So a difference counts only if it shows again, either with an empty TLB or with one
//! that is filled anew.
//!
//! Status flags that the translator leaves undefined, because nobody needs them, go on undefined in the translated blocks
//! that follow, while the interpreter has them right: should somebody need them after all, that is a difference.
#![expect(unsafe_code, reason = "puts back bytes of guest memory by host address")]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use skep_hv::{Compared as Tally, RunEnd};

use super::table::STATUS_FLAGS;
use super::translate::Decoded;
use super::{Found, Jit, MAX_INSTRUCTIONS, NO_LINK, PAGE, table};
use crate::cpu::Cpu;
use crate::decode::Room;
use crate::fault::{Abort, Exception, Raised};
use crate::native::Fpu;
use crate::regs::Regs;
use crate::run::Step;
use crate::vm::Mailbox;

/// Blocks between two looks at the clock.
const POLL_BLOCKS: u32 = 64;
/// Of blocks that cannot touch vector registers, one in so many has them compared all the same.
const ALL_REGISTERS: u64 = 64;
/// Bytes round what the interpreter writes that are compared too.
const MARGIN: usize = 32;
/// Bytes recorded in one piece.
const PIECE: usize = 32;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// What lockstep keeps.
pub(crate) struct Lockstep {
    /// Guest memory is being recorded.
    recording: bool,
    /// An access met a device while recording, and was abandoned.
    device: bool,
    writes: Vec<Written>,
    /// What the interpreter has made of what it wrote, and translated code.
    wanted: Vec<u8>,
    given: Vec<u8>,
    blocks: HashMap<u64, Arc<Text>>,
    /// Status flags as the last block left them in translated code; where it ended, and with which in truth.
    carried: Option<(u64, u16, u16)>,
    /// Stands in for the mailbox while translated code runs, so that it runs to the end of the block.
    quiet: Arc<Mailbox>,
    tally: Tally,
}

/// Bytes that were overwritten.
struct Written {
    at: usize,
    len: u8,
    old: [u8; PIECE],
}

/// What is known of a block's instructions.
pub(super) struct Text {
    insns: Vec<Piece>,
    /// It may touch vector or x87 registers.
    vectors: bool,
    /// A conditional jump to the instruction behind it: whether it was taken does not show.
    unclear: bool,
}

struct Piece {
    at: u16,
    live_in: u16,
    live_out: u16,
    /// Nothing behind it in the block is executed, except after a conditional jump.
    ends: bool,
    branch: bool,
    name: String,
}

impl Text {
    pub(super) fn new(insns: &[Decoded], page: &[u8]) -> Self {
        let last = insns.len().saturating_sub(1);
        let piece = |d: &Decoded| {
            let bytes: Vec<String> =
                page[d.at as usize..d.end() as usize].iter().map(|b| format!("{b:02x}")).collect();
            Piece {
                at: d.at,
                live_in: d.live_in,
                live_out: d.live_out,
                ends: d.transfers,
                branch: d.info.class == table::Class::Branch,
                name: format!("[{}] {:?}", bytes.join(" "), d.insn.code()),
            }
        };
        let jumps_nowhere = |(i, d): (usize, &Decoded)| {
            i != last && d.info.class == table::Class::Branch && d.target() == i64::from(d.end())
        };
        Self {
            insns: insns.iter().map(piece).collect(),
            vectors: insns
                .iter()
                .any(|d| d.info.vector || d.info.x87.is_some() || d.info.class == table::Class::Handler),
            unclear: insns.iter().enumerate().any(jumps_nowhere),
        }
    }
}

/// Everything that a block can change but memory.
#[derive(Clone)]
struct Registers {
    regs: Regs,
    rip: u64,
    status: u16,
    rest: u64,
    cr2: u64,
    fpu: Option<Box<Fpu>>,
}

impl Registers {
    fn of(cpu: &Cpu, vectors: bool) -> Self {
        let fpu = vectors.then(|| cpu.fpu.clone());
        Self {
            regs: cpu.regs.clone(),
            rip: cpu.rip,
            status: cpu.status,
            rest: cpu.rflags_rest,
            cr2: cpu.cr2,
            fpu,
        }
    }

    fn restore(&self, cpu: &mut Cpu) {
        cpu.regs.clone_from(&self.regs);
        (cpu.rip, cpu.status, cpu.rflags_rest, cpu.cr2) = (self.rip, self.status, self.rest, self.cr2);
        if let Some(fpu) = &self.fpu {
            cpu.fpu.clone_from(fpu);
        }
        cpu.raised = Raised::None;
        cpu.look = false;
    }
}

/// How the interpreter left a block.
enum Left {
    /// Behind this instruction.
    Behind(usize),
    /// This instruction raised an exception.
    Raised(usize, Exception),
    /// It met a device, or gave up: nothing of the instruction at RIP has happened.
    Before,
}

impl Default for Lockstep {
    fn default() -> Self {
        Self {
            recording: false,
            device: false,
            writes: Vec::new(),
            wanted: Vec::new(),
            given: Vec::new(),
            blocks: HashMap::new(),
            carried: None,
            quiet: Arc::new(Mailbox::new()),
            tally: Tally::default(),
        }
    }
}

impl Lockstep {
    pub(crate) fn tally(&self) -> Tally {
        self.tally
    }

    /// `len` bytes at `host`, in a page of guest memory, are about to be overwritten.
    pub(crate) fn note_write(&mut self, host: *const u8, len: usize) {
        if !self.recording {
            return;
        }
        for from in (0..len).step_by(PIECE) {
            let at = host as usize + from;
            let mut written = Written { at, len: (len - from).min(PIECE) as u8, old: [0; PIECE] };
            // SAFETY: the caller is about to write these bytes.
            unsafe { copy(at as *const u8, written.old.as_mut_ptr(), written.len as usize) };
            self.writes.push(written);
        }
    }

    /// Whether an access to a device must be abandoned.
    pub(crate) fn refuses_device(&mut self) -> bool {
        self.device |= self.recording;
        self.recording
    }

    /// Puts back what was overwritten.
    fn undo(&self) {
        for written in self.writes.iter().rev() {
            // SAFETY: the bytes were written before, through the same address; guest memory has not gone away.
            unsafe { copy(written.old.as_ptr(), written.at as *mut u8, written.len as usize) };
        }
    }

    /// Puts what stands where was written, and round it, into `contents`.
    fn gather(&self, contents: &mut Vec<u8>) {
        contents.clear();
        for written in &self.writes {
            let (from, len) = written.surroundings();
            let end = contents.len();
            contents.resize(end + len, 0);
            // SAFETY: bytes of a page of guest memory; there is room for them.
            unsafe { copy(from as *const u8, contents.as_mut_ptr().add(end), len) };
        }
    }

    /// Says what of [`Lockstep::wanted`] is not in [`Lockstep::given`].
    fn compare_contents(&self, differences: &mut Vec<String>) {
        if self.wanted == self.given {
            return;
        }
        let places = self.writes.iter().flat_map(|written| {
            let (from, len) = written.surroundings();
            from..from + len
        });
        for (at, (wanted, given)) in places.zip(self.wanted.iter().zip(&self.given)) {
            if wanted != given {
                let place = format!("memory at ...{:03x}", at as u64 % PAGE);
                differences.push(format!("{place}: interpreter {wanted:#x}, translated {given:#x}"));
            }
        }
    }
}

impl Written {
    /// Where what is compared on its account begins, and how long that is: it does not leave the page.
    fn surroundings(&self) -> (usize, usize) {
        let page = self.at & !(PAGE as usize - 1);
        let from = self.at.saturating_sub(MARGIN).max(page);
        let to = (self.at + self.len as usize + MARGIN).min(page + PAGE as usize);
        (from, to - from)
    }
}

/// # Safety
/// As for `ptr::copy_nonoverlapping`, but that others may write either range meanwhile.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise; the compiler cannot look into the library's function, as devices may write guest memory.
    unsafe { libc::memcpy(to.cast(), from.cast(), len) };
}

impl Jit {
    /// For lockstep: blocks as they always are, but each on its own, and only of what can be repeated.
    pub(crate) fn set_lockstep(&mut self) {
        (self.chain, self.extends, self.repeatable) = (false, true, true);
        self.most = MAX_INSTRUCTIONS;
        self.clear();
    }
}

impl Cpu {
    /// Leaves of a block what lockstep can run twice.
    pub(super) fn keep_repeatable(&mut self, page: &[u8], insns: &mut Vec<Decoded>) {
        let alone = insns.iter().position(|d| {
            let repeats =
                d.insn.is_string_instruction() && (d.insn.has_rep_prefix() || d.insn.has_repne_prefix());
            let handled = d.info.class == table::Class::Handler
                && !matches!(self.room(&d.insn, &page[d.at as usize..]), Room::Exec | Room::Native);
            repeats || handled || talks(&d.insn)
        });
        insns.truncate(alone.unwrap_or(insns.len()));
        if let Some(at) = insns.iter().position(|d| may_unmask(&d.insn)) {
            insns.truncate(at + 1);
        }
    }

    /// Remembers what a block is made of.
    pub(super) fn describe_block(&mut self, code: u64, insns: &[Decoded], page: &[u8]) {
        if let Some(lockstep) = &mut self.lockstep {
            lockstep.blocks.insert(code, Arc::new(Text::new(insns, page)));
        }
    }

    /// All code has been dropped.
    pub(super) fn forget_blocks(&mut self) {
        self.forget_blocks_in(0..u64::MAX);
    }

    /// All code that lay there has been dropped.
    pub(super) fn forget_blocks_in(&mut self, place: Range<u64>) {
        if let Some(lockstep) = &mut self.lockstep {
            lockstep.blocks.retain(|code, _| !place.contains(code));
        }
    }

    /// Runs blocks on both engines until something wants to be looked at. What differs ends the run.
    pub(crate) fn execute_lockstep(&mut self) -> Option<RunEnd> {
        let mut left = POLL_BLOCKS;
        while !self.look && !self.attention() && self.translates() {
            left -= 1;
            if left == 0 {
                if self.clock_reached() {
                    return None;
                }
                left = POLL_BLOCKS;
            }
            self.notice_changed_code();
            self.hot.link = NO_LINK;
            match self.find_code(self.rip) {
                Ok(Found::Code(code)) => {
                    if let Err(report) = self.run_block_twice(code) {
                        return Some(RunEnd::Failed(report));
                    }
                }
                Ok(Found::Step) => {
                    self.tally(|tally| tally.alone += 1);
                    self.step_and_deliver();
                }
                Err(Abort) => self.deliver_raised(None),
            }
        }
        None
    }

    fn tally(&mut self, count: impl FnOnce(&mut Tally)) {
        if let Some(lockstep) = &mut self.lockstep {
            count(&mut lockstep.tally);
        }
    }

    /// Runs the block at RIP, translated at `code`, on both engines. An error is a report of what differs.
    fn run_block_twice(&mut self, code: u64) -> Result<(), String> {
        let known = self.lockstep.as_mut().and_then(|l| {
            let text = l.blocks.get(&code).cloned().filter(|text| !text.unclear)?;
            let all = text.vectors || l.tally.blocks.is_multiple_of(ALL_REGISTERS);
            Some((text, all, l.carried.take()))
        });
        let Some((text, all, carried)) = known else {
            self.tally(|tally| tally.alone += 1);
            self.step_and_deliver();
            return Ok(());
        };
        let before = Registers::of(self, all);
        let status = match carried {
            Some((rip, truly, status)) if rip == before.rip && truly == before.status => status,
            _ => before.status,
        };
        let mut first = None;
        for turn in 0..3 {
            if turn > 0 {
                before.restore(self);
                if let Some(lockstep) = &mut self.lockstep {
                    lockstep.undo();
                }
            }
            match self.compare_block(code, &text, &before, status, turn > 0) {
                Compared::Alone => {
                    self.tally(|tally| tally.alone += 1);
                    return Ok(());
                }
                Compared::Same(..) if first.is_some() && turn < 2 => {}
                Compared::Same(exception, done) => {
                    self.tally(|tally| {
                        tally.blocks += 1;
                        tally.instructions += done;
                        tally.passing += u64::from(turn > 0);
                    });
                    if let Some(exception) = exception {
                        self.deliver_exception(exception);
                    }
                    return Ok(());
                }
                Compared::Different(report) if first.is_none() => first = Some(report),
                Compared::Different(report) => return Err(first.unwrap_or(report)),
            }
        }
        Ok(())
    }

    /// One turn of [`Cpu::run_block_twice`]. With `flush` both look up all translations anew, as a block may make a page table and
    /// use it.
    fn compare_block(
        &mut self,
        code: u64,
        text: &Text,
        before: &Registers,
        status: u16,
        flush: bool,
    ) -> Compared {
        if flush {
            self.flush_tlb();
        }
        let epoch = self.memory.epoch();
        let left = self.interpret_recording(text);
        let Some(lockstep) = &mut self.lockstep else { return Compared::Alone };
        if matches!(left, Left::Before) {
            // The instruction at RIP meets a device. What came before it in the block stays.
            self.step_and_deliver();
            return Compared::Alone;
        }
        if self.memory.epoch() != epoch {
            // It changed code, perhaps its own.
            if let Left::Raised(_, exception) = left {
                self.deliver_exception(exception);
            }
            return Compared::Alone;
        }
        let mut contents = std::mem::take(&mut lockstep.wanted);
        lockstep.gather(&mut contents);
        lockstep.wanted = contents;
        lockstep.undo();
        let wanted = Registers::of(self, before.fpu.is_some());
        before.restore(self);
        self.status = status;
        if flush {
            self.flush_tlb();
        }
        let raised = self.run_translated_quietly(code);
        let given = Registers::of(self, before.fpu.is_some());

        let (at, live, exception) = match left {
            Left::Raised(at, exception) => (at, text.insns.get(at).map(|d| d.live_in), Some(exception)),
            Left::Behind(at) => (at, text.insns.get(at).map(|d| d.live_out), None),
            Left::Before => (0, None, None),
        };
        let mut differences = Vec::new();
        let outcome = exception.map_or(Raised::None, Raised::Exception);
        if raised != outcome {
            differences.push(format!("raised: interpreter {outcome:x?}, translated {raised:x?}"));
        }
        wanted.compare(&given, live.unwrap_or(STATUS_FLAGS), &mut differences);
        if let Some(lockstep) = &mut self.lockstep {
            let mut contents = std::mem::take(&mut lockstep.given);
            lockstep.gather(&mut contents);
            lockstep.given = contents;
            lockstep.compare_contents(&mut differences);
            if exception.is_none() {
                lockstep.carried = Some((wanted.rip, wanted.status, given.status));
            }
        }
        if differences.is_empty() {
            self.status = wanted.status;
            return Compared::Same(exception, at as u64 + 1);
        }
        Compared::Different(report(code, text, at, before, &differences))
    }

    /// Interprets a block, recording what it overwrites.
    fn interpret_recording(&mut self, text: &Text) -> Left {
        self.tlb.write_slowly(true);
        if let Some(lockstep) = &mut self.lockstep {
            lockstep.writes.clear();
            (lockstep.recording, lockstep.device) = (true, false);
        }
        let left = self.interpret(text);
        if let Some(lockstep) = &mut self.lockstep {
            lockstep.recording = false;
        }
        self.tlb.write_slowly(false);
        self.raised = Raised::None;
        self.look = false;
        left
    }

    fn interpret(&mut self, text: &Text) -> Left {
        let base = self.rip & !(PAGE - 1);
        let mut behind = 0;
        for (i, d) in text.insns.iter().enumerate() {
            if self.rip != base.wrapping_add(u64::from(d.at)) {
                break;
            }
            match self.step() {
                Step::Done => behind = i,
                Step::Raised(exception) => return Left::Raised(i, exception),
                Step::Failed(_) => return Left::Before,
            }
            if d.ends && !d.branch {
                break;
            }
        }
        Left::Behind(behind)
    }

    /// Runs a translated block to its end, or to what it raises.
    fn run_translated_quietly(&mut self, code: u64) -> Raised {
        let Some(lockstep) = &mut self.lockstep else { return Raised::None };
        std::mem::swap(&mut self.mailbox, &mut lockstep.quiet);
        self.hot.keep_raised = true;
        self.enter_code(code);
        self.hot.keep_raised = false;
        if !self.canonical(self.rip) {
            self.undo_transfer();
            let _ = self.gp(0);
        }
        if let Some(lockstep) = &mut self.lockstep {
            std::mem::swap(&mut self.mailbox, &mut lockstep.quiet);
        }
        self.look = false;
        std::mem::replace(&mut self.raised, Raised::None)
    }
}

/// What came of running a block twice.
enum Compared {
    /// The interpreter has executed it, or some of it; nothing was compared.
    Alone,
    /// Nothing differs. The exception has not been delivered. So many instructions were executed.
    Same(Option<Exception>, u64),
    /// Something does: a report.
    Different(String),
}

impl Registers {
    /// Adds to `differences` what differs, of the status flags only those in `live`.
    fn compare(&self, given: &Self, live: u16, differences: &mut Vec<String>) {
        let status = |of: &Self| crate::alu::status_to_rflags(of.status) & u64::from(live);
        let flags = |of: &Self| status(of) | of.rest;
        let general = self.rip == given.rip
            && flags(self) == flags(given)
            && self.cr2 == given.cr2
            && (0..16).all(|n| self.regs.gpr(n) == given.regs.gpr(n));
        if general && self.fpu.is_none() {
            return;
        }
        let mut check = |what: &str, wanted: u64, given: u64| {
            if wanted != given {
                differences.push(format!("{what}: interpreter {wanted:#x}, translated {given:#x}"));
            }
        };
        check("rip", self.rip, given.rip);
        for (i, name) in NAMES.iter().enumerate() {
            check(name, self.regs.gpr(i), given.regs.gpr(i));
        }
        check("rflags", flags(self), flags(given));
        check("cr2", self.cr2, given.cr2);
        if let (Some(wanted), Some(given)) = (&self.fpu, &given.fpu) {
            wanted.differences(given, differences);
        }
    }
}

fn report(code: u64, text: &Text, at: usize, before: &Registers, differences: &[String]) -> String {
    let mut lines = format!("lockstep: the block at {:#x}, translated at {code:#x}, differs:\n", before.rip);
    let base = before.rip & !(PAGE - 1);
    for (i, d) in text.insns.iter().enumerate() {
        let here = if i == at { "  <- the last that was interpreted" } else { "" };
        lines += &format!("  {:#x} {}{here}\n", base.wrapping_add(u64::from(d.at)), d.name);
    }
    for (i, name) in NAMES.iter().enumerate() {
        lines += &format!("  {name} = {:#x}\n", before.regs.gpr(i));
    }
    let rflags = crate::alu::status_to_rflags(before.status) | before.rest;
    lines += &format!("  rflags = {rflags:#x}\n");
    for difference in differences {
        lines += &format!("  != {difference}\n");
    }
    lines
}

/// Whether an instruction that is not the system's reads what differs each time, or reaches devices.
fn talks(insn: &iced_x86::Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd | M::Rdrand | M::Rdseed
    )
}

/// It may mask or unmask exceptions, which makes other code of what follows: the block is left behind it.
fn may_unmask(insn: &iced_x86::Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Ldmxcsr
            | M::Vldmxcsr
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xrstor
            | M::Xrstor64
            | M::Xrstors
            | M::Xrstors64
            | M::Fldcw
            | M::Fldenv
            | M::Frstor
            | M::Fninit
            | M::Fnstenv
            | M::Fnsave
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::case::{CODE, Case, Patch, State, WINDOW};
    use crate::oracle::subject::Subject;

    /// ADD RAX, RBX; MOV [RDI], RAX; JNE over UD2 to UD2.
    const BYTES: [u8; 12] = [0x48, 0x01, 0xd8, 0x48, 0x89, 0x07, 0x75, 0x02, 0x0f, 0x0b, 0x0f, 0x0b];
    const ADD: [u8; 3] = [0x48, 0x01, 0xd8];

    fn run(spoil: Option<fn(&mut [u8])>) -> (Option<RunEnd>, Tally, u64) {
        let mut case =
            Case { state: State::initial(), code: [0; 16], len: 12, steps: false, patches: [Patch::NONE; 3] };
        case.code[..12].copy_from_slice(&BYTES);
        case.state.rip = CODE + 0x100;
        (case.state.gpr[0], case.state.gpr[3], case.state.gpr[7]) = (40, 2, WINDOW + 0x800);
        let mut subject = Subject::new().expect("a processor");
        subject.add_handlers().expect("handlers");
        let cpu = subject.prepare(&case).expect("the case fits");
        let mut jit = Jit::new().expect("a translator");
        jit.set_lockstep();
        jit.spoil = spoil;
        cpu.jit = Some(Box::new(jit));
        cpu.lockstep = Some(Box::default());
        let end = cpu.execute_lockstep();
        let tally = cpu.lockstep.as_ref().map(|l| l.tally()).unwrap_or_default();
        (end, tally, cpu.regs.gpr(0))
    }

    fn replace(code: &mut [u8], from: &[u8], to: &[u8]) {
        let at = code.windows(from.len()).position(|w| w == from).expect("it is there");
        code[at..at + to.len()].copy_from_slice(to);
    }

    #[test]
    fn what_is_right_goes_on() {
        let (end, tally, rax) = run(None);
        assert_eq!(end, None);
        assert_eq!(tally, Tally { blocks: 1, instructions: 3, alone: 1, passing: 0 });
        assert_eq!(rax, 42);
    }

    #[test]
    fn a_wrong_translation_is_found() {
        // SUB instead, which shows in a register and in memory.
        let sub: fn(&mut [u8]) = |code| replace(code, &ADD, &[0x48, 0x29, 0xd8]);
        let (end, tally, _) = run(Some(sub));
        let Some(RunEnd::Failed(report)) = end else { panic!("{end:?}") };
        for part in [
            "Add_rm64_r64",
            "[48 01 d8]",
            "rbx = 0x2",
            "rax: interpreter 0x2a, translated 0x26",
            "memory at ...800",
        ] {
            assert!(report.contains(part), "{part} is missing:\n{report}");
        }
        assert_eq!(tally.blocks, 0);
    }
}
