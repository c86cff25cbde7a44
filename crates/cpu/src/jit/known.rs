//! What the translator knows of an instruction wherever it stands, remembered by its bytes: the same instructions come again
//! and again.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};
use skep_hv::cpuid::CpuidTable;

use super::access::replaced;
use super::asm::{Asm, Piece};
use super::encode::Form;
use super::flags::surely_changed;
use super::length::{self, Layout};
use super::operands::{has_high_byte, host, is_homed, memory_operand, moved, operand_number};
use super::table::{Class, Info, STATUS_FLAGS, Table};
use super::{Key, PAGE, small};

/// Bytes that an instruction has at most, and one more.
pub(super) const LONGEST: usize = 16;

/// Bytes of an instruction, and how many.
#[derive(Clone, Copy)]
pub(super) struct Text {
    bytes: [u8; LONGEST],
    len: u8,
}

impl Text {
    /// `None`: too many.
    pub(super) fn new(text: &[u8]) -> Option<Self> {
        let mut bytes = [0; LONGEST];
        bytes.get_mut(..text.len())?.copy_from_slice(text);
        Some(Self { bytes, len: text.len() as u8 })
    }

    #[inline(always)]
    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len) % (LONGEST + 1)]
    }

    /// Its last bytes: eight at most.
    #[inline(always)]
    pub(super) fn tail(&self, len: usize) -> Piece {
        let shift = 8 * (usize::from(self.len) - len);
        Piece::of((u128::from_le_bytes(self.bytes) >> (shift % 128)) as u64, len)
    }

    /// Writes it as it is.
    #[inline(always)]
    pub(super) fn write(&self, asm: &mut Asm) {
        asm.first_of(&self.bytes, usize::from(self.len));
    }
}

/// What is known of an instruction.
#[derive(Clone, Copy)]
pub(super) struct Known {
    /// As it would be at the beginning of a page. An immediate of more than two bytes may be that of another one.
    pub(super) insn: Instruction,
    pub(super) info: Info,
    /// Its bytes, or those of another one that does the same.
    pub(super) text: Text,
    /// Which operand is in memory.
    pub(super) memory: Option<u32>,
    /// The guest's registers into which it puts something quite else, by bit.
    pub(super) replaced: u16,
    /// Status flags of which nothing remains behind it, and those that it reads.
    pub(super) changes: u16,
    pub(super) reads: u16,
    /// Control goes elsewhere, always or at times.
    pub(super) transfers: bool,
    /// A register is among its operands that stands elsewhere; how many of them stay in memory.
    pub(super) moved: bool,
    pub(super) homed: u8,
    /// A high byte is.
    pub(super) high: bool,
    /// How it is re-encoded, if that depends on nothing.
    pub(super) form: Option<Form>,
    /// Its displacement, which is not part of what is known.
    displacement: Displacement,
    /// Bytes in front of that.
    head: u8,
}

/// What is added to something else, if it is no part of what is known, and how many bytes it has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Displacement {
    None,
    /// To registers.
    Byte,
    Far,
    /// To the address of what follows, for an operand in memory.
    Relative,
    /// The same for where control goes.
    BranchByte,
    BranchFar,
}

impl Known {
    fn of(insn: Instruction, info: Info, text: Text) -> Self {
        let (changes, reads) = match info.class {
            Class::Handler => (0, STATUS_FLAGS),
            Class::Divide => (0, info.flags_read),
            _ => (surely_changed(&insn, &info), info.flags_read),
        };
        let numbers: [Option<u8>; 4] = std::array::from_fn(|i| operand_number(&insn, i as u32));
        let homed = numbers.iter().flatten().filter(|&&n| is_homed(n)).count() as u8;
        let high = info.narrow && has_high_byte(&insn);
        let fixed = info.class == Class::Plain && homed == 0 && !high;
        Self {
            insn,
            info,
            text,
            memory: memory_operand(&insn),
            replaced: replaced(&insn, &info),
            changes,
            reads,
            transfers: insn.flow_control() != FlowControl::Next,
            moved: numbers.iter().flatten().any(|&n| is_homed(n) || host(n) != n),
            homed,
            high,
            form: if fixed { Form::of(text.as_slice(), &info, numbers.map(moved)) } else { None },
            displacement: Displacement::None,
            head: 0,
        }
    }

    /// The same for all with this layout.
    fn with(mut self, layout: &Layout) -> Self {
        self.head = layout.head as u8;
        self.displacement = match (layout.displacement, self.insn.op0_kind()) {
            (1, OpKind::NearBranch64) => Displacement::BranchByte,
            (4, OpKind::NearBranch64) => Displacement::BranchFar,
            (1, _) => Displacement::Byte,
            (4, _) if layout.relative => Displacement::Relative,
            (4, _) => Displacement::Far,
            _ => Displacement::None,
        };
        self
    }

