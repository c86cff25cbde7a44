//! From a run of guest instructions to code.
//!
//! Guest registers stand in the host's, RSP in R11; R8 to R11 stay in memory, so that R8, R9 and R10 are free for the
//! translator. Status flags stay in the host's where nothing of ours has to change them; where something has, and they may
//! still be read, they are put into memory first. `docs/software-cpu.md` describes all of it.

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind, Register};
use skep_hv::cpuid::CpuidTable;

use super::asm::{
    ABOVE, Asm, BELOW, EQUAL, Forward, Mem, NOT_EQUAL, R8, R9, R10, R11, RAX, RBP, RCX, RDX, RSP,
};
use super::encode;
use super::glue::{
    ATTENTION, BASE, BOTTOM, CURRENT_TLB, Glue, LIMIT, ORIGIN, RIP, STATUS, TEMP, VECTORS, home, segment_base,
};
use super::help::Wanted;
use super::table::{Class, Field, Info, STATUS_FLAGS, Table};
use super::{Key, PAGE};
use crate::cpu::seg;
use crate::mmu::TlbLayout;
use crate::op::Op;

/// Instructions in a block at most.
pub(super) const MAX_INSTRUCTIONS: usize = 64;
/// Instructions behind which no conditional jump or call is gone past.
const ENOUGH: usize = 8;
/// Instructions looked at behind a jump to see whether flags are needed there.
const FORESIGHT: usize = 6;

/// A page of code as it was read, and what begins the page behind it, for an instruction that straddles both.
pub(super) type Page = [u8; PAGE as usize + 16];

/// One decoded instruction.
pub(super) struct Decoded {
    pub(super) insn: Instruction,
    /// Offset in the page.
    pub(super) at: u16,
    pub(super) info: Info,
    /// Status flags that may be read before they are written again: in front of it, and behind.
    live_in: u16,
    live_out: u16,
}

impl Decoded {
    pub(super) fn end(&self) -> u16 {
        self.at + self.insn.len() as u16
    }

    /// Control goes elsewhere, always or at times.
    fn transfers(&self) -> bool {
        self.insn.flow_control() != iced_x86::FlowControl::Next
    }

    /// What follows may be reached from here.
    fn goes_on(&self) -> bool {
        matches!(self.info.class, Class::Branch | Class::Call | Class::CallIndirect | Class::Handler)
            || !self.transfers()
    }

