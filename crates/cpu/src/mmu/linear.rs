//! Stretches: ranges of linear addresses that lie in one piece in the host.
//!
//! A kernel maps all memory it has at one place, and itself and what it knows of each page at others, by large pages that never
//! change and are global. An address in such a stretch needs no look at the arrays: what must be added to it is the same in all of
//! it. Only reads can use that, as writes are looked at page by page: somebody may watch a page, or want to know that it is
//! dirty.
//!
//! A stretch is a translation like others, though of many pages at once: it goes when any of them is to be forgotten.

/// Stretches that are known at once.
pub(super) const STRETCHES: usize = 4;
/// What generated code does not see at both ends of a stretch: so much around an address that it has found there is in it too.
const MARGIN: u64 = 4096;

/// Global translations of a range that a supervisor may read, the end not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// Host address minus linear address.
    pub(crate) delta: u64,
    /// log2 of the size of the largest page in it.
    pub(crate) shift: u8,
}

/// A place that nothing was put in.
const NOTHING: Stretch = Stretch { from: 0, to: 0, delta: 0, shift: 12 };

impl Stretch {
    fn len(&self) -> u64 {
        self.to - self.from
    }

    fn holds(&self, linear: u64) -> bool {
        (self.from..self.to).contains(&linear)
    }

    /// Whether both are parts of a larger one.
    fn joins(&self, other: &Self) -> bool {
        let apart = self.to < other.from || other.to < self.from;
        self.delta == other.delta && self.len() > 0 && !apart
    }

    /// What is left without the page that `linear` is part of, however large that is.
    fn without(self, linear: u64) -> Self {
        let within = (1 << self.shift) - 1;
        let below = Self { to: (linear & !within).max(self.from), ..self };
        let above = Self { from: (linear | within).saturating_add(1).min(self.to), ..self };
        if below.len() > above.len() { below } else { above }
    }
}

/// What generated code sees of stretches: an address in one is less than `len` from its `base`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Seen {
    pub(super) base: [u64; STRETCHES],
    pub(super) len: [u64; STRETCHES],
    pub(super) delta: [u64; STRETCHES],
}

/// All that are known.
#[repr(C)]
pub(super) struct Stretches {
    pub(super) seen: Seen,
    shown: bool,
    /// What is seen of their lengths when they are shown.
    lens: [u64; STRETCHES],
    known: [Stretch; STRETCHES],
}

impl Stretches {
    pub(super) const fn none() -> Self {
        const NONE: [u64; STRETCHES] = [0; STRETCHES];
        let seen = Seen { base: NONE, len: NONE, delta: NONE };
        Self { seen, shown: false, lens: NONE, known: [NOTHING; STRETCHES] }
    }

    /// Lets generated code see them, or hides them.
    #[inline]
    pub(super) fn show(&mut self, shown: bool) {
        self.shown = shown;
        self.seen.len = if shown { self.lens } else { [0; STRETCHES] };
    }

    fn refresh(&mut self) {
        self.seen.base = self.known.map(|known| known.from.wrapping_add(MARGIN));
        self.seen.delta = self.known.map(|known| known.delta);
        self.lens = self.known.map(|known| known.len().saturating_sub(2 * MARGIN));
        self.show(self.shown);
    }

    /// Forgets all of them, but not which was where.
    pub(super) fn clear(&mut self) {
        self.known.iter_mut().for_each(|known| known.to = known.from);
        self.refresh();
    }

    /// Forgets the page that `linear` is part of.
    #[inline]
    pub(super) fn drop_page(&mut self, linear: u64) {
        if self.find(linear).is_some() {
            self.known =
                self.known.map(|known| if known.holds(linear) { known.without(linear) } else { known });
            self.refresh();
        }
    }

    /// Where in this process an address lies that generated code finds in one.
    pub(super) fn read(&self, linear: u64) -> Option<*mut u8> {
        let Seen { base, len, delta } = &self.seen;
        let at = (0..STRETCHES).find(|&at| linear.wrapping_sub(base[at]) < len[at])?;
        Some(delta[at].wrapping_add(linear) as *mut u8)
    }

    /// Which one an address lies in.
    pub(super) fn find(&self, linear: u64) -> Option<usize> {
        self.known.iter().position(|known| known.holds(linear))
    }

    /// Remembers one: with what it is a part of, where one of the same kind was before, or else where least is lost.
    pub(super) fn put(&mut self, new: Stretch) {
        let old = |is: &dyn Fn(&Stretch) -> bool| self.known.iter().position(is);
        let place = old(&|known| known.joins(&new))
            .or_else(|| old(&|known| known.delta == new.delta && known.len() < new.len()))
            .or_else(|| old(&|known| *known == NOTHING))
            .or_else(|| (0..STRETCHES).min_by_key(|&at| self.known[at].len()));
        let Some(known) = place.and_then(|at| self.known.get_mut(at)) else { return };
        if known.joins(&new) {
            let (from, to) = (known.from.min(new.from), known.to.max(new.to));
            *known = Stretch { from, to, shift: known.shift.max(new.shift), ..new };
        } else if known.len() < new.len() {
            *known = new;
        }
        self.refresh();
    }
}
