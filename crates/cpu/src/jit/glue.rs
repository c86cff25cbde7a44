//! The code between translated code and Rust: entering and leaving, finding the next block, and calls for help.

use std::mem::offset_of;

use super::asm::{Asm, EQUAL, Mem, NOT_EQUAL, R8, R9, R10, R11, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
use super::help::Wanted;
use super::strings::{self, Strings};
pub(super) use super::vectors::Widest;
use super::vectors::{self, Vectors};
use super::x87;
use super::{Hot, JUMP_SHIFT, JUMPS, Jump};
use crate::cpu::Cpu;
use crate::mmu::TlbLayout;
use skep_hv::state::Segment;

/// Guest registers that stand in host registers while translated code runs: guest number, host number.
const PINNED: [(u8, u8); 12] = [
    (RAX, RAX),
    (RCX, RCX),
    (RDX, RDX),
    (RBX, RBX),
    (RSP, R11),
    (RBP, RBP),
    (RSI, RSI),
    (RDI, RDI),
    (12, 12),
    (13, 13),
    (14, 14),
    (R8, R15),
];
/// What the ABI wants back.
const CALLEE_SAVED: [u8; 6] = [RBX, RBP, 12, 13, 14, R15];
/// Bytes of a page.
const PAGE: i32 = super::PAGE as i32;
/// Bytes of return addresses that the host's stack may hold before they are dropped.
const RETURNS: i32 = 32 << 10;

/// Fields of [`Hot`] as operands.
pub(super) const fn hot(offset: usize) -> Mem {
    Mem::Cpu((offset_of!(Cpu, hot) + offset) as i32)
}

/// A general register's home.
pub(super) fn home(n: u8) -> Mem {
    Mem::Cpu((offset_of!(Cpu, regs) + 8 * n as usize) as i32)
}

/// The base of a segment.
pub(super) fn segment_base(segment: usize) -> Mem {
    let at = offset_of!(Cpu, segs) + segment * size_of::<Segment>() + offset_of!(Segment, base);
    Mem::Cpu(at as i32)
}

/// The array of translations in use.
const CURRENT_TLB: Mem = Mem::Cpu((offset_of!(Cpu, tlb) + TlbLayout::CURRENT) as i32);
/// The stack's page, and what to add to its addresses.
pub(super) const STACK_PAGE: Mem = Mem::Cpu((offset_of!(Cpu, tlb) + TlbLayout::STACK_PAGE) as i32);
pub(super) const STACK_DELTA: Mem = Mem::Cpu((offset_of!(Cpu, tlb) + TlbLayout::STACK_DELTA) as i32);
/// The first stretch.
pub(super) const STRETCH_BASE: Mem = Mem::Cpu((offset_of!(Cpu, tlb) + TlbLayout::STRETCH_BASE) as i32);
pub(super) const STRETCH_LEN: Mem = Mem::Cpu((offset_of!(Cpu, tlb) + TlbLayout::STRETCH_LEN) as i32);
pub(super) const STRETCH_DELTA: Mem = Mem::Cpu((offset_of!(Cpu, tlb) + TlbLayout::STRETCH_DELTA) as i32);
pub(super) const STATUS: i32 = offset_of!(Cpu, status) as i32;
pub(super) const RIP: Mem = Mem::Cpu(offset_of!(Cpu, rip) as i32);
pub(super) const BASE: Mem = hot(offset_of!(Hot, base));
pub(super) const ATTENTION: Mem = hot(offset_of!(Hot, attention));
pub(super) const TEMP: Mem = hot(offset_of!(Hot, temp));
pub(super) const ORIGIN: Mem = hot(offset_of!(Hot, origin));
pub(super) const VECTORS: Mem = hot(offset_of!(Hot, vectors));
pub(super) const X87: Mem = hot(offset_of!(Hot, x87));
pub(super) const X87_AT: Mem = hot(offset_of!(Hot, x87_at));
pub(super) const X87_BASE: Mem = hot(offset_of!(Hot, x87_base));
pub(super) const BOTTOM: Mem = hot(offset_of!(Hot, bottom));
pub(super) const LIMIT: Mem = hot(offset_of!(Hot, limit));
const WANTED: Mem = hot(offset_of!(Hot, wanted));
const LINEAR: Mem = hot(offset_of!(Hot, linear));
const LINK: Mem = hot(offset_of!(Hot, link));
pub(super) const STAMP: Mem = hot(offset_of!(Hot, stamp));
const ENTRY_STACK: Mem = hot(offset_of!(Hot, entry_stack));

/// Addresses of the routines.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Glue {
    /// `extern "sysv64" fn(code: u64)`.
    pub(super) enter: u64,
    /// Goes on at the guest address in R8. Status flags are in memory.
    pub(super) dispatch: u64,
    /// As `dispatch`, for blocks that have looked for attention themselves.
    pub(super) dispatch_at_once: u64,
    /// As `dispatch`, after a return that was not foreseen.
    pub(super) unforeseen: u64,
    /// Leaves, with RIP in R8.
    pub(super) leave: u64,
    /// As `leave`, for the link whose number is in R9.
    pub(super) leave_to_link: u64,
    /// Helps with a memory access: address in R8, what it is in R9 ([`super::help::Wanted`]). Comes back with the address in
    /// R10, what is to be added to it in R8, and no page's address in R9; or, five bytes further, with the instruction done.
    pub(super) access: u64,
    /// As `access`, after a look at the translations.
    pub(super) look_up: u64,
    /// As `access`, for one to the stack, whose page is remembered.
    pub(super) stack: u64,
    /// Runs the handler of the operation in R8; what it is in R9. Comes back if the next instruction is next.
    pub(super) handler: u64,
    /// Make vector registers the guest's, in steps ([`vectors`]).
    pub(super) load_vectors: [u64; 3],
    /// Repeated moves and fills by the operation in R8.
    pub(super) strings: Strings,
    /// Makes the x87 registers the guest's.
    pub(super) load_x87: u64,
}

