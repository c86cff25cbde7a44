//! Operands: registers that have other places here, and memory.

use iced_x86::{Instruction, OpKind, Register};

use super::access::Place;
use super::asm::{BELOW, Mem, R8, R9, R10, R11, R15, RSP};
use super::encode::{self, Parts};
use super::glue::{BASE, VECTORS, home, segment_base};
use super::help::Wanted;
use super::strings;
use super::stubs::Stub;
use super::table::{Class, Field, Info};
use super::translate::{Decoded, Translator};
use super::vectors::{LOW_VECTORS, MORE_VECTORS, WHOLE_VECTORS};
use super::{Key, PAGE};
use crate::cpu::seg;

/// Numbers of general registers by iced's names, whatever part of them is named, and [`NO_NUMBER`] for all others.
const NUMBERS: [u8; 256] = {
    let mut numbers = [NO_NUMBER; 256];
    let mut n = 0;
    while n < 16 {
        // AL, CL, DL, BL, AH, CH, DH, BH, SPL and so on.
        numbers[Register::AL as usize + n + if n < 4 { 0 } else { 4 }] = n as u8;
        numbers[Register::AX as usize + n] = n as u8;
        numbers[Register::EAX as usize + n] = n as u8;
        numbers[Register::RAX as usize + n] = n as u8;
        n += 1;
    }
    while n < 20 {
        numbers[Register::AH as usize + n - 16] = n as u8 - 16;
        n += 1;
    }
    numbers
};
const NO_NUMBER: u8 = u8::MAX;

/// Number of a general register.
#[inline(always)]
pub(super) fn number(register: Register) -> Option<u8> {
    Some(NUMBERS[register as u8 as usize]).filter(|&n| n != NO_NUMBER)
}

/// Whether a guest register stays in memory: R9 to R11, and R15, which compilers take last.
pub(super) fn is_homed(n: u8) -> bool {
    matches!(n, 9..=11 | 15)
}

/// Host register of a guest register that has one.
pub(super) fn host(n: u8) -> u8 {
    match n {
        RSP => R11,
        R8 => R15,
        _ => n,
    }
}

/// The host's register for one of the guest's, if it is another.
pub(super) fn moved(n: Option<u8>) -> Option<u8> {
    n.filter(|&n| host(n) != n).map(host)
}

/// Number of the general register that an operand is. Where there is no operand, or another, iced names no register.
#[inline(always)]
pub(super) fn operand_number(insn: &Instruction, i: u32) -> Option<u8> {
    number(insn.op_register(i))
}

/// Whether the memory operand has a 32-bit address.
pub(super) fn has_small_address(insn: &Instruction) -> bool {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let absolute = base == Register::None && index == Register::None;
    let small = |register| (Register::EAX..=Register::R15D).contains(&register) || register == Register::EIP;
    small(base) || small(index) || absolute && insn.memory_displ_size() == 4
}

pub(super) fn has_high_byte(insn: &Instruction) -> bool {
    let high = |i| matches!(insn.op_register(i), Register::AH | Register::BH | Register::CH | Register::DH);
    (0..4).any(high)
}

/// Which operand is in memory: never the fifth.
#[inline(always)]
pub(super) fn memory_operand(insn: &Instruction) -> Option<u32> {
    // One by one, as the decoder wrote them just now: processors wait for bytes that are read together.
    match OpKind::Memory {
        kind if kind == insn.op0_kind() => Some(0),
        kind if kind == insn.op1_kind() => Some(1),
        kind if kind == insn.op2_kind() => Some(2),
        kind if kind == insn.op3_kind() => Some(3),
        _ => None,
    }
}

