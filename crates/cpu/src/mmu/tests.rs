//! The soft TLB against a model that remembers everything that was put in and not taken out.

use std::collections::HashMap;
use std::ptr::NonNull;

use skep_memory::HostPage;

use super::{Context, Found, Frame, Stretch, Tlb};
use crate::oracle::random::Random;

const PAGE: u64 = 4096;
const FRAMES: usize = 24;
const CONTEXTS: [Context; 3] = [Context::User, Context::KernelAll, Context::Kernel];

fn frame(index: usize) -> HostPage {
    let at = 0x7000_0000_0000 + index * PAGE as usize;
    HostPage { host: NonNull::without_provenance(at.try_into().unwrap()), index, writable: true }
}

fn found(index: usize, free: bool, shift: u8) -> Found {
    Found { gpa: index as u64 * PAGE, page: frame(index), free, shift }
}

fn frame_of(page: HostPage) -> Frame {
    Frame { host: page.host.as_ptr() as u64, index: page.index }
}

#[derive(Debug, Clone, Copy)]
struct Cached {
    index: usize,
    free: bool,
    shift: u8,
    global: bool,
}

#[derive(Default)]
struct Model {
    pcid: u16,
    data: HashMap<(u16, Context, u64), Cached>,
    globals: HashMap<(Context, u64), Cached>,
    code: HashMap<(u16, u64, bool), (usize, u8)>,
    /// What a jump cache would know: by stamp, address and privilege.
    jumps: HashMap<(u64, u64, bool), usize>,
}

fn around(page: u64, linear: u64, shift: u8) -> bool {
    (page ^ linear) >> shift.max(12) == 0
}

impl Model {
    fn drop_pcid(&mut self, pcid: u16) {
        self.data.retain(|k, _| k.0 != pcid);
        self.code.retain(|k, _| k.0 != pcid);
    }

    fn drop_page(&mut self, linear: u64) {
        let pcid = self.pcid;
        self.data.retain(|k, c| !(around(k.2, linear, c.shift) && (k.0 == pcid || c.global)));
        self.globals.retain(|k, c| !around(k.1, linear, c.shift));
        self.code.retain(|k, c| !(around(k.1, linear, c.1) && k.0 == pcid));
    }

    fn entries(&mut self) -> impl Iterator<Item = &mut Cached> {
        self.data.values_mut().chain(self.globals.values_mut())
    }

    /// The TLB may know less than the model, and nothing else.
    fn check(&self, tlb: &mut Tlb, context: Context, page: u64) {
        tlb.select(context);
        let known = self.data.get(&(self.pcid, context, page));
        for write in [false, true] {
            let direct = if write { tlb.write(page + 8, 8) } else { tlb.read(page + 8, 8) };
            assert_eq!(direct, tlb.look(context, page + 8, 8, write));
            if let Some(at) = direct {
                let known = known.unwrap_or_else(|| panic!("{page:#x} was forgotten"));
                assert_eq!(at as u64, frame(known.index).host.as_ptr() as u64 + 8);
                assert!(known.free || !write, "{page:#x} may not be written");
            }
        }
        assert!(tlb.read(page + PAGE - 4, 8).is_none(), "it ends on another page");
        let stamp = tlb.stamp();
        for user in [false, true] {
            if let Some(&index) = self.jumps.get(&(stamp, page, user)) {
                let now = self.code.get(&(self.pcid, page, user)).map(|c| c.0);
                assert_eq!(now, Some(index), "the jump cache still knows {page:#x}");
            }
        }
    }
}

