//! KVM's paravirtual interface (Linux: Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst): clock, wall clock, steal
//! time with the remote TLB flush that rests on it, and hypercalls.
//!
//! What CPUID does not show is not there: its MSRs are #GP(0), its hypercalls `-ENOSYS`. Left out are PV EOI (the end of
//! an interrupt is an MSR write that never leaves this process, cheaper than looking for a flag in memory before every
//! delivery), PV unhalt (a HLT with interrupts off ends the machine), and asynchronous page faults (guest memory is never
//! absent).

use std::time::{SystemTime, UNIX_EPOCH};

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};
use crate::regs::at;

/// MSRs.
mod index {
    pub(super) const WALL_CLOCK: u32 = 0x11;
    pub(super) const SYSTEM_TIME: u32 = 0x12;
    pub(super) const WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
    pub(super) const SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    pub(super) const STEAL_TIME: u32 = 0x4b56_4d03;
}

/// Features, leaf 4000_0001H EAX.
mod feature {
    pub(super) const CLOCKSOURCE: u32 = 1 << 0;
    pub(super) const CLOCKSOURCE2: u32 = 1 << 3;
    pub(super) const STEAL_TIME: u32 = 1 << 5;
    pub(super) const SEND_IPI: u32 = 1 << 11;
    pub(super) const SCHED_YIELD: u32 = 1 << 13;
    pub(super) const CLOCKSOURCE_STABLE: u32 = 1 << 24;
}

/// Bit 0 of a clock or steal-time MSR.
const ENABLED: u64 = 1;
/// Flags of the time structure: the TSCs of all processors agree.
const TSC_STABLE: u8 = 1;
/// Offset and bits of `preempted` in the steal-time structure.
const PREEMPTED_AT: u64 = 16;
const PREEMPTED: u8 = 1;
const FLUSH_TLB: u8 = 2;

const NS: u64 = 1_000_000_000;

/// What the guest has registered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Paravirt {
    wall_clock: u64,
    system_time: u64,
    steal_time: u64,
    /// Counts updates of the time structure; even.
    version: u32,
}

impl Paravirt {
    /// MSRs that a saved state holds, of those that `features` give.
    pub(super) fn indices(features: u32) -> Vec<u32> {
        let mut indices = Vec::new();
        if features & feature::CLOCKSOURCE2 != 0 {
            indices.extend([index::WALL_CLOCK_NEW, index::SYSTEM_TIME_NEW]);
        } else if features & feature::CLOCKSOURCE != 0 {
            indices.extend([index::WALL_CLOCK, index::SYSTEM_TIME]);
        }
        if features & feature::STEAL_TIME != 0 {
            indices.push(index::STEAL_TIME);
        }
        indices
    }

    pub(super) fn read(&self, msr: u32, features: u32) -> Option<u64> {
        let has = |feature| features & feature != 0;
        Some(match msr {
            index::WALL_CLOCK if has(feature::CLOCKSOURCE) => self.wall_clock,
            index::WALL_CLOCK_NEW if has(feature::CLOCKSOURCE2) => self.wall_clock,
            index::SYSTEM_TIME if has(feature::CLOCKSOURCE) => self.system_time,
            index::SYSTEM_TIME_NEW if has(feature::CLOCKSOURCE2) => self.system_time,
            index::STEAL_TIME if has(feature::STEAL_TIME) => self.steal_time,
            _ => return None,
        })
    }
}

/// Multiplier and shift with which a guest turns ticks of `hz` into nanoseconds: `(ticks << shift) * multiplier >> 32`.
fn clock_scale(hz: u64) -> (u32, i8) {
    let mut shift = 0i8;
    let mut hz = u128::from(hz.max(1));
    let ns = u128::from(NS);
    // The multiplier shall have its top bit set: ns / hz in [1/2, 1).
    let mut scaled = ns;
    while scaled < hz {
        scaled *= 2;
        shift -= 1;
    }
    while scaled >= 2 * hz {
        hz *= 2;
        shift += 1;
    }
    // Now 1 <= scaled / hz < 2: one more bit of shift makes it fit.
    shift += 1;
    let multiplier = (scaled << 31) / hz;
    (multiplier as u32, shift)
}

