//! Reads of what a kernel has mapped in one piece: see [`crate::mmu::Stretch`].
//!
//! Where a block is translated it is about to run, so that its registers are known, and what they point to: where that lies in a
//! stretch, so it will the next time, most likely. Code for such a read looks at that stretch alone, and not among the
//! translations; where it was wrong, they are looked at out of the way.
//!
//! R9 is zero then, and R8 what is to be added to addresses in the stretch. Further reads near by have but to see that it is
//! zero, as long as nothing has changed the registers that they are addressed by.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::Key;
use super::access::{Address, Place, Window, written};
use super::asm::{BELOW, Mem, NOT_EQUAL, R8, R9, R10};
use super::glue::{STRETCH_BASE, STRETCH_DELTA, STRETCH_LEN};
use super::help::Wanted;
use super::operands::{has_small_address, number, operand_number};
use super::stubs::Find;
use super::table::Class;
use super::translate::{Decoded, Translator};
use crate::cpu::{Cpu, seg};
use crate::mmu::TlbLayout;

/// Registers that a call leaves alone, by bit: RBX, RSP, RBP, and R12 to R15.
const KEPT_BY_CALLS: u16 = 0b1111_0000_0011_1000;

/// What the processor sees where a block begins.
pub(super) struct Sight<'a> {
    cpu: &'a Cpu,
    /// What the registers hold, as far as it is known.
    registers: [Option<u64>; 16],
    /// The page that runs.
    page: u64,
}

impl Cpu {
    /// What it sees now, about to run code at `linear`, if that may read a stretch.
    pub(super) fn sight(&self, key: Key, linear: u64) -> Option<Sight<'_>> {
        (!key.user() && !key.small()).then(|| Sight {
            cpu: self,
            registers: std::array::from_fn(|n| Some(self.regs.gpr(n))),
            page: linear & !(super::PAGE - 1),
        })
    }
}

impl Sight<'_> {
    /// The address of the memory operand.
    fn address(&self, d: &Decoded) -> Option<u64> {
        let insn = &d.insn;
        let of = |register: Register| match register {
            Register::None => Some(0),
            register => self.registers[usize::from(number(register)?)],
        };
        let offset = match insn.memory_base() {
            _ if has_small_address(insn) => return None,
            Register::RIP => self.page.wrapping_add(d.relative() as u64),
            base => of(base)?.wrapping_add(insn.memory_displacement64()),
        };
        let index = of(insn.memory_index())?.wrapping_mul(u64::from(insn.memory_index_scale()));
        let segment = match insn.memory_segment() {
            Register::FS => self.cpu.segs[seg::FS].base,
            Register::GS => self.cpu.segs[seg::GS].base,
            _ => 0,
        };
        Some(offset.wrapping_add(index).wrapping_add(segment))
    }

    /// What an operand is, extended with zeros, and its size.
    fn operand(&self, d: &Decoded, i: u32) -> Option<(u64, usize)> {
        let insn = &d.insn;
        let (value, size) = match insn.op_kind(i) {
            OpKind::Register => {
                (self.registers[usize::from(operand_number(insn, i)?)]?, insn.op_register(i).size())
            }
            OpKind::Memory => {
                let size = insn.memory_size().size();
                (self.cpu.glimpse(self.address(d)?, size)?, size)
            }
            _ => (insn.try_immediate(i).ok()?, 8),
        };
        Some((value & u64::MAX >> (64 - 8 * size.clamp(1, 8)), size))
    }

    /// What an instruction puts into its first operand, if it is one of those that addresses are made by.
    fn result(&self, d: &Decoded) -> Option<u64> {
        use Mnemonic as M;
        let insn = &d.insn;
        let first = || self.operand(d, 0).map(|o| o.0);
        let second = || self.operand(d, 1).map(|o| o.0);
        let result = match insn.mnemonic() {
            M::Lea => self.address(d),
            M::Mov | M::Movzx => second(),
            M::Movsx | M::Movsxd => self.operand(d, 1).map(|(value, size)| {
                let unused = 64 - 8 * size.clamp(1, 8);
                ((value << unused) as i64 >> unused) as u64
            }),
            M::Xor if insn.op0_register() == insn.op1_register() => Some(0),
            M::Add => Some(first()?.wrapping_add(second()?)),
            M::Sub => Some(first()?.wrapping_sub(second()?)),
            M::And => Some(first()? & second()?),
            M::Or => Some(first()? | second()?),
            M::Shl => Some(first()? << (second()? & 63)),
            M::Shr => Some(first()? >> (second()? & 63)),
            M::Inc => Some(first()?.wrapping_add(1)),
            M::Dec => Some(first()?.wrapping_sub(1)),
            _ => None,
        };
        match insn.op0_register().size() {
            8 => result,
            4 => result.map(|value| value & u64::from(u32::MAX)),
            _ => None,
        }
    }

    /// Goes past an instruction.
    fn pass(&mut self, d: &Decoded) {
        let changed = match d.info.class {
            Class::Call | Class::CallIndirect => !KEPT_BY_CALLS,
            Class::Handler => !0,
            _ => written(&d.insn, &d.info),
        };
        let result = self.result(d);
        for n in (0..16).filter(|n| changed >> n & 1 != 0) {
            self.registers[n] = None;
        }
        if let (Class::Plain | Class::Lea, Some(n)) = (d.info.class, operand_number(&d.insn, 0))
            && changed >> n & 1 != 0
        {
            self.registers[usize::from(n)] = result;
        }
    }
}

