//! From a run of guest instructions to code.
//!
//! Guest registers stand in the host's, RSP in R11, R8 in R15; R9 to R11 and R15 stay in memory, so that R8 to R10 are free for the
//! translator. Status flags stay in the host's where nothing of ours has to change them; where something has, and they may
//! still be read, they are put into memory first. `docs/software-cpu.md` describes all of it.

use std::ops::Deref;

use iced_x86::OpKind;
use skep_hv::cpuid::CpuidTable;

use super::access::{Expected, Window, foresee_accesses};
use super::asm::{Asm, BELOW, Mem, NOT_EQUAL, R8, R9, R10, RAX, RDX};
use super::flags::{liveness, loses_flags_first, poll_position};
use super::flow::condition;
use super::glue::{Glue, RIP, STATUS, home};
use super::known::{Instructions, Known};
use super::linear::{Sight, foresee_stretches};
use super::operands::{host, is_homed, number};
use super::stack::{Later, Run};
use super::stubs::Stub;
use super::table::{Class, STATUS_FLAGS};
use super::{Key, PAGE};
use crate::op::Op;

/// Instructions in a block at most.
pub(super) const MAX_INSTRUCTIONS: usize = 64;

/// Instructions behind which no conditional jump or call is gone past.
const ENOUGH: usize = 8;

/// A page of code as it was read, and what begins the page behind it, for an instruction that straddles both.
pub(super) type Page = [u8; PAGE as usize + 16];

/// What a translation is made in, kept for the next.
pub(super) struct Room {
    pub(super) page: Page,
    /// What is read once more.
    pub(super) again: [u8; MAX_INSTRUCTIONS * 15],
    pub(super) insns: Vec<Decoded>,
    pub(super) made: Made,
}

impl Default for Room {
    fn default() -> Self {
        let (page, again) = ([0; PAGE as usize + 16], [0; MAX_INSTRUCTIONS * 15]);
        Self { page, again, insns: Vec::new(), made: Made::default() }
    }
}

/// One instruction of a block.
pub(super) struct Decoded {
    known: Known,
    /// Offset in the page.
    pub(super) at: u16,
    /// Status flags that may be read before they are written again: in front of it, and behind.
    pub(super) live_in: u16,
    pub(super) live_out: u16,
    /// Where its code begins in the block's.
    pub(super) code_at: usize,
    /// What is foreseen of the page that it lies in.
    pub(super) expected: Expected,
}

impl Deref for Decoded {
    type Target = Known;

    fn deref(&self) -> &Known {
        &self.known
    }
}

impl Decoded {
    #[inline(always)]
    fn new(known: &Known, at: u16) -> Self {
        Self { known: *known, at, live_in: 0, live_out: 0, code_at: 0, expected: Expected::default() }
    }

    pub(super) fn end(&self) -> u16 {
        self.at + self.insn.len() as u16
    }

    /// Where a direct transfer leads, from the beginning of the page.
    pub(super) fn target(&self) -> i64 {
        let (target, at) = (self.insn.near_branch_target(), i64::from(self.at));
        // What wraps at 32 bits is the same in front of the page as behind it.
        if self.insn.op0_kind() == OpKind::NearBranch32 {
            i64::from((target as i32).wrapping_add(at as i32))
        } else {
            (target as i64).wrapping_add(at)
        }
    }

    /// Where memory lies that it names relative to itself, from the beginning of the page.
    pub(super) fn relative(&self) -> i64 {
        (self.insn.ip_rel_memory_address() as i64).wrapping_add(i64::from(self.at))
    }

    /// What follows may be reached from here.
    pub(super) fn goes_on(&self) -> bool {
        matches!(self.info.class, Class::Branch | Class::Call | Class::CallIndirect | Class::Handler)
            || !self.transfers
    }

    /// It may be part of a loop.
    pub(super) fn loops(&self) -> bool {
        match self.info.class {
            Class::Jump | Class::Branch => self.target() <= i64::from(self.at),
            Class::Call => true,
            _ => false,
        }
    }
}

