//! Pushes and pops, one by one and in runs.

use iced_x86::{Mnemonic, OpKind};

use super::access::{Address, Expected, Place};
use super::asm::{Forward, Mem, NOT_EQUAL, R8, R9, R10, R11, RBP, RSP};
use super::glue::{BASE, STACK_DELTA, STACK_PAGE, TEMP, home};
use super::help::Wanted;
use super::operands::{host, is_homed, number, operand_number};
use super::table::Class;
use super::translate::{Decoded, Translator};

/// Instructions side by side that push, or that pop and perhaps return, and moves between them: their page is looked for once.
pub(super) struct Run {
    /// How many.
    pub(super) len: usize,
    /// Where they begin and end, from the stack pointer in front of them.
    low: i32,
    high: i32,
}

impl Run {
    /// A run that begins here, if there is one worth it.
    #[inline(always)]
    pub(super) fn at(insns: &[Decoded]) -> Option<Self> {
        let class = insns.first()?.info.class;
        if matches!(class, Class::Push | Class::Pop) { Self::of(insns, class == Class::Push) } else { None }
    }

    fn of(insns: &[Decoded], pushes: bool) -> Option<Self> {
        let (mut len, mut words) = (0, 0);
        for (i, d) in insns.iter().enumerate() {
            match d.info.class {
                Class::Push if pushes && is_register(d) => {}
                Class::Pop if !pushes && is_register(d) => {}
                Class::Return if i > 0 && !pushes && d.insn.op_count() == 0 => {
                    (len, words) = (i + 1, words + 1);
                    break;
                }
                _ if i > 0 && is_quiet(d) => continue,
                _ => break,
            }
            (len, words) = (i + 1, words + 1);
        }
        let (low, high) = if pushes { (-8 * words, 0) } else { (0, 8 * words) };
        (words > 1).then_some(Self { len, low, high })
    }
}

/// It pushes or pops a register other than the stack pointer.
fn is_register(d: &Decoded) -> bool {
    operand_number(&d.insn, 0).is_some_and(|n| n != RSP) && d.insn.op0_register().size() == 8
}

/// It moves something between host registers that stand for the guest's, and needs nothing else.
fn is_quiet(d: &Decoded) -> bool {
    let insn = &d.insn;
    let moves = insn.mnemonic() == Mnemonic::Mov && d.memory.is_none();
    moves
        && d.info.class == Class::Plain
        && (0..insn.op_count()).all(|i| match insn.op_kind(i) {
            OpKind::Register => operand_number(insn, i).is_some_and(|n| !(is_homed(n) || i == 0 && n == RSP)),
            _ => true,
        })
}

/// A run that is to be translated once more, for when its page is not the one that is remembered.
pub(super) struct Later {
    from: [Forward; 2],
    /// Number of its first instruction, and how many.
    pub(super) first: usize,
    len: usize,
    /// Where to go on.
    resume: usize,
    in_memory: bool,
}

/// What a push writes.
pub(super) enum Pushed {
    Register(u8),
    Immediate(i32),
    Temp,
    /// The address of what follows, at this offset of the page.
    Return(u16),
}

