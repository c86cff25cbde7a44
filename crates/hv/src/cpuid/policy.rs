//! The allow-list.

use super::{CpuidLeaf, CpuidTable};

/// What the policy is told about the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyOptions {
    /// Number of vCPUs. APIC IDs count from 0.
    pub vcpus: u32,
    /// Cores per socket.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
    /// Shows the hypervisor bit and KVM's paravirtual leaves.
    pub paravirt: bool,
    /// TSC frequency in Hz.
    pub tsc_hz: u64,
    /// Frequency of the local APIC's timer in Hz, before its divider.
    pub apic_hz: u64,
    /// 57-bit linear addresses (five levels of paging).
    pub la57: bool,
}

impl Default for PolicyOptions {
    /// One vCPU, paravirtual leaves, an APIC timer of 1 GHz, four levels of paging, a TSC of 1 GHz.
    fn default() -> Self {
        let hz = 1_000_000_000;
        Self { vcpus: 1, cores: 1, threads: 1, paravirt: true, tsc_hz: hz, apic_hz: hz, la57: false }
    }
}

/// Features by leaf and register.
pub mod features {
    /// Leaf 1 ECX, executed on the host: SSE3, PCLMULQDQ, SSSE3, FMA, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE,
    /// AVX, F16C, RDRAND.
    pub const BASIC_ECX: u32 = 1
        | 1 << 1
        | 1 << 9
        | 1 << 12
        | 1 << 13
        | 1 << 19
        | 1 << 20
        | 1 << 22
        | 1 << 23
        | 1 << 25
        | 1 << 26
        | 1 << 28
        | 1 << 29
        | 1 << 30;
    /// Leaf 1 ECX, of the software CPU or the machine itself: PCID, x2APIC, TSC-deadline.
    pub const BASIC_ECX_OWN: u32 = 1 << 17 | 1 << 21 | 1 << 24;
    /// Leaf 1 ECX: a hypervisor is present.
    pub const HYPERVISOR: u32 = 1 << 31;
    /// Leaf 1 EDX, all of it of x86-64's base or our own: FPU DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT
    /// PSE36 CLFSH MMX FXSR SSE SSE2.
    pub const BASIC_EDX: u32 = 1
        | 1 << 2
        | 1 << 3
        | 1 << 4
        | 1 << 5
        | 1 << 6
        | 1 << 7
        | 1 << 8
        | 1 << 9
        | 1 << 11
        | 1 << 12
        | 1 << 13
        | 1 << 14
        | 1 << 15
        | 1 << 16
        | 1 << 17
        | 1 << 19
        | 1 << 23
        | 1 << 24
        | 1 << 25
        | 1 << 26;
    /// Leaf 1 EDX: more than one logical processor in the package.
    pub const HTT: u32 = 1 << 28;
    /// Leaf 7 EBX, executed on the host: BMI1, AVX2, FDP_EXCPTN_ONLY, BMI2, deprecated FCS/FDS, RDSEED, ADX, SHA.
    pub const SEVEN_EBX: u32 = 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 13 | 1 << 18 | 1 << 19 | 1 << 29;
    /// Leaf 7 EBX, our own: FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID, SMAP, CLFLUSHOPT, CLWB.
    pub const SEVEN_EBX_OWN: u32 = 1 | 1 << 1 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 20 | 1 << 23 | 1 << 24;
    /// Leaf 7 ECX, our own: UMIP, RDPID.
    pub const SEVEN_ECX_OWN: u32 = 1 << 2 | 1 << 22;
    /// Leaf 7 ECX: LA57.
    pub const LA57: u32 = 1 << 16;
    /// Leaf 7 EDX, executed on the host: FSRM.
    pub const SEVEN_EDX: u32 = 1 << 4;
    /// Leaf 7 EDX, our own: IBRS and IBPB (which do nothing), IA32_ARCH_CAPABILITIES.
    pub const SEVEN_EDX_OWN: u32 = 1 << 26 | 1 << 29;
    /// Leaf 7 sub-leaf 2 EDX, our own: BHI_CTRL, whose bit in IA32_SPEC_CTRL does nothing: a guest that has it does not
    /// clear branch history by running branches at every entry to its kernel.
    pub const SEVEN_2_EDX_OWN: u32 = 1 << 4;
    /// Leaf 0xD sub-leaf 1 EAX: XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
    pub const XSAVE: u32 = 1 | 1 << 1 | 1 << 2;
    /// XCR0: x87, SSE, AVX.
    pub const XCR0: u32 = 7;
    /// Leaf 8000_0001H ECX, executed on the host: LAHF in 64-bit mode, LZCNT, PREFETCHW.
    pub const EXTENDED_ECX: u32 = 1 | 1 << 5 | 1 << 8;
    /// Leaf 8000_0001H EDX, our own: SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
    pub const EXTENDED_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;
    /// Leaf 4000_0001H EAX, KVM's paravirtual features: CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, STEAL_TIME,
    /// PV_TLB_FLUSH, PV_SEND_IPI, PV_SCHED_YIELD, CLOCKSOURCE_STABLE.
    pub const PARAVIRT: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 11 | 1 << 13 | 1 << 24;
}

