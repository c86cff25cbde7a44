//! Nanoseconds and ticks of a device's own clock.
//!
//! Instants are wrapping `u64` nanoseconds: a device restored in a young process may have started counting before
//! that process's clock did. Only differences mean anything.

/// Nanoseconds in a second.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Whole ticks of a clock of `hz` in `ns`.
pub(crate) fn ticks(ns: u64, hz: u64) -> u64 {
    (u128::from(ns) * u128::from(hz) / u128::from(SECOND)) as u64
}

/// The shortest time in ns in which a clock of `hz` makes `ticks` ticks.
pub(crate) fn ticks_to_ns(ticks: u64, hz: u64) -> u64 {
    (u128::from(ticks) * u128::from(SECOND)).div_ceil(u128::from(hz)).try_into().unwrap_or(u64::MAX)
}

/// Time since `start`; 0 if `start` lies ahead.
pub(crate) fn since(start: u64, now: u64) -> u64 {
    let elapsed = now.wrapping_sub(start);
    if elapsed > u64::MAX / 2 { 0 } else { elapsed }
}

/// Whether the instant `at` has come by `now`.
pub(crate) fn due(at: u64, now: u64) -> bool {
    now.wrapping_sub(at) <= u64::MAX / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_back() {
        for hz in [3_579_545, 1_193_182, 10_000_000, 32_768] {
            for n in [0, 1, 2, 3, 1000, 65_536, 1 << 40] {
                let ns = ticks_to_ns(n, hz);
                assert_eq!(ticks(ns, hz), n);
                assert!(n == 0 || ticks(ns - 1, hz) == n - 1);
            }
        }
    }

    #[test]
    fn instants_before_zero() {
        assert_eq!(since(10u64.wrapping_sub(100), 10), 100);
        assert_eq!(since(20, 10), 0);
    }
}