/// What the decoder is told.
pub(super) struct Source<'a> {
    pub(super) page: &'a Page,
    /// Bytes of it that count.
    pub(super) len: usize,
    pub(super) key: Key,
    /// Instructions at most.
    pub(super) most: usize,
    /// Whether to go past conditional jumps and calls.
    pub(super) on: bool,
    /// Whether there is a block already.
    pub(super) known: &'a dyn Fn(u16) -> Option<Entry>,
    pub(super) cpuid: &'a CpuidTable,
}

/// Decodes from `at` to the end of a block, which stays on the page. What `all` holds is lost.
pub(super) fn decode(source: &Source<'_>, at: u16, instructions: &mut Instructions, all: &mut Vec<Decoded>) {
    let Source { page, len, key, most, cpuid, .. } = *source;
    let mut at = at;
    all.clear();
    while all.len() < most.min(MAX_INSTRUCTIONS) {
        // Behind the page there is room for one instruction more.
        let (Some(first), Some(left)) =
            (page[usize::from(at)..].first_chunk(), len.checked_sub(usize::from(at)))
        else {
            break;
        };
        let Some(known) = instructions.alike(first, left, key, cpuid) else { break };
        all.push(Decoded::new(known, at));
        let Some(last) = all.last_mut() else { break };
        last.known.become_one(first);
        at = last.end();
        if last.transfers {
            let end = last.end();
            let further = source.on
                && last.info.class != Class::Handler
                && last.goes_on()
                && all.len() < ENOUGH
                && u64::from(end) < PAGE
                && (source.known)(end).is_none();
            if !further {
                break;
            }
        }
    }
}

/// A jump whose target was not there yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    /// Where its displacement ends.
    pub(super) end: u64,
    /// Offset of its target in the page.
    pub(super) target: u16,
    /// Status flags are in the host's, not in memory.
    pub(super) in_host: bool,
    /// It leads to another page: the linear address of its target is in R8.
    pub(super) far: bool,
}

/// A block that exists.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// Its code, for who comes with the flags in memory.
    pub(super) from_memory: u64,
    /// Its code, for who comes with the flags in the host's.
    pub(super) from_host: u64,
    /// Flags that it may need.
    pub(super) live: u16,
}

/// What the translator is told.
pub(super) struct Request<'a> {
    pub(super) key: Key,
    pub(super) glue: Glue,
    /// Number of the first link that will be made.
    pub(super) first_link: u32,
    /// Blocks on this page.
    pub(super) known: &'a dyn Fn(u16) -> Option<Entry>,
    pub(super) cpuid: &'a CpuidTable,
    /// Whether jumps may lead to other blocks at once.
    pub(super) chain: bool,
    /// Whether to look behind jumps for the flags that are needed there.
    pub(super) foresees: bool,
    /// Reads code on the page for that.
    pub(super) read: &'a dyn Fn(usize, &mut [u8]),
    /// What the processor sees now, if that is of use.
    pub(super) sight: Option<Sight<'a>>,
}

/// What the translator made. It becomes room for the next.
#[derive(Default)]
pub(super) struct Made {
    pub(super) code: Vec<u8>,
    /// What stands out of the way.
    pub(super) aside: Vec<u8>,
    pub(super) links: Vec<Link>,
    stubs: Vec<Stub>,
    open: Vec<usize>,
}

pub(super) struct Translator<'a> {
    pub(super) asm: Asm,
    pub(super) request: Request<'a>,
    pub(super) stubs: Vec<Stub>,
    pub(super) links: Vec<Link>,
    pub(super) start: u16,
    pub(super) entry: Entry,
    /// Status flags are in the host's.
    pub(super) in_host: bool,
    /// Status flags are in memory.
    pub(super) in_memory: bool,
    /// Which vector registers are the guest's, as [`Hot`](super::Hot) has it.
    pub(super) vectors: u8,
    /// The x87 registers are the guest's.
    pub(super) x87: bool,
    /// And [`Hot`](super::Hot) knows the page that runs as that of their last instruction.
    pub(super) x87_based: bool,
    /// What R8 and R9 know.
    pub(super) window: Option<Window>,
    /// What comes next is reached from what came last.
    pub(super) reachable: bool,
    /// Accesses whose way on behind the instruction is not known yet.
    pub(super) open: Vec<usize>,
    /// Runs of pushes and pops that are to be translated again, one by one.
    pub(super) later: Vec<Later>,
}

