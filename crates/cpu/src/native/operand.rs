//! Memory operands between guest memory and a thunk's frame.
#![expect(unsafe_code, reason = "copies between host addresses that the TLB vouches for and the frame")]

use std::arch::asm;

use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::mmu::Access;

/// Copies `size` bytes; 4, 8 and 16 whole, as guests may race on them.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of `size` bytes.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, size: u64) {
    // SAFETY: the caller's promise. Assembly, as the guest's other processors may access either side's memory.
    unsafe {
        match size {
            16 => {
                asm!("movups {x}, [{f}]", "movups [{t}], {x}", x = out(xmm_reg) _, f = in(reg) from, t = in(reg) to,
                options(nostack, preserves_flags))
            }
            8 => asm!("mov {x}, [{f}]", "mov [{t}], {x}", x = out(reg) _, f = in(reg) from, t = in(reg) to,
                options(nostack, preserves_flags)),
            4 => {
                asm!("mov {x:e}, [{f}]", "mov [{t}], {x:e}", x = out(reg) _, f = in(reg) from, t = in(reg) to,
                options(nostack, preserves_flags))
            }
            32 => {
                asm!("movups {x}, [{f}]", "movups {y}, [{f} + 16]", "movups [{t}], {x}", "movups [{t} + 16], {y}",
                x = out(xmm_reg) _, y = out(xmm_reg) _, f = in(reg) from, t = in(reg) to,
                options(nostack, preserves_flags))
            }
            64 => copy_line(from, to),
            _ => {
                asm!("rep movsb", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") size => _,
                    options(nostack, preserves_flags));
            }
        }
    }
}

/// Copies 64 bytes.
///
/// # Safety
/// As for [`copy`].
#[inline(always)]
unsafe fn copy_line(from: *const u8, to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("movups {x}, [{f}]", "movups {y}, [{f} + 16]", "movups {z}, [{f} + 32]", "movups {w}, [{f} + 48]",
            "movups [{t}], {x}", "movups [{t} + 16], {y}", "movups [{t} + 32], {z}", "movups [{t} + 48], {w}",
            x = out(xmm_reg) _, y = out(xmm_reg) _, z = out(xmm_reg) _, w = out(xmm_reg) _,
            f = in(reg) from, t = in(reg) to, options(nostack, preserves_flags));
    }
}

impl Cpu {
    /// Reads the memory operand into the frame. `size` is at most 64.
    #[inline(always)]
    pub(super) fn load_operand(&mut self, linear: u64, size: u64) -> Exec {
        match self.tlb.read(linear, size) {
            Some(at) => {
                // SAFETY: the TLB holds only mapped host pages, the access does not leave the page, and the frame has
                // room for any operand.
                unsafe { copy(at, self.fpu.frame.operand.as_mut_ptr(), size.min(64)) };
                Ok(())
            }
            None => self.load_slow(linear, size),
        }
    }

    #[cold]
    #[inline(never)]
    fn load_slow(&mut self, linear: u64, size: u64) -> Exec {
        let mut bytes = [0; 64];
        let part = &mut bytes[..(size as usize).min(64)];
        match size {
            1 => part[0] = self.read::<u8>(linear)?,
            2 => part.copy_from_slice(&self.read::<u16>(linear)?.to_le_bytes()),
            4 => part.copy_from_slice(&self.read::<u32>(linear)?.to_le_bytes()),
            8 => part.copy_from_slice(&self.read::<u64>(linear)?.to_le_bytes()),
            10 => {
                self.check_pieces(linear, 10, 8, Access::Read)?;
                self.read_bytes(linear, part)?;
            }
            _ => {
                // In one piece where it can be: 16 aligned bytes are never seen half written.
                self.probe(linear, size, Access::Read)?;
                if let Some(at) = self.tlb.read(linear, size) {
                    // SAFETY: as in `load_operand`.
                    unsafe { copy(at, self.fpu.frame.operand.as_mut_ptr(), size.min(64)) };
                    return Ok(());
                }
                self.read_bytes(linear, part)?;
            }
        }
        let size = part.len();
        self.fpu.frame.operand[..size].copy_from_slice(&bytes[..size]);
        Ok(())
    }