    /// Becomes one of those that are alike, whose bytes these are.
    #[inline(always)]
    pub(super) fn become_one(&mut self, bytes: &[u8; LONGEST]) {
        if self.head == 0 {
            return;
        }
        self.text.bytes = *bytes;
        let (next, head) = (i64::from(self.text.len), usize::from(self.head));
        let near = || i64::from(bytes[head % LONGEST] as i8);
        let far = || i64::from(dword(bytes, head));
        match self.displacement {
            Displacement::None => {}
            Displacement::Byte => self.insn.set_memory_displacement64(near() as u64),
            Displacement::Far => self.insn.set_memory_displacement64(far() as u64),
            Displacement::Relative => self.insn.set_memory_displacement64((next + far()) as u64),
            Displacement::BranchByte => self.insn.set_near_branch64((next + near()) as u64),
            Displacement::BranchFar => self.insn.set_near_branch64((next + far()) as u64),
        }
    }

    /// Flags that matter in front of it, given those behind it.
    #[inline(always)]
    pub(super) fn live_before(&self, live: u16) -> u16 {
        live & !self.changes | self.reads
    }
}

/// Instructions that are remembered.
const SLOTS: usize = 4096;

/// What is known of all instructions that are alike: they differ in displacements and in immediates of more than two bytes.
#[derive(Clone, Copy)]
struct Slot {
    /// The first bytes, to where they may differ.
    head: u64,
    /// A short immediate, and the [`Key`] above it, or [`EMPTY`].
    rest: u32,
    known: Known,
}

/// Nothing is known yet: more bits than an immediate and a key have.
const EMPTY: u32 = u32::MAX;

/// The instructions that were met last.
pub(super) struct Instructions {
    table: Table,
    slots: Vec<Slot>,
    /// What cannot be remembered.
    other: Option<Known>,
}

impl Instructions {
    pub(super) fn new() -> Self {
        Self { table: Table::new(), slots: Vec::new(), other: None }
    }

    /// What is known of the instruction that `bytes` begin with, of which `left` count, or of one that [is alike](Slot).
    /// `None`: it is invalid, or too few bytes are there.
    #[inline(never)]
    pub(super) fn alike(
        &mut self,
        bytes: &[u8; LONGEST],
        left: usize,
        key: Key,
        cpuid: &CpuidTable,
    ) -> Option<&Known> {
        let layout = if key.small() { None } else { length::of(bytes) };
        let Some(layout) = layout.filter(|layout| layout.len <= left && !is_far(bytes, layout)) else {
            self.other = look(&bytes[..left.min(LONGEST)], key, &mut self.table, cpuid);
            return self.other.as_ref();
        };
        let first = u64::from_le_bytes([
            bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
        ]);
        let head = first & u64::MAX >> (64 - 8 * layout.head.clamp(1, 8));
        let rest = u32::from(layout.immediate) | u32::from(key.0) << 16;
        let at = slot_of(head, rest);
        if self.slots.get(at).is_none_or(|slot| slot.head != head || slot.rest != rest) {
            let known = look(&bytes[..left.min(LONGEST)], key, &mut self.table, cpuid)?;
            if known.insn.len() != layout.len || layout.head > 8 {
                self.other = Some(known);
                return self.other.as_ref();
            }
            let slot = Slot { head, rest, known: known.with(&layout) };
            if self.slots.is_empty() {
                self.slots = vec![Slot { rest: EMPTY, ..slot }; SLOTS];
            }
            self.slots[at] = slot;
        }
        Some(&self.slots[at].known)
    }
}

/// What it names relative to itself is so far away that it depends on its place in the page whether there is code for it.
#[inline(always)]
fn is_far(bytes: &[u8; LONGEST], layout: &Layout) -> bool {
    layout.relative && dword(bytes, layout.head) > i32::MAX - 2 * PAGE as i32
}

#[inline(always)]
fn dword(bytes: &[u8; LONGEST], at: usize) -> i32 {
    let byte = |i: usize| bytes[(at + i) % LONGEST];
    i32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

#[inline(always)]
fn slot_of(head: u64, rest: u32) -> usize {
    let mixed = (head ^ u64::from(rest) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 48) as usize % SLOTS
}

/// Decodes it.
#[cold]
fn look(bytes: &[u8], key: Key, table: &mut Table, cpuid: &CpuidTable) -> Option<Known> {
    let mut insn = Decoder::with_ip(key.bits(), bytes, 0, DecoderOptions::NONE).decode();
    if insn.is_invalid() {
        // Too few bytes are left, or it raises #UD: the interpreter knows.
        return None;
    }
    let mut text = Text::new(&bytes[..insn.len()])?;
    let info = small::look_up(&mut insn, &mut text, key, table, cpuid);
    Some(Known::of(insn, info, text))
}
