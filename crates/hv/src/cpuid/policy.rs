//! From a choice of processor to the table that the guest sees.

use std::collections::BTreeMap;

use super::features::{FEATURES, Set};
use super::model::{LEVEL2, LEVEL3, LEVEL4, Model, PolicyError, Reason, lacking, select};
use super::topology::{Maker, Topology};
use super::{CpuidLeaf, CpuidTable, xsave};

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Provider {
    /// The software CPU. Its privileged half is its own and follows Intel's manual, so that it shows an Intel processor
    /// on every host; of the host's features it shows those that the host's own units execute.
    #[default]
    Software,
    /// The host's processor, by hardware virtualization: every feature must be in the back end's table.
    Hardware,
}

/// What the policy is told about the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyOptions {
    /// What runs the guest's instructions.
    pub provider: Provider,
    /// The processor to show.
    pub model: Model,
    /// Features on and off by name, on top of the model.
    pub features: BTreeMap<String, bool>,
    /// Number of vCPUs. APIC IDs count from 0.
    pub vcpus: u32,
    /// Cores per socket.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
    /// TSC frequency in Hz.
    pub tsc_hz: u64,
    /// Frequency of the local APIC's timer in Hz, before its divider.
    pub apic_hz: u64,
    /// HLT leaves the guest ([`ExitControls::hlt`](crate::ExitControls::hlt)).
    pub hlt_exits: bool,
}

impl Default for PolicyOptions {
    /// One vCPU of the software CPU that shows all there is, an APIC timer of 1 GHz, a TSC of 1 GHz.
    fn default() -> Self {
        let hz = 1_000_000_000;
        Self {
            provider: Provider::Software,
            model: Model::Host,
            features: BTreeMap::new(),
            vcpus: 1,
            cores: 1,
            threads: 1,
            tsc_hz: hz,
            apic_hz: hz,
            hlt_exits: true,
        }
    }
}

/// Most bits of physical addresses: what the software CPU has, which walks page tables itself, and named models.
const PHYSICAL_BITS: u32 = 46;
/// Fewest that an x86-64 processor has, for tables that say nothing.
const LEAST_PHYSICAL_BITS: u32 = 36;
/// Signatures to show, from the least processor to the greatest, with what a guest must see beyond the row before.
///
/// Programs go by the model too, those built with GCC's `target_clones("arch=...")` for example, and take for given there all that
/// compilers use by themselves. With the signature of a processor that has more of that than is shown, they end with SIGILL.
///
/// Linux goes by the model to know what leaks, unless IA32_ARCH_CAPABILITIES denies it. Of the first three it suspects nothing that the
/// software CPU does not deny. From Skylake on it takes returns for predictable, and warns where there is no IBRS against that; a
/// host where they are can say so in IA32_ARCH_CAPABILITIES (RSBA).
const SIGNATURES: [(&[&[&str]], u32); 4] = [
    // Conroe-L, as good as the least that Intel made for 64 bits. It has SSSE3, but GCC does not know the model.
    (&[], 0x0001_0661),
    // Nehalem-EP.
    (&[LEVEL2], 0x0001_06a5),
    // Haswell-EP.
    (&[LEVEL3], 0x0003_06f2),
    // Cascade Lake; for compilers Skylake-SP unless they see VNNI. Later ones have more than the level.
    (&[LEVEL4, &["spec_ctrl"]], 0x0005_0657),
];
/// Shown for the host's own processor where that has AVX-512 and the guest sees none. Coffee Lake Refresh leaks all that Intel's
/// processors with AVX-512 do, so that a guest defends itself as it would there.
const INTEL_WITHOUT_AVX512: u32 = 0x0009_06ed;
/// The same of AMD: Zen 3.
const AMD_WITHOUT_AVX512: u32 = 0x00a0_0f11;
/// Stepping, model, type, family and their extensions.
const SIGNATURE_FIELDS: u32 = 0x0fff_3fff;
const INTEL: CpuidLeaf = CpuidLeaf { eax: 0, ebx: 0x756e_6547, ecx: 0x6c65_746e, edx: 0x4965_6e69 };
const LAST_BASIC: u32 = 0x16;
const LAST_BASIC_AMD: u32 = 0xd;
const LAST_EXTENDED: u32 = 0x8000_0008;
/// Leaf 1 EDX: HTT, more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 8000_0001H ECX of AMD: CMP_LEGACY, the same; TOPOEXT, leaves 8000_001DH and 8000_001EH.
const CMP_LEGACY: u32 = 1 << 1;
const TOPOEXT: u32 = 1 << 22;
/// Bits of leaf 1 EDX that AMD repeats in leaf 8000_0001H EDX.
const REPEATED: u32 = 0x0183_f3ff;

