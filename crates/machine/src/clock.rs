//! Clocks that devices are given.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use skep_chipset::TscClock;
use skep_hv::{Vm, monotonic_ns};

use crate::spec::Rtc;

const SECOND: u128 = 1_000_000_000;

/// The guest's TSC as the back end counts it. Deadlines are converted relative to its present count, so that host clocks
/// which drift apart over days do not matter.
pub(crate) struct VmTsc(pub(crate) Arc<dyn Vm>);

impl TscClock for VmTsc {
    fn tsc_at(&self, vcpu: u32, now: u64) -> u64 {
        let (tsc, host, hz) = (self.0.tsc(vcpu), monotonic_ns(), u128::from(self.0.tsc_hz()));
        let ticks = |ns: u64| (u128::from(ns) * hz / SECOND) as u64;
        if now >= host { tsc.wrapping_add(ticks(now - host)) } else { tsc.wrapping_sub(ticks(host - now)) }
    }

    fn time_of(&self, vcpu: u32, tsc: u64) -> u64 {
        let (current, host, hz) = (self.0.tsc(vcpu), monotonic_ns(), u128::from(self.0.tsc_hz()).max(1));
        let Some(ahead) = tsc.checked_sub(current) else { return 0 };
        let ns = (u128::from(ahead) * SECOND).div_ceil(hz);
        u64::try_from(ns).map_or(u64::MAX, |ns| host.saturating_add(ns))
    }
}

/// The time of day that the guest's clock starts with: ns since 1970 in the zone asked for.
pub(crate) fn time_of_day(rtc: Rtc) -> i64 {
    let utc = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |ns| -ns),
    };
    match rtc {
        Rtc::Utc => utc,
        Rtc::Localtime => utc.saturating_add(local_offset_ns(utc.div_euclid(SECOND as i64))),
    }
}

/// How far the host's local time is ahead of UTC at `seconds` since 1970, in ns.
#[expect(unsafe_code, reason = "only the C library knows the time zone")]
fn local_offset_ns(seconds: i64) -> i64 {
    // SAFETY: an all-zero `tm` is a valid value of that plain C structure.
    let mut local: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers lead to live values of the right type for the length of the call.
    let known = unsafe { !libc::localtime_r(&seconds, &mut local).is_null() };
    if known { local.tm_gmtoff.saturating_mul(SECOND as i64) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_time_is_within_a_day_of_utc() {
        let (utc, local) = (time_of_day(Rtc::Utc), time_of_day(Rtc::Localtime));
        assert!(utc > 1_600_000_000 * SECOND as i64);
        assert!((local - utc).abs() <= 26 * 3600 * SECOND as i64);
    }
}
