//! The second level of the soft TLB: global translations, which outlive a change of CR3 (SDM vol. 3A §4.10.2.4).

use skep_memory::HostPage;

use super::Context;
use super::books::Log;
use super::tlb::{ENTRIES, Frame, index, page_of};

/// A global translation at supervisor privilege.
#[derive(Clone, Copy)]
struct Global {
    /// Linear address of the page.
    linear: u64,
    found: Found,
}

/// What is known about a page without a walk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    /// Guest physical address of the page.
    pub(crate) gpa: u64,
    /// The page.
    pub(crate) page: HostPage,
    /// It may be written without further ado.
    pub(crate) free: bool,
    /// log2 of the size of the page that maps it.
    pub(crate) shift: u8,
}

/// Global translations of [`Context::KernelAll`] and [`Context::Kernel`], for all address spaces.
pub(super) struct Globals([Store; 2]);

struct Store {
    /// Empty until something is put in.
    entries: Vec<Option<Global>>,
    log: Log,
}

impl Globals {
    pub(super) const fn new() -> Self {
        const NOTHING: Store = Store { entries: Vec::new(), log: Log::new() };
        Self([NOTHING; 2])
    }

    fn store(context: Context) -> Option<usize> {
        match context {
            Context::KernelAll => Some(0),
            Context::Kernel => Some(1),
            Context::User | Context::Slow => None,
        }
    }

    pub(super) fn put(&mut self, context: Context, linear: u64, found: Found) {
        let Some(store) = Self::store(context) else { return };
        let Store { entries, log } = &mut self.0[store];
        if entries.is_empty() {
            entries.resize(ENTRIES, None);
        }
        let entry = &mut entries[index(linear)];
        if entry.is_none() {
            log.note(index(linear));
        }
        *entry = Some(Global { linear: page_of(linear), found });
    }

    pub(super) fn get(&self, context: Context, linear: u64, write: bool) -> Option<Found> {
        let entry = self.0[Self::store(context)?].entries.get(index(linear))?.as_ref()?;
        (entry.linear == page_of(linear) && (!write || entry.found.free)).then_some(entry.found)
    }

    pub(super) fn clear(&mut self) {
        for store in &mut self.0 {
            for at in store.log.indices() {
                store.entries[at] = None;
            }
            store.log.clear();
        }
    }

    /// Drops one page; with `large`, whatever comes from a large page that `linear` is part of.
    pub(super) fn drop_page(&mut self, linear: u64, large: bool) {
        for store in self.0.iter_mut().filter(|s| !s.entries.is_empty()) {
            if store.entries[index(linear)].is_some_and(|e| e.linear == page_of(linear)) {
                store.entries[index(linear)] = None;
            }
            if large {
                for at in store.log.indices() {
                    let around = |e: Global| e.found.shift > 12 && (e.linear ^ linear) >> e.found.shift == 0;
                    if store.entries[at].is_some_and(around) {
                        store.entries[at] = None;
                    }
                }
            }
        }
    }

    pub(super) fn forget_writes(&mut self) {
        for store in &mut self.0 {
            for at in store.log.indices() {
                if let Some(entry) = &mut store.entries[at] {
                    entry.found.free = false;
                }
            }
        }
    }

    /// Forgets that one page of guest memory may be written, at one index or wherever it is.
    pub(super) fn forget_writes_to(&mut self, frame: Frame, only: Option<usize>) {
        for store in self.0.iter_mut().filter(|s| !s.entries.is_empty()) {
            let mut forget = |at: usize| {
                if let Some(entry) = &mut store.entries[at]
                    && entry.found.page.index == frame.index
                {
                    entry.found.free = false;
                }
            };
            match only {
                Some(at) => forget(at),
                None => store.log.indices().for_each(forget),
            }
        }
    }
}
