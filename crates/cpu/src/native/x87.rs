//! x87 and MMX: thunks round an FXSAVE image, the last-instruction pointers put right, and the instructions that move
//! the environment, whose memory image depends on the processor's mode.

use std::sync::LazyLock;

use iced_x86::{Instruction, Mnemonic};
use skep_hv::cpuid::CpuidTable;

use super::fpu::{FSW_ES, Fpu, fx};
use super::gate::{self, Unit};
use super::plain::{NO_MEMORY, Plan, READ};
use crate::cpu::{CodeSize, Cpu, cr0, seg};
use crate::fault::{Exec, vector};
use crate::mmu::Access;
use crate::op::{Handler, Op};
use crate::regs::BLOCK_RIP;

/// Control instructions that do not wait for pending exceptions (SDM vol. 1 §8.3.12).
pub(super) fn no_wait(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Fninit
            | M::Fnclex
            | M::Fnstsw
            | M::Fnstcw
            | M::Fnstenv
            | M::Fnsave
            | M::Fneni
            | M::Fndisi
            | M::Fnsetpm
    )
}

/// What an x87 instruction that runs on the guest's registers in place does beside its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum X87 {
    /// FIP points at it.
    Points,
    /// FIP is cleared.
    Clears,
    /// FIP stays as it is.
    Keeps,
    /// FIP stays; it loads FCW.
    Loads,
}

/// How the host runs an x87 instruction in place. `None`: not at all.
pub(super) fn direct(insn: &Instruction) -> Option<X87> {
    use Mnemonic as M;
    let how = match insn.mnemonic() {
        M::Fnstsw | M::Fnstcw | M::Fnclex | M::Wait => X87::Keeps,
        M::Fninit => X87::Clears,
        M::Fldcw => X87::Loads,
        M::Fldenv | M::Frstor => return None,
        mnemonic if no_wait(mnemonic) => return None,
        _ => X87::Points,
    };
    in_place().then_some(how)
}

/// Whether x87 instructions may run in place: the state must be moved without that of SSE, and the host must keep neither
/// selectors nor, but for exceptions, the address of an operand, which here is its own (CPUID.7:EBX bits 6 and 13).
fn in_place() -> bool {
    static IS: LazyLock<bool> = LazyLock::new(|| {
        const WANTED: u32 = 1 << 6 | 1 << 13;
        is_x86_feature_detected!("xsave") && std::arch::x86_64::__cpuid_count(7, 0).ebx & WANTED == WANTED
    });
    *IS
}

/// The handler for a thunk on `UNIT`.
pub(super) fn handler<const UNIT: u8>(access: u8) -> Handler {
    match access {
        NO_MEMORY => registers::<UNIT>,
        READ => load::<UNIT>,
        _ => store::<UNIT>,
    }
}

/// An opcode that no instruction with a memory operand has.
const NO_OPCODE: u16 = 0x7ff;

impl Cpu {
    /// #MF if an unmasked exception is pending. (Without CR0.NE the processor would pull FERR# and wait for the
    /// interrupt controller; this one has no such pin.)
    #[inline(always)]
    pub(super) fn x87_pending(&mut self) -> Exec {
        if self.fpu.word(fx::FSW) & FSW_ES == 0 { Ok(()) } else { Err(self.trap(vector::MF)) }
    }

    fn enter_x87<const UNIT: u8>(&mut self, plan: Plan) -> Exec {
        self.unit::<UNIT>()?;
        if plan.no_wait() { Ok(()) } else { self.x87_pending() }
    }

    /// Offset of the running instruction in its code segment.
    fn instruction_pointer(&self, op: &Op) -> u64 {
        let at = self.regs.r64(BLOCK_RIP).wrapping_add(u64::from(op.end - u16::from(op.len)));
        if self.mode.code == CodeSize::Bits64 { at } else { at & 0xffff_ffff }
    }

