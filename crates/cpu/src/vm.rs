//! What the machine sees: the hypervisor contract on the software CPU, and how its vCPUs reach one another.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use skep_hv::cpuid::CpuidTable;
use skep_hv::state::{CpuState, StateError, StateGroups};
use skep_hv::{
    HvError, Hypervisor, Kick, Probe, RunEnd, Vcpu, VcpuIo, VcpuStats, Vm, VmOptions, monotonic_ns,
};
use skep_memory::GuestMemory;

use crate::cpu::Cpu;
use crate::system;

/// Bits of [`Mailbox::attention`].
pub(crate) mod mail {
    /// Leave the guest.
    pub(crate) const KICK: u32 = 1 << 0;
    /// The local APIC has something.
    pub(crate) const WAKE: u32 = 1 << 1;
    /// Forget cached permissions to write.
    pub(crate) const FLUSH: u32 = 1 << 2;
    /// Somebody must be alone for a moment.
    pub(crate) const STAND_STILL: u32 = 1 << 3;
}

/// Where other threads leave word for one vCPU.
pub(crate) struct Mailbox {
    /// What waits; looked at between blocks.
    pub(crate) attention: AtomicU32,
    /// The vCPU executes guest instructions, or may begin to.
    pub(crate) in_guest: AtomicBool,
    /// What this vCPU's guest has added to the VM's TSC.
    tsc_offset: AtomicU64,
    /// The last flush that was answered.
    flushed: AtomicU64,
    sleeping: Mutex<bool>,
    bell: Condvar,
}

impl Mailbox {
    pub(crate) fn new() -> Self {
        Self {
            attention: AtomicU32::new(0),
            in_guest: AtomicBool::new(false),
            tsc_offset: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            sleeping: Mutex::new(false),
            bell: Condvar::new(),
        }
    }

    /// Shows the machine what the guest has added to this vCPU's TSC.
    pub(crate) fn set_tsc_offset(&self, offset: u64) {
        self.tsc_offset.store(offset, Ordering::Relaxed);
    }

    fn post(&self, bits: u32) {
        self.attention.fetch_or(bits, Ordering::SeqCst);
        if *self.sleeping.lock().unwrap_or_else(PoisonError::into_inner) {
            self.bell.notify_all();
        }
    }

    /// Sleeps until there is mail or `deadline` (monotonic ns).
    pub(crate) fn wait(&self, deadline: u64) {
        let mut sleeping = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
        *sleeping = true;
        while self.attention.load(Ordering::SeqCst) == 0 {
            let now = monotonic_ns();
            if now >= deadline {
                break;
            }
            sleeping = if deadline == u64::MAX {
                self.bell.wait(sleeping).unwrap_or_else(PoisonError::into_inner)
            } else {
                let nap = Duration::from_nanos(deadline - now);
                self.bell.wait_timeout(sleeping, nap).unwrap_or_else(PoisonError::into_inner).0
            };
        }
        *sleeping = false;
    }
}

impl Kick for Mailbox {
    fn kick(&self) {
        self.post(mail::KICK);
    }
    fn wake(&self) {
        self.post(mail::WAKE);
    }
}

/// What executes guest instructions.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// The JIT; the interpreter for what is not worth a translation or has none.
    #[default]
    Jit,
    /// The interpreter alone.
    Interpreter,
    /// Both, block by block, for diagnosis: what the JIT makes of a block is compared with what the interpreter does. It
    /// takes exactly one vCPU, because another one would change memory in between.
    Lockstep,
}

/// What all vCPUs of a VM share.
pub(crate) struct Shared {
    /// What executes guest instructions.
    pub(crate) engine: Engine,
    /// What CPUID shows.
    pub(crate) cpuid: CpuidTable,
    /// Guest TSC frequency in Hz.
    pub(crate) tsc_hz: u64,
    mailboxes: Vec<Arc<Mailbox>>,
    flushes: AtomicU64,
    alone: AtomicBool,
}

impl Shared {
    /// For vCPUs that the interpreter runs.
    pub(crate) fn new(options: VmOptions) -> Arc<Self> {
        Self::with_engine(options, Engine::Interpreter)
    }

