//! The translator: runs of guest instructions become code for the host, which is of the same kind, so that most of them
//! stay what they are but for their operands.
//!
//! * [`run`] finds code for where the processor is, or has it made, and enters it;
//! * [`translate`] makes code of decoded instructions, by what [`table`] says of their codes and [`known`] of them: their [`operands`], what they [`access`] in
//!   memory, the [`stack`], repeated [`strings`], their [`flags`], the [`flow`] of control, and the [`stubs`] out of its way;
//!   [`encode`] puts other operands into an instruction, [`asm`] writes our own;
//! * [`linear`] is how a kernel's reads do without translations;
//! * [`small`] is what differs for 32-bit code;
//! * [`glue`] is the code between translated code and Rust, with the [`vectors`] and the [`x87`] state that it moves, [`help`] the Rust
//!   that it calls;
//! * [`memory`] is where the code lies, [`evict`] how the oldest of it makes room for new;
//! * [`lockstep`] compares all of this with the interpreter.
//!
//! A block is known by its guest physical address and by what else decides its meaning ([`Key`]); it names addresses relative
//! to its page only, so that it serves wherever the page is mapped. Jumps within the page are direct; all others go through
//! the jump cache, which is keyed by linear address and [`Cpu::code_stamp`]. So a page is what is dropped when code
//! changes, and nothing outside of the page leads into it.
//!
//! `docs/software-cpu.md` describes the design, `docs/performance.md` what was measured.
#![expect(unsafe_code, reason = "the processor that translated code works on is a raw pointer")]

mod access;
mod asm;
mod dump;
mod encode;
mod evict;
mod flags;
mod flow;
mod glue;
mod help;
mod known;
mod length;
mod linear;
mod lockstep;
mod memory;
mod operands;
mod run;
mod small;
mod stack;
mod strings;
mod stubs;
mod table;
mod translate;
mod vectors;
mod x87;

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use evict::{Evicted, Links};
use glue::Glue;
use known::Instructions;
pub(crate) use lockstep::Lockstep;
use memory::CodeMemory;
use skep_memory::GuestMemory;
use translate::{Entry, MAX_INSTRUCTIONS};

use crate::block::Mix;
use crate::cpu::Cpu;
use crate::op::Op;

const PAGE: u64 = 4096;
/// Entries of the jump cache.
const JUMPS: usize = 16384;
/// What is folded into the lowest bits of an address to index it.
const JUMP_SHIFT: u32 = 12;
/// Code memory kept free for one block.
const RESERVE: usize = 64 << 10;
/// Bytes of code that are read at first: few blocks have more.
const ENOUGH_BYTES: usize = 192;
/// Bytes of code for each page whose code others may lead to directly.
const CODE_PER_RECORD: usize = 8 << 10;
/// No link.
const NO_LINK: u32 = u32::MAX;

/// What decides what code means, beside its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(u8);

impl Key {
    const USER: u8 = 1;
    const SSE: u8 = 2;
    const AVX: u8 = 4;
    const MASKED: u8 = 8;
    /// 32-bit code.
    const SMALL: u8 = 16;
    /// It may use FS and GS without any check.
    const FS: u8 = 32;
    const GS: u8 = 64;
    const AVX512: u8 = 128;
    const BITS: u32 = 8;

    fn user(self) -> bool {
        self.0 & Self::USER != 0
    }

    fn sse(self) -> bool {
        self.0 & Self::SSE != 0
    }

    fn avx(self) -> bool {
        self.0 & Self::AVX != 0
    }

    fn avx512(self) -> bool {
        self.0 & Self::AVX512 != 0
    }

    fn masked(self) -> bool {
        self.0 & Self::MASKED != 0
    }

    fn small(self) -> bool {
        self.0 & Self::SMALL != 0
    }

    fn fs(self) -> bool {
        self.0 & Self::FS != 0
    }

    fn gs(self) -> bool {
        self.0 & Self::GS != 0
    }

