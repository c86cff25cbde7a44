//! What this processor has, as its CPUID table tells it: which bits of control registers exist, which instructions.

use skep_hv::cpuid::{CpuidLeaf, CpuidTable};

use crate::cpu::{cr4, efer};

/// The processor's model. Values follow from CPUID, so that guest and processor always agree.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    /// All of CPUID.
    pub(crate) cpuid: CpuidTable,
    /// MAXPHYADDR.
    pub(crate) physical_bits: u8,
    /// CR4 bits that may be set.
    pub(crate) cr4: u64,
    /// EFER bits that may be set.
    pub(crate) efer: u64,
    /// XCR0 bits that may be set.
    pub(crate) xcr0: u64,
    /// 1 GiB pages.
    pub(crate) gib_pages: bool,
    /// SMAP, and with it CLAC and STAC.
    pub(crate) smap: bool,
    /// INVPCID.
    pub(crate) invpcid: bool,
    /// RDTSCP.
    pub(crate) rdtscp: bool,
    /// RDPID.
    pub(crate) rdpid: bool,
    /// CLFLUSHOPT.
    pub(crate) clflushopt: bool,
    /// CLWB.
    pub(crate) clwb: bool,
    /// SERIALIZE.
    pub(crate) serialize: bool,
    /// SYSENTER and SYSEXIT.
    pub(crate) sysenter: bool,
    /// IA32_TSC_ADJUST.
    pub(crate) tsc_adjust: bool,
    /// IA32_SPEC_CTRL and IA32_PRED_CMD.
    pub(crate) spec_ctrl: bool,
    /// IA32_ARCH_CAPABILITIES.
    pub(crate) arch_capabilities: bool,
    /// KVM's paravirtual features (leaf 4000_0001H EAX).
    pub(crate) paravirt: u32,
}

impl Model {
    /// Derives the model from CPUID.
    pub(crate) fn new(cpuid: &CpuidTable) -> Self {
        let leaf = |function, index| cpuid.get(function, index).unwrap_or_default();
        let basic = leaf(1, 0);
        let seven = leaf(7, 0);
        let extended = leaf(0x8000_0001, 0);
        let has = |register: u32, bit: u32| register & 1 << bit != 0;
        let when = |yes: bool, bits: u64| if yes { bits } else { 0 };
        let signature = leaf(0x4000_0000, 0);
        let kvm =
            signature == CpuidLeaf { eax: signature.eax, ebx: 0x4b4d_564b, ecx: 0x564b_4d56, edx: 0x4d };
        Self {
            physical_bits: match leaf(0x8000_0008, 0).eax as u8 {
                bits @ 32..=52 => bits,
                _ => 36,
            },
            cr4: cr4::TSD
                | cr4::DE
                | cr4::PSE
                | cr4::PAE
                | cr4::MCE
                | cr4::PGE
                | cr4::PCE
                | cr4::OSFXSR
                | cr4::OSXMMEXCPT
                | when(has(basic.edx, 1), cr4::VME | cr4::PVI)
                | when(has(basic.ecx, 17), cr4::PCIDE)
                | when(has(basic.ecx, 26), cr4::OSXSAVE)
                | when(has(seven.ebx, 0), cr4::FSGSBASE)
                | when(has(seven.ebx, 7), cr4::SMEP)
                | when(has(seven.ebx, 20), cr4::SMAP)
                | when(has(seven.ecx, 2), cr4::UMIP)
                | when(has(seven.ecx, 16), cr4::LA57),
            efer: when(has(extended.edx, 11), efer::SCE)
                | when(has(extended.edx, 20), efer::NXE)
                | when(has(extended.edx, 29), efer::LME | efer::LMA),
            xcr0: {
                let leaf = leaf(0xd, 0);
                u64::from(leaf.edx) << 32 | u64::from(leaf.eax)
            },
            gib_pages: has(extended.edx, 26),
            smap: has(seven.ebx, 20),
            invpcid: has(seven.ebx, 10),
            rdtscp: has(extended.edx, 27),
            rdpid: has(seven.ecx, 22),
            clflushopt: has(seven.ebx, 23),
            clwb: has(seven.ebx, 24),
            serialize: has(seven.edx, 14),
            sysenter: has(basic.edx, 11),
            tsc_adjust: has(seven.ebx, 1),
            spec_ctrl: has(seven.edx, 26),
            arch_capabilities: has(seven.edx, 29),
            paravirt: if kvm { leaf(0x4000_0001, 0).eax } else { 0 },
            cpuid: cpuid.clone(),
        }
    }

    /// Physical-address bits of a 64-bit paging-structure entry that no address of this model has: 51 down to
    /// MAXPHYADDR.
    pub(crate) fn reserved_address(&self) -> u64 {
        (1 << 52) - (1u64 << self.physical_bits)
    }
}