    pub(crate) fn with_engine(options: VmOptions, engine: Engine) -> Arc<Self> {
        let mailboxes = (0..options.vcpus).map(|_| Arc::new(Mailbox::new())).collect();
        let tsc_hz = options.tsc_hz.unwrap_or_else(system::host_tsc_hz);
        Arc::new(Self {
            engine,
            cpuid: options.cpuid,
            tsc_hz,
            mailboxes,
            flushes: AtomicU64::new(0),
            alone: AtomicBool::new(false),
        })
    }

    /// Asks every vCPU but `except` to forget cached write permissions, and waits until none can use one any more.
    fn flush_others(&self, except: Option<u32>) {
        if self.mailboxes.len() == 1 && except.is_some() {
            return;
        }
        let number = self.flushes.fetch_add(1, Ordering::SeqCst) + 1;
        let others =
            || self.mailboxes.iter().enumerate().filter(|&(i, _)| Some(i as u32) != except).map(|(_, m)| m);
        for mailbox in others() {
            mailbox.post(mail::FLUSH);
        }
        for mailbox in others() {
            wait_until(|| {
                !mailbox.in_guest.load(Ordering::SeqCst) || mailbox.flushed.load(Ordering::SeqCst) >= number
            });
        }
    }
}

/// Waits for another thread that needs less than a block's time if it runs, and a time slice if it does not.
fn wait_until(done: impl Fn() -> bool) {
    let mut spins = 0u32;
    while !done() {
        spins += 1;
        if spins < 200 {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// While it lives, no other vCPU of the VM executes anything.
pub(crate) struct Alone(Arc<Shared>);

impl Drop for Alone {
    fn drop(&mut self) {
        self.0.alone.store(false, Ordering::SeqCst);
    }
}

impl Cpu {
    /// Announces that guest instructions may be executed; waits while somebody must be alone.
    pub(crate) fn enter_guest(&mut self) {
        loop {
            self.mailbox.in_guest.store(true, Ordering::SeqCst);
            if !self.shared.alone.load(Ordering::SeqCst) {
                break;
            }
            self.mailbox.in_guest.store(false, Ordering::SeqCst);
            wait_until(|| !self.shared.alone.load(Ordering::SeqCst));
        }
        // A flush that was asked for while we were out counted us as done.
        if self.mailbox.attention.load(Ordering::SeqCst) & mail::FLUSH != 0 {
            self.answer_flush();
        }
    }

    /// Forgets cached write permissions and says so.
    pub(crate) fn answer_flush(&mut self) {
        self.mailbox.attention.fetch_and(!mail::FLUSH, Ordering::SeqCst);
        let number = self.shared.flushes.load(Ordering::SeqCst);
        self.tlb.forget_writes();
        self.mailbox.flushed.fetch_max(number, Ordering::SeqCst);
    }

    /// Makes every vCPU of the VM forget cached write permissions to these pages (of the host): they have become watched.
    pub(crate) fn everyone_forgets_writes(&mut self, pages: [NonNull<u8>; 2]) {
        self.tlb.forget_writes_to(pages[0]);
        if pages[1] != pages[0] {
            self.tlb.forget_writes_to(pages[1]);
        }
        let was_in = self.mailbox.in_guest.swap(false, Ordering::SeqCst);
        self.shared.flush_others(Some(self.id));
        if was_in {
            self.enter_guest();
        }
    }

    /// Brings every other vCPU to a stop between two blocks.
    pub(crate) fn stand_alone(&mut self) -> Alone {
        let was_in = self.mailbox.in_guest.swap(false, Ordering::SeqCst);
        wait_until(|| {
            self.shared.alone.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        });
        for (i, mailbox) in self.shared.mailboxes.iter().enumerate() {
            if i as u32 != self.id {
                mailbox.post(mail::STAND_STILL);
                wait_until(|| !mailbox.in_guest.load(Ordering::SeqCst));
            }
        }
        self.mailbox.in_guest.store(was_in, Ordering::SeqCst);
        Alone(self.shared.clone())
    }
}

/// The software CPU as a hypervisor: available on every x86-64 host.
#[derive(Debug, Default, Clone, Copy)]
pub struct Software {
    engine: Engine,
}

impl Software {
    /// The back end with its default engine.
    pub fn new() -> Self {
        Self::default()
    }

    /// The back end with this engine.
    pub fn with_engine(engine: Engine) -> Self {
        Self { engine }
    }
}

impl Hypervisor for Software {
    fn probe(&self) -> Probe {
        let available = cfg!(target_arch = "x86_64");
        let reason = if available { "runs on every x86-64 host" } else { "needs an x86-64 host" };
        Probe { name: "software", available, reason: reason.into() }
    }

    fn tsc_hz(&self) -> u64 {
        system::host_tsc_hz()
    }

    fn create_vm(&self, memory: GuestMemory, options: VmOptions) -> Result<Arc<dyn Vm>, HvError> {
        if options.vcpus == 0 || options.vcpus > 255 {
            return Err(HvError::Invalid(format!("{} vCPUs; a VM has 1 to 255", options.vcpus)));
        }
        let shared = Shared::with_engine(options, self.engine);
        if shared.engine == Engine::Lockstep && shared.mailboxes.len() != 1 {
            let vcpus = shared.mailboxes.len();
            return Err(HvError::Invalid(format!("{vcpus} vCPUs; lockstep takes exactly one")));
        }
        let clock = system::Tsc::new(shared.tsc_hz);
        Ok(Arc::new(SoftwareVm { memory, shared, clock }))
    }
}

struct SoftwareVm {
    memory: GuestMemory,
    shared: Arc<Shared>,
    clock: system::Tsc,
}

impl Vm for SoftwareVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, HvError> {
        let mailbox = self.shared.mailboxes.get(id as usize);
        let mailbox = mailbox
            .ok_or_else(|| HvError::Invalid(format!("vCPU {id} of {}", self.shared.mailboxes.len())))?;
        let cpu =
            Cpu::new(id, self.memory.clone(), self.shared.clone(), mailbox.clone(), self.clock.clone())?;
        Ok(Box::new(SoftwareVcpu { cpu }))
    }

    fn memory_changed(&self) -> Result<(), HvError> {
        Ok(())
    }

    fn sync_dirty_log(&self) -> Result<(), HvError> {
        self.shared.flush_others(None);
        Ok(())
    }

    fn tsc_hz(&self) -> u64 {
        self.shared.tsc_hz
    }

    fn tsc(&self, vcpu: u32) -> u64 {
        let offset =
            self.shared.mailboxes.get(vcpu as usize).map_or(0, |m| m.tsc_offset.load(Ordering::Relaxed));
        self.clock.now().wrapping_add(offset)
    }
}

struct SoftwareVcpu {
    cpu: Box<Cpu>,
}

impl Vcpu for SoftwareVcpu {
    fn run(&mut self, io: &mut dyn VcpuIo) -> RunEnd {
        self.cpu.run(io)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.cpu.mailbox.clone()
    }

    fn get_state(&mut self, groups: StateGroups) -> Result<CpuState, StateError> {
        self.cpu.get_state(groups)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.cpu.set_state(state)
    }

    fn reset(&mut self) {
        self.cpu.power_on_reset();
    }

    fn stats(&self) -> VcpuStats {
        self.cpu.stats.clone()
    }
}

#[cfg(test)]
mod tests {
    use skep_memory::{RegionKind, RegionSpec};

    use super::*;

    #[test]
    fn lockstep_takes_one_vcpu() {
        for (vcpus, taken) in [(1, true), (2, false)] {
            let ram = RegionSpec { start: 0, size: 0x1000, kind: RegionKind::Ram };
            let memory = GuestMemory::new(&[ram]).unwrap();
            let options = VmOptions { vcpus, tsc_hz: Some(1_000_000_000), ..VmOptions::default() };
            let vm = Software::with_engine(Engine::Lockstep).create_vm(memory, options);
            assert_eq!(vm.is_ok(), taken);
        }
    }
}
