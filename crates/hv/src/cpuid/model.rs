//! Named models, and the choice of features on top of them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::features::{DERIVED, FEATURES, Feature, Giver, Set, nearest, position};
use super::topology::Maker;
use super::xsave;
use super::{CpuidTable, PolicyOptions, Provider};

/// A processor to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Model {
    /// All that the back end can give on this host and the policy knows. A VM with it can move to hosts that give the same.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// x86-64's baseline.
    #[serde(rename = "x86-64-v1")]
    X86_64V1,
    /// Up to SSE4.2: Intel from 2008 on, AMD from 2011 on.
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    /// Up to AVX2: Intel Haswell, AMD Excavator and Zen.
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
    /// Up to AVX-512: Intel Skylake-SP, AMD Zen 4.
    #[serde(rename = "x86-64-v4")]
    X86_64V4,
}

/// What hosts of any level give to guests, beside the base.
///
/// Of the paravirtual features those that make no hypercalls: Intel and AMD have different instructions for them, and
/// these models show an Intel processor on both. No invariant TSC: a VM that moves can come to a host with another
/// frequency, and a guest that was not told the TSC is invariant keeps time by the paravirtual clock.
const V1: &[&str] = &[
    "nx",
    "x2apic",
    "tsc_deadline_timer",
    "arat",
    "tsc_adjust",
    "arch_capabilities",
    "hypervisor",
    "kvm_clocksource",
    "kvm_nop_io_delay",
    "kvm_clocksource2",
    "kvm_clocksource_stable",
    "kvm_steal_time",
    "kvm_pv_tlb_flush",
];
/// The second micro-architecture level of the x86-64 psABI (table 3.1): what it has beyond the first.
pub(super) const LEVEL2: &[&str] = &["cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"];
/// The third.
pub(super) const LEVEL3: &[&str] = &["movbe", "abm", "bmi1", "bmi2", "xsave", "avx", "f16c", "fma", "avx2"];
/// The fourth.
pub(super) const LEVEL4: &[&str] = &["avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"];
/// What of the privileged half the oldest processors of the second level have.
const V2: &[&str] = &["rdtscp"];
/// Of the third.
const V3: &[&str] = &["pdpe1gb", "smep", "fsgsbase"];
/// Of the fourth.
const V4: &[&str] = &["pcid", "invpcid", "smap"];

/// In no model, only by name: five levels of paging make every walk longer.
const BY_NAME: &[&str] = &["la57"];
/// What guests call the hypervisor for, by the instruction of the maker that they see.
const HYPERCALLS: &[&str] = &["kvm_pv_send_ipi", "kvm_pv_sched_yield", "kvm_pv_unhalt"];

impl Model {
    /// All models, from `host` to the highest level.
    pub const ALL: [Self; 5] = [Self::Host, Self::X86_64V1, Self::X86_64V2, Self::X86_64V3, Self::X86_64V4];

    /// Its name: `host`, `x86-64-v1`, ...
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::X86_64V1 => "x86-64-v1",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
            Self::X86_64V4 => "x86-64-v4",
        }
    }

    /// The features of a named model beside the base, in groups; of `host` none.
    fn groups(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Host => &[],
            Self::X86_64V1 => &[V1],
            Self::X86_64V2 => &[V1, LEVEL2, V2],
            Self::X86_64V3 => &[V1, LEVEL2, V2, LEVEL3, V3],
            Self::X86_64V4 => &[V1, LEVEL2, V2, LEVEL3, V3, LEVEL4, V4],
        }
    }

    fn contains(self, feature: &Feature) -> bool {
        feature.giver == Giver::Base || self.groups().iter().any(|group| group.contains(&feature.name))
    }

    /// Names of the features of a named model, in the table's order; `None` for `host`, which depends on the host.
    pub fn features(self) -> Option<Vec<&'static str>> {
        if self == Self::Host {
            return None;
        }
        Some(FEATURES.iter().filter(|feature| self.contains(feature)).map(|feature| feature.name).collect())
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a feature cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The software CPU has no such thing.
    NotInSoftware,
    /// The host's processor has no such thing.
    NotOnHost,
    /// The host's kernel has not enabled the registers that it works on.
    NotEnabled,
    /// The back end does not offer it on this host.
    NotOffered,
    /// Something that it needs cannot be had.
    Needs(&'static str),
    /// HLT does not leave the guest, and this wakes those who have left.
    NoHltExits,
    /// Guests would call the hypervisor by the instruction of another maker than the host's.
    OtherMaker,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInSoftware => f.write_str("not in the software CPU"),
            Self::NotOnHost => f.write_str("not in this host's processor"),
            Self::NotEnabled => f.write_str("not enabled by this host's kernel"),
            Self::NotOffered => f.write_str("not offered by the back end on this host"),
            Self::Needs(need) => write!(f, "it needs {need}, which cannot be had"),
            Self::NoHltExits => f.write_str("of no use when HLT does not leave the guest"),
            Self::OtherMaker => {
                f.write_str("this host's maker has another instruction for it than the model's")
            }
        }
    }
}

