//! The XSAVE area (SDM vol. 1 §13.4): where its components stand, and the whole state as one.

use std::sync::LazyLock;

use skep_hv::state::StateError;

use super::fpu::{
    AREA, EXTENDED, Fpu, LEGACY, MXCSR_MASK, component, fx, image_mxcsr, put_image_mxcsr, split,
};

/// A component behind the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Component {
    /// Its bit in XCR0.
    pub(super) bit: u64,
    number: u32,
    size: usize,
    /// Where Intel's processors have it in the standard format.
    usual: usize,
}

/// All of them, in order.
pub(super) const COMPONENTS: [Component; 4] = [
    Component { bit: component::AVX, number: 2, size: 256, usual: EXTENDED },
    Component { bit: component::OPMASK, number: 5, size: 64, usual: 1088 },
    Component { bit: component::ZMM_HIGH, number: 6, size: 512, usual: 1152 },
    Component { bit: component::HI16, number: 7, size: 1024, usual: 1664 },
];

/// Where each stands in the standard format. That is the host's, so that the state fits other back ends on it: processors of Intel and
/// AMD differ.
static STANDARD: LazyLock<[usize; COMPONENTS.len()]> = LazyLock::new(|| {
    let host = COMPONENTS.map(|c| {
        let leaf = std::arch::x86_64::__cpuid_count(0xd, c.number);
        let fits = |at: &usize| (EXTENDED..=AREA - c.size).contains(at);
        Some(leaf.ebx as usize).filter(|at| leaf.eax as usize == c.size && fits(at))
    });
    let known = host.iter().all(Option::is_some);
    std::array::from_fn(|i| host[i].filter(|_| known).unwrap_or(COMPONENTS[i].usual))
});

impl Component {
    /// Where it stands in the standard format.
    pub(super) fn standard(&self) -> usize {
        let at = COMPONENTS.iter().position(|c| c.number == self.number);
        at.map_or(self.usual, |i| STANDARD[i])
    }

    /// Where it stands in the compacted format if `format` names the components that are there.
    pub(super) fn compacted(&self, format: u64) -> usize {
        let before = COMPONENTS.iter().take_while(|c| c.number != self.number);
        EXTENDED + before.filter(|c| format & c.bit != 0).map(|c| c.size).sum::<usize>()
    }

    /// Bytes of it that a mode with `count` vector registers has to do with.
    pub(super) fn len(&self, count: usize) -> usize {
        match self.bit {
            component::AVX => 16 * count,
            component::ZMM_HIGH => 32 * count,
            component::HI16 if count < 16 => 0,
            _ => self.size,
        }
    }
}

/// Length of a standard-format area with these components.
fn length(components: u64) -> usize {
    let ends = COMPONENTS.iter().filter(|c| components & c.bit != 0).map(|c| c.standard() + c.size);
    ends.max().unwrap_or(EXTENDED)
}

impl Fpu {
    /// The parts of registers that make up a component, in order.
    fn parts(&mut self, component: Component, count: usize) -> Vec<&mut [u64]> {
        let frame = &mut self.frame;
        match component.bit {
            component::AVX => frame.vector[..count].iter_mut().map(|v| &mut v[2..4]).collect(),
            component::OPMASK => vec![&mut frame.opmask[..]],
            component::ZMM_HIGH => frame.vector[..count].iter_mut().map(|v| &mut v[4..]).collect(),
            component::HI16 if count == 16 => frame.vector[16..].iter_mut().map(|v| &mut v[..]).collect(),
            _ => Vec::new(),
        }
    }

    /// Writes a component of a mode with `count` vector registers.
    pub(super) fn put_component(&self, component: Component, count: usize, area: &mut [u8]) {
        let frame = &self.frame;
        let mut at = 0;
        let mut put = |words: &[u64]| {
            let len = 8 * words.len();
            for (to, word) in area[at..at + len].chunks_exact_mut(8).zip(words) {
                to.copy_from_slice(&word.to_le_bytes());
            }
            at += len;
        };
        match component.bit {
            component::AVX => frame.vector[..count].iter().for_each(|v| put(&v[2..4])),
            component::OPMASK => put(&frame.opmask),
            component::ZMM_HIGH => frame.vector[..count].iter().for_each(|v| put(&v[4..])),
            component::HI16 if count == 16 => frame.vector[16..].iter().for_each(|v| put(v)),
            _ => {}
        }
    }

    /// Reads one.
    pub(super) fn get_component(&mut self, component: Component, count: usize, area: &[u8]) {
        let mut at = 0;
        for words in self.parts(component, count) {
            let len = 8 * words.len();
            split(&area[at..at + len], words);
            at += len;
        }
    }

    /// Puts one into its initial configuration.
    pub(super) fn init_component(&mut self, component: Component, count: usize) {
        for words in self.parts(component, count) {
            words.fill(0);
        }
    }

    /// The whole state as a standard-format XSAVE area with `components`, x87, SSE and AVX always among them.
    pub(crate) fn save_area(&self, components: u64) -> Vec<u8> {
        let components = components & component::ALL | component::BASIC;
        let mut area = vec![0; length(components)];
        self.put_x87(&mut area, true);
        put_image_mxcsr(&mut area, self.frame.mxcsr);
        self.put_xmm(&mut area, 16);
        for component in COMPONENTS.iter().filter(|c| components & c.bit != 0) {
            self.put_component(*component, 16, &mut area[component.standard()..]);
        }
        area[LEGACY..LEGACY + 8].copy_from_slice(&components.to_le_bytes());
        area
    }

