//! 32-bit code: compatibility mode, and protected mode without long mode.
//!
//! The host knows no such code, so it runs as 64-bit code that does the same. It is translated only where segments do not
//! show ([`Cpu::is_flat`]); FS and GS have a base, which is added. What differs from translations of 64-bit code:
//!
//! * addresses have 32 bits: every one is summed into R8 by a 32-bit LEA, whatever the upper halves of the registers hold;
//! * the stack pointer moves by four and wraps, and so do jumps out of the page;
//! * some encodings mean something else in 64-bit code. The frequent ones get another ([`substitute`]); what is not the
//!   same instruction when it is decoded as 64-bit code is left to its handler.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use skep_hv::cpuid::CpuidTable;
use skep_hv::state::Segment;

use super::Key;
use super::access::{Expected, Place};
use super::asm::{Asm, Mem, NOT_EQUAL, R8, R9, R11, RBP};
use super::glue::{BASE, TEMP};
use super::help::Wanted;
use super::known::Text;
use super::operands::{self, host, memory_operand, number};
use super::stack::Pushed;
use super::stubs::Find;
use super::table::{Class, Info, Table};
use super::translate::{Decoded, Translator};
use crate::cpu::{Cpu, seg};
use crate::system::access;

impl Cpu {
    /// Whether no segment check can fail in 32-bit code, and only FS and GS have a base.
    pub(super) fn is_flat(&self) -> bool {
        let [es, cs, ss, ds, ..] = &self.segs;
        let stack = ss.access & access::DB != 0;
        let based = es.base | cs.base | ss.base | ds.base;
        let ends = es.limit & cs.limit & ss.limit & ds.limit;
        self.mode.protected
            && !self.mode.v86
            && self.rip >> 32 == 0
            && based == 0
            && ends == u32::MAX
            && stack
            && [es, ss, ds].into_iter().all(is_plain_data)
    }

    /// What of FS and GS is usable, as bits of a [`Key`].
    pub(super) fn usable_segments(&self) -> u8 {
        let usable = |segment: usize, bit: u8| {
            let segment = &self.segs[segment];
            if segment.limit == u32::MAX && is_plain_data(segment) { bit } else { 0 }
        };
        usable(seg::FS, Key::FS) | usable(seg::GS, Key::GS)
    }
}

/// Data that may be written, and that does not expand down.
fn is_plain_data(segment: &Segment) -> bool {
    const LOOKED_AT: u32 = Segment::UNUSABLE | access::CODE | access::EC | access::RW;
    segment.access & LOOKED_AT == access::RW
}

/// What follows from an instruction's code and operands. In 32-bit code it may become another one that does the same, as long
/// as it was: then `text` becomes its bytes.
pub(super) fn look_up(
    insn: &mut Instruction,
    text: &mut Text,
    key: Key,
    table: &mut Table,
    cpuid: &CpuidTable,
) -> Info {
    if key.small()
        && let Some(other) = substitute(insn, text.as_slice())
    {
        *text = other;
    }
    let mut info = *table.get(insn, cpuid);
    if operands::needs_handler(insn, &info, key)
        || key.small() && needs_handler(insn, &info, text.as_slice(), key)
    {
        info.class = Class::Handler;
    }
    info
}

/// INC and DEC of one byte, which are REX prefixes in 64-bit code, and MOV with an absolute address, which has 64 bits
/// there, become their longer forms.
fn substitute(insn: &mut Instruction, bytes: &[u8]) -> Option<Text> {
    let tail: &[u8] = match insn.code() {
        Code::Inc_r16 | Code::Inc_r32 => &[0xff, 0xc0 | insn.op0_register().number() as u8],
        Code::Dec_r16 | Code::Dec_r32 => &[0xff, 0xc8 | insn.op0_register().number() as u8],
        _ if insn.memory_displ_size() != 4 => return None,
        Code::Mov_AL_moffs8 => &[0x8a, 5],
        Code::Mov_AX_moffs16 | Code::Mov_EAX_moffs32 => &[0x8b, 5],
        Code::Mov_moffs8_AL => &[0x88, 5],
        Code::Mov_moffs16_AX | Code::Mov_moffs32_EAX => &[0x89, 5],
        _ => return None,
    };
    let absolute = tail[1] == 5;
    let (prefixes, displacement) = bytes.split_at(bytes.len() - if absolute { 5 } else { 1 });
    let meaningful = |byte: &&u8| matches!(byte, 0x66 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65);
    let mut text: Vec<u8> = prefixes.iter().filter(meaningful).copied().collect();
    text.extend(tail);
    text.extend(&displacement[1..]);
    let mut other = Decoder::with_ip(32, &text, insn.ip(), DecoderOptions::NONE).decode();
    if other.is_invalid() || other.len() != text.len() {
        return None;
    }
    other.set_len(insn.len());
    *insn = other;
    Text::new(&text)
}

/// Whether the interpreter's handler is to run an instruction of 32-bit code that could be translated in 64-bit code.
fn needs_handler(insn: &Instruction, info: &Info, bytes: &[u8], key: Key) -> bool {
    if memory_operand(insn).is_some() {
        let absolute = insn.memory_base() == Register::None && insn.memory_index() == Register::None;
        let short = insn.memory_base().size() == 2
            || insn.memory_index().size() == 2
            || absolute && insn.memory_displ_size() != 4;
        // An operand that goes on behind the end of its segment.
        let last = insn.memory_displacement64() + insn.memory_size().size().max(1) as u64 - 1;
        let beyond = absolute && last > u64::from(u32::MAX);
        let unusable = match insn.memory_segment() {
            Register::CS => true,
            Register::FS => !key.fs() || beyond,
            Register::GS => !key.gs() || beyond,
            _ => false,
        };
        if short || unusable && info.class != Class::Lea {
            return true;
        }
    }
    // These know eight registers in 32-bit code.
    let zeroes = matches!(insn.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall);
    info.class == Class::Plain && (zeroes || !is_same_in_64_bits(insn, bytes))
}

