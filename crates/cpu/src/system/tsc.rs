//! The time-stamp counter (SDM vol. 3B §18.17): the host's, from an origin common to all processors of a VM, scaled
//! if another frequency is asked for, plus what this processor's guest has added.
#![expect(unsafe_code, reason = "RDTSC and clock_gettime")]

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{Cpu, cr4};
use crate::fault::Exec;
use crate::op::{Handler, Op};
use crate::regs::at;

/// One processor's TSC. Copies that are made before a guest has written to it agree.
#[derive(Debug, Clone)]
pub(crate) struct Tsc {
    hz: u64,
    /// Host TSC when the guest's is zero.
    origin: u64,
    /// Guest ticks per host tick as a 64.64 fixed-point number; `None` for one.
    ratio: Option<(u64, u64)>,
    /// What this processor's guest has added.
    offset: u64,
    adjust: u64,
}

impl Tsc {
    /// A TSC that starts at zero now and runs at `hz`.
    pub(crate) fn new(hz: u64) -> Self {
        Self::with_host(hz, host_tsc_hz(), host_tsc())
    }

    fn with_host(hz: u64, host: u64, origin: u64) -> Self {
        let (hz, host) = (hz.max(1), host.max(1));
        let whole = hz / host;
        let fraction = ((u128::from(hz % host) << 64) / u128::from(host)) as u64;
        Self { hz, origin, ratio: (hz != host).then_some((whole, fraction)), offset: 0, adjust: 0 }
    }

    /// Frequency in Hz.
    pub(crate) fn hz(&self) -> u64 {
        self.hz
    }

    /// The count.
    #[inline]
    pub(crate) fn now(&self) -> u64 {
        self.at(host_tsc())
    }

    fn at(&self, host: u64) -> u64 {
        // Host processors whose counters are a few ticks behind the creator's must not wrap.
        let ticks = host.saturating_sub(self.origin);
        let ticks = match self.ratio {
            None => ticks,
            Some((whole, fraction)) => {
                let part = (u128::from(ticks) * u128::from(fraction)) >> 64;
                ticks.wrapping_mul(whole).wrapping_add(part as u64)
            }
        };
        ticks.wrapping_add(self.offset)
    }

    /// What this processor adds to the VM's count.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// IA32_TSC_ADJUST.
    pub(crate) fn adjust(&self) -> u64 {
        self.adjust
    }

    /// WRMSR IA32_TIME_STAMP_COUNTER: moves IA32_TSC_ADJUST by as much (§18.17.3).
    pub(crate) fn write(&mut self, value: u64) {
        let by = value.wrapping_sub(self.now());
        self.add(by);
    }

    /// WRMSR IA32_TSC_ADJUST: moves the counter by as much.
    pub(crate) fn write_adjust(&mut self, value: u64) {
        let by = value.wrapping_sub(self.adjust);
        self.add(by);
    }

    fn add(&mut self, by: u64) {
        self.adjust = self.adjust.wrapping_add(by);
        self.offset = self.offset.wrapping_add(by);
    }

    /// Puts back a saved count; what the guest had added to it is told by [`Tsc::restore_adjust`].
    pub(crate) fn restore(&mut self, value: u64) {
        self.offset = self.offset.wrapping_add(value.wrapping_sub(self.now()));
    }

    /// Puts back a saved adjustment without moving the count.
    pub(crate) fn restore_adjust(&mut self, adjust: u64) {
        self.adjust = adjust;
    }

    /// Agrees with the VM's count again.
    pub(crate) fn reset(&mut self) {
        (self.offset, self.adjust) = (0, 0);
    }
}

/// The host's time-stamp counter.
#[inline]
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux leaves it enabled for user mode.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Frequency of the host's TSC in Hz. Found once: what CPUID says if a short measurement agrees, else a longer one.
pub(crate) fn host_tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        if let Some(claimed) = claimed_hz() {
            let measured = measure(4_000_000);
            if claimed.abs_diff(measured) < claimed / 500 {
                return claimed;
            }
        }
        measure(50_000_000)
    })
}

