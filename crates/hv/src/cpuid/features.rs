//! The features that the policy knows: one row each. What is not in this table is never shown.

use std::sync::LazyLock;

use super::{CpuidLeaf, CpuidTable};

/// A register of a CPUID answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Who gives a feature to a guest of the software CPU. A back end in hardware gives what its table has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Giver {
    /// Part of every x86-64 processor: every back end has it, every model shows it, and it cannot be turned off.
    Base,
    /// The host's own units execute it.
    Host,
    /// The software CPU itself, on every host.
    Own,
    /// Nobody: hardware only.
    Hardware,
}

/// One feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// Its name in Linux's `/proc/cpuinfo`; where that has none, Linux's constant (`X86_FEATURE_…`, `KVM_FEATURE_…`) in
    /// lower case.
    pub name: &'static str,
    /// CPUID function (leaf).
    pub function: u32,
    /// Sub-leaf.
    pub index: u32,
    /// Register.
    pub register: Register,
    /// Bit number.
    pub bit: u32,
    /// Who gives it to the software CPU's guests.
    pub giver: Giver,
    /// Features that it needs, by name; they stand above it in the table.
    pub needs: &'static [&'static str],
}

impl Feature {
    /// Whether `table` shows the feature.
    pub fn is_in(&self, table: &CpuidTable) -> bool {
        table
            .get(self.function, self.index)
            .is_some_and(|leaf| leaf.register(self.register) & 1 << self.bit != 0)
    }
}

impl CpuidLeaf {
    /// The register by name.
    pub fn register(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }

    /// The register by name, to be changed.
    pub fn register_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

/// A place in CPUID.
type Place = (u32, u32, Register);

const BASIC_ECX: Place = (1, 0, Register::Ecx);
const BASIC_EDX: Place = (1, 0, Register::Edx);
const SIX: Place = (6, 0, Register::Eax);
const SEVEN_EBX: Place = (7, 0, Register::Ebx);
const SEVEN_ECX: Place = (7, 0, Register::Ecx);
const SEVEN_EDX: Place = (7, 0, Register::Edx);
const SEVEN_1_EAX: Place = (7, 1, Register::Eax);
const SEVEN_1_EDX: Place = (7, 1, Register::Edx);
const SEVEN_2_EDX: Place = (7, 2, Register::Edx);
const XSAVE: Place = (0xd, 1, Register::Eax);
const KVM: Place = (0x4000_0001, 0, Register::Eax);
const EXTENDED_ECX: Place = (0x8000_0001, 0, Register::Ecx);
const EXTENDED_EDX: Place = (0x8000_0001, 0, Register::Edx);
const POWER: Place = (0x8000_0007, 0, Register::Edx);
const SIZES_EBX: Place = (0x8000_0008, 0, Register::Ebx);
const EXTENDED_2_EAX: Place = (0x8000_0021, 0, Register::Eax);
const EXTENDED_2_ECX: Place = (0x8000_0021, 0, Register::Ecx);

const fn row(
    name: &'static str,
    (function, index, register): Place,
    bit: u32,
    giver: Giver,
    needs: &'static [&'static str],
) -> Feature {
    Feature { name, function, index, register, bit, giver, needs }
}

use Giver::{Base, Hardware, Host, Own};

