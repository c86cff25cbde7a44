//! From bytes to operations.
#![expect(unsafe_code, reason = "copies code out of a host page that the TLB vouches for")]

use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use crate::block::{Block, Key, MAX_OPS};
use crate::cpu::{CodeSize, Cpu, seg};
use crate::exec;
use crate::fault::Exec;
use crate::mmu::Code;
use crate::native;
use crate::op::Op;
use crate::regs::{BLOCK_RIP, ZERO};
use crate::system;

const PAGE: u64 = 4096;
const LONGEST: usize = 15;

/// `Op::dst`, `Op::src` of operands that are not registers.
const NONE: u8 = u8::MAX;

impl Cpu {
    /// The block at `linear` (which is CS:RIP), from the cache or decoded. Raises what a fetch raises.
    #[cold]
    #[inline(never)]
    pub(crate) fn find_block(&mut self, linear: u64, key: Key) -> Exec<*const Block> {
        let page = self.code_page(linear)?;
        let gpa = page.gpa | linear % PAGE;
        let block = match self.blocks.find(gpa, key) {
            Some(block) => block,
            None => self.decode_block(linear, gpa, key)?,
        };
        self.blocks.remember(linear, self.tlb.stamp(), key, block);
        Ok(block)
    }

    fn decode_block(&mut self, linear: u64, gpa: u64, key: Key) -> Exec<*const Block> {
        self.make_room();
        loop {
            let first = self.code_page(linear)?;
            let offset = (linear % PAGE) as usize;
            let mut bytes = [0u8; MAX_OPS * LONGEST + LONGEST];
            let in_page = (PAGE as usize - offset).min(bytes.len());
            copy_code(&first, offset, &mut bytes[..in_page]);

            let mut ops = Vec::with_capacity(8);
            let mut len = self.decode_run(&bytes[..in_page], key, &mut ops);
            let mut second = first;
            if ops.is_empty() {
                // Not one whole instruction on this page: it straddles, or is too long.
                second = self.code_page((linear | (PAGE - 1)).wrapping_add(1))?;
                let more = LONGEST.min(bytes.len() - in_page);
                copy_code(&second, 0, &mut bytes[in_page..in_page + more]);
                let single = Key { single: true, ..key };
                len = self.decode_run(&bytes[..(in_page + more).min(LONGEST)], single, &mut ops);
                if ops.is_empty() {
                    return Err(self.gp(0));
                }
            }

            let on_first = len.min(PAGE as usize - offset);
            let pieces = [(first, offset, on_first), (second, 0, len - on_first)];
            let Some(versions) = self.watch_code(pieces) else { continue };
            // From here on a write raises the version; what was read before may be stale already.
            let mut again = [0u8; MAX_OPS * LONGEST + LONGEST];
            copy_code(&first, offset, &mut again[..on_first]);
            copy_code(&second, 0, &mut again[on_first..len]);
            if again[..len] != bytes[..len] {
                continue;
            }
            self.stats.blocks += 1;
            let pages = [
                (first.index, versions[0], self.memory.version(first.index)),
                (second.index, versions[1], self.memory.version(second.index)),
            ];
            let straddles = len > on_first;
            let block = Block::new(ops, len as u16, pages);
            return Ok(self.blocks.insert((!straddles).then_some(gpa), key, block));
        }
    }