    /// As decoders name it.
    fn bits(self) -> u32 {
        if self.small() { 32 } else { 64 }
    }

    /// Bytes of an address on the stack.
    fn word(self) -> usize {
        if self.small() { 4 } else { 8 }
    }
}

/// Where a transfer of control came from, in case its target turns out to be no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Origin(u32);

impl Origin {
    const VALID: u32 = 1 << 31;

    /// The instruction at `at` of its page, which has moved the stack pointer by `dropped`.
    fn new(at: u16, dropped: i32) -> Self {
        Self(u32::from(at) | ((dropped + 8) as u32) << 12 | Self::VALID)
    }

    fn at(self) -> u64 {
        u64::from(self.0 & 0xfff)
    }

    fn dropped(self) -> i64 {
        i64::from(self.0 >> 12 & 0x7_ffff) - 8
    }
}

/// What translated code touches of its processor beside the registers.
#[repr(C)]
pub(crate) struct Hot {
    /// Linear address of the page that runs.
    pub(crate) base: u64,
    /// [`Cpu::code_stamp`].
    pub(crate) stamp: u64,
    jumps: *mut Jump,
    attention: *const AtomicU32,
    this: *mut Cpu,
    /// Host stack pointer without return addresses; where they must end; and on entry.
    bottom: u64,
    limit: u64,
    entry_stack: u64,
    temp: u64,
    /// What an access to the stack wants, while it is looked at.
    wanted: u64,
    /// The address of an access that is helped with.
    linear: u64,
    origin: u32,
    /// The link by which translated code was left.
    link: u32,
    /// Which vector registers are the guest's, and MXCSR with them: none, or a step of [`vectors`].
    vectors: u8,
    /// The x87 registers are.
    x87: bool,
    /// The last x87 instruction that ran on them: its offset in its page, or [`x87::NONE`], and its page.
    x87_at: u32,
    x87_base: u64,
    /// Exceptions are left in [`Cpu::raised`]: for comparisons.
    pub(crate) keep_raised: bool,
}

// SAFETY: the pointers are set by the thread that runs the processor before each use.
unsafe impl Send for Hot {}

impl Hot {
    pub(crate) const fn new() -> Self {
        Self {
            base: 0,
            stamp: 0,
            jumps: std::ptr::null_mut(),
            attention: std::ptr::null(),
            this: std::ptr::null_mut(),
            bottom: 0,
            limit: 0,
            entry_stack: 0,
            temp: 0,
            wanted: 0,
            linear: 0,
            origin: 0,
            link: NO_LINK,
            vectors: 0,
            x87: false,
            x87_at: x87::NONE,
            x87_base: 0,
            keep_raised: false,
        }
    }
}

/// An entry of the jump cache.
#[derive(Clone, Copy)]
#[repr(C)]
struct Jump {
    linear: u64,
    stamp: u64,
    code: u64,
    unused: u64,
}

const NO_JUMP: Jump = Jump { linear: 0, stamp: u64::MAX, code: 0, unused: 0 };

/// Operations that code points to: they must not move.
type Ops = VecDeque<Box<Op>>;

/// Offsets of a page at which blocks may begin: few of those that are asked for are.
struct Begins(Box<[u64; PAGE as usize / 64]>);

impl Begins {
    fn none() -> Self {
        Self(Box::new([0; PAGE as usize / 64]))
    }

    fn has(&self, at: u16) -> bool {
        self.0[usize::from(at) / 64 % self.0.len()] >> (at % 64) & 1 != 0
    }

    fn add(&mut self, at: u16) {
        let words = self.0.len();
        self.0[usize::from(at) / 64 % words] |= 1 << (at % 64);
    }
}

/// What is translated of one page.
struct PageCode {
    version: u32,
    blocks: Vec<u64>,
    begins: Begins,
    /// Number of its record: where it was last found to be mapped ([`Jit::record`]).
    record: Option<usize>,
    /// The parts of the code memory that hold any of it, by bit.
    parts: u8,
}