impl Cpu {
    /// WRMSR of one of these; `None`: #GP(0).
    pub(super) fn kvm_msr_write(&mut self, msr: u32, value: u64) -> Option<()> {
        self.msrs.kvm.read(msr, self.msrs.model.paravirt)?;
        match msr {
            index::WALL_CLOCK | index::WALL_CLOCK_NEW => {
                self.msrs.kvm.wall_clock = value;
                self.write_wall_clock(value);
            }
            index::SYSTEM_TIME | index::SYSTEM_TIME_NEW => {
                self.msrs.kvm.system_time = value;
                self.publish_clock();
            }
            _ => {
                // Bits 5:1 are reserved, the structure is aligned to 64 bytes.
                if value & 0x3e != 0 {
                    return None;
                }
                self.msrs.kvm.steal_time = value;
                if value & ENABLED != 0 {
                    // Nothing has been stolen; padding stays the guest's. An address without memory is ignored.
                    let _ = self.memory.write(value & !63, &[0; 17]);
                }
            }
        }
        Some(())
    }

    /// To be called when the guest has moved its TSC: the machine's view of it, and the clock that counts from it.
    pub(super) fn tsc_changed(&mut self) {
        self.mailbox.set_tsc_offset(self.tsc.offset());
        self.publish_clock();
    }

    /// Writes the time structure. The clock is the VM's TSC in nanoseconds, so all processors show the same, and a guest
    /// that moves its own TSC does not move it.
    fn publish_clock(&mut self) {
        let at = self.msrs.kvm.system_time;
        if at & ENABLED == 0 {
            return;
        }
        let at = at & !1;
        let (multiplier, shift) = clock_scale(self.tsc.hz());
        let version = self.msrs.kvm.version.wrapping_add(2);
        self.msrs.kvm.version = version;
        let stable = self.msrs.model.paravirt & feature::CLOCKSOURCE_STABLE != 0;
        let mut structure = [0; 32];
        structure[8..16].copy_from_slice(&self.tsc.adjust().to_le_bytes());
        structure[24..28].copy_from_slice(&multiplier.to_le_bytes());
        structure[28] = shift as u8;
        structure[29] = if stable { TSC_STABLE } else { 0 };
        // Odd while it changes. Where no memory is, nothing is written.
        let _ = self.memory.write_u32(at, version.wrapping_sub(1));
        let _ = self.memory.write(at.saturating_add(8), &structure[8..]);
        let _ = self.memory.write_u32(at, version);
    }

    /// The VM's clock in ns.
    fn kvm_clock(&self) -> u64 {
        let ticks = self.tsc.now().wrapping_sub(self.tsc.adjust());
        (u128::from(ticks) * u128::from(NS) / u128::from(self.tsc.hz().max(1))) as u64
    }

    /// Writes the time of day at which the clock was zero.
    fn write_wall_clock(&mut self, at: u64) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let start = (since.as_nanos() as u64).wrapping_sub(self.kvm_clock());
        let old = self.memory.read_u32(at).unwrap_or(0);
        let version = (old | 1).wrapping_add(1);
        let _ = self.memory.write_u32(at, version.wrapping_sub(1));
        let _ = self.memory.write_u32(at.saturating_add(4), (start / NS) as u32);
        let _ = self.memory.write_u32(at.saturating_add(8), (start % NS) as u32);
        let _ = self.memory.write_u32(at, version);
    }

    fn preempted(&self) -> Option<u64> {
        let at = self.msrs.kvm.steal_time;
        (at & ENABLED != 0).then_some((at & !63) + PREEMPTED_AT)
    }

    /// Before the processor sleeps: others may ask for a TLB flush by a flag instead of an interrupt.
    pub(crate) fn kvm_going_to_sleep(&mut self) {
        if let Some(at) = self.preempted() {
            let _ = self.memory.store_u8(at, PREEMPTED);
        }
    }

    /// Before it executes anything again.
    pub(crate) fn kvm_woken(&mut self) {
        let Some(at) = self.preempted() else { return };
        let Ok(mut seen) = self.memory.load_u8(at) else { return };
        while let Ok(Err(found)) = self.memory.compare_exchange_u8(at, seen, 0) {
            seen = found;
        }
        if seen & FLUSH_TLB != 0 {
            self.flush_tlb();
        }
    }
}