/// What CPUID says about the host's TSC frequency: leaf 15H with a known crystal, or a hypervisor's timing leaf.
fn claimed_hz() -> Option<u64> {
    if __cpuid(0).eax >= 0x15 {
        let leaf = __cpuid_count(0x15, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some((u128::from(leaf.ecx) * u128::from(leaf.ebx) / u128::from(leaf.eax)) as u64);
        }
    }
    if __cpuid(1).ecx & 1 << 31 != 0 {
        let last = __cpuid(0x4000_0000).eax;
        if (0x4000_0010..0x4000_0100).contains(&last) {
            let khz = __cpuid(0x4000_0010).eax;
            return (khz != 0).then(|| u64::from(khz) * 1000);
        }
    }
    None
}

/// Counts ticks over at least `ns` of CLOCK_MONOTONIC_RAW.
fn measure(ns: u64) -> u64 {
    let (start_tsc, start) = sample();
    loop {
        std::thread::sleep(std::time::Duration::from_nanos(ns / 4));
        let (tsc, now) = sample();
        if now - start >= ns {
            return (u128::from(tsc - start_tsc) * 1_000_000_000 / u128::from(now - start)) as u64;
        }
    }
}

/// A TSC value and the time at which it was read: the closest of several tries, as the thread may be preempted.
fn sample() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..8 {
        let before = host_tsc();
        let now = raw_ns();
        let after = host_tsc();
        let width = after.wrapping_sub(before);
        if width < best.0 {
            best = (width, before.wrapping_add(width / 2), now);
        }
    }
    (best.1, best.2)
}

fn raw_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer leads to a live timespec; the clock exists since Linux 2.6.28.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

pub(super) fn select(insn: &Instruction, _: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Rdtsc => rdtsc,
        Mnemonic::Rdtscp => rdtscp,
        Mnemonic::Rdpid => rdpid,
        Mnemonic::Rdpmc => rdpmc,
        _ => return None,
    })
}

/// #GP(0) above level 0 if CR4.TSD says so.
fn allowed(cpu: &mut Cpu) -> Exec {
    if cpu.mode.cpl > 0 && cpu.cr4 & cr4::TSD != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

fn rdtsc(cpu: &mut Cpu, _: &Op) -> Exec {
    allowed(cpu)?;
    let now = cpu.tsc.now();
    cpu.set_edx_eax(now);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, _: &Op) -> Exec {
    if !cpu.msrs.model.rdtscp {
        return Err(cpu.ud());
    }
    allowed(cpu)?;
    let now = cpu.tsc.now();
    cpu.set_edx_eax(now);
    cpu.regs.set(at::RCX, cpu.msrs.tsc_aux as u32);
    Ok(())
}

fn rdpid(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.msrs.model.rdpid {
        return Err(cpu.ud());
    }
    cpu.regs.set64(op.dst, cpu.msrs.tsc_aux);
    Ok(())
}

/// There are no counters to name.
fn rdpmc(cpu: &mut Cpu, _: &Op) -> Exec {
    Err(cpu.gp(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_scaled_without_loss() {
        let clock = Tsc::with_host(3_000_000_000, 2_000_000_000, 1000);
        assert_eq!(clock.at(1000), 0);
        assert_eq!(clock.at(1002), 3);
        assert_eq!(clock.at(500), 0, "a counter behind the origin does not wrap");
        let year = 365 * 86_400 * 2_000_000_000u64;
        assert!(clock.at(1000 + year).abs_diff(year / 2 * 3) < 2);
        let slow = Tsc::with_host(1_000_000_000, 3_000_000_000, 0);
        assert!(slow.at(3_000_000_000).abs_diff(1_000_000_000) < 2);
    }

    #[test]
    fn count_and_adjustment_move_together() {
        let mut tsc = Tsc::new(host_tsc_hz());
        tsc.write_adjust(1 << 60);
        assert!(tsc.now() >= 1 << 60);
        let (count, adjust) = (tsc.now(), tsc.adjust());
        tsc.write(count.wrapping_sub(1 << 59));
        assert!(tsc.adjust() <= adjust - (1 << 59));
        tsc.restore(5);
        tsc.restore_adjust(7);
        assert!(tsc.adjust() == 7 && tsc.now() < 1 << 50);
    }

    #[test]
    fn the_host_frequency_is_plausible_and_stable() {
        let hz = host_tsc_hz();
        assert!((100_000_000..20_000_000_000).contains(&hz), "{hz}");
        assert_eq!(hz, host_tsc_hz());
    }
}
