//! Every device driven by arbitrary bytes, for fuzzing and property tests.
//!
//! The bytes are a script: reads and writes of any shape, outside events, steps of time, resets. At some point a twin
//! is made by saving and restoring at another time; from then on both get the same script and must show the same.

mod subjects;
#[cfg(test)]
mod tests;

/// What [`run`] takes as `device`.
pub const DEVICES: [&str; 11] =
    ["lapic", "ioapic", "pic", "pit", "hpet", "acpi", "rtc", "uart", "ps2", "ports", "reset"];

/// Drives `device` by `data`. Unknown devices do nothing.
///
/// # Panics
/// If the device breaks a promise: a restored twin differs, or a deadline does not move on.
pub fn run(device: &str, data: &[u8]) {
    match device {
        "lapic" => drive::<subjects::Apics>(data),
        "ioapic" => drive::<subjects::IoApics>(data),
        "pic" => drive::<subjects::Pics>(data),
        "pit" => drive::<subjects::Single<crate::Pit>>(data),
        "hpet" => drive::<subjects::Single<crate::Hpet>>(data),
        "acpi" => drive::<subjects::Single<crate::AcpiPm>>(data),
        "rtc" => drive::<subjects::Single<crate::Rtc>>(data),
        "uart" => drive::<subjects::Single<crate::Uart>>(data),
        "ps2" => drive::<subjects::Single<crate::Ps2>>(data),
        "ports" => drive::<subjects::Ports>(data),
        "reset" => drive::<subjects::Resets>(data),
        _ => {}
    }
}

/// One step of a script.
#[derive(Debug, Clone, Copy)]
struct Op {
    /// What happens; what it means beyond reads and writes is the subject's business.
    kind: u8,
    offset: u64,
    width: u8,
    value: u64,
}

/// Something that a script can drive.
trait Subject: Sized {
    fn fresh(now: u64) -> Self;
    /// Carries out one step and tells what could be seen of it.
    fn act(&mut self, op: Op, now: u64) -> u64;
    fn advance(&mut self, now: u64);
    fn deadline(&self) -> Option<u64>;
    /// Another one, restored at `later` from this one's state at `now`.
    fn twin(&mut self, now: u64, later: u64) -> Self;
    /// Whether both are in the same state and drive their lines the same.
    fn same(&self, now: u64, twin: &Self, later: u64) -> bool;
    /// Restores its own state after `spoil` has been at it; a state that is refused changes nothing.
    #[cfg(test)]
    fn restore_spoilt(&mut self, now: u64, spoil: &mut dyn FnMut(&mut serde_json::Value));
}

/// A multiple of every period that depends on absolute time (that of memory refresh).
const TWIN_SHIFT: u64 = 30_170 * 1_000_003;

struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    fn number(&mut self, bytes: u8) -> Option<u64> {
        (0..bytes).try_fold(0, |number, i| Some(number | u64::from(self.byte()?) << (8 * i)))
    }
}

fn drive<S: Subject>(data: &[u8]) {
    let now = 1_000_000;
    let _ = follow(S::fresh(now), now, &mut Script(data));
}

/// Plays the script to its end, which is `None`.
fn follow<S: Subject>(mut subject: S, mut now: u64, script: &mut Script<'_>) -> Option<()> {
    let mut twin: Option<S> = None;
    loop {
        let step = script.byte()?;
        match step >> 5 {
            0 => {
                // A step of time from nanoseconds to half an hour.
                now += script.number(1)? << (step & 0x1f);
                subject.advance(now);
                if let Some(twin) = &mut twin {
                    twin.advance(now + TWIN_SHIFT);
                }
            }
            1 => {
                // To the next deadline, if it lies within a year.
                let next = subject.deadline().filter(|&next| next.wrapping_sub(now) < 1 << 55);
                now = next.unwrap_or(now);
                subject.advance(now);
                if let Some(twin) = &mut twin {
                    twin.advance(now + TWIN_SHIFT);
                }
                assert!(
                    subject.deadline().is_none_or(|next| next > now),
                    "a deadline that has come comes again"
                );
            }
            2 if step == 0x5f => twin = Some(subject.twin(now, now + TWIN_SHIFT)),
            kind => {
                let width = 1 << (step & 3);
                let op =
                    Op { kind: kind - 2, offset: script.number(2)?, width, value: script.number(width)? };
                let seen = subject.act(op, now);
                if let Some(twin) = &mut twin {
                    assert_eq!(twin.act(op, now + TWIN_SHIFT), seen, "{op:x?}: a twin sees something else");
                }
            }
        }
        if let Some(twin) = &twin {
            assert!(subject.same(now, twin, now + TWIN_SHIFT), "a twin's state differs");
            let later = subject.deadline().map(|next| next.wrapping_add(TWIN_SHIFT));
            assert_eq!(twin.deadline(), later, "a twin's deadline differs");
        }
    }
}
