//! Which status flags matter where, and where they are.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::PAGE;
use super::glue::STATUS;
use super::known::{Instructions, LONGEST};
use super::table::{Class, Info, STATUS_FLAGS};
use super::translate::{Decoded, Request, Translator};

/// Instructions looked at behind a jump to see whether flags are needed there.
pub(super) const FORESIGHT: usize = 6;
/// And bytes.
const FORESEEN_BYTES: usize = 40;

/// Works out backwards which flags matter where.
pub(super) fn liveness(insns: &mut [Decoded], request: &Request<'_>, instructions: &mut Instructions) {
    let Some(last) = insns.last() else { return };
    let mut live = if last.goes_on() { foresee(request, instructions, i64::from(last.end())) } else { 0 };
    for d in insns.iter_mut().rev() {
        match d.info.class {
            Class::Jump | Class::Call => live = foresee(request, instructions, d.target()),
            Class::Branch if live != STATUS_FLAGS => live |= foresee(request, instructions, d.target()),
            Class::Return | Class::JumpIndirect | Class::CallIndirect => live = STATUS_FLAGS,
            _ => {}
        }
        d.live_out = live;
        live = d.live_before(live);
        d.live_in = live;
    }
}

/// Whether flags must be put away before anything reads or partly changes them.
pub(super) fn loses_flags_first(insns: &[Decoded]) -> bool {
    for d in insns {
        match d.info.class {
            Class::Plain if d.memory.is_some() || d.info.vector || d.info.x87.is_some() => {
                return true;
            }
            Class::Plain if d.info.flags_read | d.info.flags_changed != 0 => return false,
            Class::Plain | Class::Lea | Class::Nothing => {}
            Class::Branch => return false,
            _ => return true,
        }
    }
    true
}

/// The status flags of which nothing remains behind an instruction.
pub(super) fn surely_changed(insn: &Instruction, info: &Info) -> u16 {
    const OVERFLOW: u16 = 0x800;
    if info.flags_changed == 0 {
        return 0;
    }
    match (always_counts(insn, info), leaves_overflow(insn)) {
        (false, _) => 0,
        (true, true) => info.flags_changed & !OVERFLOW,
        (true, false) => info.flags_changed,
    }
}

/// Rotates of a register by an immediate other than 1 leave OF alone, which is undefined by the book.
fn leaves_overflow(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Rol | Mnemonic::Ror)
        && insn.op0_kind() == OpKind::Register
        && insn.op1_kind() == OpKind::Immediate8
        && insn.immediate8() != 1
}

/// Whether a shift certainly shifts, and so changes the flags.
fn always_counts(insn: &Instruction, info: &Info) -> bool {
    if !info.counted {
        return true;
    }
    let last = insn.op_count().saturating_sub(1);
    match insn.op_kind(last) {
        OpKind::Register => false,
        OpKind::Immediate8 => {
            let size = insn.op0_register().size().max(insn.memory_size().size());
            // RCL and RCR of 8 and 16 bits count modulo 9 and 17.
            let count = insn.immediate8() & if size == 8 { 63 } else { 31 };
            count != 0 && size > 2
        }
        _ => true,
    }
}

/// Flags that may be read at an offset of the page before they are written.
pub(super) fn foresee(request: &Request<'_>, instructions: &mut Instructions, at: i64) -> u16 {
    if !(0..PAGE as i64).contains(&at) || !request.foresees {
        return STATUS_FLAGS;
    }
    if let Some(entry) = (request.known)(at as u16) {
        return entry.live;
    }
    let mut bytes = [0; FORESEEN_BYTES + LONGEST];
    let len = FORESEEN_BYTES.min(PAGE as usize - at as usize);
    (request.read)(at as usize, &mut bytes[..len]);
    let (mut unwritten, mut needed, mut at) = (STATUS_FLAGS, 0, 0);
    for _ in 0..FORESIGHT {
        let Some(first) = bytes[at..].first_chunk() else { break };
        let Some(known) = instructions.alike(first, len - at, request.key, request.cpuid) else { break };
        at += known.insn.len();
        needed |= known.live_before(0) & unwritten;
        unwritten &= known.live_before(STATUS_FLAGS);
        if unwritten & !needed == 0 || known.transfers {
            break;
        }
    }
    needed | unwritten
}

/// Where a block that may be part of a loop looks for attention: in front of the first instruction where no flags matter, or
/// of the first.
pub(super) fn poll_position(insns: &[Decoded]) -> Option<usize> {
    let first = insns.iter().position(Decoded::loops)?;
    Some(insns[..=first].iter().position(|d| d.live_in == 0).unwrap_or(0))
}

impl Translator<'_> {
    /// Status flags are about to be lost: puts them away if anybody may want them.
    pub(super) fn lose_flags(&mut self, live: u16, scratch: u8) {
        if live != 0 && !self.in_memory && self.in_host {
            self.asm.save_flags(STATUS, scratch);
            self.in_memory = true;
        }
        self.in_host = false;
    }

    /// Status flags are about to be read, or partly changed. Whether they had to be loaded, for which `scratch` was used.
    pub(super) fn want_flags(&mut self, scratch: u8) -> bool {
        let load = !self.in_host && self.in_memory;
        if load {
            self.asm.load_flags(STATUS, scratch);
            self.in_host = true;
        }
        load
    }

    /// Status flags must be in memory.
    pub(super) fn store_flags(&mut self, live: u16, scratch: u8) {
        if live != 0 && !self.in_memory && self.in_host {
            self.asm.save_flags(STATUS, scratch);
            self.in_memory = true;
        }
    }
}