#[test]
fn nothing_is_remembered_that_was_to_be_forgotten() {
    let mut random = Random::new(1);
    let mut tlb = Tlb::new(FRAMES);
    let mut model = Model::default();
    // Pages that share slots, regions, and halves of 4 MiB pages.
    let mut pages = Vec::new();
    for base in [0, 0x20_0000, 0x40_0000, 0x4000_0000, 0xffff_8000_0000_0000, 0x100_0000] {
        pages.extend((0..4).map(|i| base + i * PAGE));
    }
    pages.extend((0..12).map(|i| 0x1234_5000 + (i << 24)));
    let (mut hits, mut second) = (0, 0);
    for round in 0..200_000u32 {
        let (page, context) = (random.pick(&pages), random.pick(&CONTEXTS));
        tlb.select(context);
        match random.below(40) {
            0..12 => {
                let index = random.below(FRAMES as u64) as usize;
                let (free, global) = (random.below(2) == 0, random.below(3) == 0 && context != Context::User);
                let shift = random.pick(&[12, 12, 12, 12, 21, 22, 30]);
                tlb.fill(context, page, found(index, free, shift), global);
                let cached = Cached { index, free, shift, global };
                model.data.insert((model.pcid, context, page), cached);
                if global {
                    model.globals.insert((context, page), cached);
                }
                let host = frame(index).host.as_ptr();
                assert_eq!(tlb.read(page, 8), Some(host));
                assert_eq!(tlb.write(page, 8), free.then_some(host));
            }
            12..18 => {
                let write = random.below(2) == 0;
                if let Some(found) = tlb.global(context, page, write) {
                    second += 1;
                    let known = model.globals[&(context, page)];
                    assert_eq!((found.page.index, found.shift), (known.index, known.shift));
                    assert!(known.free || !(found.free || write));
                    let cached = Cached { free: found.free, ..known };
                    model.data.insert((model.pcid, context, page), cached);
                }
            }
            18..26 => {
                let user = random.below(2) == 0;
                let index = match tlb.code(page, user) {
                    Some(code) => {
                        hits += 1;
                        assert_eq!(Some(code.index), model.code.get(&(model.pcid, page, user)).map(|c| c.0));
                        code.index
                    }
                    None => {
                        let index = random.below(FRAMES as u64) as usize;
                        let shift = random.pick(&[12, 12, 12, 12, 21, 22, 30]);
                        tlb.fill_code(page, user, (index as u64 * PAGE, shift), frame(index));
                        model.code.insert((model.pcid, page, user), (index, shift));
                        index
                    }
                };
                model.jumps.insert((tlb.stamp(), page, user), index);
            }
            26..29 => {
                tlb.flush_page(page);
                model.drop_page(page);
            }
            29..32 => {
                let (pcid, keep) = (random.below(11) as u16, random.below(4) > 0);
                tlb.switch(pcid, keep);
                model.pcid = pcid;
                if !keep {
                    model.drop_pcid(pcid);
                }
            }
            32 => {
                let pcid = random.below(11) as u16;
                tlb.flush_pcid(pcid);
                model.drop_pcid(pcid);
            }
            33 if random.below(8) == 0 => {
                let all = random.below(2) == 0;
                if all {
                    tlb.flush_all()
                } else {
                    tlb.flush_spaces()
                }
                tlb.switch(model.pcid, false);
                model.data.clear();
                model.code.clear();
                if all {
                    model.globals.clear();
                }
            }
            34 if random.below(4) == 0 => {
                tlb.forget_writes();
                model.entries().for_each(|c| c.free = false);
            }
            35..38 => {
                let index = random.below(FRAMES as u64) as usize;
                tlb.forget_writes_to(frame_of(frame(index)));
                model.entries().filter(|c| c.index == index).for_each(|c| c.free = false);
            }
            38 if random.below(8) == 0 => {
                let before = tlb.stamp();
                tlb.code_changed();
                assert_ne!(before, tlb.stamp());
                model.jumps.clear();
            }
            _ => {
                tlb.select(Context::Slow);
                assert!(tlb.read(page, 1).is_none() && tlb.write(page, 1).is_none());
            }
        }
        for _ in 0..4 {
            model.check(&mut tlb, random.pick(&CONTEXTS), random.pick(&pages));
        }
        if round % 64 == 0 {
            for &page in &pages {
                CONTEXTS.iter().for_each(|&context| model.check(&mut tlb, context, page));
            }
        }
    }
    assert!(hits > 1000 && second > 1000, "{hits} {second}");
}

#[test]
fn an_overflowing_log_forgets_all_the_same() {
    let mut tlb = Tlb::new(8);
    let pages = super::tlb::ENTRIES as u64;
    for _ in 0..3 {
        for page in 0..pages {
            tlb.fill(Context::Kernel, page * PAGE, found(page as usize % 8, true, 12), true);
        }
        tlb.forget_writes_to(frame_of(frame(3)));
        for page in 0..pages {
            assert_eq!(tlb.write(page * PAGE, 1).is_none(), page % 8 == 3);
            assert_eq!(tlb.global(Context::Kernel, page * PAGE, true).is_none(), page % 8 == 3);
        }
        tlb.forget_writes();
        assert!((0..pages).all(|page| tlb.write(page * PAGE, 1).is_none()));
        tlb.switch(0, false);
        assert!((0..pages).all(|page| tlb.read(page * PAGE, 1).is_none()));
        assert!((0..pages).all(|page| tlb.global(Context::Kernel, page * PAGE, false).is_some()));
        tlb.flush_all();
        assert!((0..pages).all(|page| tlb.read(page * PAGE, 1).is_none()));
        assert!((0..pages).all(|page| tlb.global(Context::Kernel, page * PAGE, false).is_none()));
    }
}

