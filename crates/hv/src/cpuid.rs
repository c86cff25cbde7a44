//! CPUID: a table of leaves, and the policy that makes one for a guest.
//!
//! The policy starts from a [`Model`], turns features on and off by name, and checks the result against what the back
//! end can give and against what features need of each other. What its table of features does not know is not shown.

mod features;
mod model;
mod policy;
mod topology;
mod xsave;

pub use features::{FEATURES, Feature, Giver, Register};
pub use model::{Model, PolicyError, Reason, check_names};
pub use policy::{PolicyOptions, Provider, available, models, policy, shown};

use topology::Maker;

/// One CPUID answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidLeaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// What CPUID shows: leaves sorted by (function, index).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuidTable {
    leaves: Vec<((u32, u32), CpuidLeaf)>,
}

/// What CPUID's answers depend on beside the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Processor {
    /// APIC ID.
    pub apic_id: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// XCR0.
    pub xcr0: u64,
}

/// IA32_ARCH_CAPABILITIES as the software CPU has it (see [`CpuidTable::arch_capabilities`]): RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO,
/// IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
///
/// These are statements about speculation, and the processor that the guest sees does not speculate: it is an
/// interpreter (or a translator whose checks are the guest's page tables). What leaks through the host's own processor
/// leaks between this process and others; guest code cannot defend against it by flushing or fencing in here, and one
/// guest is all there is in a process. So guests are told that they need no mitigation, and pay for none.
pub const ARCH_CAPABILITIES: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// Leaf 1 ECX: OSXSAVE, a copy of CR4.OSXSAVE.
const OSXSAVE: u32 = 1 << 27;
/// First and last leaf of the range set aside for hypervisors.
const HYPERVISOR: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;

impl CpuidTable {
    /// Sets one leaf. `index` is 0 for functions that ignore ECX.
    pub fn set(&mut self, function: u32, index: u32, leaf: CpuidLeaf) {
        match self.leaves.binary_search_by_key(&(function, index), |l| l.0) {
            Ok(at) => self.leaves[at].1 = leaf,
            Err(at) => self.leaves.insert(at, ((function, index), leaf)),
        }
    }

    /// The leaf as stored, without the out-of-range rule.
    pub fn get(&self, function: u32, index: u32) -> Option<CpuidLeaf> {
        self.leaves.binary_search_by_key(&(function, index), |l| l.0).ok().map(|at| self.leaves[at].1)
    }

