//! A VM: memory slots, doorbells, and what all of its vCPUs share.
#![expect(unsafe_code, reason = "memory slots name host addresses")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::*;
use kvm_ioctls::{Kvm as KvmFd, VmFd};
use skep_hv::cpuid::CpuidTable;
use skep_hv::irq::{BackEndApics, Doorbell, IoAddress, Signal};
use skep_hv::{HvError, Vcpu, Vm, VmOptions};
use skep_memory::{GuestMemory, PAGE_SIZE, RegionKind};

use crate::apics::{Apics, PINS};
use crate::capabilities::{Capabilities, DISABLE_HLT, DISABLE_PAUSE};
use crate::dirty::DirtyLog;
use crate::error::Tried;
use crate::ioctl;
use crate::kick::Kicker;
use crate::state::Shape;
use crate::vcpu::KvmVcpu;

/// Four pages below the largest ROM and above the local APICs, where no machine has memory: Intel processors without
/// "unrestricted guest" need them to run real mode.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TASK_STATE: usize = 0xfeff_d000;

/// What vCPUs share.
pub(crate) struct Shared {
    pub(crate) memory: GuestMemory,
    pub(crate) options: VmOptions,
    /// What the guest finds when it executes CPUID.
    pub(crate) seen: CpuidTable,
    pub(crate) capabilities: Capabilities,
    pub(crate) shape: Shape,
    pub(crate) tsc_hz: u64,
    pub(crate) dirty: DirtyLog,
    pub(crate) apics: Apics,
    pub(crate) kickers: Vec<Arc<Kicker>>,
    /// For how many looks in a row each vCPU has been unable to go on by itself: halted with interrupts disabled, or waiting
    /// for a start-up IPI.
    still: Vec<AtomicU32>,
}

impl Shared {
    /// Says whether `vcpu` has stood still since it was last looked at, and asks whether all have for several looks. A
    /// processor that waits for a paravirtual lock halts with interrupts disabled too, until another wakes it: after that
    /// many looks at this one, the others have been looked at since it halted, and none was left to wake it.
    pub(crate) fn all_still(&self, vcpu: u32, still: bool) -> bool {
        const LOOKS: u32 = 4;
        if let Some(looks) = self.still.get(vcpu as usize) {
            looks.store(
                if still { looks.load(Ordering::SeqCst).saturating_add(1) } else { 0 },
                Ordering::SeqCst,
            );
        }
        still && self.still.iter().all(|looks| looks.load(Ordering::SeqCst) >= LOOKS)
    }
}

/// A VM on KVM.
pub(crate) struct KvmVm {
    fd: Arc<VmFd>,
    shared: Arc<Shared>,
}

fn enable(vm: &VmFd, cap: u32, argument: u64, what: &'static str) -> Result<(), HvError> {
    let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&cap).tried(what)
}

impl KvmVm {
    pub(crate) fn create(
        kvm: &KvmFd,
        capabilities: Capabilities,
        dirty_ring: u32,
        tsc_hz: u64,
        memory: GuestMemory,
        options: VmOptions,
    ) -> Result<Self, HvError> {
        if options.vcpus == 0 || options.vcpus > capabilities.max_vcpus {
            let text = format!("{} vCPUs; KVM runs 1 to {} here", options.vcpus, capabilities.max_vcpus);
            return Err(HvError::Invalid(text));
        }
        let fd = Arc::new(kvm.create_vm().tried("KVM_CREATE_VM")?);
        fd.set_tss_address(TASK_STATE).tried("KVM_SET_TSS_ADDR")?;
        fd.set_identity_map_address(IDENTITY_MAP).tried("KVM_SET_IDENTITY_MAP_ADDR")?;
        enable(&fd, KVM_CAP_SPLIT_IRQCHIP, PINS.into(), "KVM_CAP_SPLIT_IRQCHIP")?;
        if capabilities.x2apic_api {
            let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
            enable(&fd, KVM_CAP_X2APIC_API, flags.into(), "KVM_CAP_X2APIC_API")?;
        }
        let keep = if options.exits.hlt { 0 } else { DISABLE_HLT }
            | if options.exits.pause { 0 } else { DISABLE_PAUSE };
        // Where the host cannot leave the guest alone, it does not: that costs speed and nothing else.
        if keep & capabilities.disable_exits != 0 {
            let keep = keep & capabilities.disable_exits;
            enable(&fd, KVM_CAP_X86_DISABLE_EXITS, keep, "KVM_CAP_X86_DISABLE_EXITS")?;
        }
        if let Some(ns) = options.exits.halt_poll_ns.filter(|_| capabilities.halt_poll) {
            enable(&fd, KVM_CAP_HALT_POLL, ns.into(), "KVM_CAP_HALT_POLL")?;
        }
        if capabilities.exit_on_emulation_failure {
            enable(&fd, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1, "KVM_CAP_EXIT_ON_EMULATION_FAILURE")?;
        }
        let entry = size_of::<kvm_dirty_gfn>() as u32;
        let entries = match dirty_ring.min(capabilities.dirty_ring / entry) {
            0 => 0,
            entries => 1 << entries.ilog2(),
        };
        if entries != 0 {
            enable(&fd, KVM_CAP_DIRTY_LOG_RING, (entries * entry).into(), "KVM_CAP_DIRTY_LOG_RING")?;
        }

        let (xsave, xcr0) = options.cpuid.get(0xd, 0).map_or((576, 3), |leaf| {
            (leaf.ecx.clamp(576, 4096), u64::from(leaf.edx) << 32 | u64::from(leaf.eax))
        });
        let msrs = crate::msrs::candidates(kvm).tried("KVM_GET_MSR_INDEX_LIST")?;
        let shared = Shared {
            dirty: DirtyLog::new(fd.clone(), memory.clone(), entries),
            apics: Apics::new(fd.clone()),
            kickers: (0..options.vcpus).map(|_| Arc::new(Kicker::new())).collect(),
            still: (0..options.vcpus).map(|_| AtomicU32::new(0)).collect(),
            shape: Shape { xsave_size: xsave as usize, xcr0, msrs },
            memory,
            seen: crate::finish::seen(&options.cpuid, &skep_hv::cpuid::host()),
            options,
            capabilities,
            tsc_hz,
        };
        let vm = Self { fd, shared: Arc::new(shared) };
        vm.map_memory()?;
        Ok(vm)
    }

