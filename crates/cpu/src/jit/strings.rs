//! Repeated moves and fills: the host's own, for each stretch that lies in one page of plain memory on both sides. What does
//! not is left to the interpreter's handler, which goes on where this stopped.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::asm::{ABOVE, Asm, BELOW, EQUAL, Forward, Mem, NOT_EQUAL, R8, R9, R10, RCX, RDI, RSI, RSP};
use super::glue::{ATTENTION, TEMP, tlb_entry};
use super::translate::{Decoded, Translator};
use crate::cpu::{Cpu, fl};
use crate::mmu::TlbLayout;
use crate::op::Op;

const RFLAGS_REST: Mem = Mem::Cpu(offset_of!(Cpu, rflags_rest) as i32);
const PAGE: i32 = 4096;

/// Routines: moves of 1, 2, 4 and 8 bytes, then fills.
pub(super) type Strings = [u64; 8];

/// Which routine an instruction takes.
fn routine(insn: &Instruction) -> Option<usize> {
    Some(match insn.mnemonic() {
        Mnemonic::Movsb => 0,
        Mnemonic::Movsw => 1,
        Mnemonic::Movsd => 2,
        Mnemonic::Movsq => 3,
        Mnemonic::Stosb => 4,
        Mnemonic::Stosw => 5,
        Mnemonic::Stosd => 6,
        Mnemonic::Stosq => 7,
        _ => return None,
    })
}

/// Whether it is a move or fill by REP with 64-bit addresses and no segment's base.
pub(super) fn is_repeated(insn: &Instruction) -> bool {
    let plain = |kind: OpKind| match kind {
        OpKind::MemoryESRDI => true,
        OpKind::MemorySegRSI => {
            !matches!(insn.memory_segment(), iced_x86::Register::FS | iced_x86::Register::GS)
        }
        _ => kind == OpKind::Register,
    };
    insn.is_string_instruction()
        && insn.has_rep_prefix()
        && routine(insn).is_some()
        && insn.op_kinds().all(plain)
}

impl Translator<'_> {
    /// Flags are as before, whoever does it.
    pub(super) fn repeated(&mut self, d: &Decoded, op: Option<*const Op>) -> Option<()> {
        let routine = self.request.glue.strings[routine(&d.insn)?];
        self.lose_flags(d.live_in, R9);
        self.asm.mov_imm(R8, op? as u64);
        self.asm.call(routine);
        Some(())
    }
}

/// Writes the routines; `handler` runs the operation in R8, as it does here for what is left.
pub(super) fn emit(asm: &mut Asm, handler: u64) -> Strings {
    std::array::from_fn(|i| one(asm, handler, i < 4, i as u8 % 4))
}

/// One routine: elements of 1 << `size` bytes. R8 to R10 are lost.
fn one(asm: &mut Asm, handler: u64, moves: bool, size: u8) -> u64 {
    let at = asm.here();
    asm.store(TEMP, R8);
    let mut slow = Vec::new();
    asm.mem(&[], false, &[0xf7], 0, RFLAGS_REST);
    asm.imm32(fl::DF as u32);
    slow.push(asm.jcc_forward(NOT_EQUAL));
    let next = asm.here();
    asm.regs(true, &[0x85], RCX, RCX);
    let done = asm.jcc_forward(EQUAL);
    asm.load(R10, ATTENTION);
    asm.cmp_dword(Mem::At(R10, 0), 0);
    slow.push(asm.jcc_forward(NOT_EQUAL));
    // Elements up to the end of the page, of both, in R8.
    to_page_end(asm, R8, RDI);
    if moves {
        to_page_end(asm, R9, RSI);
        asm.regs(false, &[0x39], R8, R9);
        asm.regs(false, &[0x0f, 0x40 | BELOW], R8, R9); // cmovb r8d, r9d
    }
    if size > 0 {
        asm.shr32(R8, size);
        // One that straddles.
        slow.push(asm.jcc_forward(EQUAL));
    }
    asm.regs(true, &[0x39], RCX, R8);
    asm.regs(true, &[0x0f, 0x40 | ABOVE], R8, RCX); // cmova r8, rcx
    let mut pushed = None;
    if moves {
        slow.push(look_up(asm, RSI, TlbLayout::READ));
        asm.mem(&[], false, &[0xff], 6, Mem::At(R10, TlbLayout::DELTA)); // push
        pushed = Some(look_up(asm, RDI, TlbLayout::WRITE));
        asm.pop(R9);
    } else {
        slow.push(look_up(asm, RDI, TlbLayout::WRITE));
    }
    asm.load(R10, Mem::At(R10, TlbLayout::DELTA));
    asm.regs(true, &[0x87], RCX, R8); // xchg
    asm.regs(true, &[0x29], RCX, R8); // what is left, in R8
    move_by(asm, moves, 0x01);
    asm.byte(0xf3);
    match size {
        0 => {}
        1 => asm.byte(0x66),
        2 => {}
        _ => asm.byte(0x48),
    }
    asm.byte(if moves { 0xa4 } else { 0xaa } | u8::from(size > 0));
    move_by(asm, moves, 0x29);
    asm.mov(RCX, R8);
    asm.jmp(next);
    if let Some(forward) = pushed {
        asm.land(forward);
        asm.lea(RSP, Mem::At(RSP, 8));
    }
    slow.into_iter().for_each(|forward| asm.land(forward));
    asm.load(R8, TEMP);
    asm.jmp(handler);
    asm.land(done);
    asm.byte(0xc3);
    at
}

/// Bytes from the address in a register to the end of its page.
fn to_page_end(asm: &mut Asm, to: u8, address: u8) {
    asm.regs(false, &[0x89], address, to);
    asm.regs(false, &[0x81], 1, to); // or
    asm.imm32(-PAGE as u32);
    asm.regs(false, &[0xf7], 3, to); // neg
}

/// Finds the translation of the page that a register points to, in R10; R9 is lost. The jump is for when there is none.
fn look_up(asm: &mut Asm, address: u8, tag: i32) -> Forward {
    asm.regs(false, &[0x89], address, R10);
    tlb_entry(asm);
    asm.mov(R9, address);
    asm.and_imm(true, R9, -PAGE);
    asm.mem(&[], true, &[0x39], R9, Mem::At(R10, tag));
    asm.jcc_forward(NOT_EQUAL)
}

/// Moves the index registers from the guest's addresses to the host's, or back.
fn move_by(asm: &mut Asm, moves: bool, opcode: u8) {
    if moves {
        asm.regs(true, &[opcode], R9, RSI);
    }
    asm.regs(true, &[opcode], R10, RDI);
}