/// What a helper decided; with it comes a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Verdict {
    pub(super) what: u64,
    pub(super) value: u64,
}

impl Verdict {
    /// Go on; the value is a host address, for accesses.
    pub(super) const GO_ON: u64 = 0;
    /// The instruction is done.
    pub(super) const DONE: u64 = 1;
    /// Go on wherever RIP says.
    pub(super) const DISPATCH: u64 = 2;
    /// Leave translated code.
    pub(super) const LEAVE: u64 = 3;
}

/// What the routines call.
pub(super) type AccessHelper = unsafe extern "sysv64" fn(*mut Cpu, u64, u32) -> Verdict;
pub(super) type HandlerHelper = unsafe extern "sysv64" fn(*mut Cpu, u64, u32) -> Verdict;

/// Writes the routines.
pub(super) fn emit(asm: &mut Asm, access: AccessHelper, handler: HandlerHelper, widest: Widest) -> Glue {
    let Vectors { load, reload, save: save_vectors } = vectors::emit(asm, widest);
    let mut glue = Glue { load_vectors: load, ..Glue::default() };
    glue.load_x87 = x87::emit_load(asm);
    let others = Others {
        save: emit_others(asm, save_vectors, x87::save),
        reload: emit_others(asm, reload, x87::reload),
    };

    // Returns that were never called for: the entry stays for the next.
    let empty = asm.here();
    asm.lea(RSP, Mem::At(RSP, -8));
    let to_dispatch = asm.jmp_forward();

    glue.unforeseen = asm.here();
    asm.load(RSP, BOTTOM);

    glue.dispatch = asm.here();
    asm.land(to_dispatch);
    asm.load(R10, ATTENTION);
    asm.cmp_dword(Mem::At(R10, 0), 0);
    let called = asm.jcc_forward(NOT_EQUAL);
    glue.dispatch_at_once = asm.here();
    asm.regs(false, &[0x89], R8, R9);
    asm.shr32(R9, JUMP_SHIFT as u8);
    asm.regs(false, &[0x31], R8, R9);
    asm.and_imm(false, R9, JUMPS as i32 - 1);
    asm.bytes(&[0x41, 0xc1, 0xe1, 5]); // shl r9d, 5
    asm.mem(&[], true, &[0x03], R9, hot(offset_of!(Hot, jumps)));
    asm.mem(&[], true, &[0x39], R8, Mem::At(R9, offset_of!(Jump, linear) as i32));
    let other = asm.jcc_forward(NOT_EQUAL);
    asm.load(R10, STAMP);
    asm.mem(&[], true, &[0x39], R10, Mem::At(R9, offset_of!(Jump, stamp) as i32));
    let stale = asm.jcc_forward(NOT_EQUAL);
    asm.and_imm(true, R8, -4096);
    asm.store(BASE, R8);
    asm.mem(&[], false, &[0xff], 4, Mem::At(R9, offset_of!(Jump, code) as i32));

    glue.leave_to_link = asm.here();
    asm.mem(&[], false, &[0x89], R9, LINK);
    asm.land(called);
    asm.land(other);
    asm.land(stale);
    glue.leave = asm.here();
    asm.store(RIP, R8);
    save_registers(asm);
    others.call(asm, others.save);
    let leave_saved = asm.here();
    asm.mem(&[0x66], false, &[0xc7], 0, VECTORS);
    asm.bytes(&[0, 0]);
    asm.load(RSP, ENTRY_STACK);
    asm.lea(RSP, Mem::At(RSP, 8));
    for &reg in CALLEE_SAVED.iter().rev() {
        asm.pop(reg);
    }
    asm.byte(0xc3);

    glue.enter = asm.here();
    for &reg in &CALLEE_SAVED {
        asm.push(reg);
    }
    asm.lea(RSP, Mem::At(RSP, -8));
    asm.store(ENTRY_STACK, RSP);
    asm.mov_imm(RAX, empty);
    asm.push(RAX);
    asm.store(BOTTOM, RSP);
    asm.lea(RAX, Mem::At(RSP, -RETURNS));
    asm.store(LIMIT, RAX);
    asm.mov(R8, RDI);
    load_registers(asm);
    asm.bytes(&[0x41, 0xff, 0xe0]); // jmp r8

    glue.access = asm.here();
    help(asm, access as usize as u64, others, &glue, leave_saved, true);
    glue.look_up = asm.here();
    look_up(asm, glue.access, false);
    glue.stack = asm.here();
    look_up(asm, glue.access, true);
    glue.handler = asm.here();
    help(asm, handler as usize as u64, others, &glue, leave_saved, false);
    glue.strings = strings::emit(asm, glue.handler);
    glue
}