/// What a guest sees. `host` is what the back end can give: for the software CPU the host's own CPUID, for hardware
/// the back end's table (of KVM, `KVM_GET_SUPPORTED_CPUID`, with TSC-deadline added where KVM has the capability).
///
/// A named model is the same on every host that can give it, but for the clocks' frequencies, physical addresses
/// narrower than 46 bits, and the places of AVX-512's registers in the XSAVE area, which Intel and AMD have different.
///
/// # Errors
/// The model or a feature cannot be had here, or the features contradict each other.
pub fn policy(host: &CpuidTable, options: &PolicyOptions) -> Result<CpuidTable, PolicyError> {
    let shown = select(host, options)?;
    let host_leaf = |function, index| host.get(function, index).unwrap_or_default();
    // Whose leaves, and whether the host's identity and caches are shown.
    let (maker, vendor, own) = match (options.model, options.provider) {
        (Model::Host, Provider::Hardware) if host_leaf(0, 0).ebx != 0 => {
            (Maker::of(host), host_leaf(0, 0), true)
        }
        (Model::Host, _) => {
            let leaf = host_leaf(0, 0);
            (Maker::Intel, INTEL, (leaf.ebx, leaf.ecx, leaf.edx) == (INTEL.ebx, INTEL.ecx, INTEL.edx))
        }
        _ => (Maker::Intel, INTEL, false),
    };
    let topology = Topology::new(options);

    let mut table = CpuidTable::default();
    for feature in shown.iter().map(|at| &FEATURES[at]) {
        let mut leaf = table.get(feature.function, feature.index).unwrap_or_default();
        *leaf.register_mut(feature.register) |= 1 << feature.bit;
        table.set(feature.function, feature.index, leaf);
    }
    xsave::leaves(&shown, host, options.provider, &mut table);
    // What stands beside the features: `set` adds to what is there.
    let mut set = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| {
        let leaf = table.get(function, index).unwrap_or_default();
        let leaf =
            CpuidLeaf { eax: leaf.eax | eax, ebx: leaf.ebx | ebx, ecx: leaf.ecx | ecx, edx: leaf.edx | edx };
        table.set(function, index, leaf);
        leaf
    };

    let last_basic = if maker == Maker::Intel { LAST_BASIC } else { LAST_BASIC_AMD };
    set(0, 0, [last_basic, vendor.ebx, vendor.ecx, vendor.edx]);
    // CLFLUSH line of 64 bytes, logical processors in the package; the APIC ID is filled in for each processor.
    let hardware = own && options.provider == Provider::Hardware;
    let signature = signature(&shown, maker, hardware.then_some(host_leaf(1, 0).eax & SIGNATURE_FIELDS));
    let several = topology.in_package > 1;
    let logical = topology.package_ids().min(255);
    let basic = set(1, 0, [signature, 8 << 8 | logical << 16, 0, if several { HTT } else { 0 }]);
    set(6, 0, [0; 4]);
    for index in [1, 2] {
        set(7, index, [0; 4]);
    }
    set(7, 0, [2, 0, 0, 0]);
    for (index, leaf) in topology.levels() {
        set(0xb, index, [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
    }
    if maker == Maker::Intel {
        // Leaf 2 refers to leaf 4.
        set(2, 0, [0x00fe_ff01, 0, 0, 0]);
        let caches =
            topology.caches(maker, |index| if own { host_leaf(4, index) } else { CpuidLeaf::default() });
        for (index, leaf) in caches {
            set(4, index, [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        }
        // TSC frequency = crystal * EBX / EAX. Guests take the crystal for the APIC timer's frequency, so it is that.
        if let Some((numerator, denominator)) = ratio(options.tsc_hz, options.apic_hz) {
            set(0x15, 0, [denominator, numerator, options.apic_hz.try_into().unwrap_or(0), 0]);
        }
        let mhz = u32::try_from(options.tsc_hz / 1_000_000).unwrap_or(u32::MAX).min(0xffff);
        set(0x16, 0, [mhz, mhz, 100, 0]);
    }

    if shown.iter().any(|at| FEATURES[at].function == 0x4000_0001) {
        let kvm = [0x4b4d_564b, 0x564b_4d56, 0x4d];
        set(0x4000_0000, 0, [0x4000_0010, kvm[0], kvm[1], kvm[2]]);
        let khz = |hz: u64| u32::try_from(hz / 1000).unwrap_or(0);
        set(0x4000_0010, 0, [khz(options.tsc_hz), khz(options.apic_hz), 0, 0]);
    }

    set(0x8000_0000, 0, [LAST_EXTENDED, 0, 0, 0]);
    for (function, text) in (0x8000_0002..).zip(brand(host, options.model).as_chunks::<16>().0) {
        let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
        set(function, 0, [word(0), word(4), word(8), word(12)]);
    }
    // L2: 64-byte lines, 8-way (6), 1 MiB unless the host says otherwise.
    let l2 = if own { host_leaf(0x8000_0006, 0).ecx } else { 0 };
    set(0x8000_0006, 0, [0, 0, if l2 != 0 { l2 } else { 0x0400_6040 }, 0]);
    set(0x8000_0007, 0, [0; 4]);
    let linear_bits = if shown.iter().any(|at| FEATURES[at].name == "la57") { 57 } else { 48 };
    let sizes = physical_bits(host, options) | linear_bits << 8;
    let amd = maker == Maker::Amd;
    set(0x8000_0008, 0, [sizes, 0, if amd { topology.size_identifiers() } else { 0 }, 0]);
    if amd {
        let topoext = host_leaf(0x8000_0001, 0).ecx & TOPOEXT;
        let repeated = basic.edx & REPEATED;
        set(0x8000_0001, 0, [signature, 0, topoext | if several { CMP_LEGACY } else { 0 }, repeated]);
        set(0x8000_0000, 0, [0, vendor.ebx, vendor.ecx, vendor.edx]);
        // Caches and TLBs in the old form.
        let (first, second) = (host_leaf(0x8000_0005, 0), host_leaf(0x8000_0006, 0));
        set(0x8000_0005, 0, [first.eax, first.ebx, first.ecx, first.edx]);
        set(0x8000_0006, 0, [second.eax, second.ebx, 0, second.edx]);
        if topoext != 0 {
            for (index, leaf) in topology.caches(maker, |index| host_leaf(0x8000_001d, index)) {
                set(0x8000_001d, index, [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
            }
            let leaf = topology.extended();
            set(0x8000_001e, 0, [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        }
    }
    if let Some(last) = table.iter().map(|(function, ..)| function).last() {
        let mut leaf = table.get(0x8000_0000, 0).unwrap_or_default();
        leaf.eax = last.max(LAST_EXTENDED);
        table.set(0x8000_0000, 0, leaf);
    }
    Ok(table)
}

/// Which models the back end can give with table `host`, and why not the others.
pub fn models(host: &CpuidTable, provider: Provider) -> Vec<(Model, Result<(), PolicyError>)> {
    let can = |model| {
        let options = PolicyOptions { provider, model, ..PolicyOptions::default() };
        (model, select(host, &options).map(drop))
    };
    Model::ALL.into_iter().map(can).collect()
}

/// Every feature by name, and why the back end cannot give it with table `host`, if it cannot.
pub fn available(host: &CpuidTable, provider: Provider) -> Vec<(&'static str, Option<Reason>)> {
    let options = PolicyOptions { provider, ..PolicyOptions::default() };
    FEATURES.iter().map(|feature| feature.name).zip(lacking(host, &options)).collect()
}

/// Names of the features that `table` shows.
pub fn shown(table: &CpuidTable) -> Vec<&'static str> {
    FEATURES.iter().filter(|feature| feature.is_in(table)).map(|feature| feature.name).collect()
}

/// Stepping, model and family to show. `own` are those of the processor that runs the guest, where they can be shown.
fn signature(shown: &Set, maker: Maker, own: Option<u32>) -> u32 {
    let has = |names: &[&str]| names.iter().all(|name| shown.iter().any(|at| FEATURES[at].name == *name));
    match own {
        Some(own) if has(&["avx512f"]) || !is_avx512(maker, own) => own,
        Some(_) if maker == Maker::Amd => AMD_WITHOUT_AVX512,
        Some(_) if has(LEVEL2) && has(LEVEL3) => INTEL_WITHOUT_AVX512,
        _ => {
            let seen = SIGNATURES.iter().take_while(|row| row.0.iter().all(|names| has(names)));
            seen.last().map_or(0, |row| row.1)
        }
    }
}

/// Processors with that signature have AVX-512.
fn is_avx512(maker: Maker, signature: u32) -> bool {
    let family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
    let model = signature >> 4 & 0xf | signature >> 12 & 0xf0;
    match (maker, family, model) {
        // Skylake-SP, Cannon Lake; Ice Lake, Tiger Lake, Rocket Lake; Sapphire, Emerald and Granite Rapids; Xeon Phi.
        (Maker::Intel, 6, 0x55 | 0x66) => true,
        (Maker::Intel, 6, 0x6a | 0x6c | 0x7d | 0x7e | 0x8c | 0x8d | 0x9d | 0xa7 | 0xa8) => true,
        (Maker::Intel, 6, 0x8f | 0xcf | 0xad | 0xae) => true,
        (Maker::Intel, 6, 0x57 | 0x85) => true,
        // Diamond Rapids, Nova Lake.
        (Maker::Intel, 18.., _) => true,
        // Zen 4, Zen 5 and later.
        (Maker::Amd, 0x19, 0x10..=0x1f | 0x60..=0xaf) | (Maker::Amd, 0x1a.., _) => true,
        _ => false,
    }
}

/// Width of the guest's physical addresses in bits.
fn physical_bits(host: &CpuidTable, options: &PolicyOptions) -> u32 {
    if options.provider == Provider::Software {
        return PHYSICAL_BITS;
    }
    let bits = host.get(0x8000_0008, 0).map_or(LEAST_PHYSICAL_BITS, |leaf| leaf.eax & 0xff);
    let most = if options.model == Model::Host { 52 } else { PHYSICAL_BITS };
    bits.clamp(LEAST_PHYSICAL_BITS, most)
}

/// The brand string: the host's, or one of our own.
fn brand(host: &CpuidTable, model: Model) -> [u8; 48] {
    let mut text = [0; 48];
    let registers = (0x8000_0002..=0x8000_0004).flat_map(|function| {
        let leaf = host.get(function, 0).unwrap_or_default();
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    });
    for (word, register) in text.as_chunks_mut::<4>().0.iter_mut().zip(registers) {
        *word = register.to_le_bytes();
    }
    if model != Model::Host || text[0] == 0 {
        let level = if model == Model::Host { "x86-64" } else { model.name() };
        let own = format!("Skep {level} processor");
        text = [0; 48];
        text[..own.len()].copy_from_slice(own.as_bytes());
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

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