/// Translates, into `made`. `ops` holds the operations for those instructions that have handlers, or nothing if none has.
pub(super) fn translate(
    origin: u64,
    aside: impl FnOnce(usize) -> u64,
    mut request: Request<'_>,
    insns: &mut [Decoded],
    ops: &[Option<*const Op>],
    instructions: &mut Instructions,
    made: &mut Made,
) -> Option<Entry> {
    let start = insns.first()?.at;
    liveness(insns, &request, instructions);
    foresee_accesses(insns);
    if let Some(sight) = request.sight.take() {
        foresee_stretches(insns, sight);
    }
    let live = insns[0].live_in;
    let room = std::mem::take(made);
    let mut t = Translator {
        asm: Asm::within(room.code, origin),
        stubs: emptied(room.stubs),
        links: emptied(room.links),
        start,
        entry: Entry { from_memory: origin, from_host: origin, live },
        in_host: true,
        in_memory: false,
        vectors: 0,
        x87: false,
        x87_based: false,
        window: None,
        reachable: true,
        open: emptied(room.open),
        later: Vec::new(),
        request,
    };
    if live != 0 && loses_flags_first(insns) {
        // Who comes with them in memory need not load them only to see them saved again.
        t.asm.save_flags(STATUS, R9);
        t.asm.label();
        t.entry.from_memory = t.asm.here();
        (t.in_host, t.in_memory) = (false, true);
    } else if live != 0 {
        t.asm.load_flags(STATUS, R9);
        t.asm.label();
        t.entry.from_host = t.asm.here();
    }
    let poll_at = poll_position(insns);
    let mut i = 0;
    while let Some(d) = insns.get_mut(i) {
        t.land_done();
        d.code_at = t.asm.code.len();
        if poll_at == Some(i) {
            t.poll(d);
        }
        let most = poll_at.filter(|&at| at > i).unwrap_or(insns.len());
        if let Some(run) = Run::at(&insns[i..most]) {
            t.run(&insns[i..i + run.len], &run)?;
            t.later.last_mut()?.first = i;
            i += run.len;
        } else {
            t.instruction(&insns[i], ops.get(i).copied().flatten())?;
            i += 1;
        }
    }
    let last = insns.last()?;
    if last.goes_on() && t.reachable {
        t.land_done();
        t.edge(None, i64::from(last.end()), last.live_out);
    } else if !t.open.is_empty() {
        // A transfer of control that was completed elsewhere.
        t.go_on_at_rip();
    }
    t.finish_runs(insns)?;
    let aside = t.finish_stubs(room.aside, aside);
    let Translator { asm, stubs, links, open, entry, .. } = t;
    *made = Made { code: asm.code, aside, links, stubs, open };
    Some(entry)
}

fn emptied<T>(mut room: Vec<T>) -> Vec<T> {
    room.clear();
    room
}

