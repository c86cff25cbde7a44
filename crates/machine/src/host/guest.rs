//! What processors guests can have here.

use std::collections::BTreeMap;

use serde::Serialize;
use skep_hv::Hypervisor;
use skep_hv::cpuid::{self, CpuidTable, Model, Provider};
use skep_kvm::{Kvm, KvmOptions};

/// What one back end can give.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestCpu {
    /// The back end's name.
    pub back_end: &'static str,
    /// All models.
    pub models: Vec<GuestModel>,
    /// All features by name, and whether they can be had.
    pub features: BTreeMap<&'static str, bool>,
}

/// A model of processor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GuestModel {
    /// Its name.
    pub name: Model,
    /// Whether it can be had.
    pub available: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl GuestCpu {
    /// The software CPU.
    pub(super) fn software() -> Self {
        Self::of("software", &cpuid::host(), Provider::Software)
    }

    /// KVM, if it can be asked.
    pub(super) fn kvm() -> Option<Self> {
        let table = Kvm::open(KvmOptions::default()).ok()?.cpuid().ok()?;
        Some(Self::of("kvm", &table, Provider::Hardware))
    }

    /// A back end that can give `table`.
    fn of(back_end: &'static str, table: &CpuidTable, provider: Provider) -> Self {
        let model = |(name, can): (Model, Result<(), cpuid::PolicyError>)| GuestModel {
            name,
            available: can.is_ok(),
            reason: can.err().map(|error| error.to_string()),
        };
        let models = cpuid::models(table, provider).into_iter().map(model).collect();
        let features = cpuid::available(table, provider);
        Self {
            back_end,
            models,
            features: features.into_iter().map(|(name, why)| (name, why.is_none())).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_software_cpu_gives_what_the_host_executes() {
        let guest = GuestCpu::software();
        let json = serde_json::to_value(&guest).unwrap();
        assert_eq!(json["backEnd"], "software");
        assert_eq!(json["models"][0], serde_json::json!({ "name": "host", "available": true }));
        assert_eq!(json["models"][1]["name"], "x86-64-v1");
        assert_eq!(guest.features["aes"], std::arch::is_x86_feature_detected!("aes"));
        assert!(guest.features["lm"] && !guest.features["fma4"]);
        let level = guest.models.last().unwrap();
        assert!(
            level.available != level.reason.as_ref().is_some_and(|why| why.contains("avx512f")),
            "{level:?}"
        );
        // A model is there exactly if its features are.
        for (name, model) in Model::ALL.iter().zip(&guest.models).skip(1) {
            let there = name.features().unwrap().iter().all(|feature| guest.features[feature]);
            assert_eq!(model.available, there, "{name}");
        }
    }
}