/// What is wrong with a choice of model and features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyError {
    /// There is no such feature.
    Unknown {
        /// The name that was given.
        name: String,
        /// The nearest known one.
        nearest: Option<&'static str>,
    },
    /// The feature cannot be set.
    Fixed {
        /// Its name.
        feature: &'static str,
        /// Why.
        why: &'static str,
    },
    /// The host or the back end lacks features that were asked for.
    Unavailable {
        /// The model that has them; `None` if a feature was asked for by name.
        model: Option<Model>,
        /// Which, and why.
        features: Vec<(&'static str, Reason)>,
    },
    /// A feature was turned on without those that it needs.
    Needs {
        /// Its name.
        feature: &'static str,
        /// What is missing, directly or not.
        missing: Vec<&'static str>,
    },
    /// A feature was turned off that others need.
    NeededBy {
        /// Its name.
        feature: &'static str,
        /// Those that need it, directly or not.
        dependents: Vec<&'static str>,
    },
}

impl PolicyError {
    /// The feature that was set wrongly; `None` if it is the model that cannot be.
    pub fn feature(&self) -> Option<&str> {
        match self {
            Self::Unknown { name, .. } => Some(name),
            Self::Fixed { feature, .. } | Self::Needs { feature, .. } | Self::NeededBy { feature, .. } => {
                Some(feature)
            }
            Self::Unavailable { model: Some(_), .. } => None,
            Self::Unavailable { features, .. } => features.first().map(|(feature, _)| *feature),
        }
    }
}

impl std::error::Error for PolicyError {}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { name, nearest } => {
                let short: String = name.chars().take(40).collect();
                write!(f, "unknown CPU feature {short:?}")?;
                nearest.map_or(Ok(()), |name| write!(f, "; did you mean {name:?}?"))
            }
            Self::Fixed { feature, why } => {
                write!(f, "CPU feature {feature} cannot be set: {why}; leave it out")
            }
            Self::Unavailable { model: None, features } => {
                write!(f, "CPU feature {} cannot be had here; leave it out", grouped(features))
            }
            Self::Unavailable { model: Some(model), features } => {
                write!(
                    f,
                    "CPU model {model} cannot be had here, for lack of {}; choose a lower model or turn these off",
                    grouped(features)
                )
            }
            Self::Needs { feature, missing } => {
                write!(f, "CPU feature {feature} needs {}; turn on what is missing too", missing.join(", "))
            }
            Self::NeededBy { feature, dependents } => {
                write!(f, "CPU feature {feature} is needed by {}; turn those off too", dependents.join(", "))
            }
        }
    }
}