/// Hypercall numbers and errors, Linux include/uapi/linux/kvm_para.h.
mod call {
    pub(super) const VAPIC_POLL_IRQ: u64 = 1;
    pub(super) const SEND_IPI: u64 = 10;
    pub(super) const SCHED_YIELD: u64 = 11;
    pub(super) const ENOSYS: u64 = (-1000i64) as u64;
    pub(super) const EPERM: u64 = (-1i64) as u64;
}

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    matches!(insn.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall).then_some(hypercall as Handler)
}

fn hypercall(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.msrs.model.paravirt == 0 {
        return Err(cpu.ud());
    }
    let wide = cpu.is_64bit();
    let argument =
        |register| if wide { cpu.regs.r64(register) } else { u64::from(cpu.regs.get::<u32>(register)) };
    let number = argument(at::RAX);
    let arguments = [at::RBX, at::RCX, at::RDX, at::RSI].map(argument);
    let result = if cpu.mode.cpl > 0 { call::EPERM } else { perform(cpu, number, arguments) };
    if wide {
        cpu.regs.set64(at::RAX, result);
    } else {
        cpu.regs.set(at::RAX, result as u32);
    }
    Ok(())
}

fn perform(cpu: &mut Cpu, number: u64, [a0, a1, a2, a3]: [u64; 4]) -> u64 {
    let features = cpu.msrs.model.paravirt;
    match number {
        call::VAPIC_POLL_IRQ => {
            cpu.ask_apic = true;
            cpu.look = true;
            0
        }
        call::SEND_IPI if features & feature::SEND_IPI != 0 => send_ipi(cpu, a0, a1, a2 as u32, a3),
        call::SCHED_YIELD if features & feature::SCHED_YIELD != 0 => {
            std::thread::yield_now();
            0
        }
        _ => call::ENOSYS,
    }
}

/// `low` and `high` are a bit map of APIC IDs from `first` on, of twice 64 (outside of 64-bit mode 32) bits. Returns how many
/// processors were named.
fn send_ipi(cpu: &mut Cpu, low: u64, high: u64, first: u32, icr: u64) -> u64 {
    // Fixed, lowest priority and NMI have meaning here (SDM vol. 3A §11.6.1).
    if !matches!(icr >> 8 & 7, 0 | 1 | 4) {
        return call::ENOSYS;
    }
    let cluster = if cpu.is_64bit() { 64 } else { 32 };
    let bits = u128::from(low) | u128::from(high) << cluster;
    let mut targets =
        (0..2 * cluster).filter(|&bit| bits >> bit & 1 != 0).filter_map(|bit| first.checked_add(bit));
    cpu.io().send_ipis(icr, &mut targets);
    cpu.ask_apic = true;
    cpu.look = true;
    u64::from(bits.count_ones())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_computes_nanoseconds() {
        for hz in [1, 1_000, 999_999_999, NS, 2_499_998_000, 2 * NS, 3_700_000_001, 5 * NS, 1 << 40] {
            let (multiplier, shift) = clock_scale(hz);
            assert!(multiplier >= 1 << 31);
            // As Linux's pvclock_scale_delta() does, over an hour.
            let ticks = u128::from(hz) * 3600;
            let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let ns = (shifted * u128::from(multiplier)) >> 32;
            let wanted = u128::from(NS) * 3600;
            assert!(
                ns.abs_diff(wanted) <= wanted / 1_000_000_000 + 2 * u128::from(NS / hz + 1),
                "{hz}: {ns}"
            );
        }
    }
}
