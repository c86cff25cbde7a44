//! The translator: runs of guest instructions become code for the host, which is of the same kind, so that most of them
//! stay what they are but for their operands.
//!
//! * [`translate`] makes code of decoded instructions, by what [`table`] knows of them: their [`operands`], their [`flags`], the
//!   [`flow`] of control, repeated [`strings`], and the [`stubs`] out of its way; [`encode`] puts other operands into an instruction, [`asm`] writes
//!   our own;
//! * [`small`] is what differs for 32-bit code;
//! * [`glue`] is the code between translated code and Rust, [`help`] the Rust that it calls;
//! * [`memory`] is where the code lies;
//! * [`lockstep`] compares all of this with the interpreter.
//!
//! A block is known by its guest physical address and by what else decides its meaning ([`Key`]); it names addresses relative
//! to its page only, so that it serves wherever the page is mapped. Jumps within the page are direct; all others go through
//! the jump cache, which is keyed by linear address and [`Cpu::code_stamp`]. So a page is what is dropped when code
//! changes, and nothing outside of the page leads into it.
//!
//! `docs/software-cpu.md` describes the design, `docs/performance.md` what was measured.
#![expect(unsafe_code, reason = "enters generated code")]

mod access;
mod asm;
mod dump;
mod encode;
mod flags;
mod flow;
mod glue;
mod help;
mod lockstep;
mod memory;
mod operands;
mod small;
mod stack;
mod strings;
mod stubs;
mod table;
mod translate;
mod vectors;

use std::arch::asm;
use std::cell::Cell;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use glue::Glue;
pub(crate) use lockstep::Lockstep;
use memory::CodeMemory;
use skep_memory::GuestMemory;
use table::Table;
use translate::{Entry, Link, MAX_INSTRUCTIONS, Made, Request, Source};

use crate::block::Mix;
use crate::cpu::{CodeSize, Cpu, cr0, cr4};
use crate::fault::Exec;
use crate::native::component;
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
/// Pages whose code others may lead to directly, before all code is dropped.
const RECORDS: usize = 16 << 10;
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
    /// Which vector registers are the guest's, and MXCSR with them: none, [`vectors::LOW_VECTORS`], [`vectors::ALL_VECTORS`].
    vectors: u8,
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

/// A jump in a block that may be made to lead to its target.
#[derive(Clone, Copy)]
struct OpenLink {
    link: Link,
    /// Guest physical address and key of the target.
    target: u64,
}

/// Operations that code points to: they must not move.
type Ops = Vec<Box<Op>>;

/// What is translated of one page.
struct PageCode {
    version: u32,
    blocks: Vec<u64>,
    /// Number of its record: where it was last found to be mapped ([`Jit::record`]).
    record: Option<usize>,
}

