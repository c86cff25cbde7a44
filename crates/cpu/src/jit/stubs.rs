//! What stands out of a block's way: help, links, ways out.

use super::access::Place;
use super::asm::{Asm, Forward, Mem, R8, R9, R10, R11};
use super::glue::{BASE, STATUS};
use super::help::Wanted;
use super::translate::{Link, Translator};

/// What stands behind the block, out of the way.
pub(super) enum Stub {
    /// Help with an access.
    Access {
        from: [Option<Forward>; 2],
        place: Place,
        wanted: Wanted,
        find: Find,
        resume: usize,
        done: Option<usize>,
    },
    /// Run the handler instead.
    Handler { from: Vec<Forward>, op: u64, resume: usize },
    /// Leave, to be taken to the target of a link.
    Link { from: Forward, number: u32, target: u16, save_flags: bool },
    /// A jump to another page.
    Far { from: Forward, target: i64, save_flags: bool },
    /// Something wants attention.
    Leave { from: Forward, at: u16, save_flags: bool },
    /// The vector registers are to be made the guest's, up to a step of [`super::vectors`].
    Vectors { from: Forward, resume: usize, wanted: u8 },
    /// The x87 registers are.
    X87 { from: Forward, resume: usize },
}

/// Who helps with an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Find {
    /// Rust: it is no simple access.
    Access,
    /// There may be a translation, or two, if it straddles pages.
    LookUp,
    /// There may be one, of the stack's page.
    Stack,
}

impl Stub {
    /// Bytes of its code at most.
    pub(super) fn most(&self) -> usize {
        match self {
            Self::Access { place, .. } => 21 + place.most(),
            Self::Handler { .. } => 20,
            Self::Link { save_flags, .. } => 27 + if *save_flags { FLAGS_SAVED } else { 0 },
            Self::Far { save_flags, .. } => 38 + if *save_flags { FLAGS_SAVED } else { 0 },
            Self::Leave { save_flags, .. } => 21 + if *save_flags { FLAGS_SAVED } else { 0 },
            Self::Vectors { .. } | Self::X87 { .. } => 10,
        }
    }
}

/// Bytes of code that saves flags.
pub(super) const FLAGS_SAVED: usize = 20;

/// Calls for help, and goes on behind the check, or behind the instruction. The window is lost.
fn help_with_access(a: &mut Asm, place: Place, wanted: Wanted, routine: u64, (resume, done): (u64, u64)) {
    match place {
        Place::Sum(address) => address.put(a, true, R8, 0),
        Place::Stack(disp) => a.lea(R8, Mem::At(R11, disp)),
        Place::None | Place::Linear | Place::Host | Place::Top => {}
    }
    // What completes the instruction comes back five bytes further.
    if let Place::Stack(_) = place {
        let found = a.here() + ASKED as u64 + JUMP as u64;
        a.ask(wanted.0, routine, found);
        a.jmp(done);
        a.mov(R10, R8);
        a.jmp(resume);
    } else {
        a.ask(wanted.0, routine, resume);
        a.jmp(done);
    }
}

/// Bytes of a jump, and of what asks for help.
const JUMP: usize = 5;
const ASKED: usize = 16;

impl Asm {
    /// `mov r9d, wanted; call routine; jmp next`, which are 16 bytes together.
    fn ask(&mut self, wanted: u32, routine: u64, next: u64) {
        let end = self.here() + ASKED as u64;
        let (called, left) = (routine.wrapping_sub(end - JUMP as u64) as u32, next.wrapping_sub(end) as u32);
        let low = 0xb941 | u64::from(wanted) << 16 | 0xe8 << 48;
        let all = u128::from(low) | u128::from(called) << 56 | 0xe9 << 88 | u128::from(left) << 96;
        self.bytes(&all.to_le_bytes());
    }
}

impl Translator<'_> {
    /// Writes what stands out of the way, for where it will lie.
    pub(super) fn finish_stubs(&mut self, room: Vec<u8>, at: impl FnOnce(usize) -> u64) -> Vec<u8> {
        let glue = self.request.glue;
        let mut stubs = std::mem::take(&mut self.stubs);
        let len = stubs.iter().map(Stub::most).sum::<usize>();
        let mut aside = Asm::aside(room, at(len));
        let (a, code) = (&mut aside, &mut self.asm);
        let end_of_block = code.origin + code.code.len() as u64;
        for stub in stubs.drain(..) {
            let here = a.here();
            match stub {
                Stub::Access { from, place, wanted, find, resume, done } => {
                    from.into_iter().flatten().for_each(|from| code.land_abroad(from, here));
                    let resume = code.origin + resume as u64;
                    let done = done.map_or(end_of_block, |done| code.origin + done as u64);
                    let routine = match find {
                        Find::Access => glue.access,
                        Find::LookUp => glue.look_up,
                        Find::Stack => glue.stack,
                    };
                    help_with_access(a, place, wanted, routine, (resume, done));
                }
                Stub::Handler { from, op, resume } => {
                    for forward in from {
                        code.land_abroad(forward, here);
                    }
                    a.mov_imm(R8, op);
                    a.call(glue.handler);
                    a.jmp(code.origin + resume as u64);
                }
                Stub::Link { from, number, target, save_flags } => {
                    code.land_abroad(from, here);
                    if save_flags {
                        a.save_flags(STATUS, R9);
                    }
                    a.load(R8, BASE);
                    a.lea(R8, Mem::At(R8, i32::from(target)));
                    a.mov_imm32(R9, number);
                    a.jmp(glue.leave_to_link);
                }
                Stub::Far { from, target, save_flags } => {
                    code.land_abroad(from, here);
                    if save_flags {
                        a.save_flags(STATUS, R9);
                    }
                    a.load(R8, BASE);
                    a.add_target_to_r8(target, self.request.key.small());
                    if self.request.chain {
                        a.mov_imm32(R9, self.request.first_link + self.links.len() as u32);
                        a.jmp(glue.leave_to_link);
                        let target = (target & 0xfff) as u16;
                        self.links.push(Link { end: a.here(), target, in_host: false, far: true });
                    } else {
                        a.jmp(glue.dispatch_at_once);
                    }
                }
                Stub::Leave { from, at, save_flags } => {
                    code.land_abroad(from, here);
                    if save_flags {
                        a.save_flags(STATUS, R9);
                    }
                    a.load(R8, BASE);
                    a.lea(R8, Mem::At(R8, i32::from(at)));
                    a.jmp(glue.leave);
                }
                Stub::Vectors { from, resume, wanted } => {
                    code.land_abroad(from, here);
                    a.call(glue.load_vectors[usize::from(wanted) - 1]);
                    a.jmp(code.origin + resume as u64);
                }
                Stub::X87 { from, resume } => {
                    code.land_abroad(from, here);
                    a.call(glue.load_x87);
                    a.jmp(code.origin + resume as u64);
                }
            }
        }
        debug_assert!(aside.code.len() <= len);
        aside.code.resize(len, 0xcc);
        self.stubs = stubs;
        aside.code
    }
}