/// All features. A row stands below the rows that it needs.
///
/// Bits: SDM vol. 2A, CPUID; AMD's APM vol. 3 appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.
pub static FEATURES: &[Feature] = &[
    // Every x86-64 processor.
    row("fpu", BASIC_EDX, 0, Base, &[]),
    row("de", BASIC_EDX, 2, Base, &[]),
    row("pse", BASIC_EDX, 3, Base, &[]),
    row("tsc", BASIC_EDX, 4, Base, &[]),
    row("msr", BASIC_EDX, 5, Base, &[]),
    row("pae", BASIC_EDX, 6, Base, &[]),
    row("mce", BASIC_EDX, 7, Base, &[]),
    row("cx8", BASIC_EDX, 8, Base, &[]),
    row("apic", BASIC_EDX, 9, Base, &[]),
    row("sep", BASIC_EDX, 11, Base, &[]),
    row("mtrr", BASIC_EDX, 12, Base, &[]),
    row("pge", BASIC_EDX, 13, Base, &[]),
    row("mca", BASIC_EDX, 14, Base, &["mce"]),
    row("cmov", BASIC_EDX, 15, Base, &[]),
    row("pat", BASIC_EDX, 16, Base, &[]),
    row("pse36", BASIC_EDX, 17, Base, &["pse"]),
    row("clflush", BASIC_EDX, 19, Base, &[]),
    row("mmx", BASIC_EDX, 23, Base, &["fpu"]),
    row("fxsr", BASIC_EDX, 24, Base, &["fpu"]),
    row("sse", BASIC_EDX, 25, Base, &["fxsr"]),
    row("sse2", BASIC_EDX, 26, Base, &["sse"]),
    row("syscall", EXTENDED_EDX, 11, Base, &[]),
    row("lm", EXTENDED_EDX, 29, Base, &["pae", "msr"]),
    // Paging, interrupts, time, other parts of the privileged half.
    row("nx", EXTENDED_EDX, 20, Own, &["pae"]),
    row("pdpe1gb", EXTENDED_EDX, 26, Own, &["lm"]),
    row("pcid", BASIC_ECX, 17, Own, &["lm"]),
    row("invpcid", SEVEN_EBX, 10, Own, &["pcid"]),
    row("smep", SEVEN_EBX, 7, Own, &[]),
    row("smap", SEVEN_EBX, 20, Own, &[]),
    row("umip", SEVEN_ECX, 2, Own, &[]),
    row("la57", SEVEN_ECX, 16, Own, &["lm"]),
    row("fsgsbase", SEVEN_EBX, 0, Own, &["lm"]),
    row("vme", BASIC_EDX, 1, Hardware, &[]),
    row("ss", BASIC_EDX, 27, Hardware, &[]),
    row("x2apic", BASIC_ECX, 21, Own, &["apic", "msr"]),
    row("tsc_deadline_timer", BASIC_ECX, 24, Own, &["tsc", "apic"]),
    row("arat", SIX, 2, Own, &["apic"]),
    row("tsc_adjust", SEVEN_EBX, 1, Own, &["tsc", "msr"]),
    row("nonstop_tsc", POWER, 8, Own, &["tsc"]),
    row("rdtscp", EXTENDED_EDX, 27, Own, &["tsc", "msr"]),
    row("rdpid", SEVEN_ECX, 22, Own, &["rdtscp"]),
    row("cr8_legacy", EXTENDED_ECX, 4, Hardware, &["apic"]),
    row("osvw", EXTENDED_ECX, 9, Hardware, &["msr"]),
    // Caches and memory.
    row("erms", SEVEN_EBX, 9, Own, &[]),
    row("fsrm", SEVEN_EDX, 4, Host, &[]),
    row("fzrm", SEVEN_1_EAX, 10, Hardware, &[]),
    row("fsrs", SEVEN_1_EAX, 11, Hardware, &[]),
    row("fsrc", SEVEN_1_EAX, 12, Hardware, &[]),
    row("clflushopt", SEVEN_EBX, 23, Own, &["clflush"]),
    row("clwb", SEVEN_EBX, 24, Own, &["clflush"]),
    row("cldemote", SEVEN_ECX, 25, Hardware, &[]),
    row("clzero", SIZES_EBX, 0, Hardware, &[]),
    row("wbnoinvd", SIZES_EBX, 9, Hardware, &[]),
    row("3dnowprefetch", EXTENDED_ECX, 8, Host, &[]),
    row("prefetchiti", SEVEN_1_EDX, 14, Hardware, &["lm"]),
    row("movdiri", SEVEN_ECX, 27, Hardware, &[]),
    row("movdir64b", SEVEN_ECX, 28, Hardware, &[]),
    row("serialize", SEVEN_EDX, 14, Hardware, &[]),
    // Integers and general registers.
    row("cx16", BASIC_ECX, 13, Host, &["cx8", "lm"]),
    row("lahf_lm", EXTENDED_ECX, 0, Host, &["lm"]),
    row("popcnt", BASIC_ECX, 23, Host, &[]),
    row("movbe", BASIC_ECX, 22, Host, &[]),
    row("abm", EXTENDED_ECX, 5, Host, &[]),
    row("bmi1", SEVEN_EBX, 3, Host, &[]),
    row("bmi2", SEVEN_EBX, 8, Host, &[]),
    row("adx", SEVEN_EBX, 19, Host, &[]),
    row("rdrand", BASIC_ECX, 30, Host, &[]),
    row("rdseed", SEVEN_EBX, 18, Host, &[]),
    row("cmpccxadd", SEVEN_1_EAX, 7, Hardware, &["lm"]),
    row("tbm", EXTENDED_ECX, 21, Hardware, &[]),
    // x87 and SSE.
    row("fdp_excptn_only", SEVEN_EBX, 6, Host, &["fpu"]),
    row("zero_fcs_fds", SEVEN_EBX, 13, Host, &["fpu"]),
    row("xsaveerptr", SIZES_EBX, 2, Hardware, &["fpu"]),
    row("fxsr_opt", EXTENDED_EDX, 25, Hardware, &["fxsr"]),
    row("mmxext", EXTENDED_EDX, 22, Hardware, &["mmx"]),
    row("pni", BASIC_ECX, 0, Host, &["sse2"]),
    row("ssse3", BASIC_ECX, 9, Host, &["pni"]),
    row("sse4_1", BASIC_ECX, 19, Host, &["ssse3"]),
    row("sse4_2", BASIC_ECX, 20, Host, &["sse4_1"]),
    row("sse4a", EXTENDED_ECX, 6, Hardware, &["pni"]),
    row("misalignsse", EXTENDED_ECX, 7, Hardware, &["sse"]),
    row("pclmulqdq", BASIC_ECX, 1, Host, &["sse2"]),
    row("aes", BASIC_ECX, 25, Host, &["sse2"]),
    row("sha_ni", SEVEN_EBX, 29, Host, &["sse2"]),
    row("gfni", SEVEN_ECX, 8, Hardware, &["sse2"]),
    // XSAVE and what it makes room for.
    row("xsave", BASIC_ECX, 26, Host, &["fxsr"]),
    row("xsaveopt", XSAVE, 0, Host, &["xsave"]),
    row("xsavec", XSAVE, 1, Host, &["xsave"]),
    row("xgetbv1", XSAVE, 2, Host, &["xsave"]),
    row("xsaves", XSAVE, 3, Hardware, &["xsavec"]),
    row("pku", SEVEN_ECX, 3, Hardware, &["xsave", "lm"]),
    row("avx", BASIC_ECX, 28, Host, &["xsave"]),
    row("f16c", BASIC_ECX, 29, Host, &["avx"]),
    row("fma", BASIC_ECX, 12, Host, &["avx"]),
    row("avx2", SEVEN_EBX, 5, Host, &["avx"]),
    row("fma4", EXTENDED_ECX, 16, Hardware, &["avx"]),
    row("xop", EXTENDED_ECX, 11, Hardware, &["avx"]),
    row("vaes", SEVEN_ECX, 9, Hardware, &["avx", "aes"]),
    row("vpclmulqdq", SEVEN_ECX, 10, Hardware, &["avx", "pclmulqdq"]),
    row("avx_vnni", SEVEN_1_EAX, 4, Hardware, &["avx2"]),
    row("avx_ifma", SEVEN_1_EAX, 23, Hardware, &["avx2"]),
    row("avx_vnni_int8", SEVEN_1_EDX, 4, Hardware, &["avx2"]),
    row("avx_ne_convert", SEVEN_1_EDX, 5, Hardware, &["avx2"]),
    row("avx_vnni_int16", SEVEN_1_EDX, 10, Hardware, &["avx2"]),
    row("sha512", SEVEN_1_EAX, 0, Hardware, &["avx2"]),
    row("sm3", SEVEN_1_EAX, 1, Hardware, &["avx"]),
    row("sm4", SEVEN_1_EAX, 2, Hardware, &["avx2"]),
    row("avx512f", SEVEN_EBX, 16, Host, &["avx2"]),
    row("avx512dq", SEVEN_EBX, 17, Host, &["avx512f"]),
    row("avx512cd", SEVEN_EBX, 28, Host, &["avx512f"]),
    row("avx512bw", SEVEN_EBX, 30, Host, &["avx512f"]),
    row("avx512vl", SEVEN_EBX, 31, Host, &["avx512f"]),
    row("avx512ifma", SEVEN_EBX, 21, Hardware, &["avx512f"]),
    row("avx512vbmi", SEVEN_ECX, 1, Hardware, &["avx512f"]),
    row("avx512_vbmi2", SEVEN_ECX, 6, Hardware, &["avx512vl"]),
    row("avx512_vnni", SEVEN_ECX, 11, Host, &["avx512vl"]),
    row("avx512_bitalg", SEVEN_ECX, 12, Hardware, &["avx512vl"]),
    row("avx512_vpopcntdq", SEVEN_ECX, 14, Hardware, &["avx512f"]),
    row("avx512_vp2intersect", SEVEN_EDX, 8, Hardware, &["avx512vl"]),
    row("avx512_fp16", SEVEN_EDX, 23, Hardware, &["avx512bw"]),
    row("avx512_bf16", SEVEN_1_EAX, 5, Hardware, &["avx512vl"]),
    // Speculation. What the software CPU shows of it does nothing: see `ARCH_CAPABILITIES`.
    row("spec_ctrl", SEVEN_EDX, 26, Own, &["msr"]),
    row("bhi_ctrl", SEVEN_2_EDX, 4, Own, &["spec_ctrl"]),
    row("intel_psfd", SEVEN_2_EDX, 0, Hardware, &["spec_ctrl"]),
    row("ipred_ctrl", SEVEN_2_EDX, 1, Hardware, &["spec_ctrl"]),
    row("rrsba_ctrl", SEVEN_2_EDX, 2, Hardware, &["spec_ctrl"]),
    row("mcdt_no", SEVEN_2_EDX, 5, Hardware, &[]),
    row("intel_stibp", SEVEN_EDX, 27, Hardware, &["msr"]),
    row("spec_ctrl_ssbd", SEVEN_EDX, 31, Hardware, &["msr"]),
    row("md_clear", SEVEN_EDX, 10, Hardware, &[]),
    row("flush_l1d", SEVEN_EDX, 28, Hardware, &["msr"]),
    row("arch_capabilities", SEVEN_EDX, 29, Own, &["msr"]),
    row("amd_ibpb", SIZES_EBX, 12, Hardware, &["msr"]),
    row("amd_ibrs", SIZES_EBX, 14, Hardware, &["msr"]),
    row("amd_stibp", SIZES_EBX, 15, Hardware, &["msr"]),
    row("amd_stibp_always_on", SIZES_EBX, 17, Hardware, &["amd_stibp"]),
    row("amd_ssbd", SIZES_EBX, 24, Hardware, &["msr"]),
    row("virt_ssbd", SIZES_EBX, 25, Hardware, &["msr"]),
    row("amd_ssb_no", SIZES_EBX, 26, Hardware, &[]),
    row("amd_psfd", SIZES_EBX, 28, Hardware, &["msr"]),
    row("btc_no", SIZES_EBX, 29, Hardware, &[]),
    row("amd_ibpb_ret", SIZES_EBX, 30, Hardware, &["amd_ibpb"]),
    row("no_nested_data_bp", EXTENDED_2_EAX, 0, Hardware, &[]),
    row("lfence_rdtsc", EXTENDED_2_EAX, 2, Hardware, &[]),
    row("verw_clear", EXTENDED_2_EAX, 5, Hardware, &[]),
    row("null_sel_clr_base", EXTENDED_2_EAX, 6, Hardware, &[]),
    row("autoibrs", EXTENDED_2_EAX, 8, Hardware, &["msr"]),
    row("sbpb", EXTENDED_2_EAX, 27, Hardware, &["msr"]),
    row("ibpb_brtype", EXTENDED_2_EAX, 28, Hardware, &["msr"]),
    row("srso_no", EXTENDED_2_EAX, 29, Hardware, &[]),
    row("srso_user_kernel_no", EXTENDED_2_EAX, 30, Hardware, &[]),
    row("tsa_sq_no", EXTENDED_2_ECX, 1, Hardware, &[]),
    row("tsa_l1_no", EXTENDED_2_ECX, 2, Hardware, &[]),
    // The hypervisor and KVM's paravirtual interface.
    row("hypervisor", BASIC_ECX, 31, Own, &[]),
    row("kvm_clocksource", KVM, 0, Own, &["hypervisor", "tsc", "msr"]),
    row("kvm_nop_io_delay", KVM, 1, Own, &["hypervisor"]),
    row("kvm_clocksource2", KVM, 3, Own, &["hypervisor", "tsc", "msr"]),
    row("kvm_clocksource_stable", KVM, 24, Own, &["kvm_clocksource2"]),
    row("kvm_steal_time", KVM, 5, Own, &["hypervisor", "msr"]),
    row("kvm_pv_tlb_flush", KVM, 9, Own, &["kvm_steal_time"]),
    row("kvm_pv_sched_yield", KVM, 13, Own, &["kvm_steal_time"]),
    row("kvm_pv_send_ipi", KVM, 11, Own, &["hypervisor", "apic"]),
    row("kvm_pv_eoi", KVM, 6, Hardware, &["hypervisor", "apic"]),
    row("kvm_pv_unhalt", KVM, 7, Hardware, &["hypervisor", "apic"]),
    row("kvm_poll_control", KVM, 12, Hardware, &["hypervisor", "msr"]),
    row("kvm_async_pf", KVM, 4, Hardware, &["hypervisor", "msr"]),
    row("kvm_async_pf_int", KVM, 14, Hardware, &["kvm_async_pf", "apic"]),
];

