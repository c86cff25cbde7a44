//! Accesses to memory: where they go, and how the host's page is found.
//!
//! What was found last is kept: R9 is the linear address of its page, R8 what is to be added to linear addresses in it. An
//! access that is likely to lie in the same page ([`Window`]) looks there first. Nothing rests on that guess being right, as the
//! address itself is compared; R9 is no page's address where R8 may be anything. What is known of [stretches](super::linear) is of
//! another kind, and certain.

use iced_x86::{Instruction, Register};

use super::asm::{ABOVE, Asm, Forward, Mem, NOT_EQUAL, R8, R9, R10, R11, RBP};
use super::glue::{BASE, STACK_DELTA, STACK_PAGE, home, segment_base, tlb_entry};
use super::help::Wanted;
use super::operands::{has_small_address, host, is_homed, number, operand_number};
use super::stubs::{Find, Stub};
use super::table::{Class, Info};
use super::translate::{Decoded, Translator};
use crate::cpu::seg;
use crate::mmu::TlbLayout;

/// Where an access goes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    /// Nowhere.
    None,
    /// The linear address is in R8; once it is checked, what must be added to it is in R10.
    Linear,
    /// The linear address is in R8; once it is checked, the host's is.
    Host,
    /// As above, for an operand that is probably in the page that the stack was last in.
    Top,
    /// Once it is checked, what must be added to the address is in R8, and the address in R10 if it is not
    /// [simple](Address::simple).
    Sum(Address),
    /// The sum of the guest's stack pointer and a displacement; once it is checked, what must be added to it is in R10.
    Stack(i32),
}

impl Place {
    /// The operand, once checked.
    pub(super) fn mem(self) -> Mem {
        match self {
            Self::None | Self::Host | Self::Top => Mem::At(R8, 0),
            Self::Linear => Mem::Sum(Some(R8), Some((R10, 0)), 0),
            Self::Sum(address) => match address.simple() {
                Some((base, disp)) => Mem::Sum(Some(R8), Some((base, 0)), disp),
                None => Mem::Sum(Some(R8), Some((R10, 0)), 0),
            },
            Self::Stack(disp) => Mem::Sum(Some(R10), Some((R11, 0)), disp),
        }
    }

    /// Bytes of code that computes it, and moves what was found, at most.
    pub(super) fn most(self) -> usize {
        match self {
            Self::None | Self::Linear | Self::Host | Self::Top => 0,
            Self::Sum(address) => address.most(),
            Self::Stack(_) => 7 + 8,
        }
    }

    /// Registers that are free once it is checked, the best one last: R8 and R9 hold the window.
    pub(super) fn scratch(self) -> &'static [u8] {
        match self {
            Self::None => &[R8, R9, R10],
            Self::Linear => &[R9],
            Self::Host | Self::Top => &[R9, R10],
            Self::Sum(address) if address.simple().is_some() => &[R9, R10],
            Self::Sum(_) => &[R9],
            Self::Stack(_) => &[R8, R9],
        }
    }
}

/// A 64-bit address: the sum of a displacement, host registers that hold the guest's, and fields of the processor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address {
    base: Option<u8>,
    /// With log2 of its scale.
    index: Option<(u8, u8)>,
    /// A field that stands for the index if there is a scale; else it is just added.
    scaled: Option<(Mem, u8)>,
    /// Another field.
    added: Option<Mem>,
    disp: i32,
    /// The guest's base and index registers and segment.
    names: [Register; 3],
    /// By how much the index is multiplied.
    factor: u32,
}

impl Address {
    fn of(d: &Decoded) -> Option<Self> {
        let insn = &d.insn;
        let (names, factor) = (names(insn), insn.memory_index_scale());
        let mut all = Self { base: None, index: None, scaled: None, added: None, disp: 0, names, factor };
        let mut base_field = None;
        match insn.memory_base() {
            Register::RIP => {
                all.disp = i32::try_from(d.relative()).ok()?;
                base_field = Some(BASE);
            }
            base => {
                all.disp = i32::try_from(insn.memory_displacement64() as i64).ok()?;
                match number(base) {
                    Some(n) if is_homed(n) => base_field = Some(home(n)),
                    n => all.base = n.map(host),
                }
            }
        }
        let scale = factor.trailing_zeros() as u8;
        match number(insn.memory_index()) {
            Some(n) if is_homed(n) => all.scaled = Some((home(n), scale)),
            n => all.index = n.map(|n| (host(n), scale)),
        }
        let mut segment_field = match insn.memory_segment() {
            Register::FS => Some(segment_base(seg::FS)),
            Register::GS => Some(segment_base(seg::GS)),
            _ => None,
        };
        if all.scaled.is_none() {
            all.scaled = segment_field.take().or_else(|| base_field.take()).map(|field| (field, 0));
        }
        all.added = segment_field.or(base_field);
        // Room for what is added to it, and for one more field.
        let small = all.disp.checked_add(64).is_some();
        (small && (segment_field.is_none() || base_field.is_none())).then_some(all)
    }

