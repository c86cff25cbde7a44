use super::*;

/// Xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// A random script with a twin near its start. Values are often small or sparse, as those that mean something are.
fn script(seed: u64) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let length = 200 + random.next() as usize % 2_000;
    let twin_at = random.next() as usize % length;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        if bytes.len() >= twin_at && bytes.len() < twin_at + 8 {
            bytes.push(0x5f);
        }
        let word = random.next();
        bytes.push(match word & 7 {
            0 | 1 => (word >> 8) as u8 & (word >> 16) as u8 & (word >> 24) as u8,
            2 => (word >> 8) as u8 & 0x0f,
            3 => 1 << (word >> 8 & 7),
            _ => (word >> 8) as u8,
        });
    }
    bytes
}

fn check(device: &str) {
    for seed in 0..400 {
        run(device, &script(seed));
    }
}

/// Puts values that no device has into one of `rarity` places of a saved state.
fn spoil(value: &mut serde_json::Value, rarity: u64, random: &mut Random) {
    use serde_json::Value;
    match value {
        Value::Number(_) if random.next().is_multiple_of(rarity) => {
            let word = random.next();
            *value = match word & 7 {
                0 => (word >> 8).into(),
                1 => (word >> 33).into(),
                2 => (word as i64).into(),
                // Bytes, the only numbers that most fields take.
                _ => (word >> 56).into(),
            };
        }
        Value::Bool(flag) => *flag ^= random.next().is_multiple_of(rarity),
        Value::Array(items) => {
            items.iter_mut().for_each(|item| spoil(item, rarity, random));
            if random.next().is_multiple_of(8 * rarity) {
                let more = items.clone();
                items.extend(more.into_iter().cycle().take(100));
            }
        }
        Value::Object(fields) => fields.values_mut().for_each(|field| spoil(field, rarity, random)),
        _ => {}
    }
}

/// A state from a hostile snapshot is refused, or the device goes on with it and keeps its promises.
fn check_hostile<S: Subject>() {
    for seed in 0..300 {
        let mut random = Random(seed * 77 + 1);
        let now = 1 << 40;
        let mut subject = S::fresh(now);
        for _ in 0..100 {
            let (offset, value) = (random.next() & 0xff, random.next());
            let op = Op { kind: (value >> 60) as u8 % 6, offset, width: 4, value: value & 0xffff_ffff };
            subject.act(op, now);
        }
        subject.restore_spoilt(now, &mut |value| spoil(value, 4 << (seed % 6), &mut random));
        let _ = follow(subject, now, &mut Script(&script(seed)));
    }
}

macro_rules! hostile {
    ($($name:ident: $subject:ty),*) => {
        mod hostile {
            use super::*;
            $(#[test]
            fn $name() {
                check_hostile::<$subject>();
            })*
        }
    };
}

hostile!(
    lapic: subjects::Apics,
    ioapic: subjects::IoApics,
    pic: subjects::Pics,
    pit: subjects::Single<crate::Pit>,
    hpet: subjects::Single<crate::Hpet>,
    acpi: subjects::Single<crate::AcpiPm>,
    rtc: subjects::Single<crate::Rtc>,
    uart: subjects::Single<crate::Uart>,
    ps2: subjects::Single<crate::Ps2>
);

macro_rules! property {
    ($($device:ident),*) => {
        $(#[test]
        fn $device() {
            assert!(DEVICES.contains(&stringify!($device)));
            check(stringify!($device));
        })*

        #[test]
        fn every_device_is_checked() {
            assert_eq!([$(stringify!($device)),*], DEVICES);
        }
    };
}

property!(lapic, ioapic, pic, pit, hpet, acpi, rtc, uart, ps2, ports, reset);