    /// Watches pieces of two pages (or of one twice), each from an offset and so long, which makes everyone forget that they
    /// might be written: the pages' versions. `None`: a write has taken the watch away again.
    pub(crate) fn watch_code(&mut self, pieces: [(Code, usize, usize); 2]) -> Option<[u32; 2]> {
        // Somebody else's watch on the page holds only once all have forgotten their writes to it.
        self.shared.watching.fetch_add(1, Ordering::SeqCst);
        let watches = pieces
            .map(|(page, offset, len)| self.memory.start_watching(page.index, offset as u64, len as u64));
        let fresh = watches.iter().any(|&(fresh, _)| fresh);
        if fresh || self.shared.watching.load(Ordering::SeqCst) != 1 {
            self.everyone_forgets_writes(pieces.map(|(page, ..)| page.frame()));
        }
        self.shared.watching.fetch_sub(1, Ordering::SeqCst);
        // A write meanwhile has taken the watch away, and raised the version.
        let current = |(&(page, ..), (_, version)): (&(Code, usize, usize), (bool, u32))| {
            self.memory.version(page.index).load(Ordering::SeqCst) == version
        };
        pieces.iter().zip(watches).all(current).then(|| watches.map(|(_, version)| version))
    }

    /// Drops decoded code if little room is left for what it refers to. Translated code may be what asks: then that waits for
    /// the run loop, to which it leads, and what is kept free must do until then.
    fn make_room(&mut self) {
        match (self.thunks.full(), self.jit.is_some()) {
            (false, _) => {}
            (true, true) => self.look = true,
            (true, false) => {
                self.blocks.clear();
                self.thunks.clear();
            }
        }
    }

    /// As above, between two blocks of the run loop.
    pub(crate) fn make_room_for_all(&mut self) {
        if self.thunks.full() {
            self.blocks.clear();
            self.thunks.clear();
            if let Some(jit) = &mut self.jit {
                jit.clear();
            }
        }
    }

    /// Decodes whole instructions from `bytes` until a block must end: its length in bytes.
    fn decode_run(&mut self, bytes: &[u8], key: Key, ops: &mut Vec<Op>) -> usize {
        let mut decoder = Decoder::with_ip(key.code.bits(), bytes, 0, DecoderOptions::NONE);
        let mut insn = Instruction::default();
        let most = if key.single { 1 } else { MAX_OPS };
        let mut end = 0;
        while ops.len() < most && decoder.can_decode() {
            decoder.decode_out(&mut insn);
            if insn.is_invalid()
                && decoder.last_error() == DecoderError::NoMoreBytes
                && bytes.len() - end < LONGEST
            {
                break;
            }
            // An invalid instruction is one that raises #UD; its length no longer matters.
            let len = insn.len().clamp(1, LONGEST);
            let lowered = self.lower(&insn, &bytes[end..], key.code, end);
            let (mut op, ends) = (lowered.op, lowered.ends);
            end += len;
            op.end = end as u16;
            ops.push(op);
            if ends {
                break;
            }
        }
        end
    }

    /// Chooses the handler of an instruction, which stands `start` bytes behind the beginning of its block; `bytes` are its
    /// own and perhaps more.
    fn lower(&mut self, insn: &Instruction, bytes: &[u8], code: CodeSize, start: usize) -> Lowered {
        // An invalid instruction is one that raises #UD; its length no longer matters.
        let len = insn.len().clamp(1, LONGEST);
        let mut op = fill(insn, code, start, len);
        if insn.is_invalid() {
            op.run = if exceeds(code.bits(), bytes) { too_long } else { undefined };
            return Lowered { op, ends: true, by: Room::Undefined };
        }
        if let Some(handler) = exec::select(insn, &mut op, code) {
            op.run = handler;
            let ends =
                insn.flow_control() != FlowControl::Next || (repeats(insn) && insn.is_string_instruction());
            return Lowered { op, ends, by: Room::Exec };
        }
        if let Some(handler) = system::select(insn, &mut op, code) {
            op.run = handler;
            return Lowered { op, ends: !system::continues(insn.mnemonic()), by: Room::System };
        }
        let text = &bytes[..len.min(bytes.len())];
        match native::select(insn, text, &mut op, code, &mut self.thunks, &self.shared.cpuid) {
            Some(handler) => {
                op.run = handler;
                Lowered { op, ends: false, by: Room::Native }
            }
            None => {
                op.run = undefined;
                Lowered { op, ends: true, by: Room::Undefined }
            }
        }
    }

