//! The real-time clock and CMOS: any date, any format, any alarm.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skep_chipset::{Rtc, RtcConfig};
use skep_fuzz::{Script, drive, line};

fuzz_target!(|script: Script| {
    let mut rtc = Rtc::new(RtcConfig::default(), line(), u64::from(script.start));
    drive(&mut rtc, &script, |rtc, what, value, now| match what % 2 {
        0 => rtc.set_time(value as i64, now),
        _ => drop(rtc.time(now)),
    });
});
