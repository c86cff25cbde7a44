//! Where processors sit, and the caches they share.

use super::{CpuidLeaf, CpuidTable, PolicyOptions};

/// Whose leaves a processor shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Maker {
    /// Intel, and others that follow its manual.
    Intel,
    /// AMD and Hygon.
    Amd,
}

impl Maker {
    pub(super) fn of(host: &CpuidTable) -> Self {
        let leaf = host.get(0, 0).unwrap_or_default();
        match (leaf.ebx, leaf.edx, leaf.ecx) {
            // AuthenticAMD, HygonGenuine.
            (0x6874_7541, 0x6974_6e65, 0x444d_4163) | (0x6f67_7948, 0x6e65_476e, 0x656e_6975) => Self::Amd,
            _ => Self::Intel,
        }
    }
}

/// Where processors sit.
pub(super) struct Topology {
    vcpus: u32,
    /// Bits of the APIC ID that number threads within a core.
    thread_bits: u32,
    /// Bits that number threads within a package.
    pub(super) package_bits: u32,
    /// Threads of a core.
    pub(super) threads: u32,
    /// Logical processors in a package.
    pub(super) in_package: u32,
}

impl Topology {
    pub(super) fn new(options: &PolicyOptions) -> Self {
        let bits = |count: u32| count.max(1).next_power_of_two().trailing_zeros();
        let vcpus = options.vcpus.max(1);
        let (mut threads, cores) = (options.threads.clamp(1, 255), options.cores.clamp(1, 255));
        let mut in_package = threads * cores;
        // APIC IDs are given out without gaps. Counts that are no powers of two would put neighbours in one core, or in one
        // package, on different sides of a field's border: then the level is not shown.
        if !threads.is_power_of_two() {
            threads = 1;
        }
        if !in_package.is_power_of_two() && vcpus > in_package {
            in_package = vcpus.min(255);
        }
        Self { vcpus, thread_bits: bits(threads), package_bits: bits(in_package), threads, in_package }
    }

    pub(super) fn package_ids(&self) -> u32 {
        1 << self.package_bits.min(8)
    }

    /// Leaf 0xB: the thread level, the core level, the end.
    pub(super) fn levels(&self) -> [(u32, CpuidLeaf); 3] {
        let level = |shift, count, kind: u32, index| CpuidLeaf {
            eax: shift,
            ebx: count,
            ecx: index | kind << 8,
            edx: 0,
        };
        [
            (0, level(self.thread_bits, self.threads, 1, 0)),
            (1, level(self.package_bits, self.in_package.min(self.vcpus), 2, 1)),
            (2, level(0, 0, 0, 2)),
        ]
    }

    /// AMD's leaf 8000_001EH: threads of a core; one node a package. The rest is filled in for each processor.
    pub(super) fn extended(&self) -> CpuidLeaf {
        CpuidLeaf { ebx: (self.threads - 1) << 8, ..CpuidLeaf::default() }
    }

    /// AMD's leaf 8000_0008H ECX: logical processors in the package less one, bits of the APIC ID that number them.
    pub(super) fn size_identifiers(&self) -> u32 {
        (self.in_package.min(self.vcpus).min(256) - 1) & 0xff | self.package_bits.min(15) << 12
    }

    /// Intel's leaf 4 or AMD's leaf 8000_001DH: the host's caches, or 32 KiB + 32 KiB, 1 MiB, 16 MiB; shared as this
    /// machine's processors share them. The last entry says "no more caches".
    pub(super) fn caches(&self, maker: Maker, host: impl Fn(u32) -> CpuidLeaf) -> Vec<(u32, CpuidLeaf)> {
        let cache = |kind: u32, level: u32, ways: u32, sets: u32, flags: u32| CpuidLeaf {
            eax: kind | level << 5 | 1 << 8,
            ebx: 63 | (ways - 1) << 22,
            ecx: sets - 1,
            edx: flags,
        };
        let mut caches: Vec<_> = (0..8).map(&host).take_while(|leaf| leaf.eax & 31 != 0).collect();
        if caches.is_empty() {
            let last = if maker == Maker::Intel { 4 } else { 0 };
            caches = vec![
                cache(1, 1, 8, 64, 0),
                cache(2, 1, 8, 64, 0),
                cache(3, 2, 16, 1024, 0),
                cache(3, 3, 16, 16384, last),
            ];
        }
        let cores_bits = if maker == Maker::Intel { self.package_bits - self.thread_bits } else { 0 };
        let field = |bits: u32, most: u32| ((1u32 << bits.min(12)) - 1).min(most);
        for leaf in &mut caches {
            let shared_bits = if leaf.eax >> 5 & 7 >= 3 { self.package_bits } else { self.thread_bits };
            leaf.eax = leaf.eax & 0x3ff | field(shared_bits, 0xfff) << 14 | field(cores_bits, 0x3f) << 26;
        }
        caches.push(CpuidLeaf::default());
        (0..).zip(caches).collect()
    }
}