    /// A guest's register and a displacement.
    fn based(name: Register, base: u8, disp: i32) -> Self {
        let names = [name, Register::None, Register::None];
        Self { base: Some(base), index: None, scaled: None, added: None, disp, names, factor: 1 }
    }

    /// What RBP points to.
    pub(super) fn frame() -> Self {
        Self::based(Register::RBP, RBP, 0)
    }

    /// A register and a displacement, if it is no more.
    pub(super) fn simple(&self) -> Option<(u8, i32)> {
        let alone = self.index.is_none() && self.scaled.is_none() && self.added.is_none();
        self.base.filter(|_| alone).map(|base| (base, self.disp))
    }

    /// Bytes of code that computes it, at most.
    fn most(&self) -> usize {
        let pinned =
            8 + if self.base.is_some() && self.index.is_some() && self.scaled.is_some() { 8 } else { 0 };
        pinned + 9 * (usize::from(self.scaled.is_some()) + usize::from(self.added.is_some()))
    }

    /// Puts the address plus `more` into a register, all or its low half. Status flags may be lost.
    pub(super) fn put(&self, a: &mut Asm, wide: bool, to: u8, more: i32) {
        let disp = self.disp + more;
        let lea = |a: &mut Asm, mem: Mem| a.mem(&[], wide, &[0x8d], to, mem);
        match (self.scaled, self.base, self.index) {
            (None, Some(base), None) if disp == 0 => a.regs(wide, &[0x89], base, to),
            (None, base, index) => lea(a, Mem::Sum(base, index, disp)),
            (Some((field, scale)), base, index) => {
                a.mem(&[], wide, &[0x8b], to, field);
                match (base, index) {
                    (None, None) if scale == 0 && disp == 0 => {}
                    (None, None) if scale == 0 => lea(a, Mem::At(to, disp)),
                    (None, index) if scale == 0 => lea(a, Mem::Sum(Some(to), index, disp)),
                    (base, None) => lea(a, Mem::Sum(base, Some((to, scale)), disp)),
                    (Some(base), index) => {
                        lea(a, Mem::Sum(Some(base), Some((to, scale)), disp));
                        lea(a, Mem::Sum(Some(to), index, 0));
                    }
                    // A scaled field stands for the index: there is no other.
                    (None, index) => lea(a, Mem::Sum(Some(to), index, disp)),
                }
            }
        }
        if let Some(field) = self.added {
            a.mem(&[], wide, &[0x03], to, field);
        }
    }
}

/// What R8 and R9 know.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    /// By what it was addressed.
    names: [Register; 3],
    factor: u32,
    disp: i32,
    known: Known,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// A page.
    Page,
    /// A page that may be written.
    WritablePage,
    /// That the address, and what is near, lies in a stretch, if R9 is zero.
    Stretch,
}

/// Bytes between accesses that are taken to lie in the same page.
const NEAR: u32 = 2048;

impl Window {
    fn new(address: Address, known: Known) -> Self {
        let Address { names, factor, disp, .. } = address;
        Self { names, factor, disp, known }
    }

    fn likely(&self, address: &Address, write: bool) -> bool {
        self.names == address.names
            && self.factor == address.factor
            && self.disp.abs_diff(address.disp) < NEAR
            && (self.known == Known::WritablePage || !write)
    }

    pub(super) fn stretch(address: Address) -> Self {
        Self::new(address, Known::Stretch)
    }

    pub(super) fn is_stretch(&self) -> bool {
        self.known == Known::Stretch
    }

    /// The registers that it was addressed by, by bit.
    pub(super) fn registers(&self) -> u16 {
        registers(self.names)
    }
}

/// Instructions looked at behind an access for others to the same page.
const FORESIGHT: usize = 12;

/// What is foreseen of the page that an operand lies in.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Expected {
    /// It is written, now or soon: then it is looked up for writing at once.
    pub(super) write: bool,
    /// It is accessed again soon.
    reused: bool,
    /// It is read, and lies in the stretch of this number.
    pub(super) stretch: Option<usize>,
}

/// Looks for accesses to what is likely the same page.
pub(super) fn foresee_accesses(insns: &mut [Decoded]) {
    for i in 0..insns.len() {
        let (d, rest) = (&insns[i], &insns[i + 1..]);
        if d.info.class == Class::Plain && d.memory.is_some() && d.insn.memory_base() != Register::RSP {
            insns[i].expected = expect(d, rest);
        }
    }
}

fn names(insn: &Instruction) -> [Register; 3] {
    [insn.memory_base(), insn.memory_index(), insn.memory_segment()]
}