impl Translator<'_> {
    /// The next instruction begins here: for accesses that were completed elsewhere.
    pub(super) fn land_done(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let here = self.asm.label();
        for at in self.open.drain(..) {
            if let Stub::Access { done, .. } = &mut self.stubs[at] {
                *done = Some(here);
            }
        }
    }

    pub(super) fn instruction(&mut self, d: &Decoded, op: Option<*const Op>) -> Option<()> {
        let keeps = matches!(d.info.class, Class::Nothing | Class::Plain | Class::Lea | Class::Branch);
        if !keeps {
            self.window = None;
        }
        let done = self.by_class(d, op);
        if !keeps {
            self.window = None;
        }
        self.leave_stretch(d);
        done
    }

    /// An instruction that was completed elsewhere has moved RIP.
    pub(super) fn go_on_at_rip(&mut self) {
        self.land_done();
        self.asm.load(R8, RIP);
        self.asm.jmp(self.request.glue.dispatch);
    }

    pub(super) fn by_class(&mut self, d: &Decoded, op: Option<*const Op>) -> Option<()> {
        match d.info.class {
            Class::Nothing => Some(()),
            Class::Plain => self.plain(d),
            Class::Lea => self.lea(d),
            Class::Push => self.push(d),
            Class::Pop => self.pop(d),
            Class::Leave => {
                self.leave(d);
                Some(())
            }
            Class::Divide => self.divide(d, op),
            Class::Jump => {
                self.edge(None, d.target(), d.live_out);
                Some(())
            }
            Class::Branch => {
                self.want_flags(R10);
                let cc = d.insn.condition_code() as u8;
                self.edge(Some(condition(cc)), d.target(), d.live_out);
                Some(())
            }
            Class::Call => {
                self.call(d);
                Some(())
            }
            Class::Return => {
                self.ret(d);
                Some(())
            }
            Class::JumpIndirect => self.indirect(d, false),
            Class::CallIndirect => self.indirect(d, true),
            Class::Repeated => self.repeated(d, op),
            Class::LoadControl => self.load_control(d, op),
            Class::Handler => self.handler(op),
        }
    }

    /// Runs the interpreter's handler.
    pub(super) fn handler(&mut self, op: Option<*const Op>) -> Option<()> {
        self.store_flags(STATUS_FLAGS, R9);
        self.asm.mov_imm(R8, op? as u64);
        self.asm.call(self.request.glue.handler);
        (self.in_host, self.in_memory) = (false, true);
        Some(())
    }

    /// Divisions whose quotient certainly fits run here, others in the handler. They leave the flags alone, as processors
    /// do.
    pub(super) fn divide(&mut self, d: &Decoded, op: Option<*const Op>) -> Option<()> {
        let insn = &d.insn;
        let wide = matches!(insn.code(), iced_x86::Code::Div_rm64 | iced_x86::Code::Idiv_rm64);
        let signed = insn.mnemonic() == iced_x86::Mnemonic::Idiv;
        self.lose_flags(d.live_in, R9);
        if insn.op0_kind() == OpKind::Memory {
            let place = self.place(d, Expected::default())?;
            let wanted = self.wanted(d, if wide { 8 } else { 4 }, false);
            self.check(place, wanted, Expected::default());
            self.asm.mem(&[], wide, &[0x8b], R9, place.mem());
        } else {
            let n = number(insn.op0_register())?;
            if is_homed(n) {
                self.asm.load(R9, home(n));
            } else {
                self.asm.mov(R9, host(n));
            }
        }
        let a = &mut self.asm;
        let mut from = Vec::new();
        if signed {
            // The dividend is a sign-extended RAX, the divisor neither 0 nor -1.
            a.regs(wide, &[0x89], RAX, R10);
            a.bytes(&[if wide { 0x49 } else { 0x41 }, 0xc1, 0xfa, if wide { 63 } else { 31 }]); // sar r10, 63
            a.regs(wide, &[0x39], R10, RDX);
            from.push(a.jcc_forward(NOT_EQUAL));
            a.mem(&[], wide, &[0x8d], R10, Mem::At(R9, 1));
            a.bytes(&[if wide { 0x49 } else { 0x41 }, 0x83, 0xfa, 1]); // cmp r10, 1
            from.push(a.jcc_forward(BELOW | 4)); // be
        } else {
            a.regs(wide, &[0x39], R9, RDX);
            from.push(a.jcc_forward(BELOW ^ 1)); // ae
        }
        a.regs(wide, &[0xf7], if signed { 7 } else { 6 }, R9);
        let resume = a.code.len();
        self.stubs.push(Stub::Handler { from, op: op? as u64, resume });
        Some(())
    }
}
