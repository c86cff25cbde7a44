//! Making room for new code: the part of the code memory that was filled first is emptied.
//!
//! With it go all pages that have any code in it, with what of theirs lies in other parts, so that what is left of a page is
//! whole or nothing. Nobody runs translated code meanwhile, and what is on the host's stack of return addresses was dropped when it was left.
//! What else may lead into the part is the jump cache, which is emptied, and jumps from other pages ([`Jit::foreign`]), which
//! are made to ask for their targets again.

use std::collections::VecDeque;

use super::memory::PARTS;
use super::translate::Link;
use super::{Jit, NO_JUMP, NO_LINK, Ops};

/// A jump in a block that may be made to lead to its target.
#[derive(Clone, Copy)]
pub(super) struct OpenLink {
    pub(super) link: Link,
    /// Guest physical address and key of the target.
    pub(super) target: u64,
}

/// All jumps of that kind, by number: code names them. Numbers go on for ever, round and round.
#[derive(Default)]
pub(super) struct Links {
    /// Number of the oldest.
    first: u32,
    all: VecDeque<OpenLink>,
}

/// Numbers are less than this, a power of two.
const NUMBERS: u32 = 1 << 31;

impl Links {
    /// The number that the next one will have, and those behind it the following ones, to be taken modulo [`NUMBERS`] here.
    pub(super) fn next(&self) -> u32 {
        self.first.wrapping_add(self.all.len() as u32) % NUMBERS
    }

    pub(super) fn push(&mut self, link: OpenLink) {
        self.all.push_back(link);
    }

    pub(super) fn get(&self, number: u32) -> Option<&OpenLink> {
        if number == NO_LINK {
            return None;
        }
        self.all.get((number.wrapping_sub(self.first) % NUMBERS) as usize)
    }

    fn drop_oldest(&mut self, count: usize) {
        let count = count.min(self.all.len());
        self.all.drain(..count);
        self.first = self.first.wrapping_add(count as u32) % NUMBERS;
    }
}

/// A jump that leads to another page's code.
struct Far {
    /// Where it ends, and where it leads.
    end: u64,
    to: u64,
}

/// What the code of one part has brought with it.
#[derive(Clone, Copy, Default)]
struct Held {
    links: usize,
    ops: usize,
}

/// What has to be put right when a part is emptied.
pub(super) struct Evicted {
    /// Operations that code points to, in the order of the code.
    pub(super) ops: Ops,
    /// For each part but the one that is being filled.
    held: [Held; PARTS],
    far: Vec<Far>,
    /// Records given out, and how many there are.
    records: usize,
    most_records: usize,
    /// Records of pages that are gone, and the parts that may still hold code which looks at them, by bit.
    retired: Vec<(usize, u8)>,
    /// Records that nobody looks at.
    free: Vec<usize>,
}

impl Evicted {
    /// Nothing was made yet.
    pub(super) fn new(most_records: usize) -> Self {
        Self {
            ops: Ops::new(),
            held: [Held::default(); PARTS],
            far: Vec::new(),
            records: 0,
            most_records,
            retired: Vec::new(),
            free: Vec::new(),
        }
    }

    /// All code was dropped.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.most_records);
    }

    /// A record for a page.
    pub(super) fn record(&mut self) -> Option<usize> {
        let new = self.free.pop().or_else(|| (self.records < self.most_records).then_some(self.records))?;
        self.records = self.records.max(new + 1);
        Some(new)
    }

    /// The page of a record is gone; it had code in these parts.
    pub(super) fn retire(&mut self, record: usize, parts: u8) {
        self.retired.push((record, parts));
    }

    /// The jump that ends at `end` leads to another page's code at `to`.
    pub(super) fn note_far(&mut self, end: u64, to: u64) {
        self.far.push(Far { end, to });
    }
}

impl Jit {
    /// Goes on to the next part of the code memory, and drops what was in it. Where that code lay.
    pub(super) fn evict(&mut self) -> std::ops::Range<u64> {
        let filled = self.memory.part();
        let others = self.evicted.held.iter().fold(Held::default(), |sum, held| Held {
            links: sum.links + held.links,
            ops: sum.ops + held.ops,
        });
        self.evicted.held[filled] =
            Held { links: self.links.all.len() - others.links, ops: self.evicted.ops.len() - others.ops };
        self.memory.go_on();
        let part = self.memory.part();
        let in_it = |page: &super::PageCode| page.parts >> part & 1 != 0;
        let pages: Vec<usize> =
            self.pages.iter().filter(|(_, page)| in_it(page)).map(|(&number, _)| number).collect();
        pages.into_iter().for_each(|page| self.drop_page(page));
        self.jumps.fill(NO_JUMP);
        self.unlink(part);

        let held = std::mem::take(&mut self.evicted.held[part]);
        self.links.drop_oldest(held.links);
        let Evicted { ops, retired, free, .. } = &mut self.evicted;
        ops.drain(..held.ops.min(ops.len()));
        retired.retain_mut(|(record, parts)| {
            *parts &= !(1 << part);
            if *parts == 0 {
                free.push(*record);
            }
            *parts != 0
        });
        self.memory.range()
    }