/// Flags that Linux shows and that are no features of their own: what they follow from.
pub(super) const DERIVED: &[(&str, &str)] = &[
    ("ht", "it follows from the topology"),
    ("cmp_legacy", "it follows from the topology"),
    ("topoext", "it follows from the topology"),
    ("osxsave", "it is a copy of CR4.OSXSAVE; turn xsave off instead"),
    ("ospke", "it is a copy of CR4.PKE; turn pku off instead"),
    ("constant_tsc", "Linux makes it of nonstop_tsc"),
    ("ibrs", "Linux makes it of spec_ctrl or amd_ibrs"),
    ("ibpb", "Linux makes it of spec_ctrl or amd_ibpb"),
    ("stibp", "Linux makes it of intel_stibp or amd_stibp"),
    ("ssbd", "Linux makes it of spec_ctrl_ssbd, amd_ssbd or virt_ssbd"),
];

/// For each feature the positions of those that it needs.
static NEEDS: LazyLock<Vec<Vec<usize>>> = LazyLock::new(|| {
    let at = |name: &&str| position(name);
    FEATURES.iter().map(|feature| feature.needs.iter().filter_map(at).collect()).collect()
});

/// Where in [`FEATURES`] a name stands.
pub(super) fn position(name: &str) -> Option<usize> {
    FEATURES.iter().position(|feature| feature.name == name)
}