    /// Makes a memory slot of every region, or changes their flags.
    fn map_memory(&self) -> Result<(), HvError> {
        let logging = self.shared.dirty.is_logging();
        for (slot, region) in (0..).zip(self.shared.memory.regions()) {
            let flags = match region.kind {
                RegionKind::Rom => KVM_MEM_READONLY,
                RegionKind::Ram if logging => KVM_MEM_LOG_DIRTY_PAGES,
                RegionKind::Ram => 0,
            };
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start,
                memory_size: region.size,
                userspace_addr: region.host.as_ptr() as u64,
            };
            // SAFETY: the region is mapped in this process for as long as the memory lives, which `Shared` holds; nothing
            // else in the process takes it for a Rust object.
            unsafe { self.fd.set_user_memory_region(slot) }.tried("KVM_SET_USER_MEMORY_REGION")?;
        }
        Ok(())
    }

    /// What a doorbell is to the kernel; `None` if it cannot be one.
    fn io_event(&self, doorbell: Doorbell, event: &dyn Signal) -> Option<kvm_ioeventfd> {
        use std::os::fd::AsRawFd;
        if doorbell.width == 0 && (doorbell.value.is_some() || !self.shared.capabilities.any_length) {
            return None;
        }
        let (addr, space) = match doorbell.address {
            IoAddress::Port(port) => (port.into(), 1 << kvm_ioeventfd_flag_nr_pio),
            IoAddress::Memory(gpa) => (gpa, 0),
        };
        let matching = if doorbell.value.is_some() { 1 << kvm_ioeventfd_flag_nr_datamatch } else { 0 };
        Some(kvm_ioeventfd {
            datamatch: doorbell.value.unwrap_or(0),
            addr,
            len: doorbell.width.into(),
            fd: event.event_fd()?.as_raw_fd(),
            flags: space | matching,
            ..Default::default()
        })
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, HvError> {
        if id >= self.shared.options.vcpus {
            return Err(HvError::Invalid(format!("vCPU {id} of {}", self.shared.options.vcpus)));
        }
        let fd = self.fd.create_vcpu(id.into()).tried("KVM_CREATE_VCPU")?;
        Ok(Box::new(KvmVcpu::new(id, fd, self.fd.run_size(), self.shared.clone())?))
    }

    fn apics(&self) -> Option<Arc<dyn BackEndApics>> {
        Some(Arc::new(self.shared.apics.clone()))
    }

    fn memory_changed(&self) -> Result<(), HvError> {
        self.map_memory()
    }

    fn sync_dirty_log(&self) -> Result<(), HvError> {
        self.shared.dirty.sync(&self.shared.kickers, || self.map_memory())
    }

    fn attach_doorbell(&self, doorbell: Doorbell, event: &Arc<dyn Signal>) -> Result<bool, HvError> {
        let Some(request) = self.io_event(doorbell, &**event) else { return Ok(false) };
        ioctl::io_event(&self.fd, &request)
            .map(|()| true)
            .map_err(|source| HvError::Os { what: "KVM_IOEVENTFD", source })
    }

    fn detach_doorbell(&self, doorbell: Doorbell, event: &Arc<dyn Signal>) {
        if let Some(mut request) = self.io_event(doorbell, &**event) {
            request.flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
            // One that is not there is gone already.
            let _ = ioctl::io_event(&self.fd, &request);
        }
    }

    fn tsc_hz(&self) -> u64 {
        self.shared.tsc_hz
    }
}

/// Pages of guest memory are the unit of the dirty log.
const _: () = assert!(PAGE_SIZE == 4096);