    /// Makes jumps from other parts to code in this one ask for their targets.
    fn unlink(&mut self, part: usize) {
        let Self { memory, evicted, glue, .. } = self;
        evicted.far.retain(|&Far { end, to }| {
            let (from, into) = (memory.part_of(end) == part, memory.part_of(to) == part);
            if into && !from {
                memory.link(end, glue.leave_to_link);
            }
            !from && !into
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drive::{long_mode, processor};

    const AT: u64 = 2 << 20;
    const PAGES: u64 = 1200;
    const ADDITIONS: u64 = 100;
    const PASSES: u64 = 3;

    fn near(opcode: u8, from: u64, to: u64) -> Vec<u8> {
        let distance = to.wrapping_sub(from + 5) as u32;
        [&[opcode][..], &distance.to_le_bytes()].concat()
    }

    /// Pages that add their numbers to RAX and each call a function on another page, which counts in RBX and calls one that counts
    /// in RSI; round and round, as often as RCX says. Now and then a function is called for the first time: it leads to older code,
    /// and outlives it.
    fn program() -> Vec<u8> {
        let mut all = Vec::new();
        let last = AT + 4096 * PAGES;
        for page in 0..PAGES {
            let begin = AT + 4096 * page;
            let mut code = Vec::new();
            for _ in 0..ADDITIONS {
                code.extend([&[0x48, 5][..], &(page as u32).to_le_bytes()].concat()); // add rax, page
            }
            let function = last + 4096 * (1 + page * 7919 % (page / 100 + 1));
            code.extend(near(0xe8, begin + code.len() as u64, function));
            if page + 1 == PAGES {
                let back = AT.wrapping_sub(begin + code.len() as u64 + 9) as u32;
                code.extend([0x48, 0xff, 0xc9, 0x0f, 0x85]); // dec rcx; jne
                code.extend(back.to_le_bytes());
                code.push(0xf4); // hlt
            } else {
                code.extend(near(0xe9, begin + code.len() as u64, begin + 4096));
            }
            code.resize(4096, 0xcc);
            all.extend(code);
        }
        for function in 0..=PAGES / 100 {
            let mut code = vec![0x48, 0xff, 0xc6]; // inc rsi
            if function > 0 {
                code = near(0xe8, last + 4096 * function, last);
                code.extend([0x48, 0xff, 0xc3]); // inc rbx
            }
            code.push(0xc3); // ret
            code.resize(4096, 0xcc);
            all.extend(code);
        }
        all
    }

    #[test]
    fn a_program_larger_than_the_code_memory_runs_right() {
        let mut cpu = processor(8 << 20).expect("a processor");
        cpu.memory.write(AT, &program()).expect("it fits");
        long_mode(&mut cpu, 0);
        cpu.regs.set_gpr(1, PASSES);
        cpu.regs.set_gpr(4, AT - 4096);
        cpu.rip = AT;
        cpu.jit = Some(Box::new(Jit::within(1 << 20).expect("a translator")));
        while !cpu.halted {
            cpu.look = false;
            cpu.execute_translated();
        }
        assert_eq!(cpu.regs.gpr(0), PASSES * ADDITIONS * PAGES * (PAGES - 1) / 2);
        assert_eq!([1, 3, 6].map(|n| cpu.regs.gpr(n)), [0, PASSES * PAGES, PASSES * PAGES]);
        let evictions = cpu.stats.translations.evictions;
        assert!(evictions > 2 * PARTS as u64, "{evictions} evictions");
        let jit = cpu.jit.as_ref().expect("a translator");
        let held = jit.evicted.records + jit.evicted.retired.len();
        assert!(held <= 2 * jit.evicted.most_records && jit.links.all.len() < 20_000, "it does not grow");
    }

    #[test]
    fn numbers_of_links_go_round() {
        let link = |target| OpenLink { link: Link { end: 0, target: 0, in_host: false, far: true }, target };
        let mut links = Links { first: NUMBERS - 2, all: VecDeque::new() };
        let first = links.next();
        for target in 0..4 {
            assert_eq!(links.next(), (first + target as u32) % NUMBERS);
            links.push(link(target));
        }
        // Code may name a number that was counted on beyond the last.
        for number in 0..4 {
            assert_eq!(links.get(first + number).map(|open| open.target), Some(number.into()));
        }
        links.drop_oldest(3);
        assert_eq!(links.get(1).map(|open| open.target), Some(3));
        assert!(links.get(first).is_none() && links.get(2).is_none() && links.get(NO_LINK).is_none());
    }
}