/// `a, b (reason), c (reason)`.
fn grouped(features: &[(&'static str, Reason)]) -> String {
    let groups = features.chunk_by(|(_, a), (_, b)| a == b).map(|group| {
        let names: Vec<&str> = group.iter().map(|(name, _)| *name).collect();
        format!("{} ({})", names.join(", "), group[0].1)
    });
    groups.collect::<Vec<_>>().join(", ")
}

/// What can be had of a back end with table `host`: for each feature nothing, or why not.
pub(super) fn lacking(host: &CpuidTable, options: &PolicyOptions) -> Vec<Option<Reason>> {
    let other_maker = options.provider == Provider::Hardware
        && options.model != Model::Host
        && Maker::of(host) != Maker::Intel;
    let mut can = Set::new(|_, _| false);
    let mut reasons = Vec::with_capacity(FEATURES.len());
    for (at, feature) in FEATURES.iter().enumerate() {
        let reason = match options.provider {
            Provider::Software => match feature.giver {
                Giver::Base | Giver::Own => None,
                Giver::Host if !feature.is_in(host) => Some(Reason::NotOnHost),
                Giver::Host => None,
                Giver::Hardware => Some(Reason::NotInSoftware),
            },
            // A statement of ours; KVM leaves it to the caller.
            Provider::Hardware if feature.name == "hypervisor" => None,
            Provider::Hardware if !feature.is_in(host) => Some(Reason::NotOffered),
            Provider::Hardware => match feature.name {
                "kvm_pv_unhalt" if !options.hlt_exits => Some(Reason::NoHltExits),
                name if other_maker && HYPERCALLS.contains(&name) => Some(Reason::OtherMaker),
                _ => None,
            },
        };
        let state =
            || (!xsave::has_state(feature.name, host, options.provider)).then_some(Reason::NotEnabled);
        let reason = reason.or_else(state).or_else(|| can.lacks(at).map(Reason::Needs));
        can.set(at, reason.is_none());
        reasons.push(reason);
    }
    reasons
}

/// The features to show.
pub(super) fn select(host: &CpuidTable, options: &PolicyOptions) -> Result<Set, PolicyError> {
    let lacking = lacking(host, options);
    let wishes = wishes(&options.features)?;
    let wish = |at: usize| wishes.iter().find(|wish| wish.0 == at).map(|wish| wish.1);
    let named = options.model != Model::Host;
    let in_model = |at: usize, feature: &Feature| {
        if named {
            options.model.contains(feature)
        } else {
            // Without the base there is no processor: that it is missing must be told.
            feature.giver == Giver::Base || lacking[at].is_none() && !BY_NAME.contains(&feature.name)
        }
    };
    let shown = Set::new(|at, feature| wish(at).unwrap_or_else(|| in_model(at, feature)));

    let refused = |wished: bool| {
        let missing = shown.iter().filter(|&at| (wish(at) == Some(true)) == wished);
        let missing = missing.filter_map(|at| Some((FEATURES[at].name, lacking[at]?)));
        missing.collect::<Vec<_>>()
    };
    let features = refused(false);
    if !features.is_empty() {
        return Err(PolicyError::Unavailable { model: Some(options.model), features });
    }
    // One feature an error: each has a place in the configuration.
    if let Some(&feature) = refused(true).first() {
        return Err(PolicyError::Unavailable { model: None, features: vec![feature] });
    }
    for &(at, on) in &wishes {
        let feature = FEATURES[at].name;
        if !on {
            let dependents = shown.dependents_of(at);
            if !dependents.is_empty() {
                return Err(PolicyError::NeededBy { feature, dependents });
            }
        }
    }
    for &(at, on) in &wishes {
        if on && shown.lacks(at).is_some() {
            return Err(PolicyError::Needs { feature: FEATURES[at].name, missing: shown.missing_for(at) });
        }
    }
    Ok(shown)
}

/// Checks what can be checked of features without a host: that there are such, and that they can be set.
pub fn check_names(features: &BTreeMap<String, bool>) -> Result<(), PolicyError> {
    wishes(features).map(drop)
}

/// Features by position, and whether they shall be on.
fn wishes(features: &BTreeMap<String, bool>) -> Result<Vec<(usize, bool)>, PolicyError> {
    let wish = |(name, &on): (&String, &bool)| {
        if let Some(&(feature, why)) = DERIVED.iter().find(|(derived, _)| derived == name) {
            return Err(PolicyError::Fixed { feature, why });
        }
        let Some(at) = position(name) else {
            return Err(PolicyError::Unknown { name: name.clone(), nearest: nearest(name) });
        };
        if FEATURES[at].giver == Giver::Base && !on {
            let why = "every x86-64 processor has it";
            return Err(PolicyError::Fixed { feature: FEATURES[at].name, why });
        }
        Ok((at, on))
    };
    features.iter().map(wish).collect()
}