/// A set of features, by position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Set(Vec<bool>);

impl Set {
    pub(super) fn new(has: impl Fn(usize, &Feature) -> bool) -> Self {
        Self(FEATURES.iter().enumerate().map(|(at, feature)| has(at, feature)).collect())
    }

    pub(super) fn set(&mut self, at: usize, on: bool) {
        self.0[at] = on;
    }

    /// Positions of the features in the set.
    pub(super) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.0.len()).filter(|&at| self.0[at])
    }

    /// What `feature` needs, directly or not, and is not in the set.
    pub(super) fn missing_for(&self, feature: usize) -> Vec<&'static str> {
        let mut wanted = vec![false; self.0.len()];
        wanted[feature] = true;
        // Needs stand above: one pass from below meets them all.
        for at in (0..=feature).rev().filter(|&at| at == feature || !self.0[at]) {
            if wanted[at] {
                NEEDS[at].iter().for_each(|&need| wanted[need] = true);
            }
        }
        (0..feature).filter(|&at| wanted[at] && !self.0[at]).map(|at| FEATURES[at].name).collect()
    }

    /// What in the set needs `feature`, directly or not.
    pub(super) fn dependents_of(&self, feature: usize) -> Vec<&'static str> {
        let mut hit = vec![false; self.0.len()];
        hit[feature] = true;
        for at in feature + 1..self.0.len() {
            hit[at] = self.0[at] && NEEDS[at].iter().any(|&need| hit[need]);
        }
        (feature + 1..self.0.len()).filter(|&at| hit[at]).map(|at| FEATURES[at].name).collect()
    }

    /// The first of what `feature` needs directly that is not in the set.
    pub(super) fn lacks(&self, feature: usize) -> Option<&'static str> {
        NEEDS[feature].iter().find(|&&need| !self.0[need]).map(|&need| FEATURES[need].name)
    }
}

