//! Where control goes: jumps, calls, returns, and looks for attention.

use iced_x86::OpKind;

use super::PAGE;
use super::access::{Expected, Place};
use super::asm::{ABOVE, Asm, Forward, Mem, NOT_EQUAL, R8, R9, R10, RCX, RSP};
use super::glue::{ATTENTION, BASE, BOTTOM, LIMIT, ORIGIN, TEMP, home};
use super::help::Wanted;
use super::operands::{host, is_homed, number};
use super::stack::Pushed;
use super::stubs::Stub;
use super::translate::{Decoded, Link, Translator};

/// Encoding of iced's condition codes, which start with none.
pub(super) fn condition(code: u8) -> u8 {
    // o no b ae e ne be a s ns p np l ge le g, in that order.
    code.wrapping_sub(1) & 15
}

impl Translator<'_> {
    pub(super) fn poll(&mut self, d: &Decoded) {
        self.window = None;
        let save_flags = d.live_in != 0 && self.in_host && !self.in_memory;
        self.asm.load(R9, ATTENTION);
        let from = if d.live_in == 0 || !self.in_host {
            self.asm.cmp_dword(Mem::At(R9, 0), 0);
            self.in_host = false;
            self.asm.jcc_forward(NOT_EQUAL)
        } else {
            // JRCXZ looks at no flags.
            self.asm.mov(R10, RCX);
            self.asm.load32(RCX, Mem::At(R9, 0));
            self.asm.bytes(&[0xe3, 0]); // jrcxz over the next two
            let over = self.asm.code.len();
            self.asm.mov(RCX, R10);
            let from = self.asm.jmp_forward();
            self.asm.code[over - 1] = (self.asm.code.len() - over) as u8;
            self.asm.mov(RCX, R10);
            from
        };
        self.stubs.push(Stub::Leave { from, at: d.at, save_flags });
    }

    /// Goes on at an offset of the page, if a condition holds. A block that is there already is jumped to.
    pub(super) fn edge(&mut self, condition: Option<u8>, target: i64, live: u16) {
        let jump = |a: &mut Asm| match condition {
            Some(cc) => a.jcc_forward(cc),
            None => a.jmp_forward(),
        };
        // Where flags are nowhere, nobody wants them.
        let in_host = self.in_host && live != 0 && !self.in_memory;
        if !(0..PAGE as i64).contains(&target) {
            let from = jump(&mut self.asm);
            self.stubs.push(Stub::Far { from, target, save_flags: in_host });
            return;
        }
        let target = target as u16;
        let known = if !self.request.chain {
            None
        } else if target == self.start {
            Some(self.entry)
        } else {
            (self.request.known)(target)
        };
        if let Some(entry) = known {
            let to = if self.in_host { entry.from_host } else { entry.from_memory };
            match condition {
                Some(cc) => self.asm.jcc(cc, to),
                None => self.asm.jmp(to),
            }
            return;
        }
        let from = jump(&mut self.asm);
        self.link(from, target, in_host);
    }

    /// Number of the next link.
    pub(super) fn next_link(&self) -> u32 {
        self.request.first_link + self.links.len() as u32
    }

    pub(super) fn link(&mut self, from: Forward, target: u16, save_flags: bool) {
        let number = self.next_link();
        let end = self.asm.origin + from.0 as u64;
        self.links.push(Link { end, target, in_host: self.in_host, far: false });
        self.stubs.push(Stub::Link { from, number, target, save_flags });
    }

    /// The return address, in R9, is on the guest's stack: puts it on the host's too, which has room.
    pub(super) fn foresee_return(&mut self) {
        let a = &mut self.asm;
        a.mem(&[], true, &[0x3b], RSP, LIMIT);
        a.bytes(&[0x70 | ABOVE, 9]); // ja over the next
        let at = a.code.len();
        a.load(RSP, BOTTOM);
        debug_assert_eq!(a.code.len() - at, 9);
        a.push(R9);
    }

    /// Behind a host call: the guest has returned, to what is in R8.
    pub(super) fn returned(&mut self, next: u16) {
        self.x87_based = false;
        let a = &mut self.asm;
        a.pop(R9);
        a.regs(true, &[0x39], R9, R8);
        a.jcc(NOT_EQUAL, self.request.glue.unforeseen);
        (self.in_host, self.in_memory) = (false, true);
        if u64::from(next) >= PAGE {
            self.asm.jmp(self.request.glue.dispatch);
            self.reachable = false;
            return;
        }
        self.asm.and_imm(true, R8, -4096);
        self.asm.store(BASE, R8);
    }

    pub(super) fn call(&mut self, d: &Decoded) {
        let target = d.target();
        self.store_flags(d.live_in, R9);
        self.push_register(d, Pushed::Return(d.end()));
        self.foresee_return();
        self.in_host = false;
        if (0..PAGE as i64).contains(&target) {
            let known = if self.request.chain { (self.request.known)(target as u16) } else { None };
            match known {
                Some(entry) => self.asm.call(entry.from_memory),
                None => {
                    let from = self.asm.call_forward();
                    self.link(from, target as u16, false);
                }
            }
        } else {
            self.asm.load(R8, BASE);
            self.asm.add_target_to_r8(target, self.request.key.small());
            if self.request.chain {
                self.asm.mov_imm32(R9, self.next_link());
                self.asm.call(self.request.glue.leave_to_link);
                let (end, target) = (self.asm.here(), (target & 0xfff) as u16);
                self.links.push(Link { end, target, in_host: false, far: true });
            } else {
                self.asm.call(self.request.glue.dispatch_at_once);
            }
        }
        self.returned(d.end());
    }

    /// Tells which instruction leads to an address that may be none.
    pub(super) fn note_origin(&mut self, d: &Decoded, dropped: i32) {
        self.asm.mem(&[], false, &[0xc7], 0, ORIGIN);
        self.asm.imm32(super::Origin::new(d.at, dropped).0);
    }

    pub(super) fn ret(&mut self, d: &Decoded) {
        if self.small() {
            return self.ret_small(d);
        }
        self.lose_flags(d.live_in, R9);
        let more = if d.insn.op_count() == 1 { d.insn.immediate16() } else { 0 };
        let wanted = Wanted::new(d.at, d.insn.len() as u8, 8, false).on_stack(true);
        self.check(Place::Stack(0), wanted, Expected::default());
        self.return_checked(d, i32::from(more));
    }

    pub(super) fn indirect(&mut self, d: &Decoded, call: bool) -> Option<()> {
        let insn = &d.insn;
        self.lose_flags(d.live_in, R9);
        if self.small() {
            self.indirect_target_small(d)?;
        } else if insn.op0_kind() == OpKind::Memory {
            let place = self.place(d, Expected::default())?;
            let wanted = self.wanted(d, 8, false);
            self.check(place, wanted, Expected::default());
            self.asm.load(R8, place.mem());
        } else {
            let n = number(insn.op0_register())?;
            if is_homed(n) {
                self.asm.load(R8, home(n));
            } else {
                self.asm.mov(R8, host(n));
            }
        }
        if !call {
            self.note_origin(d, 0);
            self.asm.jmp(self.request.glue.dispatch);
            return Some(());
        }
        self.asm.store(TEMP, R8);
        self.push_register(d, Pushed::Return(d.end()));
        self.foresee_return();
        self.asm.load(R8, TEMP);
        self.note_origin(d, -8);
        self.asm.call(self.request.glue.dispatch);
        self.returned(d.end());
        Some(())
    }
}
