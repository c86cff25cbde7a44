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