    /// All leaves in order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32, CpuidLeaf)> + '_ {
        self.leaves.iter().map(|&((function, index), leaf)| (function, index, leaf))
    }

    /// What the instruction answers on one processor: SDM vol. 2A, CPUID. A function above the last one of its range is
    /// answered with the highest basic leaf (by AMD with zeros); a function without a leaf, or a sub-leaf that does not
    /// exist, with zeros.
    pub fn lookup(&self, function: u32, index: u32, processor: &Processor) -> CpuidLeaf {
        let last_basic = self.get(0, 0).map_or(0, |leaf| leaf.eax);
        let in_range = match function {
            0..0x4000_0000 => function <= last_basic,
            _ if HYPERVISOR.contains(&function) => self.get(*HYPERVISOR.start(), 0).is_some(),
            0x8000_0000.. => self.get(0x8000_0000, 0).is_some_and(|leaf| function <= leaf.eax),
            _ => false,
        };
        if !in_range && Maker::of(self) == Maker::Amd {
            return CpuidLeaf::default();
        }
        let function = if in_range { function } else { last_basic };
        let with_index = matches!(
            function,
            4 | 7 | 0xb | 0xd | 0xf | 0x10 | 0x12 | 0x14 | 0x17 | 0x18 | 0x1f | 0x8000_001d
        );
        let leaf = self.get(function, if with_index { index } else { 0 }).unwrap_or_default();
        let mut leaf = self.of_processor(function, leaf, processor.apic_id);
        match (function, index) {
            (1, _) => leaf.ecx = leaf.ecx & !OSXSAVE | if processor.osxsave { OSXSAVE } else { 0 },
            (0xb, _) => leaf.ecx = leaf.ecx & !0xff | index & 0xff,
            // The size of the XSAVE area for what XCR0 enables now; XSAVES' for sub-leaf 1.
            (0xd, 0) => leaf.ebx = self.xsave_size(processor.xcr0, false),
            (0xd, 1) if leaf.eax & 0xa != 0 => leaf.ebx = self.xsave_size(processor.xcr0, true),
            _ => {}
        }
        leaf
    }

    /// The table as the processor with that APIC ID has it, for a back end that answers CPUID itself.
    pub fn on_processor(&self, apic_id: u32) -> Self {
        let leaf =
            |&((function, index), leaf)| ((function, index), self.of_processor(function, leaf, apic_id));
        Self { leaves: self.leaves.iter().map(leaf).collect() }
    }

    /// `leaf` with the fields filled in that tell a processor who it is.
    fn of_processor(&self, function: u32, mut leaf: CpuidLeaf, apic_id: u32) -> CpuidLeaf {
        match function {
            1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | apic_id << 24,
            0xb => leaf.edx = apic_id,
            // AMD: APIC ID; core within the package; node, of which a package has one.
            0x8000_001e => {
                let threads = (leaf.ebx >> 8 & 0xff) + 1;
                let package_bits = self.get(0x8000_0008, 0).unwrap_or_default().ecx >> 12 & 15;
                let in_package = apic_id & ((1 << package_bits) - 1);
                leaf.eax = apic_id;
                leaf.ebx = leaf.ebx & !0xff | in_package / threads.next_power_of_two() & 0xff;
                leaf.ecx = leaf.ecx & !0xff | apic_id >> package_bits & 0xff;
            }
            _ => {}
        }
        leaf
    }

    /// What IA32_ARCH_CAPABILITIES may say to this guest, of the bits that the back end has. Zero if CPUID does not show the
    /// register; and no IBRS_ALL without IA32_SPEC_CTRL, which guests would write on seeing it.
    pub fn arch_capabilities(&self, offered: u64) -> u64 {
        let edx = self.get(7, 0).unwrap_or_default().edx;
        let ibrs_all = if edx & 1 << 26 != 0 { 0 } else { 1 << 1 };
        if edx & 1 << 29 != 0 { offered & !ibrs_all } else { 0 }
    }

    /// Bytes of the XSAVE area for the components in `xcr0` (SDM vol. 1 §13.4.3), in standard or compacted format.
    pub fn xsave_size(&self, xcr0: u64, compacted: bool) -> u32 {
        (2..63).filter(|&component| xcr0 & 1 << component != 0).fold(576, |size, component| {
            let leaf = self.get(0xd, component).unwrap_or_default();
            if compacted {
                let start = if leaf.ecx & 2 != 0 { size.div_ceil(64).saturating_mul(64) } else { size };
                start.saturating_add(leaf.eax)
            } else {
                size.max(leaf.ebx.saturating_add(leaf.eax))
            }
        })
    }
}

/// The host's own CPUID.
#[cfg(target_arch = "x86_64")]
pub fn host() -> CpuidTable {
    use std::arch::x86_64::__cpuid_count;
    let read = |function, index| {
        let answer = __cpuid_count(function, index);
        CpuidLeaf { eax: answer.eax, ebx: answer.ebx, ecx: answer.ecx, edx: answer.edx }
    };
    let mut table = CpuidTable::default();
    let last_basic = read(0, 0).eax.min(0xff);
    for function in 0..=last_basic {
        let indices = match function {
            4 | 0x14 | 0x18 => 8,
            7 => read(7, 0).eax.min(7) + 1,
            0xb | 0x1f => 6,
            0xd => 63,
            _ => 1,
        };
        for index in 0..indices {
            table.set(function, index, read(function, index));
        }
    }
    if read(1, 0).ecx & 1 << 31 != 0 {
        let last = read(0x4000_0000, 0).eax;
        for function in 0x4000_0000..=last.clamp(0x4000_0000, 0x4000_00ff) {
            table.set(function, 0, read(function, 0));
        }
    }
    let last_extended = read(0x8000_0000, 0).eax;
    if (0x8000_0000..0x8000_0100).contains(&last_extended) {
        for function in 0x8000_0000..=last_extended {
            for index in 0..if function == 0x8000_001d { 8 } else { 1 } {
                table.set(function, index, read(function, index));
            }
        }
    }
    // XCR0 holds what the processor can have; what the kernel has not enabled is not there.
    if !std::arch::is_x86_feature_detected!("avx512f")
        && let Some(state) = table.get(0xd, 0)
    {
        table.set(0xd, 0, CpuidLeaf { eax: state.eax & !xsave::AVX512, ..state });
    }
    table
}