/// The known name nearest to a misspelt one, unless all are too far off to be meant.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    // Names are short, and the comparison is quadratic.
    if name.len() > 32 {
        return None;
    }
    let name = name.to_ascii_lowercase();
    let (edits, best) =
        FEATURES.iter().map(|f| (distance(name.as_bytes(), f.name.as_bytes()), f.name)).min()?;
    (edits <= (name.len() / 3).max(1)).then_some(best)
}

/// Insertions, deletions and replacements between two words.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = (diagonal + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = row[j + 1];
            row[j + 1] = cost;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_order_and_name_each_bit_once() {
        for (at, feature) in FEATURES.iter().enumerate() {
            assert!(feature.bit < 32 && position(feature.name) == Some(at), "{}", feature.name);
            for need in feature.needs {
                let need = position(need).expect(need);
                assert!(need < at, "{} stands above what it needs", feature.name);
                let base = FEATURES[need].giver == Giver::Base;
                assert!(feature.giver != Giver::Base || base, "{} is of the base", feature.name);
            }
            let place = |f: &Feature| (f.function, f.index, f.register as u32, f.bit);
            let same = FEATURES.iter().filter(|other| place(other) == place(feature)).count();
            assert_eq!(same, 1, "{}", feature.name);
            assert!(DERIVED.iter().all(|(name, _)| *name != feature.name));
        }
    }

    #[test]
    fn nearest_finds_slips_and_nothing_else() {
        assert_eq!(nearest("avx52f"), Some("avx512f"));
        assert_eq!(nearest("AES"), Some("aes"));
        assert_eq!(nearest("sse4.2"), Some("sse4_2"));
        assert_eq!(nearest("quantum"), None);
        assert_eq!(nearest(&"a".repeat(1 << 20)), None);
    }
}