    /// The operation of an instruction of the running code that was decoded with its offset in the page as address, for a run
    /// that begins with the page.
    pub(crate) fn operation(&mut self, insn: &Instruction, bytes: &[u8], at: usize) -> Op {
        self.lower(insn, bytes, self.mode.code, at).op
    }

    /// Who executes an instruction of the running code.
    pub(crate) fn room(&mut self, insn: &Instruction, bytes: &[u8]) -> Room {
        self.lower(insn, bytes, self.mode.code, 0).by
    }

    /// The bytes from `linear` to the end of its page, 15 at most, and how many there are.
    fn fetch_bytes(&mut self, linear: u64) -> Exec<([u8; LONGEST], usize)> {
        let mut bytes = [0; LONGEST];
        let first = self.code_page(linear)?;
        let offset = (linear % PAGE) as usize;
        let in_page = (PAGE as usize - offset).min(LONGEST);
        copy_code(&first, offset, &mut bytes[..in_page]);
        Ok((bytes, in_page))
    }

    /// Fetches and decodes the instruction at `linear` (which is CS:RIP) from memory as it is now. Nothing is kept: no
    /// block, no watch. Raises what a fetch raises.
    pub(crate) fn decode_fresh(&mut self, linear: u64, code: CodeSize) -> Exec<Fresh> {
        self.make_room();
        let (mut bytes, mut len) = self.fetch_bytes(linear)?;
        let (mut insn, whole) = decode(code, &bytes[..len]);
        if len < LONGEST && !whole {
            let (more, _) = self.fetch_bytes((linear | (PAGE - 1)).wrapping_add(1))?;
            bytes[len..].copy_from_slice(&more[..LONGEST - len]);
            len = LONGEST;
            (insn, _) = decode(code, &bytes);
        }
        let Lowered { mut op, by, .. } = self.lower(&insn, &bytes[..len], code, 0);
        op.end = u16::from(op.len);
        Ok(Fresh { op, insn, by })
    }

    /// The bytes of the instruction at `linear`, for people: 15, or those up to a page that cannot be fetched.
    pub(crate) fn instruction_bytes(&mut self, linear: u64) -> Vec<u8> {
        let Ok((mut bytes, mut len)) = self.fetch_bytes(linear) else { return Vec::new() };
        if len < LONGEST
            && let Ok((more, _)) = self.fetch_bytes((linear | (PAGE - 1)).wrapping_add(1))
        {
            bytes[len..].copy_from_slice(&more[..LONGEST - len]);
            len = LONGEST;
        }
        bytes[..len].to_vec()
    }
}

/// Which room has the handler of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// [`crate::exec`].
    Exec,
    /// [`crate::system`].
    System,
    /// [`crate::native`].
    Native,
    /// None: it raises #UD (or is too long).
    Undefined,
}

/// An instruction as blocks hold it.
struct Lowered {
    op: Op,
    /// It is the last of its block.
    ends: bool,
    by: Room,
}

/// An instruction that was decoded for one execution.
pub(crate) struct Fresh {
    /// Its operation.
    pub(crate) op: Op,
    /// What it is.
    pub(crate) insn: Instruction,
    /// Who executes it.
    pub(crate) by: Room,
}

/// The instruction that `bytes` begin with, and whether they hold all of it.
fn decode(code: CodeSize, bytes: &[u8]) -> (Instruction, bool) {
    let mut decoder = Decoder::with_ip(code.bits(), bytes, 0, DecoderOptions::NONE);
    let insn = decoder.decode();
    (insn, !insn.is_invalid() || decoder.last_error() != DecoderError::NoMoreBytes)
}