    /// Loads the whole state from a standard-format XSAVE area with no more than `components`, x87, SSE and AVX.
    pub(crate) fn load_area(&mut self, area: &[u8], components: u64) -> Result<(), StateError> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| area[at + i]));
        if area.len() < EXTENDED {
            let value = area.len() as u64;
            return Err(StateError::Value {
                field: "fpu.xsave length",
                value,
                why: "an XSAVE area has 576 bytes at least",
            });
        }
        let (present, compacted) = (word(LEGACY), word(LEGACY + 8));
        if present & !(components & component::ALL | component::BASIC) != 0 {
            return Err(StateError::Value {
                field: "fpu.xsave XSTATE_BV",
                value: present,
                why: "this processor does not have all of that state",
            });
        }
        if compacted != 0 || area[LEGACY + 16..EXTENDED].iter().any(|&b| b != 0) {
            let why = "the standard format has zeros in the rest of its header";
            return Err(StateError::Value { field: "fpu.xsave XCOMP_BV", value: compacted, why });
        }
        if area.len() < length(present) {
            let value = area.len() as u64;
            return Err(StateError::Value {
                field: "fpu.xsave length",
                value,
                why: "too short for the components that are said to be there",
            });
        }
        let mxcsr = image_mxcsr(area);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(StateError::Value {
                field: "fpu.xsave MXCSR",
                value: mxcsr.into(),
                why: "reserved bits are set",
            });
        }
        self.reset();
        self.frame.mxcsr = mxcsr;
        if present & component::X87 != 0 {
            self.get_x87(area, true);
        }
        if present & component::SSE != 0 {
            self.get_xmm(area, 16);
        }
        for component in COMPONENTS.iter().filter(|c| present & c.bit != 0) {
            self.get_component(*component, 16, &area[component.standard()..]);
        }
        Ok(())
    }

    /// As [`Fpu::load_area`], from an area that may hold components which this processor does not have.
    pub(crate) fn load_known(&mut self, area: &[u8]) -> Result<(), StateError> {
        let mut known = [0; AREA];
        let len = area.len().min(AREA);
        known[..len].copy_from_slice(&area[..len]);
        known[LEGACY] &= component::ALL as u8;
        known[LEGACY + 1..LEGACY + 8].fill(0);
        self.load_area(&known[..len], component::ALL)
    }

    /// Writes what is known into the area that [`Fpu::load_known`] was given; whether that changed it.
    pub(crate) fn store_known(&self, area: &mut [u8]) -> bool {
        let now = self.save_area(component::ALL);
        let was = u64::from(area[LEGACY]) & component::ALL;
        // Initial components that are marked as such stay so: the VM may not have them.
        let present = was | self.xinuse(component::ALL);
        let mut changed = false;
        let mut put = |at: usize, from: &[u8]| {
            if let Some(to) = area.get_mut(at..at + from.len())
                && to != from
            {
                to.copy_from_slice(from);
                changed = true;
            }
        };
        put(fx::MXCSR, &now[fx::MXCSR..fx::MXCSR_MASK]);
        let legacy = [
            (component::X87, 0, fx::MXCSR),
            (component::X87, fx::ST, fx::XMM),
            (component::SSE, fx::XMM, fx::XMM + 256),
        ];
        let behind = COMPONENTS.map(|c| (c.bit, c.standard(), c.standard() + c.size));
        for (bit, at, end) in legacy.into_iter().chain(behind) {
            if present & bit != 0 {
                put(at, &now[at..end]);
            }
        }
        let marked = area[LEGACY] | present as u8;
        changed |= marked != area[LEGACY];
        area[LEGACY] = marked;
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::super::fpu::fx;
    use super::*;

    #[test]
    fn the_state_survives_an_area() {
        let mut fpu = Fpu::new();
        assert_eq!(fpu.xinuse(component::ALL), 0);
        for (n, vector) in fpu.frame.vector.iter_mut().enumerate() {
            *vector = std::array::from_fn(|i| (10 * n + i + 1) as u64);
        }
        fpu.frame.opmask = std::array::from_fn(|i| 1 << i);
        fpu.frame.mxcsr = 0x1fa0;
        fpu.set_word(fx::FSW, 0x3800);
        fpu.set_pointer(fx::FIP, 0x1234_5678_9abc);
        fpu.frame.x87[fx::ST..fx::ST + 10].fill(7);
        for (components, length) in [(component::BASIC, 832), (component::ALL, length(component::ALL))] {
            let area = fpu.save_area(components);
            assert_eq!(area.len(), length);
            let mut copy = Fpu::new();
            copy.load_area(&area, components).expect("its own area");
            assert_eq!(copy.save_area(components), area);
            assert_eq!(copy.xinuse(component::ALL), components);
            copy.reset();
            assert_eq!(copy.xinuse(component::ALL), 0);
        }
    }

    #[test]
    fn hostile_areas_are_refused() {
        let good = Fpu::new().save_area(component::BASIC);
        let mut fpu = Fpu::new();
        for length in 0..EXTENDED {
            assert!(fpu.load_area(&good[..length], component::BASIC).is_err());
        }
        let wide = Fpu::new().save_area(component::ALL);
        assert!(fpu.load_area(&wide, component::BASIC).is_err(), "state that is not there");
        assert!(fpu.load_area(&wide[..wide.len() - 1], component::ALL).is_err(), "all are said to be there");
        assert!(fpu.load_area(&good[..831], component::BASIC).is_err(), "AVX is said to be there");
        for (at, value) in
            [(fx::MXCSR + 2, 1), (LEGACY, 8), (LEGACY + 7, 0x80), (LEGACY + 15, 0x80), (LEGACY + 63, 1)]
        {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(fpu.load_area(&bad, component::BASIC).is_err(), "byte {at}");
        }
        assert_eq!(fpu.save_area(component::BASIC), good, "nothing was loaded");
    }
}