    /// As [`Cpu::load_operand`], without alignment checks.
    pub(super) fn load_unchecked(&mut self, linear: u64, size: u64) -> Exec {
        let mut bytes = [0; 64];
        let part = &mut bytes[..(size as usize).min(64)];
        self.read_bytes(linear, part)?;
        self.fpu.frame.operand[..part.len()].copy_from_slice(part);
        Ok(())
    }

    /// As [`Cpu::store_operand`], without alignment checks.
    pub(super) fn store_unchecked(&mut self, linear: u64, size: u64) -> Exec {
        let bytes = self.fpu.frame.operand;
        self.write_bytes(linear, &bytes[..(size as usize).min(64)])
    }

    /// Raises what an access of `len` bytes in pieces of `step` (a power of two) raises. x87's large operands move so:
    /// each piece is aligned and translated by itself.
    pub(super) fn check_pieces(&mut self, linear: u64, len: usize, step: usize, access: Access) -> Exec {
        for at in (0..len).step_by(step) {
            let here = linear.wrapping_add(at as u64);
            let size = step.min(len - at) as u64;
            self.check_alignment(here, size.next_power_of_two())?;
            self.probe(here, size, access)?;
        }
        Ok(())
    }

    /// Writes the memory operand from the frame.
    #[inline(always)]
    pub(super) fn store_operand(&mut self, linear: u64, size: u64) -> Exec {
        match self.tlb.write(linear, size) {
            Some(at) => {
                // SAFETY: as in `load_operand`.
                unsafe { copy(self.fpu.frame.operand.as_ptr(), at, size.min(64)) };
                Ok(())
            }
            None => self.store_slow(linear, size),
        }
    }

    #[cold]
    #[inline(never)]
    fn store_slow(&mut self, linear: u64, size: u64) -> Exec {
        let bytes = self.fpu.frame.operand;
        let part = &bytes[..(size as usize).min(64)];
        let word = |n: usize| part[..n].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        match size {
            1 => self.write::<u8>(linear, part[0]),
            2 => self.write::<u16>(linear, word(2) as u16),
            4 => self.write::<u32>(linear, word(4) as u32),
            8 => self.write::<u64>(linear, word(8)),
            10 => {
                self.check_pieces(linear, 10, 8, Access::Write)?;
                self.write_bytes(linear, part)
            }
            _ => self.write_bytes(linear, part),
        }
    }

    /// Raises what a store to the operand would raise.
    #[inline(always)]
    pub(super) fn probe_store(&mut self, linear: u64, size: u64) -> Exec {
        if self.tlb.write(linear, size).is_some() { Ok(()) } else { self.probe(linear, size, Access::Write) }
    }

    /// Copies the vector register `n` to guest memory: `size` is 16, 32 or 64.
    #[inline(always)]
    pub(super) fn store_vector(&mut self, n: usize, linear: u64, size: u64) -> Exec {
        let from = self.fpu.frame.vector[n & 31].as_ptr().cast::<u8>();
        if let Some(at) = self.tlb.write(linear, size) {
            // SAFETY: as in `load_operand`; a register has 64 bytes.
            unsafe { copy(from, at, size.min(64)) };
            return Ok(());
        }
        // As in `load_slow`.
        self.probe(linear, size, Access::Write)?;
        if let Some(at) = self.tlb.write(linear, size) {
            let from = self.fpu.frame.vector[n & 31].as_ptr().cast::<u8>();
            // SAFETY: as above.
            unsafe { copy(from, at, size.min(64)) };
            return Ok(());
        }
        let bytes = self.fpu.bytes(n);
        self.write_bytes(linear, &bytes[..(size as usize).min(64)])
    }

    /// Copies guest memory to the vector register `n`: `size` is 16, 32 or 64. The rest of the register stays.
    #[inline(always)]
    pub(super) fn load_vector(&mut self, n: usize, linear: u64, size: u64) -> Exec {
        if let Some(at) = self.tlb.read(linear, size) {
            let to = self.fpu.frame.vector[n & 31].as_mut_ptr().cast::<u8>();
            // SAFETY: as in `load_operand`; a register has 64 bytes.
            unsafe { copy(at, to, size.min(64)) };
            return Ok(());
        }
        self.load_operand(linear, size)?;
        let frame = &mut self.fpu.frame;
        for (word, from) in
            frame.vector[n & 31].iter_mut().zip(frame.operand[..(size as usize).min(64)].chunks_exact(8))
        {
            *word = from.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        }
        Ok(())
    }
}
