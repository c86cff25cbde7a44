//! Memory-type range registers (SDM vol. 3A §12.11). They are kept for the guest to read back: memory that a software
//! processor reaches has one type.

const CAP: u32 = super::msr::index::MTRRCAP;
const VARIABLE: u32 = 0x200;
/// Pairs of base and mask.
const PAIRS: u32 = 8;
const DEF_TYPE: u32 = 0x2ff;
/// 64K, 16K (2), 4K (8).
const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// The registers.
#[derive(Debug, Clone)]
pub(crate) struct Mtrrs {
    /// Bits of an address that do not exist.
    reserved: u64,
    variable: [u64; 2 * PAIRS as usize],
    fixed: [u64; FIXED.len()],
    def_type: u64,
}

impl Mtrrs {
    /// Disabled, as after reset.
    pub(crate) fn new(physical_bits: u8) -> Self {
        Self {
            reserved: !((1 << physical_bits) - 1),
            variable: [0; 16],
            fixed: [0; FIXED.len()],
            def_type: 0,
        }
    }

    /// Those that can be written.
    pub(crate) fn indices() -> impl Iterator<Item = u32> {
        (VARIABLE..VARIABLE + 2 * PAIRS).chain(FIXED).chain([DEF_TYPE])
    }

    /// Whether `msr` is one of these.
    pub(crate) fn knows(&self, msr: u32) -> bool {
        msr == CAP || Self::indices().any(|index| index == msr)
    }

    pub(crate) fn read(&self, msr: u32) -> Option<u64> {
        Some(match msr {
            // Fixed ranges, write-combining, eight variable ranges.
            CAP => u64::from(PAIRS) | 1 << 8 | 1 << 10,
            DEF_TYPE => self.def_type,
            VARIABLE..0x210 => self.variable[(msr - VARIABLE) as usize],
            _ => self.fixed[FIXED.iter().position(|&index| index == msr)?],
        })
    }

    /// `None`: a reserved bit or memory type, or a read-only register.
    pub(crate) fn write(&mut self, msr: u32, value: u64) -> Option<()> {
        match msr {
            DEF_TYPE => {
                (value & !0xcff == 0 && kind(value as u8)).then_some(())?;
                self.def_type = value;
            }
            VARIABLE..0x210 => {
                let at = (msr - VARIABLE) as usize;
                let good = if at.is_multiple_of(2) {
                    value & (self.reserved | 0xf00) == 0 && kind(value as u8)
                } else {
                    value & (self.reserved | 0x7ff) == 0
                };
                good.then_some(())?;
                self.variable[at] = value;
            }
            _ => {
                let at = FIXED.iter().position(|&index| index == msr)?;
                value.to_le_bytes().into_iter().all(kind).then_some(())?;
                self.fixed[at] = value;
            }
        }
        Some(())
    }
}

/// UC, WC, WT, WP, WB.
fn kind(value: u8) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_checked_and_kept() {
        let mut m = Mtrrs::new(46);
        assert_eq!(m.read(CAP), Some(0x508));
        assert_eq!(m.write(CAP, 0), None);
        assert_eq!(m.write(0x200, 0xc000_0006), Some(()));
        assert_eq!(m.read(0x200), Some(0xc000_0006));
        assert_eq!(m.write(0x200, 2), None, "type 2 is reserved");
        assert_eq!(m.write(0x201, 1 << 46), None, "beyond MAXPHYADDR");
        assert_eq!(m.write(0x201, 0x3fff_c000_0800), Some(()));
        assert_eq!(m.write(0x20f, 0x800), Some(()));
        assert!(!m.knows(0x210) && m.knows(0x26f));
        assert_eq!(m.write(0x26f, 0x0606_0606_0606_0606), Some(()));
        assert_eq!(m.write(0x250, 0x0206_0606_0606_0606), None);
        assert_eq!(m.write(DEF_TYPE, 0xc06), Some(()));
        assert_eq!(m.write(DEF_TYPE, 0x1000), None);
        for index in Mtrrs::indices() {
            assert!(m.read(index).is_some());
        }
    }
}