/// Whether an invalid instruction is one because it has more than 15 bytes.
fn exceeds(bits: u32, bytes: &[u8]) -> bool {
    let whole = &bytes[..bytes.len().min(LONGEST)];
    if !Decoder::new(bits, whole, DecoderOptions::NO_INVALID_CHECK).decode().is_invalid() {
        // A prefix or operand is what makes it invalid.
        return false;
    }
    // With 15 bytes there the decoder does not tell; with 14 it says that it wants more.
    let mut decoder =
        Decoder::new(bits, &whole[..whole.len().min(LONGEST - 1)], DecoderOptions::NO_INVALID_CHECK);
    let _ = decoder.decode();
    decoder.last_error() == DecoderError::NoMoreBytes
}

pub(crate) fn copy_code(page: &crate::mmu::Code, offset: usize, into: &mut [u8]) {
    /// What one instruction moves.
    const STEP: usize = 16;
    let last = into.len().checked_sub(STEP);
    // SAFETY: the page is mapped for 4096 bytes and callers stay within; other processors may write meanwhile, so the
    // bytes are moved by instructions that the compiler cannot look into.
    unsafe {
        let (from, to) = (page.host.as_ptr().add(offset), into.as_mut_ptr());
        let Some(last) = last else {
            std::arch::asm!("rep movsb", inout("rcx") into.len() => _, inout("rsi") from => _, inout("rdi") to => _,
                options(nostack, preserves_flags));
            return;
        };
        let step = |at: usize| {
            std::arch::asm!("movups {x}, [{from}]", "movups [{to}], {x}", x = out(xmm_reg) _, from = in(reg) from.add(at),
                to = in(reg) to.add(at), options(nostack, preserves_flags));
        };
        let mut at = 0;
        while at < last {
            step(at);
            at += STEP;
        }
        // This may move some bytes again.
        step(last);
    }
}

fn repeats(insn: &Instruction) -> bool {
    insn.has_rep_prefix() || insn.has_repne_prefix()
}

fn undefined(cpu: &mut Cpu, _: &Op) -> Exec {
    Err(cpu.ud())
}

/// An instruction of more than 15 bytes.
fn too_long(cpu: &mut Cpu, _: &Op) -> Exec {
    Err(cpu.gp(0))
}

/// The fields that mean the same for every handler.
fn fill(insn: &Instruction, code: CodeSize, start: usize, len: usize) -> Op {
    let mut op = Op {
        run: undefined,
        imm: 0,
        disp: 0,
        end: (start + len) as u16,
        len: len as u8,
        dst: NONE,
        src: NONE,
        base: ZERO,
        index: ZERO,
        scale: 0,
        seg: seg::DS as u8,
        attr: 0,
    };
    let mut registers = 0;
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let at = register_at(insn.op_register(i));
                if i == 0 {
                    op.dst = at;
                } else if registers == 0 || (i == 1 && insn.op0_kind() == OpKind::Register) {
                    op.src = at;
                }
                registers += usize::from(i > 0);
            }
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => op.imm = insn.immediate(i),
            OpKind::Memory => memory_operand(insn, code, &mut op),
            OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI => {
                op.seg = match (code, insn.memory_segment()) {
                    (CodeSize::Bits64, Register::CS | Register::SS | Register::ES) => seg::DS as u8,
                    (_, register) => segment(register),
                };
            }
            _ => {}
        }
    }
    if !insn.op_kinds().any(|k| k == OpKind::Memory) && insn.is_stack_instruction() {
        op.seg = seg::SS as u8;
    }
    if insn.has_lock_prefix() {
        op.attr |= Op::LOCK;
    }
    if insn.has_rep_prefix() {
        op.attr |= Op::REP;
    }
    if insn.has_repne_prefix() {
        op.attr |= Op::REPNE;
    }
    op.attr |= address_size(insn, code);
    op.attr |= operand_size(insn, code);
    op
}