impl Translator<'_> {
    /// Translates a run for the page that is remembered.
    pub(super) fn run(&mut self, insns: &[Decoded], run: &Run) -> Option<()> {
        self.window = None;
        self.lose_flags(insns.first()?.live_in, R10);
        let a = &mut self.asm;
        // Its first word and its last must lie in the page, aligned.
        a.lea(R10, Mem::At(R11, run.low));
        a.and_imm(true, R10, -4096 | 7);
        a.mem(&[], true, &[0x3b], R10, STACK_PAGE);
        let other = a.jcc_forward(NOT_EQUAL);
        a.lea(R9, Mem::At(R11, run.high - 8));
        a.regs(true, &[0x31], R10, R9); // xor
        a.and_imm(true, R9, -4096);
        let crosses = a.jcc_forward(NOT_EQUAL);
        a.load(R10, STACK_DELTA);
        let in_memory = self.in_memory;
        for d in insns {
            match d.info.class {
                Class::Push => self.push_checked(Pushed::Register(operand_number(&d.insn, 0)?)),
                Class::Pop => self.pop_checked(operand_number(&d.insn, 0)?),
                Class::Return => self.return_checked(d, 0),
                _ => self.plain(d)?,
            }
        }
        let resume = self.asm.label();
        self.later.push(Later { from: [other, crosses], first: 0, len: insns.len(), resume, in_memory });
        Some(())
    }

    /// Translates the runs once more, each instruction by itself.
    pub(super) fn finish_runs(&mut self, insns: &[Decoded]) -> Option<()> {
        for later in std::mem::take(&mut self.later) {
            self.asm.label();
            later.from.into_iter().for_each(|from| self.asm.land(from));
            (self.in_host, self.in_memory, self.window) = (false, later.in_memory, None);
            let run = insns.get(later.first..later.first + later.len)?;
            for d in run {
                self.land_done();
                self.instruction(d, None)?;
            }
            if run.last()?.info.class == Class::Return {
                self.go_on_at_rip();
            } else {
                self.land_done();
                let back = self.asm.jmp_forward();
                self.asm.land_at(back, later.resume);
            }
        }
        Some(())
    }

    /// Writes `value` below the top of the stack and moves the stack pointer. R8 to R10 are lost.
    pub(super) fn push_register(&mut self, d: &Decoded, value: Pushed) {
        if self.small() {
            return self.push_small(d, value);
        }
        self.lose_flags(d.live_in, R9);
        let wanted = Wanted::new(d.at, d.insn.len() as u8, 8, true).on_stack(true);
        self.check(Place::Stack(-8), wanted, Expected::default());
        self.push_checked(value);
    }

    /// With what is to be added to the stack's addresses in R10.
    fn push_checked(&mut self, value: Pushed) {
        let top = Place::Stack(-8).mem();
        match value {
            Pushed::Register(n) if is_homed(n) => {
                self.asm.load(R9, home(n));
                self.asm.store(top, R9);
            }
            Pushed::Register(n) => self.asm.store(top, host(n)),
            Pushed::Immediate(value) => {
                self.asm.mem(&[], true, &[0xc7], 0, top);
                self.asm.imm32(value as u32);
            }
            Pushed::Temp => {
                self.asm.load(R9, TEMP);
                self.asm.store(top, R9);
            }
            Pushed::Return(next) => {
                self.asm.load(R9, BASE);
                self.asm.lea(R9, Mem::At(R9, i32::from(next)));
                self.asm.store(top, R9);
            }
        }
        self.asm.lea(R11, Mem::At(R11, -8));
    }

    pub(super) fn push(&mut self, d: &Decoded) -> Option<()> {
        let insn = &d.insn;
        match insn.op0_kind() {
            OpKind::Register => {
                let n = number(insn.op0_register())?;
                self.push_register(d, Pushed::Register(n));
            }
            OpKind::Memory => {
                self.lose_flags(d.live_in, R9);
                let place = self.place(d, Expected::default())?;
                let word = self.request.key.word();
                let wanted = self.wanted(d, word, false);
                self.check(place, wanted, Expected::default());
                self.asm.mem(&[], word == 8, &[0x8b], R8, place.mem());
                self.asm.store(TEMP, R8);
                self.push_register(d, Pushed::Temp);
            }
            _ => self.push_register(d, Pushed::Immediate(insn.immediate(0) as i32)),
        }
        Some(())
    }

    pub(super) fn pop(&mut self, d: &Decoded) -> Option<()> {
        let n = operand_number(&d.insn, 0)?;
        if self.small() {
            self.pop_small(d, n);
            return Some(());
        }
        self.lose_flags(d.live_in, R9);
        let wanted = Wanted::new(d.at, d.insn.len() as u8, 8, false).on_stack(true);
        self.check(Place::Stack(0), wanted, Expected::default());
        self.pop_checked(n);
        Some(())
    }

    fn pop_checked(&mut self, n: u8) {
        let top = Place::Stack(0).mem();
        if is_homed(n) {
            self.asm.load(R9, top);
            self.asm.store(home(n), R9);
        } else {
            self.asm.load(host(n), top);
        }
        if n != RSP {
            self.asm.lea(R11, Mem::At(R11, 8));
        }
    }

    pub(super) fn leave(&mut self, d: &Decoded) {
        if self.small() {
            return self.leave_small(d);
        }
        self.lose_flags(d.live_in, R9);
        let frame = Place::Sum(Address::frame());
        let wanted = Wanted::new(d.at, d.insn.len() as u8, 8, false).on_stack(true);
        self.check(frame, wanted, Expected::default());
        self.asm.lea(R11, Mem::At(RBP, 8));
        self.asm.load(RBP, frame.mem());
    }

    /// Returns to what the top of the stack says, and drops `more` bytes behind it.
    pub(super) fn return_checked(&mut self, d: &Decoded, more: i32) {
        self.asm.load(R8, Place::Stack(0).mem());
        self.asm.lea(R11, Mem::At(R11, 8 + more));
        self.note_origin(d, 8 + more);
        self.asm.ret();
    }
}