/// Whether the interpreter's handler is to run an instruction, whatever its code promises.
pub(super) fn needs_handler(insn: &Instruction, info: &Info, key: Key) -> bool {
    let memory = info.memory;
    if !memory && info.simple {
        // With other registers in it, it might have more than 15 bytes.
        return insn.len() > 14;
    }
    // An address that is not the sum of 64-bit registers and a displacement.
    let far = |address: u64| i32::try_from(address as i64).is_err();
    let odd = memory
        && match insn.memory_base() {
            Register::EIP => true,
            // Wherever in its page the instruction stands.
            Register::RIP => {
                let at = insn.ip_rel_memory_address();
                far(at) || far(at.wrapping_add(PAGE))
            }
            _ => far(insn.memory_displacement64()) && !has_small_address(insn),
        };
    match info.class {
        Class::Plain => {
            let unavailable = info.vector && !key.sse()
                || info.avx && !key.avx()
                || info.avx512 && !key.avx512()
                || (info.arithmetic || info.x87.is_some()) && !key.masked()
                || info.x87.is_some() && !key.sse();
            // High bytes allow no REX prefix, which the stand-in for RSP needs.
            let clash =
                info.narrow && has_high_byte(insn) && (0..4).any(|i| operand_number(insn, i) == Some(RSP));
            // F3 makes one form of XCHG another instruction.
            let repeated = insn.has_rep_prefix() && insn.mnemonic() == iced_x86::Mnemonic::Xchg;
            // With other registers in the operand it might have more than 15 bytes.
            let long = insn.len() > if memory { 12 } else { 14 };
            unavailable || info.strange || odd || clash || repeated || long
        }
        Class::Lea => odd || info.strange,
        Class::Push | Class::JumpIndirect | Class::CallIndirect => {
            odd || memory && insn.memory_size().size() != key.word()
        }
        Class::Pop => memory,
        Class::Divide => odd,
        Class::LoadControl => odd || !key.sse() || !key.masked(),
        Class::Repeated => !strings::is_repeated(insn),
        _ => false,
    }
}

