//! The XSAVE area (SDM vol. 1 §13.4), as far as the policy shows it.

use super::features::{FEATURES, Set};
use super::{CpuidLeaf, CpuidTable, Provider};

/// Components of the area: the feature that brings them, number, bytes. x87 and SSE are the legacy part.
const COMPONENTS: &[(&str, u32, u32)] =
    &[("avx", 2, 256), ("avx512f", 5, 64), ("avx512f", 6, 512), ("avx512f", 7, 1024), ("pku", 9, 8)];
/// The components of AVX-512, as bits of XCR0.
pub(super) const AVX512: u32 = 0xe0;
/// Bytes of the legacy part and the header.
const LEGACY: u32 = 576;
/// Where the areas of the software CPU end at most: where Intel's do.
const SOFTWARE_END: u32 = 2688;
/// No processor places one of these components beyond.
const END: u32 = 4096;
/// Leaf 1 ECX: OSXSAVE.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 7 EBX: AVX512BW.
const AVX512BW: u32 = 1 << 30;

/// Whether the registers that a feature works on can be saved.
pub(super) fn has_state(feature: &str, host: &CpuidTable, provider: Provider) -> bool {
    let leaf = |function, index| host.get(function, index).unwrap_or_default();
    if provider == Provider::Software {
        // State is saved by the host's own XSAVE, which its kernel must have enabled: EBX is the size of what its XCR0 holds.
        return match feature {
            "xsave" => leaf(1, 0).ecx & OSXSAVE != 0,
            "avx" => leaf(0xd, 0).eax & 7 == 7 && leaf(0xd, 0).ebx >= LEGACY + 256,
            // 64 bits of an opmask register are moved by instructions of AVX512BW, which all but the first processors have.
            "avx512f" => {
                let end = leaf(0xd, 7).ebx.saturating_add(leaf(0xd, 7).eax);
                leaf(7, 0).ebx & AVX512BW != 0 && is_placed(feature, host) && end <= SOFTWARE_END
            }
            _ => true,
        };
    }
    if feature == "xsave" {
        return leaf(0xd, 0).eax & 3 == 3;
    }
    is_placed(feature, host)
}

/// Whether the host has the state of a feature, at a place that makes sense.
fn is_placed(feature: &str, host: &CpuidTable) -> bool {
    let leaf = |function, index| host.get(function, index).unwrap_or_default();
    COMPONENTS.iter().filter(|component| component.0 == feature).all(|&(_, number, bytes)| {
        let place = leaf(0xd, number);
        // AVX has one place on all processors, the others have different ones.
        let placed = if number == 2 { place.ebx == LEGACY } else { (LEGACY..END).contains(&place.ebx) };
        leaf(0xd, 0).eax & 1 << number != 0 && place.eax == bytes && placed && place.ecx & 1 == 0
    })
}

/// Leaf 0xD for the features in `shown`. The layout is the host's: its instructions write it.
pub(super) fn leaves(shown: &Set, host: &CpuidTable, provider: Provider, table: &mut CpuidTable) {
    let has = |name: &str| shown.iter().any(|at| FEATURES[at].name == name);
    if !has("xsave") {
        return;
    }
    let mut xcr0 = 3;
    for &(feature, number, bytes) in COMPONENTS.iter().filter(|component| has(component.0)) {
        let place = host.get(0xd, number).filter(|_| number != 2);
        let (start, flags) = place.map_or((LEGACY, 0), |leaf| (leaf.ebx, leaf.ecx & 2));
        debug_assert!(has_state(feature, host, provider));
        table.set(0xd, number, CpuidLeaf { eax: bytes, ebx: start, ecx: flags, edx: 0 });
        xcr0 |= 1 << number;
    }
    let size = table.xsave_size(u64::from(xcr0), false);
    table.set(0xd, 0, CpuidLeaf { eax: xcr0, ebx: LEGACY, ecx: size, edx: 0 });
    // The instructions of the family are in the table already, if there are any.
    let family = table.get(0xd, 1).unwrap_or_default();
    table.set(0xd, 1, family);
}