#[test]
fn data_pages_do_not_disturb_the_jump_cache() {
    let mut tlb = Tlb::new(8);
    tlb.fill_code(0x1000, true, (0, 12), frame(0));
    let stamp = tlb.stamp();
    tlb.fill(Context::Kernel, 0x5000, found(1, true, 12), false);
    tlb.flush_page(0x5000);
    assert_eq!(tlb.stamp(), stamp, "no code is there");
    tlb.switch(5, true);
    assert_ne!(tlb.stamp(), stamp);
    tlb.switch(0, true);
    assert_eq!(tlb.stamp(), stamp, "back where it was");
    // What evicts the page from the cache of code does not make the jump cache wrong; what drops it does.
    tlb.fill_code(0x1000 + (2048 << 12), true, (0x3000, 12), frame(3));
    assert!(tlb.code(0x1000, true).is_none());
    assert_eq!(tlb.stamp(), stamp);
    tlb.flush_page(0x1000);
    assert_ne!(tlb.stamp(), stamp);
    // A recycled address space has a stamp of its own.
    let mut stamps = vec![stamp, tlb.stamp()];
    for pcid in 1..40 {
        tlb.switch(pcid, true);
        assert!(!stamps.contains(&tlb.stamp()));
        stamps.push(tlb.stamp());
    }
    tlb.switch(0, true);
    assert!(!stamps.contains(&tlb.stamp()));
}

const LARGE: u64 = 2 << 20;
const KERNEL: u64 = 0xffff_8880_0000_0000;

/// Of so many large pages.
fn stretch(from: u64, pages: u64, delta: u64) -> Stretch {
    Stretch { from, to: from + pages * LARGE, delta, shift: 21 }
}

fn kernel(stretches: &[Stretch]) -> Tlb {
    let mut tlb = Tlb::new(1);
    tlb.select(Context::Kernel);
    stretches.iter().for_each(|&stretch| tlb.put_stretch(stretch));
    tlb
}

/// Whether large pages are read as parts of a stretch.
fn seen<const N: usize>(tlb: &Tlb, pages: [u64; N]) -> [bool; N] {
    pages.map(|page| tlb.read_in_stretch(KERNEL + page * LARGE + LARGE / 2).is_some())
}

#[test]
fn a_stretch_is_seen_but_for_its_ends() {
    let tlb = kernel(&[stretch(KERNEL, 2, 5 * PAGE)]);
    let at = |linear: u64| tlb.read_in_stretch(linear).map(|at| at as u64);
    let end = KERNEL + 2 * LARGE - PAGE;
    for linear in [KERNEL + PAGE, KERNEL + LARGE - 1, KERNEL + LARGE, end - 1] {
        assert_eq!(at(linear), Some(linear.wrapping_add(5 * PAGE)));
    }
    for linear in [0, KERNEL - 1, KERNEL, KERNEL + PAGE - 1, end, end + PAGE, u64::MAX] {
        assert_eq!(at(linear), None, "{linear:#x}");
    }
    assert!(kernel(&[]).read_in_stretch(0).is_none());
    let smallest = Stretch { from: KERNEL, to: KERNEL + 2 * PAGE, delta: 0, shift: 12 };
    assert!(kernel(&[smallest]).read_in_stretch(KERNEL + PAGE).is_none());
}

#[test]
fn only_a_supervisor_sees_stretches() {
    let mut tlb = kernel(&[stretch(KERNEL, 2, 0)]);
    for (context, sees) in
        [(Context::User, false), (Context::KernelAll, true), (Context::Slow, false), (Context::Kernel, true)]
    {
        tlb.select(context);
        assert_eq!(seen(&tlb, [0, 1]), [sees; 2], "{context:?}");
        tlb.put_stretch(stretch(KERNEL + 8 * LARGE, 1, 1));
        assert_eq!(seen(&tlb, [8]), [sees], "{context:?}");
    }
}