impl Translator<'_> {
    /// Puts the effective address of the memory operand, segment base included, into R8. R9 and R10 are lost. `None`: not
    /// an address that code can be made for.
    pub(super) fn address(&mut self, d: &Decoded) -> Option<()> {
        let insn = &d.insn;
        match insn.memory_base() {
            Register::RIP => {
                let at = d.relative();
                self.asm.load(R8, BASE);
                self.asm.add_to_r8(at);
            }
            Register::EIP => return None,
            _ => self.sum(R8, insn, true)?,
        }
        let segment = match insn.memory_segment() {
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => return Some(()),
        };
        self.asm.load(R9, segment_base(segment));
        if self.small() {
            self.add_base_small(d);
            return Some(());
        }
        self.asm.lea(R8, Mem::Sum(Some(R8), Some((R9, 0)), 0));
        Some(())
    }

    /// LEA of the memory operand's offset, cut to the address size, and to 32 bits unless `wide`.
    pub(super) fn sum(&mut self, to: u8, insn: &Instruction, wide: bool) -> Option<()> {
        let mem = self.operand(insn)?;
        self.asm.mem(&[], wide && !has_small_address(insn), &[0x8d], to, mem);
        Some(())
    }

    /// The memory operand with registers that hold it: those that stay in memory are loaded into R10, and R9 if need be.
    pub(super) fn operand(&mut self, insn: &Instruction) -> Option<Mem> {
        let mut place = |register: Register, scratch: u8| match number(register) {
            Some(n) if is_homed(n) => {
                self.asm.load(scratch, home(n));
                Some(scratch)
            }
            Some(n) => Some(host(n)),
            None => None,
        };
        let base = place(insn.memory_base(), R10);
        let index = place(insn.memory_index(), if base == Some(R10) { R9 } else { R10 });
        if index.is_some_and(|index| index == R9) {
            self.window = None;
        }
        let index = index.map(|i| (i, insn.memory_index_scale().trailing_zeros() as u8));
        let displacement = insn.memory_displacement64() as i64;
        let disp = match i32::try_from(displacement) {
            Ok(disp) => disp,
            // A 32-bit address' displacement is not sign-extended.
            Err(_) if has_small_address(insn) => displacement as i32,
            Err(_) => return None,
        };
        Some(Mem::Sum(base, index, disp))
    }

    pub(super) fn wanted(&self, d: &Decoded, size: usize, write: bool) -> Wanted {
        let over = matches!(d.insn.memory_segment(), Register::FS | Register::GS);
        let base = d.insn.memory_base();
        let stack = !over && matches!(base, Register::RSP | Register::RBP | Register::ESP | Register::EBP);
        Wanted::new(d.at, d.insn.len() as u8, size as u8, write).on_stack(stack)
    }

    /// Makes the vector registers the guest's that an instruction needs.
    pub(super) fn want_vectors(&mut self, live: u16, info: &Info) {
        let wanted = match info {
            Info { wide: true, .. } => WHOLE_VECTORS,
            Info { avx512: true, .. } => MORE_VECTORS,
            Info { vector: true, .. } => LOW_VECTORS,
            _ => return,
        };
        if self.vectors >= wanted {
            return;
        }
        self.vectors = wanted;
        self.lose_flags(live, R10);
        self.asm.cmp_byte(VECTORS, wanted);
        let from = self.asm.jcc_forward(BELOW);
        let resume = self.asm.code.len();
        self.stubs.push(Stub::Vectors { from, resume, wanted });
    }

    pub(super) fn plain(&mut self, d: &Decoded) -> Option<()> {
        let (insn, info) = (&d.insn, &d.info);
        let memory = d.memory;
        self.want_vectors(d.live_in, info);
        if info.x87.is_some() {
            self.want_x87(d.live_in);
        }
        let mut place = Place::None;
        if let Some(operand) = memory {
            let write = info.written >> operand & 1 != 0;
            let size = insn.memory_size().size();
            let aligned = info.aligned || insn.mnemonic() == iced_x86::Mnemonic::Cmpxchg16b;
            self.lose_flags(d.live_in, R10);
            place = self.place(d, d.expected)?;
            let wanted = self
                .wanted(d, size, write)
                .aligned(aligned && size.is_power_of_two())
                .masked(insn.op_mask() != Register::None);
            self.check(place, wanted, d.expected);
        }
        // The flags that it reads, and those that it leaves alone.
        let keeps = || info.flags_changed != 0 && d.live_out & !d.changes != 0;
        if info.flags_read != 0 || keeps() {
            let scratch = place.scratch().last().copied().unwrap_or(R9);
            if self.want_flags(scratch) && scratch != R10 {
                self.window = None;
            }
        }
        if memory.is_none() && !d.moved {
            let start = self.asm.code.len();
            d.text.write(&mut self.asm);
            self.asm.one_since(start);
        } else if let Some(form) = &d.form {
            form.emit(&mut self.asm, &d.text, place.mem());
        } else {
            let parts = encode::split(d.text.as_slice(), info)?;
            self.rewritten(d, parts, memory.is_some(), d.high, place)?;
        }
        if info.flags_changed != 0 {
            (self.in_host, self.in_memory) = (true, false);
        }
        self.note_x87(d);
        self.notice_written(d);
        Some(())
    }

    /// Writes an instruction with its operands where they are now: a register that stays in memory is read and written there,
    /// if the instruction can, else loaded before and stored after.
    pub(super) fn rewritten(
        &mut self,
        d: &Decoded,
        mut parts: Parts,
        memory: bool,
        high: bool,
        place: Place,
    ) -> Option<()> {
        let (insn, info) = (&d.insn, &d.info);
        let mut exchanged = None;
        let mut mem = place.mem();
        let numbers: [Option<u8>; 4] = std::array::from_fn(|i| operand_number(insn, i as u32));
        let homed = |i: usize| numbers[i].filter(|&n| is_homed(n));
        if (0..4).all(|i| homed(i).is_none()) {
            parts.emit(&mut self.asm, info, high, mem, None, numbers.map(moved));
            return Some(());
        }
        let mut at_home = None;
        if !memory {
            let first = info.fields.iter().position(|&f| f == Field::Rm);
            let second = info.fields.iter().position(|&f| f == Field::Reg);
            let usable = |i: usize| homed(i).is_some() && self.may_stay_home(insn, info, i);
            if let Some(i) = first.filter(|&i| usable(i) && info.rm_or_mem) {
                at_home = Some(i);
            } else if let (Some(first), Some(i)) = (first, second)
                && homed(first).is_none()
                && usable(i)
            {
                let mut opcode = 0;
                if parts.exchange(&mut opcode) {
                    exchanged = Some(opcode);
                    at_home = Some(i);
                }
            }
            if let Some(n) = at_home.and_then(homed) {
                mem = home(n);
            }
        }
        let written_only = matches!(
            insn.mnemonic(),
            iced_x86::Mnemonic::Mov
                | iced_x86::Mnemonic::Movzx
                | iced_x86::Mnemonic::Movsx
                | iced_x86::Mnemonic::Movsxd
        ) && insn.op0_register().size() >= 4;
        // What is free, for the registers that must be loaded.
        let mut free = place.scratch();
        let mut placed: [Option<(u8, u8)>; 4] = [None; 4];
        for i in 0..4 {
            let Some(n) = homed(i) else { continue };
            if at_home == Some(i) || placed.iter().flatten().any(|p| p.0 == n) {
                continue;
            }
            let (&scratch, others) = free.split_last()?;
            free = others;
            if scratch != R10 {
                self.window = None;
            }
            placed[i] = Some((n, scratch));
            let read_elsewhere = (1..4).any(|k| k != i && homed(k) == Some(n));
            if !(i == 0 && written_only && !read_elsewhere) {
                self.asm.load(scratch, home(n));
            }
        }
        let placed_at = |n: u8| placed.iter().flatten().find(|p| p.0 == n).map(|p| p.1);
        let registers = std::array::from_fn(|i| match numbers[i]? {
            _ if at_home == Some(i) => None,
            n if is_homed(n) => placed_at(n),
            n => moved(Some(n)),
        });
        parts.emit(&mut self.asm, info, high, mem, exchanged, registers);
        for i in 0..4 {
            if info.written >> i & 1 != 0
                && at_home != Some(i)
                && let Some(scratch) = homed(i).and_then(placed_at)
            {
                self.asm.store(home(homed(i)?), scratch);
            }
        }
        Some(())
    }

    /// Whether an instruction may work on a register's home instead of the register.
    pub(super) fn may_stay_home(&self, insn: &Instruction, info: &Info, i: usize) -> bool {
        use iced_x86::Mnemonic as M;
        let size = insn.op_register(i as u32).size();
        let n = operand_number(insn, i as u32);
        // Two operands of one register would see each other; with memory these are locked, or reach beyond it.
        let alone = (0..4).filter(|&k| operand_number(insn, k) == n).count() == 1;
        let other =
            matches!(insn.mnemonic(), M::Xchg | M::Xadd | M::Cmpxchg | M::Bt | M::Bts | M::Btr | M::Btc);
        // Writing 32 bits clears the rest of a register; writing fewer makes the next load wait.
        // Vector instructions write less to memory than to a register; rotates and shifts leave other flags there.
        let whole = info.written >> i & 1 == 0 || size == 8 && !info.vector && !info.counted;
        // A field of the processor makes it longer by up to six bytes, of which no instruction has more than 15.
        alone && !other && whole && insn.len() <= 9
    }

    pub(super) fn lea(&mut self, d: &Decoded) -> Option<()> {
        let insn = &d.insn;
        let n = number(insn.op0_register())?;
        let wide = insn.op0_register().size() == 8;
        let to = if is_homed(n) { R10 } else { host(n) };
        if insn.memory_base() == Register::RIP {
            self.asm.load(R10, BASE);
            let disp = i32::try_from(d.relative()).ok()?;
            self.asm.mem(&[], wide, &[0x8d], to, Mem::At(R10, disp));
        } else {
            self.sum(to, insn, wide)?;
        }
        if is_homed(n) {
            self.asm.store(home(n), to);
        }
        Some(())
    }
}
