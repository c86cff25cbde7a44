//! Running translated code: finding it, making what is missing, entering it.
#![expect(unsafe_code, reason = "enters generated code")]

use std::arch::asm;
use std::cell::Cell;
use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderOptions};

use super::evict::OpenLink;
use super::translate::{self, Request, Source};
use super::{ENOUGH_BYTES, Found, Jit, Jump, Key, NO_LINK, Ops, Origin, PAGE, RESERVE, dump, table};
use crate::cpu::{CodeSize, Cpu, cr0, cr4};
use crate::fault::Exec;
use crate::native::component;
use crate::op::Op;

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

    pub(super) fn code_key(&self) -> Key {
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
        self.stamp_of(self.code_key())
    }

    fn stamp_of(&self, key: Key) -> u64 {
        self.tlb.stamp() << Key::BITS | u64::from(key.0)
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
    pub(super) fn undo_transfer(&mut self) {
        let origin = Origin(std::mem::take(&mut self.hot.origin));
        if origin.0 & Origin::VALID == 0 || self.canonical(self.rip) {
            return;
        }
        self.rip = self.hot.base.wrapping_add(origin.at());
        let sp = self.regs.r64(crate::regs::at::RSP).wrapping_sub(origin.dropped() as u64);
        self.regs.set64(crate::regs::at::RSP, sp);
    }

    /// The code for a linear address: from the jump cache, from the blocks, or made now.
    pub(super) fn find_code(&mut self, linear: u64) -> Exec<Found> {
        let Some(mut jit) = self.jit.take() else { return Ok(Found::Step) };
        let found = self.find_code_in(&mut jit, linear);
        self.jit = Some(jit);
        found
    }

    fn find_code_in(&mut self, jit: &mut Jit, linear: u64) -> Exec<Found> {
        let link = std::mem::replace(&mut self.hot.link, NO_LINK);
        let key = self.code_key();
        let stamp = self.stamp_of(key);
        let jump = jit.jumps[Jit::slot(linear)];
        if link == NO_LINK && jump.linear == linear && jump.stamp == stamp {
            return Ok(Found::Code(jump.code));
        }
        let page = self.code_page(linear)?;
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
            let now = self.stamp_of(key);
            jit.jumps[Jit::slot(linear)] = Jump { linear, stamp: now, code, unused: 0 };
            jit.record(page.index, linear, now);
        }
        // The link that was left by, if nothing has come between: an interrupt, say.
        if jit.chain
            && self.left_for == (linear, stamp)
            && let (Some(&open), Some(&entry)) = (jit.links.get(link), jit.blocks.get(&id))
        {
            if open.link.far {
                let to = jit.foreign(id, entry, page.index);
                jit.memory.link(open.link.end, to);
                if to != jit.glue.dispatch_at_once {
                    jit.evicted.note_far(open.link.end, to);
                }
            } else if open.target == id {
                let to = if open.link.in_host { entry.from_host } else { entry.from_memory };
                jit.memory.link(open.link.end, to);
            }
        }
        Ok(Found::Code(code))
    }

    /// Makes code for what lies at `linear`, the block `id`. `None`: it cannot be translated.
    fn translate_code(&mut self, jit: &mut Jit, linear: u64, id: u64, key: Key) -> Exec<Option<u64>> {
        let mut room = jit.room.take().unwrap_or_default();
        let code = self.translate_page(jit, &mut room, linear, id, key);
        jit.room = Some(room);
        code
    }

    /// The same.
    fn translate_page(
        &mut self,
        jit: &mut Jit,
        room: &mut translate::Room,
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
            self.forget_blocks_in(jit.evict());
            self.stats.translations.evictions += 1;
        }
        let at = (linear % PAGE) as u16;
        let prefix = id & !((PAGE << Key::BITS) - 1) | u64::from(key.0);
        let translate::Room { page: bytes, again, insns, made } = room;
        loop {
            let first = self.code_page(linear)?;
            let (begins, blocks) = (jit.pages.get(&first.index).map(|page| &page.begins), &jit.blocks);
            let known = |at: u16| {
                begins.filter(|begins| begins.has(at))?;
                blocks.get(&(prefix | u64::from(at) << Key::BITS)).copied()
            };
            let (most, on) = (jit.most, jit.extends);
            let (begin, mut end) = (at as usize, (at as usize + ENOUGH_BYTES).min(PAGE as usize));
            loop {
                crate::decode::copy_code(&first, begin, &mut bytes[begin..end]);
                let cpuid = &self.shared.cpuid;
                let source = Source { page: bytes, len: end, key, most, on, known: &known, cpuid };
                translate::decode(&source, at, &mut jit.instructions, insns);
                let decoded = insns.last().map_or(begin, |last| last.end() as usize);
                if end == PAGE as usize || decoded + 15 <= end {
                    break;
                }
                end = PAGE as usize;
            }
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
                let (len, cpuid) = (bytes.len(), &self.shared.cpuid);
                let source = Source { page: bytes, len, key, most: 1, on, known: &known, cpuid };
                translate::decode(&source, at, &mut jit.instructions, insns);
                second = Some(page);
            }
            if jit.repeatable {
                self.keep_repeatable(bytes, insns);
            }
            let Some(last) = insns.last() else { return Ok(None) };
            let len = (last.end() - at) as usize;
            let on_first = len.min(PAGE as usize - at as usize);
            let pieces = [(first, at as usize, on_first), (second.unwrap_or(first), 0, len - on_first)];
            let Some(versions) = self.watch_code(pieces) else { continue };
            // From here on a write raises the version; what was read before may be stale already.
            crate::decode::copy_code(&first, at as usize, &mut again[..on_first]);
            if let Some(second) = &second {
                crate::decode::copy_code(second, 0, &mut again[on_first..len]);
            }
            if again[..len] != bytes[begin..begin + len] {
                continue;
            }
            let ops = self.operations(&mut jit.evicted.ops, bytes, insns);
            let stale = Cell::new(false);
            // What is read is watched from before.
            let read = |at: usize, into: &mut [u8]| {
                let (_, version) = self.memory.start_watching(first.index, at as u64, into.len() as u64);
                stale.set(stale.get() || version != versions[0]);
                crate::decode::copy_code(&first, at, into);
            };
            let request = Request {
                key,
                glue: jit.glue,
                first_link: jit.links.next(),
                known: &known,
                cpuid: &self.shared.cpuid,
                chain: jit.chain,
                foresees: jit.chain || jit.repeatable,
                read: &read,
                sight: self.sight(key, linear),
            };
            let origin = jit.memory.next();
            let aside = |len| jit.memory.next_aside(len);
            let entry =
                translate::translate(origin, aside, request, insns, &ops, &mut jit.instructions, made);
            let Some(entry) = entry else { return Ok(None) };
            if stale.get() {
                continue;
            }
            #[cfg(test)]
            if let Some(spoil) = jit.spoil {
                spoil(&mut made.code);
            }
            self.describe_block(entry.from_memory, insns, bytes);
            dump::block(linear, origin, insns, &made.code);
            if !jit.memory.add(&made.code, &made.aside) {
                return Ok(None);
            }
            for &link in &made.links {
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
            let stats = &mut self.stats.translations;
            stats.blocks += 1;
            stats.instructions += insns.len() as u64;
            stats.bytes += (made.code.len() + made.aside.len()) as u64;
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
        let has_handler = |d: &translate::Decoded| {
            use table::Class as C;
            matches!(d.info.class, C::Handler | C::Divide | C::Repeated | C::LoadControl)
        };
        if !insns.iter().any(has_handler) {
            return Vec::new();
        }
        let bits = self.mode.code.bits();
        insns
            .iter()
            .map(|d| {
                if !has_handler(d) {
                    return None;
                }
                let at = usize::from(d.at);
                let its = &page[at..usize::from(d.end())];
                let insn = Decoder::with_ip(bits, its, at as u64, DecoderOptions::NONE).decode();
                let op = Box::new(self.operation(&insn, &page[at..], at));
                let at: *const Op = &raw const *op;
                ops.push_back(op);
                Some(at)
            })
            .collect()
    }

    /// Runs translated code at `code` until it is left.
    pub(super) fn enter_code(&mut self, code: u64) {
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

    /// Translates the block at RIP, for measurements: whether it can be.
    pub(crate) fn translate_block(&mut self) -> bool {
        matches!(self.find_code(self.rip), Ok(Found::Code(_)))
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