    /// Runs the thunk; the pointers that it left behind become the guest's.
    fn run_x87(&mut self, op: &Op, plan: Plan, memory: bool) -> Exec {
        let opcode = self.fpu.word(fx::FOP);
        if memory {
            self.fpu.set_word(fx::FOP, NO_OPCODE);
        }
        let result = self.run_thunk(plan);
        if result.is_err() {
            // A SIMD exception keeps the result back, but not the transition to MMX.
            self.fpu.enter_mmx();
        }
        if self.fpu.pointer(fx::FIP) == self.thunks.address(plan.thunk()) + plan.instruction() {
            let at = self.instruction_pointer(op);
            let code = self.segs[seg::CS].selector;
            self.fpu.set_pointer(fx::FIP, at);
            self.fpu.fcs = if self.fpu.selectors { code } else { 0 };
        }
        if memory {
            let here = self.fpu.word(fx::FOP);
            let opcode = if here == NO_OPCODE { opcode } else { here & 0x700 | u16::from(plan.modrm()) };
            self.fpu.set_word(fx::FOP, opcode);
            if self.fpu.pointer(fx::FDP) == self.fpu.frame.operand.as_ptr() as u64 {
                let at = self.offset(op);
                let data = self.segs[op.seg as usize % 6].selector;
                self.fpu.set_pointer(fx::FDP, at);
                self.fpu.fds = if self.fpu.selectors { data } else { 0 };
            }
        }
        result
    }
}

/// What an x87 instruction may change, kept while it may yet fault.
struct Saved {
    image: [u8; fx::XMM],
    selectors: [u16; 2],
}

impl Saved {
    fn of(fpu: &Fpu) -> Self {
        let mut image = [0; fx::XMM];
        image.copy_from_slice(&fpu.frame.x87[..fx::XMM]);
        Self { image, selectors: [fpu.fcs, fpu.fds] }
    }

    fn restore(&self, fpu: &mut Fpu) {
        fpu.frame.x87[..fx::XMM].copy_from_slice(&self.image);
        [fpu.fcs, fpu.fds] = self.selectors;
    }
}

fn registers<const UNIT: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let plan = Plan(op.imm);
    cpu.enter_x87::<UNIT>(plan)?;
    cpu.run_x87(op, plan, false)
}

fn load<const UNIT: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let plan = Plan(op.imm);
    cpu.enter_x87::<UNIT>(plan)?;
    let linear = cpu.operand(op, plan.size(), plan.aligned(), Access::Read)?;
    cpu.load_operand(linear, plan.size())?;
    cpu.run_x87(op, plan, true)
}

fn store<const UNIT: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let plan = Plan(op.imm);
    cpu.enter_x87::<UNIT>(plan)?;
    let linear = cpu.operand(op, plan.size(), plan.aligned(), Access::Write)?;
    let before = Saved::of(&cpu.fpu);
    cpu.run_x87(op, plan, true)?;
    // An unmasked exception other than precision keeps a result from being stored.
    let fpu = &cpu.fpu;
    if !plan.stores_always() && fpu.word(fx::FSW) & !fpu.word(fx::FCW) & 0x1f != 0 {
        return Ok(());
    }
    let stored = if plan.size() == 10 {
        // Two stores, of which the first may be done when the second faults.
        cpu.store_operand(linear, 8).and_then(|()| {
            let [low, high] = [cpu.fpu.frame.operand[8], cpu.fpu.frame.operand[9]];
            cpu.write(linear.wrapping_add(8), u16::from_le_bytes([low, high]))
        })
    } else {
        cpu.store_operand(linear, plan.size())
    };
    if stored.is_err() {
        before.restore(&mut cpu.fpu);
        if UNIT != Unit::FLOAT {
            // Half of the transition to MMX is made all the same.
            cpu.fpu.clear_top();
        }
    }
    stored
}

/// Handlers for FWAIT and for what moves the environment.
pub(super) fn select(insn: &Instruction, op: &mut Op, cpuid: &CpuidTable) -> Option<Handler> {
    use Mnemonic as M;
    if !gate::feature(iced_x86::CpuidFeature::FPU, cpuid) {
        return None;
    }
    let handler: Handler = match insn.mnemonic() {
        M::Wait => return Some(wait),
        M::Fldenv => fldenv,
        M::Fnstenv => fnstenv,
        M::Frstor => frstor,
        M::Fnsave => fnsave,
        _ => return None,
    };
    // 14 or 94 bytes: the 16-bit format.
    op.imm = u64::from(matches!(insn.memory_size().size(), 14 | 94));
    Some(handler)
}

fn wait(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(cpu.trap(vector::NM));
    }
    cpu.x87_pending()
}

/// The format of an environment in memory (SDM vol. 1 §8.1.10).
#[derive(Debug, Clone, Copy)]
struct Format {
    wide: bool,
    /// Protected mode (64-bit mode included); else real-address and virtual-8086 mode.
    protected: bool,
}