/// Whether an instruction does the same in 64-bit code, but for where its memory operand is.
fn is_same_in_64_bits(insn: &Instruction, bytes: &[u8]) -> bool {
    let other = Decoder::with_ip(64, bytes, insn.ip(), DecoderOptions::NONE).decode();
    let same = |i: u32| {
        insn.op_kind(i) == other.op_kind(i)
            && (insn.op_kind(i) != OpKind::Register || insn.op_register(i) == other.op_register(i))
    };
    insn.code() == other.code()
        && insn.op_count() == other.op_count()
        && other.len() == bytes.len()
        && (0..insn.op_count()).all(same)
}

impl Asm {
    /// LEA that cuts the sum to 32 bits.
    pub(super) fn lea32(&mut self, reg: u8, mem: Mem) {
        self.mem(&[], false, &[0x8d], reg, mem);
    }

    pub(super) fn store32(&mut self, mem: Mem, reg: u8) {
        self.mem(&[], false, &[0x89], reg, mem);
    }

    /// Zero-extends.
    fn mov32(&mut self, to: u8, from: u8) {
        self.regs(false, &[0x89], from, to);
    }
}

impl Translator<'_> {
    /// What is translated is 32-bit code.
    pub(super) fn small(&self) -> bool {
        self.request.key.small()
    }

    /// Where a memory operand of 32-bit code lies.
    pub(super) fn place_small(&mut self, d: &Decoded) -> Option<Place> {
        let insn = &d.insn;
        self.address(d)?;
        let based = matches!(insn.memory_segment(), Register::FS | Register::GS);
        let on_stack = insn.memory_base() == Register::ESP && insn.memory_index() == Register::None;
        Some(if on_stack && !based { Place::Top } else { Place::Host })
    }

    /// Adds the base of FS or GS, which is in R9, to the offset in R8. R10 is lost.
    pub(super) fn add_base_small(&mut self, d: &Decoded) {
        let insn = &d.insn;
        let size = insn.memory_size().size().max(1) as i32;
        let absolute = insn.memory_base() == Register::None && insn.memory_index() == Register::None;
        if size > 1 && !absolute {
            // The interpreter says what an operand raises that goes on behind the end of its segment.
            self.asm.lea(super::asm::R10, Mem::At(R8, size - 1));
            self.asm.bytes(&[0x49, 0xc1, 0xea, 32]); // shr r10, 32
            let from = self.asm.jcc_forward(NOT_EQUAL);
            let wanted = Wanted::new(d.at, insn.len() as u8, 0, false);
            self.miss([Some(from), None], Place::Linear, wanted, Find::Access);
        }
        self.asm.lea32(R8, Mem::Sum(Some(R8), Some((R9, 0)), 0));
    }

    /// An access to the four bytes on the stack at a host register and displacement, which R8 leads to then.
    fn check_stack_small(&mut self, d: &Decoded, base: u8, disp: i32, write: bool) {
        self.lose_flags(d.live_in, R9);
        self.asm.lea32(R8, Mem::At(base, disp));
        self.check(
            Place::Top,
            Wanted::new(d.at, d.insn.len() as u8, 4, write).on_stack(true),
            Expected::default(),
        );
    }

    pub(super) fn push_small(&mut self, d: &Decoded, value: Pushed) {
        self.check_stack_small(d, R11, -4, true);
        let top = Mem::At(R8, 0);
        match value {
            Pushed::Register(n) => self.asm.store32(top, host(n)),
            Pushed::Immediate(value) => {
                self.asm.mem(&[], false, &[0xc7], 0, top);
                self.asm.imm32(value as u32);
            }
            Pushed::Temp => {
                self.asm.load32(R9, TEMP);
                self.asm.store32(top, R9);
            }
            Pushed::Return(next) => {
                self.asm.load(R9, BASE);
                self.asm.lea32(R9, Mem::At(R9, i32::from(next)));
                self.asm.store32(top, R9);
            }
        }
        self.asm.lea32(R11, Mem::At(R11, -4));
    }

    pub(super) fn pop_small(&mut self, d: &Decoded, n: u8) {
        self.check_stack_small(d, R11, 0, false);
        // POP ESP moves it first.
        self.asm.lea32(R11, Mem::At(R11, 4));
        self.asm.load32(host(n), Mem::At(R8, 0));
    }

    pub(super) fn leave_small(&mut self, d: &Decoded) {
        self.check_stack_small(d, RBP, 0, false);
        self.asm.lea32(R11, Mem::At(RBP, 4));
        self.asm.load32(RBP, Mem::At(R8, 0));
    }

    pub(super) fn ret_small(&mut self, d: &Decoded) {
        let more = if d.insn.op_count() == 1 { d.insn.immediate16() } else { 0 };
        self.check_stack_small(d, R11, 0, false);
        self.asm.load32(R8, Mem::At(R8, 0));
        self.asm.lea32(R11, Mem::At(R11, 4 + i32::from(more)));
        self.asm.byte(0xc3);
    }

    /// Puts the target of an indirect jump or call into R8.
    pub(super) fn indirect_target_small(&mut self, d: &Decoded) -> Option<()> {
        let insn = &d.insn;
        if insn.op0_kind() == OpKind::Memory {
            let place = self.place(d, Expected::default())?;
            let wanted = self.wanted(d, 4, false);
            self.check(place, wanted, Expected::default());
            self.asm.load32(R8, place.mem());
        } else {
            let n = number(insn.op0_register())?;
            self.asm.mov32(R8, host(n));
        }
        Some(())
    }
}