/// Width of the guest's physical addresses. The software CPU walks page tables itself, so the host's does not matter.
const PHYSICAL_BITS: u32 = 46;
/// Family 6, model 85, stepping 7: what is shown on hosts of other makers.
const SIGNATURE: u32 = 0x0005_0657;
const INTEL: CpuidLeaf = CpuidLeaf { eax: 0, ebx: 0x756e_6547, ecx: 0x6c65_746e, edx: 0x4965_6e69 };
const LAST_BASIC: u32 = 0x16;
const LAST_EXTENDED: u32 = 0x8000_0008;

/// What a guest of the software CPU sees on a host with CPUID `host`.
pub fn policy(host: &CpuidTable, options: &PolicyOptions) -> CpuidTable {
    use features::*;
    let host_leaf = |function, index| host.get(function, index).unwrap_or_default();
    let mut table = CpuidTable::default();
    let mut set = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| {
        table.set(function, index, CpuidLeaf { eax, ebx, ecx, edx });
    };
    let intel =
        (host_leaf(0, 0).ebx, host_leaf(0, 0).ecx, host_leaf(0, 0).edx) == (INTEL.ebx, INTEL.ecx, INTEL.edx);
    let topology = Topology::new(options);

    set(0, 0, [LAST_BASIC, INTEL.ebx, INTEL.ecx, INTEL.edx]);

    let basic = host_leaf(1, 0);
    let seven = host_leaf(7, 0);
    let on = |condition: bool, bits: u32| if condition { bits } else { 0 };
    let mut ecx = basic.ecx & BASIC_ECX | BASIC_ECX_OWN | on(options.paravirt, HYPERVISOR);
    let mut seven_ebx = seven.ebx & SEVEN_EBX | SEVEN_EBX_OWN;
    // State is saved by the host's own XSAVE, which its operating system must have enabled: leaf 0xD EBX is the size of
    // what its XCR0 holds. Without XSAVE there is no AVX, without AVX nothing that is encoded like it.
    if basic.ecx & 1 << 27 == 0 {
        ecx &= !(1 << 26);
    }
    if ecx & 1 << 26 == 0 || host_leaf(0xd, 0).eax & XCR0 != XCR0 || host_leaf(0xd, 0).ebx < 576 + 256 {
        ecx &= !(1 << 28);
    }
    if ecx & 1 << 28 == 0 {
        ecx &= !(1 << 12 | 1 << 29);
        seven_ebx &= !(1 << 5);
    }
    let avx = ecx & 1 << 28 != 0;
    let signature = if intel { basic.eax & 0x0fff_3fff } else { SIGNATURE };
    // CLFLUSH line of 64 bytes, logical processors in the package; the APIC ID is filled in for each processor.
    let logical = topology.package_ids().min(255);
    let edx = BASIC_EDX | on(topology.in_package > 1, HTT);
    set(1, 0, [signature, 8 << 8 | logical << 16, ecx, edx]);

    // Leaf 2 refers to leaf 4.
    set(2, 0, [0x00fe_ff01, 0, 0, 0]);
    for (index, leaf) in
        topology.caches(|index| if intel { host_leaf(4, index) } else { CpuidLeaf::default() })
    {
        set(4, index, [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
    }
    // ARAT: the APIC timer never stops.
    set(6, 0, [1 << 2, 0, 0, 0]);
    set(7, 0, [2, seven_ebx, SEVEN_ECX_OWN | on(options.la57, LA57), seven.edx & SEVEN_EDX | SEVEN_EDX_OWN]);
    set(7, 2, [0, 0, 0, SEVEN_2_EDX_OWN]);
    for (index, leaf) in topology.levels() {
        set(0xb, index, [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
    }
    if ecx & 1 << 26 != 0 {
        let xcr0 = if avx { XCR0 } else { 3 };
        let size = if avx { 576 + 256 } else { 576 };
        set(0xd, 0, [xcr0, 576, size, 0]);
        set(0xd, 1, [host_leaf(0xd, 1).eax & XSAVE, 0, 0, 0]);
        if avx {
            set(0xd, 2, [256, 576, 0, 0]);
        }
    }
    // TSC frequency = crystal * EBX / EAX. Guests take the crystal for the APIC timer's frequency, so it is that.
    if let Some((numerator, denominator)) = ratio(options.tsc_hz, options.apic_hz) {
        set(0x15, 0, [denominator, numerator, options.apic_hz.try_into().unwrap_or(0), 0]);
    }
    let mhz = u32::try_from(options.tsc_hz / 1_000_000).unwrap_or(u32::MAX).min(0xffff);
    set(0x16, 0, [mhz, mhz, 100, 0]);

    if options.paravirt {
        let kvm = [0x4b4d_564b, 0x564b_4d56, 0x4d];
        set(0x4000_0000, 0, [0x4000_0010, kvm[0], kvm[1], kvm[2]]);
        set(0x4000_0001, 0, [PARAVIRT, 0, 0, 0]);
        let khz = |hz: u64| u32::try_from(hz / 1000).unwrap_or(0);
        set(0x4000_0010, 0, [khz(options.tsc_hz), khz(options.apic_hz), 0, 0]);
    }

    let extended = host_leaf(0x8000_0001, 0);
    set(0x8000_0000, 0, [LAST_EXTENDED, 0, 0, 0]);
    set(0x8000_0001, 0, [0, 0, extended.ecx & EXTENDED_ECX, EXTENDED_EDX]);
    for (function, text) in (0x8000_0002..).zip(brand(host).as_chunks::<16>().0) {
        let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
        set(function, 0, [word(0), word(4), word(8), word(12)]);
    }
    // L2: 64-byte lines, 8-way (6), 1 MiB unless the host says otherwise.
    let l2 = if intel { host_leaf(0x8000_0006, 0).ecx } else { 0 };
    set(0x8000_0006, 0, [0, 0, if l2 != 0 { l2 } else { 0x0400_6040 }, 0]);
    // The TSC is invariant.
    set(0x8000_0007, 0, [0, 0, 0, 1 << 8]);
    let linear_bits = if options.la57 { 57 } else { 48 };
    set(0x8000_0008, 0, [PHYSICAL_BITS | linear_bits << 8, 0, 0, 0]);
    table
}

/// The host's brand string, or one of our own.
fn brand(host: &CpuidTable) -> [u8; 48] {
    let mut text = [0; 48];
    let mut at = 0;
    for function in 0x8000_0002..=0x8000_0004 {
        let leaf = host.get(function, 0).unwrap_or_default();
        for register in [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] {
            text[at..at + 4].copy_from_slice(&register.to_le_bytes());
            at += 4;
        }
    }
    if text[0] == 0 {
        let own = b"Skep x86-64 processor";
        text[..own.len()].copy_from_slice(own);
    }
    text
}

/// `hz / base` as a fraction of 32-bit numbers.
fn ratio(hz: u64, base: u64) -> Option<(u32, u32)> {
    if hz == 0 || base == 0 || u32::try_from(base).is_err() {
        return None;
    }
    let (mut a, mut b) = (hz, base);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let (mut numerator, mut denominator) = (hz / a, base / a);
    // Lose low bits rather than the whole: a part in 2^31 is nothing to a clock.
    while numerator > u64::from(u32::MAX) || denominator > u64::from(u32::MAX) {
        numerator /= 2;
        denominator /= 2;
    }
    (denominator != 0).then_some((numerator as u32, denominator as u32))
}

/// Where processors sit.
struct Topology {
    vcpus: u32,
    /// Bits of the APIC ID that number threads within a core.
    thread_bits: u32,
    /// Bits that number threads within a package.
    package_bits: u32,
    threads: u32,
    /// Logical processors in a package.
    in_package: u32,
}

impl Topology {
    fn new(options: &PolicyOptions) -> Self {
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

    fn package_ids(&self) -> u32 {
        1 << self.package_bits.min(8)
    }

    /// Leaf 0xB: the thread level, the core level, the end.
    fn levels(&self) -> [(u32, CpuidLeaf); 3] {
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

    /// Leaf 4: the host's caches, or 32 KiB + 32 KiB, 1 MiB, 16 MiB; shared as this machine's processors share them.
    fn caches(&self, host: impl Fn(u32) -> CpuidLeaf) -> Vec<(u32, CpuidLeaf)> {
        let cache = |kind: u32, level: u32, ways: u32, sets: u32, flags: u32| CpuidLeaf {
            eax: kind | level << 5 | 1 << 8,
            ebx: 63 | (ways - 1) << 22,
            ecx: sets - 1,
            edx: flags,
        };
        let mut caches: Vec<_> = (0..8).map(&host).take_while(|leaf| leaf.eax & 31 != 0).collect();
        if caches.is_empty() {
            caches = vec![
                cache(1, 1, 8, 64, 0),
                cache(2, 1, 8, 64, 0),
                cache(3, 2, 16, 1024, 0),
                cache(3, 3, 16, 16384, 4),
            ];
        }
        let cores_bits = self.package_bits - self.thread_bits;
        caches
            .into_iter()
            .zip(0..)
            .map(|(mut leaf, index)| {
                let shared_bits = if leaf.eax >> 5 & 7 >= 3 { self.package_bits } else { self.thread_bits };
                let field = |bits: u32, most: u32| ((1u32 << bits.min(12)) - 1).min(most);
                leaf.eax = leaf.eax & 0x3ff | field(shared_bits, 0xfff) << 14 | field(cores_bits, 0x3f) << 26;
                (index, leaf)
            })
            .chain([((self.end(&host)), CpuidLeaf::default())])
            .collect()
    }

    /// Index of the leaf that says "no more caches".
    fn end(&self, host: impl Fn(u32) -> CpuidLeaf) -> u32 {
        match (0..8).take_while(|&index| host(index).eax & 31 != 0).count() {
            0 => 4,
            count => count as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Processor, host};
    use super::*;

    fn everything() -> CpuidTable {
        let all = CpuidLeaf { eax: u32::MAX, ebx: u32::MAX, ecx: u32::MAX, edx: u32::MAX };
        let mut table = CpuidTable::default();
        for function in (0..0x20).chain(0x8000_0000..0x8000_0020) {
            for index in 0..4 {
                table.set(function, index, all);
            }
        }
        table
    }

    /// Function, register (EAX to EDX), bit.
    type Feature = (u32, usize, u32);

    /// What needs what.
    const NEEDS: &[(Feature, Feature)] = &[
        ((1, 2, 28), (1, 2, 26)),
        ((1, 2, 12), (1, 2, 28)),
        ((1, 2, 29), (1, 2, 28)),
        ((7, 1, 5), (1, 2, 28)),
        ((1, 2, 24), (1, 3, 4)),
        ((7, 1, 10), (1, 2, 17)),
        ((1, 2, 21), (1, 3, 9)),
        ((7, 3, 26), (7, 3, 29)),
        ((0x8000_0001, 3, 29), (1, 3, 6)),
        ((0x8000_0001, 3, 20), (1, 3, 6)),
    ];

    fn has(table: &CpuidTable, (function, register, bit): Feature) -> bool {
        let leaf = table.get(function, 0).unwrap_or_default();
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx][register] & 1 << bit != 0
    }

    #[test]
    fn no_feature_is_shown_without_those_it_needs() {
        for bit in 0..32 {
            for function in [1, 7, 0xd] {
                let mut from = everything();
                from.set(
                    function,
                    0,
                    CpuidLeaf { eax: !(1 << bit), ebx: !(1 << bit), ecx: !(1 << bit), edx: !(1 << bit) },
                );
                let shown = policy(&from, &PolicyOptions::default());
                for &(what, needs) in NEEDS {
                    assert!(!has(&shown, what) || has(&shown, needs), "{what:?} without {needs:?}");
                }
                let xcr0 = shown.get(0xd, 0).unwrap_or_default().eax;
                assert_eq!(xcr0 & 4 != 0, has(&shown, (1, 2, 28)), "AVX state goes with AVX");
            }
        }
        for (what, needs) in NEEDS {
            let shown = policy(&everything(), &PolicyOptions::default());
            assert!(has(&shown, *what) && has(&shown, *needs));
        }
    }

    #[test]
    fn what_is_not_on_the_list_never_shows() {
        let shown = policy(&everything(), &PolicyOptions::default());
        let (one, seven) = (shown.get(1, 0).unwrap(), shown.get(7, 0).unwrap());
        // MONITOR, VMX, SMX; TSX, MPX, AVX-512F, Intel PT; PKU, WAITPKG, SHSTK; AMX-TILE, IBT, SSBD.
        assert_eq!(one.ecx & (1 << 3 | 1 << 5 | 1 << 6), 0);
        assert_eq!(seven.ebx & (1 << 4 | 1 << 11 | 1 << 14 | 1 << 16 | 1 << 25), 0);
        assert_eq!(seven.ecx & (1 << 3 | 1 << 5 | 1 << 7), 0);
        assert_eq!(seven.edx & (1 << 20 | 1 << 24 | 1 << 31), 0);
        assert_eq!(shown.get(0xd, 0).unwrap().eax, 7);
        assert_eq!(shown.get(0xd, 1).unwrap().eax, 7, "no XSAVES");
        assert!(shown.get(0xa, 0).is_none(), "no performance counters");
    }

    #[test]
    fn out_of_range_functions_answer_with_the_highest_basic_leaf() {
        let shown = policy(&host(), &PolicyOptions::default());
        let cpu = Processor::default();
        let last = shown.lookup(0x16, 0, &cpu);
        assert_ne!(last, CpuidLeaf::default());
        for function in [0x17, 0x3fff_ffff, 0x5000_0000, 0x7fff_ffff, 0x8000_0009, u32::MAX] {
            assert_eq!(shown.lookup(function, 5, &cpu), last, "{function:#x}");
        }
        assert_eq!(shown.lookup(0xa, 0, &cpu), CpuidLeaf::default());
        assert_eq!(shown.lookup(7, 1, &cpu), CpuidLeaf::default());
        assert_eq!(shown.lookup(0x4000_0077, 0, &cpu), CpuidLeaf::default());
        let bare = policy(&host(), &PolicyOptions { paravirt: false, ..Default::default() });
        assert_eq!(bare.lookup(0x4000_0000, 0, &cpu), bare.lookup(0x16, 0, &cpu));
        assert_eq!(bare.get(1, 0).unwrap().ecx & features::HYPERVISOR, 0);
    }

    #[test]
    fn each_processor_sees_itself() {
        let options = PolicyOptions { vcpus: 8, cores: 4, threads: 2, ..Default::default() };
        let shown = policy(&everything(), &options);
        let cpu = Processor { apic_id: 5, osxsave: true, xcr0: 7 };
        assert_eq!(shown.lookup(1, 0, &cpu).ebx >> 24, 5);
        assert_ne!(shown.lookup(1, 0, &cpu).ecx & 1 << 27, 0);
        assert_eq!(shown.lookup(1, 0, &Processor::default()).ecx & 1 << 27, 0);
        for (index, shift, count) in [(0, 1, 2), (1, 3, 8), (2, 0, 0), (9, 0, 0)] {
            let leaf = shown.lookup(0xb, index, &cpu);
            assert_eq!((leaf.eax, leaf.ebx, leaf.ecx & 0xff, leaf.edx), (shift, count, index, 5));
        }
        assert_eq!(shown.lookup(1, 0, &cpu).ebx >> 16 & 0xff, 8);
    }

    #[test]
    fn levels_that_apic_ids_cannot_tell_apart_are_not_shown() {
        let levels = |vcpus, cores, threads| {
            let shown = policy(&everything(), &PolicyOptions { vcpus, cores, threads, ..Default::default() });
            let level = |index| shown.get(0xb, index).map(|leaf| (leaf.eax, leaf.ebx)).unwrap();
            (level(0), level(1))
        };
        assert_eq!(levels(6, 3, 2), ((1, 2), (3, 6)), "one package, ID space left over");
        assert_eq!(levels(6, 3, 1), ((0, 1), (3, 6)), "two packages of three look like one of six");
        assert_eq!(levels(4, 1, 1), ((0, 1), (0, 1)), "four packages");
        assert_eq!(levels(6, 2, 3), ((0, 1), (3, 6)), "three threads look like three cores");
    }

    #[test]
    fn the_xsave_area_grows_with_xcr0() {
        let shown = policy(&everything(), &PolicyOptions::default());
        let with = |xcr0| shown.lookup(0xd, 0, &Processor { xcr0, ..Default::default() }).ebx;
        assert_eq!((with(1), with(3), with(7)), (576, 576, 832));
        assert_eq!(shown.get(0xd, 0).unwrap().ecx, 832);
        assert_eq!(shown.lookup(0xd, 1, &Processor { xcr0: 7, ..Default::default() }).ebx, 832);
    }

    #[test]
    fn the_clock_leaf_gives_back_the_frequency() {
        for tsc_hz in [2_499_998_000u64, 2_600_000_000, 999_999_937, 4_000_000_000, 5_000_000_001] {
            let shown = policy(&host(), &PolicyOptions { tsc_hz, ..Default::default() });
            let leaf = shown.get(0x15, 0).unwrap();
            let hz = u128::from(leaf.ecx) * u128::from(leaf.ebx) / u128::from(leaf.eax);
            assert!((hz as u64).abs_diff(tsc_hz) <= 4, "{hz} for {tsc_hz}");
            assert_eq!(shown.get(0x4000_0010, 0).unwrap().eax, (tsc_hz / 1000) as u32);
        }
        assert_eq!(ratio(0, 5), None);
        assert_eq!(ratio(5, 0), None);
        assert_eq!(ratio(u64::MAX, 1), None);
    }

    #[test]
    fn hostile_options_do_no_harm() {
        for n in [0, 1, 3, 255, u32::MAX] {
            let options = PolicyOptions {
                vcpus: n,
                cores: n,
                threads: n,
                tsc_hz: u64::from(n),
                apic_hz: u64::MAX,
                ..Default::default()
            };
            assert!(policy(&CpuidTable::default(), &options).get(1, 0).is_some());
        }
    }

    #[test]
    fn a_host_without_anything_still_gives_a_processor_of_ours() {
        let shown = policy(&CpuidTable::default(), &PolicyOptions::default());
        assert!(has(&shown, (0x8000_0001, 3, 29)) && !has(&shown, (1, 2, 26)));
        assert!(shown.get(0xd, 0).is_none());
        assert_eq!(&shown.get(0x8000_0002, 0).unwrap().eax.to_le_bytes(), b"Skep");
        assert_eq!(shown.get(4, 0).unwrap().eax & 31, 1);
        assert_eq!(shown.get(4, 4).unwrap(), CpuidLeaf::default());
    }
}