impl Format {
    fn of(cpu: &Cpu, op: &Op) -> Self {
        Self { wide: op.imm == 0, protected: cpu.mode.protected && !cpu.mode.v86 }
    }

    /// Bytes of a field.
    fn width(self) -> usize {
        if self.wide { 4 } else { 2 }
    }

    fn environment(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

/// Bytes of the eight registers behind an environment.
const REGISTERS: usize = 80;

impl Fpu {
    fn top(&self) -> usize {
        usize::from(self.word(fx::FSW) >> 11 & 7)
    }

    /// ST(i) as ten bytes.
    fn st(&self, i: usize) -> [u8; 10] {
        let mut bytes = [0; 10];
        bytes.copy_from_slice(&self.frame.x87[fx::ST + 16 * (i & 7)..][..10]);
        bytes
    }

    fn set_st(&mut self, i: usize, value: &[u8]) {
        self.frame.x87[fx::ST + 16 * (i & 7)..][..10].copy_from_slice(&value[..10]);
    }

    /// Sets FSW. The image holds registers relative to TOP: they move if it does.
    fn set_status(&mut self, fsw: u16) {
        let (from, to) = (self.top(), usize::from(fsw >> 11 & 7));
        let old: Vec<[u8; 10]> = (0..8).map(|i| self.st(i)).collect();
        for i in 0..8 {
            self.set_st(i, &old[(to + i + 8 - from) & 7]);
        }
        self.set_word(fx::FSW, fsw);
    }

    /// What every MMX instruction but EMMS does: TOP becomes 0, all registers valid.
    pub(super) fn enter_mmx(&mut self) {
        self.clear_top();
        self.frame.x87[fx::FTW] = 0xff;
    }

    /// Sets TOP to 0; the registers stay where they are.
    fn clear_top(&mut self) {
        let fsw = self.word(fx::FSW);
        self.set_status(fsw & !0x3800);
    }

    /// MMX register `n`.
    pub(super) fn mmx(&self, n: usize) -> [u8; 8] {
        let st = self.st((n + 8 - self.top()) & 7);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&st[..8]);
        bytes
    }

    /// The full tag word: two bits for each physical register.
    fn tags(&self) -> u16 {
        let mut tags = 0;
        for physical in 0..8 {
            let tag = if self.frame.x87[fx::FTW] >> physical & 1 == 0 {
                3
            } else {
                let st = self.st((physical + 8 - self.top()) & 7);
                let exponent = u16::from_le_bytes([st[8], st[9]]) & 0x7fff;
                let zero = st[..8].iter().all(|&b| b == 0);
                match exponent {
                    0 if zero => 1,
                    1..0x7fff if st[7] & 0x80 != 0 => 0,
                    _ => 2,
                }
            };
            tags |= tag << (2 * physical);
        }
        tags
    }

    fn put_environment(&self, format: Format, into: &mut [u8]) {
        let (fip, fdp) = (self.pointer(fx::FIP), self.pointer(fx::FDP));
        let fop = u64::from(self.word(fx::FOP));
        let control = [self.word(fx::FCW), self.word(fx::FSW), self.tags()].map(u64::from);
        let linear = |selector: u16, offset: u64| (u64::from(selector) << 4).wrapping_add(offset);
        let (ip, dp) = (linear(self.fcs, fip), linear(self.fds, fdp));
        let ones = 0xffff_0000;
        let pointers = match (format.protected, format.wide) {
            (true, true) => [fip, u64::from(self.fcs) | fop << 16, fdp, u64::from(self.fds) | ones],
            (true, false) => [fip, self.fcs.into(), fdp, self.fds.into()],
            (false, true) => [
                ip & 0xffff | ones,
                (ip >> 16 & 0xffff) << 12 | fop,
                dp & 0xffff | ones,
                (dp >> 16 & 0xffff) << 12,
            ],
            (false, false) => [ip, (ip >> 16 & 0xf) << 12 | fop, dp, (dp >> 16 & 0xf) << 12],
        };
        let fields = control.iter().map(|&v| v | ones).chain(pointers);
        let width = format.width();
        for (to, value) in into.chunks_exact_mut(width).zip(fields) {
            to.copy_from_slice(&value.to_le_bytes()[..width]);
        }
    }

    fn get_environment(&mut self, format: Format, from: &[u8]) {
        let width = format.width();
        let field =
            |i: usize| from[i * width..][..width].iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b));
        self.set_word(fx::FCW, field(0) as u16 & 0x1f7f | 0x40);
        self.set_status(field(1) as u16);
        let tags = field(2);
        self.frame.x87[fx::FTW] = (0..8).fold(0, |all, i| all | u8::from(tags >> (2 * i) & 3 != 3) << i);
        let (fip, fop, fdp, fcs, fds) = match (format.protected, format.wide) {
            (true, true) => (field(3), field(4) >> 16, field(5), field(4), field(6)),
            // The 16-bit protected format has no opcode.
            (true, false) => (field(3), 0, field(5), field(4), field(6)),
            (false, true) => (
                field(3) & 0xffff | (field(4) >> 12 & 0xffff) << 16,
                field(4),
                field(5) & 0xffff | (field(6) >> 12 & 0xffff) << 16,
                0,
                0,
            ),
            (false, false) => {
                (field(3) | (field(4) >> 12) << 16, field(4), field(5) | (field(6) >> 12) << 16, 0, 0)
            }
        };
        self.set_pointer(fx::FIP, fip);
        self.set_pointer(fx::FDP, fdp);
        self.set_word(fx::FOP, fop as u16 & 0x7ff);
        (self.fcs, self.fds) = if self.selectors { (fcs as u16, fds as u16) } else { (0, 0) };
        self.summarize();
    }
}

