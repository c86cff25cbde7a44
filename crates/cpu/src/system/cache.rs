//! Caches and memory ordering. The caches are the host's, coherent and of no concern to the guest; what remains are
//! privilege checks, the faults of a cache-line flush, and fences, which are the host's.
#![expect(unsafe_code, reason = "fences are intrinsics of a processor feature")]

use std::arch::x86_64::{_mm_lfence, _mm_mfence, _mm_sfence};
use std::sync::atomic::{Ordering, fence};

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::mmu::Access;
use crate::op::{Handler, Op};

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => |cpu, _| {
            cpu.supervisor()?;
            fence(Ordering::SeqCst);
            Ok(())
        },
        Mnemonic::Clflush => flush,
        Mnemonic::Clflushopt => {
            |cpu, op| if cpu.msrs.model.clflushopt { flush(cpu, op) } else { Err(cpu.ud()) }
        }
        Mnemonic::Clwb => |cpu, op| if cpu.msrs.model.clwb { flush(cpu, op) } else { Err(cpu.ud()) },
        Mnemonic::Lfence => |_, _| {
            // SAFETY: every x86-64 processor has SSE2.
            unsafe { _mm_lfence() };
            Ok(())
        },
        Mnemonic::Sfence => |_, _| {
            // SAFETY: every x86-64 processor has SSE2.
            unsafe { _mm_sfence() };
            Ok(())
        },
        Mnemonic::Mfence => |_, _| {
            // SAFETY: every x86-64 processor has SSE2.
            unsafe { _mm_mfence() };
            Ok(())
        },
        Mnemonic::Serialize => |cpu, _| {
            if !cpu.msrs.model.serialize {
                return Err(cpu.ud());
            }
            fence(Ordering::SeqCst);
            Ok(())
        },
        Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1 => |_, _| Ok(()),
        _ => return None,
    })
}

/// Faults as a read of one byte does (SDM vol. 2A, CLFLUSH).
fn flush(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op, 1, Access::Read)?;
    cpu.probe(linear, 1, Access::Read)?;
    fence(Ordering::SeqCst);
    Ok(())
}