fn expect(d: &Decoded, rest: &[Decoded]) -> Expected {
    let writes = |d: &Decoded| d.memory.is_some_and(|operand| d.info.written >> operand & 1 != 0);
    let mut expected = Expected { write: writes(d), ..Expected::default() };
    let its = names(&d.insn);
    let registers = registers(its);
    // Behind a branch it is not certain that anything is written.
    let mut certain = true;
    if d.replaced & registers != 0 {
        return expected;
    }
    for next in rest.iter().take(FORESIGHT) {
        match next.info.class {
            Class::Plain => {}
            Class::Branch => {
                certain = false;
                continue;
            }
            Class::Lea | Class::Nothing => continue,
            _ => break,
        }
        if next.memory.is_some() && names(&next.insn) == its {
            expected.reused = true;
            expected.write |= certain && writes(next);
        }
        if next.replaced & registers != 0 {
            break;
        }
    }
    expected
}

/// The registers that an address is made of, by bit.
fn registers(names: [Register; 3]) -> u16 {
    let bit = |name: Register| number(name).map_or(0, |n| 1 << n);
    bit(names[0]) | bit(names[1])
}

/// The registers into which an instruction puts something quite else, by bit.
pub(super) fn replaced(insn: &Instruction, info: &Info) -> u16 {
    if info.steps { 0 } else { written(insn, info) }
}

/// The registers among its operands that an instruction writes to, by bit.
pub(super) fn written(insn: &Instruction, info: &Info) -> u16 {
    if info.written == 0 {
        return 0;
    }
    let bit = |i: u32| operand_number(insn, i).filter(|_| info.written >> i & 1 != 0).map_or(0, |n| 1 << n);
    bit(0) | bit(1) | bit(2) | bit(3)
}