fn memory_operand(insn: &Instruction, code: CodeSize, op: &mut Op) {
    op.seg = match (code, insn.memory_segment(), insn.memory_base()) {
        (CodeSize::Bits64, Register::FS | Register::GS, _) | (CodeSize::Bits16 | CodeSize::Bits32, ..) => {
            segment(insn.memory_segment())
        }
        // Other overrides mean nothing in 64-bit mode, not even for which exception is raised.
        (_, _, Register::RSP | Register::RBP | Register::ESP | Register::EBP) => seg::SS as u8,
        _ => seg::DS as u8,
    };
    op.disp = insn.memory_displacement64();
    if insn.is_ip_rel_memory_operand() {
        // Decoding started at address zero, so the displacement is relative to the block.
        op.base = BLOCK_RIP;
        op.disp = insn.ip_rel_memory_address();
        debug_assert_eq!(code, CodeSize::Bits64);
        return;
    }
    if insn.memory_base() != Register::None {
        op.base = register_at(insn.memory_base());
    }
    if insn.memory_index() != Register::None && !insn.memory_index().is_vector_register() {
        op.index = register_at(insn.memory_index());
        op.scale = insn.memory_index_scale().trailing_zeros() as u8;
    }
}

fn segment(register: Register) -> u8 {
    match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    }
}

/// Byte offset of a general register (high bytes included); the number of any other.
fn register_at(register: Register) -> u8 {
    match register {
        Register::AH => 1,
        Register::CH => 9,
        Register::DH => 17,
        Register::BH => 25,
        r if r.is_gpr() => (r.full_register().number() * 8) as u8,
        r => r.number() as u8,
    }
}

fn address_size(insn: &Instruction, code: CodeSize) -> u8 {
    let by_default = match code {
        CodeSize::Bits16 => Op::A16,
        CodeSize::Bits32 => Op::A32,
        CodeSize::Bits64 => 0,
    };
    for kind in insn.op_kinds() {
        match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI => return Op::A16,
            OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI => return Op::A32,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI => return 0,
            OpKind::Memory => {
                let register = match (insn.memory_base(), insn.memory_index()) {
                    (Register::None, index) if !index.is_vector_register() => index,
                    (base, _) => base,
                };
                return match (register, register.size()) {
                    (Register::None, _) => match insn.memory_displ_size() {
                        2 => Op::A16,
                        4 if code != CodeSize::Bits64 => Op::A32,
                        4 if insn.memory_displacement64() > 0x7fff_ffff
                            && insn.memory_displacement64() <= 0xffff_ffff =>
                        {
                            Op::A32
                        }
                        _ if code == CodeSize::Bits64 => 0,
                        _ => Op::A32,
                    },
                    (_, 2) => Op::A16,
                    (_, 4) => Op::A32,
                    _ => 0,
                };
            }
            _ => {}
        }
    }
    match insn.mnemonic() {
        Mnemonic::Jcxz => Op::A16,
        Mnemonic::Jecxz => Op::A32,
        Mnemonic::Jrcxz => 0,
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
            let name = insn.op_code().address_size();
            match name {
                16 => Op::A16,
                32 => Op::A32,
                64 => 0,
                _ => by_default,
            }
        }
        _ => by_default,
    }
}

/// Operand size where the first operand does not say: stack and string instructions, branches, I/O.
fn operand_size(insn: &Instruction, code: CodeSize) -> u8 {
    let bytes = match insn.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => {
            let info = insn.op_code();
            match (info.operand_size(), insn.stack_pointer_increment().unsigned_abs()) {
                (16, _) => 2,
                (32, _) => 4,
                (64, _) => 8,
                (_, 2) => 2,
                (_, 4) => 4,
                (_, 8) => 8,
                _ => match (insn.op_count() > 0).then(|| insn.op0_kind()) {
                    Some(OpKind::Register) => insn.op0_register().size(),
                    Some(OpKind::Memory) => insn.memory_size().size(),
                    _ => match code {
                        CodeSize::Bits16 => 2,
                        _ => 4,
                    },
                },
            }
        }
    };
    match bytes {
        1 => 0,
        2 => Op::O16,
        4 => Op::O32,
        8 => Op::O64,
        _ => 0,
    }
}