fn fnstenv(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.x87()?;
    let format = Format::of(cpu, op);
    let mut bytes = [0; 28];
    let bytes = &mut bytes[..format.environment()];
    cpu.fpu.put_environment(format, bytes);
    let linear = cpu.linear(op, bytes.len() as u64, Access::Write)?;
    cpu.check_pieces(linear, bytes.len(), format.width(), Access::Write)?;
    cpu.write_bytes(linear, bytes)?;
    let fcw = cpu.fpu.word(fx::FCW);
    cpu.fpu.set_word(fx::FCW, fcw | 0x3f);
    cpu.fpu.summarize();
    Ok(())
}

fn fldenv(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.x87()?;
    cpu.x87_pending()?;
    let format = Format::of(cpu, op);
    let mut bytes = [0; 28];
    let bytes = &mut bytes[..format.environment()];
    let linear = cpu.linear(op, bytes.len() as u64, Access::Read)?;
    cpu.check_pieces(linear, bytes.len(), format.width(), Access::Read)?;
    cpu.read_bytes(linear, bytes)?;
    cpu.fpu.get_environment(format, bytes);
    Ok(())
}

fn fnsave(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.x87()?;
    let format = Format::of(cpu, op);
    let at = format.environment();
    let mut bytes = [0; 28 + REGISTERS];
    let bytes = &mut bytes[..at + REGISTERS];
    cpu.fpu.put_environment(format, &mut bytes[..at]);
    for i in 0..8 {
        bytes[at + 10 * i..][..10].copy_from_slice(&cpu.fpu.st(i));
    }
    let linear = cpu.linear(op, bytes.len() as u64, Access::Write)?;
    cpu.check_pieces(linear, bytes.len(), format.width(), Access::Write)?;
    cpu.write_bytes(linear, bytes)?;
    // As FNINIT: registers keep their contents.
    cpu.fpu.set_word(fx::FCW, 0x37f);
    cpu.fpu.set_status(0);
    cpu.fpu.frame.x87[fx::FTW] = 0;
    cpu.fpu.set_word(fx::FOP, 0);
    cpu.fpu.set_pointer(fx::FIP, 0);
    cpu.fpu.set_pointer(fx::FDP, 0);
    (cpu.fpu.fcs, cpu.fpu.fds) = (0, 0);
    Ok(())
}

fn frstor(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.x87()?;
    cpu.x87_pending()?;
    let format = Format::of(cpu, op);
    let at = format.environment();
    let mut bytes = [0; 28 + REGISTERS];
    let bytes = &mut bytes[..at + REGISTERS];
    let linear = cpu.linear(op, bytes.len() as u64, Access::Read)?;
    cpu.check_pieces(linear, bytes.len(), format.width(), Access::Read)?;
    cpu.read_bytes(linear, bytes)?;
    cpu.fpu.get_environment(format, &bytes[..at]);
    for i in 0..8 {
        cpu.fpu.set_st(i, &bytes[at + 10 * i..][..10]);
    }
    Ok(())
}