impl PageCode {
    fn add(&mut self, id: u64) {
        self.blocks.push(id);
        self.begins.add((id >> Key::BITS & (PAGE - 1)) as u16);
    }
}

/// All translated code of one vCPU.
pub(crate) struct Jit {
    memory: CodeMemory,
    glue: Glue,
    instructions: Instructions,
    jumps: Box<[Jump]>,
    blocks: HashMap<u64, Entry, BuildHasherDefault<Mix>>,
    pages: HashMap<usize, PageCode, BuildHasherDefault<Mix>>,
    /// Code for instructions that straddle pages, by the second page's address. What `blocks` has of them leads to the jump
    /// cache, as it is by linear address that the second page is found.
    straddling: HashMap<u64, HashMap<u64, u64>, BuildHasherDefault<Mix>>,
    /// Entries of blocks for jumps from other pages.
    foreign: HashMap<u64, u64, BuildHasherDefault<Mix>>,
    links: Links,
    evicted: Evicted,
    /// Nowhere while something is translated.
    room: Option<Box<translate::Room>>,
    /// Jumps may lead to other blocks at once.
    chain: bool,
    /// Blocks go on behind conditional jumps and calls.
    extends: bool,
    /// Blocks hold only what lockstep can run twice.
    repeatable: bool,
    /// Instructions in a block at most.
    most: usize,
    /// Spoils what was translated, for tests.
    #[cfg(test)]
    pub(crate) spoil: Option<fn(&mut [u8])>,
}

/// What was found at an address.
enum Found {
    Code(u64),
    /// Nothing that can be translated: one step for the interpreter.
    Step,
}

impl Jit {
    pub(crate) fn new() -> io::Result<Self> {
        Self::within(memory::SIZE)
    }

    /// With so many bytes for code.
    fn within(size: usize) -> io::Result<Self> {
        let mut memory = CodeMemory::new(size)?;
        let records = size / CODE_PER_RECORD;
        memory.reserve(16 * records);
        let mut asm = asm::Asm::new(memory.next());
        let widest = match () {
            () if std::arch::is_x86_feature_detected!("avx512bw") => glue::Widest::Zmm,
            () if std::arch::is_x86_feature_detected!("avx") => glue::Widest::Ymm,
            () => glue::Widest::Xmm,
        };
        let glue = glue::emit(&mut asm, help::access, help::handler, widest);
        if !memory.add(&asm.code, &[]) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        memory.keep();
        Ok(Self {
            memory,
            glue,
            instructions: Instructions::new(),
            jumps: vec![NO_JUMP; JUMPS].into_boxed_slice(),
            blocks: HashMap::default(),
            pages: HashMap::default(),
            straddling: HashMap::default(),
            foreign: HashMap::default(),
            links: Links::default(),
            evicted: Evicted::new(records),
            room: None,
            chain: true,
            extends: true,
            repeatable: false,
            most: MAX_INSTRUCTIONS,
            #[cfg(test)]
            spoil: None,
        })
    }

    /// For comparisons: blocks of so many instructions at most, each on its own.
    pub(crate) fn set_alone(&mut self, most: usize) {
        (self.chain, self.extends) = (false, false);
        self.most = most.clamp(1, MAX_INSTRUCTIONS);
        self.clear();
    }

    /// For comparisons: blocks that go on behind jumps, each on its own.
    pub(crate) fn set_extended(&mut self) {
        self.set_alone(MAX_INSTRUCTIONS);
        self.extends = true;
    }

    /// Drops all code.
    pub(crate) fn clear(&mut self) {
        self.memory.empty();
        self.jumps.fill(NO_JUMP);
        self.blocks.clear();
        self.pages.clear();
        self.straddling.clear();
        self.foreign.clear();
        self.links = Links::default();
        self.evicted.clear();
    }

    fn slot(linear: u64) -> usize {
        ((linear as u32 >> JUMP_SHIFT ^ linear as u32) & (JUMPS as u32 - 1)) as usize
    }