/// Routines for what is not general registers.
#[derive(Debug, Clone, Copy)]
struct Others {
    save: u64,
    reload: u64,
}

impl Others {
    /// Calls one of them, if there is anything.
    fn call(self, asm: &mut Asm, routine: u64) {
        const { assert!(offset_of!(Hot, x87) == offset_of!(Hot, vectors) + 1) };
        asm.mem(&[0x66], false, &[0x83], 7, VECTORS); // both
        asm.byte(0);
        let none = asm.jcc_forward(EQUAL);
        asm.call(routine);
        asm.land(none);
    }
}

/// Moves of vector registers and x87 state what is the guest's. RAX, RDX, R10 and flags are lost.
fn emit_others(asm: &mut Asm, vectors: u64, x87: fn(&mut Asm)) -> u64 {
    let at = asm.here();
    asm.cmp_byte(VECTORS, 0);
    let none = asm.jcc_forward(EQUAL);
    asm.call(vectors);
    asm.land(none);
    asm.cmp_byte(X87, 0);
    let none = asm.jcc_forward(EQUAL);
    x87(asm);
    asm.land(none);
    asm.byte(0xc3);
    at
}

/// Calls a helper with the processor, R8 and R9, everything of the guest's in its place in memory.
fn help(asm: &mut Asm, helper: u64, others: Others, glue: &Glue, leave_saved: u64, done_skips: bool) {
    if done_skips {
        asm.store(LINEAR, R8);
    }
    save_registers(asm);
    others.call(asm, others.save);
    asm.load(RDI, hot(offset_of!(Hot, this)));
    asm.mov(RSI, R8);
    asm.regs(false, &[0x89], R9, RDX);
    asm.mov_imm(RAX, helper);
    asm.bytes(&[0xff, 0xd0]); // call rax
    asm.bytes(&[0x83, 0xf8, Verdict::LEAVE as u8]); // cmp eax, 3
    asm.jcc(EQUAL, leave_saved);
    asm.mov(R8, RDX);
    asm.regs(false, &[0x89], RAX, R9);
    others.call(asm, others.reload);
    load_registers(asm);
    asm.bytes(&[0x41, 0x83, 0xf9, Verdict::DISPATCH as u8]); // cmp r9d, 2
    let dispatch = asm.jcc_forward(EQUAL);
    if done_skips {
        asm.bytes(&[0x45, 0x85, 0xc9]); // test r9d, r9d
        let done = asm.jcc_forward(NOT_EQUAL);
        asm.load(R10, LINEAR);
        asm.regs(true, &[0x29], R10, R8); // sub r8, r10
        no_page(asm);
        asm.byte(0xc3);
        asm.land(done);
        asm.bytes(&[0x48, 0x83, 0x04, 0x24, 5]); // add qword ptr [rsp], 5
        asm.load_flags(STATUS, R9);
        no_page(asm);
    }
    asm.byte(0xc3);
    asm.land(dispatch);
    asm.load(R8, RIP);
    asm.jmp(glue.unforeseen);
}