impl Translator<'_> {
    /// Where the memory operand lies. For [`Place::Linear`] and [`Place::Host`] its address is in R8 then, R9 and R10 are lost.
    /// Flags are lost. `expected`: what it is known to be good for.
    pub(super) fn place(&mut self, d: &Decoded, expected: Expected) -> Option<Place> {
        let insn = &d.insn;
        if self.small() {
            self.window = None;
            return self.place_small(d);
        }
        // Where many registers have to be loaded there is no room for the window.
        let crowded = d.homed > 1;
        if !has_small_address(insn)
            && !d.high
            && !crowded
            && let Some(address) = Address::of(d)
        {
            match address.simple() {
                Some((R11, disp)) => return Some(Place::Stack(disp)),
                // Worth knowing the page of, or no dearer, or perhaps known already.
                _ if expected.reused || address.scaled.is_none() => return Some(Place::Sum(address)),
                _ if expected.stretch.is_some() => return Some(Place::Sum(address)),
                _ if self.window.is_some_and(|w| w.likely(&address, expected.write)) => {
                    return Some(Place::Sum(address));
                }
                _ => {
                    self.window = None;
                    address.put(&mut self.asm, true, R8, 0);
                    return Some(Place::Linear);
                }
            }
        }
        self.window = None;
        self.address(d)?;
        Some(Place::Host)
    }

    /// Finds the host's page for an access; see [`Place`] for how the operand is addressed then. Flags are lost. Where it is
    /// `expected` to be written, a page that can be is preferred for a read.
    pub(super) fn check(&mut self, place: Place, wanted: Wanted, expected: Expected) {
        match place {
            Place::None => {}
            Place::Linear => self.check_linear(place, wanted),
            Place::Host | Place::Top => {
                if matches!(place, Place::Top) && wanted.size().is_power_of_two() {
                    self.check_stack(place, R8, 0, wanted);
                } else {
                    self.check_linear(place, wanted);
                }
                self.asm.lea(R8, Mem::Sum(Some(R8), Some((R10, 0)), 0));
            }
            Place::Stack(disp) if wanted.size().is_power_of_two() => {
                self.check_stack(place, R11, disp, wanted);
            }
            Place::Stack(disp) => {
                // The same in another way: R10 takes what is to be added.
                self.look_up(Address::based(Register::RSP, R11, disp), wanted, false);
                self.asm.mov(R10, R8);
            }
            Place::Sum(address) => self.check_sum(address, wanted, expected),
        }
    }

    fn check_sum(&mut self, address: Address, wanted: Wanted, expected: Expected) {
        // In a stretch anything may lie anywhere.
        let free = !wanted.is_aligned();
        let window = self.window.filter(|w| w.likely(&address, wanted.is_write()));
        match (window, expected.stretch) {
            (Some(window), _) if !window.is_stretch() => self.check_window(address, wanted),
            (Some(_), _) if free => self.check_same_stretch(address, wanted),
            (_, Some(stretch)) if free && !wanted.is_write() => self.check_stretch(address, wanted, stretch),
            _ => self.look_up(address, wanted, expected.write),
        }
    }

    pub(super) fn miss(&mut self, from: [Option<Forward>; 2], place: Place, wanted: Wanted, find: Find) {
        let resume = self.asm.label();
        self.open.push(self.stubs.len());
        self.stubs.push(Stub::Access { from, place, wanted, find, resume, done: None });
    }

    fn check_linear(&mut self, place: Place, wanted: Wanted) {
        self.window = None;
        let a = &mut self.asm;
        let size = wanted.size() as i32;
        a.regs(false, &[0x89], R8, R10);
        tlb_entry(a);
        if wanted.is_aligned() {
            a.mov(R9, R8);
            a.and_imm(true, R9, -4096 | (size - 1));
        } else {
            a.lea(R9, Mem::At(R8, size - 1));
            a.and_imm(true, R9, -4096);
        }
        a.mem(&[], true, &[0x39], R9, Mem::At(R10, tag(wanted.is_write())));
        let from = a.jcc_forward(NOT_EQUAL);
        a.load(R10, Mem::At(R10, TlbLayout::DELTA));
        self.miss([Some(from), None], place, wanted, Find::LookUp);
    }

    /// The stack is nearly always in the page it was in before, and aligned: looks for an address, the sum of `base` and `disp`,
    /// there. R8 and R9 stay.
    fn check_stack(&mut self, place: Place, base: u8, disp: i32, wanted: Wanted) {
        let a = &mut self.asm;
        if disp == 0 {
            a.mov(R10, base);
        } else {
            a.lea(R10, Mem::At(base, disp));
        }
        a.and_imm(true, R10, -4096 | (wanted.size() as i32 - 1));
        a.mem(&[], true, &[0x3b], R10, STACK_PAGE);
        let from = a.jcc_forward(NOT_EQUAL);
        a.load(R10, STACK_DELTA);
        self.miss([Some(from), None], place, wanted, Find::Stack);
    }

    /// Looks the page up and remembers it.
    fn look_up(&mut self, address: Address, wanted: Wanted, write: bool) {
        let a = &mut self.asm;
        let size = wanted.size() as i32;
        address.put(a, false, R10, 0);
        tlb_entry(a);
        if wanted.is_aligned() {
            address.put(a, true, R9, 0);
            a.and_imm(true, R9, -4096 | (size - 1));
        } else {
            address.put(a, true, R9, size - 1);
            a.and_imm(true, R9, -4096);
        }
        let write = wanted.is_write() || write;
        a.mem(&[], true, &[0x39], R9, Mem::At(R10, tag(write)));
        let from = a.jcc_forward(NOT_EQUAL);
        a.load(R8, Mem::At(R10, TlbLayout::DELTA));
        if address.simple().is_none() {
            address.put(a, true, R10, 0);
        }
        self.miss([Some(from), None], Place::Sum(address), wanted, Find::LookUp);
        let known = if write { Known::WritablePage } else { Known::Page };
        self.window = Some(Window::new(address, known));
    }

    /// Looks whether the address lies in the page that is known. No address may pass where R9 is -1, not even one at the end of
    /// the address space.
    fn check_window(&mut self, address: Address, wanted: Wanted) {
        let a = &mut self.asm;
        let size = wanted.size() as i32;
        address.put(a, true, R10, 0);
        let mut froms = [None; 2];
        if wanted.is_aligned() || wanted.size().is_power_of_two() && size <= 8 {
            // Misaligned ones are looked up.
            a.and_imm(true, R10, -4096 | (size - 1));
            a.regs(true, &[0x39], R9, R10);
            froms[0] = Some(a.jcc_forward(NOT_EQUAL));
            if address.simple().is_none() {
                address.put(a, true, R10, 0);
            }
        } else {
            a.regs(true, &[0x31], R9, R10); // xor r10, r9: the offset, if it is the same page
            a.bytes(&[0x49, 0x81, 0xfa]); // cmp r10, imm
            a.imm32((4096 - size) as u32);
            froms[0] = Some(a.jcc_forward(ABOVE));
            a.bytes(&[0x45, 0x84, 0xc9]); // test r9b, r9b
            froms[1] = Some(a.jcc_forward(NOT_EQUAL));
            if address.simple().is_none() {
                a.regs(true, &[0x31], R9, R10);
            }
        }
        self.miss(froms, Place::Sum(address), wanted, Find::LookUp);
    }

    /// An instruction was translated: whether the window still is a good guess.
    pub(super) fn notice_written(&mut self, d: &Decoded) {
        if self.window.is_some_and(|w| d.replaced & w.registers() != 0) {
            self.window = None;
        }
    }
}

fn tag(write: bool) -> i32 {
    if write { TlbLayout::WRITE } else { TlbLayout::READ }
}