/// Looks for reads of stretches.
pub(super) fn foresee_stretches(insns: &mut [Decoded], mut sight: Sight<'_>) {
    for d in insns {
        if d.info.class == Class::Plain
            && d.memory.is_some()
            && !d.expected.write
            && !d.info.aligned
            && d.insn.memory_base() != Register::RSP
        {
            d.expected.stretch = sight.address(d).and_then(|address| sight.cpu.tlb.stretch(address));
        }
        sight.pass(d);
    }
}

/// Whether it writes to no general registers but its operands.
fn writes_operands_only(insn: &Instruction) -> bool {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea | M::Cmp | M::Test => true,
        M::Add | M::Adc | M::Sub | M::Sbb | M::And | M::Or | M::Xor | M::Inc | M::Dec | M::Neg | M::Not => {
            true
        }
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Bt | M::Bts | M::Btr | M::Btc => true,
        M::Imul => insn.op_count() > 1,
        _ => insn.condition_code() != iced_x86::ConditionCode::None,
    }
}

fn field(first: Mem, stretch: usize) -> Mem {
    match first {
        Mem::Cpu(at) => Mem::Cpu(at + (stretch * TlbLayout::STRETCH_SIZE) as i32),
        other => other,
    }
}

impl Translator<'_> {
    /// Looks whether the address lies in a stretch, and remembers that.
    pub(super) fn check_stretch(&mut self, address: Address, wanted: Wanted, stretch: usize) {
        let a = &mut self.asm;
        if address.simple().is_some() {
            address.put(a, true, R9, 0);
        } else {
            address.put(a, true, R10, 0);
            a.mov(R9, R10);
        }
        a.mem(&[], true, &[0x2b], R9, field(STRETCH_BASE, stretch)); // sub
        a.mem(&[], true, &[0x3b], R9, field(STRETCH_LEN, stretch)); // cmp
        let from = a.jcc_forward(BELOW ^ 1); // ae
        a.load(R8, field(STRETCH_DELTA, stretch));
        a.regs(false, &[0x31], R9, R9); // xor
        self.miss([Some(from), None], Place::Sum(address), wanted, Find::LookUp);
        self.window = Some(Window::stretch(address));
    }

    /// Looks whether an address near by was found to lie in a stretch: then this one does too.
    pub(super) fn check_same_stretch(&mut self, address: Address, wanted: Wanted) {
        let a = &mut self.asm;
        a.regs(false, &[0x85], R9, R9); // test
        let from = a.jcc_forward(NOT_EQUAL);
        if address.simple().is_none() {
            address.put(a, true, R10, 0);
        }
        self.miss([Some(from), None], Place::Sum(address), wanted, Find::LookUp);
    }

    /// An instruction was translated: nothing is known of an address that it may have changed.
    pub(super) fn leave_stretch(&mut self, d: &Decoded) {
        let keeps = |w: &Window| {
            matches!(d.info.class, Class::Nothing | Class::Branch)
                || writes_operands_only(&d.insn) && written(&d.insn, &d.info) & w.registers() == 0
        };
        if self.window.is_some_and(|w| w.is_stretch() && !keeps(&w)) {
            self.window = None;
        }
    }
}