/// Looks a page up among the translations. That of the stack is remembered, if it may be written; the access must lie in it.
fn look_up(asm: &mut Asm, access: u64, stack: bool) {
    asm.mem(&[], false, &[0x89], R9, WANTED);
    asm.regs(false, &[0x89], R8, R10);
    tlb_entry(asm);
    // Size less one: whether it leaves the page, and whether it is misplaced.
    asm.bytes(&[0x41, 0xc1, 0xe9, 16]); // shr r9d, 16
    asm.and_imm(false, R9, 0x7f);
    asm.bytes(&[0x41, 0xff, 0xc9]); // dec r9d
    test_wanted(asm, Wanted::ALIGNED);
    let any = asm.jcc_forward(EQUAL);
    asm.regs(true, &[0x85], R8, R9); // test r9, r8
    let misplaced = asm.jcc_forward(NOT_EQUAL);
    asm.land(any);
    asm.lea(R9, Mem::Sum(Some(R9), Some((R8, 0)), 0));
    asm.and_imm(true, R9, -4096);
    let mut others = Vec::new();
    let mut compare = |asm: &mut Asm, tag: i32| {
        // The entry is that of the first byte, the page that of the last: both must be the same.
        asm.mem(&[], true, &[0x39], R9, Mem::At(R10, tag));
        others.push(asm.jcc_forward(NOT_EQUAL));
    };
    if stack {
        compare(asm, TlbLayout::READ);
        compare(asm, TlbLayout::WRITE);
        asm.store(STACK_PAGE, R9);
        asm.load(R10, Mem::At(R10, TlbLayout::DELTA));
        asm.store(STACK_DELTA, R10);
    } else {
        by_kind(asm, &mut compare);
        asm.load(R10, Mem::At(R10, TlbLayout::DELTA));
    }
    let found = asm.label();
    asm.regs(true, &[0x87], R8, R10); // xchg
    no_page(asm);
    asm.byte(0xc3);
    for forward in others {
        asm.land(forward);
    }
    // Perhaps it begins in one page and ends in the next, and they follow each other in the host too.
    let mut fails = vec![misplaced];
    let mut compare = |asm: &mut Asm, tag: i32| {
        asm.mem(&[], true, &[0x39], R9, Mem::At(R10, tag));
        fails.push(asm.jcc_forward(NOT_EQUAL));
    };
    asm.lea(R9, Mem::At(R9, -PAGE));
    by_kind(asm, &mut compare);
    asm.load(R10, Mem::At(R10, TlbLayout::DELTA));
    asm.store(LINEAR, R10);
    asm.lea(R9, Mem::At(R9, PAGE));
    asm.regs(false, &[0x89], R9, R10);
    tlb_entry(asm);
    by_kind(asm, &mut compare);
    asm.load(R10, Mem::At(R10, TlbLayout::DELTA));
    asm.mem(&[], true, &[0x39], R10, LINEAR);
    asm.jcc(EQUAL, asm.origin + found as u64);
    for forward in fails {
        asm.land(forward);
    }
    asm.load32(R9, WANTED);
    asm.jmp(access);
}

/// Compares with the tag of pages that may be read, or written, whichever the access wants.
fn by_kind(asm: &mut Asm, compare: &mut impl FnMut(&mut Asm, i32)) {
    test_wanted(asm, Wanted::WRITE);
    let reads = asm.jcc_forward(EQUAL);
    compare(asm, TlbLayout::WRITE);
    let writes = asm.jmp_forward();
    asm.land(reads);
    compare(asm, TlbLayout::READ);
    asm.land(writes);
}

/// From the low half of an address in R10 to the entry for it among the translations.
pub(super) fn tlb_entry(asm: &mut Asm) {
    asm.shr32(R10, 12 - TlbLayout::SHIFT);
    asm.and_imm(false, R10, TlbLayout::MASK);
    asm.mem(&[], true, &[0x03], R10, CURRENT_TLB);
}

/// R9 is no page's address.
fn no_page(asm: &mut Asm) {
    asm.bytes(&[0x49, 0xc7, 0xc1, 0xff, 0xff, 0xff, 0xff]); // mov r9, -1
}

fn test_wanted(asm: &mut Asm, bit: u32) {
    asm.mem(&[], false, &[0xf7], 0, WANTED);
    asm.imm32(bit);
}

fn save_registers(asm: &mut Asm) {
    for (guest, host) in PINNED {
        asm.store(home(guest), host);
    }
}

fn load_registers(asm: &mut Asm) {
    for (guest, host) in PINNED {
        asm.load(host, home(guest));
    }
}