#[test]
fn a_stretch_goes_with_its_pages() {
    let mut tlb = kernel(&[stretch(KERNEL, 8, 0)]);
    tlb.flush_page(KERNEL - 1);
    tlb.flush_page(KERNEL + 8 * LARGE);
    tlb.switch(5, false);
    tlb.flush_pcid(5);
    tlb.flush_spaces();
    tlb.forget_writes();
    assert_eq!(seen(&tlb, [0, 7]), [true; 2], "its pages are global, and others than those");
    tlb.flush_page(KERNEL + 2 * LARGE + 5);
    assert_eq!(seen(&tlb, [0, 1, 2, 3, 7]), [false, false, false, true, true], "the larger part stays");
    tlb.flush_page(KERNEL + 6 * LARGE);
    assert_eq!(seen(&tlb, [3, 5, 6, 7]), [true, true, false, false]);
    // Where it is hidden it goes all the same.
    tlb.select(Context::User);
    tlb.flush_page(KERNEL + 3 * LARGE);
    tlb.select(Context::Kernel);
    assert_eq!(seen(&tlb, [3, 4, 5]), [false, true, true]);
    tlb.flush_all();
    assert_eq!(seen(&tlb, [4, 5]), [false; 2]);
    // The top of the address space, where nothing follows.
    let mut tlb = kernel(&[stretch(0u64.wrapping_sub(2 * LARGE), 1, 0)]);
    tlb.flush_page(0u64.wrapping_sub(LARGE) - 1);
    assert!(tlb.read_in_stretch(0u64.wrapping_sub(3 * LARGE / 2)).is_none());
}

#[test]
fn stretches_grow_together_if_they_are_of_one_kind() {
    let mut tlb = kernel(&[stretch(KERNEL, 2, 0), stretch(KERNEL + 2 * LARGE, 2, 0)]);
    assert_eq!(tlb.stretch(KERNEL), tlb.stretch(KERNEL + 3 * LARGE));
    // Their common end is in the midst now.
    assert!(tlb.read_in_stretch(KERNEL + 2 * LARGE).is_some());
    tlb.put_stretch(stretch(KERNEL + 4 * LARGE, 4, PAGE));
    assert_ne!(tlb.stretch(KERNEL), tlb.stretch(KERNEL + 4 * LARGE));
    assert!(tlb.read_in_stretch(KERNEL + 4 * LARGE).is_none(), "they meet, but not in the host");
    let (first, second) = (tlb.stretch(KERNEL), tlb.stretch(KERNEL + 4 * LARGE));
    tlb.flush_all();
    tlb.put_stretch(stretch(KERNEL + 4 * LARGE, 4, PAGE));
    tlb.put_stretch(stretch(KERNEL, 4, 0));
    assert_eq!((tlb.stretch(KERNEL), tlb.stretch(KERNEL + 4 * LARGE)), (first, second), "in the same places");
    // One too many displaces the smallest, if it is larger.
    for (at, pages) in [(10, 2), (20, 2), (30, 1), (40, 3)] {
        tlb.put_stretch(stretch(KERNEL + at * LARGE, pages, at));
    }
    assert_eq!(seen(&tlb, [0, 4, 30, 40]), [true, true, false, true]);
    assert_eq!(seen(&tlb, [10, 20]).iter().filter(|&&seen| seen).count(), 1);
}

#[test]
fn stretches_hold_nothing_that_was_to_be_forgotten() {
    let mut random = Random::new(2);
    let mut tlb = kernel(&[]);
    // What may be cached of each large page.
    let mut model: HashMap<u64, Vec<u64>> = HashMap::new();
    let mut hits = 0;
    for _ in 0..100_000 {
        let page = random.below(64);
        match random.below(20) {
            0..8 => {
                let (pages, delta) = (1 + random.below(16), random.below(3) * LARGE);
                tlb.put_stretch(stretch(KERNEL + page * LARGE, pages, delta));
                (page..page + pages).for_each(|page| model.entry(page).or_default().push(delta));
            }
            8..19 => {
                tlb.flush_page(KERNEL + page * LARGE + random.below(LARGE));
                model.remove(&page);
            }
            _ if random.below(4) == 0 => {
                tlb.flush_all();
                tlb.select(Context::Kernel);
                model.clear();
            }
            _ => tlb.switch(random.below(4) as u16, random.below(2) == 0),
        }
        let linear = KERNEL + random.below(90 * LARGE);
        if let Some(at) = tlb.read_in_stretch(linear) {
            hits += 1;
            let known = model.get(&((linear - KERNEL) / LARGE)).map(Vec::as_slice).unwrap_or_default();
            assert!(known.contains(&(at as u64).wrapping_sub(linear)), "{linear:#x} was forgotten");
        }
    }
    assert!(hits > 1000, "{hits}");
}
