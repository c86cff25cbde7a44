//! Model-specific registers: which there are, and moving them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm as KvmFd, VcpuFd};
use skep_hv::state::StateError;

use crate::error::Moved;

pub(crate) const IA32_TSC: u32 = 0x10;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_ADJUST: u32 = 0x3b;
pub(crate) const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
pub(crate) const IA32_MISC_ENABLE: u32 = 0x1a0;
/// IA32_MISC_ENABLE: what firmware switches on, and KVM leaves to firmware.
pub(crate) const FAST_STRINGS: u64 = 1;
const EFER: u32 = 0xc000_0080;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;

/// Machine-check and memory-type registers (SDM vol. 4 table 2-2), which KVM has and does not list.
const UNLISTED: &[std::ops::RangeInclusive<u32>] = &[
    0x17a..=0x17b,
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,
    0x2ff..=0x2ff,
    0x400..=0x427,
];

/// Registers that are in groups of their own, or that say what the host is and not what the guest has done.
const ELSEWHERE: &[u32] = &[IA32_APIC_BASE, EFER, FS_BASE, GS_BASE];

/// Registers that a saved state may hold, ascending.
pub(crate) fn candidates(kvm: &KvmFd) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let mut all = kvm.get_msr_index_list()?.as_slice().to_vec();
    all.extend(UNLISTED.iter().cloned().flatten());
    all.retain(|index| !ELSEWHERE.contains(index));
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

fn batch(entries: &[(u32, u64)]) -> Option<Msrs> {
    let entries: Vec<_> =
        entries.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).ok()
}

/// Reads those of `indices` that this vCPU has.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        // Far below the most that one request may hold.
        let (now, later) = rest.split_at(rest.len().min(64));
        let zeros: Vec<_> = now.iter().map(|&index| (index, 0)).collect();
        let Some(mut msrs) = batch(&zeros) else { break };
        let done = vcpu.get_msrs(&mut msrs).moved("KVM_GET_MSRS")?;
        values.extend(msrs.as_slice().iter().take(done).map(|entry| (entry.index, entry.data)));
        // KVM stops at the first that it does not have.
        rest = if done == now.len() { later } else { &rest[done + 1..] };
    }
    Ok(values)
}

/// Writes. A register that this vCPU does not have is passed over if its value is zero, or the one that it cannot lose.
pub(crate) fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), StateError> {
    // The adjustment follows the TSC, and the deadline is compared with it.
    let order = |index: u32| match index {
        IA32_TSC => 0,
        IA32_TSC_ADJUST => 1,
        IA32_TSC_DEADLINE => 3,
        _ => 2,
    };
    let mut sorted = values.to_vec();
    sorted.sort_by_key(|&(index, _)| (order(index), index));
    let mut rest = &sorted[..];
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rest.len().min(64));
        let Some(msrs) = batch(now) else { break };
        let done = vcpu.set_msrs(&msrs).moved("KVM_SET_MSRS")?;
        if done == now.len() {
            rest = later;
            continue;
        }
        let (index, value) = rest[done];
        if value != 0 && read(vcpu, &[index])? != [(index, value)] {
            return Err(StateError::Msr(index));
        }
        rest = &rest[done + 1..];
    }
    Ok(())
}
