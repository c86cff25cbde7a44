//! x87: the guest's registers in the host's, and where its instruction pointer gets its value from.
//!
//! The host notes the address of each x87 instruction, which is not the guest's; so translated code notes where the guest's
//! stands, and FIP is put right when the state is saved. Exceptions are masked while the state is in the host's registers: what
//! unmasks one is left to its handler, and makes other code of what follows.

use std::mem::offset_of;

use super::access::Expected;
use super::asm::{Asm, EQUAL, Mem, NOT_EQUAL, R10, RAX, RDX};
use super::glue::{BASE, TEMP, X87, X87_AT, X87_BASE, home};
use super::stubs::Stub;
use super::translate::{Decoded, Translator};
use crate::cpu::Cpu;
use crate::native::{self, FCW_MASKS, FrameLayout, component};
use crate::op::Op;

/// No offset in a page: no x87 instruction has run since the state was loaded.
pub(in crate::jit) const NONE: u32 = u32::MAX;

/// Writes the routine that makes the x87 registers the guest's. R10 and flags are lost.
pub(super) fn emit_load(asm: &mut Asm) -> u64 {
    let at = asm.here();
    asm.store(home(RAX), RAX);
    asm.store(home(RDX), RDX);
    reload(asm);
    asm.mem(&[], false, &[0xc6], 0, X87);
    asm.byte(1);
    asm.load(RAX, home(RAX));
    asm.load(RDX, home(RDX));
    asm.byte(0xc3);
    at
}

/// Loads the state. RAX, RDX, R10 and flags are lost.
pub(super) fn reload(asm: &mut Asm) {
    asm.load(R10, Mem::Cpu(offset_of!(Cpu, fpu) as i32));
    asm.mov_imm32(RAX, component::X87 as u32);
    asm.regs(false, &[0x31], RDX, RDX); // xor
    asm.store(Mem::At(R10, FrameLayout::X87_COMPONENTS), RAX);
    asm.mem(&[], true, &[0x0f, 0xae], 5, Mem::At(R10, FrameLayout::X87)); // xrstor64
}

/// Saves it, FIP put right, and leaves the unit as the host wants it. RAX, RDX, R10 and flags are lost.
pub(super) fn save(asm: &mut Asm) {
    asm.load(R10, Mem::Cpu(offset_of!(Cpu, fpu) as i32));
    asm.mov_imm32(RAX, component::X87 as u32);
    asm.regs(false, &[0x31], RDX, RDX); // xor
    asm.mem(&[], true, &[0x0f, 0xae], 4, Mem::At(R10, FrameLayout::X87)); // xsave64
    asm.bytes(&[0xdb, 0xe3]); // fninit
    asm.load32(RAX, X87_AT);
    asm.bytes(&[0x83, 0xf8, 0xff]); // cmp eax, NONE
    let none = asm.jcc_forward(EQUAL);
    asm.mem(&[], true, &[0x03], RAX, X87_BASE);
    asm.store(Mem::At(R10, FrameLayout::FIP), RAX);
    note(asm, NONE);
    asm.land(none);
}

fn note(asm: &mut Asm, at: u32) {
    asm.mem(&[], false, &[0xc7], 0, X87_AT);
    asm.imm32(at);
}

impl Translator<'_> {
    /// Makes the x87 registers the guest's.
    pub(super) fn want_x87(&mut self, live: u16) {
        if !self.x87 {
            self.x87 = true;
            self.lose_flags(live, R10);
            self.asm.cmp_byte(X87, 0);
            let from = self.asm.jcc_forward(EQUAL);
            let resume = self.asm.label();
            self.stubs.push(Stub::X87 { from, resume });
        }
        if !self.x87_based {
            self.x87_based = true;
            self.asm.load(R10, BASE);
            self.asm.store(X87_BASE, R10);
        }
    }

    /// Notes that an instruction, if it is one of x87, was executed.
    pub(super) fn note_x87(&mut self, d: &Decoded) {
        match d.info.x87 {
            Some(native::X87::Points) => note(&mut self.asm, u32::from(d.at)),
            Some(native::X87::Clears) => note(&mut self.asm, NONE),
            _ => {}
        }
    }

    /// FLDCW: the value is looked at before it is loaded, from where no other processor changes it.
    pub(super) fn load_control(&mut self, d: &Decoded, op: Option<*const Op>) -> Option<()> {
        self.want_x87(d.live_in);
        self.lose_flags(d.live_in, R10);
        let place = self.place(d, Expected::default())?;
        let wanted = self.wanted(d, 2, false);
        self.check(place, wanted, Expected::default());
        let scratch = *place.scratch().last()?;
        let a = &mut self.asm;
        a.mem(&[], false, &[0x0f, 0xb7], scratch, place.mem()); // movzx
        a.mem(&[], false, &[0x89], scratch, TEMP);
        a.and_imm(false, scratch, i32::from(FCW_MASKS));
        a.bytes(&[0x41, 0x83, 0xf8 | scratch & 7, FCW_MASKS as u8]); // cmp
        let from = vec![a.jcc_forward(NOT_EQUAL)];
        a.mem(&[], false, &[0xd9], 5, TEMP);
        let resume = a.code.len();
        self.stubs.push(Stub::Handler { from, op: op? as u64, resume });
        Some(())
    }
}