    /// Drops the code of a page.
    fn drop_page(&mut self, page: usize) {
        if let Some(code) = self.pages.remove(&page) {
            for block in &code.blocks {
                self.blocks.remove(block);
                self.straddling.remove(block);
                self.foreign.remove(block);
            }
            if let Some(record) = code.record {
                self.memory.set_data(16 * record + 8, u64::MAX);
                self.evicted.retire(record, code.parts);
            }
        }
    }

    /// Notes that a page is mapped at `linear` under a stamp.
    fn record(&mut self, page: usize, linear: u64, stamp: u64) {
        let Some(code) = self.pages.get_mut(&page) else { return };
        if code.record.is_none() {
            code.record = self.evicted.record();
        }
        if let Some(record) = code.record {
            self.memory.set_data(16 * record, linear & !(PAGE - 1));
            self.memory.set_data(16 * record + 8, stamp);
        }
    }

    /// Where jumps from other pages enter a block, with its linear address in R8: first they make sure that its page still is
    /// where they think.
    fn foreign(&mut self, id: u64, entry: Entry, page: usize) -> u64 {
        if let Some(&code) = self.foreign.get(&id) {
            return code;
        }
        let part = self.memory.part();
        let (Some(code), false) = (self.pages.get_mut(&page), self.straddling.contains_key(&id)) else {
            return self.glue.dispatch_at_once;
        };
        let Some(record) = code.record else { return self.glue.dispatch_at_once };
        code.parts |= 1 << part;
        let mut a = asm::Asm::new(self.memory.next());
        let at = a.here();
        a.mov(asm::R9, asm::R8);
        a.and_imm(true, asm::R9, -4096);
        a.near(0x3b, asm::R9, self.memory.data(16 * record));
        a.jcc(asm::NOT_EQUAL, self.glue.dispatch_at_once);
        a.load(asm::R10, glue::STAMP);
        a.near(0x3b, asm::R10, self.memory.data(16 * record + 8));
        a.jcc(asm::NOT_EQUAL, self.glue.dispatch_at_once);
        a.store(glue::BASE, asm::R9);
        a.jmp(entry.from_memory);
        if !self.memory.add(&a.code, &[]) {
            return self.glue.dispatch_at_once;
        }
        self.foreign.insert(id, at);
        at
    }

    /// Drops the code of pages that have changed.
    fn drop_changed(&mut self, memory: &GuestMemory) {
        let changed =
            |page: usize, code: &PageCode| memory.version(page).load(Ordering::SeqCst) != code.version;
        let pages: Vec<usize> =
            self.pages.iter().filter(|&(&page, code)| changed(page, code)).map(|(&page, _)| page).collect();
        pages.into_iter().for_each(|page| self.drop_page(page));
    }

    /// Remembers that a block lies on a page.
    fn keep(&mut self, id: u64, page: usize, version: u32) {
        if self.pages.get(&page).is_none_or(|code| code.version != version) {
            // What was made of it before it changed.
            self.drop_page(page);
        }
        let none =
            || PageCode { version, blocks: Vec::new(), begins: Begins::none(), record: None, parts: 0 };
        let code = self.pages.entry(page).or_insert_with(none);
        code.add(id);
        code.parts |= 1 << self.memory.part();
    }

    /// Code that goes on at an offset of the running page through the jump cache.
    fn by_way_of_dispatch(&mut self, at: u16) -> Entry {
        let mut asm = asm::Asm::new(self.memory.next());
        let from_host = asm.here();
        asm.save_flags(glue::STATUS, asm::R9);
        let from_memory = asm.here();
        asm.load(asm::R8, glue::BASE);
        asm.lea(asm::R8, asm::Mem::At(asm::R8, i32::from(at)));
        asm.jmp(self.glue.dispatch);
        // There is room: more than this was reserved.
        let added = self.memory.add(&asm.code, &[]);
        debug_assert!(added);
        Entry { from_memory, from_host, live: table::STATUS_FLAGS }
    }
}