/// All translated code of one vCPU.
pub(crate) struct Jit {
    memory: CodeMemory,
    glue: Glue,
    /// Where the glue ends and blocks begin.
    floor: usize,
    table: Table,
    jumps: Box<[Jump]>,
    blocks: HashMap<u64, Entry, BuildHasherDefault<Mix>>,
    pages: HashMap<usize, PageCode, BuildHasherDefault<Mix>>,
    /// Code for instructions that straddle pages, by the second page's address. What `blocks` has of them leads to the jump
    /// cache, as it is by linear address that the second page is found.
    straddling: HashMap<u64, HashMap<u64, u64>, BuildHasherDefault<Mix>>,
    /// Entries of blocks for jumps from other pages.
    foreign: HashMap<u64, u64, BuildHasherDefault<Mix>>,
    /// Records given out.
    records: usize,
    links: Vec<OpenLink>,
    ops: Ops,
    /// Room for what is read of code.
    page: Option<Box<translate::Page>>,
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
        let mut memory = CodeMemory::new()?;
        memory.reserve(16 * RECORDS);
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
        let floor = memory.used();
        Ok(Self {
            memory,
            glue,
            floor,
            table: Table::new(),
            jumps: vec![NO_JUMP; JUMPS].into_boxed_slice(),
            blocks: HashMap::default(),
            pages: HashMap::default(),
            straddling: HashMap::default(),
            foreign: HashMap::default(),
            records: 0,
            links: Vec::new(),
            ops: Vec::new(),
            page: None,
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
        self.memory.truncate(self.floor);
        self.jumps.fill(NO_JUMP);
        self.blocks.clear();
        self.pages.clear();
        self.straddling.clear();
        self.foreign.clear();
        self.records = 0;
        self.links.clear();
        self.ops.clear();
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
            }
        }
    }

    /// Notes that a page is mapped at `linear` under a stamp.
    fn record(&mut self, page: usize, linear: u64, stamp: u64) {
        let Some(code) = self.pages.get_mut(&page) else { return };
        if code.record.is_none() && self.records < RECORDS {
            code.record = Some(self.records);
            self.records += 1;
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
        let record = self.pages.get(&page).and_then(|code| code.record);
        let (Some(record), false) = (record, self.straddling.contains_key(&id)) else {
            return self.glue.dispatch_at_once;
        };
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
        if self.pages.get(&page).is_some_and(|code| code.version != version) {
            // It has changed since its other blocks were made.
            self.drop_page(page);
        }
        let code = self.pages.entry(page).or_insert(PageCode { version, blocks: Vec::new(), record: None });
        code.blocks.push(id);
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

impl Cpu {
    /// Whether what runs now can be translated.
    #[inline(always)]
    pub(crate) fn translates(&self) -> bool {
        match self.mode.code {
            CodeSize::Bits64 => self.jit.is_some(),
            CodeSize::Bits32 => self.jit.is_some() && self.is_flat(),
            CodeSize::Bits16 => false,
        }
    }

    /// Whether another thread wants something.
    #[inline(always)]
    pub(crate) fn attention(&self) -> bool {
        self.mailbox.attention.load(Ordering::Relaxed) != 0
    }

    fn code_key(&self) -> Key {
        let sse = self.cr0 & (cr0::EM | cr0::TS) == 0 && self.cr4 & cr4::OSFXSR != 0;
        let avx = sse && self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & 6 == 6;
        let avx512 = avx && self.xcr0 & component::AVX512 == component::AVX512;
        let masked = self.fpu.masked();
        let mut bits = if self.mode.cpl == 3 { Key::USER } else { 0 };
        for (is, bit) in [(sse, Key::SSE), (avx, Key::AVX), (avx512, Key::AVX512), (masked, Key::MASKED)] {
            bits |= if is { bit } else { 0 };
        }
        if self.mode.code != CodeSize::Bits64 {
            bits |= Key::SMALL | self.usable_segments();
        }
        Key(bits)
    }

    /// A number that differs whenever a linear address may lead to other code.
    pub(crate) fn code_stamp(&self) -> u64 {
        self.tlb.stamp() << Key::BITS | u64::from(self.code_key().0)
    }

    /// After decoded code was overwritten: forgets what was made of it.
    #[inline(always)]
    pub(crate) fn notice_changed_code(&mut self) {
        let epoch = self.memory.epoch();
        if epoch != self.code_epoch {
            self.changed_code(epoch);
        }
    }

    #[cold]
    fn changed_code(&mut self, epoch: u32) {
        self.tlb.code_changed();
        let Some(jit) = &mut self.jit else {
            self.code_epoch = epoch;
            return;
        };
        let changes = self.memory.changed_since(self.code_epoch);
        self.code_epoch = changes.epoch;
        match changes.pages {
            Some(pages) => pages.iter().for_each(|&page| jit.drop_page(page)),
            None => jit.drop_changed(&self.memory),
        }
    }

    /// Runs translated code until something wants to be looked at, or what comes next cannot be translated.
    pub(crate) fn execute_translated(&mut self) {
        while !self.look && !self.attention() && self.translates() {
            self.notice_changed_code();
            let linear = self.rip;
            match self.find_code(linear) {
                Ok(Found::Code(code)) => self.enter_code(code),
                Ok(Found::Step) => self.step_and_deliver(),
                Err(crate::fault::Abort) => {
                    self.undo_transfer();
                    self.deliver_raised(None);
                }
            }
        }
    }

    /// A transfer to an address that is not canonical is at fault itself, not what lies there.
    fn undo_transfer(&mut self) {
        let origin = Origin(std::mem::take(&mut self.hot.origin));
        if origin.0 & Origin::VALID == 0 || self.canonical(self.rip) {
            return;
        }
        self.rip = self.hot.base.wrapping_add(origin.at());
        let sp = self.regs.r64(crate::regs::at::RSP).wrapping_sub(origin.dropped() as u64);
        self.regs.set64(crate::regs::at::RSP, sp);
    }

    /// The code for a linear address: from the jump cache, from the blocks, or made now.
    fn find_code(&mut self, linear: u64) -> Exec<Found> {
        let Some(mut jit) = self.jit.take() else { return Ok(Found::Step) };
        let found = self.find_code_in(&mut jit, linear);
        self.jit = Some(jit);
        found
    }

    fn find_code_in(&mut self, jit: &mut Jit, linear: u64) -> Exec<Found> {
        let link = std::mem::replace(&mut self.hot.link, NO_LINK);
        let stamp = self.code_stamp();
        let jump = jit.jumps[Jit::slot(linear)];
        if link == NO_LINK && jump.linear == linear && jump.stamp == stamp {
            return Ok(Found::Code(jump.code));
        }
        let page = self.code_page(linear)?;
        let key = self.code_key();
        let id = (page.gpa | linear % PAGE) << Key::BITS | u64::from(key.0);
        let code = match jit.blocks.get(&id) {
            Some(entry) if !jit.straddling.contains_key(&id) => entry.from_memory,
            // One that straddles pages is known by both.
            _ => match self.translate_code(jit, linear, id, key)? {
                Some(code) => code,
                None => return Ok(Found::Step),
            },
        };
        if jit.chain {
            // Translating may have made others flush us.
            let now = self.code_stamp();
            jit.jumps[Jit::slot(linear)] = Jump { linear, stamp: now, code, unused: 0 };
            jit.record(page.index, linear, now);
        }
        // The link that was left by, if nothing has come between: an interrupt, say.
        if jit.chain
            && self.left_for == (linear, stamp)
            && let (Some(&open), Some(&entry)) = (jit.links.get(link as usize), jit.blocks.get(&id))
        {
            if open.link.far {
                let to = jit.foreign(id, entry, page.index);
                jit.memory.link(open.link.end, to);
            } else if open.target == id {
                let to = if open.link.in_host { entry.from_host } else { entry.from_memory };
                jit.memory.link(open.link.end, to);
            }
        }
        Ok(Found::Code(code))
    }

    /// Makes code for what lies at `linear`, the block `id`. `None`: it cannot be translated.
    fn translate_code(&mut self, jit: &mut Jit, linear: u64, id: u64, key: Key) -> Exec<Option<u64>> {
        let mut page = jit.page.take().unwrap_or_else(|| Box::new([0; PAGE as usize + 16]));
        let code = self.translate_page(jit, &mut page, linear, id, key);
        jit.page = Some(page);
        code
    }

    /// The same; `bytes` is room for what is read of the page.
    fn translate_page(
        &mut self,
        jit: &mut Jit,
        bytes: &mut translate::Page,
        linear: u64,
        id: u64,
        key: Key,
    ) -> Exec<Option<u64>> {
        if self.thunks.full() {
            self.blocks.clear();
            self.thunks.clear();
            jit.clear();
            self.forget_blocks();
        }
        if jit.memory.room() < RESERVE {
            jit.clear();
            self.forget_blocks();
            self.stats.translations.flushes += 1;
        }
        let at = (linear % PAGE) as u16;
        let prefix = id & !((PAGE << Key::BITS) - 1) | u64::from(key.0);
        let shared = self.shared.clone();
        loop {
            let first = self.code_page(linear)?;
            let known = |at: u16| jit.blocks.get(&(prefix | u64::from(at) << Key::BITS)).copied();
            let (most, on, cpuid) = (jit.most, jit.extends, &shared.cpuid);
            let (begin, mut end) = (at as usize, (at as usize + ENOUGH_BYTES).min(PAGE as usize));
            let mut insns = loop {
                crate::decode::copy_code(&first, begin, &mut bytes[begin..end]);
                let source = Source { page: bytes, len: end, key, most, on, known: &known, cpuid };
                let insns = translate::decode(&source, at, &mut jit.table);
                let decoded = insns.last().map_or(begin, |last| last.end() as usize);
                if end == PAGE as usize || decoded + 15 <= end {
                    break insns;
                }
                end = PAGE as usize;
            };
            let mut second = None;
            if insns.is_empty() && u64::from(at) + 15 > PAGE {
                if key.small() && linear | (PAGE - 1) == u64::from(u32::MAX) {
                    return Ok(None);
                }
                let page = self.code_page((linear | (PAGE - 1)).wrapping_add(1))?;
                if let Some(&code) = jit.straddling.get(&id).and_then(|known| known.get(&page.gpa)) {
                    return Ok(Some(code));
                }
                crate::decode::copy_code(&page, 0, &mut bytes[PAGE as usize..]);
                let len = bytes.len();
                let source = Source { page: bytes, len, key, most: 1, on, known: &known, cpuid };
                insns = translate::decode(&source, at, &mut jit.table);
                second = Some(page);
            }
            if jit.repeatable {
                self.keep_repeatable(bytes, &mut insns);
            }
            let Some(last) = insns.last() else { return Ok(None) };
            let len = (last.end() - at) as usize;
            let on_first = len.min(PAGE as usize - at as usize);
            let pieces = [(first, at as usize, on_first), (second.unwrap_or(first), 0, len - on_first)];
            let Some(versions) = self.watch_code(pieces) else { continue };
            // From here on a write raises the version; what was read before may be stale already.
            let mut again = [0u8; MAX_INSTRUCTIONS * 15];
            crate::decode::copy_code(&first, at as usize, &mut again[..on_first]);
            if let Some(second) = &second {
                crate::decode::copy_code(second, 0, &mut again[on_first..len]);
            }
            if again[..len] != bytes[begin..begin + len] {
                continue;
            }
            let ops = self.operations(&mut jit.ops, bytes, &insns);
            let known = |at: u16| jit.blocks.get(&(prefix | u64::from(at) << Key::BITS)).copied();
            let stale = Cell::new(false);
            // What is read is watched from before.
            let read = |at: usize, into: &mut [u8]| {
                let (_, version) = self.memory.start_watching(first.index, at as u64, into.len() as u64);
                stale.set(stale.get() || version != versions[0]);
                crate::decode::copy_code(&first, at, into);
            };
            let request = Request {
                page: bytes,
                key,
                glue: jit.glue,
                first_link: jit.links.len(),
                known: &known,
                cpuid: &shared.cpuid,
                chain: jit.chain,
                foresees: jit.chain || jit.repeatable,
                read: &read,
            };
            let origin = jit.memory.next();
            let aside = |len| jit.memory.next_aside(len);
            let made = translate::translate(origin, aside, request, &mut insns, &ops, &mut jit.table);
            #[cfg_attr(not(test), expect(unused_mut, reason = "tests spoil it"))]
            let Some(Made { mut code, aside, entry, links }) = made else { return Ok(None) };
            if stale.get() {
                continue;
            }
            #[cfg(test)]
            if let Some(spoil) = jit.spoil {
                spoil(&mut code);
            }
            self.describe_block(entry.from_memory, &insns, bytes);
            dump::block(linear, origin, &insns, &code);
            if !jit.memory.add(&code, &aside) {
                return Ok(None);
            }
            for link in links {
                jit.links.push(OpenLink { link, target: prefix | u64::from(link.target) << Key::BITS });
            }
            jit.keep(id, first.index, versions[0]);
            if let Some(second) = second {
                jit.keep(id, second.index, versions[1]);
                jit.straddling.entry(id).or_default().insert(second.gpa, entry.from_memory);
                if !jit.blocks.contains_key(&id) {
                    let entry = jit.by_way_of_dispatch(at);
                    jit.blocks.insert(id, entry);
                }
            } else {
                jit.blocks.insert(id, entry);
            }
            let made = &mut self.stats.translations;
            made.blocks += 1;
            made.instructions += insns.len() as u64;
            made.bytes += (code.len() + aside.len()) as u64;
            return Ok(Some(entry.from_memory));
        }
    }

    /// The operations for those instructions that have none but their handlers.
    fn operations(
        &mut self,
        ops: &mut Ops,
        page: &[u8],
        insns: &[translate::Decoded],
    ) -> Vec<Option<*const Op>> {
        insns
            .iter()
            .map(|d| {
                if !matches!(
                    d.info.class,
                    table::Class::Handler | table::Class::Divide | table::Class::Repeated
                ) {
                    return None;
                }
                let op = Box::new(self.operation(&d.insn, &page[d.at as usize..], d.at as usize));
                let at: *const Op = &raw const *op;
                ops.push(op);
                Some(at)
            })
            .collect()
    }

    /// Runs translated code at `code` until it is left.
    fn enter_code(&mut self, code: u64) {
        let Some(jit) = &mut self.jit else { return };
        let enter = jit.glue.enter;
        self.hot.jumps = jit.jumps.as_mut_ptr();
        self.hot.attention = &raw const self.mailbox.attention;
        self.hot.base = self.rip & !(PAGE - 1);
        self.hot.stamp = self.code_stamp();
        self.hot.link = NO_LINK;
        self.hot.origin = 0;
        let cpu: *mut Cpu = self;
        // SAFETY: the code was made by `glue` and `translate` for this processor, which GS points to while it runs: nothing
        // else in this process uses GS. The helpers that it calls make their reference from the same pointer, and none
        // is used here meanwhile.
        unsafe {
            (*cpu).hot.this = cpu;
            set_gs_base(cpu as u64);
            let enter: extern "sysv64" fn(u64) = std::mem::transmute(enter as *const ());
            enter(code);
        }
        self.left_for = (self.rip, self.hot.stamp);
    }

    /// Runs the block at RIP, alone, leaving what it raises in [`Cpu::raised`]: for comparisons. False if it cannot be
    /// translated, or cannot be fetched (see there).
    pub(crate) fn run_one_block(&mut self) -> bool {
        if !self.translates() {
            return false;
        }
        self.notice_changed_code();
        self.raised = crate::fault::Raised::None;
        self.hot.keep_raised = true;
        let entered = match self.find_code(self.rip) {
            Ok(Found::Code(code)) => {
                self.enter_code(code);
                if !self.canonical(self.rip) {
                    self.undo_transfer();
                    let _ = self.gp(0);
                }
                true
            }
            _ => false,
        };
        self.hot.keep_raised = false;
        entered
    }
}

/// Points GS at the processor.
fn set_gs_base(base: u64) {
    if fsgsbase() {
        // SAFETY: the instruction is enabled (checked); nothing else in this process uses GS.
        unsafe { asm!("wrgsbase {}", in(reg) base, options(nostack, preserves_flags)) };
        return;
    }
    const ARCH_SET_GS: libc::c_int = 0x1001;
    thread_local! { static CURRENT: std::cell::Cell<u64> = const { std::cell::Cell::new(0) }; }
    if CURRENT.get() != base {
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
        CURRENT.set(base);
    }
}

/// Whether the system lets programs use WRGSBASE.
fn fsgsbase() -> bool {
    use std::sync::OnceLock;
    static ENABLED: OnceLock<bool> = OnceLock::new();
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: reads the auxiliary vector.
    *ENABLED.get_or_init(|| unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0)
}