    /// It may be part of a loop.
    fn loops(&self) -> bool {
        match self.info.class {
            Class::Jump | Class::Branch => self.insn.near_branch_target() as i64 <= i64::from(self.at),
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

/// Decodes from `at` to the end of a block, which stays on the page.
pub(super) fn decode(source: &Source<'_>, at: u16, table: &mut Table) -> Vec<Decoded> {
    let Source { page, len, key, most, cpuid, .. } = *source;
    let bytes = &page[at as usize..len];
    let mut decoder = Decoder::with_ip(64, bytes, u64::from(at), DecoderOptions::NONE);
    let mut all: Vec<Decoded> = Vec::with_capacity(16);
    while all.len() < most.min(MAX_INSTRUCTIONS) && decoder.can_decode() {
        let at = decoder.ip() as u16;
        let insn = decoder.decode();
        if insn.is_invalid() {
            // Too few bytes are left, or it raises #UD: the interpreter knows.
            break;
        }
        let mut info = *table.get(&insn, cpuid);
        if needs_handler(&insn, &info, key) {
            info.class = Class::Handler;
        }
        all.push(Decoded { insn, at, info, live_in: 0, live_out: 0 });
        let Some(last) = all.last() else { break };
        if last.transfers() {
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
    all
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
    pub(super) page: &'a Page,
    pub(super) key: Key,
    pub(super) glue: Glue,
    /// Number of the first link that will be made.
    pub(super) first_link: usize,
    /// Blocks on this page.
    pub(super) known: &'a dyn Fn(u16) -> Option<Entry>,
    pub(super) cpuid: &'a CpuidTable,
    /// Whether jumps may lead to other blocks at once.
    pub(super) chain: bool,
}

/// What the translator made.
pub(super) struct Made {
    pub(super) code: Vec<u8>,
    /// What stands out of the way.
    pub(super) aside: Vec<u8>,
    pub(super) entry: Entry,
    pub(super) links: Vec<Link>,
}

/// What stands behind the block, out of the way.
enum Stub {
    /// Help with an access.
    Access { from: Forward, place: Place, wanted: Wanted, resume: usize, done: Option<usize> },
    /// Run the handler instead.
    Handler { from: Vec<Forward>, op: u64, resume: usize },
    /// Leave, to be taken to the target of a link.
    Link { from: Forward, number: usize, target: u16, save_flags: bool },
    /// A jump to another page.
    Far { from: Forward, target: i64, save_flags: bool },
    /// Something wants attention.
    Leave { from: Forward, at: u16, save_flags: bool },
    /// The vector registers are to be made the guest's.
    Vectors { from: Forward, resume: usize },
}

struct Translator<'a> {
    asm: Asm,
    request: Request<'a>,
    stubs: Vec<Stub>,
    links: Vec<Link>,
    start: u16,
    entry: Entry,
    /// Status flags are in the host's.
    in_host: bool,
    /// Status flags are in memory.
    in_memory: bool,
    /// Vector registers are the guest's.
    vectors: bool,
    /// What comes next is reached from what came last.
    reachable: bool,
    /// Accesses whose way on behind the instruction is not known yet.
    open: Vec<usize>,
}

/// Translates. `ops` holds the operations for those instructions that have handlers.
pub(super) fn translate(
    origin: u64,
    aside: impl FnOnce(usize) -> u64,
    request: Request<'_>,
    insns: &mut [Decoded],
    ops: &[Option<*const Op>],
    table: &mut Table,
) -> Option<Made> {
    let start = insns.first()?.at;
    liveness(insns, &request, table);
    let live = insns[0].live_in;
    let mut t = Translator {
        asm: Asm::new(origin),
        stubs: Vec::new(),
        links: Vec::new(),
        start,
        entry: Entry { from_memory: origin, from_host: origin, live },
        in_host: true,
        in_memory: false,
        vectors: false,
        reachable: true,
        open: Vec::new(),
        request,
    };
    if live != 0 {
        t.asm.load_flags(STATUS, R9);
        t.entry.from_host = t.asm.here();
    }
    let poll_at = poll_position(insns);
    for (i, d) in insns.iter().enumerate() {
        t.land_done();
        if poll_at == Some(i) {
            t.poll(d);
        }
        t.instruction(d, ops[i])?;
    }
    let last = insns.last()?;
    if last.goes_on() && t.reachable {
        t.land_done();
        t.edge(None, i64::from(last.end()), last.live_out);
    } else if !t.open.is_empty() {
        // A transfer of control that was completed elsewhere.
        t.land_done();
        t.asm.load(R8, RIP);
        t.asm.jmp(t.request.glue.dispatch);
    }
    let aside = t.finish_stubs(aside);
    Some(Made { code: t.asm.code, aside, entry: t.entry, links: t.links })
}

/// Works out backwards which flags matter where.
fn liveness(insns: &mut [Decoded], request: &Request<'_>, table: &mut Table) {
    let Some(last) = insns.last() else { return };
    let mut live = if last.goes_on() { foresee(request, table, i64::from(last.end())) } else { 0 };
    for d in insns.iter_mut().rev() {
        match d.info.class {
            Class::Jump | Class::Call => live = foresee(request, table, d.insn.near_branch_target() as i64),
            Class::Branch => live |= foresee(request, table, d.insn.near_branch_target() as i64),
            Class::Return | Class::JumpIndirect | Class::CallIndirect => live = STATUS_FLAGS,
            _ => {}
        }
        d.live_out = live;
        live = live_before(&d.insn, &d.info, live);
        d.live_in = live;
    }
}

/// Flags that matter in front of an instruction, given those behind it.
fn live_before(insn: &Instruction, info: &Info, live: u16) -> u16 {
    if info.class == Class::Handler {
        return STATUS_FLAGS;
    }
    let changed =
        if info.class == Class::Divide || !always_counts(insn, info) { 0 } else { info.flags_changed };
    live & !changed | info.flags_read
}

/// Whether a shift certainly shifts, and so changes the flags.
fn always_counts(insn: &Instruction, info: &Info) -> bool {
    if !info.counted {
        return true;
    }
    let last = insn.op_count().saturating_sub(1);
    match insn.op_kind(last) {
        OpKind::Register => false,
        OpKind::Immediate8 => {
            let size = insn.op0_register().size().max(insn.memory_size().size());
            // RCL and RCR of 8 and 16 bits count modulo 9 and 17.
            let count = insn.immediate8() & if size == 8 { 63 } else { 31 };
            count != 0 && size > 2
        }
        _ => true,
    }
}

/// Flags that may be read at an offset of the page before they are written.
fn foresee(request: &Request<'_>, table: &mut Table, at: i64) -> u16 {
    if !(0..PAGE as i64).contains(&at) || !request.chain {
        return STATUS_FLAGS;
    }
    if let Some(entry) = (request.known)(at as u16) {
        return entry.live;
    }
    let page = &request.page[at as usize..PAGE as usize];
    let mut decoder = Decoder::with_ip(64, page, at as u64, DecoderOptions::NONE);
    let (mut unwritten, mut needed) = (STATUS_FLAGS, 0);
    for _ in 0..FORESIGHT {
        if !decoder.can_decode() {
            break;
        }
        let insn = decoder.decode();
        if insn.is_invalid() {
            break;
        }
        let mut info = *table.get(&insn, request.cpuid);
        if needs_handler(&insn, &info, request.key) {
            info.class = Class::Handler;
        }
        needed |= live_before(&insn, &info, 0) & unwritten;
        unwritten &= live_before(&insn, &info, STATUS_FLAGS);
        let branch = matches!(info.class, Class::Branch);
        if unwritten & !needed == 0 || branch || insn.flow_control() != iced_x86::FlowControl::Next {
            break;
        }
    }
    needed | unwritten
}

/// Where a block that may be part of a loop looks for attention: in front of the first instruction where no flags matter, or
/// of the first.
fn poll_position(insns: &[Decoded]) -> Option<usize> {
    let first = insns.iter().position(Decoded::loops)?;
    Some(insns[..=first].iter().position(|d| d.live_in == 0).unwrap_or(0))
}

/// Number of a general register.
fn number(register: Register) -> Option<u8> {
    register.is_gpr().then(|| register.full_register().number() as u8)
}

/// Whether a guest register stays in memory.
fn is_homed(n: u8) -> bool {
    (8..12).contains(&n)
}

/// Host register of a guest register that has one.
fn host(n: u8) -> u8 {
    if n == RSP { R11 } else { n }
}

impl Translator<'_> {
    /// Status flags are about to be lost: puts them away if anybody may want them.
    fn lose_flags(&mut self, live: u16, scratch: u8) {
        if live != 0 && !self.in_memory && self.in_host {
            self.asm.save_flags(STATUS, scratch);
            self.in_memory = true;
        }
        self.in_host = false;
    }

    /// Status flags are about to be read, or partly changed.
    fn want_flags(&mut self, scratch: u8) {
        if !self.in_host && self.in_memory {
            self.asm.load_flags(STATUS, scratch);
            self.in_host = true;
        }
    }

    /// Status flags must be in memory.
    fn store_flags(&mut self, live: u16, scratch: u8) {
        if live != 0 && !self.in_memory && self.in_host {
            self.asm.save_flags(STATUS, scratch);
            self.in_memory = true;
        }
    }

    /// The next instruction begins here: for accesses that were completed elsewhere.
    fn land_done(&mut self) {
        let here = self.asm.code.len();
        for at in std::mem::take(&mut self.open) {
            if let Stub::Access { done, .. } = &mut self.stubs[at] {
                *done = Some(here);
            }
        }
    }

    fn poll(&mut self, d: &Decoded) {
        let save_flags = d.live_in != 0 && self.in_host && !self.in_memory;
        self.asm.load(R9, ATTENTION);
        let from = if d.live_in == 0 || !self.in_host {
            self.asm.cmp_dword(Mem::At(R9, 0), 0);
            self.in_host = false;
            self.asm.jcc_forward(NOT_EQUAL)
        } else {
            // JRCXZ looks at no flags.
            self.asm.mov(R10, RCX);
            self.asm.load32(RCX, Mem::At(R9, 0));
            self.asm.bytes(&[0xe3, 8]); // jrcxz over the next two
            self.asm.mov(RCX, R10);
            let from = self.asm.jmp_forward();
            self.asm.mov(RCX, R10);
            from
        };
        self.stubs.push(Stub::Leave { from, at: d.at, save_flags });
    }

    fn instruction(&mut self, d: &Decoded, op: Option<*const Op>) -> Option<()> {
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
                self.edge(None, d.insn.near_branch_target() as i64, d.live_out);
                Some(())
            }
            Class::Branch => {
                self.want_flags(R9);
                let cc = d.insn.condition_code() as u8;
                self.edge(Some(condition(cc)), d.insn.near_branch_target() as i64, d.live_out);
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
            Class::Handler => self.handler(op),
        }
    }

    /// Runs the interpreter's handler.
    fn handler(&mut self, op: Option<*const Op>) -> Option<()> {
        self.store_flags(STATUS_FLAGS, R9);
        self.asm.mov_imm(R8, op? as u64);
        self.asm.call(self.request.glue.handler);
        (self.in_host, self.in_memory) = (false, true);
        Some(())
    }

    /// Puts the effective address of the memory operand, segment base included, into R8. R9 and R10 are lost. `None`: not
    /// an address that code can be made for.
    fn address(&mut self, insn: &Instruction) -> Option<()> {
        match insn.memory_base() {
            Register::RIP => {
                let at = insn.ip_rel_memory_address() as i64;
                self.asm.load(R8, BASE);
                self.asm.add_to_r8(at);
            }
            Register::EIP => return None,
            _ => self.sum(R8, insn, true)?,
        }
        let segment = match insn.memory_segment() {
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => return Some(()),
        };
        self.asm.load(R9, segment_base(segment));
        self.asm.lea(R8, Mem::Sum(Some(R8), Some((R9, 0)), 0));
        Some(())
    }

    /// LEA of the memory operand's offset, cut to the address size, and to 32 bits unless `wide`.
    fn sum(&mut self, to: u8, insn: &Instruction, wide: bool) -> Option<()> {
        let mem = self.operand(insn)?;
        self.asm.mem(&[], wide && !has_small_address(insn), &[0x8d], to, mem);
        Some(())
    }

    /// The memory operand with registers that hold it: those that stay in memory are loaded into R9 and R10.
    fn operand(&mut self, insn: &Instruction) -> Option<Mem> {
        let mut place = |register: Register, scratch: u8| match number(register) {
            Some(n) if is_homed(n) => {
                self.asm.load(scratch, home(n));
                Some(scratch)
            }
            Some(n) => Some(host(n)),
            None => None,
        };
        let base = place(insn.memory_base(), R9);
        let index = place(insn.memory_index(), R10);
        let index = index.map(|i| (i, insn.memory_index_scale().trailing_zeros() as u8));
        let displacement = insn.memory_displacement64() as i64;
        let disp = match i32::try_from(displacement) {
            Ok(disp) => disp,
            // A 32-bit address' displacement is not sign-extended.
            Err(_) if has_small_address(insn) => displacement as i32,
            Err(_) => return None,
        };
        Some(Mem::Sum(base, index, disp))
    }

    /// Where the memory operand lies: in the sum of a register and a displacement, if that is all, else in R8.
    fn place(&mut self, insn: &Instruction) -> Option<Place> {
        let plain = insn.memory_index() == Register::None
            && insn.memory_base().size() == 8
            && insn.memory_base() != Register::RIP
            && !matches!(insn.memory_segment(), Register::FS | Register::GS);
        if plain
            && let Some(n) = number(insn.memory_base()).filter(|&n| !is_homed(n))
            && let Ok(disp) = i32::try_from(insn.memory_displacement64() as i64)
            && disp < i32::MAX - 64
        {
            return Some(Place::Based(host(n), disp));
        }
        self.address(insn)?;
        Some(Place::Linear)
    }

    /// Finds the host's page for an access. R8, R9 and R10 are lost; see [`Place`] for how the operand is addressed then.
    fn check(&mut self, place: Place, wanted: Wanted) {
        let a = &mut self.asm;
        let size = wanted.size() as i32;
        let (base, disp) = match place {
            Place::Linear => (R8, 0),
            Place::Based(base, disp) => (base, disp),
        };
        let sum = |a: &mut Asm, wide: bool, to: u8, more: i32| {
            if disp + more == 0 {
                a.regs(wide, &[0x89], base, to);
            } else {
                a.mem(&[], wide, &[0x8d], to, Mem::At(base, disp + more));
            }
        };
        sum(a, false, R10, 0);
        a.shr32(R10, 12 - TlbLayout::SHIFT);
        a.and_imm(false, R10, TlbLayout::MASK);
        a.mem(&[], true, &[0x03], R10, CURRENT_TLB);
        if wanted.is_aligned() {
            sum(a, true, R9, 0);
            a.and_imm(true, R9, -4096 | (size - 1));
        } else {
            sum(a, true, R9, size - 1);
            a.and_imm(true, R9, -4096);
        }
        let tag = if wanted.is_write() { TlbLayout::WRITE } else { TlbLayout::READ };
        a.mem(&[], true, &[0x39], R9, Mem::At(R10, tag));
        let from = a.jcc_forward(NOT_EQUAL);
        let opcode = if matches!(place, Place::Linear) { 0x03 } else { 0x8b };
        a.mem(&[], true, &[opcode], R8, Mem::At(R10, TlbLayout::DELTA));
        let resume = a.code.len();
        self.open.push(self.stubs.len());
        self.stubs.push(Stub::Access { from, place, wanted, resume, done: None });
    }

    fn wanted(&self, d: &Decoded, size: usize, write: bool) -> Wanted {
        let over = matches!(d.insn.memory_segment(), Register::FS | Register::GS);
        let base = d.insn.memory_base();
        let stack = !over && matches!(base, Register::RSP | Register::RBP | Register::ESP | Register::EBP);
        Wanted::new(d.at, d.insn.len() as u8, size as u8, write).on_stack(stack)
    }

    fn want_vectors(&mut self, live: u16) {
        if self.vectors {
            return;
        }
        self.vectors = true;
        self.lose_flags(live, R9);
        self.asm.cmp_byte(VECTORS, 0);
        let from = self.asm.jcc_forward(EQUAL);
        let resume = self.asm.code.len();
        self.stubs.push(Stub::Vectors { from, resume });
    }

    fn plain(&mut self, d: &Decoded) -> Option<()> {
        let (insn, info) = (&d.insn, &d.info);
        let memory = memory_operand(insn);
        let size = insn.memory_size().size();
        let bytes = &self.request.page[d.at as usize..d.end() as usize];
        let parts = encode::split(bytes, info)?;
        if info.vector {
            self.want_vectors(d.live_in);
        }
        let mut place = Place::Linear;
        if let Some(operand) = memory {
            let write = info.written >> operand & 1 != 0;
            let aligned = info.aligned || insn.mnemonic() == iced_x86::Mnemonic::Cmpxchg16b;
            self.lose_flags(d.live_in, R9);
            place = if has_high_byte(insn) {
                self.address(insn)?;
                Place::Linear
            } else {
                self.place(insn)?
            };
            let wanted = self.wanted(d, size, write).aligned(aligned && size.is_power_of_two());
            self.check(place, wanted);
        }
        // The flags that it reads, and those that it leaves alone.
        let changed = if always_counts(insn, info) { info.flags_changed } else { 0 };
        if info.flags_read != 0 || d.live_out & !changed != 0 && info.flags_changed != 0 {
            self.want_flags(R9);
        }
        let high = has_high_byte(insn);
        // Registers that stay in memory get what is free.
        let mut free = if memory.is_some() { vec![R10, R9] } else { vec![R10, R9, R8] };
        let mut placed: [Option<(u8, u8)>; 4] = [None; 4];
        for i in 0..insn.op_count().min(4) {
            let Some(n) = operand_number(insn, i) else { continue };
            if !is_homed(n) || placed.iter().flatten().any(|p| p.0 == n) {
                continue;
            }
            let scratch = free.pop()?;
            placed[i as usize] = Some((n, scratch));
            self.asm.load(scratch, home(n));
        }
        let placed_at = |n: u8| placed.iter().flatten().find(|p| p.0 == n).map(|p| p.1);
        let moved =
            (0..insn.op_count()).any(|i| operand_number(insn, i).is_some_and(|n| is_homed(n) || n == RSP));
        if memory.is_none() && !moved {
            self.asm.bytes(bytes);
            if info.flags_changed != 0 {
                (self.in_host, self.in_memory) = (true, false);
            }
            return Some(());
        }
        parts.emit(&mut self.asm, info, high, place.mem(), |i| {
            let field = info.fields[i];
            if field == Field::None
                || i as u32 >= insn.op_count()
                || insn.op_kind(i as u32) != OpKind::Register
            {
                return None;
            }
            let register = insn.op_register(i as u32);
            let n = number(register)?;
            if is_homed(n) {
                placed_at(n)
            } else if n == RSP {
                Some(R11)
            } else {
                None
            }
        });
        for i in 0..insn.op_count().min(4) {
            if info.written >> i & 1 != 0
                && let Some(n) = operand_number(insn, i)
                && let Some(scratch) = placed_at(n)
            {
                self.asm.store(home(n), scratch);
            }
        }
        if info.flags_changed != 0 {
            (self.in_host, self.in_memory) = (true, false);
        }
        Some(())
    }

    fn lea(&mut self, d: &Decoded) -> Option<()> {
        let insn = &d.insn;
        let n = number(insn.op0_register())?;
        let wide = insn.op0_register().size() == 8;
        let to = if is_homed(n) { R8 } else { host(n) };
        if insn.memory_base() == Register::RIP {
            self.asm.load(R8, BASE);
            let disp = i32::try_from(insn.ip_rel_memory_address() as i64).ok()?;
            self.asm.mem(&[], wide, &[0x8d], to, Mem::At(R8, disp));
        } else {
            self.sum(to, insn, wide)?;
        }
        if is_homed(n) {
            self.asm.store(home(n), to);
        }
        Some(())
    }

    /// Writes `value` below the top of the stack and moves the stack pointer. R8 to R10 are lost.
    fn push_register(&mut self, d: &Decoded, value: Pushed) {
        self.lose_flags(d.live_in, R9);
        let top = Place::Based(R11, -8);
        self.check(top, Wanted::new(d.at, d.insn.len() as u8, 8, true).on_stack(true));
        let top = top.mem();
        match value {
            Pushed::Register(n) if is_homed(n) => {
                self.asm.load(R9, home(n));
                self.asm.store(top, R9);
            }
            Pushed::Register(n) => self.asm.store(top, host(n)),
            Pushed::Immediate(value) => {
                self.asm.mem(&[], true, &[0xc7], 0, top);
                self.asm.imm32(value as u32);
            }
            Pushed::Temp => {
                self.asm.load(R9, TEMP);
                self.asm.store(top, R9);
            }
            Pushed::Return(next) => {
                self.asm.load(R9, BASE);
                self.asm.lea(R9, Mem::At(R9, i32::from(next)));
                self.asm.store(top, R9);
            }
        }
        self.asm.lea(R11, Mem::At(R11, -8));
    }

    fn push(&mut self, d: &Decoded) -> Option<()> {
        let insn = &d.insn;
        match insn.op0_kind() {
            OpKind::Register => {
                let n = number(insn.op0_register())?;
                self.push_register(d, Pushed::Register(n));
            }
            OpKind::Memory => {
                self.lose_flags(d.live_in, R9);
                let place = self.place(insn)?;
                let wanted = self.wanted(d, 8, false);
                self.check(place, wanted);
                self.asm.load(R8, place.mem());
                self.asm.store(TEMP, R8);
                self.push_register(d, Pushed::Temp);
            }
            _ => {
                let value = i32::try_from(insn.immediate(0) as i64).ok()?;
                self.push_register(d, Pushed::Immediate(value));
            }
        }
        Some(())
    }

    fn pop(&mut self, d: &Decoded) -> Option<()> {
        let n = operand_number(&d.insn, 0)?;
        self.lose_flags(d.live_in, R9);
        let top = Place::Based(R11, 0);
        self.check(top, Wanted::new(d.at, d.insn.len() as u8, 8, false).on_stack(true));
        if is_homed(n) {
            self.asm.load(R9, top.mem());
            self.asm.store(home(n), R9);
        } else {
            self.asm.load(host(n), top.mem());
        }
        if n != RSP {
            self.asm.lea(R11, Mem::At(R11, 8));
        }
        Some(())
    }

    fn leave(&mut self, d: &Decoded) {
        self.lose_flags(d.live_in, R9);
        let frame = Place::Based(RBP, 0);
        self.check(frame, Wanted::new(d.at, d.insn.len() as u8, 8, false).on_stack(true));
        self.asm.lea(R11, Mem::At(RBP, 8));
        self.asm.load(RBP, frame.mem());
    }

    /// Divisions whose quotient certainly fits run here, others in the handler. They leave the flags alone, as processors
    /// do.
    fn divide(&mut self, d: &Decoded, op: Option<*const Op>) -> Option<()> {
        let insn = &d.insn;
        let wide = matches!(insn.code(), iced_x86::Code::Div_rm64 | iced_x86::Code::Idiv_rm64);
        let signed = insn.mnemonic() == iced_x86::Mnemonic::Idiv;
        self.lose_flags(d.live_in, R9);
        if insn.op0_kind() == OpKind::Memory {
            let place = self.place(insn)?;
            let wanted = self.wanted(d, if wide { 8 } else { 4 }, false);
            self.check(place, wanted);
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

    /// Goes on at an offset of the page, if a condition holds. A block that is there already is jumped to.
    fn edge(&mut self, condition: Option<u8>, target: i64, live: u16) {
        let jump = |a: &mut Asm| match condition {
            Some(cc) => a.jcc_forward(cc),
            None => a.jmp_forward(),
        };
        // Where flags are nowhere, nobody wants them.
        let in_host = self.in_host && live != 0 && !self.in_memory;
        if !(0..PAGE as i64).contains(&target) {
            let from = jump(&mut self.asm);
            self.stubs.push(Stub::Far { from, target, save_flags: in_host });
            return;
        }
        let target = target as u16;
        let known = if !self.request.chain {
            None
        } else if target == self.start {
            Some(self.entry)
        } else {
            (self.request.known)(target)
        };
        if let Some(entry) = known {
            let to = if self.in_host { entry.from_host } else { entry.from_memory };
            match condition {
                Some(cc) => self.asm.jcc(cc, to),
                None => self.asm.jmp(to),
            }
            return;
        }
        let from = jump(&mut self.asm);
        self.link(from, target, in_host);
    }

    fn link(&mut self, from: Forward, target: u16, save_flags: bool) {
        let number = self.request.first_link + self.links.len();
        let end = self.asm.origin + from.0 as u64;
        self.links.push(Link { end, target, in_host: self.in_host });
        self.stubs.push(Stub::Link { from, number, target, save_flags });
    }

    /// The return address, in R9, is on the guest's stack: puts it on the host's too, which has room.
    fn foresee_return(&mut self) {
        let a = &mut self.asm;
        a.mem(&[], true, &[0x3b], RSP, LIMIT);
        a.bytes(&[0x70 | ABOVE, 9]); // ja over the next
        let at = a.code.len();
        a.load(RSP, BOTTOM);
        debug_assert_eq!(a.code.len() - at, 9);
        a.push(R9);
    }

    /// Behind a host call: the guest has returned, to what is in R8.
    fn returned(&mut self, next: u16) {
        let a = &mut self.asm;
        a.pop(R9);
        a.regs(true, &[0x39], R9, R8);
        a.jcc(NOT_EQUAL, self.request.glue.unforeseen);
        (self.in_host, self.in_memory) = (false, true);
        if u64::from(next) >= PAGE {
            self.asm.jmp(self.request.glue.dispatch);
            self.reachable = false;
            return;
        }
        self.asm.and_imm(true, R8, -4096);
        self.asm.store(BASE, R8);
    }

    fn call(&mut self, d: &Decoded) {
        let target = d.insn.near_branch_target() as i64;
        self.store_flags(d.live_in, R9);
        self.push_register(d, Pushed::Return(d.end()));
        self.foresee_return();
        self.in_host = false;
        if (0..PAGE as i64).contains(&target) {
            let known = if self.request.chain { (self.request.known)(target as u16) } else { None };
            match known {
                Some(entry) => self.asm.call(entry.from_memory),
                None => {
                    let from = self.asm.call_forward();
                    self.link(from, target as u16, false);
                }
            }
        } else {
            self.asm.load(R8, BASE);
            self.asm.add_to_r8(target);
            self.asm.call(self.request.glue.dispatch);
        }
        self.returned(d.end());
    }

    /// Tells which instruction leads to an address that may be none.
    fn note_origin(&mut self, d: &Decoded, dropped: i32) {
        self.asm.mem(&[], false, &[0xc7], 0, ORIGIN);
        self.asm.imm32(super::Origin::new(d.at, dropped).0);
    }

    fn ret(&mut self, d: &Decoded) {
        self.lose_flags(d.live_in, R9);
        let more = if d.insn.op_count() == 1 { d.insn.immediate16() } else { 0 };
        let top = Place::Based(R11, 0);
        self.check(top, Wanted::new(d.at, d.insn.len() as u8, 8, false).on_stack(true));
        self.asm.load(R8, top.mem());
        self.asm.lea(R11, Mem::At(R11, 8 + i32::from(more)));
        self.note_origin(d, 8 + i32::from(more));
        self.asm.byte(0xc3);
    }

    fn indirect(&mut self, d: &Decoded, call: bool) -> Option<()> {
        let insn = &d.insn;
        self.lose_flags(d.live_in, R9);
        if insn.op0_kind() == OpKind::Memory {
            let place = self.place(insn)?;
            let wanted = self.wanted(d, 8, false);
            self.check(place, wanted);
            self.asm.load(R8, place.mem());
        } else {
            let n = number(insn.op0_register())?;
            if is_homed(n) {
                self.asm.load(R8, home(n));
            } else {
                self.asm.mov(R8, host(n));
            }
        }
        if !call {
            self.note_origin(d, 0);
            self.asm.jmp(self.request.glue.dispatch);
            return Some(());
        }
        self.asm.store(TEMP, R8);
        self.push_register(d, Pushed::Return(d.end()));
        self.foresee_return();
        self.asm.load(R8, TEMP);
        self.note_origin(d, -8);
        self.asm.call(self.request.glue.dispatch);
        self.returned(d.end());
        Some(())
    }

    /// Writes what stands out of the way, for where it will lie.
    fn finish_stubs(&mut self, at: impl FnOnce(usize) -> u64) -> Vec<u8> {
        let glue = self.request.glue;
        let stubs = std::mem::take(&mut self.stubs);
        let len = stubs.iter().map(Stub::most).sum::<usize>();
        let mut aside = Asm::new(at(len));
        let (a, code) = (&mut aside, &mut self.asm);
        let end_of_block = code.origin + code.code.len() as u64;
        for stub in stubs {
            let here = a.here();
            match stub {
                Stub::Access { from, place, wanted, resume, done } => {
                    code.land_abroad(from, here);
                    if let Place::Based(base, disp) = place {
                        a.lea(R8, Mem::At(base, disp));
                    }
                    a.mov_imm32(R9, wanted.0);
                    a.call(glue.access);
                    match place {
                        Place::Linear => a.jmp(code.origin + resume as u64),
                        Place::Based(base, disp) => {
                            // What completes the instruction comes back five bytes further.
                            let on = a.jmp_forward();
                            a.jmp(done.map_or(end_of_block, |done| code.origin + done as u64));
                            a.land(on);
                            a.lea(R9, Mem::At(base, disp));
                            a.regs(true, &[0x29], R9, R8); // sub r8, r9
                            a.jmp(code.origin + resume as u64);
                            continue;
                        }
                    }
                    a.jmp(done.map_or(end_of_block, |done| code.origin + done as u64));
                }
                Stub::Handler { from, op, resume } => {
                    for forward in from {
                        code.land_abroad(forward, here);
                    }
                    a.mov_imm(R8, op);
                    a.call(glue.handler);
                    a.jmp(code.origin + resume as u64);
                }
                Stub::Link { from, number, target, save_flags } => {
                    code.land_abroad(from, here);
                    if save_flags {
                        a.save_flags(STATUS, R9);
                    }
                    a.load(R8, BASE);
                    a.lea(R8, Mem::At(R8, i32::from(target)));
                    a.mov_imm32(R9, number as u32);
                    a.jmp(glue.leave_to_link);
                }
                Stub::Far { from, target, save_flags } => {
                    code.land_abroad(from, here);
                    if save_flags {
                        a.save_flags(STATUS, R9);
                    }
                    a.load(R8, BASE);
                    a.add_to_r8(target);
                    a.jmp(glue.dispatch);
                }
                Stub::Leave { from, at, save_flags } => {
                    code.land_abroad(from, here);
                    if save_flags {
                        a.save_flags(STATUS, R9);
                    }
                    a.load(R8, BASE);
                    a.lea(R8, Mem::At(R8, i32::from(at)));
                    a.jmp(glue.leave);
                }
                Stub::Vectors { from, resume } => {
                    code.land_abroad(from, here);
                    a.call(glue.load_vectors);
                    a.jmp(code.origin + resume as u64);
                }
            }
        }
        debug_assert!(aside.code.len() <= len);
        aside.code.resize(len, 0xcc);
        aside.code
    }
}

impl Stub {
    /// Bytes of its code at most.
    fn most(&self) -> usize {
        match self {
            Self::Access { place: Place::Linear, .. } => 21,
            Self::Access { .. } => 45,
            Self::Handler { .. } => 20,
            Self::Link { save_flags, .. } => 27 + if *save_flags { FLAGS_SAVED } else { 0 },
            Self::Far { save_flags, .. } => 32 + if *save_flags { FLAGS_SAVED } else { 0 },
            Self::Leave { save_flags, .. } => 21 + if *save_flags { FLAGS_SAVED } else { 0 },
            Self::Vectors { .. } => 10,
        }
    }
}

/// Bytes of code that saves flags.
const FLAGS_SAVED: usize = 20;

/// Where an access goes.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// The linear address is in R8; once it is checked, the host's is.
    Linear,
    /// The linear address is the sum of a host register, which holds a guest's, and a displacement; once it is checked, what
    /// must be added to it is in R8.
    Based(u8, i32),
}

impl Place {
    /// The operand, once checked.
    fn mem(self) -> Mem {
        match self {
            Self::Linear => Mem::At(R8, 0),
            Self::Based(base, disp) => Mem::Sum(Some(R8), Some((base, 0)), disp),
        }
    }
}

/// What a push writes.
enum Pushed {
    Register(u8),
    Immediate(i32),
    Temp,
    /// The address of what follows, at this offset of the page.
    Return(u16),
}

fn operand_number(insn: &Instruction, i: u32) -> Option<u8> {
    (i < insn.op_count() && insn.op_kind(i) == OpKind::Register).then(|| number(insn.op_register(i)))?
}

/// Whether the memory operand has a 32-bit address.
fn has_small_address(insn: &Instruction) -> bool {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let absolute = base == Register::None && index == Register::None;
    base.size() == 4 || index.size() == 4 || absolute && insn.memory_displ_size() == 4
}

fn has_high_byte(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        insn.op_kind(i) == OpKind::Register
            && matches!(insn.op_register(i), Register::AH | Register::BH | Register::CH | Register::DH)
    })
}

fn memory_operand(insn: &Instruction) -> Option<u32> {
    (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)
}

/// Whether the interpreter's handler is to run an instruction, whatever its code promises.
pub(super) fn needs_handler(insn: &Instruction, info: &Info, key: Key) -> bool {
    use iced_x86::Mnemonic as M;
    let memory = memory_operand(insn);
    let size = insn.memory_size().size();
    // An address that is not the sum of 64-bit registers and a displacement.
    let odd = memory.is_some()
        && (insn.memory_base() == Register::EIP
            || insn.memory_base() == Register::RIP
                && i32::try_from(insn.ip_rel_memory_address() as i64).is_err()
            || i32::try_from(insn.memory_displacement64() as i64).is_err()
                && insn.memory_base() != Register::RIP
                && !has_small_address(insn));
    match info.class {
        Class::Plain => {
            let unavailable =
                info.vector && !key.sse() || info.avx && !key.avx() || info.arithmetic && !key.masked();
            let bit_string = matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
                && memory.is_some()
                && insn.op_kind(1) == OpKind::Register;
            let implicit = insn.op_kinds().any(|k| k > OpKind::Immediate32to64 && k != OpKind::Memory);
            // High bytes allow no REX prefix, which the stand-in for RSP needs.
            let clash =
                has_high_byte(insn) && (0..insn.op_count()).any(|i| operand_number(insn, i) == Some(RSP));
            // F3 makes one form of XCHG another instruction.
            let repeated = insn.mnemonic() == M::Xchg && insn.has_rep_prefix();
            let strange = bit_string || implicit || odd || clash || repeated;
            unavailable || strange || memory.is_some() && (size == 0 || size > 64)
        }
        Class::Lea => odd || insn.op0_register().size() == 2,
        Class::Push | Class::JumpIndirect | Class::CallIndirect => odd || memory.is_some() && size != 8,
        Class::Pop => memory.is_some(),
        Class::Divide => odd,
        _ => false,
    }
}

/// Encoding of iced's condition codes, which start with none.
fn condition(code: u8) -> u8 {
    // o no b ae e ne be a s ns p np l ge le g, in that order.
    code.wrapping_sub(1) & 15
}
